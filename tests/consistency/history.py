"""What writers did and readers saw, column by column, so that a million reads take some 40 MB.

A subject is what a cached value is of: one row, or all rows of one shelf. Its versions are counted from 1, each by the
transaction that made it, under a lock that it holds until its commit. Times are `time.monotonic_ns`, which all
processes of one machine share; LSNs are integers.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ABSENT = -1
"""What a read saw where there was no row."""


class Write(NamedTuple):
    """One version of one subject.

    Attributes:
        subject: its number.
        version: 1 and up, without holes.
        lsn: an upper bound of the LSN of its commit, asked for after it; 0 for what was there from the start.
        began: just before the commit was sent.
        ended: when it had returned.
        gone: whether there is no row from then on.
    """

    subject: int
    version: int
    lsn: int
    began: int
    ended: int
    gone: bool


class Read(NamedTuple):
    """One read of one subject through one cache.

    Attributes:
        reader: who.
        cache: number of the cache.
        subject: its number.
        began: when it began.
        ended: when it had its value.
        watermark: the LSN that it was served under, read before it began; 0 for none.
        seen: the version of the value, or `ABSENT`.
        cached: whether the value came from the cache, not from a load of its own.
    """

    reader: int
    cache: int
    subject: int
    began: int
    ended: int
    watermark: int
    seen: int
    cached: bool


class _Columns:
    """Rows of integers, as one array for each column."""

    codes: ClassVar[str]

    def __init__(self) -> None:
        self.columns: list[array[int]] = [array(code) for code in self.codes]

    def __len__(self) -> int:
        return len(self.columns[0])

    def _append(self, row: tuple[int, ...]) -> None:
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def extend(self, other: Self) -> None:
        for column, more in zip(self.columns, other.columns, strict=True):
            column.extend(more)

    def save(self, path: Path) -> None:
        """Write the columns one after the other, each after the number of its rows."""
        with path.open("wb") as file:
            array("Q", [len(self)]).tofile(file)
            for column in self.columns:
                column.tofile(file)

    def load(self, path: Path) -> Self:
        """Append what another process has saved."""
        with path.open("rb") as file:
            count = array("Q")
            count.fromfile(file, 1)
            for column in self.columns:
                column.fromfile(file, count[0])
        return self


class Writes(_Columns):
    """`Write` by `Write`."""

    codes = "IQQqqB"

    def add(self, write: Write) -> None:
        self._append(write)

    def __iter__(self) -> Iterator[Write]:
        return map(Write._make, _rows(self))


class Reads(_Columns):
    """`Read` by `Read`."""

    codes = "IBIqqQqB"

    def add(self, read: Read) -> None:
        self._append(read)

    def __iter__(self) -> Iterator[Read]:
        return map(Read._make, _rows(self))


def _rows(columns: _Columns) -> Iterator[Any]:
    return zip(*columns.columns, strict=True)
