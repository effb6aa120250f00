"""The edge to the catalogs for `explain`: a table as the database has it, and values as it shows them. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psycopg
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors
from cdc_invalidator.commands.simulate import Change, Played, Row, Shape, play
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.connection import connect, first_line, translate, translated
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.wording import nearest, shown

QUERY_SECONDS = 10
_LIMITS = f"SET default_transaction_read_only = on; SET statement_timeout = '{QUERY_SECONDS}s'"


async def ask(dsn: str, rules: RuleSet, change: Change) -> list[Played]:
    """Let a change go through the rules, with the types, the replica identity and the answers of the database.

    Raises:
        errors.InvalidatorError: the table or a column is not there, or a value is none of its type.
    """
    connection = await connect(dsn, "cdc-invalidator explain")
    async with connection:
        with translated():
            await connection.execute(_LIMITS)
        shape = await _shape(connection, rules, change.table)
        types = {column.name: column.type_oid for column in shape.relation.columns}
        old, new = await _texts(connection, change, change.old), await _texts(connection, change, change.new)
    played = play(rules, replace(change, old=old, new=new, types=types), shape)
    queries = Queries(dsn, Metrics(CollectorRegistry()))
    try:
        await queries.derive(batch for each in played for batch in each.batches)
    finally:
        queries.close()
    return played


async def _shape(connection: psycopg.AsyncConnection[Any], rules: RuleSet, table: Table) -> Shape:
    with translated():
        cursor = await connection.execute(_TABLE, {"table": str(table)})
        found = await cursor.fetchone()
        if found is None:
            raise errors.InvalidatorError(f"The database has no table {table}; check its name and CDC_POSTGRES_DSN.")
        cursor = await connection.execute(_COLUMNS, {"oid": found.oid})
        columns = tuple(
            pgoutput.Column(row.name, row.is_key, row.type_oid, row.modifier) for row in await cursor.fetchall()
        )
        cursor = await connection.execute(_ABOVE, {"oid": found.oid})
        above = [Table(row.schema, row.name) for row in await cursor.fetchall()]
    relation = pgoutput.Relation(None, found.oid, found.schema, found.name, found.identity, columns)
    named = {rule.table for rule in rules.rules}
    return Shape(relation, tuple(each for each in (Table(found.schema, found.name), *above) if each in named))


async def _texts(connection: psycopg.AsyncConnection[Any], change: Change, row: Row | None) -> Row | None:
    """Give a row's values as PostgreSQL shows them, having read them as its columns' types."""
    if not row:
        return row
    types = await _types(connection, change.table)
    for name in row:
        if name not in types:
            raise errors.InvalidatorError(f"{change.table} has no column {shown(name)}; {nearest(name, types)}")
    casts: Sequence[str] = [f"(%s::text)::{types[name]}::text" for name in row]
    try:
        # What is pasted is the catalog's own text for types; values are bound.
        cursor = await connection.execute(f"SELECT ARRAY[{', '.join(casts)}] AS texts".encode(), list(row.values()))
    except psycopg.DataError as error:
        raise errors.InvalidatorError(f"A value is none of its column's type ({first_line(error)}).") from error
    except psycopg.Error as error:
        raise translate(error) from error
    (found,) = await cursor.fetchall()
    return dict(zip(row, found.texts, strict=True))


async def _types(connection: psycopg.AsyncConnection[Any], table: Table) -> Mapping[str, str]:
    with translated():
        cursor = await connection.execute(_TYPES, {"table": str(table)})
        return {row.name: row.type.replace("%", "%%") for row in await cursor.fetchall()}


_TABLE = """
SELECT c.oid::bigint, n.nspname AS schema, c.relname AS name, c.relreplident::text AS identity
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%(table)s) AND c.relkind IN ('r', 'p')
"""

_COLUMNS = """
SELECT a.attname AS name, a.atttypid::bigint AS type_oid, a.atttypmod AS modifier,
    c.relreplident = 'f' OR EXISTS (
        SELECT FROM pg_index i
        WHERE i.indrelid = c.oid AND a.attnum = ANY (i.indkey[:i.indnkeyatts - 1])
            AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
    ) AS is_key
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.oid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum
"""

_ABOVE = """
SELECT n.nspname AS schema, c.relname AS name
FROM pg_partition_ancestors(%(oid)s::bigint::regclass) WITH ORDINALITY AS above(oid, depth)
JOIN pg_class c ON c.oid = above.oid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE above.depth > 1 ORDER BY above.depth
"""

_TYPES = """
SELECT attname AS name, format_type(atttypid, atttypmod) AS type
FROM pg_attribute WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped
"""
