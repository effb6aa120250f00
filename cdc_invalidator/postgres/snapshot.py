"""Asks PostgreSQL what is committed, and which committed transactions readers can see already.

The walsender sends a transaction as soon as its commit record is flushed. Its rows become visible a little later: after
microseconds on a quiet server, with synchronous replication after the standbys' answer. A bust in between does not
last: the next reader loads the old row and caches it again. So apply asks before it busts, and busts again later what
was not visible yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import pq

from cdc_invalidator.postgres.connection import connect, ready, translated

# At the beginning of a page, the insert position is already past the page's header (24 bytes; 40 for a segment's first
# page), but no record ends there: then take the page's start.
_WRITTEN = """
PREPARE written AS
SELECT lsn - CASE WHEN lsn % page IN (24, 40) THEN lsn % page ELSE 0 END
FROM (SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, current_setting('wal_block_size')::int
  WHERE NOT pg_is_in_recovery()) AS written (lsn, page)
"""


class Snapshots:
    """One connection that takes snapshots.

    Args:
        connection: opened by `open`.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, dsn: str) -> Snapshots:
        """Connect."""
        connection = await connect(dsn, "cdc-invalidator snapshots")
        with translated():
            await connection.execute("PREPARE taken AS SELECT pg_current_snapshot()::text")
            await connection.execute(_WRITTEN)
        return cls(connection)

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

    async def written(self) -> int | None:
        """Return an LSN above everything that is committed by now; ``None`` on a standby, which can't know.

        Raises:
            errors.PostgresUnavailable: the server did not answer.
        """
        written = await self._ask(b"written")
        return None if written is None else int(written)

    async def _ask(self, statement: bytes) -> bytes | None:
        # Through libpq itself: each bust waits for this, and the driver's way takes twice as long.
        pgconn = self._connection.pgconn
        async with self._turn:
            with translated():
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


def all_over(before: str, now: str) -> bool:
    """Return whether every transaction that was running at one snapshot is over at a later one."""
    return int(now.partition(":")[0]) >= int(before.split(":", 2)[1])


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
