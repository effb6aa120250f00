r"""The names of the keys beside a key, which the daemon and the readers of a cache both use. Pure.

For a key ``K``: ``K\0lock`` is the lease of the reader that loads it. A bust deletes it with ``K`` or before it, so
that a fill that the bust overtook can't be stored. ``K\0stale`` is the old value, which a bust leaves for `stale_for`
to readers that find ``K`` gone and do not hold the lease; it expires that long after the bust, whatever happens. For a
version ``V``, ``V\0stale`` is the old version, which a bump leaves for as long.

The rule that holds here: no parameter can make such a name, since each has a NUL, which no text of PostgreSQL and no
template holds. The names of release 0.1.0 could be made: whoever asked for the page `home:lock` held the lease of the
page `home`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOCK_SUFFIX = b"\0lock"
STALE_SUFFIX = b"\0stale"
# Of release 0.1.0.
OLD_LOCK_SUFFIX = b":lock"
OLD_STALE_SUFFIX = b":stale"


@dataclass(frozen=True, slots=True)
class Beside:
    """Which names beside a key a daemon deletes.

    ``locks``, ``stale``: suffixes; ``locks_glob``: the pattern for ``SCAN … MATCH`` that finds any of the locks.
    """

    locks: tuple[bytes, ...]
    stale: tuple[bytes, ...]
    locks_glob: bytes

    def locks_of(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the names of all locks of some keys: of all keys under one suffix, then under the next."""
        found: list[bytes] = []
        for suffix in self.locks:
            found += [key + suffix for key in keys]
        return found

    def locked(self, lock: bytes) -> bytes:
        """Return the key that a lock is of."""
        return next((lock.removesuffix(suffix) for suffix in self.locks if lock.endswith(suffix)), lock)


BESIDE = Beside((LOCK_SUFFIX,), (STALE_SUFFIX,), LOCK_SUFFIX)
BESIDE_AND_OLD = Beside((LOCK_SUFFIX, OLD_LOCK_SUFFIX), (STALE_SUFFIX, OLD_STALE_SUFFIX), b"[\0:]lock")
"""The same with the names that readers of release 0.1.0 use, which are fenced as long as there are any."""


def split_suffix(key: bytes) -> tuple[bytes, bytes]:
    """Split a key into the key or version that it stands beside, and its suffix; the suffix is empty if it has none."""
    for suffix in (LOCK_SUFFIX, STALE_SUFFIX):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, b""
