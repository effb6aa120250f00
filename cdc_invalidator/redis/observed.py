"""A `CacheServer` that changes nothing: `Observed`. What would be busted is only looked at.

The rule that holds here: nothing is written, not even a watermark. A watermark would promise that all busts are
applied; and the next daemon that busts must find that they are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.redis.fingerprint import ABSENT, Look
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.scripts import BUMP_DELETED, BUMP_MISSING
from cdc_invalidator.redis.server import NO_GRACES, SCAN_COUNT, BustReply, CacheServer, Cursor
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.redis.writes import Writes


class Observed(CacheServer):
    """Looks at the entries of another server.

    Args:
        server: where the caches live.
        watermark: name of the watermark, which is neither read nor written.
        writes: is told which keys are written.
    """

    watermarked = False

    def __init__(self, server: CacheServer, watermark: str, writes: Writes) -> None:
        super().__init__(watermark)
        self._writes = writes
        self._following: dict[Node, asyncio.Task[None]] = {}
        self._server = server
        self.lookups = server.lookups
        server.scripts.read_only = True

    async def connect(self) -> None:
        """See `CacheServer`."""
        await self._server.connect()
        await self._follow()

    async def _follow(self) -> None:
        """Follow each node, those too that have joined a cluster.

        Raises:
            errors.RedisUnavailable: one is lost: then it is not known what was written.
        """
        new = [node for node in self._server.nodes if node not in self._following]
        for node in new:
            self._following[node] = await node.follow(self._writes.command, self._writes.note)
        if new:
            self._writes.begin()
        for task in self._following.values():
            if task.done():
                task.result()

    @property
    def nodes(self) -> list[Node]:
        """See `CacheServer`."""
        return self._server.nodes

    async def close(self) -> None:
        """See `CacheServer`."""
        for task in self._following.values():
            task.cancel()
        await asyncio.gather(*self._following.values(), return_exceptions=True)
        await self._server.close()

    async def probe(self) -> None:
        """See `CacheServer`."""
        await self._server.probe()

    async def bust(
        self,
        deletes: Sequence[Sequence[bytes]],
        bumps: Mapping[bytes, int],
        graces: Mapping[bytes, int] = NO_GRACES,  # noqa: ARG002  nothing is deleted
        looks: Sequence[bytes] = (),
    ) -> BustReply:
        """Look at what would be busted; what is not looked at counts as missing."""
        found = dict(zip(looks, await self.fingerprints(looks), strict=True))
        there = {key for key, look in found.items() if not isinstance(look, errors.RedisUnavailable) and look != ABSENT}
        existed = [sum(key in there for key in group) for group in deletes]
        versions = {key: BUMP_DELETED if key in there else BUMP_MISSING for key in bumps}
        return BustReply(existed, versions, looks=list(found.values()))

    async def versions(self, counters: Sequence[bytes]) -> list[bytes | errors.RedisUnavailable | None]:
        """See `CacheServer`."""
        return await self._server.versions(counters)

    async def fingerprints(self, keys: Sequence[bytes]) -> list[Look]:
        """See `CacheServer`; by then, all writes are told that came before."""
        await self._follow()
        looks = await self._server.fingerprints(keys)
        if keys:
            await self._follow()
            await asyncio.gather(*(node.catch_up() for node in self._following))
            self._writes.heard()
        return looks

    async def unlink(self, keys: Sequence[bytes]) -> int:  # noqa: ARG002  nothing is deleted
        """Delete nothing."""
        return 0

    async def publish(self, messages: Sequence[tuple[bytes, bytes]]) -> dict[bytes, errors.RedisUnavailable]:  # noqa: ARG002
        """Tell nobody of busts that are none."""
        return {}

    async def scan(
        self,
        cursor: Cursor,  # noqa: ARG002  it is over at once
        pattern: bytes,  # noqa: ARG002
        count: int = SCAN_COUNT,  # noqa: ARG002
    ) -> tuple[Cursor, list[bytes]]:
        """Find nothing: a sweep is told, and not done."""
        return None, []

    async def size(self) -> int | None:
        """See `CacheServer`."""
        return await self._server.size()

    async def read_watermarks(self) -> list[Watermark | None]:
        """Find none: whatever is there is of a daemon that busts."""
        return [None]

    async def write_watermark(self, watermark: Watermark) -> bool:  # noqa: ARG002
        """Write none; the stream goes on all the same."""
        return True

    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:
        """See `CacheServer`; only commands that read are sent."""
        return await self._server.ask_about(key, commands)

    async def info(self) -> dict[str, int] | None:
        """See `CacheServer`."""
        return await self._server.info()
