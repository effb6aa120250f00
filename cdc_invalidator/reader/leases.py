"""Keeps leases alive while a load runs, so that a lease may be short: a process that dies leaves it behind.

A lease that is lost stays lost: the script renews only one that is still held.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cdc_invalidator.reader.steps import Command, Renewal, Unavailable

# The thread looks what is due so often, and ends when nothing was held for so long.
_BEAT, _IDLE = 0.5, 10.0


class _Held:
    """Leases that are held now."""

    def __init__(self, renewal: Renewal) -> None:
        self.renewal = renewal
        began = time.monotonic()
        self.next_at = began + renewal.every
        self.until = began + renewal.limit
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None


class Keeper:
    """A thread that renews leases, as long as there are any; for the shell that waits."""

    def __init__(self, send: Callable[[Sequence[Command]], Any]) -> None:
        self._send = send
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._sooner = threading.Event()
        self._beat = _BEAT
        self._held: set[_Held] = set()
        self._running = False
        self._process = os.getpid()  # last: another thread that sees it uses the rest

    @contextmanager
    def holding(self, renewal: Renewal | None) -> Iterator[None]:
        """Renew leases as long as this is entered."""
        if renewal is None:
            yield
            return
        if self._process != os.getpid():
            self._begin()  # a forked process has no thread, and perhaps a lock that nobody gives back
        held = _Held(renewal)
        with self._lock:
            self._held.add(held)
            if renewal.every / 2 < self._beat:
                self._beat = renewal.every / 2
                self._sooner.set()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="cdc-invalidator-leases", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(held)

    def _run(self) -> None:
        try:
            self._renew()
        except BaseException:
            self._running = False  # else another thread may run by now
            raise

    def _renew(self) -> None:
        used = time.monotonic()
        while True:
            self._sooner.wait(self._beat)
            self._sooner.clear()
            now = time.monotonic()
            with self._lock:
                used = now if self._held else used
                if now - used > _IDLE:
                    self._running = False
                    return
                due = [held for held in self._held if held.next_at <= now < held.until]
            for held in due:
                held.next_at = now + held.renewal.every
            try:
                if due:
                    self._send([command for held in due for command in held.renewal.commands])
            except Unavailable:
                continue  # the lease runs out, or the next time is soon enough


class AsyncKeeper:
    """Timers that renew leases; for the shell that awaits."""

    def __init__(self, send: Callable[[Sequence[Command]], Awaitable[Any]]) -> None:
        self._send = send

    @contextmanager
    def holding(self, renewal: Renewal | None) -> Iterator[None]:
        """Renew leases as long as this is entered."""
        if renewal is None:
            yield
            return
        held = _Held(renewal)
        self._arm(held)
        try:
            yield
        finally:
            if held.timer is not None:
                held.timer.cancel()

    def _arm(self, held: _Held) -> None:
        held.timer = asyncio.get_running_loop().call_later(held.renewal.every, self._beat, held)

    def _beat(self, held: _Held) -> None:
        if time.monotonic() < held.until:
            held.task = asyncio.ensure_future(self._renew(held.renewal.commands))
            self._arm(held)

    async def _renew(self, commands: Sequence[Command]) -> None:
        try:
            await self._send(commands)
        except Unavailable:
            return  # the lease runs out, or the next time is soon enough
