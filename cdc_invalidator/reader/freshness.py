"""Whether a read may be served from the cache, judged by the watermark. Pure.

The rule that holds here: the watermark is read before the value. All busts up to it were in Redis by then, so a
value that is read afterwards is at least as new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

FIELDS = (b"lsn", b"as_of", b"rules", b"standbys")


class Demand(NamedTuple):
    """How fresh a read must be: all busts up to ``lsn``, and of all commits older than ``max_age`` ms."""

    lsn: int = 0
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class SeenWatermark:
    """A watermark as readers see it (see `redis.watermark`), with the caches and the standbys that it holds for.

    ``as_of`` is 0 where the daemon does not know it.
    """

    lsn: int
    as_of: int
    caches: frozenset[str]
    standbys: frozenset[str]


class Feed:
    """Reads watermarks, and remembers the last.

    Args:
        watermark: the watermark's name.
        standby: the standby that values are loaded from, as ``CDC_POSTGRES_STANDBYS`` names it; empty for the primary.
    """

    def __init__(self, watermark: str, standby: str = "") -> None:
        self.command = ("HMGET", f"cdc:{watermark}:watermark".encode(), *FIELDS)
        self._standby = standby
        # The last watermark and the texts it was read from, which hardly ever change.
        self._last: tuple[SeenWatermark, Any] | None = None

    def read(self, fields: Sequence[bytes | None]) -> SeenWatermark | None:
        """Read what `command` gave; ``None`` if that is not what the daemon writes."""
        lsn, as_of, rules, standbys = fields
        last = self._last
        try:
            if lsn is None or rules is None:
                return None
            if last is not None and last[1] == (rules, standbys):
                watermark = SeenWatermark(int(lsn), int(as_of or 0), last[0].caches, last[0].standbys)
            else:
                known = orjson.loads(standbys or b"{}")
                waited = frozenset(name for name, since in known.items() if since is not None)
                watermark = SeenWatermark(int(lsn), int(as_of or 0), frozenset(orjson.loads(rules)), waited)
        except (ValueError, TypeError, AttributeError):
            return None
        self._last = (watermark, (rules, standbys))
        return watermark

    def recent(self, demand: Demand, cache: str, now: int) -> bool:
        """Return whether the watermark that was read last is enough, so that it need not be read again.

        It only grows older, so this errs to the safe side. For an LSN it is never enough: Redis may have been replaced
        since.
        """
        last = self._last
        return not demand.lsn and last is not None and not self.refusal(last[0], demand, cache, now)

    def refusal(self, watermark: SeenWatermark | None, demand: Demand, cache: str, now: int) -> str:
        """Return why a value of a cache may not be served; empty if it may.

        Args:
            watermark: the watermark that was read before the value; another reader may have read a later one since.
            demand: what the read asks for.
            cache: the cache's name.
            now: ms since 1970.

        Returns:
            no_watermark; not_covered: the daemon does not know this cache, is sweeping it, or can't see its table;
            standby: busts do not wait for our standby; behind: the LSN is lower; old: the daemon is down, or not known
            to have come so far.
        """
        if watermark is None:
            return "no_watermark"
        if cache not in watermark.caches:
            return "not_covered"
        if self._standby and self._standby not in watermark.standbys:
            return "standby"
        if watermark.lsn < demand.lsn:
            return "behind"
        if demand.max_age is not None and now - watermark.as_of > demand.max_age:
            return "old"
        return ""
