"""Everything that talks to Redis; nothing here knows PostgreSQL."""
