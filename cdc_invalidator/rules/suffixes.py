"""The names of the keys beside a key, which the daemon and the readers of a cache both use. Pure.

For a key ``K``: ``K:lock`` is the lease of the reader that loads it. A bust deletes it with ``K`` or before it, so that
a fill that the bust overtook can't be stored. ``K:stale`` is the old value, which a bust leaves for `stale_for` to
readers that find ``K`` gone and do not hold the lease; it expires that long after the bust, whatever happens. For a
version ``V``, ``V:stale`` is the old version, which a bump leaves for as long.
"""

from __future__ import annotations

LOCK_SUFFIX = b":lock"
STALE_SUFFIX = b":stale"


def split_suffix(key: bytes) -> tuple[bytes, bytes]:
    """Split a key into the key or version that it stands beside, and its suffix; the suffix is empty if it has none."""
    for suffix in (LOCK_SUFFIX, STALE_SUFFIX):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, b""
