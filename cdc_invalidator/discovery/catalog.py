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
from cdc_invalidator.discovery.matching import usable_pairs, usable_values
from cdc_invalidator.discovery.schema import Category, Column, PairQuestion, Question, TableInfo
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
# A column with more values than this is not one of a few.
FEW_VALUES = 30

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
    values = {
        (Table(row.schema, row.name), row.column): frozenset(row.values)
        for row in await rows(connection, _VALUES, {"few": FEW_VALUES})
    }
    indexes: dict[Table, list[tuple[str, str]]] = {}
    for row in await rows(connection, _INDEXES):
        indexes.setdefault(Table(row.schema, row.name), []).append((row.first, row.second))
    for row in await rows(connection, _TABLES, {"small": SMALL_PAGES, "most": MOST_TABLES}):
        table = Table(row.schema, row.name)
        columns = tuple(
            Column(name, Category(category), askable, values.get((table, name), frozenset()))
            for name, category, askable in zip(row.columns, row.categories, row.askable, strict=True)
        )
        of_table = {each.name: references[table, each.name] for each in columns if (table, each.name) in references}
        found[table] = TableInfo(table, columns, tuple(row.key), of_table, tuple(indexes.get(table, ())))
    return list(found.values())


async def look_up(
    connection: psycopg.AsyncConnection[Any],
    families: Sequence[Family],
    schema: Sequence[TableInfo],
    questions: Sequence[Question | PairQuestion],
    tell: Callable[[], None],
) -> dict[Question | PairQuestion, float]:
    """Ask for the sampled values of parameters; what takes too long, or is not allowed, has no answer.

    ``tell`` is called after each question.
    """
    categories = {(info.table, column.name): column.category for info in schema for column in info.columns}
    answers: dict[Question | PairQuestion, float] = {}
    for question in questions:
        if isinstance(question, PairQuestion):
            pairs = usable_pairs(families[question.family], question.parameters)
            found = await _held_pairs(connection, question, categories, pairs)
            if found is not None and pairs:
                answers[question] = found / len(pairs)
            tell()
            continue
        values = usable_values(families[question.family].parameters[question.parameter].values)
        category = categories[question.table, question.column]
        # What the type can't be is not there.
        fitting = [value for value in values if _FITS[category](value)]
        held = await _held(connection, question, category, fitting) if fitting else 0
        if held is not None and values:
            answers[question] = held / len(values)
        tell()
    return answers


async def _held_pairs(
    connection: psycopg.AsyncConnection[Any],
    question: PairQuestion,
    categories: Mapping[tuple[Table, str], Category],
    pairs: list[tuple[str, str]],
) -> int | None:
    kinds = [categories[question.table, column] for column in question.columns]
    # What the types can't be is not there; values of other types are compared as they are printed.
    tests = [_FITS[kind] if kind in _TYPES else _FITS[Category.TEXT] for kind in kinds]
    fitting = [pair for pair in pairs if all(test(value) for test, value in zip(tests, pair, strict=True))]
    names = [identifier(column).replace("%", "%%") for column in question.columns]
    compared = [
        f"{name} = given.{given}::{_TYPES[kind]}" if kind in _TYPES else f"{name}::text = given.{given}"
        for name, given, kind in zip(names, ("one", "other"), kinds, strict=True)
    ]
    query = _HELD_PAIRS.format(table=qualified(question.table).replace("%", "%%"), condition=" AND ".join(compared))
    one, other = [pair[0] for pair in fitting], [pair[1] for pair in fitting]
    return await _counted(connection, query, {"one": one, "other": other})


async def _held(
    connection: psycopg.AsyncConnection[Any], question: Question, category: Category, values: list[str]
) -> int | None:
    table, column = (name.replace("%", "%%") for name in (qualified(question.table), identifier(question.column)))
    query = _HELD.format(type=_TYPES[category], table=table, column=column)
    return await _counted(connection, query, {"values": values})


async def _counted(connection: psycopg.AsyncConnection[Any], query: str, given: Mapping[str, list[str]]) -> int | None:
    """Return the number that a query counts; ``None`` if it takes too long, or is not allowed."""
    try:
        ((held,),) = await rows(connection, query, given)
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

_HELD_PAIRS = """
SELECT count(found.one) FROM unnest(%(one)s::text[], %(other)s::text[]) AS given (one, other)
LEFT JOIN LATERAL (SELECT 1 AS one FROM {table} WHERE {condition} LIMIT 1) AS found ON true
"""

_OF_USERS = "n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%%'"

# All values of columns that have only a few: the labels of an enum, or what ANALYZE has seen of a text.
_VALUES = f"""
SELECT n.nspname AS schema, c.relname AS name, a.attname AS column, coalesce(
  (SELECT array_agg(e.enumlabel::text) FROM pg_enum e WHERE e.enumtypid = t.oid),
  s.most_common_vals::text::text[]) AS values
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid AND t.typcategory IN ('E', 'S')
LEFT JOIN pg_stats s ON s.schemaname = n.nspname AND s.tablename = c.relname AND s.attname = a.attname
  AND s.inherited = (c.relkind = 'p') AND t.typcategory = 'S' AND s.most_common_vals IS NOT NULL
  AND CASE WHEN s.n_distinct < 0 THEN -s.n_distinct * c.reltuples ELSE s.n_distinct END
    BETWEEN 1 AND least(%(few)s, cardinality(s.most_common_freqs), c.reltuples / 4)
WHERE c.oid >= 16384 AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND {_OF_USERS}
  AND (t.typcategory = 'E' OR s.most_common_vals IS NOT NULL)
"""  # noqa: S608  a constant

_INDEXES = f"""
SELECT n.nspname AS schema, c.relname AS name, one.attname AS first, other.attname AS second
FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid JOIN pg_am am ON am.oid = ic.relam AND am.amname = 'btree'
JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute one ON one.attrelid = c.oid AND one.attnum = i.indkey[0]
JOIN pg_attribute other ON other.attrelid = c.oid AND other.attnum = i.indkey[1]
WHERE c.oid >= 16384 AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts >= 2 AND {_OF_USERS}
  AND has_column_privilege(c.oid, one.attnum, 'SELECT') AND has_column_privilege(c.oid, other.attnum, 'SELECT')
"""  # noqa: S608  a constant

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
