"""Sweeps: busting a whole cache by its key pattern, one SCAN step at a time, so that live busts go on meanwhile.

Why one pass over the locks and then one over the keys is enough: SCAN finds every key that is there from its start to
its end. A reader that began its fill before the sweep holds a lock, which the first pass deletes (its fill is then
dropped), or it stored before the first pass was over, and the second pass finds the key. A reader that begins later
loads what the sweep was for. Version counters need a single pass: a bump overtakes every fill under the old version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from cdc_invalidator import lsn
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.redis.server import SCAN_COUNT, CacheServer, Cursor
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

_log = structlog.get_logger()

# How often a long sweep says how far it is.
PROGRESS_SECONDS = 5.0


class Cause(NamedTuple):
    """Why a sweep was asked for; those with the same cause share one event."""

    rule: str
    table: str
    op: str
    reason: str


@dataclass(slots=True)
class Request:
    """What the event says of the transactions with one cause: the newest of them, and how many they were."""

    commit_lsn: int
    xid: int | None
    committed_at: int | None
    transactions: int = 1


@dataclass(slots=True)
class SweepProgress:
    """What a sweep has done so far; ``scanned``: keys looked at, some 1,000 a step."""

    scanned: int = 0
    keys: int = 0
    existed: int = 0


class Sweep:
    """One sweep of one cache for all who asked before it began; ``tickets`` are resolved when it is over."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.requests: dict[Cause, Request] = {}
        self.tickets: list[Ticket] = []
        self.progress = SweepProgress()
        self.logged_at = time.monotonic()
        self.restart()

    def add(self, cause: Cause, request: Request, tickets: Iterable[Ticket]) -> None:
        """Let another request wait for it; only before it has begun."""
        known = self.requests.get(cause)
        if known is not None:
            request.transactions += known.transactions
        self.requests[cause] = request
        self.tickets += tickets

    def restart(self) -> None:
        """Begin again: a cursor means nothing to another server."""
        pattern = self.cache.sweep_template.glob()
        self._cursor: Cursor = None
        self._passes = [pattern + LOCK_SUFFIX, pattern] if self.cache.version is None else [pattern]

    async def step(self, server: CacheServer, count: int) -> bool:
        """Look at about ``count`` more keys and bust those that are meant; True when the sweep is over."""
        cursor, keys = await server.scan(self._cursor, self._passes[0], count)
        if keys:
            await self._bust(server, keys)
        self.progress.scanned += count
        self._cursor = cursor
        if cursor is None:
            self._passes.pop(0)
        return not self._passes

    async def log_progress(self, server: CacheServer) -> None:
        """Log how far it is."""
        self.logged_at = time.monotonic()
        _log.info(
            "sweep_progress",
            cache=self.cache.name,
            passes_left=len(self._passes),
            scanned=self.progress.scanned,
            all_keys=await server.size(),
            keys=self.progress.keys,
            existed=self.progress.existed,
        )

    async def _bust(self, server: CacheServer, keys: list[bytes]) -> None:
        if self.cache.version is not None:
            # A pattern that ends in a parameter also finds old values, kept by bumps. Bumped, they would stay,
            # and one that came out as its counter's equal would show values that nothing bounds.
            stale = [key for key in keys if key.endswith(STALE_SUFFIX)]
            counters = [key for key in keys if not key.endswith(STALE_SUFFIX)]
            reply = await server.bust([stale], dict.fromkeys(counters, self.cache.version_ttl))
            self.progress.keys += len(reply.versions)
            self.progress.existed += sum(version != 0 for version in reply.versions.values())
        elif len(self._passes) == 2:
            await server.unlink(keys)
        else:
            reply = await server.bust([keys], {})
            self.progress.keys += len(keys)
            self.progress.existed += reply.existed[0]


class Sweeps:
    """The sweeps that run and those that wait: at most one of a cache runs, and one more waits behind it.

    Args:
        metrics: what to count.
        rate: how many keys a second may be looked at, all sweeps together; 0 for as many as there are.
    """

    def __init__(self, metrics: Metrics, *, rate: int = 0) -> None:
        self._metrics = metrics
        self._rate = rate
        # Small steps make a slow pace even.
        self._count = min(SCAN_COUNT, max(10, rate // 10)) if rate else SCAN_COUNT
        self._next_at = 0.0
        # Set while a slow pace would cost more than it saves.
        self.hurry = False
        self._running: dict[str, Sweep] = {}
        self._waiting: dict[str, Sweep] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def request(self, cache: Cache, cause: Cause, request: Request, ticket: Ticket) -> None:
        """Ask for a sweep of the cache that begins after now."""
        queue = self._waiting if cache.name in self._running else self._running
        if cache.name not in queue:
            queue[cache.name] = Sweep(cache)
        queue[cache.name].add(cause, request, [ticket])

    def restart(self) -> None:
        """Begin all again, on another connection; those that waited behind a sweep join it."""
        for name, waiting in self._waiting.items():
            for cause, request in waiting.requests.items():
                self._running[name].add(cause, request, ())
            self._running[name].tickets += waiting.tickets
        self._waiting.clear()
        for sweep in self._running.values():
            sweep.restart()

    def let_go(self, resolve: Callable[[Ticket], None]) -> set[str]:
        """Hold no position back any longer; return the caches whose sweeps did. They go on."""
        caches = set()
        for sweep in (*self._running.values(), *self._waiting.values()):
            held = [ticket for ticket in sweep.tickets if ticket.below < lsn.NEVER]
            if held:
                caches.add(sweep.cache.name)
                sweep.tickets = [ticket for ticket in sweep.tickets if ticket.below == lsn.NEVER]
                for ticket in held:
                    resolve(ticket)
        return caches

    def patience(self) -> float:
        """Return the seconds until the next step may be taken."""
        return 0.0 if self.hurry else max(0.0, self._next_at - time.monotonic())

    async def step(self, server: CacheServer) -> list[Sweep]:
        """Take one step of each running sweep, if the pace allows; return those that are over."""
        over = []
        for sweep in list(self._running.values()):
            now = time.monotonic()
            if now < self._next_at and not self.hurry:
                break
            if self._rate and not self.hurry:
                self._next_at = max(now - 1, self._next_at) + self._count / self._rate
            if await sweep.step(server, self._count):
                over.append(sweep)
            elif now - sweep.logged_at > PROGRESS_SECONDS:
                await sweep.log_progress(server)
            self._metrics.swept.labels(sweep.cache.name).inc(self._count)
            # Its turn comes again after the others'.
            self._running[sweep.cache.name] = self._running.pop(sweep.cache.name)
        for sweep in over:
            name = sweep.cache.name
            del self._running[name]
            if name in self._waiting:
                self._running[name] = self._waiting.pop(name)
        return over
