"""The apply task: takes what has piled up, busts it in Redis, records the watermark. Only this task talks to Redis.

A turn is: take, flush, bust again what was too early, one step of the sweeps that run, watermark. Whatever fails on
Redis's side, the connection is thrown away and the same turn is tried again on a new one; a bust may be applied twice,
which does no harm. Retries for Redis live here and nowhere else.

What Redis has acknowledged it may have lost when it comes back. So at each connection its watermark is compared with
what was applied: what it lacks is re-applied from `Recent`, or the caches are swept.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.again import Again, Waiting
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.debounce import Debounce
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.sweep import Cause, Request, Sweep, Sweeps
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.server import BustReply, CacheServer
from cdc_invalidator.redis.watermark import Position, Watermark, gaps
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.rules.packed import Pair

_log = structlog.get_logger()

# Keys a flush: many enough to pay for the round trip, few enough that the watermark keeps moving.
FLUSH_WEIGHT = 10_000
# The watermark moves at least once a second; the rest is for the round trip.
HEARTBEAT_SECONDS = 0.8
INFO_SECONDS = 10.0
# No WAL reaches it.
_NEVER = 2**64 - 1


class Apply:
    """Applies batches to one Redis, in order.

    Args:
        open_server: makes a `CacheServer` that is not connected yet.
        hidden: tells which of some committed transactions readers can't see yet.
        backlog: where batches come from.
        checkpoint: is told what is resolved and recorded.
        recent: remembers what was applied.
        standbys: the standbys that busts wait for.
        queries: what `via` asks.
        rules: the rule set, for the digests in the watermark and the sweeps of gaps.
        position: where the stream goes on.
        digests: for each cache that the stream keeps, what the watermark says of its rules.
        sweep_gaps: False to only report gaps (``CDC_ON_GAP=warn``).
        sweep_rate: how many keys a second sweeps may look at; 0 for as many as there are.
        metrics: what to count.
        events: where busts are logged.
    """

    def __init__(
        self,
        open_server: Callable[[], CacheServer],
        hidden: Callable[[Iterable[int]], Awaitable[set[int]]],
        *,
        backlog: Backlog,
        checkpoint: Checkpoint,
        recent: Recent,
        standbys: Standbys,
        queries: Queries,
        rules: RuleSet,
        position: Position,
        digests: Mapping[str, str],
        sweep_gaps: bool,
        sweep_rate: int,
        metrics: Metrics,
        events: Events,
    ) -> None:
        self._open_server = open_server
        self._hidden = hidden
        self._backlog = backlog
        self._checkpoint = checkpoint
        self._recent = recent
        self._standbys = standbys
        self._queries = queries
        self._rules = rules
        self._digests = digests
        self._position = position
        self._sweep_gaps = sweep_gaps
        self._metrics = metrics
        self._events = events
        self._backoff = Backoff()
        self._server: CacheServer | None = None
        self._sweeps = Sweeps(metrics, rate=sweep_rate)
        self._asks_again = any(cache.again_after for cache in rules.caches.values())
        self._again = Again(self._resolve)
        self._keeps_stale = any(cache.stale_for for cache in rules.caches.values())
        self._debounces = any(rule.debounce for rule in rules.rules)
        self._debounce = Debounce(self._resolve)
        # In the hands of this turn until Redis has acknowledged them.
        self._taken: list[tuple[Batch | PlainBatch, Ticket]] = []
        self._due: list[tuple[str, Waiting]] = []
        # Acknowledged by Redis at that time (Unix, in µs), and not in the events yet.
        self._unlogged: deque[tuple[list[BustEvent], BustReply, int, int]] = deque()
        # Applied before, and lost by a Redis that came back older.
        self._to_reapply: deque[Batch | PlainBatch] = deque()
        # Sweeps because of gaps: not taken yet, and not over yet.
        self._queued: list[tuple[Batch, Ticket]] = []
        self._gaps: set[Ticket] = set()
        self._early_backoff = Backoff(first=0.002, most=0.1)
        self._replay_until = 0
        self._recorded: int | None = None
        self._recorded_at = float("-inf")
        self._written_ms = 0
        self.recorded_at: float | None = None
        self._watermark_refused = False
        self._info_at = float("-inf")
        self._info_refused = False
        self._finishing = False
        self.last_error: str | None = None
        self.away_since: float | None = None
        recent.begin((position.system_id, position.timeline), position.start)

    @property
    def drained(self) -> bool:
        """True when all that was put is in Redis, and the watermark says so."""
        return self._recordable and self._checkpoint.idle and self._checkpoint.position == self._recorded

    @property
    def sweeps_a_gap(self) -> bool:
        """Whether the sweep of a gap holds the watermark back."""
        return bool(self._gaps)

    def hurry(self, *, much_wal: bool) -> None:
        """Note whether PostgreSQL keeps more WAL than it may: then nothing holds the position back that need not."""
        if much_wal and self._again.unreplayed is not None:
            self._standbys.relent(self._again.unreplayed.due, "the slot holds more than CDC_MAX_RETAINED_WAL")
        if much_wal and self._sweeps and not self._sweeps.hurry:
            _log.warning("sweeps_hurry", error="The slot holds more than CDC_MAX_RETAINED_WAL; CDC_SWEEP_RATE is left.")
        self._sweeps.hurry = much_wal

    def finish(self) -> None:
        """Let `run` end as soon as all that was put is in Redis."""
        self._finishing = True
        self._backlog.wake()

    async def run(self) -> None:
        """Apply until cancelled, or until finished and drained."""
        try:
            while not (self._finishing and self.drained):
                await self._turn()
        finally:
            self._log_due()
            await self._close()

    async def _turn(self) -> None:
        try:
            server = self._server or await self._connect()
            await self._events.room()
            if self._to_reapply:
                await self._reapply_some(server)
            if not self._taken:
                self._taken = await self._take()
            if self._taken:
                await self._flush(server)
                self._taken = []
            if self._again or self._due:
                await self._bust_again(server)
            else:
                self._standbys.rest()
            if self._standbys.returned():
                self.gap(dict.fromkeys(self._digests, "standby_returned"))
            if self._sweeps:
                self._finish(await self._sweeps.step(server))
            if not self._backlog or self._events.stream is not None:
                self._log_due()
            if self._events.stream is not None:
                await self._events.stream.write(server)
            await self._record(server)
            await self._inform(server)
        except errors.RedisUnavailable as error:
            self._log_due()
            await self._lost(error)
            return
        self._backoff.reset()
        self.last_error = self.away_since = None
        await self._backlog.wait(self._patience())

    async def _take(self) -> list[tuple[Batch | PlainBatch, Ticket]]:
        taken = self._backlog.take(FLUSH_WEIGHT)
        if self._debounces:
            now = time.monotonic()
            self._debounce.hold(taken, now)
            xids = self._debounce.xids(now)
            taken += self._debounce.due(now, await self._hidden(xids) if xids else ())
        queued, self._queued = self._queued, []
        return queued + taken

    async def _connect(self) -> CacheServer:
        server = self._open_server()
        try:
            await server.connect()
            found = await server.read_watermarks()
        except BaseException:
            await server.close()
            raise
        self._server = server
        self._metrics.redis_connects.inc()
        self._metrics.redis_up.set(1)
        _log.info("redis_connected")
        self._prove(found)
        self._sweeps.restart()
        return server

    async def _lost(self, error: errors.RedisUnavailable) -> None:
        await self._close()
        self._metrics.redis_errors.labels(error.code).inc()
        self.last_error = str(error)
        self.away_since = self.away_since or time.monotonic()
        delay = self._backoff.next()
        tell = _log.error if error.report else _log.warning
        tell("redis_unavailable", error=str(error), code=error.code, retry_in_s=round(delay, 2))
        await asyncio.sleep(delay)

    async def _close(self) -> None:
        self._metrics.redis_up.set(0)
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()

    # Gaps: is this Redis the one that has had all busts?

    def _prove(self, found: Sequence[Watermark | None]) -> None:
        position = self._position
        if self._recorded is not None:
            # The stream has been going: this Redis must have had what was recorded, and can't have had more than
            # what was received.
            flushed = max(position.flushed, self._checkpoint.received_lsn)
            position = replace(position, start=self._recorded, flushed=flushed, new_slot=False)
        broken: dict[str, str] = {}
        lowest = _NEVER
        for watermark in found:
            broken |= self._broken(watermark, position)
            lowest = min(lowest, watermark.lsn if watermark else 0)
        self._written_ms = max(self._written_ms, *(watermark.at for watermark in found if watermark), 0)
        if self._recorded is None:
            self._replay_until = lowest
            if all(found):
                # How old it is is known before it is written again.
                self._show(*(min(times) / 1000 for times in zip(*((m.at, m.as_of) for m in found if m), strict=True)))
        self._to_reapply.clear()
        # Where all is swept anyway, nothing need be re-applied.
        if not (self._sweep_gaps and broken.keys() >= self._digests.keys()):
            self._to_reapply.extend(self._recent.since(lowest))
        if self._to_reapply and lowest < position.start:
            caches = sorted({target.cache.name for batch in self._to_reapply for target in batch.targets})
            self._events.gap("redis_behind", caches, swept=False, lsn=lsn.text(lowest))
        if broken:
            self.gap(broken)

    def _broken(self, watermark: Watermark | None, position: Position) -> dict[str, str]:
        if watermark is None:
            self._standbys.recall(None)
        else:
            if self._recorded is not None and (watermark.lsn > position.flushed or watermark.at > self._written_ms):
                raise errors.Superseded
            if self._standbys.recall(watermark.standbys):
                return dict.fromkeys(self._digests, "standby_removed")
            if self._recent.reaches(watermark.lsn):
                position = replace(position, start=min(position.start, watermark.lsn))
            elif self._recorded is not None:
                # What was acknowledged after the watermark may be lost as well.
                position = replace(position, start=max(position.start, watermark.lsn + 1))
        return gaps(watermark, position, self._digests)

    async def _reapply_some(self, server: CacheServer) -> None:
        """Apply a part of what Redis has lost; the watermark waits until it has had all of it."""
        some, weight = [], 0
        for batch in self._to_reapply:
            some.append(batch)
            weight += batch.weight
            if weight >= FLUSH_WEIGHT:
                break
        self._log_later(*await self._bust(server, some), _NEVER)
        self._metrics.reapplied.inc(sum(len(batch.xids) for batch in some))
        for batch in some:
            self._to_reapply.popleft()
            self._sweep_for_gap("redis_behind", {target.cache for target, busts in batch.busts.items() if busts.sweep})

    def redigest(self, digests: Mapping[str, str], broken: Mapping[str, str]) -> None:
        """Take other digests, after sweeping the caches that this is a gap for."""
        # The watermark is not written before the sweeps are over: a crash until then finds the old digests, and sweeps.
        self._digests = digests
        self.gap(broken)

    def gap(self, broken: Mapping[str, str]) -> None:
        """Sweep caches whose changes may have been missed; ``broken`` is from a cache's name to the reason."""
        for reason in sorted(set(broken.values())):
            caches = sorted(name for name, why in broken.items() if why == reason)
            self._events.gap(reason, caches, swept=self._sweep_gaps, lsn=lsn.text(self._position.start))
            if self._sweep_gaps:
                self._sweep_for_gap(reason, [self._rules.caches[name] for name in caches])

    def _sweep_for_gap(self, why: str, caches: Iterable[Cache]) -> None:
        """Let one more batch go down the data path, which sweeps these caches for all that has been received."""
        # Before the end of that, as commits are.
        batch = Batch(max(self._position.flushed, self._checkpoint.received_lsn) - 1, None, 0)
        for cache in caches:
            batch.sweep(Target("", cache, ""), (why,), "gap")
        if not batch.busts:
            return
        ticket = self._checkpoint.track()
        # Until it is done, the watermark must not say that this Redis has had anything.
        self._gaps.add(ticket)
        self._queued.append((batch, ticket))
        self._backlog.wake()

    def _resolve(self, ticket: Ticket) -> None:
        self._checkpoint.resolve(ticket)
        if not ticket.parts:
            self._gaps.discard(ticket)

    # Flush: one round trip for all that has piled up.

    async def _flush(self, server: CacheServer) -> None:
        hidden = await self._hidden([xid for batch, _ in self._taken for xid in batch.xids])
        if hidden or self._standbys.awaited:
            # At once what this turn has in hand, for when it is tried again.
            self._taken = list(_by_transaction(self._taken))
        taken = self._taken
        batches = [batch for batch, _ in taken]
        # A query asks for what can be seen: of what is hidden it is asked later.
        await self._queries.derive(
            batch for batch in batches if not isinstance(batch, PlainBatch) and batch.xid not in hidden
        )
        self._log_later(*await self._bust(server, batches), self._replay_until)
        now = time.monotonic()
        for batch, ticket in taken:
            self._recent.note(batch)
            if isinstance(batch, PlainBatch):
                pass
            elif batch.xid in hidden:
                # Its sweeps, and all that is counted from when readers see it, begin then.
                self._again.until_visible(batch, ticket, now)
            else:
                self._follow_up(batch, ticket, "first", now)
            self._resolve(ticket)
        self._metrics.backlog.set(self._backlog.weight)

    async def _bust_again(self, server: CacheServer) -> None:
        if not self._due:
            hidden = await self._hidden(self._again.hidden) if self._again.hidden else set()
            now = time.monotonic()
            self._due = list(self._again.ready(hidden.__contains__, self._standbys.replayed, now))
            waits = self._again.unreplayed
            if waits is None:
                self._standbys.rest()
            else:
                self._standbys.want()
                self._standbys.overdue(waits.since, waits.due)
        if not self._due:
            return
        self._early_backoff.reset()
        batches = [waiting.batch for _, waiting in self._due]
        await self._queries.derive(batches)
        events, reply = await self._bust(server, batches)
        visible = {each.batch.commit_lsn for reason, each in self._due if reason == "visible"}
        self._log_derived(events, reply, visible)
        now = time.monotonic()
        for reason, waiting in self._due:
            self._metrics.again.labels(reason).inc()
            self._follow_up(waiting.batch, waiting.ticket, reason, now)
            self._resolve(waiting.ticket)
        self._due = []

    def _log_derived(self, events: Iterable[BustEvent], reply: BustReply, visible: Container[int]) -> None:
        """Tell the busts that a query gave only now, because its transaction was not visible before."""
        existed = iter(reply.existed)
        derived, counts = [], []
        for event in events:
            count = next(existed) if event.action == "delete" else None
            if event.target.query is not None and event.commit_lsn in visible:
                derived.append(event)
                counts += [] if count is None else [count]
        if derived:
            self._log_later(derived, BustReply(counts, reply.versions), self._replay_until)

    def _follow_up(self, batch: Batch, ticket: Ticket, bust: str, now: float) -> None:
        """Begin what a bust leads to: its sweeps, and the busts that come after it."""
        self._request_sweeps(batch, ticket)
        if bust in {"first", "visible"} and self._standbys.awaited:
            self._again.until_replayed(batch, ticket, now)
        if bust != "again_after" and self._asks_again:
            self._again.until_later(batch, ticket, now)

    async def _bust(
        self, server: CacheServer, batches: Iterable[Batch | PlainBatch]
    ) -> tuple[list[BustEvent], BustReply]:
        """Bust all keys of some batches, and give the events to be and what Redis answered."""
        events = [event for batch in batches for event in batch.events()]
        pairs = [event for event in events if event.target.pairs and event.action == "delete"]
        if pairs:
            events = await _name_versions(server, events, pairs)
        deletes = [event.keys for event in events if event.action == "delete"]
        bumps = {
            key: event.target.cache.version_ttl for event in events if event.action == "bump" for key in event.keys
        }
        graces: dict[bytes, int] = {}
        for event in events if self._keeps_stale else ():
            if event.target.cache.stale_for is not None:
                graces |= dict.fromkeys(event.keys, event.target.cache.stale_for)
        busting = asyncio.create_task(server.bust(deletes, bumps, graces), name="bust")
        try:
            # Once it is on its way, there is time to tell the one before.
            await asyncio.sleep(0)
            self._log_due()
            return events, await busting
        finally:
            # Where this was broken off; nobody would ask it for its reply.
            busting.cancel()

    def _log_later(self, events: list[BustEvent], reply: BustReply, replay_until: int) -> None:
        self._unlogged.append((events, reply, replay_until, time.time_ns() // 1000))

    def _log_due(self) -> None:
        while self._unlogged:
            self._events.busted(*self._unlogged.popleft())
        if self._recorded is not None:
            self._checkpoint.record(self._recorded)

    def _request_sweeps(self, batch: Batch, ticket: Ticket) -> None:
        for target, busts in batch.busts.items():
            if busts.sweep:
                ticket.parts += 1
                cause = Cause(target.rule, target.table, ",".join(busts.ops), busts.reason)
                request = Request(batch.commit_lsn, batch.xid or None, batch.committed_at)
                self._sweeps.request(target.cache, cause, request, ticket)
        self._metrics.sweeps_running.set(len(self._sweeps))

    def _finish(self, over: Iterable[Sweep]) -> None:
        for sweep in over:
            self._events.swept(sweep)
            for ticket in sweep.tickets:
                self._resolve(ticket)
        self._metrics.sweeps_running.set(len(self._sweeps))

    # Watermark and metrics.

    @property
    def _recordable(self) -> bool:
        return not self._gaps and not self._to_reapply

    async def _record(self, server: CacheServer) -> None:
        if not self._recordable:
            return
        position = self._checkpoint.position
        now = time.monotonic()
        if position == self._recorded and now - self._recorded_at < HEARTBEAT_SECONDS:
            return
        at = time.time()
        as_of = self._checkpoint.as_of
        at_ms = int(at * 1000)
        # Also of a write that fails: some servers may have it.
        self._written_ms = max(self._written_ms, at_ms)
        stored = await server.write_watermark(
            Watermark(
                lsn=position,
                at=at_ms,
                system_id=self._position.system_id,
                timeline=self._position.timeline,
                rules=self._digests,
                standbys=self._standbys.known,
                as_of=as_of,
            )
        )
        if stored:
            self.recorded_at = at
            self._metrics.watermark_lsn.set(position)
            self._show(at, as_of / 1000)
        elif not self._watermark_refused:
            _log.warning("watermark_stalled", error="Redis is out of memory; busts go on, and a restart will sweep.")
        self._watermark_refused = not stored
        self._metrics.watermark_stalled.set(not stored)
        self._recorded, self._recorded_at = position, now
        self._recent.recorded(position)
        if not self._unlogged:
            # Else once they are logged: after a crash nobody would be sent again what was confirmed.
            self._checkpoint.record(position)

    def _show(self, at: float, as_of: float) -> None:
        self._metrics.watermark_at.set(at)
        if as_of:
            self._metrics.watermark_as_of.set(as_of)

    def _patience(self) -> float:
        """Seconds until there is something to do though nothing is put."""
        if self._to_reapply or self._queued:
            return 0.0
        if self._finishing and self._recordable and self._checkpoint.idle:
            # Nothing comes any more: what is left is to record the position, and to end.
            return 0.0
        now = time.monotonic()
        patience = HEARTBEAT_SECONDS - (now - self._recorded_at) if self._recordable else HEARTBEAT_SECONDS
        if self._again.hidden:
            patience = min(patience, self._early_backoff.next())
        for due in (self._again.next_due(), self._debounce.next_due()):
            if due is not None:
                patience = min(patience, due - now)
        patience = max(0.001, patience)
        return min(patience, self._sweeps.patience()) if self._sweeps else patience

    async def _inform(self, server: CacheServer) -> None:
        if time.monotonic() - self._info_at < INFO_SECONDS:
            return
        self._info_at = time.monotonic()
        info = await server.info()
        if info is None:
            if not self._info_refused:
                _log.warning("info_refused", error="Redis refuses INFO; grant it to see hits, misses and memory.")
            self._info_refused = True
            return
        self._metrics.redis_hits.set(info["keyspace_hits"])
        self._metrics.redis_misses.set(info["keyspace_misses"])
        self._metrics.redis_evicted.set(info["evicted_keys"])
        self._metrics.redis_expired.set(info["expired_keys"])
        self._metrics.redis_memory.set(info["used_memory"])


async def _name_versions(
    server: CacheServer, events: Iterable[BustEvent], pairs: Iterable[BustEvent]
) -> list[BustEvent]:
    """Name the keys under the versions that caches with `bump_over` have now; what has no version has no key.

    A version that is bumped in between makes those keys unreachable, which serves as well.

    Args:
        server: knows the versions.
        events: all of a flush.
        pairs: those among them whose keys are to be named.
    """
    split = {id(event): [Pair.split(key) for key in event.keys] for event in pairs}
    counters = list(dict.fromkeys(pair.version for found in split.values() for pair in found))
    versions = dict(zip(counters, await server.versions(counters), strict=True))
    named = []
    for event in events:
        found = split.get(id(event))
        if found is None:
            named.append(event)
        elif keys := [pair.key(version) for pair in found if (version := versions[pair.version]) is not None]:
            named.append(event._replace(keys=keys))
    return named


def _by_transaction(taken: Iterable[tuple[Batch | PlainBatch, Ticket]]) -> Iterable[tuple[Batch, Ticket]]:
    """Give each transaction of a PlainBatch by itself, since what comes after its bust may differ."""
    for batch, ticket in taken:
        if isinstance(batch, PlainBatch):
            batches = batch.batches()
            ticket.parts += len(batches) - 1
            yield from ((each, ticket) for each in batches)
        else:
            yield batch, ticket
