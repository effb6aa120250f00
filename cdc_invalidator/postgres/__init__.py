"""Everything that talks to PostgreSQL; nothing here knows Redis."""
