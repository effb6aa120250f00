"""From a row change to the keys that it makes stale: the match. Pure; a batch holds keys, never rows.

For each relation of the stream a plan is compiled once: for each kind of change, which keys of which caches, from
which columns. A row then costs a few look-ups and one join of bytes a key. Which rows belong to which transaction is
not known here: that is `assembly`.

The rule that holds here: over-bust, never under-bust. Where a key can't be known (the replica identity does not carry
its columns, a TOAST value is not sent, a column is gone) the cache is swept, unless the rule file says ``ignore``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cdc_invalidator import errors
from cdc_invalidator.pipeline.batch import Target
from cdc_invalidator.pipeline.plan import Counts, KeyOf, Plan, _Firing, _no_key, _RulePlan
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.condition import Condition
from cdc_invalidator.rules.condition import missing as condition_misses
from cdc_invalidator.rules.model import Bust, Rule, RuleSet
from cdc_invalidator.rules.packed import join_arguments
from cdc_invalidator.rules.table import Table


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something about a relation that keeps a rule from naming its keys; its caches are swept instead."""

    rule: str
    sentence: str


class Invalidation:
    """The rules, ready to be compiled for relations.

    Args:
        rules: the rule set.
    """

    def __init__(self, rules: RuleSet) -> None:
        self._by_table: dict[Table, list[Rule]] = {}
        self._targets: dict[tuple[str, int], Target] = {}
        self._counts: Counts = defaultdict(int)
        self._conditions: dict[str, Condition] = {}
        self._manual = {name: Target("", cache, "") for name, cache in rules.caches.items()}
        for rule in rules.rules:
            self._by_table.setdefault(rule.table, []).append(rule)
            for position, bust in enumerate(rule.busts):
                target = Target(rule.name, bust.cache, str(rule.table), bust, rule.debounce or 0)
                self._targets[rule.name, position] = target
            if rule.when is not None:
                self._conditions[rule.name] = Condition(rule.when)

    def manual(self, content: bytes) -> tuple[Target, bytes | None]:
        """Read a manual bust, written with pg_logical_emit_message.

        Args:
            content: JSON, ``{"cache": "user", "params": {"id": 42}}``; without ``params``, the whole cache is meant.

        Returns:
            The target, and its key; ``None`` for all keys.

        Raises:
            errors.WrongMessage: it can't be read, or no cache of the rules fits it.
        """
        try:
            bust = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise errors.WrongMessage('A manual bust is not JSON; write {"cache": "user", "params": {…}}.') from error
        if not isinstance(bust, dict) or not isinstance(bust.get("cache"), str) or bust.keys() - {"cache", "params"}:
            raise errors.WrongMessage("A manual bust must be an object with `cache`, and `params` if not all is meant.")
        target = self._manual.get(bust["cache"])
        if target is None:
            raise errors.WrongMessage(f"A manual bust names cache {bust['cache']!r}, which the rules do not have.")
        if "params" not in bust:
            return target, None
        return target, _manual_key(target, bust["params"])

    def names(self, table: Table) -> bool:
        """Tell whether a rule names the table."""
        return table in self._by_table

    def counted(self) -> dict[tuple[str, str], int]:
        """Give how many changes were matched since the last call, by table and kind of change."""
        counts = dict(self._counts)
        self._counts.clear()
        return counts

    def compile(self, relation: pgoutput.Relation, tables: Sequence[Table]) -> tuple[Plan, list[Complaint]]:
        """Compile the rules of a relation.

        Args:
            relation: its shape.
            tables: what rules know it by: itself, and for a partition the tables above it.

        Returns:
            The plan, and what keeps rules from naming their keys.
        """
        complaints: list[Complaint] = []
        by_op: dict[str, list[_RulePlan]] = {"insert": [], "update": [], "delete": [], "truncate": []}
        for rule in (rule for table in tables for rule in self._by_table[table]):
            plan, of_rule = self._compile(rule, relation)
            complaints += of_rule
            for op in rule.on:
                by_op[op].append(plan)
        return self._plan(relation, by_op, str(tables[0])), complaints

    def compile_unknown(self, relation: pgoutput.Relation, tables: Iterable[Table]) -> Plan:
        """Compile a relation that no rule names, while rules name tables that are not there: it may be one of those.

        A renamed table stays in the publication, under a name that tells nothing. Any change of it sweeps the caches
        of all rules on these tables.
        """
        firings = [
            _Firing(self._targets[rule.name, position], _no_key, (), None, "sweep", "sweep")
            for table in tables
            for rule in self._by_table[table]
            for position in range(len(rule.busts))
        ]
        plans = [_RulePlan(firings, (), frozenset())]
        by_op = dict.fromkeys(("insert", "update", "delete", "truncate"), plans)
        return self._plan(relation, by_op, "")

    def _plan(self, relation: pgoutput.Relation, by_op: dict[str, list[_RulePlan]], table: str) -> Plan:
        return Plan(tuple(column.is_key for column in relation.columns), by_op, table, self._counts)

    def _compile(self, rule: Rule, relation: pgoutput.Relation) -> tuple[_RulePlan, list[Complaint]]:
        index = {column.name: position for position, column in enumerate(relation.columns)}
        carried = {column.name for column in relation.columns if column.is_key}
        condition = self._conditions.get(rule.name)
        missing = sorted(
            (rule.key_columns | set(rule.columns)) - index.keys()
            | set(condition_misses(condition, index) if condition else ())
        )
        name = str(Table(relation.schema, relation.name))
        complaints = []
        if missing:
            complaints.append(
                Complaint(
                    rule.name,
                    f"{name} has no column {', '.join(missing)}; until the rule or the "
                    "table is put right, its caches are swept where a key needs it, and every UPDATE counts.",
                )
            )
        firings = []
        for position, bust in enumerate(rule.busts):
            firing = self._firing(rule, position, bust, index, carried)
            firings.append(firing)
            unknown = sorted(set(bust.columns.values()) & index.keys() - carried)
            if rule.old_row == "require" and "sweep" in _old_modes(rule, firing) and not missing:
                complaints.append(
                    Complaint(
                        rule.name,
                        f"the replica identity of {name} does not carry "
                        f"{', '.join(unknown)}, so cache {bust.cache.name} is swept where the old row is needed; "
                        f"run ALTER TABLE {name} REPLICA IDENTITY FULL.",
                    )
                )
        compared = tuple(index[name] for name in rule.columns if name in index)
        holds = None
        if condition is not None and not missing:
            columns = relation.columns
            holds = condition.bind([column.name for column in columns], [column.type_oid for column in columns])
        return _RulePlan(firings, compared, rule.on, bool(missing), holds), complaints

    def _firing(self, rule: Rule, position: int, bust: Bust, index: Mapping[str, int], carried: set[str]) -> _Firing:
        target = self._targets[rule.name, position]
        needed = set(bust.columns.values())
        unknown = "ignore" if rule.old_row == "ignore" else "sweep"
        if needed <= carried:
            old_of_update = old_of_delete = "given"
        else:
            old_of_update = "kept" if needed <= carried | rule.immutable else unknown
            old_of_delete = unknown
        if not needed <= index.keys():
            return _Firing(target, _no_key, (), None, "sweep", "sweep")
        at = {parameter: index[column] for parameter, column in bust.columns.items()}
        columns = tuple(sorted(set(at.values())))
        if bust.query is None:
            key_of, plain = target.template.compile(at), target.template.plain(at)
            return _Firing(target, key_of, columns, plain, old_of_update, old_of_delete)
        # A query can be asked for NULL as well.
        places = [at[column] for column in (*bust.query.columns, *bust.given.values())]
        return _Firing(target, _arguments_of(places), columns, None, old_of_update, old_of_delete)


def _arguments_of(places: Sequence[int]) -> KeyOf:
    return lambda row: join_arguments([row[place] for place in places])


def _old_modes(rule: Rule, firing: _Firing) -> Iterable[str]:
    if "update" in rule.on:
        yield firing.old_of_update
    if "delete" in rule.on:
        yield firing.old_of_delete


def _manual_key(target: Target, params: object) -> bytes:
    wanted = target.template.params
    name = target.cache.name
    if not isinstance(params, dict) or set(params) != set(wanted):
        raise errors.WrongMessage(
            f"A manual bust of {name} must give just its parameters: {', '.join(wanted) or 'none'}."
        )
    values = {}
    for parameter, value in params.items():
        if isinstance(value, bool):
            values[parameter] = "t" if value else "f"
        elif isinstance(value, (str, int)):
            values[parameter] = str(value)
        else:
            # A float has no text form that is sure to be PostgreSQL's.
            raise errors.WrongMessage(
                f"A manual bust of {name} gives {parameter} as neither text nor integer; quote it."
            )
    if any("\0" in value for value in values.values()):
        raise errors.WrongMessage(f"A manual bust of {name} gives a value with NUL, which no key of it has.")
    try:
        key = target.template.render(values)
    except UnicodeEncodeError as error:
        raise errors.WrongMessage(
            f"A manual bust of {name} gives a value that is no text; write it in UTF-8."
        ) from error
    assert key is not None
    return key
