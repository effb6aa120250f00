"""Whether the apply task gets on, and what it waits for.

The rule that holds here: a turn that ends has busted all that had piled up, and has written the watermark if that was
due. So the daemon gets on as long as turns end, whatever holds a position back: a debounce, a sweep, a transaction that
readers don't see yet, or a standby hold up no turn.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Literal, ParamSpec, TypeVar

Waits = Literal["redis", "postgres", "output"]
Asked = ParamSpec("Asked")
Value = TypeVar("Value")


class Progress:
    """``since``: when the last turn ended, or the first began, on the monotonic clock; ``began``: the latter.

    ``waits_for``: what a turn that has not ended waits for. What is not said to be something else is Redis.

    Args:
        clock: the monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.began = self.since = clock()
        self.waits_for: Waits = "redis"

    def turned(self) -> None:
        """Note that a turn has ended."""
        self.since = self._clock()

    @property
    def blocked_for(self) -> float:
        """How many seconds ago the last turn ended. While all is well, that is a second at most."""
        return self._clock() - self.since

    def of_postgres(self, ask: Callable[Asked, Awaitable[Value]]) -> Callable[Asked, Awaitable[Value]]:
        """Return what asks PostgreSQL the same, and says so meanwhile."""

        async def asking(*args: Asked.args, **kwargs: Asked.kwargs) -> Value:
            with self.waiting("postgres"):
                return await ask(*args, **kwargs)

        return asking

    @contextmanager
    def waiting(self, what: Waits) -> Iterator[None]:
        """Say what is waited for in this context."""
        self.waits_for, before = what, self.waits_for
        try:
            yield
        finally:
            self.waits_for = before
