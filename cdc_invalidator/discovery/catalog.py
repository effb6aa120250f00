"""Reads the catalogs of a database for `init`, and looks up sampled values.

The rule that holds here: the database is not hurt. The connection can't write. A look-up is a handful of values, each
through an index that its column leads, or in a table of at most a megabyte; it may take a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.discovery.families import UUID, Family
from cdc_invalidator.discovery.matching import usable_values
from cdc_invalidator.discovery.schema import Category, Column, Question, TableInfo
from cdc_invalidator.postgres.connection import rows
from cdc_invalidator.postgres.quoting import identifier, qualified
from cdc_invalidator.rules.table import Table

# What a connection for this is opened with, as SHOW writes it. Without the two kinds of join, each value is looked up
# by itself.
LIMITS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "1s",
    "lock_timeout": "200ms",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
# Pages of a table that is read as a whole.
SMALL_PAGES = 128
# Tables that are looked at; a database with more is one of many schemas, and CDC_POSTGRES_DSN can name one by options.
MOST_TABLES = 5000

_FITS: Mapping[Category, Callable[[str], bool]] = {
    Category.NUMBER: lambda value: value.isascii() and value.isdecimal() and len(value) < 19,
    Category.UUID: lambda value: bool(UUID.fullmatch(value)),
    Category.TEXT: lambda _: True,
    Category.OTHER: lambda _: False,
}
_TYPES = {Category.NUMBER: "bigint", Category.UUID: "uuid", Category.TEXT: "text"}


async def read_tables(connection: psycopg.AsyncConnection[Any]) -> list[TableInfo]:
    """Return the tables of the database, but for partitions and the server's own."""
    found: dict[Table, TableInfo] = {}
    references: dict[tuple[Table, str], Table] = {}
    for row in await rows(connection, _REFERENCES):
        references[Table(row.schema, row.name), row.column] = Table(row.to_schema, row.to_name)
    for row in await rows(connection, _TABLES, {"small": SMALL_PAGES, "most": MOST_TABLES}):
        table = Table(row.schema, row.name)
        columns = tuple(
            Column(name, Category(category), askable)
            for name, category, askable in zip(row.columns, row.categories, row.askable, strict=True)
        )
        of_table = {name: references[table, name] for name, _, _ in columns if (table, name) in references}
        found[table] = TableInfo(table, columns, tuple(row.key), of_table)
    return list(found.values())


async def look_up(
    connection: psycopg.AsyncConnection[Any],
    families: Sequence[Family],
    schema: Sequence[TableInfo],
    questions: Sequence[Question],
    tell: Callable[[], None],
) -> dict[Question, float]:
    """Ask for the sampled values of parameters; what takes too long, or is not allowed, has no answer.

    ``tell`` is called after each question.
    """
    categories = {(info.table, column.name): column.category for info in schema for column in info.columns}
    answers: dict[Question, float] = {}
    for question in questions:
        values = usable_values(families[question.family].parameters[question.parameter].values)
        category = categories[question.table, question.column]
        # What the type can't be is not there.
        fitting = [value for value in values if _FITS[category](value)]
        held = await _held(connection, question, category, fitting) if fitting else 0
        if held is not None and values:
            answers[question] = held / len(values)
        tell()
    return answers


async def _held(
    connection: psycopg.AsyncConnection[Any], question: Question, category: Category, values: list[str]
) -> int | None:
    table, column = (name.replace("%", "%%") for name in (qualified(question.table), identifier(question.column)))
    query = _HELD.format(type=_TYPES[category], table=table, column=column)
    try:
        ((held,),) = await rows(connection, query, {"values": values})
    except errors.InvalidatorError as error:
        if connection.broken:
            raise
        if isinstance(error, errors.Locked | errors.ServerRefuses) or _only_this(error.__cause__):
            return None
        raise
    return int(held)


def _only_this(cause: BaseException | None) -> bool:
    """Whether an error of the driver says nothing about the next look-up."""
    return isinstance(cause, psycopg.errors.QueryCanceled | psycopg.errors.DataError | psycopg.errors.ProgrammingError)


_HELD = """
SELECT count(found.one) FROM unnest(%(values)s::text[]) AS given (text)
LEFT JOIN LATERAL (SELECT 1 AS one FROM {table} WHERE {column} = given.text::{type} LIMIT 1) AS found ON true
"""

_REFERENCES = """
SELECT n.nspname AS schema, c.relname AS name, a.attname AS column, tn.nspname AS to_schema, tc.relname AS to_name
FROM pg_constraint f
JOIN pg_class c ON c.oid = f.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class tc ON tc.oid = f.confrelid JOIN pg_namespace tn ON tn.oid = tc.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = f.conkey[1]
WHERE f.contype = 'f' AND cardinality(f.conkey) = 1
"""

# A table that was never analyzed has no known size, and counts as large.
_TABLES = """
SELECT n.nspname AS schema, c.relname AS name, array_agg(a.attname::text ORDER BY a.attnum) AS columns,
  array_agg(CASE WHEN base.typcategory = 'N' AND base.typname LIKE 'int_' THEN 'number' WHEN base.typname = 'uuid'
    THEN 'uuid' WHEN base.typcategory = 'S' THEN 'text' ELSE 'other' END ORDER BY a.attnum) AS categories,
  array_agg(has_column_privilege(c.oid, a.attnum, 'SELECT') AND base.typcategory IN ('N', 'S', 'U') AND (
    c.relkind = 'r' AND c.reltuples >= 0 AND c.relpages <= %(small)s OR EXISTS (
      SELECT FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid JOIN pg_am am ON am.oid = ic.relam
      WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND i.indkey[0] = a.attnum
        AND am.amname IN ('btree', 'hash'))) ORDER BY a.attnum) AS askable,
  coalesce((SELECT array_agg(k.attname::text ORDER BY p.position)
    FROM pg_index i CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS p (number, position)
    JOIN pg_attribute k ON k.attrelid = c.oid AND k.attnum = p.number
    WHERE i.indrelid = c.oid AND i.indisprimary AND p.position <= i.indnkeyatts), '{}') AS key
FROM (
  SELECT * FROM pg_class
  WHERE oid >= 16384 AND relkind IN ('r', 'p') AND NOT relispartition AND relpersistence = 'p'
  ORDER BY oid LIMIT %(most)s
) c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type base ON base.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
WHERE n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%%'
GROUP BY c.oid, c.relkind, c.reltuples, c.relpages, n.nspname, c.relname ORDER BY 1, 2
"""
