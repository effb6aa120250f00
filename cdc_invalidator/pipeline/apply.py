"""The apply task: takes what has piled up, busts it in Redis, records the watermark.

A turn is: re-apply what Redis has lost, take, flush, bust again what was too early, one step of the sweeps that run,
watermark, gaps. The rule that holds here: whatever fails on Redis's side, the same turn is tried again on a new
connection; a bust may be applied twice, which does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import record
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.continuity import Continuity, Kept
from cdc_invalidator.pipeline.debounce import Debounce
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.flush import Flush
from cdc_invalidator.pipeline.followup import FollowUps, PostgresView
from cdc_invalidator.pipeline.gaps import Gaps, GapTicket
from cdc_invalidator.pipeline.inspection import Inspection
from cdc_invalidator.pipeline.lineage import Lineage
from cdc_invalidator.pipeline.messages import Messages
from cdc_invalidator.pipeline.progress import Progress
from cdc_invalidator.pipeline.record import WatermarkRecord
from cdc_invalidator.pipeline.redis_connection import RedisConnection
from cdc_invalidator.pipeline.sweep import SweepOptions, Sweeps
from cdc_invalidator.redis.info import InfoMetrics
from cdc_invalidator.redis.occupied import refuse_occupied
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.rules.agreement import Agreement
from cdc_invalidator.trouble import Trouble

# Keys a flush: many enough to pay for the round trip, few enough that the watermark keeps moving.
FLUSH_WEIGHT = 10_000


class Apply:
    """Applies batches to one Redis, in order.

    Args:
        open_server: makes a `CacheServer` that is not connected yet.
        postgres: says what readers see.
        kept: what the stream keeps up to date.
        backlog: where batches come from.
        checkpoint: is told what is resolved and recorded.
        suspicious: another deployment may write the watermark, see `refuse_occupied`.
        sweeps: how caches are swept.
        metrics: what to count.
        events: where busts are logged.
        inspection: looks at what was busted, or would have been.
    """

    def __init__(
        self,
        open_server: Callable[[], CacheServer],
        postgres: PostgresView,
        kept: Kept,
        *,
        backlog: Backlog,
        checkpoint: Checkpoint,
        suspicious: bool,
        sweeps: SweepOptions,
        metrics: Metrics,
        events: Events,
        inspection: Inspection,
    ) -> None:
        self.redis = RedisConnection(open_server, metrics)
        self.progress = Progress()
        # Who asks PostgreSQL does not wait for Redis meanwhile.
        postgres = replace(
            postgres,
            hidden=self.progress.of_postgres(postgres.hidden),
            horizon=self.progress.of_postgres(postgres.horizon),
            reached=self.progress.of_postgres(postgres.reached),
        )
        self.record = WatermarkRecord(checkpoint, metrics)
        self._postgres = postgres
        self._backlog = backlog
        self._checkpoint = checkpoint
        self._recent = kept.recent
        self._metrics = metrics
        self._events = events
        self._inspection = inspection
        inspection.show(kept.rules)
        self._flush = Flush(events, self.record, kept.rules, denied=self._denied)
        # The end of what PostgreSQL had written at the start, or has sent since.
        received: Callable[[], int] = lambda: max(kept.position.flushed, checkpoint.received_lsn)  # noqa: E731
        self._gaps = Gaps(
            kept.rules,
            events,
            metrics,
            postgres.standbys,
            since=kept.position.start,
            received=received,
            enabled=sweeps.gaps,
        )
        resolve = self._resolve
        self._lineage = Lineage()
        self._continuity = Continuity(
            kept,
            self._gaps,
            self.record,
            received=received,
            standbys=postgres.standbys,
            lineage=self._lineage,
        )
        self._follow_ups = FollowUps(
            postgres,
            self._flush,
            Sweeps(metrics, resolve, Messages(kept.rules.kept.values()), rate=sweeps.rate),
            rules=kept.rules,
            resolve=resolve,
            grown=kept.recent.grown,
            denied=self._denied,
            events=events,
            metrics=metrics,
        )
        for cache in kept.rules.kept.values():
            if cache.publish is not None:
                metrics.messages.labels(cache.name)
        self._debounce = Debounce(resolve) if any(rule.debounce for rule in kept.rules.rules) else None
        self._info = InfoMetrics(metrics)
        # In the hands of this turn until Redis has acknowledged them.
        self._taken: list[tuple[Batch | PlainBatch, Ticket]] = []
        self._finishing = False
        self._system_id = kept.position.system_id
        self._suspicious = suspicious

    @property
    def drained(self) -> bool:
        """Whether everything from the backlog is in Redis, and the watermark says so; gaps may still be open."""
        recorded = self.record.current and not self._gaps.must_write
        return self._continuity.proven and self._checkpoint.idle and recorded

    @property
    def sweeping(self) -> set[str]:
        """The caches with a sweep of a gap that is not over."""
        return self._gaps.sweeping

    @property
    def left_out(self) -> dict[str, str]:
        """The caches that the watermark leaves out because of a gap, and the reason."""
        return self._gaps.reasons

    @property
    def sweeps(self) -> list[dict[str, Any]]:
        """How far the running sweeps and searches are, see `Sweeps.progress`."""
        return self._follow_ups.sweeps.progress

    @property
    def searches(self) -> dict[str, Any]:
        """What /status shows of searches."""
        return self._follow_ups.sweeps.status

    def hurry(self, *, much_wal: bool) -> None:
        """Note whether PostgreSQL keeps more WAL than it may; if so, hold the position back only where it must be."""
        self._follow_ups.hurry(much_wal=much_wal)
        self._events.hurry(much_wal=much_wal)

    def let_go(self) -> set[str]:
        """Let the position move on past sweeps, and past what is to be busted again; return the caches concerned.

        They are a gap: the watermark does not name them until all that is over, and they are swept again.
        """
        caches = self._follow_ups.let_go()
        if caches and self._gaps.enabled:
            self._gaps.report(dict.fromkeys(caches, "retained_wal"))
        elif caches:
            # Nothing was missed that somebody else could be told to sweep for: it has only been put off.
            self._gaps.sweep(dict.fromkeys(caches, "retained_wal"))
        self._backlog.wake()
        return caches

    def gap(self, broken: Mapping[str, str]) -> None:
        """Sweep caches whose changes may have been missed; ``broken`` is from a cache's name to the reason."""
        self._gaps.report(broken)
        self._backlog.wake()

    def redigest(self, digests: Mapping[str, str], agreement: Agreement | None, broken: Mapping[str, str]) -> None:
        """Take other digests, and what readers are told; sweep the caches that this is a gap for."""
        # In one go: a watermark that is written in between would name a cache by its new digest before it is swept.
        self._continuity.redigest(digests, agreement)
        self.gap(broken)

    @property
    def denied(self) -> dict[str, Trouble]:
        """The caches whose busts or sweep Redis denies, and why."""
        return self._gaps.denied

    def _denied(self, denied: Mapping[str, errors.RedisUnavailable]) -> None:
        self._gaps.deny(denied, time.monotonic())

    def blocked(self, patience: float) -> Trouble | None:
        """Return what holds up the busts, if it has done so for that many seconds."""
        seconds = self.progress.blocked_for
        if seconds < patience:
            return None
        asked, waits_for = self._postgres.queries.asked_now, self.progress.waits_for
        if asked is not None:
            text = f"Busts wait for the `via` query of {asked}: give it an index, or narrow it down."
        elif waits_for == "postgres":
            text = "Busts wait for PostgreSQL to say what readers see; look for its sessions in pg_stat_activity."
        elif waits_for == "output":
            text = "Busts wait for who reads standard output; look at the log driver."
        elif self.redis.trouble is not None:
            text = self.redis.trouble.text
        else:
            text = "Redis answers too slowly; check CDC_REDIS_URL and the server."
        return Trouble.now(text, ago=seconds)

    @property
    def without_redis(self) -> bool:
        """Whether it is Redis that the busts wait for."""
        return self._postgres.queries.asked_now is None and self.progress.waits_for == "redis"

    def finish(self) -> None:
        """Let `run` end as soon as everything from the backlog is in Redis."""
        self._finishing = True
        self._backlog.wake()

    async def run(self) -> None:
        """Apply until cancelled, or until finished and drained."""
        try:
            while not (self._finishing and self.drained):
                await self._turn()
        finally:
            self._follow_ups.sweeps.end()
            self._flush.log_due()
            await self.redis.close()

    async def _turn(self) -> None:
        try:
            server = self.redis.server or await self._connect()
            with self.progress.waiting("output"):
                await self._events.room()
            if self._continuity.must_reapply:
                await self._reapply(server)
            if not self._taken:
                self._taken = await self._take()
            if self._taken:
                await self._bust(server)
                self._taken = []
            await self._follow_ups.bust_again(server, self._continuity.replay_until, self._gaps.unreplayed)
            if self._postgres.standbys.returned():
                self._continuity.all_broken("standby_returned")
            await self._follow_ups.sweep(server)
            await self._inspection.step(server, self._bust_once_more)
            if not self._backlog or self._events.stream is not None:
                self._flush.log_due()
            if self._events.stream is not None:
                await self._events.stream.write(server)
            await self._record(server)
            await self._close_gaps()
            await self._info.show(server)
        except errors.RedisUnavailable as error:
            self._flush.log_due()
            await self.redis.lost(error)
            return
        self.redis.works()
        self.progress.turned()
        await self._backlog.wait(self._patience())

    async def _connect(self) -> CacheServer:
        server, found = await self.redis.open()
        self._inspection.connected()
        self._continuity.prove(
            await refuse_occupied(server, found, self._system_id, suspicious=self._suspicious),
        )
        self._follow_ups.sweeps.restart()
        return server

    async def _reapply(self, server: CacheServer) -> None:
        """Apply a part of what Redis has lost; the watermark waits until it has had all of it."""
        some = self._continuity.next_to_reapply(FLUSH_WEIGHT)
        self._flush.log_later(*await self._flush.bust(server, some))
        self._metrics.reapplied.inc(sum(len(batch.xids) for batch in some))
        self._continuity.reapplied(some)

    async def _take(self) -> list[tuple[Batch | PlainBatch, Ticket]]:
        taken = self._backlog.take(FLUSH_WEIGHT)
        all_taken = 0 if self._backlog else self._checkpoint.received_lsn
        if self._lineage.differs([batch for batch, _ in taken], all_taken):
            self._lineage.trust()
            self._continuity.all_broken("other_history")
        if self._debounce is not None:
            now = time.monotonic()
            self._debounce.hold(taken, now)
            xids = self._debounce.xids(now)
            taken += self._debounce.due(now, await self._postgres.hidden(xids) if xids else ())
        return self._gaps.take() + taken + self._postgres.queries.late()

    async def _bust(self, server: CacheServer) -> None:
        """Bust what was taken, in one flush, and begin what that leads to."""
        hidden = await self._postgres.hidden([xid for batch, _ in self._taken for xid in batch.xids])
        if hidden or self._postgres.standbys.awaited:
            # Stored first, so that a second attempt of this turn does not split it again.
            self._taken = list(_by_transaction(self._taken))
        taken = self._taken
        batches = [batch for batch, _ in taken]
        # A query sees only what is visible; for hidden transactions it is asked later.
        await self._postgres.queries.derive(
            (batch.bust, batch, ticket)
            for batch, ticket in taken
            if not isinstance(batch, PlainBatch) and batch.xid not in hidden
        )
        events, reply = await self._flush.bust(server, batches, self._inspection.choose)
        self._flush.log_later(events, reply, self._continuity.replay_until)
        now = time.monotonic()
        for batch, ticket in taken:
            self._recent.note(batch)
            if isinstance(batch, PlainBatch):
                pass
            elif batch.xid in hidden:
                # Its sweeps and follow-ups begin when readers see it.
                self._follow_ups.until_visible(batch, ticket, now)
            else:
                self._follow_ups.begin(batch, ticket, "gap" if isinstance(ticket, GapTicket) else batch.bust, now)
            self._resolve(ticket)
        self._inspection.swept(
            target.cache.name
            for batch in batches
            for target, busts in batch.busts.items()
            if busts.sweep or busts.prefixes(target)
        )
        self._inspection.begin(reply.looks, taken, now)
        self._metrics.backlog.set(self._backlog.weight)

    async def _bust_once_more(self, server: CacheServer, batches: list[PlainBatch]) -> None:
        self._flush.log_later(*await self._flush.bust(server, batches, named=True))

    async def _record(self, server: CacheServer) -> None:
        if not self._continuity.proven:
            return
        # A gap that is found while it is being written is not in it.
        left_out = list(self._gaps.reasons)
        if await self.record.write(server, self._continuity.watermark, must=self._gaps.must_write):
            self._gaps.written(left_out)
            self._continuity.recorded()
            self._flush.confirm()

    async def _close_gaps(self) -> None:
        """Begin the gaps that the watermark leaves out, and go on with those that wait for transactions."""
        gaps = self._gaps.to_begin
        if gaps:
            self._gaps.begin(gaps, await self._postgres.horizon())
        due = self._gaps.asks_in(time.monotonic())
        if due is not None and due <= 0:
            horizon = await self._postgres.horizon()
            reached = await self._postgres.reached() if self._postgres.standbys.awaited else 0
            self._gaps.settle(horizon, reached, time.monotonic())

    def _resolve(self, ticket: Ticket) -> None:
        self._checkpoint.resolve(ticket)
        self._gaps.resolve(ticket)

    def _patience(self) -> float:
        """Return how many seconds to wait if nothing comes in."""
        if self._continuity.must_reapply or self._gaps.queued:
            return 0.0
        if self._gaps.must_write and self._continuity.proven:
            return 0.0
        if self._finishing and self._continuity.proven and self._checkpoint.idle:
            # Nothing more comes: only the position has to be recorded.
            return 0.0
        now = time.monotonic()
        patience = self.record.due_in(now) if self._continuity.proven else record.HEARTBEAT_SECONDS
        patience = self._follow_ups.patience(patience, now)
        due = self._debounce.next_due() if self._debounce is not None else None
        patience = patience if due is None else min(patience, due - now)
        looks = self._inspection.due_in(now)
        patience = patience if looks is None else min(patience, looks)
        asks = self._gaps.asks_in(now)
        patience = max(0.001, patience if asks is None else min(patience, asks))
        sweeps = self._follow_ups.sweeps
        return min(patience, sweeps.patience()) if sweeps else patience


def _by_transaction(taken: Iterable[tuple[Batch | PlainBatch, Ticket]]) -> Iterable[tuple[Batch, Ticket]]:
    """Split each PlainBatch into transactions, since what follows their busts may differ."""
    for batch, ticket in taken:
        if isinstance(batch, PlainBatch):
            batches = batch.batches()
            ticket.parts += len(batches) - 1
            yield from ((each, ticket) for each in batches)
        else:
            yield batch, ticket
