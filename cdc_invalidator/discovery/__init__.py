"""What `init` finds out: families of keys, the tables that they come from, and a rule file to begin with."""
