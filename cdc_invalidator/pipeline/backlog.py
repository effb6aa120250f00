"""The queue between receive and apply: what has been matched and not yet taken, bounded by the number of keys.

A batch is whatever has piled up here; there is no timer. A full backlog stops the reader, and so PostgreSQL's
walsender: memory stays bounded however long Redis is away.
"""

from __future__ import annotations

import asyncio
from collections import deque

from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.waiting import within

# Keys (and sweeps) that may wait: 10 to 20 MB of memory. Each batch counts as a few keys more.
CAPACITY = 100_000
BATCH = 8


class Backlog:
    """A queue of batches with their checkpoint tickets, for one writer and one reader in one event loop."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._batches: deque[tuple[Batch | PlainBatch, Ticket]] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self.weight = 0

    def __len__(self) -> int:
        """Return how many batches wait."""
        return len(self._batches)

    @property
    def full(self) -> bool:
        """True when the writer should wait for `room`."""
        return self.weight >= self._capacity

    def put(self, batch: Batch | PlainBatch, ticket: Ticket) -> None:
        """Add a batch. Never refuses: the writer asks `room` before it reads more."""
        self._batches.append((batch, ticket))
        self.weight += batch.weight + BATCH
        self._filled.set()
        if self.full:
            self._drained.clear()

    async def room(self) -> None:
        """Wait until the backlog is below its capacity."""
        await self._drained.wait()

    def take(self, weight: int) -> list[tuple[Batch | PlainBatch, Ticket]]:
        """Take what has piled up, in order: at least one batch if there is any, and about ``weight`` keys."""
        taken: list[tuple[Batch | PlainBatch, Ticket]] = []
        while self._batches and weight > 0:
            item = self._batches.popleft()
            taken.append(item)
            weight -= item[0].weight + BATCH
            self.weight -= item[0].weight + BATCH
        if not self._batches:
            self._filled.clear()
        if not self.full:
            self._drained.set()
        return taken

    async def wait(self, seconds: float) -> None:
        """Wait until there is something to take, at most so many seconds."""
        if self._filled.is_set() or seconds <= 0:
            await asyncio.sleep(0)
            return
        await within(seconds, self._filled)

    def wake(self) -> None:
        """Make a waiting reader look again."""
        self._filled.set()
