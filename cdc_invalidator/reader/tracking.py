"""Receives Redis's invalidation messages (RESP3, ``CLIENT TRACKING … BCAST``) on a separate connection.

On any error, the local entries are dropped and another connection is opened a little later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from cdc_invalidator.reader.clients import Recipe
from cdc_invalidator.reader.local import PATIENCE, Local, Pulse

_log = logging.getLogger("cdc_invalidator.reader")
_AGAIN_SECONDS = 0.5
REPORT_SECONDS = 60.0
_FOLLOWED: WeakSet[Local] = WeakSet()


def _forked() -> None:
    for local in _FOLLOWED:
        local.forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


class MovedError(Exception):
    """Another server is master."""


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return what a connection for messages has that others have not."""
    return {"protocol": 3, "socket_timeout": PATIENCE, "socket_connect_timeout": recipe.connect_seconds}


def _keys(message: Any) -> list[bytes] | None:
    """Read a message: the keys that have changed, or ``None`` for all."""
    keys = message[1]
    return None if keys is None else list(keys)


class _Done:
    """What a driver may await, as redis-py does, or drop, as valkey-py does."""

    def __await__(self) -> Iterator[None]:
        return iter(())


class _Lost:
    """Logs that the connection is gone, now and then; it is tried again twice a second."""

    def __init__(self) -> None:
        self._report_at = float("-inf")

    def tell(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._report_at:
            self._report_at = now + REPORT_SECONDS
            _log.warning("invalidation messages are lost (%s); local entries are dropped", type(error).__name__)


class Follower:
    """A thread that follows; for the shell that waits."""

    def __init__(self, way: Any, local: Local) -> None:
        self._way = way
        self._local = local
        self._lost = _Lost()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cdc-invalidator-tracking", daemon=True)

    def start(self) -> None:
        """Begin; entries are kept as soon as Redis has answered."""
        _FOLLOWED.add(self._local)
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = None
            try:
                recipe = self._way.where()
                connection = recipe.connection(**_options(recipe))
                self._follow(connection, recipe)
            except Exception as error:  # noqa: BLE001  whatever the driver raises, it is tried again
                self._lost.tell(error)
            finally:
                self._local.lost()
                if connection is not None:
                    connection.disconnect()
            self._stop.wait(_AGAIN_SECONDS)

    def _follow(self, connection: Any, recipe: Recipe) -> None:
        connection.connect()
        connection._parser.set_invalidation_push_handler(lambda message: self._local.invalidate(_keys(message)))  # noqa: SLF001  there is no other way in
        connection.send_command(*self._local.command)
        connection.read_response()
        pulse = Pulse(self._local)
        while not self._stop.is_set():
            if self._way.where() is not recipe:
                raise MovedError
            if pulse.due(time.monotonic()):
                connection.send_command("PING")
            # The reply to a message is None; the handler has taken it.
            if connection.can_read(timeout=pulse.beat / 2) and connection.read_response(push_request=True) is not None:
                pulse.answered()


class AsyncFollower:
    """A task that follows; for the shell that awaits."""

    def __init__(self, way: Any, local: Local) -> None:
        self._way = way
        self._local = local
        self._lost = _Lost()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin; entries are kept as soon as Redis has answered."""
        _FOLLOWED.add(self._local)
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
            connection = None
            try:
                recipe = await self._way.where()
                connection = recipe.connection(**_options(recipe))
                await self._follow(connection, recipe)
            except Exception as error:  # noqa: BLE001  whatever the driver raises, it is tried again
                self._lost.tell(error)
            finally:
                self._local.lost()
                if connection is not None:
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _follow(self, connection: Any, recipe: Recipe) -> None:
        await connection.connect()
        connection._parser.set_invalidation_push_handler(self._take)  # noqa: SLF001  there is no other way in
        await connection.send_command(*self._local.command)
        await connection.read_response()
        pulse = Pulse(self._local)
        while not self._stopping:
            if await self._way.where() is not recipe:
                raise MovedError
            if pulse.due(time.monotonic()):
                await connection.send_command("PING")
            # None after that time, and for a message, which the handler has taken.
            reply = await connection.read_response(push_request=True, timeout=pulse.beat / 2)
            if reply is not None:
                pulse.answered()

    def _take(self, message: Any) -> _Done:
        self._local.invalidate(_keys(message))
        return _Done()
