"""Durations as rule files and the command line write them: 500ms, 30s, 5m, 1h, 30d. Pure."""

from __future__ import annotations

import re

from cdc_invalidator.rules.wording import shown

_DURATION = re.compile(r"([0-9]{1,10})(ms|s|m|h|d)")
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
LONGEST_AGAIN = 60_000
TOO_LONG = "`{field}` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
_LONGEST = 36_500 * 86_400_000


def read_duration(value: object) -> int:
    """Read a duration such as ``5m``, in milliseconds.

    Raises:
        ValueError: it is none; the message is a sentence with the remedy.
    """
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"{shown(str(value))} is not a duration; write a whole number and a unit: 500ms, 30s, 5m, 1h or 30d"
        )
    milliseconds = int(found[1]) * _UNITS[found[2]]
    if not 0 < milliseconds <= _LONGEST:
        raise ValueError(f"{shown(found[0])} is out of range; a duration is longer than 0 and at most 36500d")
    return milliseconds
