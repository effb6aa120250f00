"""What is behind a client: one server, the master that Sentinels name, or the masters of a cluster.

Each of `Server`, `Master` and `Cluster` sends commands and returns their replies; an error reply is an exception in its
place. Each server has connections and a breaker of its own. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from redis.crc import key_slot

from cdc_invalidator.reader.breaker import Breaker
from cdc_invalidator.reader.clients import Address, Recipe, Target, redirection
from cdc_invalidator.reader.steps import Command, Unavailable, word

_log = logging.getLogger("cdc_invalidator.reader")

# How long a read waits for a connection while other reads have them all.
CONNECTION_SECONDS = 5.0
# Between two looks at who is master, or at who has which slot.
LOOK_SECONDS = 1.0
REPORT_SECONDS = 60.0
SLOTS = 16384
# Error replies that are no answer: another server may have one, or this one a little later.
_NO_ANSWERS = frozenset({"CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS"})


class Exchange(NamedTuple):
    """Commands on their way. ``used``: the connection has been idle, so it may have died without anybody's knowing."""

    connection: Any
    commands: Sequence[Command]
    used: bool


class Server:
    """One server: its connections, and the breaker before them.

    Args:
        recipe: how a connection is made.
        breaker: detects that the server is gone.
    """

    def __init__(self, recipe: Recipe, breaker: Breaker) -> None:
        self.recipe = recipe
        self.breaker = breaker
        self._answers = recipe.driver.errors.ResponseError
        self._timeouts = (TimeoutError, recipe.driver.errors.TimeoutError)
        self._report_at = 0.0
        self._begin()

    def _begin(self) -> None:
        self._idle: list[Any] = []
        self._turns = asyncio.Semaphore(self.recipe.most)
        self._process = os.getpid()  # last: another thread that sees it uses the rest

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one go and return their replies.

        Raises:
            Unavailable: there is no answer.
        """
        return await self.finish(await self.begin(commands))

    async def begin(self, commands: Sequence[Command], *, anew: bool = False) -> Exchange:
        """Send commands; `finish` or `abandon` must follow. ``anew``: on a new connection.

        Raises:
            Unavailable: it can't.
        """
        if self.breaker.failures and not self.breaker.allows(time.monotonic()):
            raise Unavailable("breaker_open")
        if self._process != os.getpid():
            self._begin()  # the connections are still those of the parent process
        turns = self._turns
        if not await _turn(turns, CONNECTION_SECONDS):
            raise Unavailable("no_connection")
        used, connection = False, None
        try:
            try:
                used = bool(self._idle) and not anew
                connection = self._idle.pop() if used else self.recipe.connection()
            except IndexError:  # another thread was faster
                used, connection = False, self.recipe.connection()
            if not used:
                async with asyncio.timeout(self.recipe.connect_seconds):
                    await connection.connect()
            async with asyncio.timeout(self.recipe.seconds):
                await connection.send_packed_command(connection.pack_commands(commands))
        except BaseException as error:
            turns.release()
            await _close(connection)
            if used and self._died(error):
                await self.drop()
                return await self.begin(commands, anew=True)
            self._blame(error)
            raise
        return Exchange(connection, commands, used)

    async def finish(self, exchange: Exchange) -> list[Any]:
        """Return the replies.

        Raises:
            Unavailable: there is no answer.
        """
        connection = exchange.connection
        replies: list[Any] = []
        words = []
        try:
            async with asyncio.timeout(self.recipe.seconds):
                for _ in exchange.commands:
                    try:
                        replies.append(await connection.read_response(disable_decoding=True))
                    except self._answers as error:
                        replies.append(error)
                        words.append(word(error))
        except BaseException as error:
            await self.abandon(exchange)
            if exchange.used and self._died(error):
                await self.drop()
                return await self.finish(await self.begin(exchange.commands, anew=True))
            self._blame(error)
            raise
        if words and not _NO_ANSWERS.isdisjoint(words):
            await self.abandon(exchange)
            self._blame(Unavailable("redis_down"))
        self._idle.append(connection)
        self._turns.release()
        if self.breaker.failures:
            self.breaker.worked()
        if "READONLY" in words:
            await self.drop()  # it is no master any more: perhaps its name means another server by now
        return replies

    async def abandon(self, exchange: Exchange) -> None:
        """Wait for no replies."""
        self._turns.release()
        await _close(exchange.connection)

    def _died(self, error: BaseException) -> bool:
        """Return whether a connection has died while nobody looked, rather than that the server is slow."""
        return isinstance(error, Exception) and not isinstance(error, (Unavailable, *self._timeouts))

    def _blame(self, error: BaseException) -> None:
        """Note that there was no answer, whatever the driver calls it.

        Raises:
            Unavailable: always, unless the reader was cancelled.
        """
        if not isinstance(error, Exception):
            return
        now = time.monotonic()
        self.breaker.failed(now)
        if self.breaker.open and now >= self._report_at:
            self._report_at = now + REPORT_SECONDS
            what = "an error reply" if isinstance(error, Unavailable) else type(error).__name__
            _log.warning("Redis at %s gives no answer (%s); reads go to the database", self.recipe, what)
        raise Unavailable("redis_down") from error

    async def where(self) -> Recipe:
        """Return how a connection to the server is made."""
        return self.recipe

    async def drop(self) -> None:
        """Close the connections that nobody uses now."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await _close(connection)

    async def close(self) -> None:
        """Close the connections; those in use are closed by whoever uses them, or with the process."""
        await self.drop()


class Master:
    """The master that Sentinels name: they are asked once a second, by the first read of it.

    Args:
        target: the Sentinels.
        breaker: detects that the master is gone.
        moved: is called when another server is master.
    """

    def __init__(self, target: Target, breaker: Breaker, moved: Callable[[], None]) -> None:
        self._target = target
        self._breaker = breaker
        self._moved = moved
        self._sentinels = [Server(recipe, Breaker(1, 10.0)) for recipe in target.sentinels]
        self._server: Server | None = None
        self._address: Address | None = None
        self._look_at = 0.0

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one go and return their replies.

        Raises:
            Unavailable: there is no answer.
        """
        server = self._server
        if server is None or time.monotonic() >= self._look_at:
            server = await self._look()
        return await server.send(commands)

    async def _look(self) -> Server:
        self._look_at = time.monotonic() + LOOK_SECONDS
        named = [found for sentinel in self._sentinels if (found := await self._ask(sentinel)) is not None]
        if not named:
            if self._server is None:
                raise Unavailable("redis_down")
            return self._server
        # Who has promoted a server knows it first; the others hear of its epoch.
        _, address = max(named, key=lambda each: (each[0], named.count(each)))
        last = self._server
        if last is not None and address == self._address:
            return last
        server = self._server = Server(self._target.recipe.at(*address), self._breaker)
        self._address = address
        if last is not None:
            _log.info("Sentinel names another master; the connections to the last one are closed")
            self._breaker.worked()
            self._moved()
            await last.close()
        return server

    async def _ask(self, sentinel: Server) -> tuple[int, Address] | None:
        """Return the epoch of a Sentinel's configuration and the master's address, if it knows that."""
        service = self._target.service
        asking = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service), ("SENTINEL", "MASTER", service)]
        with suppress(Unavailable):
            address, flat = await sentinel.send(asking)
            if not address or isinstance(address, Exception):
                return None
            facts = {} if isinstance(flat, Exception) else _pairs(flat)
            if facts and int(facts[b"num-other-sentinels"]) < self._target.peers:
                return None
            host, port = address
            return int(facts.get(b"config-epoch", 0)), (self._target.force_ip or host.decode(), int(port))
        return None

    async def where(self) -> Recipe:
        """Return how a connection to the master is made.

        Raises:
            Unavailable: no Sentinel answers.
        """
        server = self._server
        if server is None or time.monotonic() >= self._look_at:
            server = await self._look()
        return server.recipe

    async def close(self) -> None:
        """Close all connections."""
        for server in (*self._sentinels, *((self._server,) if self._server is not None else ())):
            await server.close()


class Cluster:
    """The masters of a cluster, by the slots that they have.

    The slots are read when a server was told wrong or gives no answer: at most once a second, by one read.

    Args:
        target: nodes of the cluster.
        breaker: says when a server counts as gone; each has one like it.
    """

    def __init__(self, target: Target, breaker: Breaker) -> None:
        self._target = target
        self._breaker = breaker
        self._servers: dict[Address, Server] = {}
        self._slots: list[Server | None] = []
        self._look_at = 0.0
        self._wrong = True

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, to each server those for its keys, and return their replies.

        What a server gives no answer to is `Unavailable` in its place.

        Raises:
            Unavailable: no server gives an answer.
        """
        if self._wrong and time.monotonic() >= self._look_at:
            await self._look()
        if len(commands) == 1:
            server = self._server_of(commands[0])
            try:
                replies = await server.send(commands)
            except Unavailable as gone:
                self._wrong |= gone.reason == "redis_down"
                raise
        else:
            replies = await self._send_many(commands)
        for at, reply in enumerate(replies):
            if isinstance(reply, Exception) and (where := redirection(reply)) is not None:
                replies[at] = await self._redirected(commands[at], *where)
        gone_at = [reply for reply in replies if isinstance(reply, Unavailable)]
        if gone_at and len(gone_at) == len(replies):
            raise gone_at[0]
        return replies

    async def _send_many(self, commands: Sequence[Command]) -> list[Any]:
        """Send to all servers before the first reply is waited for."""
        places: dict[Server, list[int]] = {}
        replies: list[Any] = [None] * len(commands)
        for at, command in enumerate(commands):
            try:
                places.setdefault(self._server_of(command), []).append(at)
            except Unavailable as gone:
                replies[at] = gone
        under_way: dict[Server, Exchange] = {}
        try:
            # In the same order as other reads: each of two might have the last connection to what the other one needs.
            for server, each in sorted(places.items(), key=_name):
                try:
                    under_way[server] = await server.begin([commands[at] for at in each])
                except Unavailable as gone:
                    self._wrong |= gone.reason == "redis_down"
                    for at in each:
                        replies[at] = gone
            for server, each in places.items():
                exchange = under_way.pop(server, None)
                if exchange is None:
                    continue
                try:
                    found = await server.finish(exchange)
                except Unavailable as gone:
                    self._wrong |= gone.reason == "redis_down"
                    found = [gone] * len(each)
                for at, reply in zip(each, found, strict=True):
                    replies[at] = reply
        finally:
            for server, exchange in under_way.items():
                await server.abandon(exchange)
        return replies

    def owner(self, slot: int) -> Server | None:
        """Return who has a slot, as far as is known by now."""
        return self._slots[slot] if self._slots else None

    def doubt(self) -> None:
        """Note that slots may have moved."""
        self._wrong = True

    def _server_of(self, command: Command) -> Server:
        """Return who has the key of a command.

        Raises:
            Unavailable: nobody.
        """
        server = self._slots[key_slot(_key(command))] if self._slots else None
        if server is None:
            self._wrong = True
            raise Unavailable("redis_down")
        return server

    async def _redirected(self, command: Command, kind: str, address: Address) -> Any:
        """Return the reply of the server that another one has named."""
        slot = key_slot(_key(command))
        before = self._slots[slot]
        server = self._named(*address, before.recipe if before is not None else self._target.recipe)
        if kind == "MOVED":
            self._slots[slot] = server
            self._wrong = True
        try:
            return (await server.send([command] if kind == "MOVED" else [("ASKING",), command]))[-1]
        except Unavailable as gone:
            return gone

    def _named(self, host: str, port: int, by: Recipe) -> Server:
        """Return the server that another one has named; without a host, it is the other one's."""
        return self._at(self._target.remap((by.options["host"] if host in {"", "?"} else host, port)))

    def _at(self, address: Address) -> Server:
        found = self._servers.get(address)
        if found is None:
            made = Server(self._target.recipe.at(*address), self._breaker.like())
            found = self._servers.setdefault(address, made)
        return found

    async def _look(self) -> None:
        """Read who has which slot, of the first that says it; those that are known to be gone come last."""
        self._look_at = time.monotonic() + LOOK_SECONDS
        have = {server for server in self._slots if server is not None}
        known = [server for server in list(self._servers.values()) if server in have]
        asked = dict.fromkeys([*known, *(self._at(address) for address in self._target.starts)])
        for server in sorted(asked, key=lambda server: server.breaker.failures):
            try:
                (ranges,) = await server.send([("CLUSTER", "SLOTS")])
            except Unavailable:
                continue
            if isinstance(ranges, Exception) or not ranges:
                continue
            slots: list[Server | None] = [None] * SLOTS
            for first, last, (host, port, *_), *_ in ranges:
                named = self._named((host or b"").decode(), port, server.recipe)
                slots[first : last + 1] = [named] * (last + 1 - first)
            self._slots, self._wrong = slots, False
            await self._leave(set(slots))
            return

    async def _leave(self, masters: Collection[Server | None]) -> None:
        """Close the connections to all others: where servers come and go, there would be more and more."""
        for address, server in list(self._servers.items()):
            if server not in masters:
                self._servers.pop(address, None)
                await server.close()

    async def close(self) -> None:
        """Close all connections."""
        for server in list(self._servers.values()):
            await server.close()


Way = Server | Master | Cluster


def way_to(target: Target, breaker: Breaker, moved: Callable[[], None]) -> Way:
    """Return what sends commands to what a client is of. ``moved``: is called when another server is master."""
    if target.cluster:
        return Cluster(target, breaker)
    if target.sentinels:
        return Master(target, breaker, moved)
    return Server(target.recipe, breaker)


def _name(place: tuple[Server, Any]) -> str:
    return str(place[0].recipe)


def _key(command: Command) -> bytes:
    """Return the first key of a command; a script has its digest and the number of its keys before it."""
    key: bytes = command[3] if command[0] in {"EVALSHA", "EVAL"} else command[1]
    return key


def _pairs(flat: Any) -> dict[bytes, bytes]:
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=False))


async def _close(connection: Any) -> None:
    """Close a connection, whatever state it is in."""
    if connection is None:
        return
    with suppress(Exception):  # it is thrown away; nothing depends on how
        if connection.is_connected:
            connection._writer.transport.abort()  # noqa: SLF001  TLS would say goodbye, in a loop that may end now
        await connection.disconnect(nowait=True)


async def _turn(turns: asyncio.Semaphore, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds if turns.locked() else None):
            return await turns.acquire()
    except TimeoutError:
        return False
