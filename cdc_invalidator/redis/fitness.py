"""Whether this daemon's Redis takes busts, which a daemon that stands by asks for itself.

The rule that holds here: nobody says that it could lead who has not had an answer within the last few seconds; and who
has led, and had to hand over, does not say so before Redis has answered it for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cdc_invalidator import errors
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.trouble import Trouble

PROBE_SECONDS = 1.0
# For so long answers must have been good: after a lead that had worked; and, twice as long each time, after one that
# never did, where Redis answers and yet does not take the busts.
CALM_SECONDS = 2.0
FIRST_PENANCE_SECONDS = 15.0
MOST_PENANCE_SECONDS = 300.0

_UNASKED = "Redis has not answered yet; check CDC_REDIS_URL and the server."


class Fitness:
    """Kept across sessions.

    Args:
        open_server: makes a `CacheServer` that is not connected yet.
        patience: an answer is good for so many seconds.
        clock: the monotonic clock.
    """

    def __init__(
        self, open_server: Callable[[], CacheServer], *, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open_server = open_server
        self._patience = patience
        self._clock = clock
        # When the last question was asked that had a good answer, and the first of an unbroken row of them.
        self._good_at: float | None = None
        self._good_since = 0.0
        self._calm = 0.0
        self._penance = Backoff(FIRST_PENANCE_SECONDS, MOST_PENANCE_SECONDS)
        self._failing: Trouble | None = None

    @property
    def found_at(self) -> float | None:
        """When it was found last that this daemon could lead; ``None`` if it could not, or if that is not known now."""
        good_at = self._good_at
        if good_at is None or self._failing is not None or good_at - self._good_since < self._calm:
            return None
        return good_at if self._clock() - good_at < self._patience else None

    @property
    def trouble(self) -> Trouble | None:
        """Why this daemon could not lead."""
        if self._good_at is None:
            return self._failing or Trouble.now(_UNASKED)
        ago = self._clock() - self._good_at
        if ago < self._patience:
            return None
        return self._failing or Trouble.now(_UNASKED, ago=ago)

    def leads(self) -> None:
        """Note that this daemon leads: what was answered before says nothing about the time after."""
        self._good_at = self._failing = None
        self._calm = 0.0

    def gave_way(self, trouble: Trouble | None, *, worked: bool) -> None:
        """Note that this daemon has handed the slot over.

        Args:
            trouble: why.
            worked: whether it had got on for a while before.
        """
        self._good_at, self._failing = None, trouble
        if worked:
            self._penance.reset()
        self._calm = CALM_SECONDS if worked else self._penance.next()

    async def run(self) -> None:
        """Ask until cancelled."""
        server: CacheServer | None = None
        try:
            while True:
                began = self._clock()
                try:
                    if server is None:
                        server = self._open_server()
                        await server.connect()
                    await server.probe()
                except errors.RedisUnavailable as error:
                    self._bad(error)
                    if server is not None:
                        await server.close()
                    server = None
                else:
                    self._good(began)
                await asyncio.sleep(PROBE_SECONDS)
        finally:
            if server is not None:
                await server.close()

    def _good(self, began: float) -> None:
        if self._good_at is None or self._failing is not None:
            self._good_since = began
        self._good_at, self._failing = began, None

    def _bad(self, error: errors.RedisUnavailable) -> None:
        self._failing = Trouble.now(str(error), self._failing)
