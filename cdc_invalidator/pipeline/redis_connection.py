"""The connection to Redis: opened, lost, opened again.

The rule that holds here: whatever fails on Redis's side, the connection is thrown away, and a new one is opened after a
growing delay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from cdc_invalidator import errors
from cdc_invalidator.backoff import Backoff, Refusals
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.trouble import Trouble
from cdc_invalidator.waiting import within

_log = structlog.get_logger()


class RedisConnection:
    """One connection at a time.

    Args:
        open_server: makes a `CacheServer` that is not connected yet.
        metrics: what to count.
    """

    def __init__(self, open_server: Callable[[], CacheServer], metrics: Metrics) -> None:
        self._open_server = open_server
        self._metrics = metrics
        self._backoff = Backoff()
        self.server: CacheServer | None = None
        # Since the last turn that went well.
        self.trouble: Trouble | None = None
        self.away_since: float | None = None
        self._now = asyncio.Event()
        # Whether only an operator can help.
        self.refused = False
        self._refusals = Refusals()

    async def open(self) -> tuple[CacheServer, list[Watermark | None]]:
        """Connect.

        Returns:
            The server, and what each of its nodes says it has had.

        Raises:
            errors.RedisUnavailable: it can't be reached.
        """
        server = self._open_server()
        try:
            await server.connect()
            found = await server.read_watermarks()
        except BaseException:
            await server.close()
            raise
        self.server = server
        self._metrics.redis_connects.inc()
        self._metrics.redis_up.set(1)
        _log.info("redis_connected")
        return server, found

    def works(self) -> None:
        """Note that all that was asked has been answered."""
        self._backoff.reset()
        self.trouble = self.away_since = None
        self.refused = False
        self._refusals.reset()

    async def lost(self, error: errors.RedisUnavailable) -> None:
        """Close it, and wait for as long as the next attempt should wait."""
        await self.close()
        self._metrics.redis_errors.labels(error.code).inc()
        self.trouble = Trouble.now(str(error), self.trouble)
        self.refused = error.report
        self.away_since = self.away_since or time.monotonic()
        delay = self._backoff.next()
        if replies.of(error.code).does is not replies.Does.LOGIN or self._refusals.tell(str(error)):
            log = _log.error if error.report else _log.warning
            log("redis_unavailable", error=str(error), code=error.code, retry_in_s=round(delay, 2))
        self._now = asyncio.Event()
        await within(delay, self._now)

    def try_now(self) -> None:
        """Let the next attempt wait no longer."""
        self._now.set()

    async def close(self) -> None:
        """Drop the connection, if there is one."""
        self._metrics.redis_up.set(0)
        if self.server is not None:
            server, self.server = self.server, None
            self._metrics.looked_up(server.lookups.take())
            await server.close()
