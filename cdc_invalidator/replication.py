"""The edge to the walsender: frames in, standby status updates out.

Follows https://www.postgresql.org/docs/current/protocol-replication.html, from START_REPLICATION on. Every failure is
raised as `errors.PostgresUnavailable`, `errors.SlotInUse` or `errors.ServerRefuses`; after that the connection is
thrown away.
"""

from __future__ import annotations

import asyncio
import struct
import time
from typing import NamedTuple

import psycopg
from psycopg import pq, sql

from cdc_invalidator import errors, lsn, postgres
from cdc_invalidator.lsn import EPOCH_OFFSET_US

# Frames a read: enough to pay for the wake-up, few enough that other tasks get their turn.
FRAMES_A_READ = 5000
PAYLOAD = 25
"""Where the pgoutput payload begins in an XLogData frame: after its tag, start, end and send time."""

_XLOGDATA, _KEEPALIVE = b"wk"
_KEEPALIVE_BODY = struct.Struct(">xQqB")
_STATUS = struct.Struct(">cQQQqB")


class Keepalive(NamedTuple):
    """The server's word that all WAL before ``end`` has been sent; ``reply``: it wants a status update at once."""

    end: int
    reply: bool


class System(NamedTuple):
    """What IDENTIFY_SYSTEM answers: the cluster's identifier, its timeline and the flushed end of its WAL."""

    system_id: str
    timeline: int
    flushed: int


class Replication:
    """One replication connection. Open it, `identify`, `start`, then `read` and `status`; `close` in the end.

    Args:
        connection: a psycopg connection opened with ``replication=database``.
    """

    def __init__(self, connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._end: errors.InvalidatorError | None = None

    @classmethod
    async def open(cls, dsn: str) -> Replication:
        """Connect as a walsender's client."""
        with postgres.translated():
            return cls(
                await psycopg.AsyncConnection.connect(
                    dsn,
                    autocommit=True,
                    replication="database",
                    application_name="cdc-invalidator",
                    **postgres.OPTIONS,
                )
            )

    async def identify(self) -> System:
        """Ask who the server is."""
        with postgres.translated():
            cursor = await self._connection.execute("IDENTIFY_SYSTEM")
            row = await cursor.fetchone()
        assert row is not None
        return System(str(row[0]), int(str(row[1])), lsn.parse(str(row[2])))

    async def start(self, name: str, publication: str) -> None:
        """Start streaming from the slot, from the position that it has confirmed.

        Raises:
            errors.SlotInUse: another session streams from it.
        """
        command = sql.SQL(
            "START_REPLICATION SLOT {slot} LOGICAL 0/0"
            " (proto_version '2', streaming 'on', messages 'true', publication_names {publication})"
        ).format(
            slot=sql.Identifier(name),
            # A list of names: quoted as identifiers inside one literal.
            publication=sql.Literal(sql.Identifier(publication).as_string(self._connection)),
        )
        with postgres.translated():
            await self._connection.execute(command)

    async def read(self) -> list[bytes | Keepalive]:
        """Give all frames that have arrived, at least one: XLogData as its bytes (see `PAYLOAD`), or a keepalive."""
        frames: list[bytes | Keepalive] = []
        with postgres.translated():
            while not self._drain(frames):
                await self._readable()
                self._pgconn.consume_input()
        return frames

    @property
    def backend_pid(self) -> int:
        """The process id of our walsender."""
        return self._pgconn.backend_pid

    def _drain(self, frames: list[bytes | Keepalive]) -> bool:
        get = self._pgconn.get_copy_data
        while len(frames) < FRAMES_A_READ and self._end is None:
            size, view = get(1)
            if size > 0:
                data = bytes(view)
                frames.append(data if data[0] == _XLOGDATA else _keepalive(data))
            elif size == 0:
                break
            else:
                # The end of the stream, told once: what came before it is given first.
                self._end = self._ended()
                break
        if self._end is not None and not frames:
            raise self._end
        return bool(frames)

    def _ended(self) -> errors.InvalidatorError:
        result = self._pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            return postgres.translate(psycopg.errors.error_from_result(result, encoding="utf-8"))
        return errors.PostgresUnavailable("PostgreSQL ended the replication stream; it is started anew.")

    async def _readable(self) -> None:
        # The reader is removed again each time: while the backlog is full nobody reads, and it must not fire then.
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        socket = self._pgconn.socket
        loop.add_reader(socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(socket)

    def status(self, confirmed: int, received: int, *, reply: bool = False) -> None:
        """Send a standby status update.

        Args:
            confirmed: LSN that PostgreSQL may forget; reported as flushed and applied.
            received: LSN up to which the stream has been received.
            reply: ask for a keepalive in return, which brings the server's position.
        """
        now_us = time.time_ns() // 1000 - EPOCH_OFFSET_US
        with postgres.translated():
            self._pgconn.put_copy_data(
                _STATUS.pack(b"r", max(received, confirmed), confirmed, confirmed, now_us, reply)
            )
            self._pgconn.flush()

    async def finish(self) -> None:
        """End the stream in order, so that the server has taken in the last status update."""
        with postgres.translated():
            self._pgconn.put_copy_end()
            self._pgconn.flush()
            while True:
                size, _ = self._pgconn.get_copy_data(1)
                if size < 0:
                    return
                if size == 0:
                    await self._readable()
                    self._pgconn.consume_input()

    def close(self) -> None:
        """Drop the connection at once; PostgreSQL frees the slot."""
        self._pgconn.finish()


def _keepalive(data: bytes) -> Keepalive:
    if data[0] != _KEEPALIVE or len(data) != _KEEPALIVE_BODY.size:
        raise errors.MalformedMessage
    end, _, reply = _KEEPALIVE_BODY.unpack(data)
    return Keepalive(end, bool(reply))
