"""The replication slot as PostgreSQL's catalogs show it: read, create and drop it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import psycopg

from cdc_invalidator import errors, lsn
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.connection import rows

Value = TypeVar("Value")


# A standby shows a commit before the primary does, if the primary waits for it.
READERS_UNKNOWN = (
    "CDC_POSTGRES_DSN names a standby, and it is not known which server readers load from; set CDC_POSTGRES_READERS to "
    "the connection string of that server: the primary, or this standby if nobody reads from the primary."
)


class SlotState(NamedTuple):
    """The slot's row in pg_replication_slots; LSNs as numbers.

    ``retained``: bytes of WAL that PostgreSQL keeps for it; ``unconfirmed``: the part of it that is not confirmed.
    ``two_phase``: PREPARE TRANSACTION is decoded, which we don't read.
    """

    active: bool
    active_pid: int | None
    confirmed: int
    wal_status: str
    retained: int
    two_phase: bool
    unconfirmed: int = 0

    @property
    def lost(self) -> bool:
        """Whether PostgreSQL has invalidated the slot: nobody can stream from it any more."""
        return self.wal_status == "lost"


class ServerInfo(NamedTuple):
    """The slot's server; ``version`` as in server_version_num."""

    version: int
    wal_level: str
    in_recovery: bool


class Slot:
    """One slot, which may or may not exist.

    Args:
        connection: an ordinary one, to the slot's database.
        name: the slot's name.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], name: str) -> None:
        self._connection = connection
        self.name = name

    async def _rows(self, query: str) -> list[Any]:
        return await rows(self._connection, query, {"slot": self.name})

    async def server(self) -> ServerInfo:
        """Read the server's properties, and refuse a server that can't decode.

        Raises:
            errors.ServerRefuses: the message says what to set.
        """
        (row,) = await self._rows(_SERVER)
        if row.version < 150000:
            raise errors.ServerRefuses(f"PostgreSQL {row.version // 10000} can't be used; run PostgreSQL 15 or later.")
        if row.wal_level != "logical":
            raise errors.ServerRefuses(f"wal_level is {row.wal_level}; set wal_level = logical and restart PostgreSQL.")
        if row.in_recovery and row.version < 160000:
            raise errors.ServerRefuses(
                f"PostgreSQL {row.version // 10000} can't decode on a standby; point CDC_POSTGRES_DSN to the primary."
            )
        return ServerInfo(row.version, row.wal_level, row.in_recovery)

    async def state(self) -> SlotState | None:
        """Read the slot's row; ``None`` if there is no slot of that name.

        Raises:
            errors.ServerRefuses: a slot of that name belongs to something else, or was made with two_phase.
        """
        state = await self._state()
        if state is not None and state.two_phase:
            raise errors.ServerRefuses(
                f"Slot {self.name} was made with two_phase, which sends transactions before they are committed; end "
                f"who streams from it, and run {remedies.drop_slot(self.name)} The daemon makes it anew and sweeps the "
                "caches.",
                sql=(remedies.drop_slot(self.name),),
            )
        return state

    async def _state(self) -> SlotState | None:
        rows = await self._rows(_STATE)
        if not rows:
            return None
        (row,) = rows
        if row.plugin != "pgoutput" or not row.here:
            raise errors.ServerRefuses(
                f"Slot {self.name} belongs to another database or plugin; set CDC_SLOT to a name of your own."
            )
        return SlotState(
            row.active,
            row.active_pid,
            lsn.parse(row.confirmed or "0/0"),
            row.wal_status,
            row.retained,
            row.two_phase,
            row.unconfirmed,
        )

    def statements(self, state: SlotState | None, server: ServerInfo, *, new_publication: bool) -> list[str]:
        """Return the SQL that creates or replaces the slot; nothing if we can stream from it as it is.

        We can't if its position is older than the publication: PostgreSQL before 18 fails to decode from there.
        """
        drop = [remedies.drop_slot(self.name)]
        # A slot that is synchronized to standbys survives a failover. A slot on a standby can't be synchronized.
        make = [remedies.make_slot(self.name, failover=server.version >= 170000 and not server.in_recovery)]
        if state is None:
            return make
        # PostgreSQL has removed the WAL of a lost slot: only a new slot can go on, and that is a gap.
        return drop + make if (state.lost or new_publication) and not state.active else []

    async def drop(self) -> list[str]:
        """Drop the slot if it exists, and return the statements that were run.

        Raises:
            errors.SlotInUse: a session streams from it.
        """
        if await self._state() is None:
            return []
        statement = remedies.drop_slot(self.name)
        await self._rows(statement)
        return [statement]

    async def drop_soon(self, seconds: float) -> bool:
        """Drop the slot as soon as its walsender has noticed that we are gone; return whether there was one.

        Raises:
            errors.SlotInUse: a session still streams from it after this many seconds.
        """
        return bool(await _soon(self.drop, seconds))

    async def skip_soon(self, seconds: float) -> None:
        """Move the slot behind all that is committed by now, as soon as its walsender has noticed that we are gone.

        PostgreSQL reads the WAL for that, but does not build the changes.

        Raises:
            errors.SlotInUse: as `drop_soon`.
            errors.PostgresUnavailable: it can't be moved.
        """
        await _soon(lambda: self._rows(_SKIP), seconds)

    async def end_walsender(self) -> None:
        """Ask the backend that streams from the slot, or makes it, to end."""
        await self._rows(_END)

    async def oldest_running(self) -> int:
        """Return the oldest transaction that runs, in the 32 bits of pg_stat_activity; without any, the next one."""
        (row,) = await self._rows(_OLDEST)
        return int(row.xid)

    async def rows_written(self) -> int:
        """Read how many rows were ever written in the database."""
        (row,) = await self._rows(_ROWS_WRITTEN)
        return int(row.written)


async def _soon(work: Callable[[], Awaitable[Value]], seconds: float) -> Value:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await work()
        except errors.SlotInUse:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


_SERVER = """
SELECT current_setting('server_version_num')::int AS version, current_setting('wal_level') AS wal_level,
  pg_is_in_recovery() AS in_recovery
"""

_STATE = """
SELECT active, active_pid, two_phase, plugin, database = current_database() AS here,
  confirmed_flush_lsn::text AS confirmed,
  coalesce(wal_status, 'lost') AS wal_status,
  coalesce(pg_wal_lsn_diff(written, restart_lsn), 0)::bigint AS retained,
  coalesce(pg_wal_lsn_diff(written, confirmed_flush_lsn), 0)::bigint AS unconfirmed
FROM pg_replication_slots, LATERAL (
  SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
) AS wal (written)
WHERE slot_name = %(slot)s
"""

_SKIP = """
SELECT pg_replication_slot_advance(
  %(slot)s, CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END
)
"""

_END = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %(slot)s AND active"

_OLDEST = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint & 4294967295 AS xid"

# Not its transactions: each one that a walsender decodes counts as a rollback, and all are counted at once when it
# ends. A reload of the rules would look like a burst.
_ROWS_WRITTEN = """
SELECT tup_inserted + tup_updated + tup_deleted AS written FROM pg_stat_database WHERE datname = current_database()
"""
