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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.pipeline import scan
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import UNCHANGED, Row
from cdc_invalidator.rules.condition import Condition, Holds
from cdc_invalidator.rules.condition import missing as condition_misses
from cdc_invalidator.rules.format import Table
from cdc_invalidator.rules.model import Bust, Cache, Pair, Query, Rule, RuleSet
from cdc_invalidator.rules.template import Template
from cdc_invalidator.rules.values import join_arguments

# Keys of a bust event.
KEYS_A_LINE = 1000

Counts = defaultdict[tuple[str, str], int]
KeyOf = Callable[[Sequence[bytes | None]], bytes | None]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One cache that one rule busts: what a bust event is about. Compared by identity."""

    rule: str
    cache: Cache
    table: str
    # What the rule says of it; None for what no rule asks for: a manual bust, a gap.
    bust: Bust | None = None
    # The least ms between two busts of a key; 0 for none.
    debounce: int = 0
    # What a change gives: a key to delete, or a version's; with `bump_over` both, and with a query its arguments.
    template: Template = field(init=False)
    query: Query | None = field(init=False)
    pairs: bool = field(init=False)
    # The only key of a cache without parameters, which needs no search.
    one: bytes | None = field(init=False)
    # Whether keys are deleted, or versions bumped, which with `bump_over` depends.
    action: str = field(init=False)
    # What every event about it says, by what is done.
    shown: dict[str, dict[str, str | None]] = field(init=False)

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        swept = self.cache.target
        set_once(self, "template", self.bust.template if self.bust else self.cache.busted)
        set_once(self, "query", self.bust.query if self.bust else None)
        set_once(self, "pairs", self.cache.bump_over is not None)
        set_once(self, "one", None if swept.params else swept.prefix)
        set_once(self, "action", "delete" if self.cache.version is None or self.pairs else "bump")
        shown: dict[str, dict[str, str | None]] = {
            action: {
                "rule": self.rule or None,
                "cache": self.cache.name,
                "action": action,
                "table": self.table or None,
                "key_prefix": template.prefix.decode(errors="replace"),
            }
            for action, template in (("delete", self.cache.key), ("bump", self.cache.target))
        }
        set_once(self, "shown", shown)


@dataclass(slots=True)
class Busts:
    """What one transaction does to one target: keys in order, or the whole cache (``sweep``).

    ``keys``: what the target's template gives. ``bumps``: versions' keys, of a cache with ``bump_over``. ``derived``:
    what the rows of the target's query gave when it was asked last.
    """

    keys: dict[bytes, None] = field(default_factory=dict)
    bumps: dict[bytes, None] = field(default_factory=dict)
    derived: dict[bytes, None] = field(default_factory=dict)
    ops: dict[str, None] = field(default_factory=dict)
    sweep: bool = False
    reason: str = "change"

    def derive(self, target: Target, keys: Iterable[bytes]) -> None:
        """Take the keys that the target's query gave; past `bump_over` of them, the versions that they are under."""
        self.derived.update(dict.fromkeys(keys))
        limit = target.cache.bump_over
        if limit is not None and len(self.derived) > limit:
            self.bumps.update({Pair.split(key).version: None for key in self.derived})
            self.derived.clear()


class Line(NamedTuple):
    """One bust event to be: up to KEYS_A_LINE keys of one target in one transaction.

    ``action``: delete or bump; ``op``: the kinds of change; the rest as in `Batch`.
    """

    target: Target
    action: str
    op: str
    keys: list[bytes]
    reason: str
    commit_lsn: int
    committed_at: int | None
    xid: int


@dataclass(slots=True)
class Batch:
    """The busts of one transaction, or of a stretch of a large one.

    ``commit_lsn`` and ``committed_at`` (µs since 2000) are of its commit record. ``end_lsn`` is set on the last batch
    of a transaction only: with it, the transaction is done.
    """

    commit_lsn: int
    committed_at: int | None
    xid: int
    end_lsn: int | None = None
    busts: dict[Target, Busts] = field(default_factory=dict)
    weight: int = 0

    def of(self, target: Target) -> Busts:
        """Give what the batch does to this target, made at first use."""
        busts = self.busts.get(target)
        if busts is None:
            busts = self.busts[target] = Busts()
        return busts

    def add(self, target: Target, ops: Iterable[str], key: bytes, reason: str) -> None:
        """Bust one key, unless the whole cache goes anyway."""
        busts = self.of(target)
        if not busts.sweep:
            # The first reason stays: a TRUNCATE is not made a change by what follows it.
            busts.reason = reason
        busts.ops.update(dict.fromkeys(ops))
        if not busts.sweep and key not in busts.keys:
            busts.keys[key] = None
            self.weight += 1

    def sweep(self, target: Target, ops: Iterable[str], reason: str) -> None:
        """Bust all keys of the target; a cache without parameters has just one, which needs no search."""
        if target.one is not None and not target.pairs and target.query is None:
            self.add(target, ops, target.one, reason)
            return
        busts = self.of(target)
        if not busts.sweep:
            # The first reason stays: a TRUNCATE is not made a change by what follows it.
            busts.reason = reason
        busts.ops.update(dict.fromkeys(ops))
        if target.one is not None and target.pairs:
            # All keys are under one version.
            self.bump(target, {target.one})
        elif not busts.sweep:
            busts.sweep = True
            self.weight += 1

    def bump(self, target: Target, versions: Iterable[bytes]) -> None:
        """Trade the single keys of a target with ``bump_over`` for bumps of versions."""
        busts = self.of(target)
        self.weight -= len(busts.keys) + len(busts.bumps)
        busts.keys.clear()
        busts.bumps.update(dict.fromkeys(versions))
        self.weight += len(busts.bumps)

    def add_all(self, target: Target, ops: Iterable[str], keys: Iterable[bytes], reason: str) -> None:
        """Bust many keys, as `add` does one."""
        busts = self.of(target)
        busts.ops.update(dict.fromkeys(ops))
        if not busts.sweep:
            busts.reason = reason
            before = len(busts.keys)
            busts.keys.update(dict.fromkeys(keys))
            self.weight += len(busts.keys) - before

    def widen(self, target: Target) -> None:
        """Trade keys for a sweep of their cache."""
        busts = self.busts[target]
        self.weight -= len(busts.keys) + len(busts.bumps)
        busts.keys.clear()
        busts.bumps.clear()
        self.sweep(target, busts.ops, busts.reason)

    @property
    def first_lsn(self) -> int:
        """The same as ``commit_lsn``: see `Run`."""
        return self.commit_lsn

    @property
    def targets(self) -> Iterable[Target]:
        """What is busted."""
        return self.busts

    @property
    def xids(self) -> Sequence[int]:
        """The transaction, if there is one."""
        return (self.xid,) if self.xid else ()

    def lines(self) -> Iterable[Line]:
        """Give the events of the batch, without those of its sweeps."""
        for target, busts in self.busts.items():
            op = ",".join(busts.ops)
            named = busts.keys if target.query is None else busts.derived
            for action, keys in ((target.action, list(named)), ("bump", list(busts.bumps))):
                for start in range(0, len(keys), KEYS_A_LINE):
                    some = keys[start : start + KEYS_A_LINE]
                    yield Line(target, action, op, some, busts.reason, self.commit_lsn, self.committed_at, self.xid)


class Run:
    """The busts of many small transactions in a row; all of them plain keys.

    Args:
        lines: their events, at least one; a transaction's stand together.
        xids: the transactions.
        end_lsn: with that, the last of them is done.
    """

    __slots__ = ("_lines", "end_lsn", "weight", "xids")

    # No sweep, no query, nothing that is held or done twice.
    busts: ClassVar[Mapping[Target, Busts]] = {}

    def __init__(self, lines: list[Line], xids: Sequence[int], end_lsn: int) -> None:
        self._lines = lines
        self.xids = xids
        self.end_lsn = end_lsn
        # A line takes as much memory as two keys.
        self.weight = sum(len(line.keys) for line in lines) + 2 * len(lines)

    @property
    def first_lsn(self) -> int:
        """LSN of the first commit record."""
        return self._lines[0].commit_lsn

    @property
    def commit_lsn(self) -> int:
        """LSN of the last commit record."""
        return self._lines[-1].commit_lsn

    @property
    def targets(self) -> Iterable[Target]:
        """What is busted."""
        return {line.target for line in self._lines}

    def lines(self) -> Iterable[Line]:
        """Give the events."""
        return self._lines

    def batches(self) -> list[Batch]:
        """Give the same, a batch a transaction: for what has to be done with each by itself."""
        batches: list[Batch] = []
        for line in self._lines:
            if not batches or batches[-1].commit_lsn != line.commit_lsn:
                batches.append(Batch(line.commit_lsn, line.committed_at, line.xid))
            batches[-1].add_all(line.target, line.op.split(","), line.keys, line.reason)
        return batches


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something about a relation that keeps a rule from naming its keys; its caches are swept instead."""

    rule: str
    sentence: str


@dataclass(slots=True)
class _Firing:
    """One target of a rule, compiled for one relation."""

    target: Target
    key_of: KeyOf
    columns: tuple[int, ...]
    # The key in literals and columns, where it is no more than that.
    plain: tuple[Sequence[bytes], Sequence[int]] | None
    # What is known of an old row: "given" (the identity carries all key columns), "kept" (those that it does not
    # carry never change), or the rule's answer to not knowing: "sweep" or "ignore".
    old_of_update: str
    old_of_delete: str


@dataclass(slots=True)
class _RulePlan:
    """One rule, compiled for one relation.

    ``watched``: columns of which an UPDATE must change one; empty, any. ``holds``: its condition, if it has one that
    can be asked.
    """

    firings: list[_Firing]
    watched: tuple[int, ...]
    on: frozenset[str]
    broken: bool = False
    holds: Holds | None = None


class Plan:
    """All rules of one relation, compiled.

    Args:
        in_identity: for each column, whether an old key tuple carries it.
        rules: by kind of change.
        name: what rules know the relation by.
        counts: is counted up, by table and kind of change.
    """

    __slots__ = ("_counts", "_in_identity", "_name", "_rules", "_watches", "table")

    def __init__(
        self, in_identity: tuple[bool, ...], rules: dict[str, list[_RulePlan]], name: str, counts: Counts
    ) -> None:
        self._in_identity = in_identity
        self._rules = rules
        self._watches = any(rule.watched or rule.holds for rule in rules["update"])
        self._name = name
        self._counts = counts
        inserts, updates, deletes = (_plain(op, rules[op]) for op in ("insert", "update", "delete"))
        # For `scan`: the same as here, where it is plain.
        self.table = scan.table(name, in_identity, inserts, updates, deletes, counts)

    def insert(self, batch: Batch, message: pgoutput.Insert) -> None:
        """Put what a new row makes stale into the batch."""
        new = message.new
        self._check_width(new)
        self._counts[self._name, "insert"] += 1
        for rule in self._rules["insert"]:
            if rule.holds and not rule.holds("insert", None, new):
                continue
            for firing in rule.firings:
                _bust(batch, firing, "insert", new)

    def update(self, batch: Batch, message: pgoutput.Update) -> None:
        """Put what a changed row makes stale, as it was and as it is, into the batch."""
        new, old = message.new, message.old
        self._check_width(new)
        if old is not None:
            self._check_width(old)
        self._counts[self._name, "update"] += 1
        known: Row = []
        if self._watches or UNCHANGED in new:
            known = self._known_old(message)
            new = _filled(new, known)
        for rule in self._rules["update"]:
            if rule.watched and not rule.broken and not _fires(rule, known, message.new):
                continue
            if rule.holds and not rule.holds("update", known, new):
                continue
            for firing in rule.firings:
                _bust(batch, firing, "update", new)
                if firing.old_of_update == "given":
                    if old is not None:
                        _bust(batch, firing, "update", old)
                elif firing.old_of_update == "kept":
                    if old is not None:
                        _bust(batch, firing, "update", self._kept(old, new))
                elif firing.old_of_update == "sweep":
                    batch.sweep(firing.target, ("update",), "change")

    def delete(self, batch: Batch, message: pgoutput.Delete) -> None:
        """Put what a deleted row makes stale into the batch."""
        self._check_width(message.old)
        self._counts[self._name, "delete"] += 1
        for rule in self._rules["delete"]:
            if rule.holds and not rule.holds("delete", self._carried(message.old), None):
                continue
            for firing in rule.firings:
                if firing.old_of_delete == "given":
                    _bust(batch, firing, "delete", message.old)
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

    def _check_width(self, row: Row) -> None:
        if len(row) != len(self._in_identity):
            raise out_of_place("a row of another width than its Relation's")

    def _known_old(self, message: pgoutput.Update) -> Row:
        """Give the old row as far as it is known: UNCHANGED stands for what is not."""
        if message.old_kind == "O":
            assert message.old is not None
            return message.old
        # Without an old tuple the identity's columns are as they were; with a key tuple they are in it.
        return self._carried(message.new if message.old is None else message.old)

    def _carried(self, row: Row) -> Row:
        """Give a row without the values that the identity does not carry: UNCHANGED stands for them."""
        return [value if carried else UNCHANGED for value, carried in zip(row, self._in_identity, strict=False)]

    def _kept(self, old: Row, new: Row) -> Row:
        """Give the old row where all that the identity does not carry is declared immutable."""
        return [
            before if carried else after for before, after, carried in zip(old, new, self._in_identity, strict=False)
        ]


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
        """Read a bust that somebody wrote by hand, with pg_logical_emit_message.

        Args:
            content: JSON, ``{"cache": "user", "params": {"id": 42}}``; without ``params``, the whole cache is meant.

        Returns:
            The target, and its key; ``None`` for all keys.

        Raises:
            errors.WrongMessage: it can't be read, or no cache of the rules fits it.
        """
        try:
            order = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise errors.WrongMessage('A manual bust is not JSON; write {"cache": "user", "params": {…}}.') from error
        if not isinstance(order, dict) or not isinstance(order.get("cache"), str) or order.keys() - {"cache", "params"}:
            raise errors.WrongMessage("A manual bust must be an object with `cache`, and `params` if not all is meant.")
        target = self._manual.get(order["cache"])
        if target is None:
            raise errors.WrongMessage(f"A manual bust names cache {order['cache']!r}, which the rules do not have.")
        if "params" not in order:
            return target, None
        return target, _manual_key(target, order["params"])

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
        watched = tuple(index[name] for name in rule.columns if name in index)
        holds = None
        if condition is not None and not missing:
            columns = relation.columns
            holds = condition.bind([column.name for column in columns], [column.type_oid for column in columns])
        return _RulePlan(firings, watched, rule.on, bool(missing), holds), complaints

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


def _plain(op: str, rules: Iterable[_RulePlan]) -> scan.Rules:
    """Give the rules for one kind of change as `scan` takes them; ``None`` where one of them asks for more."""
    found = []
    for rule in rules:
        if rule.broken or rule.holds:
            return None
        firings: list[scan.Firing] = []
        for firing in rule.firings:
            target = firing.target
            old = {"update": firing.old_of_update, "delete": firing.old_of_delete}.get(op)
            later = target.pairs or target.debounce or target.cache.again_after
            if firing.plain is None or later or old == "sweep":
                return None
            firings.append((target, *firing.plain, old or "ignore"))
        found.append((rule.watched, firings))
    return found


def _arguments_of(places: Sequence[int]) -> KeyOf:
    return lambda row: join_arguments([row[place] for place in places])


def _no_key(_row: Sequence[bytes | None]) -> bytes | None:
    raise AssertionError("a firing without its columns gives no key")


def _old_modes(rule: Rule, firing: _Firing) -> Iterable[str]:
    if "update" in rule.on:
        yield firing.old_of_update
    if "delete" in rule.on:
        yield firing.old_of_delete


def _bust(batch: Batch, firing: _Firing, op: str, row: Row) -> None:
    if firing.key_of is _no_key:
        batch.sweep(firing.target, (op,), "change")
        return
    for column in firing.columns:
        if row[column] is UNCHANGED:
            batch.sweep(firing.target, (op,), "change")
            return
    key = firing.key_of(row)  # type: ignore[arg-type]  # no UNCHANGED among the columns that it reads
    if key is not None:
        # As Batch.add does, without its call: this runs for each key.
        busts = batch.busts.get(firing.target) or batch.of(firing.target)
        busts.ops[op] = None
        if not busts.sweep and key not in busts.keys:
            busts.keys[key] = None
            batch.weight += 1


def _filled(new: Row, old: Row) -> Row:
    """Give the new row with its unchanged TOAST values taken from the old one, where that has them."""
    return [before if after is UNCHANGED else after for after, before in zip(new, old, strict=False)]


def _fires(rule: _RulePlan, old: Row, new: Row) -> bool:
    """Tell whether a watched column, or one that a key is built from, may have changed."""
    for column in rule.watched:
        if new[column] is not UNCHANGED and old[column] != new[column]:
            return True
    # The entry under the former key is stale even where none of the watched columns changed.
    return any(
        new[column] is not UNCHANGED
        and old[column] != new[column]
        and (old[column] is not UNCHANGED or firing.old_of_update in {"sweep", "ignore"})
        for firing in rule.firings
        for column in firing.columns
    )


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


def out_of_place(what: str) -> errors.MalformedMessage:
    """Give the error for a message that the protocol does not allow where it stands."""
    return errors.MalformedMessage(
        f"The replication stream holds {what} where none can stand; report it with the server's version."
    )
