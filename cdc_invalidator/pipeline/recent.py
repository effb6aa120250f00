"""Recent busts, to be re-applied to a Redis that comes back without them. Pure; it outlives sessions.

The rule that holds here: what is subtracted for a batch is what was added for it. Batches grow after they were noted,
when a `via` query is asked at last or again, and each batch knows what was counted for it.

Redis can lose an acknowledged bust: in a failover to a replica that lagged, with a restored snapshot, with another
instance at the same address. Its watermark says since when. What was applied after that is here, unless it was too
much; then the caches are swept.
"""

from __future__ import annotations

from collections import deque

from cdc_invalidator.pipeline.backlog import BATCH
from cdc_invalidator.pipeline.batch import Batch, PlainBatch

# Keys that are remembered, some 150 bytes each.
CAPACITY = 100_000


class Recent:
    """Batches in stream order, as far back as ``capacity`` keys reach."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._batches: deque[Batch | PlainBatch] = deque()
        self._weight = 0
        # All that was committed at this LSN or later, and received, is here.
        self._floor = 0
        self._history: tuple[str, int] | None = None
        self._recorded = 0

    def begin(self, history: tuple[str, int], start: int) -> None:
        """Note that a stream begins at ``start`` in a history (system identifier, timeline).

        Older batches are kept if the stream goes on from there, but for those that it will bring again.
        """
        if history != self._history or start > self._recorded:
            while self._batches:
                self._forget(self._batches.pop())
            self._history, self._floor, self._recorded = history, start, start
            return
        self._recorded = start
        while self._batches and self._batches[-1].first_lsn >= start:
            self._forget(self._batches.pop())

    def note(self, batch: Batch | PlainBatch) -> None:
        """Remember a batch that Redis has acknowledged."""
        self._batches.append(batch)
        self._count(batch)

    def grown(self, batch: Batch) -> None:
        """Note that a batch has got more keys; it may be remembered, or a part of one that is."""
        whole = batch.whole or batch
        if whole.counted:
            self._count(whole)

    def _count(self, batch: Batch | PlainBatch) -> None:
        weight = batch.weight + BATCH
        self._weight += weight - batch.counted
        batch.counted = weight
        while self._weight > self._capacity:
            forgotten = self._batches.popleft()
            self._forget(forgotten)
            self._floor = max(self._floor, forgotten.commit_lsn + 1)

    def _forget(self, batch: Batch | PlainBatch) -> None:
        self._weight -= batch.counted
        batch.counted = 0

    def recorded(self, position: int) -> None:
        """Note that all up to this position has been applied, and the watermark says so."""
        self._recorded = max(self._recorded, position)

    def reaches(self, position: int) -> bool:
        """Return whether everything that was applied after this position is here."""
        return position >= self._floor

    def since(self, position: int) -> list[Batch | PlainBatch]:
        """Return what was applied after this position, in order."""
        return [batch for batch in self._batches if batch.commit_lsn >= position]
