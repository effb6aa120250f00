"""Observation: nothing is busted, and it is looked at what each bust would have mended.

Of each key that would be busted, Redis makes a fingerprint when readers see the commit, and another one a grace later.
If the entry is gone or changed by then, the application has invalidated it itself. If the same is still there, it is
stale now: that is told, and it is looked at again at growing intervals until it is gone or changed, so that it is known
for how long.

An application is often faster than the stream: it has deleted an entry, and somebody has filled it again, before the
first look. Then the same content is there later, and is not stale. So Redis tells which keys are written: what was
written after the commit counts as mended.

The rule that holds here: what is remembered is bounded by `MOST`; what is beyond that is counted as skipped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from statistics import median
from typing import Any

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

# Entries that are looked at again, and the bytes of their keys.
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


@dataclass(slots=True, eq=False)
class Entry:
    """One key that would have been busted; times are of the monotonic clock.

    ``changes``: how many changes have met this content. ``content``: its fingerprint, and ``looked``: when it was made.
    ``since``: when the change came; ``committed``: when it was committed. ``stale``: whether the grace is over.
    """

    event: BustEvent
    key: bytes
    content: bytes
    ticket: Ticket | None
    since: float
    committed: float
    looked: float
    changes: int = 1
    interval: float = 0.0
    stale: bool = False
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
        self._bytes = 0
        self._due: list[tuple[float, int, Entry]] = []
        self._numbers = count()
        self._followed: list[Entry] = []
        self._step_at = 0.0
        self._refused: str | None = None
        self._since: float | None = None
        self._results: dict[tuple[str, str], Counter[str]] = {}
        self._times: dict[tuple[str, str], _Times] = {}
        # When it began, for how long it lasted, and what it was.
        self._worst: list[tuple[float, float, Entry]] = []

    def show(self, rules: RuleSet) -> None:
        """Show all rules and their caches."""
        for rule in rules.rules:
            for cache in {bust.cache.name for bust in rule.busts}:
                for result in ("changes", "absent", "mended", "stale"):
                    self._metrics.observed.labels(rule.name, cache, result)

    def connected(self) -> None:
        """Leave all entries: another connection begins, maybe to another Redis."""
        if self._since is None:
            self._since = time.monotonic()
        self._chosen = []
        self._entries.clear()
        self._bytes = 0
        self._due.clear()
        self._followed = []
        self._refused = None

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
            "stale_now": sum(entry.stale for entry in self._entries.values()),
            "worst": [
                {**self._events.shown(entry.event), "stale_s": round(seconds, 3)}
                for _, seconds, entry in self._longest(now)
            ],
            "error": self._refused,
        }

    def _figures(self, cache: str, rule: str, now: float) -> dict[str, Any]:
        found = self._results[cache, rule]
        times = self._times.get((cache, rule), _Times())
        mine = [
            each
            for each in self._entries.values()
            if (each.event.target.cache.name, each.event.target.rule) == (cache, rule)
        ]
        pending = sum(each.changes for each in mine if not each.stale)
        there = pending + sum(found[name] for name in ("mended", "stale", "too_large", "skipped"))
        judged = found["stale"] + found["mended"]
        own = [now - each.since for each in mine if each.stale]
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

    def _longest(self, now: float) -> list[tuple[float, float, Entry]]:
        open_ones = [(each.since, now - each.since, each) for each in self._entries.values() if each.stale]
        recent = [each for each in self._worst if each[0] + each[1] > now - WORST_SECONDS]
        return sorted([*recent, *open_ones], key=lambda each: -each[1])[:WORST]

    def choose(self, events: Sequence[BustEvent], _deletes: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Return all keys that would be busted, version counters among them; see `Inspection.choose`."""
        seen: set[bytes] = set()
        self._chosen = []
        for event in events:
            for key in event.keys:
                if key not in seen:
                    seen.add(key)
                    self._chosen.append((event, key))
                else:
                    self._count(event, "changes")
        return [key for _, key in self._chosen]

    def begin(self, looks: Sequence[Look], taken: Iterable[tuple[Batch | PlainBatch, Ticket]], now: float) -> None:
        """Begin to observe what was chosen last; see `Inspection.begin`."""
        chosen, self._chosen = self._chosen, []
        tickets = {batch.commit_lsn: ticket for batch, ticket in taken if not isinstance(batch, PlainBatch)}
        for (event, key), look in zip(chosen, looks, strict=False):
            self._count(event, "changes")
            if isinstance(look, errors.RedisUnavailable):
                self._refuse(look)
            elif look == LARGE:
                self._count(event, "too_large")
            elif look == ABSENT:
                self._changed(key, now)
                self._count(event, "absent")
            else:
                self._begin(event, key, look, tickets.get(event.commit_lsn), now)

    def _begin(self, event: BustEvent, key: bytes, look: bytes, ticket: Ticket | None, now: float) -> None:
        known = self._entries.get(key)
        if known is not None and known.content == look:
            # One look tells of all changes that this content has survived.
            known.changes += 1
            if known.stale:
                self._count(event, "stale")
            return
        self._changed(key, now)
        committed = _committed(event, now)
        if committed - EARLY_SECONDS < self._writes.began or len(self._entries) >= MOST or self._bytes >= MOST_BYTES:
            self._count(event, "skipped")
            return
        entry = Entry(event._replace(keys=[key]), key, look, ticket, now, committed, now, interval=self._grace)
        self._entries[key] = entry
        self._bytes += len(key)
        if ticket is not None and ticket.parts:
            self._followed.append(entry)
        else:
            self._wait(entry, now + self._grace)

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
        visible = [each for each in self._followed if not each.over and not (each.ticket and each.ticket.parts)]
        self._followed = [each for each in self._followed if not each.over and each.ticket and each.ticket.parts]
        due: list[Entry] = []
        while self._due and self._due[0][0] <= now and len(due) < STEP:
            entry = heappop(self._due)[2]
            if not entry.over:
                due.append(entry)
        if not visible and not due:
            return
        looks = await server.fingerprints([each.key for each in (*visible, *due)])
        for entry, look in zip(visible, looks, strict=False):
            # Only now do readers see the commit.
            if isinstance(look, errors.RedisUnavailable) or look == ABSENT:
                self._changed(entry.key, now)
            else:
                entry.content, entry.looked = look, time.monotonic()
                self._wait(entry, now + self._grace)
        for entry, look in zip(due, looks[len(visible) :], strict=True):
            if isinstance(look, errors.RedisUnavailable):
                self._refuse(look)
                self._end(entry)
            elif look != entry.content or (not entry.stale and self._mended_before(entry)):
                self._changed(entry.key, time.monotonic())
            else:
                self._still(entry, now)

    def _mended_before(self, entry: Entry) -> bool:
        """Return whether the entry was written after the commit, before it was looked at."""
        return self._writes.between(entry.key, entry.committed - EARLY_SECONDS, entry.looked + LATE_SECONDS)

    def _still(self, entry: Entry, now: float) -> None:
        """Note that an entry is still the same."""
        if not entry.stale:
            entry.stale = True
            for _ in range(entry.changes):
                self._count(entry.event, "stale")
            self._events.stale(entry.event)
        if now - entry.since > MOST_SECONDS:
            self._changed(entry.key, now)
            return
        entry.interval = min(2 * entry.interval, MOST_INTERVAL_SECONDS)
        self._wait(entry, now + entry.interval)

    def _changed(self, key: bytes, now: float) -> None:
        """Note that an entry is gone or changed, or no longer looked at."""
        entry = self._entries.get(key)
        if entry is None:
            return
        self._end(entry)
        if not entry.stale:
            for _ in range(entry.changes):
                self._count(entry.event, "mended")
            return
        target = entry.event.target
        seconds = now - entry.since
        name = target.cache.name, target.rule
        self._times.setdefault(name, _Times()).note(seconds)
        self._metrics.observed_stale.labels(target.rule, target.cache.name).inc(seconds)
        self._worst = [each for each in self._worst if each[0] + each[1] > now - WORST_SECONDS]
        self._worst = sorted([*self._worst, (entry.since, seconds, entry)], key=lambda each: -each[1])[:WORST]

    def _wait(self, entry: Entry, due: float) -> None:
        heappush(self._due, (due, next(self._numbers), entry))

    def _end(self, entry: Entry) -> None:
        entry.over = True
        del self._entries[entry.key]
        self._bytes -= len(entry.key)

    def _refuse(self, error: errors.RedisUnavailable) -> None:
        if self._refused is None:
            _log.error("observe_refused", error=str(error))
        self._refused = str(error)

    def _count(self, event: BustEvent, result: str) -> None:
        target = event.target
        self._metrics.observed.labels(target.rule, target.cache.name, result).inc()
        self._results.setdefault((target.cache.name, target.rule), Counter())[result] += 1


def _committed(event: BustEvent, now: float) -> float:
    """Return when a change was committed, of the monotonic clock."""
    if event.committed_at is None:
        return now
    return now - max(0.0, time.time() - lsn.unix_us(event.committed_at) / 1e6)
