"""Work that goes on while the read that wanted it has returned: refreshes of entries. A bounded number, then no more.

What is refused is lost, which harms nobody: the entry is still there, and another read will want the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

_log = logging.getLogger("cdc_invalidator.reader")

# How many work at once, and how many wait; for how many seconds a thread waits for work before it ends.
THREADS, WAITING, IDLE_SECONDS = 4, 64, 10.0


class Crew:
    """Threads that work, as long as there is work; for the shell that waits.

    Args:
        after: is called in the thread after each work.
    """

    def __init__(self, after: Callable[[], Any] = lambda: None) -> None:
        self._after = after
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], Any]] = deque()
        self._threads = self._idle = 0
        self._process = os.getpid()  # last: another thread that sees it uses the rest

    def start(self, work: Callable[[], Any]) -> bool:
        """Let something be done; False if too much waits already."""
        if self._process != os.getpid():
            self._begin()  # a forked process has no threads, and perhaps a lock that nobody gives back
        with self._changed:
            if len(self._waiting) >= WAITING:
                return False
            self._waiting.append(work)
            if len(self._waiting) > self._idle and self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._run, name="cdc-invalidator-refresh", daemon=True).start()
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                try:
                    work()
                finally:
                    self._after()
            except Exception as error:  # noqa: BLE001  nobody waits for it; what is loaded next shows whether it lasts
                _log.warning("a refresh in the background failed (%s)", type(error).__name__)

    def _next(self) -> Callable[[], Any] | None:
        with self._changed:
            self._idle += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting, IDLE_SECONDS)
            self._idle -= 1
            if not self._waiting:
                self._threads -= 1
                return None
            return self._waiting.popleft()

    def finish(self, seconds: float) -> None:
        """Wait until all is done, but not for longer; what still waits then is dropped."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._idle == self._threads, seconds)
            self._waiting.clear()


class AsyncCrew:
    """Tasks that work; for the shell that awaits.

    Args:
        after: as for `Crew`.
    """

    def __init__(self, after: Callable[[], Any] = lambda: None) -> None:
        self._after = after
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Callable[[], Awaitable[Any]]) -> bool:
        """Let something be done; False if too much is being done already."""
        if len(self._tasks) >= WAITING:
            # Tasks of an event loop that was closed never end.
            self._tasks -= {task for task in list(self._tasks) if task.get_loop().is_closed()}
            if len(self._tasks) >= WAITING:
                return False
        # As a thread does, it begins without what belongs to the request: its session, its span.
        task = asyncio.get_running_loop().create_task(self._run(work), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _run(self, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            try:
                await work()
            finally:
                self._after()
        except Exception as error:  # noqa: BLE001  nobody waits for it; what is loaded next shows whether it lasts
            _log.warning("a refresh in the background failed (%s)", type(error).__name__)

    async def finish(self, seconds: float) -> None:
        """Wait until all of this event loop is done, but not for longer; what is not done then is cancelled."""
        deadline = time.monotonic() + seconds
        loop = asyncio.get_running_loop()
        mine = [task for task in list(self._tasks) if task.get_loop() is loop]
        if not mine:
            return
        _, late = await asyncio.wait(mine, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=max(1.0, deadline - time.monotonic()))
