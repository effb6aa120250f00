"""What the daemons of one slot tell each other through PostgreSQL: that one which stands by could lead.

It says so in the application_name of its session, with the server's time. Everybody may read that in pg_stat_activity,
on a standby too; it takes no right and no table, and ends with the session. A daemon of an older version says nothing,
so nothing is handed over to it.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Literal

import psycopg

from cdc_invalidator.postgres.connection import rows

Mode = Literal["bust", "observe"]
# What PostgreSQL keeps of an application_name, and the digits of the time that it ends with.
MOST_BYTES = 63
_DIGITS = 10


class Offers:
    """Makes and reads the offers of one slot, on one session.

    Args:
        connection: an ordinary one, to the slot's database.
        slot: the slot's name.
        mode: a daemon that only observes offers nothing to one that busts.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], slot: str, mode: Mode) -> None:
        self._connection = connection
        self._words = words(slot, mode)
        self._name = ""
        # When that was found which is said now.
        self._found_at: float | None = None

    async def say(self, found_at: float | None) -> None:
        """Say that this daemon could lead, as was found at that time (monotonic); ``None``: say it no more."""
        if found_at == self._found_at:
            return
        if found_at is None:
            await rows(self._connection, _WITHDRAW, {"name": self._name})
        else:
            (row,) = await rows(self._connection, _MAKE, {"words": self._words, "ago": time.monotonic() - found_at})
            if self._found_at is None:
                self._name = row.before
        self._found_at = found_at

    async def newest(self) -> float | None:
        """Return how many seconds ago another daemon found that it could lead; ``None`` if none says so."""
        (row,) = await rows(self._connection, _NEWEST, {"pattern": f"^{self._words}[0-9]{{{_DIGITS}}}$"})
        return None if row.ago is None else float(row.ago)


def words(slot: str, mode: Mode) -> str:
    """Return what stands before the time in an application_name; a long name of a slot is cut, with a digest of it."""
    start, end = f"cdc-invalidator could {mode} ", " at "
    room = MOST_BYTES - _DIGITS - len(start) - len(end)
    if len(slot) > room:
        digest = hashlib.sha256(slot.encode()).hexdigest()[:8]
        slot = f"{slot[: room - len(digest) - 1]}~{digest}"
    return f"{start}{slot}{end}"


_MAKE = """
SELECT before, set_config(
  'application_name', %(words)s || floor(extract(epoch FROM clock_timestamp()) - %(ago)s::float8)::bigint, false
) FROM (SELECT current_setting('application_name') AS before) AS known
"""
_WITHDRAW = "SELECT set_config('application_name', %(name)s, false)"
_NEWEST = """
SELECT min(extract(epoch FROM clock_timestamp()) - right(application_name, 10)::bigint) AS ago
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name ~ %(pattern)s
"""
