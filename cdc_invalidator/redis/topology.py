"""The `CacheServer` for the kind of Redis that CDC_REDIS_URL names: one server, a master behind Sentinel, a cluster."""

from __future__ import annotations

from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.node import Node
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.single import Single

# Seconds until a server that does not answer counts as lost.
TIMEOUT = 5.0


def cache_server(endpoint: Endpoint, watermark: str, *, timeout: float = TIMEOUT) -> CacheServer:
    """Make the server for an endpoint, with this name of the watermark; nothing is opened yet.

    Raises:
        errors.WrongSettings: the URL has options that can't be used.
    """
    if endpoint.kind == "cluster":
        from cdc_invalidator.redis.cluster import Cluster  # noqa: PLC0415  few need it, and it takes time

        return Cluster(endpoint, watermark, timeout=timeout)
    if endpoint.kind == "sentinel":
        from cdc_invalidator.redis.sentinel import Sentinels  # noqa: PLC0415  few need it

        # The driver reads its options when it is made, so wrong ones are reported now.
        Node(endpoint.at(endpoint.addresses[0]))
        sentinels = Sentinels(endpoint, timeout=timeout)
        return Single(watermark, sentinels.open_master, why_lost=sentinels.why_lost, close=sentinels.close)

    node = Node(endpoint.url, timeout=timeout)

    async def open_node() -> Node:
        await node.connect()
        return node

    return Single(watermark, open_node)
