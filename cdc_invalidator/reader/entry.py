"""One key of a cache on its way to a value. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdc_invalidator.reader.flights import Flight
from cdc_invalidator.reader.freshness import ANY


class Miss:
    """The type of `MISS`, which stands for: not in the cache."""


MISS = Miss()


class Entry:
    """One key on its way to a value.

    ``params``: the loader's arguments; ``item``: the same as the caller passed it. ``key``: for a cache with a version,
    it has NUL in the version's place until that is known; ``version_key``: the version's key.
    """

    # Most entries are hits, which need none of these.
    token = b""  # of its lease, once that is asked for
    lease = b""  # the text in the lock, once the lease is ours
    guess = b""  # the remembered version that was used for the look
    seen: Any = None  # what the last look gave: a value's bytes, the state of the lease, nothing, or an error
    value: Any = None
    done = False
    flight: Flight | None = None  # the load that others of this process may wait for, if it is ours
    flight_key: Any = None
    agreed = b""  # by which agreement the key was made; only noted where the entry asks for a freshness
    demand = ANY  # what the watermark must prove, for the value to be served from the cache
    saves = False  # whether an old value will do if the load fails
    saved = False  # whether the value is an old one
    stale = False  # whether an old value will do while another reader loads
    refresh = False  # load it whatever is there, which can't be read or is too old

    def __init__(self, item: Any, params: Mapping[str, Any], key: bytes, version_key: bytes = b"") -> None:
        self.item = item
        self.params = params
        self.key = self.rest = key
        self.version_key = version_key

    def found(self, value: Any, seen: Any = None) -> None:
        """Note its value, and what that was seen in, if it was stored already."""
        self.value = value
        self.seen = seen
        self.done = True
