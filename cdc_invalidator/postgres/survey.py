"""Reads how the tables of the rules stand in the database and in the publication.

A look takes no lock on a table, so that somebody who has locked one does not keep the daemon from the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import psycopg

from cdc_invalidator.postgres.connection import rows
from cdc_invalidator.postgres.definitions import Definition, definitions
from cdc_invalidator.postgres.queries import IDENTITY, IDENTITY_COLUMNS, compared_types, given_tables
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import condition_of
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

Full = Literal["ok", "stored", "virtual", "listed", "unstored"]


class Leaf(NamedTuple):
    """One table that holds rows: a rule's table, or a partition of it.

    ``generated``: columns that the stream does not carry because they are generated; ``carried``: columns that old
    rows carry; ``usable``: whether its replica identity allows to publish it; ``awaits_stored``: it does once the
    publication carries stored generated columns; ``keyed``: its primary key can be the identity; ``full``: what REPLICA
    IDENTITY FULL would do: ``ok``, or ``stored`` (the publication must carry stored generated columns first), or why
    the application's UPDATE and DELETE would fail: ``virtual`` (it has a virtual generated column), ``listed`` (a
    publication has a column list for it), ``unstored`` (another publication does not carry its stored generated
    columns); ``filtered``: another publication has a row filter or a column list for it, and may need its identity;
    ``carriers``: the OIDs of the publication's entries that include it, directly, as a partition or by its schema, and
    of the publication itself if that is FOR ALL TABLES; ``limited``: a row filter or a column list hides changes;
    ``types``: of the columns that conditions of rules read; ``definition``: changes with what its rows show;
    ``indexable``: the columns that an index which is the identity may have, with the bytes that a value takes at most;
    ``nullable``: the columns that may be NULL.
    """

    table: Table
    oid: int
    kind: str
    columns: frozenset[str]
    generated: frozenset[str]
    carried: frozenset[str]
    usable: bool
    awaits_stored: bool
    keyed: bool
    full: Full
    filtered: bool
    carriers: tuple[int, ...]
    limited: bool
    types: Mapping[str, ColumnType]
    definition: Definition
    indexable: Mapping[str, int]
    nullable: frozenset[str]

    @property
    def published(self) -> bool:
        """Whether all changes of it are in the stream."""
        return bool(self.carriers) and not self.limited and self.kind not in NOT_TABLES

    @property
    def harmful(self) -> bool:
        """Whether it must not be published, whatever the publication's options."""
        return self.kind in NOT_TABLES or not (self.usable or self.awaits_stored)


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
    def awaits_stored(self) -> bool:
        """Whether the publication must carry stored generated columns, and it can be published then."""
        return any(leaf.awaits_stored for leaf in self.leaves) and not self.refused

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

    @property
    def definitions(self) -> dict[int, str]:
        """The digest of each leaf's definition, by its OID."""
        return {leaf.oid: leaf.definition.whole for leaf in self.leaves}


@dataclass(slots=True)
class Survey:
    """The publication and all tables of the rules; ``None`` for a table that does not exist.

    ``publication``: its name; ``version``: changes when somebody alters or renames it; ``stores``: the server can
    publish stored generated columns, as PostgreSQL 18 can; ``all_ops``, ``via_root``: what it publishes, and how;
    ``without_identity``: tables that the publication lists and whose rows the application can't update because of
    that, whether rules name them or not; ``lists_unstored``: it lists tables for which it must carry stored
    generated columns; ``bystanders``: tables without identity that it carries by FOR ALL TABLES or a schema, known
    only unless ``all_ops``; ``alike``: tables that no rule names and that are called like one of a rule, in
    another schema: a tenant's, maybe.
    """

    publication: str
    version: str
    stores: bool
    exists: bool
    all_ops: bool
    via_root: bool
    tables: dict[Table, TableState | None]
    without_identity: list[Table]
    lists_unstored: bool
    bystanders: list[Leaf]
    alike: list[Table]

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
    def awaits_stored(self) -> bool:
        """Whether the publication must carry stored generated columns."""
        return self.lists_unstored or any(state and state.awaits_stored for state in self.tables.values())

    @property
    def harmful(self) -> list[Table]:
        """Tables that are published but must not be."""
        refused = [
            table
            for table, state in self.tables.items()
            if state and state.listed and (state.refused or any(leaf.harmful for leaf in state.leaves))
        ]
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

    def types(self, oid: int, tables: Iterable[Table]) -> Mapping[str, ColumnType]:
        """Return the types of columns that conditions read: of this table, or of one like it in these tables."""
        leaves = [leaf for table in tables if (state := self.tables[table]) for leaf in state.leaves]
        return next((leaf.types for leaf in leaves if leaf.oid == oid), leaves[0].types if leaves else {})

    def known_as(self, oid: int) -> list[Table]:
        """Return the tables of rules that the table with this OID was, or was a partition of, under any name."""
        return [
            table
            for table, state in self.tables.items()
            if state and (state.oid == oid or any(leaf.oid == oid for leaf in state.leaves))
        ]

    @property
    def partitioned(self) -> list[Table]:
        """Tables of rules that are partitioned."""
        return [table for table, state in self.tables.items() if state and state.partitioned]

    def leaf(self, oid: int) -> Leaf | None:
        """Return the leaf with this OID."""
        leaves = (leaf for state in self.tables.values() if state for leaf in state.leaves)
        return next((leaf for leaf in leaves if leaf.oid == oid), None)

    def leaves_since(self, before: Survey) -> list[int]:
        """Return the OIDs of the leaves that are new since then."""
        return [
            leaf.oid
            for table, state in self.tables.items()
            for leaf in (state.leaves if state else ())
            if leaf.oid not in _shape(before.tables[table])
        ]

    def changed_since(self, before: Survey, filled: Container[int]) -> list[Table]:
        """Return the tables where rows may have come, gone or changed since then without a change in the stream.

        Args:
            before: an earlier survey.
            filled: those of `leaves_since` that hold rows.
        """
        if before.exists and self.version != before.version:
            # Nobody knows what it published in between.
            return [table for table, state in self.tables.items() if state]
        changed = []
        for table, state in self.tables.items():
            was = before.tables[table]
            former, now = _shape(was), _shape(state)
            definitions = was.definitions if was else {}
            leaves = state.leaves if state else []
            if (
                former - now
                or any(leaf.oid in filled for leaf in leaves if leaf.oid not in former)
                or any(leaf.definition.whole != definitions.get(leaf.oid, leaf.definition.whole) for leaf in leaves)
            ):
                changed.append(table)
        return changed

    def digests(self, rules: RuleSet) -> dict[str, str]:
        """Return, for each cache that is kept and all of whose tables are published, a digest of what busts it.

        It changes with the rules and with the shapes of their tables. So the watermark tells a later start whether a
        cache was kept by the same rules on the same tables.
        """
        shapes: dict[str, list[tuple[Any, ...]]] = {name: [] for name in rules.kept}
        blind: set[str] = set()
        for rule in rules.rules:
            state = self.tables[rule.table]
            for bust in rule.busts:
                if state is None or not state.published:
                    blind.add(bust.cache.name)
                else:
                    definitions = sorted(state.definitions.items())
                    shapes[bust.cache.name].append((str(rule.table), state.shape, definitions))
        return {
            name: hashlib.sha256(repr((cache.digest, self.version, sorted(shapes[name]))).encode()).hexdigest()[:16]
            for name, cache in rules.kept.items()
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
        given = {"publication": self._publication, **given_tables(tables)}
        publications = await rows(self._connection, _PUBLICATION, given)
        roots = await rows(self._connection, _KIN + of_roots, given)
        leaves = await rows(self._connection, f"{_KIN} {_of_leaves()} ORDER BY 1, 2, 3, 4", given)
        harmed = await rows(self._connection, _WITHOUT_IDENTITY, given)
        types = await self._types(rules, leaves)
        defined = await definitions(self._connection, self._publication, [row.oid for row in leaves])
        # If it publishes all operations already, only `check` asks.
        bystanders = await self.bystanders() if publications and not publications[0].all_ops else []
        known = {"names": given["names"], "oids": [row.oid for row in roots]}
        alike = [Table(row.schema, row.name) for row in await rows(self._connection, _ALIKE, known)]
        seen = (tables, publications, roots, leaves, harmed, types, defined, bystanders, alike)
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
                state.leaves.append(_leaf(row, types.get(row.oid, {}), defined.get(row.oid, _UNDEFINED)))
        survey = Survey(
            publication=self._publication,
            version=publications[0].version if publications else "",
            stores=self._connection.info.server_version >= 180000,
            exists=bool(publications),
            all_ops=bool(publications) and publications[0].all_ops,
            via_root=bool(publications) and publications[0].via_root,
            tables=states,
            without_identity=[Table(row.schema, row.name) for row in harmed if not row.awaits_stored],
            lists_unstored=any(row.awaits_stored for row in harmed),
            bystanders=bystanders,
            alike=alike,
        )
        self._last = seen, survey
        return survey

    async def bystanders(self) -> list[Leaf]:
        """Return the tables without identity that the publication carries by FOR ALL TABLES or a schema.

        The application can't update their rows if the publication publishes that.
        """
        query = f"{_CARRIED} SELECT * FROM ({_of_leaves()}) AS leaves WHERE NOT usable"  # noqa: S608  what is pasted is ours
        return [
            _leaf(row, {}, _UNDEFINED)
            for row in await rows(self._connection, query, {"publication": self._publication})
        ]

    async def carries(self, oid: int) -> bool:
        """Return whether the publication carries the table with this OID, as it is now; False if there is none."""
        return bool(await rows(self._connection, _CARRIES, {"publication": self._publication, "oid": oid}))

    async def _types(self, rules: RuleSet, leaves: Sequence[Any]) -> dict[int, dict[str, ColumnType]]:
        """Return the types of the columns that conditions read, by the OID of each table that holds rows."""
        conditions = [
            (rule.table, condition_of(each.source, each.field)) for rule in rules.rules for each in rule.conditions
        ]
        tables = {table for table, _ in conditions}
        oids = [row.oid for row in leaves if Table(row.root_schema, row.root_name) in tables]
        if not oids:
            return {}
        reads = [each for _, condition in conditions for each in condition.reads.values()]
        names = None if any(each.whole for each in reads) else sorted({name for each in reads for name in each.columns})
        return await compared_types(self._connection, oids, names)


def _of_leaves() -> str:
    return _LEAVES.format(
        identity=IDENTITY,
        identity_columns=IDENTITY_COLUMNS,
        identified=_IDENTIFIED,
        virtual=_IN_IDENTITY.format(kind="v"),
        awaits_stored=_AWAITS_STORED,
        unstored=_UNSTORED,
        carriers=_CARRIERS.format(table="tree"),
        others=_OTHERS,
        unordered=_UNORDERED,
    )


# Of a table that was dropped between two queries, and where nobody asks.
_UNDEFINED = Definition("", "")


def _leaf(row: Any, types: Mapping[str, ColumnType], definition: Definition) -> Leaf:
    return Leaf(
        table=Table(row.schema, row.name),
        oid=row.oid,
        kind=row.kind,
        columns=frozenset(row.columns),
        generated=frozenset(row.generated),
        carried=frozenset(row.carried),
        usable=row.usable,
        awaits_stored=row.awaits_stored,
        keyed=row.keyed,
        full=row.full,
        filtered=row.filtered,
        carriers=tuple(row.carriers),
        limited=row.limited,
        types=types,
        definition=definition,
        indexable=row.indexable,
        nullable=frozenset(row.nullable),
    )


_PUBLICATION = """
SELECT oid || ':' || xmin AS version, pubviaroot AS via_root,
  pubinsert AND pubupdate AND pubdelete AND pubtruncate AS all_ops
FROM pg_publication WHERE pubname = %(publication)s
"""

# These queries call no function that opens the table itself (pg_publication_tables, pg_partition_tree,
# pg_relation_size): it would wait for whoever has locked the table.
_PUBLICATIONS = """
publication AS (
  SELECT oid, puballtables FROM pg_publication WHERE pubname = %(publication)s
), others AS (
  SELECT oid, puballtables, to_jsonb(pg_publication) ->> 'pubgencols' <> 's' AS unstored FROM pg_publication
  WHERE pubname <> %(publication)s AND (pubupdate OR pubdelete)
)
"""

_KIN = f"""
WITH RECURSIVE {_PUBLICATIONS}, roots AS (
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
"""  # noqa: S608  what is pasted is ours

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

_CARRIES = f"""
WITH {_PUBLICATIONS}
SELECT c.oid FROM pg_class c {_CARRIERS.format(table="c")} WHERE c.oid = %(oid)s::oid AND carriers.oids IS NOT NULL
"""  # noqa: S608  what is pasted is ours

_ROOTS = """
SELECT schema, name, oid, relkind = 'p' AS partitioned,
  EXISTS (SELECT FROM pg_index i WHERE i.indrelid = roots.oid AND i.indisprimary AND i.indimmediate) AS keyed,
  relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = roots.oid) AS parent,
  EXISTS (SELECT FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = roots.oid) AS listed,
  coalesce(carriers.oids, '{{}}') AS carriers
FROM roots {carriers}
"""

_IDENTIFIED = "(c.relreplident = 'f' OR (c.relreplident <> 'n' AND i.indexrelid IS NOT NULL))"

# Whether the identity contains a generated column of a kind, stored ('s') or virtual ('v').
_IN_IDENTITY = """EXISTS (
  SELECT FROM pg_attribute g WHERE g.attrelid = c.oid AND g.attnum > 0 AND NOT g.attisdropped
    AND g.attgenerated = '{kind}' AND (c.relreplident = 'f' OR g.attnum = ANY (i.indkey::int2[]))
)"""

# From PostgreSQL 18 on, the application's UPDATE and DELETE fail if an identity contains a generated column that a
# publication does not carry. It can carry stored ones, as ours does where we have made it.
_UNSTORED = """EXISTS (
  SELECT FROM pg_publication mine WHERE mine.pubname = %(publication)s AND to_jsonb(mine) ->> 'pubgencols' <> 's'
)"""
_AWAITS_STORED = f"""(
  {_UNSTORED} AND {_IDENTIFIED} AND {_IN_IDENTITY.format(kind="s")} AND NOT {_IN_IDENTITY.format(kind="v")}
)"""

# What other publications with a table ask of its identity: `listed`, a column list; `filtered`, that or a row filter;
# `unstored`, that stored generated columns are not part of it.
_OTHERS = """
LEFT JOIN LATERAL (
  SELECT bool_or(entries.attrs) AS listed, bool_or(entries.attrs OR entries.qual) AS filtered,
    bool_or(entries.unstored) AS unstored
  FROM (SELECT tree.oid UNION SELECT above.relid FROM pg_partition_ancestors(tree.oid) above) AS kin (oid)
  CROSS JOIN LATERAL (
    SELECT r.prattrs IS NOT NULL AS attrs, r.prqual IS NOT NULL AS qual, o.unstored
    FROM pg_publication_rel r JOIN others o ON o.oid = r.prpubid WHERE r.prrelid = kin.oid
    UNION ALL
    SELECT false, false, o.unstored FROM others o WHERE o.puballtables
    UNION ALL
    SELECT false, false, o.unstored FROM others o JOIN pg_publication_namespace s ON s.pnpubid = o.oid
    JOIN pg_class c ON c.oid = kin.oid AND c.relnamespace = s.pnnspid
  ) AS entries
  WHERE EXISTS (SELECT FROM others)
) AS others ON true
"""

# Types of a fixed length that no B-tree can order: point, lseg, box, line, circle, tid, xid, cid, aclitem.
_UNORDERED = "(600, 601, 603, 628, 718, 27, 28, 29, 1033)"

_LEAVES = """
SELECT tree.schema AS root_schema, tree.name AS root_name, n.nspname AS schema, c.relname AS name, c.oid,
  CASE c.relpersistence WHEN 'p' THEN c.relkind ELSE c.relpersistence END::text AS kind,
  names.columns AS columns,
  CASE WHEN current_setting('server_version_num')::int < 180000 OR {unstored} THEN names.virtual || names.stored
    ELSE names.virtual END AS generated,
  CASE c.relreplident
    WHEN 'f' THEN names.columns
    WHEN 'n' THEN '{{}}'
    ELSE ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid
               AND attnum = ANY ({identity_columns})) END AS carried,
  {identified} AND NOT (names.virtual <> '{{}}' AND {virtual}) AND NOT {awaits_stored} AS usable,
  {awaits_stored} AS awaits_stored,
  EXISTS (SELECT FROM pg_index k WHERE k.indrelid = c.oid AND k.indisprimary AND k.indimmediate AND k.indisvalid
          AND (names.stored = '{{}}' OR NOT EXISTS (
            SELECT FROM pg_attribute g
            WHERE g.attrelid = c.oid AND g.attgenerated <> '' AND g.attnum = ANY (k.indkey::int2[])
          ))) AS keyed,
  CASE WHEN names.virtual <> '{{}}' THEN 'virtual'
    WHEN coalesce(others.listed, false) OR coalesce(carriers.limited, false) THEN 'listed'
    WHEN names.stored <> '{{}}' AND coalesce(others.unstored, false) THEN 'unstored'
    WHEN names.stored <> '{{}}' AND {unstored} THEN 'stored'
    ELSE 'ok' END AS full,
  coalesce(others.filtered, false) AS filtered,
  coalesce(carriers.oids, '{{}}') AS carriers,
  coalesce(carriers.limited, false) AS limited,
  names.indexable AS indexable, names.nullable AS nullable
FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
  SELECT coalesce(array_agg(attname::text), '{{}}') AS columns,
    coalesce(array_agg(attname::text) FILTER (WHERE attgenerated = 's'), '{{}}') AS stored,
    coalesce(array_agg(attname::text) FILTER (WHERE attgenerated = 'v'), '{{}}') AS virtual,
    coalesce(array_agg(attname::text) FILTER (WHERE NOT attnotnull), '{{}}') AS nullable,
    coalesce(jsonb_object_agg(attname, CASE WHEN attlen > 0 THEN attlen ELSE atttypmod * 4 END) FILTER (
      WHERE attnotnull AND attgenerated = '' AND (
        attlen > 0 AND atttypid NOT IN {unordered} OR atttypid IN (1042, 1043) AND atttypmod > 0
      )
    ), '{{}}') AS indexable
  FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
) AS names
{identity} {carriers} {others}
WHERE tree.relkind <> 'p'
"""

_WITHOUT_IDENTITY = f"""
WITH RECURSIVE tree (root, oid) AS (
  SELECT r.prrelid, r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
  WHERE p.pubname = %(publication)s
  UNION ALL
  SELECT tree.root, i.inhrelid FROM tree
  JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'p' JOIN pg_inherits i ON i.inhparent = tree.oid
)
SELECT n.nspname AS schema, root.relname AS name, bool_and({_AWAITS_STORED}) AS awaits_stored
FROM tree JOIN pg_class root ON root.oid = tree.root JOIN pg_namespace n ON n.oid = root.relnamespace
JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'r' {IDENTITY}
WHERE NOT {_IDENTIFIED} OR {_IN_IDENTITY.format(kind="v")} OR {_AWAITS_STORED}
GROUP BY 1, 2
"""  # noqa: S608  what is pasted is ours

_ALIKE = """
SELECT n.nspname AS schema, c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = ANY (%(names)s::text[]) AND c.oid <> ALL (%(oids)s::oid[])
  AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
  AND NOT c.relispartition AND n.nspname NOT IN ('pg_catalog', 'information_schema')
ORDER BY 1, 2
"""

# In place of `_KIN`: all tables that the publication carries without listing them.
_CARRIED = f"""
WITH {_PUBLICATIONS}, tree AS (
  SELECT n.nspname AS schema, c.relname AS name, c.oid, c.relkind
  FROM publication p JOIN pg_class c ON c.relkind = 'r' AND c.relpersistence = 'p' AND c.oid >= 16384
  JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE p.puballtables OR EXISTS (
    SELECT FROM (SELECT c.oid UNION SELECT above.relid FROM pg_partition_ancestors(c.oid) above) AS kin (oid)
    JOIN pg_class k ON k.oid = kin.oid
    JOIN pg_publication_namespace s ON s.pnpubid = p.oid AND s.pnnspid = k.relnamespace
  )
)
"""  # noqa: S608  what is pasted is ours
