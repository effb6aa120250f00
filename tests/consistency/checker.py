"""Tells from a history which reads the promises forbid. Pure.

The promise: a read under the watermark W, which was read before it began, shows every commit up to W. So a read is
stale when its value's version was superseded by a commit whose LSN is not above W. Whose LSN is known only by an upper
bound is taken to be there: that errs on the side of no alarm, for less than a watermark's step.

Not promised, and not looked for: that one reader's reads never go back. A load of its own may show a commit before its
bust is in, and the next read may find the entry of before. `at_least` with the LSN of that commit is the remedy, and
such a read is recorded under that LSN, so that it is judged like any other.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from consistency.history import ABSENT, Read, Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NS_A_SECOND = 1_000_000_000


class Stale(NamedTuple):
    """A read that shows what its watermark says is gone.

    ``required``: the oldest version that it might have shown.
    """

    read: Read
    required: int


def behind(reads: Iterable[Read], seconds: float, careful: int) -> Iterator[Read]:
    """Give the same reads as served under the watermark that their reader knew so long before.

    It is what a promise with a bound in time comes to: entries in a process's own memory.

    Args:
        reads: those of each reader in the order of their beginnings.
        seconds: how much older.
        careful: readers from this number on ask for an LSN, which no memory of theirs may fall short of.
    """
    known: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for read in reads:
        if read.reader >= careful:
            yield read
            continue
        began, watermarks = known.setdefault((read.reader, read.cache), ([], []))
        began.append(read.began)
        watermarks.append(read.watermark)
        at = bisect_right(began, read.began - int(seconds * NS_A_SECOND))
        yield read._replace(watermark=watermarks[at - 1] if at else 0)


class Impossible(Exception):
    """A history that no database and no cache can give: whoever recorded it is wrong."""


class _Subject:
    """The versions of one subject."""

    def __init__(self, writes: list[Write]) -> None:
        writes.sort(key=lambda write: write.version)
        versions = [write.version for write in writes]
        if versions != list(range(1, len(writes) + 1)):
            raise Impossible(f"The versions of subject {writes[0].subject} have holes: {versions}")
        self.began = [write.began for write in writes]
        if self.began != sorted(self.began):
            raise Impossible(f"The commits of subject {writes[0].subject} overlap.")
        # A later version that is known to be in vouches for all before it.
        self.known_by = [write.lsn for write in writes]
        for at in range(len(writes) - 2, -1, -1):
            self.known_by[at] = min(self.known_by[at], self.known_by[at + 1])
        self.gone = [write.version for write in writes if write.gone]
        self.gone_began = [write.began for write in writes if write.gone]

    def required(self, watermark: int) -> int:
        """Give the version that a read under this watermark shows at least; 0 for any."""
        return bisect_right(self.known_by, watermark)

    def newest_absence(self, then: int) -> int:
        """Return the last version without a row whose commit had begun by then; 0 for none."""
        at = bisect_right(self.gone_began, then)
        return self.gone[at - 1] if at else 0


class History:
    """The writes of a run, against which its reads are judged.

    Args:
        writes: every version of every subject, in any order.

    Raises:
        Impossible: versions are missing, or overlap.
    """

    def __init__(self, writes: Iterable[Write]) -> None:
        by_subject: dict[int, list[Write]] = {}
        for write in writes:
            by_subject.setdefault(write.subject, []).append(write)
        self._subjects = {number: _Subject(of_one) for number, of_one in by_subject.items()}
        # By when a commit had returned, the LSN that all up to then are below.
        self._ended, self._reached = [], []
        reached = 0
        for ended, lsn in sorted((write.ended, write.lsn) for of_one in by_subject.values() for write in of_one):
            reached = max(reached, lsn)
            self._ended.append(ended)
            self._reached.append(reached)

    def stale(self, reads: Iterable[Read]) -> Iterator[Stale]:
        """Give the reads that are older than the watermark that they were served under.

        Raises:
            Impossible: a read saw a version before its commit, or one that there never was.
        """
        for read in reads:
            subject = self._subjects[read.subject]
            required = subject.required(read.watermark)
            seen = subject.newest_absence(read.ended) if read.seen == ABSENT else read.seen
            if seen < 1 or seen > len(subject.began) or subject.began[seen - 1] > read.ended:
                raise Impossible(f"There was no such version then: {read}")
            if seen < required:
                yield Stale(read, required)

    def latest(self, reads: Iterable[Read]) -> Iterator[Read]:
        """Give the same reads as served under a watermark that has passed all commits: none of them may be old."""
        everything = self._reached[-1] if self._reached else 0
        return (read._replace(watermark=everything) for read in reads)

    def without_watermark(self, reads: Iterable[Read], seconds: float) -> Iterator[Read]:
        """Give the same reads as served under what had been committed for so long when they began.

        It stands in for the watermark where no daemon writes one.
        """
        for read in reads:
            at = bisect_right(self._ended, read.began - int(seconds * NS_A_SECOND))
            yield read._replace(watermark=self._reached[at - 1] if at else 0)
