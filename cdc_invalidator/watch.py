"""Watches slot, publication and tables while the stream runs, and reacts to what changed.

The stream does not say when another session takes the slot, when the slot holds too much WAL, or when a table is
created, altered or renamed. So the catalogs are read every few seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cdc_invalidator import errors
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import Slot, SlotState
from cdc_invalidator.postgres.tables import Tables

WATCH_SECONDS = 3.0
# After this silence the server will not answer any more: our statements time out sooner.
SILENCE_SECONDS = 60.0
# After this silence of the walsender, it is told.
HUSH_SECONDS = 10.0
# While the slot holds too much WAL: if Redis is away for this long, the position is given up. If one piece of work
# holds the position back for this long, it is let go if that can be; if not, the position is given up, after a time
# that is longer than a rule's longest `debounce`. And so long twice too much WAL may not become less.
AWAY_SECONDS = 2.0
HELD_SECONDS = 3.0
LONG_HELD_SECONDS = 75.0
RELIEF_SECONDS = 30.0
SHRINK_SECONDS = 60.0


class Watch:
    """The watch of one session. Its construction counts as its first look.

    Args:
        slot: the slot that we stream from.
        tables: the tables of the rules.
        checkpoint: knows what holds the position back.
        apply: is told what to sweep, and when to hurry.
        replication: our stream.
        tell: is called with what hangs, and with ``None`` once nothing does.
        relief: asks whether another daemon has said lately that it could lead.
        max_retained_wal: bytes of WAL that the slot may hold.
        metrics: what to count.
    """

    def __init__(
        self,
        slot: Slot,
        tables: Tables,
        checkpoint: Checkpoint,
        apply: Apply,
        *,
        replication: Replication,
        tell: Callable[[str | None], None],
        relief: Callable[[], Awaitable[bool]],
        max_retained_wal: int,
        metrics: Metrics,
    ) -> None:
        self._slot = slot
        self._tables = tables
        self._checkpoint = checkpoint
        self._apply = apply
        self._replication = replication
        self._tell = tell
        self._relief = relief
        self._max_retained_wal = max_retained_wal
        self._metrics = metrics
        self._looked_at = time.monotonic()
        self._looking = asyncio.Lock()
        # What holds the position back, and since when.
        self._oldest: Ticket | None = None
        self._held_since = 0.0
        # The least WAL that was retained since it is twice what may be, and when.
        self._least: int | None = None
        self._least_at = 0.0

    async def run(self) -> None:
        """Look every few seconds until cancelled.

        Raises:
            errors.PostgresUnavailable: the slot is not ours any more.
            errors.PositionGivenUp: the slot holds too much WAL, and nothing else helps.
        """
        self._tables.relent()
        while True:
            await self._look_at_slot()
            await self.look_at_tables()
            self._metrics.watches.inc()
            self._looked_at = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)

    async def alarm(self) -> None:
        """Fail when the last look is long ago, or the walsender silent for long; tell it before.

        The server or a backend is frozen then, or the network drops packets.
        """
        stream = self._replication
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            silent = stream.silent_for
            silence = (
                f"The walsender, pid {stream.backend_pid}, has not answered for {silent:.0f} s; look whether it hangs."
            )
            if silent > stream.most_silence:
                raise errors.PostgresUnavailable(silence)
            self._tell(silence if silent > HUSH_SECONDS else None)
            if time.monotonic() - self._looked_at > SILENCE_SECONDS:
                raise errors.PostgresUnavailable(f"PostgreSQL has not answered for {SILENCE_SECONDS:.0f} s.")

    async def _look_at_slot(self) -> None:
        state = await self._slot.state()
        if state is None or state.active_pid != self._replication.backend_pid:
            # Our walsender is gone, even if our connection does not know yet; another daemon may lead by now.
            raise errors.PostgresUnavailable(f"Slot {self._slot.name} is not ours any more.")
        show(state, self._metrics)
        away = self._apply.redis.away_since is not None
        self._bound(state, relief=away and await self._relief())
        self._metrics.rows_written.set(await self._slot.rows_written())

    def _bound(self, state: SlotState, *, relief: bool = False) -> None:
        """Keep the WAL that the slot retains below the limit, whoever is to blame.

        What holds the position back and can be put off is let go; if that does not help, the position is given up. A
        daemon that works off a backlog is given time: the oldest of what it has taken is done within seconds.

        Args:
            state: the slot.
            relief: Redis is away for us, and another daemon could lead.

        Raises:
            errors.PositionGivenUp: the message says what holds it.
        """
        now = time.monotonic()
        much_wal = state.retained > self._max_retained_wal
        self._apply.hurry(much_wal=much_wal)
        oldest = self._checkpoint.oldest
        if oldest is not self._oldest:
            self._oldest, self._held_since = oldest, now
        if not much_wal:
            self._least = None
            return
        away = self._apply.redis.away_since
        # Before it is dropped, it is left to a daemon that can work it off; that takes some seconds.
        most_away = RELIEF_SECONDS if relief else AWAY_SECONDS
        if away is not None and now - away > most_away:
            raise errors.PositionGivenUp
        held = now - self._held_since if oldest is not None else 0.0
        if held > HELD_SECONDS and not self._apply.let_go() and held > LONG_HELD_SECONDS:
            raise errors.PositionGivenUp(
                f"The slot holds more than CDC_MAX_RETAINED_WAL, and a bust has not been done for {held:.0f} s: "
                "the slot is dropped, and the caches swept."
            )
        if state.retained <= 2 * self._max_retained_wal:
            self._least = None
        elif self._least is None or state.retained < self._least:
            self._least, self._least_at = state.retained, now
        elif now - self._least_at > SHRINK_SECONDS:
            raise errors.PositionGivenUp(
                f"The slot has held more than twice CDC_MAX_RETAINED_WAL for {SHRINK_SECONDS:.0f} s, and it does not "
                f"become less: {self._why(state)}; the slot is dropped, and the caches swept."
            )

    def _why(self, state: SlotState) -> str:
        if state.unconfirmed > self._max_retained_wal:
            return "more is written than the daemon can work off"
        return (
            "PostgreSQL keeps what a transaction has written, and all since then, until it ends (look for it in "
            "pg_stat_activity and pg_prepared_xacts)"
        )

    async def look_at_tables(self) -> None:
        """Look at the tables now, and have swept what that takes."""
        async with self._looking:
            tables = self._tables
            before = tables.digests(), tables.agreement
            broken = await tables.look(sweeping=lambda: self._apply.sweeping)
            if broken or (tables.digests(), tables.agreement) != before:
                self._apply.redigest(tables.digests(), tables.agreement, broken)


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
