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

from cdc_invalidator.rules.agreement import Agreement


@dataclass(frozen=True, slots=True)
class Position:
    """Where the stream stands: the server's history and the LSN from which it will send.

    ``flushed``: the end of the server's WAL, in LSN; ``new_slot``: the slot has just been made; ``crash_free_since``: a
    text that changes when the server crashes.
    """

    system_id: str
    timeline: int
    start: int
    flushed: int
    new_slot: bool = False
    crash_free_since: str = ""


@dataclass(frozen=True, slots=True)
class Watermark:
    """The hash ``cdc:NAME:watermark``: all busts up to ``lsn`` are in this Redis, as of ``at`` (ms since 1970).

    ``rules``: the caches that this holds for, each with a digest of what busts it. ``gaps``: those that are left out
    until their gap is over, each with its reason. ``standbys``: the standbys that have replayed ``lsn`` too, each with
    the time of its start; ``None`` for a dropped one, for which busts do not wait.
    ``last_commit``: a commit of that history, see `pipeline.lineage`. ``crash_free_since``: as of `Position`, when it
    was written. ``as_of``: everything committed by that time (ms since 1970) lies below ``lsn``; 0 if unknown.
    ``agreement``: is only written, for readers.
    """

    lsn: int
    at: int
    system_id: str
    timeline: int
    rules: Mapping[str, str]
    standbys: Mapping[str, str | None] = field(default_factory=dict)
    as_of: int = 0
    crash_free_since: str = ""
    last_commit: str = ""
    gaps: Mapping[str, str] = field(default_factory=dict)
    agreement: Agreement | None = field(default=None, compare=False)

    def fields(self) -> dict[str, str | int]:
        """Return the hash's fields without those of the agreement; ``rules``, ``gaps`` and ``standbys`` are JSON.

        What there is none of is left out (see `absent`), and ``as_of`` while it is unknown: what Redis has stays true.
        """
        fields: dict[str, str | int] = {
            "rules": _json(self.rules),
            "lsn": self.lsn,
            "at": self.at,
            "system_id": self.system_id,
            "timeline": self.timeline,
        }
        if self.gaps:
            fields["gaps"] = _json(self.gaps)
        if self.standbys:
            fields["standbys"] = _json(self.standbys)
        if self.as_of:
            fields["as_of"] = self.as_of
        if self.crash_free_since:
            fields["crash_free_since"] = self.crash_free_since
        if self.last_commit:
            fields["last_commit"] = self.last_commit
        return fields

    @property
    def absent(self) -> list[str]:
        """The fields that the hash must not have."""
        optional = {
            "gaps": self.gaps,
            "standbys": self.standbys,
            "crash_free_since": self.crash_free_since,
            "last_commit": self.last_commit,
        }
        return [name for name, value in optional.items() if not value]

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> Watermark | None:
        """Read the hash as it comes from Redis; ``None`` if a field is missing or is not what we write."""
        try:
            rules = json.loads(fields[b"rules"])
            standbys = json.loads(fields.get(b"standbys", b"{}"))
            found_gaps = json.loads(fields.get(b"gaps", b"{}"))
            if not all(isinstance(found, dict) for found in (rules, standbys, found_gaps)):
                return None
            return cls(
                lsn=int(fields[b"lsn"]),
                at=int(fields[b"at"]),
                system_id=fields[b"system_id"].decode(),
                timeline=int(fields[b"timeline"]),
                rules={str(cache): str(digest) for cache, digest in rules.items()},
                standbys={str(name): None if since is None else str(since) for name, since in standbys.items()},
                as_of=int(fields.get(b"as_of", 0)),
                crash_free_since=fields.get(b"crash_free_since", b"").decode(),
                last_commit=fields.get(b"last_commit", b"").decode(),
                gaps={str(cache): str(reason) for cache, reason in found_gaps.items()},
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
    # A gap that was not over when the watermark was written still has the reason that it had.
    return {
        cache: "rules_changed" if cache in found.rules else found.gaps.get(cache, "rules_changed")
        for cache, digest in rules.items()
        if found.rules.get(cache) != digest
    }


def _json(values: Mapping[str, str | None]) -> str:
    return json.dumps(dict(values), separators=(",", ":"), sort_keys=True)


def _broken_history(found: Watermark | None, position: Position) -> str | None:
    if position.new_slot:
        return "new_slot"
    if found is None:
        return "no_watermark"
    if found.system_id != position.system_id:
        return "other_system"
    if found.timeline != position.timeline:
        return "other_timeline"
    if found.crash_free_since != position.crash_free_since:
        # Commits that readers have seen, and cached, may be gone.
        return "server_crashed"
    if found.lsn < position.start:
        return "missed_changes"
    if found.lsn > position.flushed:
        # The same history can't be shorter than what we have already seen of it: a restored backup.
        return "database_went_back"
    return None
