"""What the watermark says of a read: may it be served from the cache? Pure.

The rule that holds here: the watermark is read before the value. All busts up to it were in Redis by then, so the value
that is read after it is at least as new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

FIELDS = (b"lsn", b"at", b"rules", b"standbys", b"as_of")


class Demand(NamedTuple):
    """What a read asks for: all busts up to ``lsn``, and all of what was committed more than ``max_age`` ms ago."""

    lsn: int = 0
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A watermark, see `cdc_invalidator.watermark`, with the caches and the standbys that it is said of.

    ``as_of``: what was committed before that time, in ms, is in; where the daemon does not know, when it was written.
    """

    lsn: int
    as_of: int
    caches: frozenset[str]
    standbys: frozenset[str]


class Feed:
    """The watermark as it was read last.

    Args:
        slot: the name of the daemon's replication slot, which names the watermark.
        standby: the standby that values are loaded from, as ``CDC_POSTGRES_REPLICAS`` names it; empty for the primary.
    """

    def __init__(self, slot: str, standby: str = "") -> None:
        self.command = ("HMGET", f"cdc:{slot}:watermark".encode(), *FIELDS)
        self._standby = standby
        self._mark: Mark | None = None
        self._texts: tuple[Any, Any] | None = None

    def note(self, fields: Sequence[bytes | None]) -> None:
        """Take what `command` gave."""
        lsn, at, rules, standbys, as_of = fields
        if lsn is None or at is None or rules is None:
            self._mark = None
            return
        try:
            time = int(as_of or at)
            last = self._mark
            if last is not None and self._texts == (rules, standbys):
                self._mark = Mark(int(lsn), time, last.caches, last.standbys)
                return
            known = orjson.loads(standbys or b"{}")
            waited = frozenset(name for name, since in known.items() if since is not None)
            self._mark = Mark(int(lsn), time, frozenset(orjson.loads(rules)), waited)
            self._texts = (rules, standbys)
        except (ValueError, TypeError, AttributeError):
            self._mark = None  # not what the daemon writes

    def recent(self, demand: Demand, cache: str, now: int) -> bool:
        """Whether the watermark that was read last is enough, so that it need not be read again.

        It only grows older, so this errs to the safe side. For an LSN it is never enough: Redis may have been replaced
        since.
        """
        return not demand.lsn and self._mark is not None and self.refusal(demand, cache, now) == ""

    def refusal(self, demand: Demand, cache: str, now: int) -> str:
        """Tell why a value of a cache may not be served; empty if it may.

        Args:
            demand: what the read asks for.
            cache: the cache's name.
            now: ms since 1970.

        Returns:
            no_watermark; not_covered: the daemon does not know this cache, is sweeping it, or can't see its table;
            standby: it does not wait for ours; behind: its LSN is lower; old: the feed is dead, or has not come so far.
        """
        mark = self._mark
        if mark is None:
            return "no_watermark"
        if cache not in mark.caches:
            return "not_covered"
        if self._standby and self._standby not in mark.standbys:
            return "standby"
        if mark.lsn < demand.lsn:
            return "behind"
        if demand.max_age is not None and now - mark.as_of > demand.max_age:
            return "old"
        return ""
