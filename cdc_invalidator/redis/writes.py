"""Which keys were written, and when: Redis tells whoever follows it (`CLIENT TRACKING … BCAST`, RESP3).

An application is often faster than the stream: it has deleted an entry, and somebody has filled it again, before
anybody could look at it. Only the server can tell that.

The rule that holds here: what was not told, or is forgotten, is never taken for not written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from cdc_invalidator.redis.node import Command

# Keys whose writes are remembered.
MOST = 200_000


class Writes:
    """The writes of some seconds; times are of the monotonic clock.

    Args:
        prefixes: what the keys begin with.
        seconds: for how long a write is remembered.
    """

    def __init__(self, prefixes: Iterable[bytes], seconds: float) -> None:
        self._prefixes = _apart(prefixes)
        self._seconds = seconds
        # Of the keys written before and since the last turn; what was written before those is forgotten.
        self._before: dict[bytes, list[float]] = {}
        self._since: dict[bytes, list[float]] = {}
        self._turned_at = time.monotonic()
        self._remembered = float("-inf")
        # Since when they are told, and until when that is proven; and the same of the connections before these.
        self._began = self._heard = float("inf")
        self._earlier = (self._began, float("-inf"))

    def begin(self) -> None:
        """Note that writes are told from now on; it is not known what was written since they were `heard` last."""
        self._earlier = (self._began, self._heard)
        self._began = self._heard = time.monotonic()

    def heard(self) -> None:
        """Note that the servers that tell them are there."""
        self._heard = time.monotonic()

    @property
    def command(self) -> Command:
        """What makes Redis tell them, on the connection that it is sent on."""
        named = [word for prefix in self._prefixes if prefix for word in ("PREFIX", prefix)]
        return ("CLIENT TRACKING", "ON", "BCAST", *named)

    def note(self, keys: Sequence[bytes] | None) -> None:
        """Take a message of Redis: the keys that were written, ``None`` for all."""
        now = time.monotonic()
        if now - self._turned_at > self._seconds or len(self._since) > MOST:
            self._remembered = self._turned_at
            self._before, self._since, self._turned_at = self._since, {}, now
        for key in keys or ():
            self._since.setdefault(key, []).append(now)

    def known(self, start: float, end: float) -> bool:
        """Return whether all writes of that time were told, and are remembered."""
        if start < self._remembered:
            return False
        began, heard = self._earlier
        return start >= self._began or (start >= began and end <= heard)

    def between(self, key: bytes, start: float, end: float) -> bool:
        """Return whether a key was written in that time."""
        found = (*self._before.get(key, ()), *self._since.get(key, ()))
        return any(start <= at <= end for at in found)


def _apart(prefixes: Iterable[bytes]) -> list[bytes]:
    """Leave out what begins with another one: Redis refuses that."""
    apart: list[bytes] = []
    for prefix in sorted(set(prefixes)):
        if not apart or not prefix.startswith(apart[-1]):
            apart.append(prefix)
    return apart
