"""Names and texts as SQL writes them, on one line that a terminal shows as it is. Pure."""

from __future__ import annotations

from psycopg import sql

from cdc_invalidator.rules.table import Table


def identifier(name: str) -> str:
    """Return the name quoted for SQL."""
    return _escaped(sql.Identifier(name).as_string(None))


def qualified(table: Table) -> str:
    """Return the table's name quoted for SQL, with its schema."""
    return f"{identifier(table.schema)}.{identifier(table.name)}"


def literal(text: str) -> str:
    """Return the text as a literal of SQL."""
    return sql.Literal(text).as_string(None)


def _escaped(quoted: str) -> str:
    """Return a quoted identifier with escapes for signs that can't be printed, if it has any."""
    if quoted.isprintable():
        return quoted
    signs = (sign if sign.isprintable() else f"\\+{ord(sign):06x}" for sign in quoted.replace("\\", "\\\\"))
    return f"U&{''.join(signs)}"
