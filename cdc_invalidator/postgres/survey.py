"""Reads how the tables of the rules stand in the database and in the publication.

A look takes no lock on a table, so that somebody who has locked one does not keep the daemon from the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from cdc_invalidator.postgres.connection import rows
from cdc_invalidator.postgres.queries import IDENTITY, IDENTITY_COLUMNS, given_tables
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table


class Leaf(NamedTuple):
    """One table that holds rows: a rule's table, or a partition of it.

    ``carried``: columns that old rows carry; ``usable``: whether its replica identity allows to publish it;
    ``carriers``: the OIDs of the publication's entries that include it, directly, as a partition or by its schema, and
    of the publication itself if that is FOR ALL TABLES; ``limited``: a row filter or a column list hides changes.
    """

    table: Table
    oid: int
    kind: str
    columns: frozenset[str]
    generated: frozenset[str]
    carried: frozenset[str]
    usable: bool
    carriers: tuple[int, ...]
    limited: bool

    @property
    def published(self) -> bool:
        """Whether all changes of it are in the stream."""
        return bool(self.carriers) and not self.limited and self.kind not in NOT_TABLES


@dataclass(slots=True)
class TableState:
    """A table that a rule names, as the catalogs have it now. A plain table is its own only leaf.

    ``keyed``: it has a primary key; ``parent``: other tables inherit from it; ``listed``: the publication has an entry
    for this very table; ``carriers``: as in `Leaf`.
    """

    oid: int
    partitioned: bool
    keyed: bool
    parent: bool
    listed: bool
    carriers: tuple[int, ...]
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def published(self) -> bool:
        """Whether all changes of it are in the stream."""
        return all(leaf.published for leaf in self.leaves) if self.leaves else bool(self.carriers)

    @property
    def usable(self) -> bool:
        """Whether it can be published without harm to the application."""
        return all(leaf.usable and leaf.kind not in NOT_TABLES for leaf in self.leaves) and not self.refused

    @property
    def refused(self) -> str | None:
        """Why the table must not be published, whatever its leaves; ``None`` if it may."""
        if self.parent:
            return "other tables inherit from it, and changes of their rows would not be seen; name those tables"
        if self.partitioned and not self.keyed:
            return (
                "it is partitioned without a primary key, so that a partition made later would have no replica "
                "identity and the application's UPDATE and DELETE on it would fail; add a primary key"
            )
        return None

    @property
    def limited(self) -> bool:
        """Whether a row filter or a column list hides changes of it."""
        return any(leaf.limited for leaf in self.leaves)

    @property
    def shape(self) -> tuple[int, ...]:
        """Changes when rows may have come or gone unseen: another table, other partitions, or published again."""
        carriers = {*self.carriers, *(oid for leaf in self.leaves for oid in leaf.carriers)}
        return (self.oid, *sorted(carriers), *sorted(leaf.oid for leaf in self.leaves))


@dataclass(slots=True)
class Survey:
    """The publication and all tables of the rules; ``None`` for a table that does not exist.

    ``suits``: the publication's options are right; ``without_identity``: tables that the publication lists and whose
    rows the application can't update because of that, whether rules name them or not.
    """

    exists: bool
    suits: bool
    tables: dict[Table, TableState | None]
    without_identity: list[Table]

    @property
    def unknown(self) -> list[Table]:
        """Tables of rules that don't exist, or not yet."""
        return [table for table, state in self.tables.items() if state is None]

    @property
    def unpublished(self) -> list[Table]:
        """Tables that can be published but are not."""
        return [
            table
            for table, state in self.tables.items()
            if state and state.usable and not state.published and not state.limited
        ]

    @property
    def harmful(self) -> list[Table]:
        """Tables that are published but must not be."""
        refused = [table for table, state in self.tables.items() if state and not state.usable and state.listed]
        # A table that was renamed is still listed, under a name that no rule knows.
        return list(dict.fromkeys(refused + self.without_identity))

    @property
    def blind(self) -> list[Table]:
        """Tables that exist but whose changes are not in the stream."""
        return [table for table, state in self.tables.items() if state and not state.published]

    @property
    def published(self) -> list[Table]:
        """Tables whose changes are in the stream."""
        return [table for table, state in self.tables.items() if state and state.published]

    def published_since(self, before: Survey) -> list[Table]:
        """Return the tables that are published now and were not before, whoever published them."""
        return [
            table
            for table, state in self.tables.items()
            if state and state.published and not ((former := before.tables[table]) and former.published)
        ]

    def known_as(self, oid: int) -> list[Table]:
        """Return the tables of rules that the table with this OID was, or was a partition of, under any name."""
        return [
            table
            for table, state in self.tables.items()
            if state and (state.oid == oid or any(leaf.oid == oid for leaf in state.leaves))
        ]

    def leaves_since(self, before: Survey) -> list[int]:
        """Return the OIDs of the leaves that are new since then."""
        return [
            leaf.oid
            for table, state in self.tables.items()
            for leaf in (state.leaves if state else ())
            if leaf.oid not in _shape(before.tables[table])
        ]

    def changed_since(self, before: Survey, filled: Container[int]) -> list[Table]:
        """Return the tables where rows may have come or gone since then without a change in the stream.

        Args:
            before: an earlier survey.
            filled: those of `leaves_since` that hold rows.
        """
        changed = []
        for table, state in self.tables.items():
            former, now = _shape(before.tables[table]), _shape(state)
            leaves = state.leaves if state else []
            if former - now or any(leaf.oid in filled for leaf in leaves if leaf.oid not in former):
                changed.append(table)
        return changed

    def digests(self, rules: RuleSet, besides: Container[Table] = ()) -> dict[str, str]:
        """Return, for each cache all of whose tables are published and not in ``besides``, a digest of what busts it.

        It changes with the rules and with the shapes of their tables. So the watermark tells a later start whether a
        cache was kept by the same rules on the same tables.
        """
        shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {name: [] for name in rules.caches}
        blind: set[str] = set()
        for rule in rules.rules:
            state = self.tables[rule.table]
            for bust in rule.busts:
                if state is None or not state.published or rule.table in besides:
                    blind.add(bust.cache.name)
                else:
                    shapes[bust.cache.name].append((str(rule.table), state.shape))
        return {
            name: hashlib.sha256(repr((cache.digest, sorted(shapes[name]))).encode()).hexdigest()[:16]
            for name, cache in rules.caches.items()
            if name not in blind
        }


def _shape(state: TableState | None) -> set[int]:
    return set(state.shape) if state else set()


NOT_TABLES = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "u": "an unlogged table",
    "t": "a temporary table",
    "S": "a sequence",
}


class Surveyor:
    """Reads the state of one publication and of the tables of rules.

    Args:
        connection: an ordinary one.
        publication: the publication's name.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], publication: str) -> None:
        self._connection = connection
        self._publication = publication
        self._last: tuple[object, Survey] | None = None

    async def survey(self, rules: RuleSet) -> Survey:
        """Look at the publication and at the tables of the rules; the same object while nothing has changed."""
        tables = rules.tables
        of_roots = _ROOTS.format(carriers=_CARRIERS.format(table="roots"))
        of_leaves = _LEAVES.format(
            identity=IDENTITY,
            identity_columns=IDENTITY_COLUMNS,
            usable=_USABLE,
            carriers=_CARRIERS.format(table="tree"),
        )
        given = {"publication": self._publication, **given_tables(tables)}
        publications = await rows(self._connection, _PUBLICATION, given)
        roots = await rows(self._connection, _KIN + of_roots, given)
        leaves = await rows(self._connection, _KIN + of_leaves, given)
        harmed = await rows(self._connection, _WITHOUT_IDENTITY, given)
        seen = (tables, publications, roots, leaves, harmed)
        if self._last is not None and self._last[0] == seen:
            return self._last[1]
        states: dict[Table, TableState | None] = dict.fromkeys(tables)
        for row in roots:
            states[Table(row.schema, row.name)] = TableState(
                row.oid, row.partitioned, row.keyed, row.parent, row.listed, tuple(row.carriers)
            )
        for row in leaves:
            state = states[Table(row.root_schema, row.root_name)]
            if state is not None:
                state.leaves.append(_leaf(row))
        suits = bool(publications) and publications[0].suits
        survey = Survey(bool(publications), suits, states, [Table(row.schema, row.name) for row in harmed])
        self._last = seen, survey
        return survey


def _leaf(row: Any) -> Leaf:
    return Leaf(
        table=Table(row.schema, row.name),
        oid=row.oid,
        kind=row.kind,
        columns=frozenset(row.columns),
        generated=frozenset(row.generated),
        carried=frozenset(row.carried),
        usable=row.usable,
        carriers=tuple(row.carriers),
        limited=row.limited,
    )


_PUBLICATION = """
SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate AND NOT pubviaroot AS suits
FROM pg_publication WHERE pubname = %(publication)s
"""

# These queries call no function that opens the table itself (pg_publication_tables, pg_partition_tree,
# pg_relation_size): it would wait for whoever has locked the table.
_KIN = """
WITH RECURSIVE publication AS (
  SELECT oid, puballtables FROM pg_publication WHERE pubname = %(publication)s
), roots AS (
  SELECT n.nspname AS schema, c.relname AS name, c.oid, c.relkind
  FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
), tree (schema, name, oid, relkind) AS (
  SELECT schema, name, oid, relkind FROM roots
  UNION ALL
  SELECT tree.schema, tree.name, c.oid, c.relkind FROM tree
  JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid
  WHERE tree.relkind = 'p'
)
"""

# The publication's entries that carry a table: for it or a table above it, its schema, or all tables. LATERAL, for one
# index look-up a table: in a plain join, the planner would compare each table with each, every three seconds.
# A filter on a root also holds for its partitions.
_CARRIERS = """
LEFT JOIN LATERAL (
  SELECT array_agg(DISTINCT entries.oid) AS oids, bool_or(entries.limited) AS limited
  FROM (SELECT {table}.oid UNION SELECT above.relid FROM pg_partition_ancestors({table}.oid) above) AS kin (oid)
  CROSS JOIN LATERAL (
    SELECT r.oid, r.prqual IS NOT NULL OR r.prattrs IS NOT NULL AS limited
    FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = kin.oid
    UNION ALL
    SELECT p.oid, false FROM publication p WHERE p.puballtables
    UNION ALL
    SELECT s.oid, false FROM publication p JOIN pg_publication_namespace s ON s.pnpubid = p.oid
    JOIN pg_class c ON c.oid = kin.oid AND c.relnamespace = s.pnnspid
  ) AS entries
) AS carriers ON true
"""

_ROOTS = """
SELECT schema, name, oid, relkind = 'p' AS partitioned,
  EXISTS (SELECT FROM pg_index i WHERE i.indrelid = roots.oid AND i.indisprimary AND i.indimmediate) AS keyed,
  relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = roots.oid) AS parent,
  EXISTS (SELECT FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = roots.oid) AS listed,
  coalesce(carriers.oids, '{{}}') AS carriers
FROM roots {carriers}
"""

# From PostgreSQL 18 on, an identity must not contain a generated column, which is not published.
_USABLE = """(
  (c.relreplident = 'f' OR (c.relreplident <> 'n' AND i.indexrelid IS NOT NULL))
  AND NOT (current_setting('server_version_num')::int >= 180000 AND EXISTS (
    SELECT FROM pg_attribute g WHERE g.attrelid = c.oid AND g.attnum > 0 AND NOT g.attisdropped
      AND g.attgenerated <> '' AND (c.relreplident = 'f' OR g.attnum = ANY (i.indkey::int2[]))
  ))
)"""

_LEAVES = """
SELECT tree.schema AS root_schema, tree.name AS root_name, n.nspname AS schema, c.relname AS name, c.oid,
  CASE c.relpersistence WHEN 'p' THEN c.relkind ELSE c.relpersistence END::text AS kind,
  ARRAY(SELECT attname::text FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
  ARRAY(SELECT attname::text FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated <> '') AS generated,
  CASE c.relreplident
    WHEN 'f' THEN ARRAY(SELECT attname::text FROM pg_attribute
                        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
    WHEN 'n' THEN '{{}}'
    ELSE ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid
               AND attnum = ANY ({identity_columns})) END AS carried,
  {usable} AS usable,
  coalesce(carriers.oids, '{{}}') AS carriers,
  coalesce(carriers.limited, false) AS limited
FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
{identity} {carriers}
WHERE tree.relkind <> 'p'
ORDER BY 1, 2, 3, 4
"""

_WITHOUT_IDENTITY = f"""
WITH RECURSIVE tree (root, oid) AS (
  SELECT r.prrelid, r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
  WHERE p.pubname = %(publication)s
  UNION ALL
  SELECT tree.root, i.inhrelid FROM tree
  JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'p' JOIN pg_inherits i ON i.inhparent = tree.oid
)
SELECT DISTINCT n.nspname AS schema, root.relname AS name
FROM tree JOIN pg_class root ON root.oid = tree.root JOIN pg_namespace n ON n.oid = root.relnamespace
JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'r' {IDENTITY}
WHERE NOT {_USABLE}
"""  # noqa: S608  what is pasted is ours
