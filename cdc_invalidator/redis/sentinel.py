"""Redis Sentinel: which server is the master, and whether it still is.

The rule that holds here: of several answers, the one with the highest configuration epoch is right. A Sentinel that is
cut off goes on naming the old master, and an old master that is cut off goes on taking writes. So all Sentinels are
asked, again and again while the connection stands.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.redis.endpoint import Address, Endpoint
from cdc_invalidator.redis.node import Node, end
from cdc_invalidator.redis.source import EndpointSource

# How often the Sentinels are asked, and how long each may take.
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 1.0


class _Answer(NamedTuple):
    epoch: int
    address: Address


class Sentinels:
    """The Sentinels of one service.

    Args:
        source: says where they are, and what the service is called.
        timeout: seconds until a server that does not answer counts as lost.
    """

    def __init__(self, source: EndpointSource, *, timeout: float) -> None:
        self._source = source
        self._timeout = timeout
        self._asked: dict[Address, Node] = {}
        self._known = _Answer(-1, Address("", 0))
        self._why_lost: str | None = None
        self._silence = errors.RedisUnavailable("None was asked.", code="CLOSED")
        self._looking: asyncio.Task[None] | None = None

    async def open_master(self) -> Node:
        """Open a connection to the master, and watch from then on whether it is still the one.

        Raises:
            errors.RedisUnavailable: no Sentinel knows it, or it is none.
        """
        answer = await self._ask_all()
        endpoint = self._source.now()
        if answer is None:
            raise errors.RedisUnavailable(
                f"No Sentinel names a master of {endpoint.service}; check CDC_REDIS_URL and the Sentinels. "
                f"The last one: {self._silence}",
                code=self._silence.code,
                report=self._silence.report,
            )
        self._known = answer
        node = Node(endpoint.at(answer.address), timeout=self._timeout)
        try:
            await node.connect()
            ((role, *_),) = await node.ask(("ROLE",))
        except errors.RedisUnavailable:
            await node.close()
            raise
        if role != b"master":
            await node.close()
            raise errors.RedisUnavailable(
                f"{answer.address}, which Sentinel names, is no master yet; it is asked again.", code="READONLY"
            )
        self._looking = asyncio.create_task(self._look(), name="sentinel")
        return node

    def why_lost(self) -> str | None:
        """Return why the opened server is no longer the master; ``None`` while it is."""
        if self._looking is not None and self._looking.done() and self._why_lost is None:
            self._looking.result()
        return self._why_lost

    async def close(self) -> None:
        """Drop the connections."""
        if self._looking is not None:
            await end(self._looking)
        for node in self._asked.values():
            await node.close()

    async def _look(self) -> None:
        while self._why_lost is None:
            await asyncio.sleep(LOOK_SECONDS)
            # If no Sentinel answers, the connection to the master is still good.
            answer = await self._ask_all()
            if answer is not None and answer.epoch >= self._known.epoch and answer.address != self._known.address:
                self._why_lost = f"Sentinel names {answer.address} as the master now, no longer {self._known.address}."

    async def _ask_all(self) -> _Answer | None:
        try:
            endpoint = self._source.now()
        except errors.RedisUnavailable as error:
            self._silence = error
            return None
        answers = await asyncio.gather(*(self._ask(endpoint, address) for address in endpoint.addresses))
        return max((answer for answer in answers if answer is not None), default=None)

    async def _ask(self, endpoint: Endpoint, address: Address) -> _Answer | None:
        try:
            node = self._asked.get(address)
            if node is None:
                node = Node(endpoint.of_sentinel(address), timeout=ANSWER_SECONDS)
                await node.connect()
                self._asked[address] = node
            service = endpoint.service
            master, found = await node.ask(
                ("SENTINEL", "MASTER", service), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            )
        except errors.RedisUnavailable as error:
            self._silence = error
            # It is asked again on a new connection, next time.
            lost = self._asked.pop(address, None)
            if lost is not None:
                await lost.close()
            return None
        if not found:
            self._silence = errors.RedisUnavailable(f"{address} knows no master of it.", code="CLOSED")
            return None
        fields = dict(zip(master[::2], master[1::2], strict=True)) if isinstance(master, list) else master
        # Once a failover has begun, this names the promoted replica under the new epoch, before the other reply does.
        return _Answer(int(fields[b"config-epoch"]), Address(found[0].decode(), int(found[1])))
