"""An estimate of how many keys of a cache exist: `max_keys_hint` as a bound. Pure.

A key lives for the cache's TTL, so only keys that were stored within that time can exist. They are counted as bits of a
bitmap (linear counting), which starts empty each TTL. Keys that other processes store are not seen, so nothing is
refused that the hint allows.
"""

from __future__ import annotations

import math

# The estimate is some percent off, and the hint is rough itself.
_ROOM = 1.25


class KeySpace:
    """The keys that this process has stored in the last TTL, or two.

    Args:
        hint: how many there may be, roughly.
        ttl: how long one lives, in seconds.
    """

    def __init__(self, hint: int, ttl: float) -> None:
        self._most = hint * _ROOM
        self._ttl = ttl
        self._size = max(8192, 4 * hint)
        self.clear()

    def clear(self, now: float = 0.0) -> None:
        """Begin anew, at a monotonic time in seconds."""
        self._until = now + self._ttl
        self._bits = bytearray((self._size + 7) // 8)
        self._bits_set = 0

    def admits(self, key: bytes, now: float) -> bool:
        """Count a key that is about to be stored; False if it is one too many.

        Args:
            key: the key.
            now: a monotonic time in seconds.
        """
        if now >= self._until:
            self.clear(now)
        at, bit = divmod(hash(key) % self._size, 8)
        if self._bits[at] >> bit & 1:
            return True
        if self.estimate >= self._most:
            return False
        self._bits[at] |= 1 << bit
        self._bits_set += 1
        return True

    @property
    def estimate(self) -> float:
        """How many keys there are, roughly."""
        free = max(1, self._size - self._bits_set)
        return -self._size * math.log(free / self._size)
