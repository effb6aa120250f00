"""One stream from the slot: open it, run it until it fails or must stop, throw it away.

Once opened, the slot is ours, and a `Position` says where the stream goes on, which apply compares with the watermark
in Redis. Then the tasks run: receive, apply, confirm, watch, alarm and standbys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import receive
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.pipeline.continuity import Kept
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.followup import PostgresView
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import ManualBusts
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import Slot
from cdc_invalidator.postgres.snapshot import Snapshots
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.postgres.tables import Tables
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.redis.watermark import Position
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.watch import Watch, show

_log = structlog.get_logger()

# How often a daemon on standby checks whether the leader is gone.
STANDBY_SECONDS = 0.25
# How long the walsender may take to notice that we are gone, before the slot can be dropped.
GIVE_UP_SECONDS = 10.0
# SIGTERM: what is not applied within this time is received again at the next start.
DRAIN_SECONDS = 1.5
FAREWELL_SECONDS = 0.3

Role = Literal["connecting", "leader", "standby"]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The settings that a session needs."""

    postgres_dsn: str
    redis: Endpoint
    event_stream: str
    slot: str
    publication: str
    sweep_gaps: bool
    sweep_rate: int
    max_retained_wal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """All that is open once the slot is ours."""

    slot: Slot
    publication: Publication
    tables: Tables
    snapshots: Snapshots
    replication: Replication
    system_id: str
    checkpoint: Checkpoint
    apply: Apply


class Session:
    """One attempt to stream; the next attempt makes a new session. Call `close` in the end, however far it came.

    Args:
        options: where to connect.
        rules: what to bust.
        metrics: what to count.
        events: where busts are recorded.
        be: is called with the role while this daemon does not lead.
        lead: is called with all that is open, once the slot is ours.
        recent: the busts applied lately; kept across sessions.
        standbys: the standbys that busts wait for.
        strict: refuse rules that this database can't keep; otherwise keep those that it can.
        unsettled: the tables whose changes may be only partly in the stream; kept across sessions.
    """

    def __init__(
        self,
        options: SessionOptions,
        rules: RuleSet,
        metrics: Metrics,
        events: Events,
        be: Callable[[Role], None],
        lead: Callable[[Opened], None],
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
        self._lead = lead
        self._recent = recent
        self._standbys = standbys
        self._strict = strict
        self._unsettled = unsettled
        self._queries = Queries(
            options.postgres_dsn,
            asked=lambda rule: metrics.queries.labels(rule).inc(),
            failed=lambda rule: metrics.rule_errors.labels(rule).inc(),
        )
        self._tasks: list[asyncio.Task[Any]] = []
        # Closed in reverse order: the stream first.
        self._connections = ExitStack()
        self._connections.callback(self._queries.close)
        self._connections.callback(standbys.close)
        self.backlog = Backlog()
        # Returns the tables of rules whose changes are not in the stream: they don't exist, or can't be published.
        self.unpublished: Callable[[], list[Table]] = list

    async def run(self, stop: asyncio.Event) -> None:
        """Open, stream until told to stop, drain.

        Raises:
            errors.Retryable: the stream failed; make another session.
            errors.InvalidatorError: another one would fail too.
        """
        stopping = self._start(_wait(stop), "stop")
        opening = self._start(self._open(), "open")
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            await self._stream(opening.result(), stopping)

    async def _stream(self, opened: Opened, stopping: asyncio.Task[None]) -> None:
        receiver = receive.Receive(
            opened.replication,
            opened.publication,
            Invalidation(self._rules),
            ManualBusts(self._rules),
            lambda: opened.tables.survey,
            backlog=self.backlog,
            checkpoint=opened.checkpoint,
            metrics=self._metrics,
        )
        watch = Watch(
            opened.slot,
            opened.tables,
            opened.snapshots,
            opened.apply,
            walsender_pid=opened.replication.backend_pid,
            max_retained_wal=self._options.max_retained_wal,
            metrics=self._metrics,
        )
        receiving = self._start(receiver.run(), "receive")
        applying = self._start(opened.apply.run(), "apply")
        confirming = self._start(
            receive.confirm(opened.replication, opened.checkpoint, self._metrics, opened.snapshots.written), "confirm"
        )
        watching = self._start(watch.run(), "watch")
        alarm = self._start(watch.alarm(), "alarm")
        following = self._start(self._follow(opened), "standbys")
        done, _ = await asyncio.wait(
            {receiving, applying, confirming, watching, alarm, following, stopping},
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in done:
            task.result()
        receiving.cancel()
        opened.apply.finish()
        await asyncio.wait({applying}, timeout=DRAIN_SECONDS)
        if applying.done():
            applying.result()
        else:
            _log.warning("not_drained", error="Not all was busted in time; the next start receives the rest again.")
        await self._farewell(opened.replication, opened.checkpoint, receiving)

    def _start(self, work: Coroutine[None, None, Value], name: str) -> asyncio.Task[Value]:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        return task

    async def _follow(self, opened: Opened) -> None:
        await self._standbys.run(
            system_id=opened.system_id,
            position=lambda: opened.checkpoint.position,
            received=lambda: opened.checkpoint.received_lsn,
            wake=self.backlog.wake,
        )

    async def close(self) -> None:
        """Close the connections and end the tasks, however far the session came."""
        # Connections first: a task cancelled in the middle of a query would wait for the server.
        self._connections.close()
        # Cancelled until they end: before Python 3.12, asyncio.wait_for swallows a cancellation that comes while it
        # returns, and the Redis driver uses it.
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.1)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self) -> Opened:
        options = self._options
        connection = await connect(options.postgres_dsn, "cdc-invalidator catalogs")
        self._connections.callback(connection.pgconn.finish)
        self._metrics.postgres_up.set(1)
        slot = Slot(connection, options.slot)
        publication = Publication(connection, options.publication)
        tables = Tables(connection, publication, self._rules, strict=self._strict, unsettled=self._unsettled)
        self.unpublished = lambda: tables.unseen
        new_slot, added = await self._have_slot(slot, tables)
        snapshots = await Snapshots.open(options.postgres_dsn)
        self._connections.callback(snapshots.close)
        replication = await Replication.open(options.postgres_dsn)
        self._connections.callback(replication.close)
        system = await replication.identify()
        await replication.start(options.slot, options.publication)
        # From here on the slot is ours: nobody else moves it.
        state = await slot.state()
        if state is None:
            raise errors.PostgresUnavailable(f"Slot {options.slot} is gone; it is made anew.")
        gap = await tables.settled(added, snapshots)
        checkpoint = Checkpoint(state.confirmed)
        position = Position(
            system_id=system.system_id,
            timeline=system.timeline,
            start=state.confirmed,
            flushed=max(system.flushed, state.confirmed),
            new_slot=new_slot,
        )
        apply = Apply(
            lambda: cache_server(options.redis, options.slot),
            PostgresView(snapshots.hidden, self._queries, self._standbys),
            Kept(self._rules, tables.digests(), position),
            backlog=self.backlog,
            checkpoint=checkpoint,
            recent=self._recent,
            sweep_gaps=options.sweep_gaps,
            sweep_rate=options.sweep_rate,
            metrics=self._metrics,
            events=self._events,
        )
        apply.gap(gap)
        opened = Opened(
            slot=slot,
            publication=publication,
            tables=tables,
            snapshots=snapshots,
            replication=replication,
            system_id=system.system_id,
            checkpoint=checkpoint,
            apply=apply,
        )
        self._metrics.postgres_connects.inc()
        self._lead(opened)
        _log.info("streaming", slot=options.slot, start=lsn.text(state.confirmed), timeline=system.timeline)
        return opened

    async def _have_slot(self, slot: Slot, tables: Tables) -> tuple[bool, list[Table]]:
        """Wait until nobody streams from the slot, and create it if needed.

        Returns:
            Whether it is new, and the published tables whose changes may be only partly in the stream.
        """
        server = await slot.server()
        while True:
            before, survey = await tables.publish()
            # A daemon on standby may publish a table long before it leads.
            self._unsettled.update(survey.published_since(before))
            state = await slot.state()
            show(state, self._metrics)
            if state is None or not state.active:
                break
            # When it is our turn, this survey may be hours old: make a new one then.
            await self._stand_by(slot)
        statements = slot.statements(state, server, new_publication=not before.exists)
        if statements:
            # A slot holds WAL back: don't create it before Redis is there to take the busts.
            await self._redis_there()
            await tables.set_up(statements)
            # Creating a slot waits for all running transactions: from here on the stream is complete.
            self._unsettled.clear()
        return bool(statements), [table for table in survey.published if table in self._unsettled]

    async def _stand_by(self, slot: Slot) -> None:
        self._be("standby")
        while True:
            await asyncio.sleep(STANDBY_SECONDS)
            state = await slot.state()
            show(state, self._metrics)
            if state is None or not state.active:
                return

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

    async def give_up(self, reason: errors.PositionGivenUp) -> None:
        """Drop the slot, so that PostgreSQL can remove its WAL; the next session creates a new one and sweeps.

        Call `close` first.
        """
        connection = await connect(self._options.postgres_dsn, "cdc-invalidator catalogs")
        try:
            slot = Slot(connection, self._options.slot)
            await slot.drop_soon(GIVE_UP_SECONDS)
        except errors.SlotInUse:
            # Another daemon took it over before we could drop it, and leads now.
            return
        finally:
            await connection.close()
        caches = sorted(self._rules.caches)
        self._events.gap("position_given_up", caches, swept=False, level="error", error=str(reason))

    async def _farewell(self, replication: Replication, checkpoint: Checkpoint, receiving: asyncio.Task[None]) -> None:
        """Confirm what is applied, so that the next daemon does not apply it again."""
        await asyncio.wait({receiving})
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                replication.status(checkpoint.confirmable, checkpoint.received_lsn)
                await replication.finish()
        except (errors.Retryable, TimeoutError) as error:
            _log.warning("not_confirmed", error=str(error) or "PostgreSQL did not answer in time.")


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
