"""Servers of our own for the demo, the rehearsal and the tests; needs the extra `embedded`."""
