"""Is the stream the same history of the database as the one that the watermark speaks of? Pure.

A database that is restored from a copy of its disk keeps system identifier and timeline, and its slot stands where it
stood then. Once it has written more WAL than was lost, no LSN tells it from what it was. But a commit that was received
is in the WAL for good: a stream that begins before it brings it again, at the same LSN and with the same time.

The rule that holds here: until that commit has come again, nothing is recorded; if another one comes in its place, or
none, the caches are swept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.redis.watermark import Watermark


class Commit(NamedTuple):
    """A commit record: its LSN, and its time in µs since 2000."""

    lsn: int
    at: int

    def __str__(self) -> str:
        return f"{self.lsn}:{self.at}"

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Read the text form; ``None`` if it is none."""
        at, _, time = text.partition(":")
        try:
            return cls(int(at), int(time))
        except ValueError:
            return None


class Lineage:
    """Follows the commits of one stream that bust something.

    ``last``: the last of them, or what the watermark said.
    """

    def __init__(self) -> None:
        self.last: Commit | None = None
        self._expected: Commit | None = None

    @property
    def proven(self) -> bool:
        """Whether no commit is awaited that must come again."""
        return self._expected is None

    def expect(self, found: Iterable[Watermark | None], start: int) -> None:
        """Await the last commit that a watermark knows, if a stream from ``start`` must bring it again."""
        known = [Commit.read(watermark.last_commit) for watermark in found if watermark is not None]
        self.last = max((commit for commit in known if commit is not None), default=None)
        self._expected = self.last if self.last is not None and self.last.lsn >= start else None

    def trust(self) -> None:
        """Await nothing: all is swept in any case."""
        if self.last == self._expected:
            # It is of a history that is gone.
            self.last = None
        self._expected = None

    def differs(self, taken: Sequence[Batch | PlainBatch], received: int) -> bool:
        """Take note of batches in stream order; return whether they belong to another history.

        Args:
            taken: the next ones.
            received: all that was received below this LSN has been taken.
        """
        expected = self._expected
        self.last = next((commit for batch in reversed(taken) if (commit := _last_of(batch))), self.last)
        if expected is None:
            return False
        commits = {commit for batch in taken for commit in _commits_of(batch)}
        if expected in commits:
            self._expected = None
            return False
        return received > expected.lsn or any(commit.lsn >= expected.lsn for commit in commits)


def _last_of(batch: Batch | PlainBatch) -> Commit | None:
    # What was not a transaction has no time.
    return None if batch.committed_at is None else Commit(batch.commit_lsn, batch.committed_at)


def _commits_of(batch: Batch | PlainBatch) -> Iterable[Commit]:
    parts = batch.batches() if isinstance(batch, PlainBatch) else [batch]
    return filter(None, map(_last_of, parts))
