r"""What is stored under a key: a line that says what it is, then the value. Pure.

::

    cdc1 <schema>[.<form>] <began> <expires> <load>\n<payload>

``schema``: the program's number for the payload's shape. ``form``: the word of its serializer, if that has one.
``began``, ``expires``: when its load began and when it expires, in ms since 1970 by the clock of whoever stored it (13
digits). ``load``: how long the load took, in ms (7 digits). The newline is the mark of a payload as its serializer
wrote it, which is there until it expires. `_MARKS` has others: of payloads that are compressed, or that Redis keeps for
longer. An empty payload stands for a missing row. Anything that begins otherwise belongs to another schema, serializer
or program, and is a miss.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

_LATEST, _LONGEST = 10**13 - 1, 10**7 - 1
_TIMES = 13 + 1 + 13 + 1 + 7 + 1  # with the separator behind each


# From how a payload is compressed, and whether Redis keeps it for longer than it may be served, to the mark before it.
_MARKS = {
    ("", False): b"\n",
    ("zlib", False): b"z",
    ("zstd", False): b"s",
    ("", True): b"+",
    ("zlib", True): b"Z",
    ("zstd", True): b"S",
}
_MEANINGS = {mark: meaning for meaning, mark in _MARKS.items()}
# So that a hit costs little; higher levels save some percent more, for several times the time.
_LEVEL = 1


class Times(NamedTuple):
    """The times in an entry, in ms; see the module."""

    began: int
    expires: int
    load: int


class Envelope:
    """The form of the entries of one cache.

    ``header``: what each of them begins with; ``size``: how many bytes stand before the payload.

    Args:
        schema: the program's number for the payload's shape.
        form: the word of the serializer, if that has one.
        clock: seconds since 1970.
        compress_from: compress payloads of so many bytes and more; ``None``: none.
        compression: how: zlib or zstd.
        kept: whether Redis keeps what is sealed for longer than it may be served.
    """

    def __init__(
        self,
        schema: int,
        form: bytes = b"",
        *,
        clock: Callable[[], float] = time.time,
        compress_from: int | None = None,
        compression: str = "zlib",
        kept: bool = False,
    ) -> None:
        self.header = b"cdc1 %d%b%b " % (schema, b"." if form else b"", form)
        self.size = len(self.header) + _TIMES
        self._end = self.size - 1
        self._clock = clock
        self._compress_from = compress_from
        self._compression = compression
        self._kept = kept

    def seal(self, payload: bytes, times: Times) -> bytes:
        """Return what to store; an empty payload stands for a missing row."""
        began, expires, load = times
        how = ""
        if self._compress_from is not None and len(payload) >= self._compress_from:
            compressed = _COMPRESS[self._compression](payload)
            if len(compressed) < len(payload):
                how, payload = self._compression, compressed
        return b"%b%013d %013d %07d%b%b" % (
            self.header,
            min(began, _LATEST),
            min(expires, _LATEST),
            min(load, _LONGEST),
            _MARKS[how, self._kept and bool(payload)],
            payload,
        )

    def payload(self, entry: bytes) -> bytes | None:
        """Return the payload of what was stored; ``None`` if it has expired or is not an entry of this schema."""
        if not entry.startswith(self.header):
            return None
        return entry[self.size :] if entry[self._end : self.size] == b"\n" else self._opened(entry, 0)

    def old(self, entry: bytes, seconds: float) -> bytes | None:
        """Return the payload of what was stored, also if it has expired, but not longer ago than that."""
        if not entry.startswith(self.header):
            return None
        return self._opened(entry, int(seconds * 1000))

    def _opened(self, entry: bytes, grace: int) -> bytes | None:
        how, kept = _MEANINGS.get(entry[self._end : self.size], ("none", False))
        payload = entry[self.size :]
        try:
            if (kept or grace) and self.times(entry).expires + grace <= self._clock() * 1000:
                return None
            return _DECOMPRESS[how](payload)
        except Exception:  # noqa: BLE001  whatever is wrong with it, the database has the value
            return None

    def began(self, entry: bytes) -> int:
        """Return when the load of an entry began, in ms since 1970; 0 if that can't be read."""
        try:
            return self.times(entry).began
        except ValueError:
            return 0

    def times(self, entry: bytes) -> Times:
        """Read the times of an entry that begins with our header.

        Raises:
            ValueError: it only seems to be one.
        """
        began, expires, load = entry[len(self.header) : self._end].split()
        return Times(int(began), int(expires), int(load))


# ── Compression ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _zstd() -> Any:
    import zstandard  # noqa: PLC0415  not everybody has it

    return zstandard


_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "zlib": lambda payload: zlib.compress(payload, _LEVEL),
    "zstd": lambda payload: bytes(_zstd().compress(payload, _LEVEL)),
}
_DECOMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "zlib": zlib.decompress,
    "zstd": lambda payload: bytes(_zstd().decompress(payload)),
}


def knows(compression: str) -> bool:
    """Return whether payloads can be compressed in this way here."""
    return compression in _COMPRESS and (compression != "zstd" or find_spec("zstandard") is not None)
