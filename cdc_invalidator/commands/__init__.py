"""What the commands do, apart from `run`; the command line itself is in `cli`."""
