"""The watermark as this daemon writes it: when it is due, and what was written last.

The rule that holds here: a position is recorded for the checkpoint, and so confirmed, only after Redis has stored it,
or has refused it for lack of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.watermark import Watermark

_log = structlog.get_logger()

# The watermark moves at least once a second; the rest is for the round trip.
HEARTBEAT_SECONDS = 0.8


class WatermarkRecord:
    """What the watermark says.

    ``lsn``: the position that was written last; ``None`` before the first time. ``recorded_at``: when Redis last stored
    it, in seconds since 1970.

    Args:
        checkpoint: knows the position, and is told what is recorded.
        metrics: what to count.
    """

    def __init__(self, checkpoint: Checkpoint, metrics: Metrics) -> None:
        self._checkpoint = checkpoint
        self._metrics = metrics
        self.lsn: int | None = None
        self.recorded_at: float | None = None
        # The newest time that a watermark of ours may have, in ms since 1970.
        self._written_ms = 0
        self._tried_at = float("-inf")
        self._refused = False

    @property
    def current(self) -> bool:
        """Whether it says all that is applied."""
        return self._checkpoint.position == self.lsn

    def is_ours(self, watermark: Watermark) -> bool:
        """Return whether this daemon can have written it: it is no newer than what was written last."""
        return watermark.at <= self._written_ms

    def found(self, watermarks: Sequence[Watermark | None]) -> None:
        """Note what a Redis holds, at the start or after a reconnect."""
        known = [watermark for watermark in watermarks if watermark is not None]
        self._written_ms = max([self._written_ms, *(watermark.at for watermark in known)])
        if self.lsn is None and known and len(known) == len(watermarks):
            # How old it is is known before it is written again.
            self._show(min(each.at for each in known) / 1000, min(each.as_of for each in known) / 1000)

    async def write(
        self, server: CacheServer, content: Callable[[int, int, int], Watermark], *, must: bool = False
    ) -> bool:
        """Write it, if the position has moved or the last time is long ago.

        Args:
            server: where to.
            content: makes the watermark of its ``lsn``, ``at`` and ``as_of``.
            must: it is due whatever the position is.

        Returns:
            Whether it was due.

        Raises:
            errors.RedisUnavailable: it may not be written.
        """
        position = self._checkpoint.position
        now = time.monotonic()
        if position == self.lsn and now - self._tried_at < HEARTBEAT_SECONDS and not must:
            return False
        at = time.time()
        as_of = self._checkpoint.as_of
        at_ms = int(at * 1000)
        # Also of a write that fails: some servers may have it.
        self._written_ms = max(self._written_ms, at_ms)
        stored = await server.write_watermark(content(position, at_ms, as_of))
        if stored and server.watermarked:
            self.recorded_at = at
            self._metrics.watermark_lsn.set(position)
            self._show(at, as_of / 1000)
        elif not stored and not self._refused:
            _log.warning("watermark_stalled", error="Redis is out of memory; busts go on, and a restart will sweep.")
        self._refused = not stored
        self._metrics.watermark_stalled.set(not stored)
        self.lsn, self._tried_at = position, now
        return True

    def confirm(self, mark: int) -> None:
        """Let the position that was written last be confirmed to PostgreSQL, once the events up to a mark are told."""
        if self.lsn is not None:
            self._checkpoint.record(self.lsn, mark)

    def due_in(self, now: float) -> float:
        """Return the seconds until it is written again though the position has not moved."""
        return HEARTBEAT_SECONDS - (now - self._tried_at)

    def _show(self, at: float, as_of: float) -> None:
        self._metrics.watermark_at.set(at)
        if as_of:
            self._metrics.watermark_as_of.set(as_of)
