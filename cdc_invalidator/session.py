"""One stream from the slot: open it, run it until it fails or must stop, throw it away.

Once opened, the slot is ours, and a `Position` says where the stream goes on, which apply compares with the watermark
in Redis. Then the tasks run: receive, apply, confirm, watch, alarm and standbys.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
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
from cdc_invalidator.pipeline.inspection import Inspection
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import ManualBusts
from cdc_invalidator.pipeline.progress import Progress
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.sweep import SweepOptions
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.offers import Offers
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import READERS_UNKNOWN, ServerInfo, Slot
from cdc_invalidator.postgres.snapshot import Horizon, Snapshots
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.postgres.tables import Tables
from cdc_invalidator.redis.fitness import Fitness
from cdc_invalidator.redis.occupied import refuse_occupied
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.watermark import Position
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.trouble import Trouble
from cdc_invalidator.watch import Watch, show

_log = structlog.get_logger()

# How often a daemon on standby checks whether the leader is gone.
STANDBY_SECONDS = 0.25
# How old what another daemon says of itself may be; how often a leader looks whether its busts get on, and after how
# many seconds without it shows that they don't.
OFFER_SECONDS = 8.0
PROGRESS_SECONDS = 0.5
HELD_UP_SECONDS = 2.0
# How long a leader that is held up has for one more attempt, once another daemon says that Redis answers it: Redis may
# have come back for all.
LAST_ATTEMPT_SECONDS = 2.0
# How long the walsender may take to notice that we are gone, before the slot can be dropped.
GIVE_UP_SECONDS = 10.0
# How long the walsender of our last session may take to end.
OUTLIVE_SECONDS = 10.0
# Making a slot waits for running transactions: how often that is looked at, and how long it may take.
MAKE_WATCH_SECONDS = 3.0
MAKE_SECONDS = 3600.0
# SIGTERM: what is not applied within this time is received again at the next start.
DRAIN_SECONDS = 1.5
TELL_SECONDS = 1.0
FAREWELL_SECONDS = 0.3

Role = Literal["connecting", "leader", "standby"]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The settings that a session needs."""

    postgres_dsn: DsnSource
    postgres_readers: DsnSource | None
    redis: EndpointSource
    event_stream: str
    slot: str
    publication: str
    sweeps: SweepOptions
    max_retained_wal: int
    handover_seconds: float
    observe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """All that is open once the slot is ours."""

    slot: Slot
    offers: Offers
    publication: Publication
    tables: Tables
    snapshots: Snapshots
    replication: Replication
    system_id: str
    checkpoint: Checkpoint
    apply: Apply

    @property
    def progress(self) -> Progress:
        """Whether the busts get on."""
        return self.apply.progress


class Session:
    """One attempt to stream; the next attempt makes a new session. Call `close` in the end, however far it came.

    Args:
        options: where to connect.
        open_server: makes a `CacheServer` that is not connected yet.
        rules: what to bust.
        metrics: what to count.
        events: where busts are recorded.
        be: is called with the role while this daemon does not lead.
        lead: is called with all that is open, once the slot is ours.
        fitness: whether Redis takes busts, while this daemon stands by; kept across sessions.
        recent: the busts applied lately; kept across sessions.
        standbys: the standbys that busts wait for.
        inspection: looks at what was busted, or would have been; kept across sessions.
        suspicious: another deployment may write the watermark.
        strict: refuse rules that this database can't keep; otherwise keep those that it can.
        former_walsender: the process id of the last session's walsender.
    """

    def __init__(
        self,
        options: SessionOptions,
        open_server: Callable[[], CacheServer],
        rules: RuleSet,
        metrics: Metrics,
        events: Events,
        be: Callable[[Role], None],
        lead: Callable[[Opened], None],
        *,
        fitness: Fitness,
        recent: Recent,
        standbys: Standbys,
        inspection: Inspection,
        suspicious: bool,
        strict: bool,
        former_walsender: int | None,
    ) -> None:
        self._options = options
        self._open_server = open_server
        self._rules = rules
        self._metrics = metrics
        self._events = events
        self._be = be
        self._lead = lead
        self._fitness = fitness
        self._recent = recent
        self._standbys = standbys
        self._inspection = inspection
        self._suspicious = suspicious
        self._strict = strict
        self._former_walsender = former_walsender
        self.backlog = Backlog()
        self._queries = Queries(
            options.postgres_dsn,
            asked=lambda rule: metrics.queries.labels(rule).inc(),
            failed=lambda rule: metrics.rule_errors.labels(rule).inc(),
            wake=self.backlog.wake,
        )
        self._tasks: list[asyncio.Task[Any]] = []
        # Closed in reverse order: the stream first.
        self._connections = ExitStack()
        self._connections.callback(self._queries.close)
        self._connections.callback(standbys.close)
        # Rules of which a condition gave up a row that was too long for it.
        self._gave_up: set[str] = set()
        # Why the slot is not made yet, or what hangs.
        self.trouble: Trouble | None = None
        # Of the rules, once they have been looked for.
        self.tables: Tables | None = None

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
        watch = Watch(
            opened.slot,
            opened.tables,
            opened.checkpoint,
            opened.apply,
            replication=opened.replication,
            tell=self._tell,
            relief=lambda: self._relief(opened.offers),
            max_retained_wal=self._options.max_retained_wal,
            metrics=self._metrics,
        )
        receiver = receive.Receive(
            opened.replication,
            opened.publication,
            Invalidation(self._rules, gave_up=self._condition_gave_up),
            ManualBusts(self._rules),
            lambda: opened.tables.survey,
            watch.look_at_tables,
            backlog=self.backlog,
            checkpoint=opened.checkpoint,
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
        giving_way = self._start(self._give_way(opened), "give way")
        done, _ = await asyncio.wait(
            {receiving, applying, confirming, watching, alarm, following, giving_way, stopping},
            return_when=asyncio.FIRST_COMPLETED,
        )
        if giving_way in done:
            # The slot is ours until then: of our busts, only those that are on their way may follow the next leader's.
            applying.cancel()
            await asyncio.wait({applying}, timeout=DRAIN_SECONDS)
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

    @property
    def slow_query(self) -> Trouble | None:
        """A `via` query that is too slow to be asked, if there is one."""
        return self._queries.trouble

    def _condition_gave_up(self, rule: str) -> None:
        """Count a row that a rule's condition is not asked for, since its values are too long; tell the first one."""
        self._metrics.rule_errors.labels(rule).inc()
        if rule not in self._gave_up:
            self._gave_up.add(rule)
            _log.warning(
                "condition_given_up",
                rule=rule,
                error="A row is too long for a `when` or `where` of the rule, and so counts; compare shorter columns.",
            )

    async def _give_way(self, opened: Opened) -> None:
        """Watch whether the busts get on; leave the slot to a daemon that could lead if Redis takes none of ours.

        It must have found so well after our last turn: where Redis is away for all, nobody does.

        Raises:
            errors.HandedOver: the slot is to be left.
        """
        patience = self._options.handover_seconds
        relieved_at: float | None = None
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            seconds = opened.progress.blocked_for
            held_up = seconds > HELD_UP_SECONDS
            self._metrics.blocked.set(seconds if held_up else 0.0)
            self._metrics.can_lead.set(seconds < patience)
            if not held_up or not opened.apply.without_redis:
                relieved_at = None
                continue
            ago, now = await opened.offers.newest(), time.monotonic()
            if ago is None or ago > min(OFFER_SECONDS, seconds - HELD_UP_SECONDS):
                relieved_at = None
            elif relieved_at is None:
                relieved_at = now
                opened.apply.redis.try_now()
            elif seconds > patience and now - relieved_at > LAST_ATTEMPT_SECONDS:
                raise errors.HandedOver

    def _tell(self, error: str | None) -> None:
        if error is not None and self.trouble is None:
            _log.warning("postgres_waits", error=error)
        self.trouble = Trouble.now(error, self.trouble) if error is not None else None

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
        spelling = await Spelling.read(connection, options.postgres_dsn)
        self._queries.spell(spelling.values)
        offers = Offers(connection, options.slot, "observe" if options.observe else "bust")
        tables = Tables(connection, publication, spelling, self._rules, strict=self._strict)
        self.tables = tables
        new_slot = await self._have_slot(slot, tables, offers)
        replication = await Replication.open(options.postgres_dsn, spelling.values)
        self._connections.callback(replication.close)
        system = await replication.identify()
        snapshots, hidden, horizon = await self._visibility(system.system_id)
        await replication.start(options.slot, options.publication)
        # From here on the slot is ours: nobody else moves it.
        await offers.say(None)
        self._fitness.leads()
        state = await slot.state()
        if state is None:
            raise errors.PostgresUnavailable(f"Slot {options.slot} is gone; it is made anew.")
        self._events.begin()
        checkpoint = Checkpoint(state.confirmed, self._events.told)
        position = Position(
            system_id=system.system_id,
            timeline=system.timeline,
            start=state.confirmed,
            flushed=max(system.flushed, state.confirmed),
            new_slot=new_slot,
            crash_free_since=await snapshots.crash_free_since(),
        )
        apply = Apply(
            self._open_server,
            PostgresView(hidden, self._queries, self._standbys, horizon, snapshots.reached),
            Kept(self._rules, tables.digests(), position, self._recent, tables.agreement),
            backlog=self.backlog,
            checkpoint=checkpoint,
            suspicious=self._suspicious,
            sweeps=options.sweeps,
            metrics=self._metrics,
            events=self._events,
            inspection=self._inspection,
        )
        opened = Opened(
            slot=slot,
            offers=offers,
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

    async def _have_slot(self, slot: Slot, tables: Tables, offers: Offers) -> bool:
        """Wait until the slot is ours to take, and create it if needed; return whether it is new."""
        server = await slot.server()
        self._know_readers(server)
        # A slot of somebody else is refused before anything is made.
        await slot.state()
        while True:
            had_publication = await tables.publish()
            state = await slot.state()
            show(state, self._metrics)
            active = state is not None and state.active
            if not active and await self._may_lead(offers):
                break
            # When it is our turn, this survey may be hours old: make a new one then.
            if active and state is not None and state.active_pid == self._former_walsender:
                await self._outlive(slot)
            else:
                await self._stand_by(slot, offers)
        statements = slot.statements(state, server, new_publication=not had_publication)
        if statements:
            # A slot holds WAL back: don't create it before we know that we can stream, and Redis takes the busts.
            system = await Replication.try_out(self._options.postgres_dsn)
            await self._redis_there(system.system_id)
            await self._make_slot(slot, tables, statements)
        return bool(statements)

    async def _make_slot(self, slot: Slot, tables: Tables, statements: list[str]) -> None:
        """Make the slot. That waits for all running transactions, and holds WAL back meanwhile: so it is watched.

        Raises:
            errors.PostgresUnavailable: it takes too long, or too much WAL; it is begun anew.
        """
        making = self._start(tables.set_up(statements), "make slot")
        began = time.monotonic()
        await asyncio.wait({making}, timeout=MAKE_WATCH_SECONDS)
        if not making.done():
            connection = await connect(self._options.postgres_dsn, "cdc-invalidator catalogs")
            self._connections.callback(connection.pgconn.finish)
            other = Slot(connection, slot.name)
            while not making.done():
                seconds = time.monotonic() - began
                xid = await other.oldest_running()
                why = (
                    f"Making slot {slot.name} takes {seconds:.0f} s so far: it waits for running transactions. Look "
                    f"for xid {xid} in pg_stat_activity (backend_xid) and in pg_prepared_xacts (transaction)"
                )
                state = await other.state()
                show(state, self._metrics)
                much_wal = state is not None and state.retained > self._options.max_retained_wal
                if much_wal or seconds > MAKE_SECONDS:
                    await other.end_walsender()
                    await asyncio.wait({making}, timeout=GIVE_UP_SECONDS)
                    more = " The slot would hold more than CDC_MAX_RETAINED_WAL." if much_wal else ""
                    raise errors.PostgresUnavailable(f"{why}.{more} It is begun anew.")
                self._tell(f"{why}.")
                await asyncio.wait({making}, timeout=MAKE_WATCH_SECONDS)
            self._tell(None)
        making.result()

    async def _outlive(self, slot: Slot) -> None:
        """Wait until the walsender of our last session has ended, and end it if that takes long.

        Raises:
            errors.PostgresUnavailable: it does not end.
        """
        began = time.monotonic()
        while time.monotonic() - began < OUTLIVE_SECONDS:
            await asyncio.sleep(STANDBY_SECONDS)
            state = await slot.state()
            if state is None or state.active_pid != self._former_walsender:
                return
            if time.monotonic() - began > OUTLIVE_SECONDS / 2:
                await slot.end_walsender()
        raise errors.PostgresUnavailable(
            f"Slot {slot.name} is still held by the walsender of the last session, pid {self._former_walsender}, which "
            "hangs; end it on the server."
        )

    def _know_readers(self, server: ServerInfo) -> None:
        """Make sure that the server that readers load from is known.

        Raises:
            errors.WrongSettings: it is not; `errors.PostgresUnavailable` if this daemon has led already, since after a
                failover a standby may soon be promoted.
        """
        if server.in_recovery and self._options.postgres_readers is None:
            raise (errors.WrongSettings if self._strict else errors.PostgresUnavailable)(READERS_UNKNOWN)

    async def _visibility(
        self, system_id: str
    ) -> tuple[Snapshots, Callable[[Iterable[int]], Awaitable[set[int]]], Callable[[], Awaitable[Horizon]]]:
        """Return what takes snapshots of the readers' server, what gives the transactions that are hidden, or over.

        A commit may be visible on a standby and not on the primary yet, where it waits for that standby; and the other
        way round.
        """
        dsn, readers_dsn = self._options.postgres_dsn, self._options.postgres_readers
        source = await Snapshots.open(dsn)
        self._connections.callback(source.close)
        if readers_dsn is None or readers_dsn.now() == dsn.now():
            return source, source.hidden, source.horizon
        readers = await Snapshots.open_readers(readers_dsn, system_id)
        self._connections.callback(readers.close)

        async def hidden(xids: Iterable[int]) -> set[int]:
            some = list(xids)
            return await source.hidden(some) | await readers.hidden(some)

        async def horizon() -> Horizon:
            return (await source.horizon()).with_other(await readers.horizon())

        return readers, hidden, horizon

    async def _may_lead(self, offers: Offers) -> bool:
        """Return whether to take a slot that is free.

        Who does not know that its Redis takes busts leaves it to a daemon that knows.
        """
        return self._fitness.found_at is not None or not await self._relief(offers)

    async def _relief(self, offers: Offers) -> bool:
        """Return whether another daemon has said lately that it could lead."""
        ago = await offers.newest()
        return ago is not None and ago < OFFER_SECONDS

    async def _stand_by(self, slot: Slot, offers: Offers) -> None:
        """Wait until the slot is ours to take; meanwhile let the others know whether this daemon could lead."""
        self._be("standby")
        probing = self._start(self._fitness.run(), "probe")
        try:
            while True:
                await asyncio.sleep(STANDBY_SECONDS)
                if probing.done():
                    probing.result()
                state = await slot.state()
                show(state, self._metrics)
                found_at = self._fitness.found_at
                self._metrics.can_lead.set(found_at is not None)
                await offers.say(found_at)
                if (state is None or not state.active) and await self._may_lead(offers):
                    return
        finally:
            probing.cancel()
            await asyncio.wait({probing})

    async def _redis_there(self, system_id: str) -> None:
        """Wait until Redis can take the busts.

        Raises:
            errors.WatermarkTaken: the daemon of another PostgreSQL has it.
        """
        backoff = Backoff()
        # There is no slot yet, so a watermark that moves is nobody's who has this server. Once this daemon has led, it
        # makes a new slot in a hurry, and looks again only where there was another one.
        suspicious = self._suspicious or self._strict
        while True:
            server = self._open_server()
            try:
                await server.connect()
                await refuse_occupied(server, await server.read_watermarks(), system_id, suspicious=suspicious)
            except errors.RedisUnavailable as error:
                self.trouble = Trouble.now(str(error), self.trouble)
                self._metrics.redis_errors.labels(error.code).inc()
                delay = backoff.next()
                tell = _log.error if error.report else _log.warning
                tell("slot_waits_for_redis", error=str(error), retry_in_s=round(delay, 2))
                await asyncio.sleep(delay)
            else:
                self.trouble = None
                return
            finally:
                await server.close()

    async def give_up(self, reason: errors.PositionGivenUp | errors.WatermarkTaken) -> None:
        """Give up what the slot holds: the next session goes on behind it, or with a new slot, and sweeps.

        `errors.PositionSkipped` moves the slot on, without waiting for running transactions, as a new slot would; if
        that fails, or for any other reason, the slot is dropped, so that PostgreSQL can remove its WAL.

        Call `close` first.
        """
        connection = await connect(self._options.postgres_dsn, "cdc-invalidator catalogs")
        try:
            slot = Slot(connection, self._options.slot)
            skipped = isinstance(reason, errors.PositionSkipped) and await _skipped(slot)
            if not skipped and not await slot.drop_soon(GIVE_UP_SECONDS):
                return
        except errors.SlotInUse:
            # Another daemon took it over before we could drop it, and leads now.
            return
        finally:
            await connection.close()
        caches = sorted(self._rules.kept)
        self._events.gap("position_given_up", caches, swept=False, level="error", error=str(reason))

    async def _farewell(self, replication: Replication, checkpoint: Checkpoint, receiving: asyncio.Task[None]) -> None:
        """Confirm what is applied, so that the next daemon does not apply it again."""
        await asyncio.wait({receiving})
        await self._events.farewell(TELL_SECONDS)
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                replication.status(checkpoint.confirmable, checkpoint.received_lsn)
                await replication.finish()
        except (errors.Retryable, TimeoutError) as error:
            _log.warning("not_confirmed", error=str(error) or "PostgreSQL did not answer in time.")


async def _skipped(slot: Slot) -> bool:
    try:
        await slot.skip_soon(GIVE_UP_SECONDS)
    except (errors.PostgresUnavailable, errors.ServerRefuses, errors.Locked) as error:
        _log.warning("slot_not_moved", error=str(error))
        return False
    return True


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
