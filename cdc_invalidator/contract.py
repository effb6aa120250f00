"""What the daemon and the readers of a cache both know: the names of the keys beside a key. Pure.

For a key ``K``: ``K:lock`` is the lease of whoever loads it, which a bust deletes with ``K`` or before it, so that a
fill that was overtaken can't be stored.
"""

from __future__ import annotations

LOCK_SUFFIX = b":lock"
