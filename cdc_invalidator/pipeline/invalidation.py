"""The rules, ready to be compiled for the relations of the stream. Pure; a batch holds keys, never rows.

For each relation a `Plan` is compiled once: for each kind of change, which keys of which caches, from which columns. A
row then costs a few look-ups and one join of bytes a key. Which rows belong to which transaction, `assembly` knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from cdc_invalidator.pipeline.batch import Target
from cdc_invalidator.pipeline.plan import Complaint, Counts, Plan, PreparedRule, compile_plan, compile_sweeps, ignore
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import condition_of
from cdc_invalidator.rules.model import Rule, RuleSet
from cdc_invalidator.rules.table import Table


class Invalidation:
    """A rule set by table, and the count of what was matched.

    Args:
        rules: the rule set.
        gave_up: see `compile_plan`.
    """

    def __init__(self, rules: RuleSet, *, gave_up: Callable[[str], None] = ignore) -> None:
        self._gave_up = gave_up
        self._by_table: dict[Table, list[PreparedRule]] = {}
        self._counts: Counts = defaultdict(int)
        for rule in rules.rules:
            self._by_table.setdefault(rule.table, []).append(_prepared(rule))

    def names(self, table: Table) -> bool:
        """Return whether a rule names the table."""
        return table in self._by_table

    def counted(self) -> dict[tuple[str, str], int]:
        """Return how many changes were matched since the last call, by table and kind of change."""
        counts = dict(self._counts)
        self._counts.clear()
        return counts

    def compile(
        self, relation: pgoutput.Relation, tables: Sequence[Table], types: Mapping[str, ColumnType] | None = None
    ) -> tuple[Plan, list[Complaint]]:
        """Compile the rules of a relation.

        Args:
            relation: its shape.
            tables: what rules know it by: itself, and for a partition the tables above it.
            types: of its columns, as far as the catalogs are known.

        Returns:
            The plan, and what keeps rules from naming their keys.
        """
        return compile_plan(relation, self._rules_of(tables), str(tables[0]), self._counts, types, self._gave_up)

    def compile_unknown(self, relation: pgoutput.Relation, tables: Iterable[Table]) -> Plan:
        """Compile a relation that no rule names, while rules name missing tables: it may be one of them, renamed.

        A renamed table stays in the publication. Any change of it sweeps the caches of all rules on these tables.
        """
        return compile_sweeps(relation, self._rules_of(tables), self._counts)

    def targets(self, tables: Iterable[Table]) -> list[Target]:
        """Return what the rules on these tables bust."""
        return [target for rule in self._rules_of(tables) for target in rule.targets]

    def _rules_of(self, tables: Iterable[Table]) -> list[PreparedRule]:
        return [rule for table in tables for rule in self._by_table[table]]


def _prepared(rule: Rule) -> PreparedRule:
    targets = tuple(Target(rule.name, bust.cache, str(rule.table), bust, rule.debounce or 0) for bust in rule.busts)
    wheres = tuple(tuple(condition_of(each.source, each.field) for each in rule.wheres(bust)) for bust in rule.busts)
    return PreparedRule(rule, targets, condition_of(rule.when) if rule.when is not None else None, wheres)
