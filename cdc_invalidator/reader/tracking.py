"""Receives Redis's invalidation messages (RESP3, ``CLIENT TRACKING … BCAST``) on a separate connection.

On any error, the local entries are dropped and another connection is opened a little later.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from redis import exceptions

from cdc_invalidator.reader.local import PATIENCE, Local, Pulse

_log = logging.getLogger("cdc_invalidator.reader")
_AGAIN_SECONDS = 0.5


def _options(client: Any) -> tuple[type[Any], dict[str, Any]]:
    """Return the class and options of a connection like the client's, but with RESP3.

    Raises:
        ValueError: the client is of a cluster, or of no pool.
    """
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        raise ValueError("local entries need one server that sends messages; a cluster has many, so leave them out")
    options: Mapping[str, Any] = pool.connection_kwargs
    return pool.connection_class, {**options, "protocol": 3, "decode_responses": False, "socket_timeout": PATIENCE}


def _keys(message: Any) -> list[bytes] | None:
    """Read a message: the keys that have changed, or ``None`` for all."""
    keys = message[1]
    return None if keys is None else list(keys)


class Follower:
    """A thread that follows; for the shell that waits."""

    def __init__(self, client: Any, local: Local) -> None:
        self._make, self._options = _options(client)
        self._local = local
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cdc-invalidator-tracking", daemon=True)

    def start(self) -> None:
        """Begin; entries are kept as soon as Redis has answered."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = self._make(**self._options)
            try:
                self._follow(connection)
            except (exceptions.RedisError, OSError) as error:
                _log.warning("invalidation messages are lost (%s); local entries are dropped", type(error).__name__)
            finally:
                self._local.lost()
                connection.disconnect()
            self._stop.wait(_AGAIN_SECONDS)

    def _follow(self, connection: Any) -> None:
        connection.connect()
        connection._parser.set_invalidation_push_handler(lambda message: self._local.invalidate(_keys(message)))  # noqa: SLF001  there is no other way in
        connection.send_command(*self._local.command)
        connection.read_response()
        pulse = Pulse(self._local)
        while not self._stop.is_set():
            if pulse.due(time.monotonic()):
                connection.send_command("PING")
            # The reply to a message is None; the handler has taken it.
            if connection.can_read(timeout=pulse.beat / 2) and connection.read_response(push_request=True) is not None:
                pulse.answered()


class AsyncFollower:
    """A task that follows; for the shell that awaits."""

    def __init__(self, client: Any, local: Local) -> None:
        self._make, self._options = _options(client)
        self._local = local
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin; entries are kept as soon as Redis has answered."""
        self._task = asyncio.create_task(self._run(), name="cdc-invalidator-tracking")

    async def stop(self) -> None:
        """End."""
        self._stopping = True
        while self._task is not None and not self._task.done():
            # Once is not enough: while it connects, the driver takes it for a lost connection.
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_AGAIN_SECONDS / 5)

    async def _run(self) -> None:
        while not self._stopping:
            connection = self._make(**self._options)
            try:
                await self._follow(connection)
            except (exceptions.RedisError, OSError) as error:
                _log.warning("invalidation messages are lost (%s); local entries are dropped", type(error).__name__)
            finally:
                self._local.lost()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _follow(self, connection: Any) -> None:
        await connection.connect()
        connection._parser.set_invalidation_push_handler(self._take)  # noqa: SLF001  there is no other way in
        await connection.send_command(*self._local.command)
        await connection.read_response()
        pulse = Pulse(self._local)
        while True:
            if pulse.due(time.monotonic()):
                await connection.send_command("PING")
            # None after that time, and for a message, which the handler has taken.
            reply = await connection.read_response(push_request=True, timeout=pulse.beat / 2)
            if reply is not None:
                pulse.answered()

    async def _take(self, message: Any) -> None:
        self._local.invalidate(_keys(message))
