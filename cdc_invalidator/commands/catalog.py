"""Asks the database for `explain`: the columns of a table, and values as PostgreSQL writes them. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.commands.simulate import Change, Played, Row, Shape, play
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.connection import answered, connect, first_line, translate
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.queries import ancestors, columns
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.wording import nearest, shown

QUERY_SECONDS = 10
_LIMITS = {"default_transaction_read_only": "on", "statement_timeout": f"{QUERY_SECONDS}s"}


async def ask(dsn: DsnSource, rules: RuleSet, change: Change) -> list[Played]:
    """Apply the rules to a change, with the types, replica identity and query results of this database.

    Raises:
        errors.InvalidatorError: the table or a column is not there, or a value does not fit its type.
    """
    async with await connect(dsn, "cdc-invalidator explain", _LIMITS) as plain:
        spelling = (await Spelling.read(plain, dsn)).values
    connection = await connect(dsn, "cdc-invalidator explain", {**_LIMITS, **spelling})
    async with connection:
        shape = await _shape(connection, rules, change.table)
        types = {column.name: column.type_oid for column in shape.relation.columns}
        old, new = await _texts(connection, change, change.old), await _texts(connection, change, change.new)
    played = play(rules, replace(change, old=old, new=new, types=types), shape)
    queries = Queries(dsn)
    queries.spell(spelling)
    try:
        await queries.derive(("first", batch, None) for each in played for batch in each.batches)
    finally:
        queries.close()
    return played


async def _shape(connection: psycopg.AsyncConnection[Any], rules: RuleSet, table: Table) -> Shape:
    with answered(connection):
        cursor = await connection.execute(_TABLE, {"table": str(table)})
        found = await cursor.fetchone()
        if found is None:
            raise errors.InvalidatorError(f"The database has no table {table}; check its name and CDC_POSTGRES_DSN.")
    stored = [column for column in (await columns(connection, [table])).get(table, ()) if not column.generated]
    of_stream = tuple(
        pgoutput.Column(column.name, column.identity, column.type_oid, column.modifier) for column in stored
    )
    above = await ancestors(connection, found.oid)
    relation = pgoutput.Relation(None, found.oid, found.schema, found.name, found.identity, of_stream)
    named = {rule.table for rule in rules.rules}
    tables = tuple(each for each in (Table(found.schema, found.name), *above) if each in named)
    return Shape(relation, tables, {column.name: column.compared for column in stored})


async def _texts(connection: psycopg.AsyncConnection[Any], change: Change, row: Row | None) -> Row | None:
    """Return a row's values as PostgreSQL shows them, having read them as its columns' types."""
    if not row:
        return row
    found_columns = (await columns(connection, [change.table])).get(change.table, ())
    types = {column.name: column.type.replace("%", "%%") for column in found_columns}
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


_TABLE = """
SELECT c.oid::bigint, n.nspname AS schema, c.relname AS name, c.relreplident::text AS identity
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%(table)s) AND c.relkind IN ('r', 'p')
"""
