"""What changes with a table whenever its rows may show other values, or changes of them were hidden, unseen.

An OID tells two tables apart, but not what happened to one of them between two looks. The catalogs' own rows tell: each
change writes a row anew, with another ``xmin``. What keeps all values leaves those rows alone: VACUUM, ANALYZE, an
index, and for a table that the publication lists, VACUUM FULL, CLUSTER and pg_repack as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from cdc_invalidator.postgres.connection import rows


class Definition(NamedTuple):
    """``whole``: a digest of all that may change what rows show; ``streamed``: of the columns that the stream has."""

    whole: str
    streamed: str


async def definitions(
    connection: psycopg.AsyncConnection[Any], publication: str, oids: Sequence[int]
) -> Mapping[int, Definition]:
    """Return the definitions of tables, by their OIDs."""
    found = await rows(connection, _DEFINITIONS, {"publication": publication, "oids": list(oids)}) if oids else []
    return {oid: Definition(*definition) for oid, *definition in found}


def streamed(columns: Iterable[tuple[str, int, int]]) -> str:
    """Return what `Definition.streamed` is for these columns: of each the name, the type's OID and its modifier."""
    text = ",".join(f"{name} {type_oid} {modifier}" for name, type_oid, modifier in columns)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# Of the types that are not built in, and of those that they are made of: enums' labels, composite types' attributes.
_TYPES = """(
  WITH RECURSIVE used (oid) AS (
    SELECT atttypid FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND atttypid >= 16384
    UNION
    SELECT part.oid FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL (
      VALUES (t.typelem), (t.typbasetype)
      UNION ALL SELECT atttypid FROM pg_attribute WHERE attrelid = t.typrelid AND attnum > 0
      UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid
      UNION ALL SELECT rngtypid FROM pg_range WHERE rngmultitypid = t.oid
    ) AS part (oid) WHERE part.oid >= 16384
  )
  SELECT string_agg(said.what, ' ' ORDER BY said.what) FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL (
    SELECT enumtypid || ':' || oid || ':' || enumlabel FROM pg_enum WHERE enumtypid = t.oid
    UNION ALL SELECT attrelid || ':' || attnum || ':' || xmin FROM pg_attribute
    WHERE attrelid = t.typrelid AND attnum > 0
  ) AS said (what)
)"""

# A column's row is written anew when its type, its expression or its name changes. A partition that is taken off and
# put back has a new row in pg_inherits. A table that the publication lists can't be made UNLOGGED for a while; another
# can, and then has another file. One that a published schema carries may have been moved away and back.
_DEFINITIONS = f"""
WITH publication AS (
  SELECT oid, coalesce(to_jsonb(p) ->> 'pubgencols' = 's', false) AS stored
  FROM pg_publication p WHERE pubname = %(publication)s
)
SELECT c.oid::bigint AS oid,
  encode(sha256(textsend(concat_ws('|', columns.versions, CASE WHEN columns.types THEN {_TYPES} END,
    CASE WHEN c.relispartition THEN (
    SELECT string_agg(i.inhparent || ':' || i.xmin, ' ' ORDER BY i.inhrelid)
    FROM pg_partition_ancestors(c.oid) above JOIN pg_inherits i ON i.inhrelid = above.relid
  ) END, CASE WHEN NOT EXISTS (
    SELECT FROM pg_publication_rel r JOIN publication p ON p.oid = r.prpubid WHERE r.prrelid = c.oid
  ) THEN c.relfilenode END, CASE WHEN (SELECT count(*) FROM pg_publication_namespace) > 0 THEN (
    SELECT string_agg(k.oid || ':' || k.xmin, ' ' ORDER BY k.oid)
    FROM (SELECT c.oid UNION SELECT above.relid FROM pg_partition_ancestors(c.oid) above) AS kin (oid)
    JOIN pg_class k ON k.oid = kin.oid JOIN pg_publication_namespace s ON s.pnnspid = k.relnamespace
    JOIN publication p ON p.oid = s.pnpubid
  ) END))), 'hex') AS whole,
  encode(sha256(textsend(coalesce(columns.streamed, ''))), 'hex') AS streamed
FROM unnest(%(oids)s::oid[]) AS wanted (oid) JOIN pg_class c USING (oid) CROSS JOIN LATERAL (
  SELECT string_agg(attnum || ':' || xmin, ' ' ORDER BY attnum) AS versions, bool_or(atttypid >= 16384) AS types,
    string_agg(concat_ws(' ', attname, atttypid, atttypmod), ',' ORDER BY attnum) FILTER (WHERE NOT attisdropped AND (
      attgenerated = '' OR attgenerated = 's' AND (SELECT stored FROM publication)
    )) AS streamed
  FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0
) AS columns
"""  # noqa: S608  what is pasted is this module's own
