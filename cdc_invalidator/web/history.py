"""The last quarter of an hour of each cache, as counters that are looked at every few seconds.

Memory is bounded: so many samples of so many caches; the caches beyond are one.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

SAMPLE_SECONDS = 5.0
SAMPLES = 180
MOST_CACHES = 200
# What the caches beyond are called; no cache can be.
OTHERS = ""


class Counts(NamedTuple):
    """What was counted: busted keys, those of them that existed, and sweeps."""

    keys: float = 0.0
    existed: float = 0.0
    sweeps: float = 0.0

    def __add__(self, other: object) -> Counts:
        assert isinstance(other, Counts)
        return Counts(self.keys + other.keys, self.existed + other.existed, self.sweeps + other.sweeps)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.keys - other.keys, self.existed - other.existed, self.sweeps - other.sweeps)


class _Ring:
    """What was added between two samples, the oldest first from `History.at` on."""

    def __init__(self) -> None:
        self.before = Counts()
        self.columns = tuple(array("f", [0.0]) * SAMPLES for _ in Counts._fields)


class History:
    """What each cache did lately; it belongs to one event loop.

    Args:
        read: gives what was counted since the start, by cache.
    """

    def __init__(self, read: Callable[[], Mapping[str, Counts]]) -> None:
        self._read = read
        self._rings: dict[str, _Ring] = {}
        self._at = 0
        self._taken = 0
        self._sample_at = 0.0

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self) -> None:
        """Note what was counted since the last sample."""
        found: dict[str, Counts] = defaultdict(Counts)
        for cache, counts in self._read().items():
            known = cache in self._rings or len(self._rings) + len(found.keys() - self._rings) < MOST_CACHES
            name = cache if known else OTHERS
            found[name] += counts
        for name, counts in found.items():
            ring = self._rings.get(name) or self._rings.setdefault(name, _Ring())
            more = counts - ring.before
            ring.before = counts
            for column, value in zip(ring.columns, more, strict=True):
                column[self._at] = max(0.0, value)
        for name in self._rings.keys() - found:
            for column in self._rings[name].columns:
                column[self._at] = 0.0
        self._at = (self._at + 1) % SAMPLES
        self._taken += 1
        self._sample_at = time.monotonic()

    @property
    def caches(self) -> list[str]:
        """The caches that are told apart."""
        return list(self._rings)

    def of(self, cache: str) -> list[Counts]:
        """Return what was added between the samples, the oldest first; empty for a cache that was never busted."""
        ring = self._rings.get(cache)
        if ring is None:
            return []
        # Of the first sample it is not known when it was added.
        taken = min(self._taken, SAMPLES)
        turned = [column[self._at :] + column[: self._at] for column in ring.columns]
        return [Counts(*values) for values in zip(*turned, strict=True)][SAMPLES - taken :]
