"""Sweeps and searches: busting whole caches, or all keys under prefixes, a SCAN step at a time, between live busts.

Why one pass over the locks and then one over the keys is enough: SCAN finds every key that is there from its start to
its end. A reader that began its fill before the sweep holds a lock, which the first pass deletes (its fill is then
dropped), or it stored before the first pass was over, and the second pass finds the key. A reader that begins later
loads what the sweep was for. Version counters need a single pass: a bump overtakes every fill under the old version.

A sweep is of one cache, and has a pattern of its own. A search is of all prefixes that were asked for before it began,
whatever their caches. What is asked for later waits for the next one. So a key is gone at most two searches after it
was asked for, the one that runs and the next, however many prefixes there are.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.messages import Messages
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.server import SCAN_COUNT, BustReply, CacheServer, Cursor
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import Beside
from cdc_invalidator.rules.template import escape_glob

_log = structlog.get_logger()

# How often a long sweep says how far it is.
PROGRESS_SECONDS = 5.0
# A search that takes so long is logged when it begins and ends.
LONG_SECONDS = 1.0
# What the prefixes of one search may take; beyond that, the caches with the most of them are swept instead.
SEARCH_BYTES = 16_000_000
# Of a prefix, besides its text.
_A_PREFIX = 100


class Cause(NamedTuple):
    """Why a sweep or search was asked for; those with the same cause share one event."""

    rule: str
    table: str
    op: str
    reason: str


@dataclass(slots=True)
class Request:
    """What the event says of the transactions with one cause: the newest of them, and how many they were.

    ``prefixes``: what is searched for; empty for a sweep. ``bust``: which bust of the transaction asks, see
    `FollowUps.begin`.
    """

    commit_lsn: int
    xid: int | None
    committed_at: int | None
    transactions: int = 1
    prefixes: dict[bytes, None] = field(default_factory=dict)
    bust: str = "first"

    @property
    def round(self) -> str:
        """Which bust asks; the first one may come late."""
        return "first" if self.bust == "visible" else self.bust


class Asked:
    """What is asked for of one cache: by whom, what waits for it, and what was found and there so far."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.requests: dict[Cause, Request] = {}
        # By bust: the newest transaction that has asked for a sweep.
        self.newest: dict[str, int] = {}
        self.tickets: list[Ticket] = []
        self.keys = 0
        self.existed = 0
        self._over = False
        self._into: Asked | None = None

    def add(self, cause: Cause, request: Request) -> int:
        """Add a request; return the bytes that its prefixes take."""
        known = self.requests.get(cause)
        prefixes = known.prefixes if known is not None else {}
        more = [prefix for prefix in request.prefixes if prefix not in prefixes]
        prefixes.update(dict.fromkeys(more))
        if known is not None:
            request.transactions += known.transactions - (known.commit_lsn == request.commit_lsn)
        if request.xid and not request.prefixes:
            self.newest[request.round] = request.commit_lsn
        request.prefixes = prefixes
        self.requests[cause] = request
        return sum(map(len, more)) + _A_PREFIX * len(more)

    def hold(self, ticket: Ticket, resolve: Callable[[Ticket], None]) -> None:
        """Let a ticket wait. Of those that hold the position back, the one that holds back most stands for all."""
        self.tickets.append(ticket)
        holding = [each for each in self.tickets if each.below < lsn.NEVER]
        if len(holding) > 1:
            most, done = sorted(holding, key=lambda each: each.below)
            self.tickets = [each for each in self.tickets if each.below == lsn.NEVER] + [most]
            resolve(done)

    def finish(self, into: Asked | None = None) -> None:
        """Note that no pass goes on for it; or that it is asked for in another place."""
        self._over, self._into = into is None, into

    @property
    def over(self) -> bool:
        """Whether no pass goes on for it."""
        return self._over if self._into is None else self._into.over

    @property
    def size(self) -> int:
        """The bytes that its prefixes take."""
        return sum(len(prefix) + _A_PREFIX for request in self.requests.values() for prefix in request.prefixes)

    @property
    def prefixes(self) -> set[bytes]:
        """All prefixes, of all causes."""
        return {prefix for request in self.requests.values() for prefix in request.prefixes}


class Denied(NamedTuple):
    """What was asked for of a cache and will not be done, because a right is missing."""

    asked: Asked
    error: errors.RedisUnavailable


class Pass(ABC):
    """A sweep or a search: one pass over the locks, then one over the keys, for all who asked before it began."""

    action: str

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        # Taken out of it.
        self.denied: list[Denied] = []
        self.scanned = 0
        # How many keys there are in Redis; looked at now and then.
        self.all_keys: int | None = None
        self.began_at = self.logged_at = 0.0
        self.restart()

    def of(self, cache: Cache) -> Asked:
        """Return what is asked for of a cache."""
        asked = self.asked.get(cache.name)
        if asked is None:
            asked = self.asked[cache.name] = Asked(cache)
        return asked

    def restart(self) -> None:
        """Begin again: a cursor means nothing to another server."""
        self.begun = False
        self.passes = 1
        self._cursor: Cursor = None
        self._patterns: list[bytes] = []

    async def step(self, server: CacheServer, count: int) -> bool:
        """Look at about ``count`` more keys and bust those that are meant; True when the pass is over.

        What a right is missing for is taken out of it.

        Raises:
            errors.RedisUnavailable: it can't go on.
        """
        if not self.begun:
            self.begun = True
            for asked in list(self.asked.values()):
                # So that it shows before all of Redis is searched, and also while there is no key.
                self.unless_denied(asked, await _try(server, asked))
            if not self.asked:
                return True
            self.began_at = self.logged_at = time.monotonic()
            pattern = self._begin()
            locked = any(asked.cache.version is None for asked in self.asked.values())
            self._patterns = [pattern + server.beside.locks_glob, pattern] if locked else [pattern]
            self.passes = len(self._patterns)
            self.all_keys = await server.size()
        of_locks = len(self._patterns) == 2
        try:
            cursor, keys = await server.scan(self._cursor, self._patterns[0], count)
        except errors.RedisUnavailable as error:
            if not replies.denies(error.code):
                raise
            for asked in list(self.asked.values()):
                self.unless_denied(asked, error)
            return True
        if keys:
            for asked, meant in self._meant(keys, server.beside if of_locks else None):
                self.unless_denied(asked, await _bust(server, asked, meant, of_locks=of_locks))
        self.scanned += count
        self._cursor = cursor
        if cursor is None:
            self._patterns.pop(0)
        return not self._patterns or not self.asked

    def unless_denied(self, asked: Asked, error: errors.RedisUnavailable | None) -> None:
        """Take out of it what a right is missing for."""
        if error is not None:
            del self.asked[asked.cache.name]
            self.denied.append(Denied(asked, error))

    async def log_progress(self, server: CacheServer) -> None:
        """Log how far it is."""
        self.logged_at = time.monotonic()
        self.all_keys = await server.size()
        _log.info(
            f"{self.action}_progress",
            **self.shown(),
            passes_left=len(self._patterns),
            scanned=self.scanned,
            all_keys=self.all_keys,
            keys=sum(asked.keys for asked in self.asked.values()),
            existed=sum(asked.existed for asked in self.asked.values()),
        )

    @abstractmethod
    def shown(self) -> dict[str, Any]:
        """Return what a log line says that it is about."""

    @abstractmethod
    def _begin(self) -> bytes:
        """Return the pattern that finds all keys that are meant."""

    @abstractmethod
    def _meant(self, keys: list[bytes], locks: Beside | None) -> Iterator[tuple[Asked, list[bytes]]]:
        """Yield the keys that are meant, by cache; ``locks``: how they are named, if they are locks."""


class Sweep(Pass):
    """A pass for the whole of one cache."""

    action = "sweep"

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache
        self.of(cache)

    def shown(self) -> dict[str, Any]:
        """See `Pass`."""
        return {"cache": self.cache.name}

    def _begin(self) -> bytes:
        return self.cache.sweep_template.glob()

    def _meant(self, keys: list[bytes], locks: Beside | None) -> Iterator[tuple[Asked, list[bytes]]]:  # noqa: ARG002  the pattern has them
        yield self.asked[self.cache.name], keys


class _Wanted(NamedTuple):
    """What a search looks for of one cache: prefixes, by length, and what the whole key must be like."""

    asked: Asked
    by_length: list[tuple[int, set[bytes]]]
    like: re.Pattern[bytes]


class Search(Pass):
    """A pass for all prefixes of all caches."""

    action = "search"

    def __init__(self) -> None:
        super().__init__()
        # The bytes that all prefixes take.
        self.size = 0
        # Whether it has taken so long that its beginning was logged, and its end will be.
        self.long = False
        self._wanted: list[_Wanted] = []

    @property
    def prefixes(self) -> int:
        """How many prefixes are searched for."""
        return sum(len(request.prefixes) for asked in self.asked.values() for request in asked.requests.values())

    def shown(self) -> dict[str, Any]:
        """See `Pass`."""
        return {"caches": sorted(self.asked), "prefixes": self.prefixes}

    def log_long(self) -> None:
        """Log once that it has begun, if it takes long."""
        if not self.long and time.monotonic() - self.began_at > LONG_SECONDS:
            self.long = True
            _log.info("search_started", **self.shown())

    def log_over(self) -> None:
        """Log its end, if its beginning was logged."""
        if self.long:
            _log.info(
                "search_over",
                **self.shown(),
                scanned=self.scanned,
                keys=sum(asked.keys for asked in self.asked.values()),
                existed=sum(asked.existed for asked in self.asked.values()),
                seconds=round(time.monotonic() - self.began_at, 3),
            )

    def _begin(self) -> bytes:
        self._wanted = []
        every: list[bytes] = []
        for asked in self.asked.values():
            by_length: dict[int, set[bytes]] = {}
            prefixes = asked.prefixes
            for prefix in prefixes:
                by_length.setdefault(len(prefix), set()).add(prefix)
            self._wanted.append(_Wanted(asked, list(by_length.items()), asked.cache.sweep_template.like()))
            every += [min(prefixes), max(prefixes)]
        # As much as the server can leave out; the rest is seen here.
        first, last = min(every), max(every)
        length = next(
            (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
        )
        return escape_glob(first[:length]) + b"*"

    def _meant(self, keys: list[bytes], locks: Beside | None) -> Iterator[tuple[Asked, list[bytes]]]:
        for asked, by_length, like in self._wanted:
            if asked.cache.name not in self.asked or (locks and asked.cache.version is not None):
                continue
            meant = [
                key
                for key in keys
                if any(key[:length] in prefixes for length, prefixes in by_length)
                and like.fullmatch(key if locks is None else locks.locked(key))
            ]
            if meant:
                yield asked, meant


async def _try(server: CacheServer, asked: Asked) -> errors.RedisUnavailable | None:
    """Bust one key of a cache that is swept or searched anyway; return why that is denied."""
    cache = asked.cache
    template = cache.sweep_template
    key = template.render(dict.fromkeys(template.params, "0"))
    assert key is not None
    if cache.version is not None:
        # The pass finds it again, and counts it then.
        return _denial(await server.bust([], {key: cache.version_ttl}))
    reply = await server.bust([[key]], {})
    if reply.existed and reply.existed[0]:
        asked.keys += 1
        asked.existed += 1
    return _denial(reply)


def _denial(reply: BustReply) -> errors.RedisUnavailable | None:
    return next(iter(reply.denied.values()), None)


async def _bust(
    server: CacheServer, asked: Asked, keys: list[bytes], *, of_locks: bool
) -> errors.RedisUnavailable | None:
    """Bust keys that were found, and count them; return why that is denied."""
    cache = asked.cache
    if cache.version is not None:
        # A pattern that ends in a parameter also finds old values, kept by bumps. Bumped, they would stay,
        # and one that came out as its counter's equal would show values that nothing bounds.
        stale = [key for key in keys if key.endswith(server.beside.stale)]
        counters = [key for key in keys if not key.endswith(server.beside.stale)]
        reply = await server.bust([stale], dict.fromkeys(counters, cache.version_ttl))
        asked.keys += len(reply.versions)
        asked.existed += sum(version != 0 for version in reply.versions.values())
        return _denial(reply)
    if of_locks:
        try:
            await server.unlink(keys)
        except errors.RedisUnavailable as error:
            if not replies.denies(error.code):
                raise
            return error
        return None
    reply = await server.bust([keys], {})
    asked.keys += len(keys)
    asked.existed += reply.existed[0]
    return _denial(reply)


class SweepOptions(NamedTuple):
    """How caches are swept.

    ``gaps``: False to only report gaps (``CDC_ON_GAP=warn``). ``rate``: how many keys a second may be looked at; 0 for
    as many as there are.
    """

    gaps: bool = True
    rate: int = 0


class Sweeps:
    """The sweeps and the search that run, and those that wait.

    Of a cache, at most one sweep runs, and one more waits behind it; and so it is with searches.

    Args:
        metrics: what to count.
        resolve: ends a part of a ticket whose work another ticket stands for.
        messages: makes what others are told.
        rate: how many keys a second may be looked at, all together; 0 for as many as there are.
        most: what the prefixes of one search may take, in bytes.
    """

    def __init__(
        self,
        metrics: Metrics,
        resolve: Callable[[Ticket], None],
        messages: Messages,
        *,
        rate: int = 0,
        most: int = SEARCH_BYTES,
    ) -> None:
        self._metrics = metrics
        self._resolve = resolve
        self._messages = messages
        self._rate = rate
        self._most = most
        # Small steps make a slow pace even.
        self._count = min(SCAN_COUNT, max(10, rate // 10)) if rate else SCAN_COUNT
        self._next_at = 0.0
        # Set while a slow pace would cost more than it saves.
        self.hurry = False
        # By cache; the search, which is of all caches, by the empty name.
        self._running: dict[str, Pass] = {}
        self._waiting: dict[str, Pass] = {}
        # Of the last sweep of each cache on this connection: `Asked.newest`.
        self._over: dict[str, dict[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def __len__(self) -> int:
        return sum(isinstance(each, Sweep) for each in self._all)

    @property
    def _all(self) -> list[Pass]:
        return [*self._running.values(), *self._waiting.values()]

    @property
    def searches(self) -> list[Search]:
        """The search that runs, and the one behind it."""
        return [each for each in self._all if isinstance(each, Search)]

    def request(self, cache: Cache, cause: Cause, request: Request, tickets: Iterable[Ticket]) -> Asked:
        """Ask for a pass that begins after now: a search for the request's prefixes, or else a sweep of the cache.

        A large transaction comes in batches, each of which may ask: one sweep that has begun since it was committed
        does for all of them.

        Returns:
            What tells when it is over.
        """
        name = "" if request.prefixes else cache.name
        sweeps = bool(request.xid) and not request.prefixes
        if sweeps and self._over.get(name, {}).get(request.round) == request.commit_lsn:
            for ticket in tickets:
                self._resolve(ticket)
            done = Asked(cache)
            done.finish()
            return done
        running = self._running.get(name)
        joins = running is None or not running.begun
        if running is not None and sweeps:
            joins |= running.of(cache).newest.get(request.round) == request.commit_lsn
        queue = self._running if joins else self._waiting
        wanted = queue.get(name)
        if wanted is None:
            wanted = queue[name] = Search() if request.prefixes else Sweep(cache)
        asked = wanted.of(cache)
        size = asked.add(cause, request)
        for ticket in tickets:
            asked.hold(ticket, self._resolve)
        if isinstance(wanted, Search):
            wanted.size += size
            while wanted.size > self._most:
                self._widen(wanted)
            if not wanted.asked:
                del queue[name]
        return asked

    def _widen(self, search: Search) -> None:
        """Trade the prefixes of the cache with the most of them for a sweep."""
        sizes = {name: asked.size for name, asked in search.asked.items()}
        asked = search.asked.pop(max(sizes, key=sizes.__getitem__))
        search.size -= sizes[asked.cache.name]
        for request in asked.requests.values():
            request.prefixes = {}
        self._request_again(asked)

    def restart(self) -> None:
        """Begin all again, on another connection; those that waited behind a pass join it."""
        waiting, self._waiting = self._waiting, {}
        self._over.clear()
        for each in self._running.values():
            each.restart()
        for each in waiting.values():
            for asked in each.asked.values():
                self._request_again(asked)

    def _request_again(self, asked: Asked) -> None:
        tickets: Iterable[Ticket] = asked.tickets
        for cause, request in asked.requests.items():
            asked.finish(self.request(asked.cache, cause, request, tickets))
            tickets = ()

    def end(self) -> None:
        """Note that no pass goes on, since nobody takes its steps any more."""
        for each in self._all:
            for asked in each.asked.values():
                asked.finish()

    def let_go(self, resolve: Callable[[Ticket], None]) -> set[str]:
        """Hold no position back any longer; return the caches whose passes did. They go on."""
        caches = set()
        for asked in [asked for each in self._all for asked in each.asked.values()]:
            held = [ticket for ticket in asked.tickets if ticket.below < lsn.NEVER]
            if held:
                caches.add(asked.cache.name)
                asked.tickets = [ticket for ticket in asked.tickets if ticket.below == lsn.NEVER]
                for ticket in held:
                    resolve(ticket)
        return caches

    def patience(self) -> float:
        """Return the seconds until the next step may be taken."""
        return 0.0 if self.hurry else max(0.0, self._next_at - time.monotonic())

    async def step(self, server: CacheServer) -> tuple[list[Pass], list[Denied]]:
        """Take one step of each that runs, if the pace allows; return those that are over, and what is denied.

        Raises:
            errors.RedisUnavailable: nothing of this step counts; they begin again on the next connection.
        """
        over = []
        for name, each in list(self._running.items()):
            now = time.monotonic()
            if now < self._next_at and not self.hurry:
                break
            if self._rate and not self.hurry:
                self._next_at = max(now - 1, self._next_at) + self._count / self._rate
            if not each.begun:
                # Also so early, since it may take long; and a missing right shows before all of Redis is searched.
                await self._tell(server, each)
            if await each.step(server, self._count):
                await self._tell(server, each)
                over.append(name)
            else:
                if isinstance(each, Search):
                    each.log_long()
                if now - each.logged_at > PROGRESS_SECONDS:
                    await each.log_progress(server)
            if isinstance(each, Search):
                self._metrics.searched.inc(self._count)
            else:
                self._metrics.swept.labels(name).inc(self._count)
            # Its turn comes again after the others'.
            self._running[name] = self._running.pop(name)
        denied: list[Denied] = []
        for each in self._running.values():
            denied += each.denied
            each.denied = []
        for asked, _ in denied:
            asked.finish()
        done = [self._running.pop(name) for name in over]
        for name in over:
            if name in self._waiting:
                self._running[name] = self._waiting.pop(name)
        for each in done:
            for asked in each.asked.values():
                asked.finish()
            if isinstance(each, Search):
                each.log_over()
                self._metrics.search_passes.inc()
            elif isinstance(each, Sweep):
                self._over[each.cache.name] = each.of(each.cache).newest
        return done, denied

    async def _tell(self, server: CacheServer, each: Pass) -> None:
        """Tell others of the caches of a pass that have `publish`."""
        for asked in list(each.asked.values()) if self._messages else ():
            last = max(asked.requests.values(), key=lambda request: request.commit_lsn)
            messages = self._messages.of_pass(asked.cache, asked.prefixes, last.commit_lsn, last.committed_at)
            denied = await server.publish([(message.channel, message.payload) for message in messages])
            self._metrics.messages.labels(asked.cache.name).inc(0 if denied else len(messages))
            each.unless_denied(asked, next(iter(denied.values()), None))

    @property
    def status(self) -> dict[str, Any]:
        """What /status shows of searches: those that run and wait, and how many keys the running one has looked at."""
        return {
            "prefixes": sum(search.prefixes for search in self.searches),
            "caches": sorted({name for search in self.searches for name in search.asked}),
            "scanned": sum(search.scanned for search in self.searches),
        }

    @property
    def progress(self) -> list[dict[str, Any]]:
        """How far those are that run.

        ``scanned``: of ``passes`` times ``all_keys``, which is ``None`` at first; ``busted``: keys busted so far.
        """
        return [
            {
                "what": each.action,
                "caches": sorted(each.asked),
                "passes": each.passes,
                "scanned": each.scanned,
                "all_keys": each.all_keys,
                "busted": sum(asked.keys for asked in each.asked.values()),
            }
            for each in self._running.values()
        ]

    def show(self) -> None:
        """Show in the metrics what runs and waits."""
        self._metrics.sweeps_running.set(len(self))
        self._metrics.search_prefixes.set(sum(search.prefixes for search in self.searches))
