"""The rules of one relation, compiled: from a row change to the keys that it makes stale. Pure.

The rule that holds here: over-bust, never under-bust. Where a key can't be known (the replica identity does not carry
its columns, a TOAST value is not sent, a column is gone) the cache is swept, unless the rule file says ``ignore``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.pipeline import scan
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import Condition, Holds, HoldsOf, asked_columns
from cdc_invalidator.rules.model import Bust, Rule
from cdc_invalidator.rules.packed import Question, join_arguments
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import OPS, UNCHANGED, Row

Counts = defaultdict[tuple[str, str], int]


KeyOf = Callable[[Sequence[bytes | None]], bytes | None]


def ignore(_rule: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something about a relation that keeps a rule from naming its keys; its caches are swept instead."""

    rule: str
    sentence: str


class PreparedRule(NamedTuple):
    """A rule with what does not depend on a relation: the target of each of its busts, and its conditions.

    ``wheres``: for each of the busts, those that an image of a row must satisfy.
    """

    rule: Rule
    targets: tuple[Target, ...]
    condition: Condition | None
    wheres: tuple[tuple[Condition, ...], ...]


@dataclass(slots=True)
class _Firing:
    """One target of a rule, compiled for one relation."""

    target: Target
    key_of: KeyOf
    # Of a query: what it is asked for a row that is gone, or has moved away.
    old_key_of: KeyOf
    columns: tuple[int, ...]
    # The key in literals and columns, where it is no more than that.
    plain: tuple[Sequence[bytes], Sequence[int]] | None
    # What is known of an old row: "given" (the identity carries all key columns), "kept" (those that it does not
    # carry never change), or the rule's answer to not knowing: "sweep" or "ignore".
    old_of_update: str
    old_of_delete: str
    # Which images of a row count; None for all.
    where: HoldsOf | None = None


@dataclass(slots=True)
class _RulePlan:
    """One rule, compiled for one relation.

    ``firings``: all; ``always``: those for which every image of a row counts; ``asked``: those with a `where`.
    ``compared``: columns of which an UPDATE must change one; empty, any. ``holds``: its condition, if it has one that
    can be asked. ``kept``: for each column, whether an old row has the new row's value, because it never changes.
    """

    firings: list[_Firing]
    compared: tuple[int, ...]
    on: frozenset[str]
    broken: bool = False
    holds: Holds | None = None
    kept: tuple[bool, ...] = ()
    always: list[_Firing] = field(init=False)
    asked: list[tuple[_Firing, HoldsOf]] = field(init=False)

    def __post_init__(self) -> None:
        self.always = [firing for firing in self.firings if firing.where is None]
        self.asked = [(firing, firing.where) for firing in self.firings if firing.where is not None]

    def counting(self, row: Row) -> list[_Firing]:
        """Return what an image of a row busts."""
        return [*self.always, *(firing for firing, where in self.asked if where(row))]


class Plan:
    """All rules of one relation, compiled.

    Args:
        in_identity: for each column, whether an old key tuple carries it.
        rules: by kind of change.
        name: what rules know the relation by.
        counts: is counted up, by table and kind of change.
    """

    __slots__ = ("_compares", "_counts", "_in_identity", "_name", "_rules", "table")

    def __init__(
        self, in_identity: tuple[bool, ...], rules: Mapping[str, list[_RulePlan]], name: str, counts: Counts
    ) -> None:
        self._in_identity = in_identity
        self._rules = rules
        self._compares = any(rule.compared or rule.holds or rule.asked for rule in rules["update"])
        self._name = name
        self._counts = counts
        inserts, updates, deletes = (_plain(op, rules[op]) for op in ("insert", "update", "delete"))
        # The same for `scan`, where the rules are plain.
        self.table = scan.compile_plain(name, in_identity, inserts, updates, deletes, counts)

    def insert(self, batch: Batch, message: pgoutput.Insert) -> None:
        """Put what a new row makes stale into the batch."""
        new = message.new
        self._check_width(new)
        self._counts[self._name, "insert"] += 1
        for rule in self._rules["insert"]:
            if rule.holds and not rule.holds("insert", None, new):
                continue
            for firing in rule.counting(new) if rule.asked else rule.firings:
                _bust(batch, firing, "insert", new)

    def update(self, batch: Batch, message: pgoutput.Update) -> None:
        """Put what a changed row makes stale, as it was and as it is, into the batch."""
        new, old = message.new, message.old
        self._check_width(new)
        if old is not None:
            self._check_width(old)
        self._counts[self._name, "update"] += 1
        known: Row = []
        if self._compares or UNCHANGED in new:
            known = self._known_old(message)
            new = _filled(new, known)
        for rule in self._rules["update"]:
            if rule.compared and not rule.broken and not _fires(rule, known, message.new):
                continue
            if rule.holds and not rule.holds("update", known, new):
                continue
            if rule.asked:
                self._ask_of_update(batch, rule, known, new)
            for firing in rule.always:
                _bust(batch, firing, "update", new)
                if firing.old_of_update == "given":
                    if old is not None:
                        _bust_old(batch, firing, "update", old, new)
                elif firing.old_of_update == "kept":
                    if old is not None:
                        _bust_old(batch, firing, "update", self._kept(old, new), new)
                elif firing.old_of_update == "sweep":
                    batch.sweep(firing.target, ("update",), "change")

    def _ask_of_update(self, batch: Batch, rule: _RulePlan, known: Row, new: Row) -> None:
        """Put what a changed row makes stale into the batch, where its images are asked one by one.

        The old image counts even if its key is the new one's, since the new one may not count. Where the old key is not
        known and is to be ignored, it is taken to be as it was.
        """
        before = [after if kept else value for value, after, kept in zip(known, new, rule.kept, strict=False)]
        as_it_was = self._kept(known, new)
        for firing, where in rule.asked:
            counts = where(new)
            if counts:
                _bust(batch, firing, "update", new)
            if where(before):
                if firing.old_of_update == "sweep":
                    batch.sweep(firing.target, ("update",), "change")
                else:
                    _bust_old(batch, firing, "update", as_it_was, new if counts else None)

    def delete(self, batch: Batch, message: pgoutput.Delete) -> None:
        """Put what a deleted row makes stale into the batch."""
        self._check_width(message.old)
        self._counts[self._name, "delete"] += 1
        for rule in self._rules["delete"]:
            if rule.holds and not rule.holds("delete", self._carried(message.old), None):
                continue
            for firing in rule.counting(self._carried(message.old)) if rule.asked else rule.firings:
                if firing.old_of_delete == "given":
                    _bust_old(batch, firing, "delete", message.old, None)
                elif firing.old_of_delete == "sweep":
                    batch.sweep(firing.target, ("delete",), "change")

    def truncate(self, batch: Batch) -> None:
        """Put what an emptied table makes stale, whole caches, into the batch."""
        self._counts[self._name, "truncate"] += 1
        for rule in self._rules["truncate"]:
            if rule.holds and not rule.holds("truncate", None, None):
                continue
            for firing in rule.firings:
                batch.sweep(firing.target, ("truncate",), "truncate")

    def wide(self, batch: Batch, op: str) -> None:
        """Put sweeps into the batch for a row that nobody has seen."""
        self._counts[self._name, op] += 1
        for rule in self._rules[op]:
            for firing in rule.firings:
                batch.sweep(firing.target, (op,), "change")

    def _check_width(self, row: Row) -> None:
        if len(row) != len(self._in_identity):
            raise out_of_place("a row of another width than its Relation's")

    def _known_old(self, message: pgoutput.Update) -> Row:
        """Return the old row as far as it is known; UNCHANGED stands for the rest."""
        if message.old_kind == "O":
            assert message.old is not None
            return message.old
        # Without an old tuple the identity's columns are as they were; with a key tuple they are in it.
        return self._carried(message.new if message.old is None else message.old)

    def _carried(self, row: Row) -> Row:
        """Return the row with UNCHANGED for what the identity does not carry."""
        return [value if carried else UNCHANGED for value, carried in zip(row, self._in_identity, strict=False)]

    def _kept(self, old: Row, new: Row) -> Row:
        """Return the old row; what the identity does not carry is immutable, and taken from the new one."""
        return [
            before if carried else after for before, after, carried in zip(old, new, self._in_identity, strict=False)
        ]


def _plain(op: str, rules: Iterable[_RulePlan]) -> scan.PlainRules:
    """Return the rules for one kind of change as `scan` takes them; ``None`` where one of them is not plain."""
    found = []
    for rule in rules:
        if rule.broken or rule.holds or rule.asked:
            return None
        firings: list[scan.PlainFiring] = []
        for firing in rule.firings:
            target = firing.target
            old = {"update": firing.old_of_update, "delete": firing.old_of_delete}.get(op)
            later = target.pairs or target.rest or target.debounce or target.cache.again_after
            if firing.plain is None or later or old == "sweep":
                return None
            firings.append((target, *firing.plain, old or "ignore"))
        found.append((rule.compared, firings))
    return found


def _no_key(_row: Sequence[bytes | None]) -> bytes | None:
    raise AssertionError("a firing without its columns gives no key")


def _bust_old(batch: Batch, firing: _Firing, op: str, old: Row, new: Row | None) -> None:
    """Bust what a row as it was gives.

    Args:
        batch: takes the bust.
        firing: what is busted.
        op: update or delete.
        old: the row as it was.
        new: the row as it is; ``None`` if it is gone, or does not count any more.
    """
    if firing.target.query is not None and (new is None or any(old[at] != new[at] for at in firing.columns)):
        _bust(batch, firing, op, old, firing.old_key_of)
    else:
        _bust(batch, firing, op, old)


def _bust(batch: Batch, firing: _Firing, op: str, row: Row, key_of: KeyOf | None = None) -> None:
    if firing.key_of is _no_key:
        batch.sweep(firing.target, (op,), "change")
        return
    for column in firing.columns:
        if row[column] is UNCHANGED:
            batch.sweep(firing.target, (op,), "change")
            return
    key = (key_of or firing.key_of)(row)  # type: ignore[arg-type]  # no UNCHANGED among the columns that it reads
    if key is not None:
        # As Batch.add does, without its call: this runs for each key.
        busts = batch.busts.get(firing.target) or batch.of(firing.target)
        busts.ops[op] = None
        if not busts.sweep and key not in busts.keys:
            busts.keys[key] = None
            batch.weight += 1


def _filled(new: Row, old: Row) -> Row:
    """Return the new row with its unchanged TOAST values taken from the old one, where that has them."""
    return [before if after is UNCHANGED else after for after, before in zip(new, old, strict=False)]


def _fires(rule: _RulePlan, old: Row, new: Row) -> bool:
    """Return whether a compared column, or one that a key is built from, may have changed."""
    for column in rule.compared:
        if new[column] is not UNCHANGED and old[column] != new[column]:
            return True
    # The entry under the former key is stale even where none of the compared columns changed.
    return any(
        new[column] is not UNCHANGED
        and old[column] != new[column]
        and (old[column] is not UNCHANGED or firing.old_of_update in {"sweep", "ignore"})
        for firing in rule.firings
        for column in firing.columns
    )


def compile_plan(
    relation: pgoutput.Relation,
    rules: Iterable[PreparedRule],
    name: str,
    counts: Counts,
    types: Mapping[str, ColumnType] | None = None,
    gave_up: Callable[[str], None] = ignore,
) -> tuple[Plan, list[Complaint]]:
    """Compile rules for a relation.

    Args:
        relation: its shape.
        rules: those that match its changes.
        name: what rules know it by.
        counts: is counted up, by table and kind of change.
        types: of its columns, as far as the catalogs are known.
        gave_up: is called with a rule for each row that is too long for one of its conditions, and so counts.

    Returns:
        The plan, and what keeps rules from naming their keys.
    """
    complaints: list[Complaint] = []
    by_op: dict[str, list[_RulePlan]] = {op: [] for op in OPS}
    for prepared in rules:
        plan, of_rule = _compile(prepared, relation, types or {}, partial(gave_up, prepared.rule.name))
        complaints += of_rule
        for op in prepared.rule.on:
            by_op[op].append(plan)
    return _plan(relation, by_op, name, counts), complaints


def compile_sweeps(relation: pgoutput.Relation, rules: Iterable[PreparedRule], counts: Counts) -> Plan:
    """Compile a plan in which any change sweeps the caches of all these rules."""
    firings = [
        _Firing(target, _no_key, _no_key, (), None, "sweep", "sweep") for each in rules for target in each.targets
    ]
    every = [_RulePlan(firings, (), frozenset())]
    by_op: dict[str, list[_RulePlan]] = {op: every for op in OPS}  # noqa: C420  shared, and never changed
    return _plan(relation, by_op, "", counts)


def _plan(relation: pgoutput.Relation, by_op: Mapping[str, list[_RulePlan]], name: str, counts: Counts) -> Plan:
    return Plan(tuple(column.is_key for column in relation.columns), by_op, name, counts)


def _compile(
    prepared: PreparedRule,
    relation: pgoutput.Relation,
    types: Mapping[str, ColumnType],
    gave_up: Callable[[], None],
) -> tuple[_RulePlan, list[Complaint]]:
    rule, condition = prepared.rule, prepared.condition
    index = {column.name: position for position, column in enumerate(relation.columns)}
    carried = {column.name for column in relation.columns if column.is_key}
    wheres = {where.source: where for of_bust in prepared.wheres for where in of_bust}
    asked = asked_columns(rule)
    read = rule.key_columns | set(rule.columns) | (condition.columns if condition else set()) | asked
    missing = sorted(read - index.keys())
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
    of_columns = {column.name: _type(column, types) for column in relation.columns}

    def bindable(of: Condition) -> bool:
        misuses = of.misuses(of_columns)
        what = "every change counts" if of is condition else "every row counts"
        complaints.extend(Complaint(rule.name, f"{name}: {misuse}; until then {what}.") for misuse in misuses)
        return not misuses

    bound = {
        source: where.bind_row(list(of_columns), list(of_columns.values()), gave_up=gave_up)
        for source, where in wheres.items()
        if where.columns <= index.keys() and bindable(where)
    }
    firings = []
    for target, bust, of_bust in zip(prepared.targets, rule.busts, prepared.wheres, strict=True):
        firing = _firing(rule, target, bust, index, carried)
        firing.where = _both([bound[where.source] for where in of_bust if where.source in bound])
        firings.append(firing)
        unknown = sorted(set(bust.columns.values()) & index.keys() - carried)
        if rule.old_row == "require" and "sweep" in _old_modes(rule, firing) and not missing:
            complaints.append(
                Complaint(
                    rule.name,
                    f"the replica identity of {name} does not carry "
                    f"{', '.join(unknown)}, so cache {bust.cache.name} is swept where the old row is needed; "
                    "run `cdc-invalidator check`, which gives the remedy.",
                )
            )
    # A row that moves into a `where`, or out of it, changes what the cache holds.
    watched = {*rule.columns, *(asked - rule.immutable)} if rule.columns else ()
    compared = tuple(sorted(index[column] for column in watched if column in index))
    holds = None
    if condition is not None and not missing and bindable(condition):
        holds = condition.bind(list(of_columns), list(of_columns.values()), gave_up=gave_up)
    kept = tuple(column.name in rule.immutable and not column.is_key for column in relation.columns)
    return _RulePlan(firings, compared, rule.on, bool(missing), holds, kept), complaints


def _both(conditions: Sequence[HoldsOf]) -> HoldsOf | None:
    """Return the condition that all of these hold; ``None`` for none."""
    if len(conditions) < 2:
        return conditions[0] if conditions else None
    return lambda row: all(holds(row) for holds in conditions)


def _type(column: pgoutput.Column, types: Mapping[str, ColumnType]) -> ColumnType:
    """Return a column's type: as the catalogs have it, if that is the one of the stream."""
    known = types.get(column.name)
    if known is not None and known.declared == column.type_oid:
        return known
    return ColumnType.built_in(column.type_oid, by_code_point=False)


def _firing(rule: Rule, target: Target, bust: Bust, index: Mapping[str, int], carried: set[str]) -> _Firing:
    needed = set(bust.columns.values())
    unknown = "ignore" if rule.old_row == "ignore" else "sweep"
    if needed <= carried:
        old_of_update = old_of_delete = "given"
    else:
        old_of_update = "kept" if needed <= carried | rule.immutable else unknown
        old_of_delete = unknown
    if bust.sweep:
        return _Firing(target, _no_key, _no_key, (), None, old_of_update, old_of_delete)
    if not needed <= index.keys():
        return _Firing(target, _no_key, _no_key, (), None, "sweep", "sweep")
    at = {parameter: index[column] for parameter, column in bust.columns.items()}
    columns = tuple(sorted(set(at.values())))
    if bust.query is None:
        key_of, plain = target.template.compile(at), target.template.plain(at)
        return _Firing(target, key_of, key_of, columns, plain, old_of_update, old_of_delete)
    # A query can be asked for NULL as well.
    asked = [at[column] for column in bust.query.columns]
    given = [at[column] for column in bust.given.values()]
    arguments_of = _arguments_of([*asked, *given])
    old_key_of = arguments_of if bust.query.ignores_empty else _old_question_of(asked, given)
    return _Firing(target, arguments_of, old_key_of, columns, None, old_of_update, old_of_delete)


def _arguments_of(places: Sequence[int]) -> KeyOf:
    return lambda row: join_arguments([row[place] for place in places])


def _old_question_of(asked: Sequence[int], given: Sequence[int]) -> KeyOf:
    """Return what gives the question of an old row: it expects an answer, unless none can be by nature.

    Nothing joins a row whose asked columns are all NULL, and a key with NULL for a given parameter is no key.
    """

    def question(row: Sequence[bytes | None]) -> bytes:
        joins_nothing = bool(asked) and all(row[place] is None for place in asked)
        expects = not joins_nothing and all(row[place] is not None for place in given)
        return Question(join_arguments([row[place] for place in (*asked, *given)]), expects).pack()

    return question


def _old_modes(rule: Rule, firing: _Firing) -> Iterable[str]:
    if "update" in rule.on:
        yield firing.old_of_update
    if "delete" in rule.on:
        yield firing.old_of_delete


def out_of_place(what: str) -> errors.MalformedMessage:
    """Return the error for a message that the protocol does not allow at its place."""
    return errors.MalformedMessage(
        f"The replication stream holds {what} where none can stand; report it with the server's version."
    )
