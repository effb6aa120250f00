"""The edge to the walsender: CopyData messages in, standby status updates out.

Follows https://www.postgresql.org/docs/current/protocol-replication.html, from START_REPLICATION on. Every failure is
raised as `errors.PostgresUnavailable`, `errors.SlotInUse` or `errors.ServerRefuses`; after that the connection is
thrown away.

libpq opens the connection. Where it is not encrypted we then read from the socket itself: libpq hands out a message at
a time, which costs more than all that is done with it. What is read is the same both ways.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from abc import ABC, abstractmethod
from typing import NamedTuple

import psycopg
from psycopg import pq, sql

from cdc_invalidator import errors, lsn
from cdc_invalidator.lsn import EPOCH_OFFSET_US
from cdc_invalidator.postgres.connection import OPTIONS, ready, translated
from cdc_invalidator.postgres.stream import whole

# Bytes a read: enough to pay for the wake-up, few enough that other tasks get their turn.
BYTES_A_READ = 1 << 20
# Where so many reads in a row found something at once, the walsender may be busy, and is left alone for a moment, and
# for longer as long as it goes on like that: a packet and a wake-up for each of its messages cost both sides more than
# the messages do. A quiet stream never waits.
AT_ONCE = 4
AT_ONCE_SECONDS = 0.0002
NAP_SECONDS = 0.001
LONGEST_NAP_SECONDS = 0.010
LONGEST_NAP_ON_UNIX_SECONDS = 0.001
BUSY_BYTES_A_SECOND = 8_000_000
COPY = 5
"""Where what a CopyData message carries begins: after its tag and length."""
PAYLOAD = COPY + 25
"""Where the pgoutput message in an XLogData message begins: after its tag, start, end and send time."""

_KEEPALIVE = struct.Struct(">xQqB")
_STATUS = struct.Struct(">cQQQqB")
_HEAD = struct.Struct(">cI")


class Keepalive(NamedTuple):
    """The server's word that all WAL before ``end`` has been sent; ``reply``: it wants a status update at once."""

    end: int
    reply: bool

    @classmethod
    def read(cls, data: bytes) -> Keepalive:
        """Read what a CopyData message carries.

        Raises:
            errors.MalformedMessage: it is no keepalive.
        """
        if len(data) != _KEEPALIVE.size or data[:1] != b"k":
            raise errors.MalformedMessage
        end, _, reply = _KEEPALIVE.unpack(data)
        return cls(end, bool(reply))


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
        self._stream: _Stream = _Libpq(connection.pgconn)

    @classmethod
    async def open(cls, dsn: str) -> Replication:
        """Connect as a walsender's client."""
        with translated():
            return cls(
                await psycopg.AsyncConnection.connect(
                    dsn,
                    autocommit=True,
                    replication="database",
                    application_name="cdc-invalidator",
                    **OPTIONS,
                )
            )

    async def identify(self) -> System:
        """Ask who the server is."""
        with translated():
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
        with translated():
            text = command.as_bytes(self._connection)
            if self._connection.info.parameter_status("server_encoding") == "SQL_ASCII":
                # What such a database holds need not be UTF-8, and the server would refuse to send it as that.
                await self._connection.execute("SET client_encoding = 'SQL_ASCII'")
            if await self._readable_by_others():
                self._stream = _Socket(self._connection.pgconn)
            await self._stream.start(text)

    async def _readable_by_others(self) -> bool:
        """Tell whether what the socket brings is the protocol as it is: neither TLS nor GSSAPI encrypts it."""
        if self._connection.pgconn.ssl_in_use:
            return False
        cursor = await self._connection.execute("SELECT FROM pg_stat_gssapi WHERE pid = pg_backend_pid() AND encrypted")
        return await cursor.fetchone() is None

    async def read(self) -> bytes:
        """Give what has arrived, at least one: whole CopyData messages, one after the other."""
        with translated():
            data = await self._stream.read()
        if not data:
            raise errors.PostgresUnavailable("PostgreSQL ended the replication stream; it is started anew.")
        return data

    @property
    def backend_pid(self) -> int:
        """The process id of our walsender."""
        return self._connection.pgconn.backend_pid

    def status(self, confirmed: int, received: int, *, reply: bool = False) -> None:
        """Send a standby status update.

        Args:
            confirmed: LSN that PostgreSQL may forget; reported as flushed and applied.
            received: LSN up to which the stream has been received.
            reply: ask for a keepalive in return, which brings the server's position.
        """
        now_us = time.time_ns() // 1000 - EPOCH_OFFSET_US
        with translated():
            self._stream.send(_STATUS.pack(b"r", max(received, confirmed), confirmed, confirmed, now_us, reply))

    async def finish(self) -> None:
        """End the stream in order, so that the server has taken in the last status update."""
        with translated():
            self._stream.end()
            while await self._stream.read():
                pass

    def close(self) -> None:
        """Drop the connection at once; PostgreSQL frees the slot."""
        self._stream.close()
        self._connection.pgconn.finish()


class _Stream(ABC):
    """The connection from START_REPLICATION on."""

    @abstractmethod
    async def start(self, command: bytes) -> None:
        """Begin."""

    @abstractmethod
    async def read(self) -> bytes:
        """Give whole CopyData messages, at least one; empty once the server has ended the stream in order."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Send what one CopyData message carries."""

    @abstractmethod
    def end(self) -> None:
        """Tell the server that we are done."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is ours; the connection itself is closed by whoever opened it."""


class _Libpq(_Stream):
    """By the driver, a message at a time."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._over = False

    async def start(self, command: bytes) -> None:
        pgconn = self._pgconn
        pgconn.send_query(command)
        pgconn.flush()
        while pgconn.is_busy():
            await ready(pgconn.socket)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            raise _of_result(result)

    async def read(self) -> bytes:
        messages: list[bytes] = []
        while not (self._over or self._drain(messages)):
            await ready(self._pgconn.socket)
            self._pgconn.consume_input()
        return b"".join(messages)

    def _drain(self, messages: list[bytes]) -> bool:
        size = 0
        while size < BYTES_A_READ:
            found, view = self._pgconn.get_copy_data(1)
            if found == 0:
                break
            if found < 0:
                result = self._pgconn.get_result()
                if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
                    raise _of_result(result)
                # What came before it is given first.
                self._over = True
                return True
            messages.append(_HEAD.pack(b"d", found + 4) + view)
            size += found
        return bool(messages)

    def send(self, data: bytes) -> None:
        self._pgconn.put_copy_data(data)
        self._pgconn.flush()

    def end(self) -> None:
        self._pgconn.put_copy_end()
        self._pgconn.flush()

    def close(self) -> None:
        pass


class _Socket(_Stream):
    """By the connection's socket, as much at a time as there is; libpq does not see it any more."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._socket = socket.socket(fileno=os.dup(pgconn.socket))
        self._socket.setblocking(False)
        self._buffer = memoryview(bytearray(BYTES_A_READ))
        # What has come of a message that is not whole yet.
        self._rest = bytearray()
        # How many reads in a row did not have to wait, and how long to let more come before the next one.
        self._at_once = 0
        self._nap = 0.0
        self._longest_nap = (
            LONGEST_NAP_ON_UNIX_SECONDS if self._socket.family == socket.AF_UNIX else LONGEST_NAP_SECONDS
        )
        self._unsent = b""
        self._over = False

    async def start(self, command: bytes) -> None:
        self._write(_HEAD.pack(b"Q", len(command) + 5) + command + b"\0")
        while not self._rest:
            await self._receive()
        while self._rest[:1] != b"W":
            # An error is raised here; a notice is none of ours.
            if not self._skip():
                await self._receive()
        while not self._skip():
            await self._receive()

    async def read(self) -> bytes:
        while not self._over:
            if len(self._rest) >= COPY and len(self._rest) > _length(self._rest):
                data = bytes(self._rest)
                size = whole(data)
                if size:
                    del self._rest[:size]
                    return data[:size]
                if self._skip():
                    continue
            await self._receive()
        return b""

    def _skip(self) -> bool:
        """Pass over a message that is no CopyData, if all of it is there."""
        rest = self._rest
        if len(rest) < COPY or len(rest) <= _length(rest):
            return False
        tag, body = bytes(rest[:1]), bytes(rest[COPY : 1 + _length(rest)])
        del rest[: 1 + _length(rest)]
        if tag == b"E":
            raise _of_fields(body)
        if tag not in b"WNSA":
            # CopyDone, or what follows it.
            self._over = True
        return True

    async def _receive(self) -> None:
        nap = self._nap
        if nap:
            await asyncio.sleep(nap)
        asked = time.monotonic()
        await ready(self._socket.fileno(), writable=bool(self._unsent))
        waited = time.monotonic() - asked
        if self._unsent:
            self._write(b"")
        size = 0
        while size < BYTES_A_READ:
            try:
                received = self._socket.recv_into(self._buffer[size:])
            except BlockingIOError:
                break
            except OSError:
                if size:
                    break
                raise
            if not received:
                if size:
                    # What came before the end is taken first: it may be why. The end is there at the next read again.
                    break
                raise errors.PostgresUnavailable("PostgreSQL closed the replication connection; it is opened anew.")
            size += received
        self._rest += self._buffer[:size]
        if size > BYTES_A_READ // 2:
            self._nap = nap / 2
        elif nap:
            self._nap = min(2 * nap, self._longest_nap) if size > nap * BUSY_BYTES_A_SECOND else 0.0
        else:
            self._at_once = self._at_once + 1 if waited < AT_ONCE_SECONDS else 0
            self._nap = NAP_SECONDS if self._at_once >= AT_ONCE else 0.0

    def send(self, data: bytes) -> None:
        self._write(_HEAD.pack(b"d", len(data) + 4) + data)

    def end(self) -> None:
        self._write(_HEAD.pack(b"c", 4))

    def _write(self, data: bytes) -> None:
        data = self._unsent + data
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            # The server has gone; what it said last is still to be read, and then there is nothing more.
            sent = len(data)
        # The server is not reading; what is left goes with the next one, or as soon as it reads again.
        self._unsent = data[sent:]

    def close(self) -> None:
        self._socket.close()


def _length(data: bytearray) -> int:
    """Give the length of the message at the beginning, without its tag."""
    return int.from_bytes(data[1:COPY], "big")


def _of_result(result: pq.abc.PGresult | None) -> Exception:
    if result is None:
        return errors.PostgresUnavailable("PostgreSQL does not answer START_REPLICATION; it is started anew.")
    return psycopg.errors.error_from_result(result, encoding="utf-8")


def _of_fields(body: bytes) -> Exception:
    """Make the driver's error of what an ErrorResponse carries, with the words that the driver gives it."""
    fields = {field[:1]: field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field}
    sentence = fields.get(b"M", "")
    try:
        return psycopg.errors.lookup(fields.get(b"C", ""))(sentence)
    except KeyError:
        return psycopg.OperationalError(sentence)
