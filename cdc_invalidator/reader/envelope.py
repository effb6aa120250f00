r"""What is stored under a key: a line that says what it is, then the value. Pure.

::

    cdc1 <schema>[.<form>] <began> <expires> <load>\n<payload>

``schema``: the program's number for the payload's shape. ``form``: the word of its serializer, if that has one.
``began``, ``expires``: when its load began and when it expires, in ms since 1970 by the clock of whoever stored it (13
digits). ``load``: how long the load took, in ms (7 digits). An empty payload stands for a missing row. Anything that
begins otherwise belongs to another schema, serializer or program, and is a miss.
"""

from __future__ import annotations

from typing import NamedTuple

_LATEST, _LONGEST = 10**13 - 1, 10**7 - 1
_TIMES = 13 + 1 + 13 + 1 + 7 + 1  # with the separator behind each


class Times(NamedTuple):
    """The times in an entry, in ms; see the module."""

    began: int
    expires: int
    load: int


class Envelope:
    """The form of the entries of one cache.

    ``header``: what each of them begins with; ``size``: how many bytes stand before the payload.
    """

    def __init__(self, schema: int, form: bytes = b"") -> None:
        self.header = b"cdc1 %d%b%b " % (schema, b"." if form else b"", form)
        self.size = len(self.header) + _TIMES
        self._end = self.size - 1

    def seal(self, payload: bytes, times: Times) -> bytes:
        """Return what to store; an empty payload stands for a missing row."""
        began, expires, load = times
        return b"%b%013d %013d %07d\n%b" % (
            self.header,
            min(began, _LATEST),
            min(expires, _LATEST),
            min(load, _LONGEST),
            payload,
        )

    def payload(self, entry: bytes) -> bytes | None:
        """Return the payload of what was stored; ``None`` if it is not an entry of this schema."""
        if entry[self._end : self.size] != b"\n" or not entry.startswith(self.header):
            return None
        return entry[self.size :]

    def times(self, entry: bytes) -> Times:
        """Read the times of an entry that begins with our header.

        Raises:
            ValueError: it only seems to be one.
        """
        began, expires, load = entry[len(self.header) : self.size].split()
        return Times(int(began), int(expires), int(load))
