"""Names and texts as SQL writes them. Pure."""

from __future__ import annotations

from psycopg import sql

from cdc_invalidator.rules.table import Table


def identifier(name: str) -> str:
    """Return the name quoted for SQL."""
    return sql.Identifier(name).as_string(None)


def qualified(table: Table) -> str:
    """Return the table's name quoted for SQL, with its schema."""
    return sql.Identifier(table.schema, table.name).as_string(None)


def literal(text: str) -> str:
    """Return the text as a literal of SQL."""
    return sql.Literal(text).as_string(None)
