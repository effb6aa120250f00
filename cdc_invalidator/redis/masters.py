"""Connections for a command that only looks: to the server, to the master that Sentinel names, or to all masters.

The rule that holds here: nothing is loaded or written, so that a user with no right but to look can open them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from cdc_invalidator import errors
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.node import Node
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import TIMEOUT


@asynccontextmanager
async def open_masters(source: EndpointSource) -> AsyncIterator[list[Node]]:
    """Open a connection to each master that holds keys, and close them in the end.

    Args:
        source: what CDC_REDIS_URL says.

    Raises:
        errors.RedisUnavailable: one can't be reached.
    """
    async with AsyncExitStack() as stack:
        if source.kind == "sentinel":
            from cdc_invalidator.redis.sentinel import Sentinels  # noqa: PLC0415  few need it

            sentinels = Sentinels(source, timeout=TIMEOUT)
            stack.push_async_callback(sentinels.close)
            master = await sentinels.open_master()
            stack.push_async_callback(master.close)
            yield [master]
            return
        endpoint = source.now()
        urls = [endpoint.url]
        if endpoint.kind == "cluster":
            urls = await _urls(endpoint)
        nodes = []
        for url in urls:
            node = Node(url, timeout=TIMEOUT)
            stack.push_async_callback(node.close)
            await node.connect()
            nodes.append(node)
        yield nodes


async def _urls(endpoint: Endpoint) -> list[str]:
    """Return the URLs of all masters with hash slots, as the first node that answers names them."""
    from cdc_invalidator.redis.cluster import read_masters  # noqa: PLC0415  few need it, and it takes time

    last: errors.RedisUnavailable | None = None
    for address in endpoint.addresses:
        seed = Node(endpoint.at(address), timeout=TIMEOUT)
        try:
            await seed.connect()
            return [endpoint.at(master) for master in await read_masters(seed)]
        except errors.RedisUnavailable as error:
            last = error
        finally:
            await seed.close()
    assert last is not None
    raise last
