"""How fresh a read must be, and which watermark proves it. Pure.

The rule that holds here: a watermark proves only what the same server gives in the same script. A watermark of another
connection, or of a moment ago, proves nothing: the master may have been replaced by one that lags, or have been started
again from an old snapshot. So no watermark is remembered, and `scripts.PROOF` looks at it.
"""

from __future__ import annotations

from typing import NamedTuple


class Demand(NamedTuple):
    """How fresh a read must be: all busts up to ``lsn``, and of all commits older than ``max_age`` ms."""

    lsn: int = 0
    max_age: int | None = None


ANY = Demand()


class NotProven(Exception):
    """No watermark proves that a read may be served from the cache.

    ``reason``: a word for metrics. no_watermark; templates_differ: the daemon has said something else of keys since the
    key was made; not_covered: the daemon does not know this cache, is sweeping it, or
    can't see its table; standby: busts do not wait for our standby; behind: the LSN is lower; old: the daemon is down,
    or not known to have come so far; elsewhere: in a cluster, the watermark of the key's node is not for the key's hash
    slot, or not for this node.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
