"""The apply task: takes what has piled up, busts it in Redis, records the watermark. Only this task talks to Redis.

A turn is: take, flush, flush again what readers could not see yet, one step of the sweeps that run, watermark.
Whatever fails on Redis's side, the connection is thrown away and the same turn is tried again on a new one; a bust may
be applied twice, which does no harm. Retries for Redis live here and nowhere else.

What has been acknowledged is proven only by a watermark that covers it: a Redis that comes back may be an older one. So
where the connection is lost in between, `errors.RedisLost` ends the session, and PostgreSQL sends it all again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backlog import Backlog
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.cache import CacheServer, Outcome
from cdc_invalidator.checkpoint import Checkpoint, Ticket
from cdc_invalidator.events import Events, Line, lines_of
from cdc_invalidator.invalidation import Batch
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.rules import RuleSet
from cdc_invalidator.sweep import Cause, Request, Sweep, Sweeps
from cdc_invalidator.watermark import Position, Watermark, gaps

_log = structlog.get_logger()

# Keys a flush: many enough to pay for the round trip, few enough that the watermark keeps moving.
FLUSH_WEIGHT = 10_000
# The watermark moves at least once a second; the rest is for the round trip.
HEARTBEAT_SECONDS = 0.8
INFO_SECONDS = 10.0


class Apply:
    """Applies batches to one Redis, in order.

    Args:
        open_server: makes a `CacheServer` that is not connected yet.
        hidden: tells which of some committed transactions readers can't see yet.
        backlog: where batches come from.
        checkpoint: is told what is resolved and recorded.
        rules: the rule set, for the digests in the watermark and the sweeps of gaps.
        position: where the stream goes on.
        digests: for each cache that the stream keeps, what the watermark says of its rules.
        sweep_gaps: False to only report gaps (``CDC_ON_GAP=warn``).
        away_since: since when Redis is away, by the monotonic clock; ``None`` if it was not away.
        metrics: what to count.
        events: where busts are told.
    """

    def __init__(
        self,
        open_server: Callable[[], CacheServer],
        hidden: Callable[[Iterable[int]], Awaitable[set[int]]],
        *,
        backlog: Backlog,
        checkpoint: Checkpoint,
        rules: RuleSet,
        position: Position,
        digests: Mapping[str, str],
        sweep_gaps: bool,
        away_since: float | None = None,
        metrics: Metrics,
        events: Events,
    ) -> None:
        self._open_server = open_server
        self._hidden = hidden
        self._backlog = backlog
        self._checkpoint = checkpoint
        self._rules = rules
        self._digests = digests
        self._position = position
        self._sweep_gaps = sweep_gaps
        self._metrics = metrics
        self._events = events
        self._backoff = Backoff()
        self._server: CacheServer | None = None
        self._sweeps = Sweeps()
        self._taken: list[tuple[Batch, Ticket]] = []
        # Busted, but to be busted again once readers see the commit.
        self._early: list[tuple[Batch, Ticket]] = []
        self._open_gaps = 0
        # Whether something has been acknowledged that the watermark does not cover yet.
        self._unrecorded = False
        self._early_backoff = Backoff(first=0.002, most=0.1)
        self._replay_until = 0
        self._recorded: int | None = None
        self._recorded_at = float("-inf")
        self.recorded_at: float | None = None
        self._watermark_refused = False
        self._info_at = float("-inf")
        self._info_refused = False
        self._finishing = False
        self.last_error: str | None = None
        self.away_since = away_since

    @property
    def drained(self) -> bool:
        """True when all that was put is in Redis, and the watermark says so."""
        return self._checkpoint.idle and not self._open_gaps and self._checkpoint.position == self._recorded

    @property
    def sweeps_a_gap(self) -> bool:
        """Whether the sweep of a gap holds the watermark back."""
        return self._open_gaps > 0

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
            await self._close()

    async def _turn(self) -> None:
        try:
            server = self._server or await self._connect()
            await self._events.room()
            if not self._taken:
                self._taken = self._backlog.take(FLUSH_WEIGHT)
            if self._taken:
                await self._flush(server, self._taken)
                self._taken = []
            if self._early:
                await self._flush_again(server)
            if self._sweeps:
                self._finish(await self._sweeps.step(server))
            await self._record(server)
            await self._inform(server)
        except errors.RedisUnavailable as error:
            await self._lost(error)
            return
        self._backoff.reset()
        await self._backlog.wait(self._patience())

    async def _connect(self) -> CacheServer:
        server = self._open_server()
        try:
            await server.connect()
            found = await server.read_watermark()
        except errors.RedisUnavailable:
            await server.close()
            raise
        self._server = server
        self._metrics.redis_connects.inc()
        self._metrics.redis_up.set(1)
        _log.info("redis_connected")
        self._prove(found)
        self._sweeps.restart()
        self.last_error = self.away_since = None
        return server

    async def _lost(self, error: errors.RedisUnavailable) -> None:
        await self._close()
        cause = type(error.__cause__ or error).__name__
        self._metrics.redis_errors.labels(cause).inc()
        self.last_error = str(error)
        self.away_since = self.away_since or time.monotonic()
        if self._unrecorded:
            raise errors.RedisLost(f"{error} What it has acknowledged lately is received and applied again.") from error
        delay = self._backoff.next()
        _log.warning("redis_unavailable", error=str(error), retry_in_s=round(delay, 2))
        await asyncio.sleep(delay)

    async def _close(self) -> None:
        self._metrics.redis_up.set(0)
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()

    # Gaps: is this Redis the one that has had all busts?

    def _prove(self, found: Watermark | None) -> None:
        if self._recorded is None:
            position = self._position
            if found is not None:
                self._replay_until = found.lsn
        else:
            # The stream has been going: this Redis must have had what was recorded, and can't have had more than
            # what was received.
            flushed = max(self._position.flushed, self._checkpoint.received_lsn)
            position = replace(self._position, start=self._recorded, flushed=flushed, new_slot=False)
        broken = gaps(found, position, self._digests)
        if broken:
            self.gap(broken)

    def redigest(self, digests: Mapping[str, str], broken: Mapping[str, str]) -> None:
        """Take other digests, after sweeping the caches that this is a gap for."""
        # The watermark is not written before the sweeps are over: a crash until then finds the old digests, and sweeps.
        self._digests = digests
        self.gap(broken)

    def gap(self, broken: Mapping[str, str]) -> None:
        """Sweep caches whose changes may have been missed; ``broken`` is from a cache's name to the reason."""
        for reason in sorted(set(broken.values())):
            caches = sorted(name for name, why in broken.items() if why == reason)
            self._metrics.gaps.labels(reason).inc()
            _log.warning(
                "gap", reason=reason, caches=caches, swept=self._sweep_gaps, lsn=lsn.text(self._position.start)
            )
            for name in caches if self._sweep_gaps else ():
                self._sweep_gap(name, reason)
        self._backlog.wake()

    def _sweep_gap(self, name: str, why: str) -> None:
        # Until the sweep is over, the watermark must not say that this Redis has had anything.
        self._open_gaps += 1
        self._sweeps.request(
            self._rules.caches[name],
            Cause("", "", why, "gap"),
            Request(self._position.start, None, None),
            self._checkpoint.track(),
        )

    # Flush: one round trip for all that has piled up.

    async def _flush(self, server: CacheServer, taken: Sequence[tuple[Batch, Ticket]]) -> None:
        hidden = await self._hidden({batch.xid for batch, _ in taken if batch.xid})
        self._unrecorded = True
        lines = [line for batch, _ in taken for line in lines_of(batch)]
        self._events.busted(lines, await _bust(server, lines), self._replay_until)
        for batch, ticket in taken:
            if batch.xid in hidden:
                self._early.append((batch, ticket))
            else:
                self._request_sweeps(batch, ticket)
                self._checkpoint.resolve(ticket)
        self._metrics.backlog.set(self._backlog.weight)

    async def _flush_again(self, server: CacheServer) -> None:
        hidden = await self._hidden({batch.xid for batch, _ in self._early})
        visible = [(batch, ticket) for batch, ticket in self._early if batch.xid not in hidden]
        if not visible:
            return
        self._early_backoff.reset()
        await _bust(server, [line for batch, _ in visible for line in lines_of(batch)])
        self._early = [item for item in self._early if item[0].xid in hidden]
        self._metrics.again.inc(len(visible))
        for batch, ticket in visible:
            self._request_sweeps(batch, ticket)
            self._checkpoint.resolve(ticket)

    def _request_sweeps(self, batch: Batch, ticket: Ticket) -> None:
        for target, busts in batch.busts.items():
            if busts.sweep:
                ticket.parts += 1
                cause = Cause(target.rule, target.table, ",".join(busts.ops), busts.reason)
                request = Request(batch.commit_lsn, batch.xid, batch.committed_at)
                self._sweeps.request(target.cache, cause, request, ticket)
        self._metrics.sweeps_running.set(len(self._sweeps))

    def _finish(self, over: Iterable[Sweep]) -> None:
        for sweep in over:
            self._events.swept(sweep)
            self._open_gaps -= sum(
                request.transactions for cause, request in sweep.requests.items() if cause.reason == "gap"
            )
            for ticket in sweep.tickets:
                self._checkpoint.resolve(ticket)
        self._metrics.sweeps_running.set(len(self._sweeps))

    # Watermark and metrics.

    async def _record(self, server: CacheServer) -> None:
        if self._open_gaps:
            return
        position = self._checkpoint.position
        now = time.monotonic()
        if position == self._recorded and now - self._recorded_at < HEARTBEAT_SECONDS:
            return
        at = time.time()
        stored = await server.write_watermark(
            Watermark(
                lsn=position,
                at=int(at * 1000),
                system_id=self._position.system_id,
                timeline=self._position.timeline,
                rules=self._digests,
            )
        )
        if stored:
            self.recorded_at = at
            self._metrics.watermark_lsn.set(position)
            self._metrics.watermark_at.set(at)
        elif not self._watermark_refused:
            _log.warning("watermark_stalled", error="Redis is out of memory; busts go on, and a restart will sweep.")
        self._watermark_refused = not stored
        # With nothing held back, the position has passed all that was acknowledged.
        self._unrecorded = self._unrecorded and not (stored and not self._sweeps and not self._early)
        self._recorded, self._recorded_at = position, now
        self._checkpoint.record(position)

    def _patience(self) -> float:
        """Seconds until there is something to do though nothing is put."""
        if self._sweeps:
            return 0.0
        if self._early:
            return self._early_backoff.next()
        return max(0.001, HEARTBEAT_SECONDS - (time.monotonic() - self._recorded_at))

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


async def _bust(server: CacheServer, lines: Sequence[Line]) -> Outcome:
    deletes = [line.keys for line in lines if line.target.cache.version is None]
    bumps = {key: line.target.cache.version_ttl for line in lines if line.target.cache.version for key in line.keys}
    return await server.bust(deletes, bumps)
