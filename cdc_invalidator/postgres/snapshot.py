"""Asks PostgreSQL what is committed, and which committed transactions readers can see already.

The walsender sends a transaction as soon as its commit record is flushed. Its rows become visible a little later: after
microseconds on a quiet server, with synchronous replication after the standbys' answer. A bust in between does not
last: the next reader loads the old row and caches it again. So apply asks before it busts, and busts again later what
was not visible yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg import pq

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import AT_ONCE_SECONDS, answered, connect, ready
from cdc_invalidator.postgres.dsn import DsnSource

# At the beginning of a page, the insert position is already past the page's header (24 bytes; 40 for a segment's first
# page), but no record ends there: then take the page's start.
_WRITTEN = """
PREPARE written AS
SELECT lsn - CASE WHEN lsn % page IN (24, 40) THEN lsn % page ELSE 0 END
FROM (SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, current_setting('wal_block_size')::int
  WHERE NOT pg_is_in_recovery()) AS written (lsn, page)
"""
# A snapshot's own xmax is no bound: a transaction that runs with a later id than any that has ended lies above it. The
# age of an id is counted from the next id.
_HORIZON = """
PREPARE horizon AS
SELECT pg_snapshot_xmin(taken) || ':' || pg_snapshot_xmax(taken)::text::bigint + age(pg_snapshot_xmax(taken)::xid)
FROM pg_current_snapshot() AS taken
"""
_REPLAYED = "PREPARE replayed AS SELECT pg_last_wal_replay_lsn() - '0/0'::pg_lsn"


class Horizon(NamedTuple):
    """Which transactions are over, by their ids in 64 bits: all below ``oldest``; ``next`` has not begun yet."""

    oldest: int
    next: int

    def covers(self, earlier: Horizon) -> bool:
        """Return whether all that had begun at an earlier time are over."""
        return self.oldest >= earlier.next

    def with_other(self, other: Horizon) -> Horizon:
        """Return what holds on both of two servers with the same transactions."""
        return Horizon(min(self.oldest, other.oldest), max(self.next, other.next))


# A crash discards the statistics, so that all counters begin anew; a clean stop keeps them. Of the kinds of statistics,
# these are the ones that people hardly ever reset, and of one row among them the oldest remains.
_CRASH_FREE = """
PREPARE crash_free AS SELECT extract(epoch FROM min(stats_reset))::text FROM pg_stat_slru
"""
_SYSTEM = "SELECT system_identifier::text FROM pg_control_system()"


class Snapshots:
    """One connection that takes snapshots.

    Args:
        connection: opened by `open`.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, dsn: DsnSource) -> Snapshots:
        """Connect."""
        connection = await connect(dsn, "cdc-invalidator snapshots")
        with answered(connection):
            await connection.execute("PREPARE taken AS SELECT pg_current_snapshot()::text")
            await connection.execute(_WRITTEN)
            await connection.execute(_CRASH_FREE)
            await connection.execute(_HORIZON)
            await connection.execute(_REPLAYED)
        return cls(connection)

    @classmethod
    async def open_readers(cls, dsn: DsnSource, system_id: str | None) -> Snapshots:
        """Connect to the server that readers load from, if that is another one.

        Args:
            dsn: of ``CDC_POSTGRES_READERS``.
            system_id: identifies the data of the server that we stream from, which must be the same; ``None``: unknown.

        Raises:
            errors.ServerRefuses: the server has other data.
        """
        opened = await cls.open(dsn)
        theirs = await opened.system_id()
        if None not in {theirs, system_id} and theirs != system_id:
            opened.close()
            raise errors.ServerRefuses(
                "CDC_POSTGRES_READERS names a server with other data than CDC_POSTGRES_DSN; correct one of the two."
            )
        return opened

    def close(self) -> None:
        """Close the connection at once."""
        self._connection.pgconn.finish()

    async def take(self) -> str:
        """Take a snapshot and return its text form, ``xmin:xmax:xip,xip…``, with ids of 64 bits.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        taken = await self._ask(b"taken")
        assert taken is not None
        return taken.decode()

    async def horizon(self) -> Horizon:
        """Look at which transactions are over.

        Raises:
            errors.PostgresUnavailable: nobody knows.
        """
        found = await self._ask(b"horizon")
        assert found is not None
        oldest, following = found.split(b":")
        return Horizon(int(oldest), int(following))

    async def written(self) -> int | None:
        """Return an LSN above everything that is committed by now; ``None`` on a standby, which can't know.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        written = await self._ask(b"written")
        return None if written is None else int(written)

    async def reached(self) -> int:
        """Return the end of the server's WAL: as written, or on a standby as replayed; a standby can reach it.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        written = await self.written()
        return int(await self._ask(b"replayed") or 0) if written is None else written

    async def crash_free_since(self) -> str:
        """Return a time (in s since 1970) since when the server has not crashed; it changes at each crash.

        A crash also takes back commits that readers have seen: those with ``synchronous_commit = off`` that were not
        flushed yet. They were never in the stream.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        since = await self._ask(b"crash_free")
        return "" if since is None else since.decode()

    async def system_id(self) -> str | None:
        """Return what identifies the data of the server; ``None`` where it does not say."""
        try:
            with answered(self._connection):
                row = await (await self._connection.execute(_SYSTEM)).fetchone()
        except errors.InvalidatorError:
            # Not every hoster has the function, and not every role may call it.
            return None
        assert row is not None
        return str(row[0])

    async def _ask(self, statement: bytes) -> bytes | None:
        # Through libpq itself: each bust waits for this, and the driver's way takes twice as long.
        pgconn = self._connection.pgconn
        async with self._turn:
            with answered(self._connection, AT_ONCE_SECONDS):
                pgconn.send_query_prepared(statement, [])
                pgconn.flush()
                found = None
                while True:
                    while pgconn.is_busy():
                        await ready(pgconn.socket)
                        pgconn.consume_input()
                    result = pgconn.get_result()
                    if result is None:
                        break
                    if result.status != pq.ExecStatus.TUPLES_OK:
                        raise psycopg.errors.error_from_result(result, encoding="utf-8")
                    found = result.get_value(0, 0)
        return found

    async def hidden(self, xids: Iterable[int]) -> set[int]:
        """Return those of these committed transactions that a reader who starts now does not see yet.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        return hidden(await self.take(), xids)


def hidden(snapshot: str, xids: Iterable[int]) -> set[int]:
    """Return those of the transactions that a snapshot does not see.

    Args:
        snapshot: its text form; see `Snapshots.take`.
        xids: transaction ids in the 32 bits of the replication stream, at most 2³¹ transactions old.
    """
    _, xmax_text, running_text = snapshot.split(":")
    xmax = int(xmax_text)
    running = {int(xid) & 0xFFFFFFFF for xid in running_text.split(",") if xid}
    return {xid for xid in xids if xid in running or _not_before(xid, xmax)}


def _not_before(xid: int, xmax: int) -> bool:
    # Ids wrap around: if two are less than 2³¹ apart, their difference tells which is later.
    return (xid - xmax) & 0xFFFFFFFF < 0x80000000
