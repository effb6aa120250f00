"""Watches slot, publication and tables while the stream runs, and reacts to what changed.

The stream does not say when another session takes the slot, when the slot holds too much WAL, or when a table is
created, altered or renamed. So the catalogs are read every few seconds.
"""

from __future__ import annotations

import asyncio
import time

from cdc_invalidator import errors
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.postgres.slot import Slot, SlotState
from cdc_invalidator.postgres.snapshot import Snapshots
from cdc_invalidator.postgres.tables import Tables

WATCH_SECONDS = 3.0
# After this silence the server will not answer any more: our statements time out sooner.
SILENCE_SECONDS = 60.0
# If Redis is away for this long and the slot holds too much WAL, the position is given up.
AWAY_SECONDS = 2.0


class Watch:
    """The watch of one session. Its construction counts as its first look.

    Args:
        slot: the slot that we stream from.
        tables: the tables of the rules.
        snapshots: to know which transactions began before a table was published.
        apply: is told what to sweep, and when to hurry.
        walsender_pid: the process id of our walsender.
        max_retained_wal: bytes of WAL that the slot may hold while Redis is away.
        metrics: what to count.
    """

    def __init__(
        self,
        slot: Slot,
        tables: Tables,
        snapshots: Snapshots,
        apply: Apply,
        *,
        walsender_pid: int,
        max_retained_wal: int,
        metrics: Metrics,
    ) -> None:
        self._slot = slot
        self._tables = tables
        self._snapshots = snapshots
        self._apply = apply
        self._walsender_pid = walsender_pid
        self._max_retained_wal = max_retained_wal
        self._metrics = metrics
        self._looked_at = time.monotonic()

    async def run(self) -> None:
        """Look every few seconds until cancelled.

        Raises:
            errors.PostgresUnavailable: the slot is not ours any more.
            errors.PositionGivenUp: the slot holds too much WAL, and Redis is away.
        """
        self._tables.relent()
        while True:
            await self._look_at_slot()
            await self._look_at_tables()
            self._metrics.watches.inc()
            self._looked_at = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)

    async def alarm(self) -> None:
        """Fail when the last look is long ago: the server is frozen, or the network drops packets."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if time.monotonic() - self._looked_at > SILENCE_SECONDS:
                raise errors.PostgresUnavailable(f"PostgreSQL has not answered for {SILENCE_SECONDS:.0f} s.")

    async def _look_at_slot(self) -> None:
        state = await self._slot.state()
        if state is None or state.active_pid != self._walsender_pid:
            # Our walsender is gone, even if our connection does not know yet; another daemon may lead by now.
            raise errors.PostgresUnavailable(f"Slot {self._slot.name} is not ours any more.")
        show(state, self._metrics)
        much_wal = state.retained > self._max_retained_wal
        if much_wal and _long_ago(self._apply.redis.away_since):
            raise errors.PositionGivenUp
        self._apply.hurry(much_wal=much_wal)
        activity = await self._slot.activity()
        self._metrics.database_commits.set(activity.commits)
        self._metrics.database_rollbacks.set(activity.rollbacks)

    async def _look_at_tables(self) -> None:
        before = self._tables.digests()
        broken = await self._tables.look(self._snapshots, sweeping=self._apply.sweeps_a_gap)
        digests = self._tables.digests()
        if broken or digests != before:
            self._apply.redigest(digests, broken)


def show(state: SlotState | None, metrics: Metrics) -> None:
    """Show the slot in the metrics; ``None``: there is none."""
    metrics.slot_wal_status.clear()
    if state is None:
        metrics.slot_active.set(0)
        metrics.retained_wal.set(0)
    else:
        metrics.slot_active.set(state.active)
        metrics.retained_wal.set(state.retained)
        metrics.slot_wal_status.labels(state.wal_status).set(1)


def _long_ago(since: float | None) -> bool:
    return since is not None and time.monotonic() - since > AWAY_SECONDS
