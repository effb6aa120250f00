"""What the thread of the pages may know of the bust loop: whether it turns, and what it says of itself when asked.

The rule that holds here: nobody but the bust loop touches the daemon's objects. It is asked, with a deadline; if it
does not answer, its last answer counts, with its age.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

# How often the loop notes that it turns, and what it would answer.
BEAT_SECONDS = 1.0
# How long its answer is awaited.
ANSWER_SECONDS = 1.0
# A loop that has not turned for so long hangs.
HANGS_SECONDS = 10.0

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon says of itself; nobody changes it any more.

    ``status``: what /status shows. ``unready``: why /readyz is not 200; ``None`` if it is. ``at``: Unix time.
    """

    status: dict[str, Any]
    unready: str | None
    at: float


class Pulse:
    """The pulse of an event loop; use it there as a context manager.

    Args:
        look: makes the answer, in that loop.
    """

    def __init__(self, look: Callable[[], Answer]) -> None:
        self._look = look

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._next.cancel()

    def _beat(self) -> None:
        self._answer = self._look()
        self._turned_at = time.monotonic()
        self._next = self._loop.call_later(BEAT_SECONDS, self._beat)

    def hangs(self) -> str | None:
        """Return what is wrong if the loop has not turned for long. Any thread may ask."""
        seconds = time.monotonic() - self._turned_at
        if seconds < HANGS_SECONDS:
            return None
        return f"The daemon hangs: the loop that busts has not turned for {seconds:.0f} s; start it anew."

    async def call(self, question: Callable[[], Value]) -> Value | None:
        """Return what a function gives in the daemon's loop; ``None`` if it does not come to it."""
        asking = asyncio.get_running_loop()
        answered: asyncio.Future[Value] = asking.create_future()

        def tell(said: Value) -> None:
            if not answered.done():
                answered.set_result(said)

        def answer() -> None:
            said = question()
            # If the pages are closed by now, nobody waits for it.
            with suppress(RuntimeError):
                asking.call_soon_threadsafe(tell, said)

        try:
            self._loop.call_soon_threadsafe(answer)
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answered
        except (TimeoutError, RuntimeError):
            # A loop that is closed says so by a RuntimeError.
            return None

    async def ask(self) -> tuple[Answer, bool]:
        """Return what the daemon says now, and False; or what it said last, and True. Another loop may ask."""
        said = await self.call(self._look)
        if said is None:
            return self._answer, True
        self._answer = said
        return said, False
