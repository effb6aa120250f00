"""What INFO says of the servers, as metrics: hits, misses (and which of them are our own), evictions, memory.

The rule that holds here: an ACL that refuses INFO costs only these figures and one line in the log.
"""

from __future__ import annotations

import time

import structlog

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.redis.server import CacheServer

_log = structlog.get_logger()

INFO_SECONDS = 10.0


class InfoMetrics:
    """Asks every few seconds.

    Args:
        metrics: where the figures go.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._asked_at = float("-inf")
        self._refused = False

    async def show(self, server: CacheServer) -> None:
        """Ask, if it is time to.

        Raises:
            errors.RedisUnavailable: the connection is lost.
        """
        if time.monotonic() - self._asked_at < INFO_SECONDS:
            return
        self._asked_at = time.monotonic()
        info = await server.info()
        if info is None:
            if not self._refused:
                _log.warning("info_refused", error="Redis refuses INFO; grant it to see hits, misses and memory.")
            self._refused = True
            return
        self._metrics.looked_up(server.lookups.take())
        self._metrics.show_lookups(info["keyspace_hits"], info["keyspace_misses"])
        self._metrics.redis_evicted.set(info["evicted_keys"])
        self._metrics.redis_expired.set(info["expired_keys"])
        self._metrics.redis_memory.set(info["used_memory"])
