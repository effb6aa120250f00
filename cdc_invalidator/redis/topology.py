"""The `CacheServer` for the kind of Redis that CDC_REDIS_URL names: one server, a master behind Sentinel, a cluster."""

from __future__ import annotations

from cdc_invalidator.redis.node import Node
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.single import Single
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.suffixes import BESIDE, BESIDE_AND_OLD

# Seconds until a server that does not answer counts as lost.
TIMEOUT = 5.0


def cache_server(
    source: EndpointSource, watermark: str, *, timeout: float = TIMEOUT, old_locks: bool = True
) -> CacheServer:
    """Make the server for an endpoint; nothing is opened yet.

    Args:
        source: the endpoint.
        watermark: name of the watermark.
        timeout: seconds until a server that does not answer counts as lost.
        old_locks: whether the locks of readers of release 0.1.0 are deleted, too.
    """
    server = _cache_server(source, watermark, timeout)
    server.beside = BESIDE_AND_OLD if old_locks else BESIDE
    return server


def _cache_server(source: EndpointSource, watermark: str, timeout: float) -> CacheServer:
    if source.kind == "cluster":
        from cdc_invalidator.redis.cluster import Cluster  # noqa: PLC0415  few need it, and it takes time

        return Cluster(source, watermark, timeout=timeout)
    if source.kind == "sentinel":
        from cdc_invalidator.redis.sentinel import Sentinels  # noqa: PLC0415  few need it

        sentinels = Sentinels(source, timeout=timeout)
        return Single(watermark, sentinels.open_master, why_lost=sentinels.why_lost, close=sentinels.close)

    async def open_node() -> Node:
        node = Node(source.now().url, timeout=timeout)
        await node.connect()
        return node

    return Single(watermark, open_node)
