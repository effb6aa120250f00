"""cdc-invalidator: busts exactly the Redis keys that each PostgreSQL commit made stale."""

__version__ = "0.1.0"
