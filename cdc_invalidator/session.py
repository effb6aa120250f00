"""One stream from the slot: opened, run until it fails or is told to stop, thrown away.

Opening ends with the slot being ours and with a `Position`: where the stream goes on, which apply compares with what
Redis has had. Then the named tasks run: receive, apply, confirm, and watch, which looks after the slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Literal

import structlog

from cdc_invalidator import errors, lsn, receive
from cdc_invalidator.apply import Apply
from cdc_invalidator.backlog import Backlog
from cdc_invalidator.cache import CacheServer
from cdc_invalidator.checkpoint import Checkpoint
from cdc_invalidator.invalidation import Invalidation
from cdc_invalidator.log import KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.replication import Replication
from cdc_invalidator.rules import RuleSet, Table
from cdc_invalidator.slot import Catalog
from cdc_invalidator.snapshot import Snapshots
from cdc_invalidator.watermark import Position

_log = structlog.get_logger()

# How often a standby looks whether the leader is gone, and how often the leader looks at its slot.
STANDBY_SECONDS = 0.5
WATCH_SECONDS = 5.0
# SIGTERM: what has been received is applied within this time, or is received again at the next start.
DRAIN_SECONDS = 1.5
FAREWELL_SECONDS = 0.3

Role = Literal["connecting", "leader", "standby"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where the servers are, and what is ours there."""

    postgres_dsn: str
    redis_url: str
    slot: str
    publication: str
    sweep_gaps: bool


class Session:
    """Made anew for each attempt; holds all that an attempt holds.

    Args:
        options: where to connect.
        rules: what to bust.
        metrics: what to count.
        display: how events show keys.
        be: is told the role.
    """

    def __init__(
        self, options: Options, rules: RuleSet, metrics: Metrics, display: KeyDisplay, be: Callable[[Role], None]
    ) -> None:
        self._options = options
        self._rules = rules
        self._metrics = metrics
        self._display = display
        self._be = be
        self._catalog: Catalog | None = None
        self._snapshots: Snapshots | None = None
        self._replication: Replication | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.backlog = Backlog()
        self.checkpoint: Checkpoint | None = None
        self.apply: Apply | None = None
        self.unknown: list[Table] = []

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
        assert self._catalog is not None
        assert self._replication is not None
        assert self.apply is not None
        assert self.checkpoint is not None
        receiver = receive.Receive(
            self._replication,
            self._catalog,
            Invalidation(self._rules),
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            metrics=self._metrics,
        )
        receiving = self._start(receiver.run(), "receive")
        applying = self._start(self.apply.run(), "apply")
        confirming = self._start(receive.confirm(self._replication, self.checkpoint, self._metrics), "confirm")
        watching = self._start(self._watch(self._catalog, self.apply), "watch")
        done, _ = await asyncio.wait(
            {receiving, applying, confirming, watching, stopping}, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        receiving.cancel()
        self.apply.finish()
        await asyncio.wait({applying}, timeout=DRAIN_SECONDS)
        if applying.done():
            applying.result()
        else:
            _log.warning("not_drained", error="Redis did not take the rest in time; the next start receives it again.")
        await self._farewell(self._replication, self.checkpoint, receiving)

    def _start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        return task

    async def close(self) -> None:
        """End everything that the session began."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._replication is not None:
            self._replication.close()
        if self._catalog is not None:
            await self._catalog.close()
        if self._snapshots is not None:
            await self._snapshots.close()

    async def _open(self) -> None:
        options = self._options
        catalog = self._catalog = await Catalog.open(options.postgres_dsn, options.slot, options.publication)
        await catalog.check_server()
        missing = await catalog.missing(self._rules)
        self.unknown = missing.unknown
        if missing.unknown:
            _log.warning("tables_missing", tables=[str(table) for table in missing.unknown])
        if missing.statements:
            _log.info("setting_up", statements=missing.statements)
            await catalog.make(missing)
        while (state := await catalog.state()) is not None and state.active:
            self._be("standby")
            await asyncio.sleep(STANDBY_SECONDS)
        replication = self._replication = await Replication.open(options.postgres_dsn)
        system = await replication.identify()
        await replication.start(options.slot, options.publication)
        # From here on the slot is ours: nobody else moves it.
        state = await catalog.state()
        if state is None:
            raise errors.PostgresUnavailable(f"Slot {options.slot} is gone; it is made anew.")
        snapshots = self._snapshots = await Snapshots.open(options.postgres_dsn)
        self.checkpoint = Checkpoint(state.confirmed)
        self.apply = Apply(
            lambda: CacheServer(options.redis_url, options.slot),
            snapshots.hidden,
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            rules=self._rules,
            position=Position(
                system_id=system.system_id,
                timeline=system.timeline,
                start=state.confirmed,
                flushed=max(system.flushed, state.confirmed),
                new_slot=missing.slot,
            ),
            unproven=_caches(self._rules, missing.unknown),
            sweep_gaps=options.sweep_gaps,
            metrics=self._metrics,
            display=self._display,
        )
        if missing.added and not missing.slot:
            self.apply.gap(dict.fromkeys(_caches(self._rules, missing.added), "table_added"))
        self._metrics.postgres_connects.inc()
        self._be("leader")
        _log.info("streaming", slot=options.slot, start=lsn.text(state.confirmed), timeline=system.timeline)

    async def _watch(self, catalog: Catalog, apply: Apply) -> None:
        """Look at the slot now and then, and publish tables of rules once they exist."""
        while True:
            state = await catalog.state()
            if state is not None:
                self._metrics.slot_active.set(state.active)
                self._metrics.retained_wal.set(state.retained)
                self._metrics.slot_wal_status.clear()
                self._metrics.slot_wal_status.labels(state.wal_status).set(1)
            activity = await catalog.activity()
            self._metrics.database_commits.set(activity.commits)
            self._metrics.database_rollbacks.set(activity.rollbacks)
            if self.unknown:
                await self._publish_new_tables(catalog, apply)
            await asyncio.sleep(WATCH_SECONDS)

    async def _publish_new_tables(self, catalog: Catalog, apply: Apply) -> None:
        try:
            missing = await catalog.missing(self._rules)
        except errors.WrongRules as error:
            # At a start this would be refused; a daemon that runs goes on busting what it can.
            _log.error("rules_refused", error=str(error))
            return
        if len(missing.unknown) == len(self.unknown):
            return
        self.unknown = missing.unknown
        if missing.statements:
            _log.info("setting_up", statements=missing.statements)
            await catalog.make(missing)
        # What was written before the table was published has not been seen.
        apply.gap(dict.fromkeys(_caches(self._rules, missing.added), "table_added"))

    async def _farewell(self, replication: Replication, checkpoint: Checkpoint, receiving: asyncio.Task[None]) -> None:
        """Confirm what is applied, so that the next daemon need not apply it again."""
        await asyncio.wait({receiving})
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                replication.status(checkpoint.confirmable, checkpoint.received_lsn)
                await replication.finish()
        except (errors.Retryable, TimeoutError) as error:
            _log.warning("not_confirmed", error=str(error) or "PostgreSQL did not answer in time.")


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _caches(rules: RuleSet, tables: Iterable[Table]) -> set[str]:
    """Give the names of the caches that rules on these tables bust."""
    named = set(tables)
    return {bust.cache.name for rule in rules.rules if rule.table in named for bust in rule.busts}
