"""How the tables of the rules stand in the database and the publication."""

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

    ``carried``: columns that old rows carry; ``usable``: whether its replica identity lets it be published;
    ``carriers``: the OIDs of the publication's entries that have it, also as a partition or by its schema, and of the
    publication itself where that has all tables; ``limited``: whether a row filter or a column list hides changes.
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
    for it and nothing else; ``carriers``: as of a `Leaf`.
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
        """Whether publishing it hurts nobody."""
        return all(leaf.usable and leaf.kind not in NOT_TABLES for leaf in self.leaves) and not self.refused

    @property
    def refused(self) -> str | None:
        """Why the table as such must not be published."""
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
        """Whether somebody hides changes of it."""
        return any(leaf.limited for leaf in self.leaves)

    @property
    def shape(self) -> tuple[int, ...]:
        """What changes when rows come or go unseen: another table of the name, other partitions, published anew."""
        carriers = {*self.carriers, *(oid for leaf in self.leaves for oid in leaf.carriers)}
        return (self.oid, *sorted(carriers), *sorted(leaf.oid for leaf in self.leaves))


@dataclass(slots=True)
class Survey:
    """The publication and all tables of the rules; ``None`` for a table that does not exist.

    ``without_identity``: tables that the publication lists, whether rules name them or not, and whose rows the
    application can't update because of that.
    """

    exists: bool
    suits: bool
    tables: dict[Table, TableState | None]
    without_identity: list[Table]

    @property
    def unknown(self) -> list[Table]:
        """Tables of rules that don't exist (yet)."""
        return [table for table, state in self.tables.items() if state is None]

    @property
    def unpublished(self) -> list[Table]:
        """Tables that can be published and are not."""
        return [
            table
            for table, state in self.tables.items()
            if state and state.usable and not state.published and not state.limited
        ]

    @property
    def harmful(self) -> list[Table]:
        """Tables that are published and must not be."""
        refused = [table for table, state in self.tables.items() if state and not state.usable and state.listed]
        # A table that was renamed away is still listed, under a name that no rule knows.
        return list(dict.fromkeys(refused + self.without_identity))

    @property
    def blind(self) -> list[Table]:
        """Tables that exist and whose changes are not seen."""
        return [table for table, state in self.tables.items() if state and not state.published]

    @property
    def published(self) -> list[Table]:
        """Tables whose changes are seen."""
        return [table for table, state in self.tables.items() if state and state.published]

    def published_since(self, before: Survey) -> list[Table]:
        """Give the tables whose changes are seen now and were not then, whoever published them."""
        return [
            table
            for table, state in self.tables.items()
            if state and state.published and not ((former := before.tables[table]) and former.published)
        ]

    def known_as(self, oid: int) -> list[Table]:
        """Give the tables of rules that a table was or was a partition of, whatever it is called now."""
        return [
            table
            for table, state in self.tables.items()
            if state and (state.oid == oid or any(leaf.oid == oid for leaf in state.leaves))
        ]

    def leaves_since(self, before: Survey) -> list[int]:
        """Give the OIDs of the tables that hold rows and did not then."""
        return [
            leaf.oid
            for table, state in self.tables.items()
            for leaf in (state.leaves if state else ())
            if leaf.oid not in _shape(before.tables[table])
        ]

    def changed_since(self, before: Survey, filled: Container[int]) -> list[Table]:
        """Give the tables where rows may have come or gone since then without a change in the stream.

        Args:
            before: an earlier survey.
            filled: which of `leaves_since` brought rows.
        """
        changed = []
        for table, state in self.tables.items():
            former, now = _shape(before.tables[table]), _shape(state)
            leaves = state.leaves if state else []
            if former - now or any(leaf.oid in filled for leaf in leaves if leaf.oid not in former):
                changed.append(table)
        return changed

    def digests(self, rules: RuleSet, besides: Container[Table] = ()) -> dict[str, str]:
        """Give, for each cache whose rules all see their tables (and none of ``besides``), a digest of what busts it.

        It changes with the rules and with the shapes of their tables, so that the watermark tells a later start
        whether a cache was kept by the same rules on the same tables.
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
    """Looks at one publication and at the tables of rules.

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
        # PostgreSQL 14 publishes no schemas.
        schemas = _SCHEMAS if self._connection.info.server_version >= 150000 else ""
        of_roots = _ROOTS.format(carriers=_CARRIERS.format(table="roots", schemas=schemas))
        of_leaves = _LEAVES.format(
            identity=IDENTITY,
            identity_columns=IDENTITY_COLUMNS,
            usable=_USABLE,
            carriers=_CARRIERS.format(table="tree", schemas=schemas),
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

# No function that looks at a table itself (pg_publication_tables, pg_partition_tree, pg_relation_size): it would wait
# for whoever has locked that table.
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

# What of the publication carries a table: it or a table above it, its schema, all tables. One look-up in an index for
# each table: joined as a whole, the planner would compare each table with each, every three seconds.
# The two columns of `limited` came with PostgreSQL 15. A filter on a root holds for its partitions.
_CARRIERS = """
LEFT JOIN LATERAL (
  SELECT array_agg(DISTINCT entries.oid) AS oids, bool_or(entries.limited) AS limited
  FROM (SELECT {table}.oid UNION SELECT above.relid FROM pg_partition_ancestors({table}.oid) above) AS kin (oid)
  CROSS JOIN LATERAL (
    SELECT r.oid, coalesce(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL AS limited
    FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = kin.oid
    UNION ALL
    SELECT p.oid, false FROM publication p WHERE p.puballtables
    {schemas}
  ) AS entries
) AS carriers ON true
"""

_SCHEMAS = """UNION ALL
    SELECT s.oid, false FROM publication p JOIN pg_publication_namespace s ON s.pnpubid = p.oid
    JOIN pg_class c ON c.oid = kin.oid AND c.relnamespace = s.pnnspid"""

_ROOTS = """
SELECT schema, name, oid, relkind = 'p' AS partitioned,
  EXISTS (SELECT FROM pg_index i WHERE i.indrelid = roots.oid AND i.indisprimary AND i.indimmediate) AS keyed,
  relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = roots.oid) AS parent,
  EXISTS (SELECT FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = roots.oid) AS listed,
  coalesce(carriers.oids, '{{}}') AS carriers
FROM roots {carriers}
"""

# From PostgreSQL 18 on, an identity must not contain a generated column, which the publication does not have.
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
