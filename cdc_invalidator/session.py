"""One stream from the slot: opened, run until it fails or is told to stop, thrown away.

Opening ends with the slot being ours and with a `Position`: where the stream goes on, which apply compares with what
Redis has had. Then the named tasks run: receive, apply, confirm, and watch, which looks after the slot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import receive
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import ManualBusts
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import ServerInfo, Slot, SlotState
from cdc_invalidator.postgres.snapshot import Snapshots
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.postgres.tables import Tables
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.redis.watermark import Position
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

_log = structlog.get_logger()

# How often a standby looks whether the leader is gone, and how often the leader looks at its slot.
STANDBY_SECONDS = 0.25
WATCH_SECONDS = 3.0
# A server that has not answered for so long is not going to; statements of ours end sooner by themselves.
SILENCE_SECONDS = 60.0
# A Redis that is away for so long while WAL piles up has its position given up.
AWAY_SECONDS = 2.0
# How long the walsender may take to notice that we are gone.
GIVE_UP_SECONDS = 10.0
# SIGTERM: what has been received is applied within this time, or is received again at the next start.
DRAIN_SECONDS = 1.5
FAREWELL_SECONDS = 0.3

Role = Literal["connecting", "leader", "standby"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Where the servers are, and what is ours there."""

    postgres_dsn: str
    redis: Endpoint
    event_stream: str
    slot: str
    publication: str
    sweep_gaps: bool
    sweep_rate: int
    max_retained_wal: int


class Session:
    """Made anew for each attempt; holds all that an attempt holds.

    Args:
        options: where to connect.
        rules: what to bust.
        metrics: what to count.
        events: where busts are told.
        be: is told the role.
        recent: remembers what was applied, across sessions.
        standbys: the standbys that busts wait for.
        strict: refuse rules that this database can't keep; else keep those that it can.
        unsettled: remembers, across sessions, the tables that may be in the stream with only a part of their changes.
    """

    def __init__(
        self,
        options: SessionOptions,
        rules: RuleSet,
        metrics: Metrics,
        events: Events,
        be: Callable[[Role], None],
        *,
        recent: Recent,
        standbys: Standbys,
        strict: bool,
        unsettled: set[Table],
    ) -> None:
        self._options = options
        self._rules = rules
        self._metrics = metrics
        self._events = events
        self._be = be
        self._recent = recent
        self._standbys = standbys
        self._strict = strict
        self._unsettled = unsettled
        self._system_id = ""
        self._queries = Queries(options.postgres_dsn, metrics)
        self._watched_at = 0.0
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._slot: Slot | None = None
        self._publication: Publication | None = None
        self._tables: Tables | None = None
        self._snapshots: Snapshots | None = None
        self._replication: Replication | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.backlog = Backlog()
        self.checkpoint: Checkpoint | None = None
        self.apply: Apply | None = None

    @property
    def unpublished(self) -> list[Table]:
        """Tables of rules whose changes are not seen: they don't exist, or can't be published."""
        return self._tables.unseen if self._tables else []

    async def run(self, stop: asyncio.Event) -> None:
        """Open, stream until told to stop, drain.

        Raises:
            errors.Retryable: the stream failed; make another session.
            errors.InvalidatorError: another one would fail as well.
        """
        stopping = self._start(_wait(stop), "stop")
        opening = self._start(self._open(), "open")
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            return
        opening.result()
        assert self._slot is not None
        assert self._publication is not None
        assert self._tables is not None
        assert self._replication is not None
        assert self._snapshots is not None
        assert self.apply is not None
        assert self.checkpoint is not None
        tables = self._tables
        receiver = receive.Receive(
            self._replication,
            self._publication,
            Invalidation(self._rules),
            ManualBusts(self._rules),
            lambda: tables.survey,
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            metrics=self._metrics,
        )
        receiving = self._start(receiver.run(), "receive")
        applying = self._start(self.apply.run(), "apply")
        confirming = self._start(
            receive.confirm(self._replication, self.checkpoint, self._metrics, self._snapshots.written), "confirm"
        )
        self._watched_at = time.monotonic()
        watching = self._start(self._watch(self._slot, self._tables, self.apply), "watch")
        alarm = self._start(self._alarm(), "alarm")
        following = self._start(self._follow(self.checkpoint), "standbys")
        done, _ = await asyncio.wait(
            {receiving, applying, confirming, watching, alarm, following, stopping},
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in done:
            task.result()
        receiving.cancel()
        self.apply.finish()
        await asyncio.wait({applying}, timeout=DRAIN_SECONDS)
        if applying.done():
            applying.result()
        else:
            _log.warning("not_drained", error="Not all was busted in time; the next start receives the rest again.")
        await self._farewell(self._replication, self.checkpoint, receiving)

    def _start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        return task

    async def _follow(self, checkpoint: Checkpoint) -> None:
        await self._standbys.run(
            system_id=self._system_id,
            position=lambda: checkpoint.position,
            received=lambda: checkpoint.received_lsn,
            wake=self.backlog.wake,
        )

    async def close(self) -> None:
        """End everything that the session began."""
        # Connections first: a task that is cancelled in the middle of a query would wait for the server.
        if self._replication is not None:
            self._replication.close()
        if self._connection is not None:
            self._connection.pgconn.finish()
        if self._snapshots is not None:
            self._snapshots.close()
        self._standbys.close()
        self._queries.close()
        # Told again until they end: before Python 3.12, asyncio.wait_for swallows a cancellation that comes while it
        # returns, and the driver of Redis uses it.
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.1)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self) -> None:
        options = self._options
        connection = self._connection = await connect(options.postgres_dsn, "cdc-invalidator catalogs")
        self._metrics.postgres_up.set(1)
        slot = self._slot = Slot(connection, options.slot)
        publication = self._publication = Publication(connection, options.publication)
        tables = self._tables = Tables(
            connection, publication, self._rules, strict=self._strict, unsettled=self._unsettled
        )
        server = await slot.server()
        while True:
            before, survey = await tables.publish()
            # Who stands by may publish long before it leads.
            self._unsettled.update(survey.published_since(before))
            state = await slot.state()
            self._show(state)
            if state is None or not state.active:
                break
            # What the catalogs said may be hours old once it is our turn: they are asked again then.
            await self._stand_by(slot)
        new_slot = await self._streamable(slot, state, server, new_publication=not before.exists)
        if new_slot:
            # Making a slot waits for all transactions, so that nothing is left to settle.
            self._unsettled.clear()
        added = [table for table in survey.published if table in self._unsettled]
        snapshots = self._snapshots = await Snapshots.open(options.postgres_dsn)
        replication = self._replication = await Replication.open(options.postgres_dsn)
        system = await replication.identify()
        self._system_id = system.system_id
        await replication.start(options.slot, options.publication)
        # From here on the slot is ours: nobody else moves it.
        state = await slot.state()
        if state is None:
            raise errors.PostgresUnavailable(f"Slot {options.slot} is gone; it is made anew.")
        gap = await tables.settled(added, snapshots)
        self.checkpoint = Checkpoint(state.confirmed)
        self.apply = Apply(
            lambda: cache_server(options.redis, options.slot),
            snapshots.hidden,
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            recent=self._recent,
            standbys=self._standbys,
            queries=self._queries,
            rules=self._rules,
            digests=tables.digests(),
            position=Position(
                system_id=system.system_id,
                timeline=system.timeline,
                start=state.confirmed,
                flushed=max(system.flushed, state.confirmed),
                new_slot=new_slot,
            ),
            sweep_gaps=options.sweep_gaps,
            sweep_rate=options.sweep_rate,
            metrics=self._metrics,
            events=self._events,
        )
        self.apply.gap(gap)
        self._metrics.postgres_connects.inc()
        self._be("leader")
        _log.info("streaming", slot=options.slot, start=lsn.text(state.confirmed), timeline=system.timeline)

    async def _stand_by(self, slot: Slot) -> None:
        self._be("standby")
        while True:
            await asyncio.sleep(STANDBY_SECONDS)
            state = await slot.state()
            self._show(state)
            if state is None or not state.active:
                return

    async def _streamable(
        self, slot: Slot, state: SlotState | None, server: ServerInfo, *, new_publication: bool
    ) -> bool:
        """Make the slot if there is none, or anew if it can't be streamed from; True if it is new."""
        statements = slot.statements(state, server, new_publication=new_publication)
        if not statements:
            return False
        # A slot holds WAL back: none is made for a Redis that is not there to take the busts.
        await self._redis_there()
        assert self._tables is not None
        await self._tables.set_up(statements)
        return True

    async def _redis_there(self) -> None:
        backoff = Backoff()
        while True:
            server = cache_server(self._options.redis, self._options.slot)
            try:
                await server.connect()
            except errors.RedisUnavailable as error:
                delay = backoff.next()
                _log.warning("slot_waits_for_redis", error=str(error), retry_in_s=round(delay, 2))
                await asyncio.sleep(delay)
            else:
                return
            finally:
                await server.close()

    # Watch: what happens to slot, publication and tables while we stream.

    async def _watch(self, slot: Slot, tables: Tables, apply: Apply) -> None:
        assert self._replication is not None
        tables.relent()
        while True:
            state = await slot.state()
            if state is None or state.active_pid != self._replication.backend_pid:
                # Our walsender is gone, whether we have heard of it or not; somebody else may lead by now.
                raise errors.PostgresUnavailable(f"Slot {self._options.slot} is not ours any more.")
            self._show(state)
            if state.retained > self._options.max_retained_wal and _long_ago(apply.away_since):
                raise errors.PositionGivenUp
            apply.hurry(much_wal=state.retained > self._options.max_retained_wal)
            activity = await slot.activity()
            self._metrics.database_commits.set(activity.commits)
            self._metrics.database_rollbacks.set(activity.rollbacks)
            await self._look_at(tables, apply)
            self._metrics.watches.inc()
            self._watched_at = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)

    async def _alarm(self) -> None:
        """End the session when the watch has not come round for long: the server is frozen, or the network deaf."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if time.monotonic() - self._watched_at > SILENCE_SECONDS:
                raise errors.PostgresUnavailable(f"PostgreSQL has not answered for {SILENCE_SECONDS:.0f} s.")

    async def _look_at(self, tables: Tables, apply: Apply) -> None:
        assert self._snapshots is not None
        before = tables.digests()
        broken = await tables.look(self._snapshots, sweeping=apply.sweeps_a_gap)
        digests = tables.digests()
        if broken or digests != before:
            apply.redigest(digests, broken)

    def _show(self, state: SlotState | None) -> None:
        self._metrics.slot_wal_status.clear()
        if state is None:
            self._metrics.slot_active.set(0)
            self._metrics.retained_wal.set(0)
        else:
            self._metrics.slot_active.set(state.active)
            self._metrics.retained_wal.set(state.retained)
            self._metrics.slot_wal_status.labels(state.wal_status).set(1)

    async def give_up(self, reason: errors.PositionGivenUp) -> None:
        """Drop the slot, so that PostgreSQL may drop the WAL: the next session makes a new one and sweeps.

        Call it after `close`.
        """
        connection = await connect(self._options.postgres_dsn, "cdc-invalidator catalogs")
        try:
            slot = Slot(connection, self._options.slot)
            await slot.drop_soon(GIVE_UP_SECONDS)
        except errors.SlotInUse:
            # A standby took it over before we could drop it: it is the leader's now.
            return
        finally:
            await connection.close()
        caches = sorted(self._rules.caches)
        self._events.gap("position_given_up", caches, swept=False, level="error", error=str(reason))

    async def _farewell(self, replication: Replication, checkpoint: Checkpoint, receiving: asyncio.Task[None]) -> None:
        """Confirm what is applied, so that the next daemon need not apply it again."""
        await asyncio.wait({receiving})
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                replication.status(checkpoint.confirmable, checkpoint.received_lsn)
                await replication.finish()
        except (errors.Retryable, TimeoutError) as error:
            _log.warning("not_confirmed", error=str(error) or "PostgreSQL did not answer in time.")


def _long_ago(since: float | None) -> bool:
    return since is not None and time.monotonic() - since > AWAY_SECONDS


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
