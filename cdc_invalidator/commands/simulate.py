"""What one change busts, rule by rule, and why the others bust nothing. Pure.

The rule that holds here: nothing is matched here. A change becomes messages of the stream, which go the daemon's own
way (`invalidation`, `assembly`). Whether a rule fires is seen at a probe, one more cache that it busts; what keeps it
from firing is seen by asking once more without that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from cdc_invalidator.pipeline.assembly import Assembly
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.plan import Complaint
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import asked_columns, condition_of
from cdc_invalidator.rules.model import Bust, Cache, Rule, RuleSet
from cdc_invalidator.rules.packed import Pair, Question, split_arguments
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Template
from cdc_invalidator.rules.values import ROWS_OF
from cdc_invalidator.rules.values import Row as StreamRow

Row = Mapping[str, str | None]
Answers = Mapping[str, Sequence[Row]]
Kind = Literal["delete", "bump", "sweep", "search"]

_OID = 1
_TEXT_OID = 25
_BEGIN = pgoutput.Begin(lsn=1, committed_at=0, xid=1)
_COMMIT = pgoutput.Commit(lsn=1, end_lsn=2, committed_at=0)
_PROBE = Cache("", Template.of([b"probe"]), None, version_ttl=1, ttl=None, jitter=0, ttl_only=False, digest="")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one row, or of a table (truncate).

    ``old``, ``new``: values as PostgreSQL shows them, or NULL. ``types``: pg_type OIDs; text where none is given.
    """

    table: Table
    op: str
    old: Row | None = None
    new: Row | None = None
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """A table as the database has it: its Relation message, and the tables of rules that it is or is a partition of.

    ``types``: of its columns.
    """

    relation: pgoutput.Relation
    tables: tuple[Table, ...]
    types: Mapping[str, ColumnType] = field(default_factory=dict)


class Busted(NamedTuple):
    """One bust; ``key`` is empty for a sweep, and the prefix for a search.

    The key of a cache with ``bump_over`` lies under the version of the moment: ``{version}`` stands for that.
    """

    kind: Kind
    cache: str
    key: str

    def __str__(self) -> str:
        return {
            "delete": self.key,
            "bump": f"bump {self.key}",
            "sweep": f"sweep {self.cache}",
            "search": f"{self.key}*",
        }[self.kind]


class Unanswered(NamedTuple):
    """A cache whose busts are not known: its query's answer is not given, or ``lacks`` parameters."""

    cache: str
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule makes of the change.

    ``why_not``: what keeps it from firing. ``notes``: why it gives a sweep, or no key.
    """

    rule: Rule
    fired: bool
    why_not: tuple[str, ...]
    busts: tuple[Busted, ...]
    notes: tuple[str, ...]
    unanswered: tuple[Unanswered, ...]


@dataclass(slots=True)
class Played:
    """One rule with the change gone through it: batches whose queries can be answered, by `answer` or by `derive`."""

    rule: Rule
    fired: bool
    why_not: tuple[str, ...]
    batches: list[Batch]
    notes: tuple[str, ...]
    unanswered: list[Unanswered] = field(default_factory=list)

    def answer(self, answers: Answers) -> None:
        """Return the rows of the rule's queries, by cache."""
        for batch, target in self._asked():
            rows = answers.get(target.cache.name)
            if rows is None:
                self.unanswered.append(Unanswered(target.cache.name))
            else:
                self._derive(batch, target, rows)

    def verdict(self) -> Verdict:
        """Return what it has come to."""
        found = {bust: None for batch in self.batches for bust in _busts(batch)}
        notes = dict.fromkeys([*self.notes, *(note for batch in self.batches for note in _of_unanswered(batch))])
        return Verdict(
            self.rule, self.fired, self.why_not, tuple(found), tuple(notes), tuple(dict.fromkeys(self.unanswered))
        )

    def _asked(self) -> Iterator[tuple[Batch, Target]]:
        for batch in self.batches:
            for target, busts in batch.busts.items():
                if target.query is not None and busts.keys and not busts.sweep:
                    yield batch, target

    def _derive(self, batch: Batch, target: Target, rows: Sequence[Row]) -> None:
        """Do with the rows what `derive` does with the database's."""
        busts = batch.busts[target]
        assert target.query is not None
        assert target.bust is not None
        given, wanted = target.bust.given, target.cache.bust_template.params
        keys: list[bytes] = []
        for question in map(Question.split, busts.keys):
            values = split_arguments(question.arguments)[len(target.query.columns) :]
            mapped = dict(zip(given, values, strict=False))
            before = len(keys), len(self.unanswered)
            for row in rows:
                known = {**row, **mapped}
                lacking = tuple(parameter for parameter in wanted if parameter not in known)
                if lacking:
                    self.unanswered.append(Unanswered(target.cache.name, lacking))
                    continue
                key = target.cache.bust_template.render({parameter: known[parameter] for parameter in wanted})
                if key is not None:
                    keys.append(key)
            if question.expects and before == (len(keys), len(self.unanswered)):
                batch.leave_unanswered(target, question)
        busts.derive(target, keys)


def simulate(rules: RuleSet, change: Change, answers: Answers, shape: Shape | None = None) -> list[Verdict]:
    """Return what each rule of the table makes of a change.

    Args:
        rules: the rule set.
        change: the change; without a ``shape``, the columns of its old row are those that the replica identity carries.
        answers: by cache, the rows of its query.
        shape: the table as the database has it.
    """
    played = play(rules, change, shape)
    for each in played:
        each.answer(answers)
    return [each.verdict() for each in played]


def play(rules: RuleSet, change: Change, shape: Shape | None = None) -> list[Played]:
    """Let a change go through each rule of the table; the queries of the rules stay unanswered."""
    tables = shape.tables if shape else (change.table,)
    named = [rule for table in tables for rule in rules.rules if rule.table == table]
    table = shape or _made_up(change, named)
    return [_play(rule, change, table, live=shape is not None) for rule in named]


def _play(rule: Rule, change: Change, table: Shape, *, live: bool) -> Played:
    fired, batches, complaints = _ask(rule, change, table)
    why_not = () if fired else tuple(_why_not(rule, change, table))
    notes = list(_notes(rule, change, table, batches)) if fired else []
    # Of a made-up table there is nothing to put right.
    notes += [complaint.sentence for complaint in complaints] if live else []
    return Played(rule, fired, why_not, batches, tuple(dict.fromkeys(notes)))


def _ask(rule: Rule, change: Change, table: Shape) -> tuple[bool, list[Batch], list[Complaint]]:
    """Send the change down the data path for one rule: whether it fires, its busts, what is wrong with the table."""
    probed = replace(rule, busts=(*rule.busts, Bust(_PROBE, _PROBE.key, {})))
    invalidation = Invalidation(RuleSet({}, (probed,), ""))
    relation = table.relation
    plan, complaints = invalidation.compile(relation, [rule.table], table.types)
    assembly = Assembly()
    assembly.relation(relation, plan)
    messages = (_BEGIN, _message(change, relation), _COMMIT)
    batches = [batch for message in messages for batch in assembly.feed(message)]
    probes = [(batch, target) for batch in batches for target in batch.busts if target.cache is _PROBE]
    for batch, target in probes:
        del batch.busts[target]
    return bool(probes), batches, complaints


# ── From rows to messages ────────────────────────────────────────────────────────────────────────────────────────────


def _made_up(change: Change, rules: Iterable[Rule]) -> Shape:
    """Make up a table: the columns of the rows and of the rules, its replica identity those of the old row."""
    old, new = change.old or {}, change.new or {}
    names = dict.fromkeys([*old, *new, *(name for rule in rules for name in sorted(_columns(rule)))])
    columns = tuple(pgoutput.Column(name, name in old, change.types.get(name, _TEXT_OID), -1) for name in names)
    identity = "f" if all(column.is_key for column in columns) else "i" if old else "n"
    relation = pgoutput.Relation(None, _OID, change.table.schema, change.table.name, identity, columns)
    types = {column.name: ColumnType.built_in(column.type_oid, by_code_point=True) for column in columns}
    return Shape(relation, (change.table,), types)


def _columns(rule: Rule) -> set[str]:
    """All columns that the rule reads."""
    asked = (condition_of(each.source, each.field).columns for each in rule.conditions)
    return {*rule.key_columns, *rule.columns}.union(*asked)


def _message(change: Change, relation: pgoutput.Relation) -> pgoutput.Change:
    """Return the change as the server sends it."""
    carried = [column.name for column in relation.columns if column.is_key]
    if change.op == "insert":
        return pgoutput.Insert(None, relation.oid, _row(change.new, relation))
    if change.op == "truncate":
        return pgoutput.Truncate(None, (relation.oid,), cascade=False, restart_identity=False)
    full = relation.identity == "f"
    old = _row(change.old, relation, None if full else carried)
    if change.op == "delete":
        return pgoutput.Delete(None, relation.oid, "O" if full else "K", old)
    new = _row(change.new, relation)
    if full:
        return pgoutput.Update(None, relation.oid, "O", old, new)
    # Without a full identity, an old row comes only when the identity has changed, and holds nothing else.
    before, after = change.old, change.new or {}
    moved = before is not None and any(before.get(name) != after.get(name) for name in carried)
    return pgoutput.Update(None, relation.oid, "K" if moved else "", old if moved else None, new)


def _row(values: Row | None, relation: pgoutput.Relation, only: Iterable[str] | None = None) -> StreamRow:
    values = values or {}
    kept = values.keys() if only is None else set(only)
    texts = [values.get(column.name) if column.name in kept else None for column in relation.columns]
    return [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]


# ── From batches to busts ────────────────────────────────────────────────────────────────────────────────────────────


def _busts(batch: Batch) -> Iterator[Busted]:
    for target, busts in batch.busts.items():
        cache = target.cache
        if busts.sweep:
            yield Busted("sweep", cache.name, "")
            continue
        for version in busts.bumps:
            yield Busted("bump", cache.name, _shown(version))
        for prefix in busts.prefixes(target):
            yield Busted("search", cache.name, _shown(prefix))
        for key in () if target.rest else busts.named(target):
            yield key_bust(cache, key)


def key_bust(cache: Cache, busted: bytes) -> Busted:
    """Return the bust of what `Cache.bust_template` gives for a row."""
    if cache.bump_over is not None and cache.version is not None:
        return Busted("delete", cache.name, _shown(Pair.split(busted).key(b"{version}")))
    return Busted("delete" if cache.version is None else "bump", cache.name, _shown(busted))


def _shown(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


# ── Reasons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_unanswered(batch: Batch) -> Iterator[str]:
    for target, busts in batch.busts.items():
        if busts.unanswered:
            done = "swept" if busts.sweep else "searched for what is known of the key"
            yield (
                f"the query gives no key for the old row, so cache {target.cache.name} is {done}; `on_empty: ignore` "
                "beside `via` says that nothing is stale then"
            )


def _why_not(rule: Rule, change: Change, table: Shape) -> Iterator[str]:
    """Tell what keeps a rule from firing: that without which it fires, or both where neither alone is it."""
    if change.op not in rule.on:
        yield f"its `on` has no {change.op}"
        return
    without = {
        "columns": bool(rule.columns) and _ask(replace(rule, columns=()), change, table)[0],
        "when": rule.when is not None and _ask(replace(rule, when=None), change, table)[0],
        "where": rule.where is not None and _ask(replace(rule, where=None), change, table)[0],
    }
    no_single = not any(without.values())
    if rule.columns and (without["columns"] or no_single):
        yield f"the update changes none of its columns ({', '.join(rule.columns)})"
    if rule.when is not None and (without["when"] or no_single):
        yield f"its `when` is false: {rule.when}"
    if rule.where is not None and (without["where"] or no_single):
        yield f"its `where` is false for each image of the row: {rule.where}"


def _notes(rule: Rule, change: Change, table: Shape, batches: Iterable[Batch]) -> Iterator[str]:
    """Tell why a rule that fires gives a sweep, or fewer keys than one may expect."""
    swept = {
        target.bust.cache.name
        for batch in batches
        for target, busts in batch.busts.items()
        if target.bust is not None and busts.sweep
    }
    carried = {column.name for column in table.relation.columns if column.is_key}
    there = {column.name for column in table.relation.columns}
    if change.op == "truncate":
        yield "a truncate empties the table, so whole caches go"
        return
    if rule.when is not None and _ask(replace(rule, when=f"!({rule.when})"), change, table)[0]:
        yield f"its `when` fails, or reads what is not known, and so counts as true: {rule.when}"
    watched = {*rule.columns, *(asked_columns(rule) - rule.immutable)} if rule.columns else set()
    if change.op == "update" and (unsaid := sorted(watched & there - carried)):
        yield f"the old row does not tell {', '.join(unsaid)}, so any update counts as a change of it"
    for bust in rule.busts:
        counts = {image: _counts(rule, bust, image, change, table) for image in sorted(ROWS_OF[change.op])}
        for image, counted in counts.items():
            what = f"the `where` of cache {bust.cache.name}"
            if counted is False:
                yield f"the {image} row gives no key, because {what} is false for it: {rule.where_of(bust)}"
            elif counted is None:
                yield (
                    f"{what} fails for the {image} row, or reads what is not known, and so counts as true: "
                    f"{rule.where_of(bust)}"
                )
        name, columns = bust.cache.name, set(bust.columns.values())
        unknown = columns & there - carried if change.op in {"update", "delete"} else set()
        if change.op == "update":
            unknown -= rule.immutable
        if counts.get("old") is False:
            pass
        elif unknown and name in swept:
            yield f"the old row does not tell {', '.join(sorted(unknown))}, so cache {name} is swept"
        elif unknown:
            yield f"the old row does not tell {', '.join(sorted(unknown))}; `old_row: {rule.old_row}` lets its key be"
        for image, row, of in (("old", change.old, columns & carried), ("new", change.new, columns & there)):
            nulls = [] if row is None else sorted(column for column in of if row.get(column) is None)
            if nulls and counts.get(image, False) is not False:
                yield f"the {image} row gives no key of cache {name}, because {', '.join(nulls)} is NULL"


def _counts(rule: Rule, bust: Bust, image: str, change: Change, table: Shape) -> bool | None:
    """Return whether an image of the row satisfies the `where` of a bust; ``None`` where that can't be told."""
    where = rule.where_of(bust)
    if where is None:
        return True
    row = change.new or {}
    if image == "old":
        carried = {column.name for column in table.relation.columns if column.is_key}
        kept = rule.immutable if change.op == "update" else frozenset()
        read = condition_of(where, "where").reads["row"]
        if (read.whole or not read.columns <= carried | kept) and table.relation.identity != "f":
            return None
        row = {name: row.get(name) for name in kept} | {name: (change.old or {}).get(name) for name in carried}

    def holds(where: str) -> bool:
        alone = replace(rule, on=frozenset({"insert"}), columns=(), when=None, where=where, busts=())
        return _ask(alone, Change(change.table, "insert", None, row, change.types), table)[0]

    satisfied = holds(where)
    return None if satisfied and holds(f"!({where})") else satisfied
