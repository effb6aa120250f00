"""Observation: nothing is busted, and it is looked at what each bust would have mended.

Of each key that would be busted, Redis makes a fingerprint when readers see the commit, and another one a grace later.
If the entry is gone or changed by then, the application has invalidated it itself. If the same is still there, it is
stale now: that is told, and it is looked at again at growing intervals until it is gone or changed, so that it is known
for how long.

An application is often faster than the stream: it has deleted an entry, and somebody has filled it again, before the
first look. Then the same content is there later, and is not stale. So Redis tells which keys are written: what was
written after the commit counts as mended. Where it is not known what was written (the stream is far behind, or the
connection was lost), nothing is called stale.

The rule that holds here: what is remembered is bounded by `MOST`, and outlives connections and sessions; what is not
judged is counted as skipped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from statistics import median
from typing import Any, NamedTuple

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.inspection import Bust
from cdc_invalidator.redis.fingerprint import ABSENT, LARGE, Look
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.writes import Writes
from cdc_invalidator.rules.model import RuleSet

_log = structlog.get_logger()

# Changes that are not judged and entries that are stale, and the bytes of their keys.
MOST = 20_000
MOST_BYTES = 8 << 20
# How often it is looked whether any are due, and how many are looked at in one round trip.
STEP_SECONDS = 0.2
STEP = 500
# The intervals at which a stale entry is looked at again, each twice the one before; and for how long at most.
MOST_INTERVAL_SECONDS = 60.0
MOST_SECONDS = 3600.0
# A write that Redis has told so long before the commit's time may have come after it; and the news of one that came
# before a look may be so late.
EARLY_SECONDS = 0.005
LATE_SECONDS = 0.05
# The times of so many stale entries of a cache and rule have their median told, the latest ones.
TIMES = 1000
# The worst entries that /status shows, of the last hour.
WORST = 10
WORST_SECONDS = 3600.0


class Followed(NamedTuple):
    """A change of which it is not sure that readers see it; ``came``: when, of the monotonic clock."""

    event: BustEvent
    key: bytes
    ticket: Ticket
    came: float


class Change(NamedTuple):
    """A change that an entry has outlived so far; times are of the monotonic clock.

    ``came``: when it was received; ``looked``: when the entry was looked at then; ``due``: when the grace is over.
    """

    event: BustEvent
    came: float
    committed: float
    looked: float
    due: float


@dataclass(slots=True, eq=False)
class Entry:
    """One key, and what it holds since it is observed.

    ``changes``: those that are not judged yet, in order. ``stale``: the first that has left it stale. ``interval`` and
    ``look_at``: when a stale one is looked at again. ``over``: it is gone or changed.
    """

    key: bytes
    content: bytes
    interval: float
    changes: deque[Change] = field(default_factory=deque)
    stale: Change | None = None
    look_at: float = 0.0
    over: bool = False


class _Times:
    """For how many seconds entries were stale, once they are not."""

    def __init__(self) -> None:
        self.total = self.longest = 0.0
        self.latest: deque[float] = deque(maxlen=TIMES)

    def note(self, seconds: float) -> None:
        """Take the time of one entry."""
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self.latest.append(seconds)


class Observe:
    """Entries that would have been busted, and what has become of them; see `Inspection`.

    Args:
        grace: after how many seconds an entry that is still the same counts as stale.
        writes: which keys were written lately.
        metrics: what to count.
        events: where stale entries are logged.
    """

    name = "observed"

    def __init__(self, grace: float, writes: Writes, *, metrics: Metrics, events: Events) -> None:
        self._grace = grace
        self._writes = writes
        self._metrics = metrics
        self._events = events
        self._chosen: list[tuple[BustEvent, bytes]] = []
        self._entries: dict[bytes, Entry] = {}
        self._due: list[tuple[float, int, Entry]] = []
        self._numbers = count()
        self._followed: list[Followed] = []
        # How many changes are not judged, how many entries are stale, and the bytes of the keys.
        self._open = self._stale = self._bytes = 0
        self._step_at = 0.0
        self._refused: str | None = None
        self._since: float | None = None
        self._results: dict[tuple[str, str], Counter[str]] = {}
        self._times: dict[tuple[str, str], _Times] = {}
        # When it began, for how long it lasted, and what it was.
        self._worst: list[tuple[float, float, BustEvent]] = []

    def show(self, rules: RuleSet) -> None:
        """Show all rules and their caches."""
        for rule in rules.rules:
            for cache in {bust.cache.name for bust in rule.busts}:
                for result in ("changes", "absent", "mended", "stale"):
                    self._metrics.observed.labels(rule.name, cache, result)

    def connected(self) -> None:
        """Keep the entries, and look at the stale ones at once; what is not sure to be visible can't be judged."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        self._chosen = []
        self._refused = None
        # A session that is over does not resolve its tickets.
        for each in self._followed:
            self._close(each.key)
            self._count(each.event, "skipped")
        self._followed = []
        entries = self._entries.values()
        self._due = [(change.due, next(self._numbers), entry) for entry in entries for change in entry.changes]
        self._due += [(now, next(self._numbers), entry) for entry in entries if entry.stale]
        heapify(self._due)
        for entry in entries:
            entry.look_at = now

    def status(self) -> dict[str, Any]:
        """Return the figures by cache and rule, and the entries that were stale for longest in the last hour.

        The rule is the one that would have mended what is stale. ``observed_s``: seconds since the first connection;
        ``None`` before. ``there``: how many changes have met an entry; ``stale_share``: how many have left it stale, of
        all that are judged. ``stale_s``: the sum of the seconds that entries were stale, once they are not; the median
        and the longest count those that still are.
        """
        now = time.monotonic()
        return {
            "observed_s": round(now - self._since, 3) if self._since is not None else None,
            "caches": [self._figures(*name, now) for name in sorted(self._results)],
            "stale_now": self._stale,
            "worst": [
                {**self._events.shown(event), "stale_s": round(seconds, 3)} for _, seconds, event in self._longest(now)
            ],
            "error": self._refused,
        }

    def _figures(self, cache: str, rule: str, now: float) -> dict[str, Any]:
        found = self._results[cache, rule]
        times = self._times.get((cache, rule), _Times())
        entries = self._entries.values()
        waiting = [each.event for each in self._followed]
        waiting += [change.event for entry in entries for change in entry.changes]
        pending = sum(_name(event) == (cache, rule) for event in waiting)
        there = pending + sum(found[name] for name in ("mended", "stale", "too_large", "skipped"))
        judged = found["stale"] + found["mended"]
        stale = [entry.stale for entry in entries if entry.stale is not None]
        own = [now - change.came for change in stale if _name(change.event) == (cache, rule)]
        all_times = [*times.latest, *own]
        return {
            "cache": cache,
            "rule": rule,
            **found,
            "there": there,
            "stale_share": round(found["stale"] / judged, 4) if judged else None,
            "stale_s": round(times.total, 3),
            "stale_median_s": round(median(all_times), 3) if all_times else None,
            "stale_max_s": round(max([times.longest, *own]), 3) if all_times else None,
        }

    def _longest(self, now: float) -> list[tuple[float, float, BustEvent]]:
        stale = [entry.stale for entry in self._entries.values() if entry.stale is not None]
        open_ones = [(change.came, now - change.came, change.event) for change in stale]
        recent = [each for each in self._worst if each[0] + each[1] > now - WORST_SECONDS]
        return sorted([*recent, *open_ones], key=lambda each: -each[1])[:WORST]

    def choose(self, events: Sequence[BustEvent], _deletes: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Return all keys that would be busted, version counters among them; see `Inspection.choose`."""
        self._chosen = [(event, key) for event in events for key in event.keys]
        return list(dict.fromkeys(key for _, key in self._chosen))

    def begin(self, looks: Sequence[Look], taken: Iterable[tuple[Batch | PlainBatch, Ticket]], now: float) -> None:
        """Begin to observe what was chosen last; see `Inspection.begin`."""
        chosen, self._chosen = self._chosen, []
        found = dict(zip(dict.fromkeys(key for _, key in chosen), looks, strict=True))
        tickets = {batch.commit_lsn: ticket for batch, ticket in taken if not isinstance(batch, PlainBatch)}
        for event, key in chosen:
            self._count(event, "changes")
            one, look, ticket = event._replace(keys=[key]), found[key], tickets.get(event.commit_lsn)
            followed = ticket is not None and ticket.parts and isinstance(look, bytes) and look not in {ABSENT, LARGE}
            if ticket is None or not followed:
                self._meet(one, key, look, now, "absent")
            elif self._take(one, key):
                self._followed.append(Followed(one, key, ticket, now))

    def _take(self, event: BustEvent, key: bytes) -> bool:
        """Return whether there is room for one change more."""
        if self._open + self._stale >= MOST or self._bytes >= MOST_BYTES:
            self._count(event, "skipped")
            return False
        self._open += 1
        self._bytes += len(key)
        return True

    def _close(self, key: bytes) -> None:
        """Note that a change is judged, or won't be."""
        self._open -= 1
        self._bytes -= len(key)

    def _meet(self, event: BustEvent, key: bytes, look: Look, came: float, absent: str) -> None:
        """Note what a change has met that readers see; ``absent`` is what to count it as if there is nothing."""
        now = time.monotonic()
        entry = self._entries.get(key)
        if isinstance(look, errors.RedisUnavailable):
            self._refuse(look)
            return
        if entry is not None and entry.content != look:
            self._gone(entry, now)
            entry = None
        if look in {ABSENT, LARGE}:
            self._count(event, absent if look == ABSENT else "too_large")
            return
        change = Change(event, came, _committed(event, now), now, now + self._grace)
        if not self._writes.known(change.committed - EARLY_SECONDS, now):
            self._count(event, "skipped")
        elif self._take(event, key):
            if entry is None:
                entry = self._entries[key] = Entry(key, look, self._grace)
            entry.changes.append(change)
            self._wait(entry, change.due)

    def swept(self, caches: Iterable[str]) -> None:
        """Count caches that would have been swept."""
        for cache in caches:
            self._results.setdefault((cache, ""), Counter())["sweeps"] += 1

    def due_in(self, now: float) -> float | None:
        """See `Inspection`."""
        if self._followed:
            return max(0.0, self._step_at - now)
        return max(0.0, self._step_at - now, self._due[0][0] - now) if self._due else None

    async def step(self, server: CacheServer, _bust: Bust) -> None:
        """Look at what is due."""
        now = time.monotonic()
        if now < self._step_at or not (self._followed or self._due):
            return
        self._step_at = now + STEP_SECONDS
        visible = [each for each in self._followed if not each.ticket.parts]
        due: dict[Entry, None] = {}
        while self._due and self._due[0][0] <= now and len(due) < STEP:
            entry = heappop(self._due)[2]
            if not entry.over:
                due[entry] = None
        if not visible and not due:
            return
        keys = [each.key for each in visible] + [entry.key for entry in due]
        looks = await server.fingerprints(keys)
        self._followed = [each for each in self._followed if each.ticket.parts]
        for entry, look in zip(due, looks[len(visible) :], strict=True):
            if isinstance(look, errors.RedisUnavailable):
                self._refuse(look)
                self._gone(entry, now, "skipped")
            elif look != entry.content:
                self._gone(entry, now)
            else:
                self._same(entry, now)
        for each, look in zip(visible, looks, strict=False):
            # Only now do readers see the commit.
            self._close(each.key)
            self._meet(each.event, each.key, look, each.came, "mended")

    def _same(self, entry: Entry, now: float) -> None:
        """Judge the changes that an entry has outlived whose grace is over."""
        while entry.changes and entry.changes[0].due <= now:
            change = entry.changes.popleft()
            self._close(entry.key)
            begin, end = change.committed - EARLY_SECONDS, change.looked + LATE_SECONDS
            if not self._writes.known(begin, end):
                self._count(change.event, "skipped")
            elif self._writes.between(entry.key, begin, end):
                # The same content, but filled after this commit.
                self._count(change.event, "mended")
                self._no_longer_stale(entry, now)
            else:
                self._count(change.event, "stale")
                self._now_stale(entry, change)
        if entry.stale is None:
            if not entry.changes:
                self._gone(entry, now)
        elif now - entry.stale.came > MOST_SECONDS:
            self._gone(entry, now, "skipped")
        elif now >= entry.look_at:
            entry.interval = min(2 * entry.interval, MOST_INTERVAL_SECONDS)
            entry.look_at = now + entry.interval
            self._wait(entry, entry.look_at)

    def _now_stale(self, entry: Entry, change: Change) -> None:
        if entry.stale is None:
            entry.stale = change
            self._stale += 1
            self._bytes += len(entry.key)
            self._events.stale(change.event)

    def _no_longer_stale(self, entry: Entry, now: float) -> None:
        """Note for how long an entry was stale, if it was."""
        change = entry.stale
        if change is None:
            return
        entry.stale, entry.interval, entry.look_at = None, self._grace, 0.0
        self._stale -= 1
        self._bytes -= len(entry.key)
        seconds = now - change.came
        cache, rule = _name(change.event)
        self._times.setdefault((cache, rule), _Times()).note(seconds)
        self._metrics.observed_stale.labels(rule, cache).inc(seconds)
        self._worst = [each for each in self._worst if each[0] + each[1] > now - WORST_SECONDS]
        self._worst = sorted([*self._worst, (change.came, seconds, change.event)], key=lambda each: -each[1])[:WORST]

    def _gone(self, entry: Entry, now: float, result: str = "mended") -> None:
        """Note that an entry is gone or changed, or no longer looked at; ``result`` is that of its last changes."""
        for change in entry.changes:
            self._close(entry.key)
            self._count(change.event, result)
        self._no_longer_stale(entry, now)
        entry.over = True
        del self._entries[entry.key]

    def _wait(self, entry: Entry, due: float) -> None:
        heappush(self._due, (due, next(self._numbers), entry))

    def _refuse(self, error: errors.RedisUnavailable) -> None:
        if self._refused is None:
            _log.error("observe_refused", error=str(error))
        self._refused = str(error)

    def _count(self, event: BustEvent, result: str) -> None:
        cache, rule = _name(event)
        self._metrics.observed.labels(rule, cache, result).inc()
        self._results.setdefault((cache, rule), Counter())[result] += 1


def _name(event: BustEvent) -> tuple[str, str]:
    return event.target.cache.name, event.target.rule


def _committed(event: BustEvent, now: float) -> float:
    """Return when a change was committed, of the monotonic clock."""
    if event.committed_at is None:
        return now
    return now - max(0.0, time.time() - lsn.unix_us(event.committed_at) / 1e6)
