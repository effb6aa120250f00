"""How the tables of the rules stand in the database and the publication."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NamedTuple

from psycopg import sql

from cdc_invalidator.errors import Problem
from cdc_invalidator.rules.condition import Condition
from cdc_invalidator.rules.model import Rule, RuleSet
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
        return bool(self.carriers) and not self.limited and self.kind not in _NOT_TABLES


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
        return all(leaf.usable and leaf.kind not in _NOT_TABLES for leaf in self.leaves) and not self.refused

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

    def mistakes(self, rules: RuleSet) -> list[Problem]:
        """Give the rules that can't be kept on this database, each with its place and what helps."""
        problems: list[Problem] = []
        for table, state in self.tables.items():
            if state is not None:
                of_table = [rule for rule in rules.rules if rule.table == table]
                if state.refused:
                    place = of_table[0].place
                    sentence = f"{table} can't be published: {state.refused}."
                    problems.append(Problem(*place, sentence, "not_publishable"))
                problems += _mistakes(table, state.leaves, of_table)
        return problems


def _shape(state: TableState | None) -> set[int]:
    return set(state.shape) if state else set()


_NOT_TABLES = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "u": "an unlogged table",
    "t": "a temporary table",
    "S": "a sequence",
}


def _usable_identity(leaf: Leaf, name: str) -> str:
    if leaf.carried & leaf.generated:
        return (
            "it contains a generated column, which PostgreSQL 18 does not publish; set REPLICA IDENTITY DEFAULT, or "
            f"USING INDEX without {', '.join(sorted(leaf.carried & leaf.generated))}"
        )
    return f"add a primary key, or run ALTER TABLE {name} REPLICA IDENTITY FULL"


def _mistakes(table: Table, leaves: Iterable[Leaf], rules: Sequence[Rule]) -> list[Problem]:
    problems: list[Problem] = []

    def add(rule: Rule, code: str, sentence: str) -> None:
        problems.append(Problem(rule.place.file, rule.place.line, rule.place.column, sentence, code))

    for leaf in leaves:
        name = quoted(leaf.table)
        if leaf.kind in _NOT_TABLES:
            add(
                rules[0],
                "not_publishable",
                f"{table} is {_NOT_TABLES[leaf.kind]}, whose changes PostgreSQL does not publish; name a table.",
            )
            continue
        if not leaf.usable:
            add(
                rules[0],
                "no_replica_identity",
                f"{leaf.table} has no usable replica identity, and publishing it would make the application's "
                f"UPDATE and DELETE fail; {_usable_identity(leaf, name)}.",
            )
            continue
        if leaf.limited:
            add(
                rules[0],
                "limited_publication",
                f"the publication has a row filter or a column list on {leaf.table}, which hides changes from the "
                "rules; take the table out of the publication, and it is added without them.",
            )
        for rule in rules:
            for column in sorted((rule.key_columns | set(rule.columns)) - (leaf.columns - leaf.generated)):
                add(rule, *_no_column(rule, leaf, column))
            problems += _not_of_condition(rule, leaf)
            unknown = unknown_old(rule, leaf)
            if unknown and rule.old_row == "require":
                add(
                    rule,
                    "old_row_unknown",
                    f"rule {rule.name} needs {', '.join(unknown)} of the old row, which the replica identity of "
                    f"{leaf.table} does not carry, so that the entry under a former value would stay; "
                    f"run ALTER TABLE {name} REPLICA IDENTITY FULL, or set old_row to sweep or ignore.",
                )
    return problems


def _no_column(rule: Rule, leaf: Leaf, column: str) -> tuple[str, str]:
    """Give the code and the sentence about a column that the stream does not have."""
    if column in leaf.generated:
        return "generated_column", (
            f"rule {rule.name} reads column {column} of {leaf.table}, a generated column, "
            "which PostgreSQL does not publish; use the columns that it is generated from."
        )
    near = get_close_matches(column, leaf.columns, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(leaf.columns))}."
    return "unknown_column", f"rule {rule.name} reads column {column}, which {leaf.table} does not have; {hint}"


def _not_of_condition(rule: Rule, leaf: Leaf) -> list[Problem]:
    """Give the columns that only the rule's condition reads, and that the stream does not have."""
    if rule.when is None:
        return []
    read = {column for reads in Condition(rule.when).reads.values() for column in reads.columns}
    lacking = read - (leaf.columns - leaf.generated) - rule.key_columns - set(rule.columns)
    place = rule.when_place
    problems = []
    for column in sorted(lacking):
        code, sentence = _no_column(rule, leaf, column)
        problems.append(Problem(place.file, place.line, place.column, sentence, code))
    return problems


def unknown_old(rule: Rule, leaf: Leaf) -> list[str]:
    """Give the key columns whose old values an UPDATE or DELETE of this table does not tell."""
    unknown: set[str] = set()
    if "delete" in rule.on:
        unknown |= rule.key_columns - leaf.carried
    if "update" in rule.on:
        unknown |= rule.key_columns - leaf.carried - rule.immutable
    return sorted(unknown & leaf.columns)


def identifier(name: str) -> str:
    """Give the name quoted for SQL."""
    return sql.Identifier(name).as_string(None)


def quoted(table: Table) -> str:
    """Give the table's name quoted for SQL."""
    return sql.Identifier(table.schema, table.name).as_string(None)
