"""The watermark: up to where a Redis has all busts, and whether the stream may go on from there. Pure.

One comparison finds every gap. The stream is about to start at ``start``; Redis has all busts up to ``watermark.lsn``.
If that is lower, or if the two do not belong to the same history, what lies between was never applied to this Redis.
This shows a new slot, a slot that somebody advanced, a restored snapshot, an emptied or replaced Redis, and a promoted
replica that lagged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Position:
    """Where the stream stands: the server's history and the LSN from which it will send.

    ``flushed``: the end of the server's WAL, in LSN; ``new_slot``: the slot has just been made.
    """

    system_id: str
    timeline: int
    start: int
    flushed: int
    new_slot: bool = False


@dataclass(frozen=True, slots=True)
class Watermark:
    """The hash ``cdc:{slot}:watermark``: all busts up to ``lsn`` are in this Redis, as of ``at`` (ms since 1970).

    ``rules``: the caches that this holds for, each with a digest of what busts it. ``standbys``: the standbys that have
    replayed ``lsn`` too, each with the time of its start; ``None`` for a dropped one, for which busts do not wait.
    ``as_of``: everything committed by that time (ms since 1970) lies below ``lsn``; 0 if unknown.
    """

    lsn: int
    at: int
    system_id: str
    timeline: int
    rules: Mapping[str, str]
    standbys: Mapping[str, str | None] = field(default_factory=dict)
    as_of: int = 0

    def fields(self) -> dict[str, str | int]:
        """Return the hash's fields; ``rules`` and ``standbys`` are JSON.

        ``standbys`` is left out if there are none, and ``as_of`` while it is unknown: what Redis has stays true.
        """
        fields: dict[str, str | int] = {
            "lsn": self.lsn,
            "at": self.at,
            "system_id": self.system_id,
            "timeline": self.timeline,
            "rules": json.dumps(dict(self.rules), separators=(",", ":"), sort_keys=True),
        }
        if self.standbys:
            fields["standbys"] = json.dumps(dict(self.standbys), separators=(",", ":"), sort_keys=True)
        if self.as_of:
            fields["as_of"] = self.as_of
        return fields

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> Watermark | None:
        """Read the hash as it comes from Redis; ``None`` if a field is missing or is not what we write."""
        try:
            rules = json.loads(fields[b"rules"])
            standbys = json.loads(fields.get(b"standbys", b"{}"))
            if not isinstance(rules, dict) or not isinstance(standbys, dict):
                return None
            return cls(
                lsn=int(fields[b"lsn"]),
                at=int(fields[b"at"]),
                system_id=fields[b"system_id"].decode(),
                timeline=int(fields[b"timeline"]),
                rules={str(cache): str(digest) for cache, digest in rules.items()},
                standbys={str(name): None if since is None else str(since) for name, since in standbys.items()},
                as_of=int(fields.get(b"as_of", 0)),
            )
        except (KeyError, ValueError, RecursionError):  # RecursionError: JSON nested too deep
            return None


def gaps(found: Watermark | None, position: Position, rules: Mapping[str, str]) -> dict[str, str]:
    """Return the caches that can't be proven to be up to date, and why.

    Args:
        found: what Redis holds.
        position: where the stream is about to go on.
        rules: each cache's name and digest, as the rule files have it now.

    Returns:
        From a cache's name to the reason; empty when continuity is proven.
    """
    reason = _broken_history(found, position)
    if reason is not None or found is None:
        return dict.fromkeys(rules, reason or "no_watermark")
    return {cache: "rules_changed" for cache, digest in rules.items() if found.rules.get(cache) != digest}


def _broken_history(found: Watermark | None, position: Position) -> str | None:
    if position.new_slot:
        return "new_slot"
    if found is None:
        return "no_watermark"
    if found.system_id != position.system_id:
        return "other_system"
    if found.timeline != position.timeline:
        return "other_timeline"
    if found.lsn < position.start:
        return "missed_changes"
    if found.lsn > position.flushed:
        # The same history can't be shorter than what we have already seen of it: a restored backup.
        return "database_went_back"
    return None
