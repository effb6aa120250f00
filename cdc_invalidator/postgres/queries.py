"""Catalog queries that several modules need: columns and their types, replica identities, ancestors, rights.

No query here opens the table itself, as `pg_relation_size` does: it would wait for whoever has locked the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from cdc_invalidator.postgres.connection import rows
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.table import Table

# For a table `c`: the index `i` that is its replica identity. A deferrable one can't be.
IDENTITY = """
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
  AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
"""
# The numbers of its columns. INCLUDE columns are not part of the identity.
IDENTITY_COLUMNS = "(i.indkey::int2[])[0:i.indnkeyatts - 1]"


class ColumnInfo(NamedTuple):
    """A column, as the catalogs have it.

    ``type``: as written in SQL; ``bare_type``: the same without a length, so that a cast to it cuts nothing off;
    ``base_oid``, ``base_category``, ``base_modifier``: of the type under domains; ``told``: that type, as readers are
    told of it (see `parameters`); ``generated``: it is, and our
    publication can't carry it; ``identity``: the replica identity contains it; ``unique``: it has a unique index of its
    own; ``compared``: how `when` compares its values.
    """

    name: str
    type: str
    bare_type: str
    type_oid: int
    modifier: int
    base_oid: int
    base_category: str
    base_modifier: int
    told: str
    generated: bool
    identity: bool
    unique: bool
    compared: ColumnType


class Rights(NamedTuple):
    """The role's privileges, and the server's room for slots.

    ``keep_size``: max_slot_wal_keep_size, in MB; -1 for no bound.
    """

    role: str
    replicates: bool
    free_slots: int
    keep_size: int


async def read_rights(connection: psycopg.AsyncConnection[Any]) -> Rights:
    """Return what the role of the connection may do."""
    (row,) = await rows(connection, _RIGHTS)
    return Rights(*row)


def given_tables(tables: Sequence[Table]) -> Mapping[str, list[str]]:
    """Return the arguments of a query about these tables: ``schemas`` and ``names``."""
    return {"schemas": [table.schema for table in tables], "names": [table.name for table in tables]}


async def columns(connection: psycopg.AsyncConnection[Any], tables: Sequence[Table]) -> dict[Table, list[ColumnInfo]]:
    """Return the columns of each of these that is a table, in their order; views and the like are left out."""
    found: dict[Table, list[ColumnInfo]] = {}
    for schema, name, *column in await rows(connection, _COLUMNS, given_tables(tables)):
        info = ColumnInfo(*column)
        found.setdefault(Table(schema, name), []).append(info._replace(compared=ColumnType(*info.compared)))
    return found


async def compared_types(
    connection: psycopg.AsyncConnection[Any], oids: Sequence[int], names: Sequence[str] | None
) -> dict[int, dict[str, ColumnType]]:
    """Return how `when` compares the columns of tables, by the table's OID; ``names``: of these only."""
    found: dict[int, dict[str, ColumnType]] = {}
    for oid, name, compared in await rows(connection, _COMPARED, {"oids": list(oids), "names": names}):
        found.setdefault(oid, {})[name] = ColumnType(*compared)
    return found


async def above(connection: psycopg.AsyncConnection[Any], table: Table) -> list[Table]:
    """Return the partitioned tables above a partition, by its name; see `ancestors`."""
    found = await rows(connection, "SELECT to_regclass(%(table)s)::oid::bigint AS oid", {"table": str(table)})
    return await ancestors(connection, found[0].oid) if found[0].oid is not None else []


async def ancestors(connection: psycopg.AsyncConnection[Any], oid: int) -> list[Table]:
    """Return the partitioned tables above a partition, nearest first; empty for any other table."""
    return [Table(row.schema, row.name) for row in await rows(connection, _ANCESTORS, {"oid": oid})]


# How readers are told of a type `base` with a modifier, see `parameters`; `nondeterministic`: its collation takes
# different texts for equal.
TOLD = """CASE WHEN base.typtype = 'e' THEN 'enum' WHEN base.typname = 'citext' THEN 'citext'
  WHEN {nondeterministic} THEN format_type(base.oid, -1) || ', nondeterministic'
  ELSE format_type(base.oid, {modifier}) END"""

# For a column `a` of type `t`: the type `base` under domains with its modifier, and what `ColumnType` holds. Of domains
# over domains, the innermost has the modifier. A collation that takes different texts for equal makes its type one of
# which nothing is known.
_BASE = """
JOIN pg_type t ON t.oid = a.atttypid
CROSS JOIN LATERAL (
  WITH RECURSIVE under (oid, modifier) AS (
    SELECT a.atttypid, a.atttypmod UNION ALL
    SELECT d.typbasetype, d.typtypmod FROM under JOIN pg_type d ON d.oid = under.oid AND d.typtype = 'd'
  ) SELECT under.oid, under.modifier FROM under JOIN pg_type last ON last.oid = under.oid AND last.typtype <> 'd'
) AS lowest
JOIN pg_type base ON base.oid = lowest.oid
LEFT JOIN pg_collation co ON co.oid = a.attcollation
"""
_TYPE = """jsonb_build_array(format_type(a.atttypid, a.atttypmod), a.atttypid::bigint,
  CASE WHEN co.collisdeterministic IS FALSE THEN 0 ELSE base.oid::bigint END, base.typtype = 'e',
  base.typcategory = 'A', pg_encoding_to_char((SELECT encoding FROM pg_database WHERE datname = current_database()))
    = 'UTF8' AND (
    SELECT coalesce(locale, '') IN ('C', 'POSIX', 'C.UTF-8', 'C.utf8', 'PG_UNICODE_FAST') FROM (
      SELECT CASE co.collprovider WHEN 'd' THEN (
        SELECT CASE d.datlocprovider WHEN 'c' THEN d.datcollate WHEN 'b' THEN to_jsonb(d) ->> 'datlocale' END
        FROM pg_database d WHERE d.datname = current_database()
      ) WHEN 'c' THEN co.collcollate WHEN 'b' THEN to_jsonb(co) ->> 'colllocale' END
    ) AS ordered (locale)
  ))"""

_COMPARED = f"""
SELECT a.attrelid::bigint AS oid, a.attname AS name, {_TYPE} AS compared
FROM pg_attribute a {_BASE}
WHERE a.attrelid = ANY (%(oids)s::oid[]) AND a.attnum > 0 AND NOT a.attisdropped
  AND (%(names)s::text[] IS NULL OR a.attname = ANY (%(names)s::text[]))
ORDER BY 1, a.attnum
"""  # noqa: S608  what is pasted is this module's own

_COLUMNS = f"""
SELECT n.nspname AS schema, c.relname AS table_name, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
  format_type(a.atttypid, -1) AS bare_type, a.atttypid::bigint AS type_oid, a.atttypmod AS modifier,
  base.oid::bigint AS base_oid, base.typcategory::text AS base_category,
  lowest.modifier AS base_modifier,
  {TOLD.format(nondeterministic="co.collisdeterministic IS FALSE", modifier="lowest.modifier")} AS told,
  a.attgenerated = 'v' OR a.attgenerated = 's' AND current_setting('server_version_num')::int < 180000 AS generated,
  c.relreplident = 'f' OR coalesce(a.attnum = ANY ({IDENTITY_COLUMNS}), false) AS identity,
  EXISTS (SELECT FROM pg_index u WHERE u.indrelid = c.oid AND u.indisunique AND u.indisvalid AND u.indpred IS NULL
          AND u.indnkeyatts = 1 AND u.indkey[0] = a.attnum) AS unique,
  {_TYPE} AS compared
FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
JOIN pg_namespace n ON n.nspname = wanted.schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind IN ('r', 'p') {IDENTITY}
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped {_BASE}
ORDER BY c.oid, a.attnum
"""  # noqa: S608  what is pasted is this module's own

_ANCESTORS = """
SELECT n.nspname AS schema, c.relname AS name
FROM pg_partition_ancestors(%(oid)s::oid) WITH ORDINALITY above (oid, nearness)
JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid <> %(oid)s::oid ORDER BY above.nearness
"""

# Managed services, where nobody is a superuser, have their own roles for replication.
_RIGHTS = """
SELECT current_user::text AS role,
  r.rolsuper OR r.rolreplication OR EXISTS (
    SELECT FROM pg_roles g WHERE g.rolname IN ('rds_replication', 'rds_superuser', 'cloudsqlsuperuser')
    AND pg_has_role(current_user, g.oid, 'MEMBER')
  ) AS replicates,
  (current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots))::int AS free_slots,
  (SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size') AS keep_size
FROM pg_roles r WHERE r.rolname = current_user
"""
