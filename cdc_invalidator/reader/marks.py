"""Which watermark tells of a key: in a cluster, that of the node which has the key. Pure.

Each master of a cluster has a watermark: the one of the known name on the node where that lies, and on each other node
the one with the first of the hash tags ``{0}``, ``{1}``, … whose hash slot the node has. Where a client's idea of the
hash slots is out of date, it finds none, or one that is not at home there; so it reads beside the cache.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

SLOTS = 16_384
# Among so many hash tags, each hash slot has one.
TAGS = 109_758


def hash_tag(key: bytes) -> bytes:
    """Return what decides of a key's hash slot in a cluster; what has the same text lies in the same slot."""
    start = key.find(b"{") + 1
    end = key.find(b"}", start)
    return key[start:end] if 0 < start < end else key


def hash_slot(key: bytes) -> int:
    """Return a key's hash slot."""
    return crc_hqx(hash_tag(key), 0) % SLOTS


class Mark(NamedTuple):
    """The name of a watermark, and the key's hash slot as text; that is empty where there is no cluster."""

    name: bytes
    hash_slot: bytes = b""


class Marks:
    """Finds the watermark of a key.

    ``public``: the name of the watermark that everybody knows.

    ``node_of``: returns what stands for the node that has a hash slot, ``None`` where that is not known; ``doubt``: is
    called when a watermark proves nothing, since hash slots may have moved. Both are set by who knows.

    Args:
        watermark: the daemon's name for it.
        cluster: whether there is a cluster.
    """

    def __init__(self, watermark: str, *, cluster: bool = False) -> None:
        self.public = f"cdc:{watermark}:watermark".encode()
        self.node_of: Callable[[int], Any] = _nobody
        self.doubt: Callable[[], None] = _nothing
        self._cluster = cluster
        self._alone = Mark(self.public)
        self._public_slot = hash_slot(self.public)

    def of(self, key: bytes) -> Mark | None:
        """Return the watermark of a key; ``None`` where it is not known which node has the key."""
        if not self._cluster:
            return self._alone
        its_slot = hash_slot(key)
        node = self.node_of(its_slot)
        if node is None:
            return None
        if self.node_of(self._public_slot) == node:
            return Mark(self.public, b"%d" % its_slot)
        for number in range(TAGS):
            if self.node_of(_slot_of_tag(number)) == node:
                return Mark(b"%b:{%d}" % (self.public, number), b"%d" % its_slot)
        return None


def _nobody(_slot: int) -> None:
    return None


def _nothing() -> None:
    return None


@cache
def _slot_of_tag(number: int) -> int:
    return hash_slot(b"{%d}" % number)
