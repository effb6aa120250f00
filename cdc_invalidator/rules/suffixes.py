"""What the daemon and the readers of a cache both know: the names of the keys beside a key. Pure.

For a key ``K``: ``K:lock`` is the lease of whoever loads it, which a bust deletes with ``K`` or before it, so that a
fill that was overtaken can't be stored. ``K:stale`` is the value that a bust has left for `stale_for`, to those who
find ``K`` gone and do not hold the lease; it expires that long after the bust, whatever happens. For a version ``V``,
``V:stale`` is the version that a bump has left, for as long.
"""

from __future__ import annotations

LOCK_SUFFIX = b":lock"
STALE_SUFFIX = b":stale"
