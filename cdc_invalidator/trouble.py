"""What an operator should know: what is wrong, what to do about it, and since when.

The rule that holds here: whoever finds that something is wrong keeps its `Trouble` until it is over, and then ``None``.
The daemon shows the first that there is, and never one that is over.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import NamedTuple


class Trouble(NamedTuple):
    """``text``: a sentence that names what is wrong and ends with the remedy; ``since``: in seconds since 1970."""

    text: str
    since: float

    @classmethod
    def now(cls, text: str, before: Trouble | None = None, *, ago: float = 0.0) -> Trouble:
        """Return what is wrong now.

        Args:
            text: what it is.
            before: the same trouble, perhaps in other words, as it was last seen: then it goes on since that began.
            ago: for how many seconds it has been so, if it is new.
        """
        return cls(text, time.time() - ago if before is None else before.since)

    @property
    def at(self) -> str:
        """When it began, in UTC, as ISO 8601 writes it."""
        return datetime.fromtimestamp(self.since, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def __str__(self) -> str:
        return f"{self.text} (since {self.at})"
