"""What a transaction busts: keys of targets, never rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar, NamedTuple, Protocol

from cdc_invalidator.rules.model import Bust, Cache, Query
from cdc_invalidator.rules.packed import Pair, Question, split_arguments
from cdc_invalidator.rules.template import Param, Template

# Keys of a bust event.
KEYS_AN_EVENT = 1000
# Why a cache is swept whose query knew no key for an old row.
UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One cache that one rule busts: what a bust event is about. Compared by identity."""

    rule: str
    cache: Cache
    table: str
    # The rule's bust; None where no rule asks for it: a manual bust, a gap.
    bust: Bust | None = None
    # The least ms between two busts of a key; 0 for none.
    debounce: int = 0
    # What a row gives: a key to delete or a version's key; with `bump_over` both, packed; with a query its arguments.
    template: Template = field(init=False)
    query: Query | None = field(init=False)
    pairs: bool = field(init=False)
    # What is named is the prefix of the keys, which are searched for.
    rest: bool = field(init=False)
    # The only key of a cache without parameters, which needs no search.
    one: bytes | None = field(init=False)
    # Delete or bump; with `bump_over`, what is done to single keys.
    action: str = field(init=False)
    # The fields that all its events share, by action.
    shown: dict[str, dict[str, str | None]] = field(init=False)

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        swept = self.cache.sweep_template
        set_once(self, "template", self.bust.template if self.bust else self.cache.bust_template)
        set_once(self, "query", self.bust.query if self.bust else None)
        set_once(self, "pairs", self.cache.bump_over is not None)
        set_once(self, "rest", swept.rest)
        set_once(self, "one", None if swept.params or swept.rest else swept.prefix)
        set_once(self, "action", "delete" if self.cache.version is None or self.pairs else "bump")
        shown: dict[str, dict[str, str | None]] = {
            action: {
                "rule": self.rule or None,
                "cache": self.cache.name,
                "action": action,
                "table": self.table or None,
                "key_prefix": template.prefix.decode(errors="replace"),
            }
            for action, template in (("delete", self.cache.key), ("bump", self.cache.sweep_template))
        }
        set_once(self, "shown", shown)


class Lasting(Protocol):
    """A sweep or a search of a cache, as far as a batch knows it."""

    @property
    def over(self) -> bool:
        """Whether nothing goes on any more."""


@dataclass(slots=True)
class TargetBusts:
    """What one transaction does to one target: keys in order, or the whole cache (``sweep``).

    ``keys``: what the target's template gives. ``bumps``: versions' keys, of a cache with ``bump_over``. ``derived``:
    what the rows of the target's query gave when it was asked last. ``searches``: prefixes, under which all keys (or
    versions) of the cache are busted. ``unanswered``: the query knew no key for an old row, so it is swept or searched.
    ``asked``: of the sweep or search that was begun last for it, whether it goes on. ``answered``: what the query gives
    came late and is there, so that the next bust need not ask.
    """

    keys: dict[bytes, None] = field(default_factory=dict)
    bumps: dict[bytes, None] = field(default_factory=dict)
    derived: dict[bytes, None] = field(default_factory=dict)
    searches: dict[bytes, None] = field(default_factory=dict)
    ops: dict[str, None] = field(default_factory=dict)
    sweep: bool = False
    reason: str = "change"
    unanswered: bool = False
    asked: Lasting | None = None
    answered: bool = False

    @property
    def reason_beyond_keys(self) -> str:
        """Why the cache is swept or searched, if it is."""
        return UNANSWERED if self.unanswered else self.reason

    def named(self, target: Target) -> dict[bytes, None]:
        """Return what the target's rule names: the keys, or what its query gave."""
        return self.keys if target.query is None else self.derived

    def prefixes(self, target: Target) -> dict[bytes, None]:
        """Return the prefixes to search for; none where the whole cache is swept."""
        if self.sweep:
            return {}
        return self.searches | self.named(target) if target.rest else self.searches

    def derive(self, target: Target, keys: Iterable[bytes]) -> None:
        """Take the keys that the target's query gave; past `bump_over` of them, the versions that they are under."""
        self.derived.update(dict.fromkeys(keys))
        limit = target.cache.bump_over
        if limit is not None and len(self.derived) > limit:
            self.bumps.update({Pair.split(key).version: None for key in self.derived})
            self.derived.clear()


class BustEvent(NamedTuple):
    """One bust event to be: up to KEYS_AN_EVENT keys of one target in one transaction.

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
    of a transaction only: with it, the transaction is done. ``whole``: the batch that this one is a part of; the two
    share what they bust. ``counted``: what `Recent` has counted for it; 0 when it is not remembered. ``bust``: which
    one it is when it comes to be busted: first, or why it is done again.
    """

    commit_lsn: int
    committed_at: int | None
    xid: int
    end_lsn: int | None = None
    busts: dict[Target, TargetBusts] = field(default_factory=dict)
    weight: int = 0
    whole: Batch | None = None
    counted: int = 0
    bust: str = "first"

    def of(self, target: Target) -> TargetBusts:
        """Return what the batch does to this target; it is made at first use."""
        busts = self.busts.get(target)
        if busts is None:
            busts = self.busts[target] = TargetBusts()
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

    def search(self, target: Target, ops: Iterable[str], prefix: bytes, reason: str) -> None:
        """Bust all keys of the target's cache under a prefix, or its versions if it has one.

        Args:
            target: any, whether its template ends in ``*`` or not.
            ops: the kinds of change.
            prefix: what all these keys begin with; at least the literal text that the cache's keys begin with.
            reason: as of `add`.
        """
        if target.one is not None:
            self.sweep(target, ops, reason)
            return
        busts = self.of(target)
        if not busts.sweep:
            busts.reason = reason
        busts.ops.update(dict.fromkeys(ops))
        if not busts.sweep and prefix not in busts.searches:
            busts.searches[prefix] = None
            self.grow(1)

    def leave_unanswered(self, target: Target, question: Question) -> None:
        """Bust all that an old row of which the target's query knows no key may have been in.

        That is what begins with the parameters that the rule gives beside the query, or else the whole cache.
        """
        busts = self.of(target)
        busts.unanswered = True
        prefix = _known_prefix(target, question)
        if prefix is None:
            busts.sweep = True
        elif not busts.sweep and prefix not in busts.searches:
            busts.searches[prefix] = None
            self.grow(1)

    def leave_all_unanswered(self, target: Target) -> None:
        """Bust all that the target's query might have named, because it was not answered."""
        for question in map(Question.split, list(self.busts[target].keys)):
            self.leave_unanswered(target, question)

    def split(self, target: Target, bust: str) -> Batch:
        """Take what one target busts out of the batch; return it as a batch of its own."""
        part = Batch(self.commit_lsn, self.committed_at, self.xid, whole=self.whole, bust=bust)
        busts = part.busts[target] = self.busts.pop(target)
        part.weight = len(busts.keys) + len(busts.bumps)
        self.weight -= part.weight
        return part

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

    def grow(self, keys: int) -> None:
        """Count keys that a query has given, or prefixes to search for."""
        self.weight += keys
        if self.whole is not None:
            self.whole.weight += keys

    def widen(self, target: Target) -> None:
        """Trade keys for a sweep of their cache."""
        busts = self.busts[target]
        self.weight -= len(busts.keys) + len(busts.bumps) + len(busts.searches)
        busts.keys.clear()
        busts.bumps.clear()
        busts.searches.clear()
        self.sweep(target, busts.ops, busts.reason)

    @property
    def first_lsn(self) -> int:
        """The same as ``commit_lsn``: see `PlainBatch`."""
        return self.commit_lsn

    @property
    def targets(self) -> Iterable[Target]:
        """What is busted."""
        return self.busts

    @property
    def xids(self) -> Sequence[int]:
        """The transaction, if there is one."""
        return (self.xid,) if self.xid else ()

    def events(self) -> Iterable[BustEvent]:
        """Yield the events of the batch, without those of its sweeps and searches."""
        for target, busts in self.busts.items():
            op = ",".join(busts.ops)
            named = () if target.rest else busts.named(target)
            for action, keys in ((target.action, list(named)), ("bump", list(busts.bumps))):
                for start in range(0, len(keys), KEYS_AN_EVENT):
                    some = keys[start : start + KEYS_AN_EVENT]
                    yield BustEvent(
                        target, action, op, some, busts.reason, self.commit_lsn, self.committed_at, self.xid
                    )


def _known_prefix(target: Target, question: Question) -> bytes | None:
    """Return what a query's keys for this question begin with, if that is more than for any other question."""
    assert target.query is not None
    assert target.bust is not None
    values = split_arguments(question.arguments)[len(target.query.columns) :]
    given = dict(zip(target.bust.given, values, strict=False))
    template = target.cache.sweep_template
    known = list(takewhile(lambda part: isinstance(part, bytes) or part.name in given, template.parts))
    if not any(isinstance(part, Param) for part in known):
        return None
    return Template.of(known).render(given)


class PlainBatch:
    """The busts of many small transactions in a row; all of them plain keys.

    Args:
        events: their events, at least one; a transaction's stand together.
        xids: the transactions.
        end_lsn: with that, the last of them is done.
    """

    __slots__ = ("_events", "counted", "end_lsn", "weight", "xids")

    # No sweep, no query, nothing held or busted again.
    busts: ClassVar[Mapping[Target, TargetBusts]] = {}

    def __init__(self, events: list[BustEvent], xids: Sequence[int], end_lsn: int) -> None:
        self._events = events
        self.xids = xids
        self.end_lsn = end_lsn
        # An event takes as much memory as two keys.
        self.weight = sum(len(event.keys) for event in events) + 2 * len(events)
        # See `Batch`.
        self.counted = 0

    @property
    def first_lsn(self) -> int:
        """LSN of the first commit record."""
        return self._events[0].commit_lsn

    @property
    def commit_lsn(self) -> int:
        """LSN of the last commit record."""
        return self._events[-1].commit_lsn

    @property
    def committed_at(self) -> int | None:
        """The time of the last commit record."""
        return self._events[-1].committed_at

    @property
    def targets(self) -> Iterable[Target]:
        """What is busted."""
        return {event.target for event in self._events}

    def events(self) -> Iterable[BustEvent]:
        """Return the events."""
        return self._events

    def batches(self) -> list[Batch]:
        """Return the same as one batch for each transaction."""
        batches: list[Batch] = []
        for event in self._events:
            if not batches or batches[-1].commit_lsn != event.commit_lsn:
                batches.append(Batch(event.commit_lsn, event.committed_at, event.xid))
            batches[-1].add_all(event.target, event.op.split(","), event.keys, event.reason)
        return batches
