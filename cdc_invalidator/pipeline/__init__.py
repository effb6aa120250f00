"""The data path: from the stream of PostgreSQL to the keys of Redis."""
