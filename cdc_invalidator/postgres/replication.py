"""The connection to the walsender: CopyData messages in, standby status updates out.

Follows https://www.postgresql.org/docs/current/protocol-replication.html from START_REPLICATION on. Every failure is
raised as `errors.PostgresUnavailable`, `errors.SlotInUse` or `errors.ServerRefuses`; then the connection is thrown
away.

libpq opens the connection. If it is not encrypted, we then read its socket ourselves: libpq returns one message at a
time, which costs more than all further work on it. Both ways read the same messages.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import psycopg
from psycopg import pq, sql

from cdc_invalidator import errors, lsn
from cdc_invalidator.lsn import EPOCH_OFFSET_US
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.connection import ENDLESS, answered, first_line, open_alone, ready, translate, translated
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.stream import whole

# Bytes a read: enough to be worth the wake-up, few enough that other tasks get their turn.
BYTES_A_READ = 1 << 20
# After this many reads in a row that did not wait, the walsender may be busy. Then we nap before each read, longer and
# longer while it stays busy: a packet and a wake-up for each message cost both sides more than the message itself. On a
# quiet stream we never nap.
AT_ONCE = 4
AT_ONCE_SECONDS = 0.0002
NAP_SECONDS = 0.001
LONGEST_NAP_SECONDS = 0.010
LONGEST_NAP_ON_UNIX_SECONDS = 0.001
BUSY_BYTES_A_SECOND = 8_000_000
# A walsender answers each second: see `confirm` in receive.
SILENCE_SECONDS = 30.0
COPY = 5
"""Where what a CopyData message carries begins: after its tag and length."""
PAYLOAD = COPY + 25
"""Where the pgoutput message in an XLogData message begins: after its tag, start, end and send time."""
# A larger message is not held: its row is known only by its table. To hand one over takes three times as much memory.
MOST_BYTES = 32 << 20
# So much of it is kept: its tag, and the ids that follow.
BEGINNING = PAYLOAD + 9

# SQLSTATEs that say nothing of the change at hand: the connection ends, the server lacks resources or is shut down.
_OF_THE_SERVER = ("08", "53", "55", "57")

_ROWS = (b"I", b"U", b"D")
_KEEPALIVE = struct.Struct(">xQqB")
_STATUS = struct.Struct(">cQQQqB")
_HEAD = struct.Struct(">cI")


class Keepalive(NamedTuple):
    """The server has sent all WAL before ``end``; ``reply``: it wants a status update at once."""

    end: int
    reply: bool

    @classmethod
    def read(cls, data: bytes) -> Keepalive:
        """Decode the content of a CopyData message.

        Raises:
            errors.MalformedMessage: it is not a keepalive.
        """
        if len(data) != _KEEPALIVE.size or data[:1] != b"k":
            raise errors.MalformedMessage
        end, _, reply = _KEEPALIVE.unpack(data)
        return cls(end, bool(reply))


class System(NamedTuple):
    """The answer to IDENTIFY_SYSTEM: the cluster's identifier, its timeline and the flushed end of its WAL."""

    system_id: str
    timeline: int
    flushed: int


class Replication:
    """One replication connection. Call `open`, `identify` and `start`, then `read` and `status`, finally `close`.

    Args:
        connection: a psycopg connection opened with ``replication=database``.
    """

    def __init__(self, connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        self._connection = connection
        self._transport: _Transport = _Libpq(connection.pgconn)
        # The process id of our walsender.
        self.backend_pid = connection.pgconn.backend_pid
        self._waits_since: float | None = None
        # So long a walsender that works may be silent: while it decodes a large transaction, it looks for our questions
        # once in half its own timeout.
        self.most_silence = SILENCE_SECONDS

    @classmethod
    async def open(cls, dsn: DsnSource, parameters: Mapping[str, str] | None = None) -> Replication:
        """Connect as a walsender's client, with these parameters of the server."""
        wanted = {**ENDLESS, **(parameters or {})}
        return cls(await open_alone(dsn, "cdc-invalidator", wanted, replication="database"))

    @classmethod
    async def try_out(cls, dsn: DsnSource) -> System:
        """Connect as a walsender's client and leave again, to learn whether we can stream before anything is made.

        Returns:
            The server's identity.

        Raises:
            errors.InvalidatorError: we can't; the message says why.
        """
        replication = await cls.open(dsn)
        try:
            return await replication.identify()
        finally:
            replication.close()

    async def identify(self) -> System:
        """Ask the server for its identity."""
        with answered(self._connection):
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
        with answered(self._connection):
            text = command.as_bytes(self._connection)
            # Asked while texts are still read as UTF-8.
            self.most_silence = SILENCE_SECONDS + await self._sender_timeout() / 2
            if self._connection.info.parameter_status("server_encoding") == "SQL_ASCII":
                # The data of such a database may not be UTF-8, and then the server would refuse to send it as UTF-8.
                await self._connection.execute("SET client_encoding = 'SQL_ASCII'")
            if await self._readable_by_others():
                self._transport = _Socket(self._connection.pgconn)
            await self._transport.start(text)

    async def _sender_timeout(self) -> float:
        """Return wal_sender_timeout in seconds."""
        # As a number: in a SQL_ASCII database, texts come as bytes.
        query = "SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'"
        row = await (await self._connection.execute(query)).fetchone()
        return int(str(row[0])) / 1000 if row else 0.0

    async def _readable_by_others(self) -> bool:
        """Return whether the socket carries the plain protocol: neither TLS nor GSSAPI encrypts it."""
        if self._connection.pgconn.ssl_in_use:
            return False
        cursor = await self._connection.execute("SELECT FROM pg_stat_gssapi WHERE pid = pg_backend_pid() AND encrypted")
        return await cursor.fetchone() is None

    async def read(self) -> bytes:
        """Return the CopyData messages that have arrived, whole and at least one; wait if there is none."""
        self._waits_since = time.monotonic()
        try:
            data = await self._transport.read()
        except (psycopg.Error, OSError) as error:
            if _is_of_the_change(error):
                raise errors.CannotSend(
                    f"PostgreSQL can't send the change that comes next ({first_line(error)}); it is tried again a few "
                    "times, and then skipped."
                ) from error
            raise translate(error) from error
        finally:
            self._waits_since = None
        if not data:
            raise errors.PostgresUnavailable("PostgreSQL ended the replication stream; it is started anew.")
        return data

    @property
    def silent_for(self) -> float:
        """For how many seconds we have waited for a word of the walsender; 0 while nobody reads."""
        if self._waits_since is None:
            return 0.0
        return time.monotonic() - max(self._waits_since, self._transport.heard_at)

    def status(self, confirmed: int, received: int, *, reply: bool = False) -> None:
        """Send a standby status update.

        Args:
            confirmed: LSN that PostgreSQL may forget; reported as flushed and applied.
            received: LSN up to which the stream has been received.
            reply: ask for a keepalive in return, which brings the server's position.
        """
        now_us = time.time_ns() // 1000 - EPOCH_OFFSET_US
        with translated():
            self._transport.send(_STATUS.pack(b"r", max(received, confirmed), confirmed, confirmed, now_us, reply))

    async def finish(self) -> None:
        """End the stream in order, so that the server has processed the last status update."""
        with translated():
            self._transport.end()
            while await self._transport.read():
                pass

    def close(self) -> None:
        """Drop the connection at once; PostgreSQL frees the slot."""
        self._transport.close()
        self._connection.pgconn.finish()


class _Transport(ABC):
    """The connection from START_REPLICATION on; ``heard_at``: when the last bytes came (monotonic clock)."""

    heard_at = 0.0

    @abstractmethod
    async def start(self, command: bytes) -> None:
        """Send the command and wait until the stream has started."""

    @abstractmethod
    async def read(self) -> bytes:
        """Return whole CopyData messages, at least one; nothing once the server has ended the stream in order."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Send the content of one CopyData message."""

    @abstractmethod
    def end(self) -> None:
        """Tell the server that we end the stream."""

    @abstractmethod
    def close(self) -> None:
        """Close what this object opened; the connection is closed by its owner."""


class _Libpq(_Transport):
    """Reads through the driver, one message at a time."""

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
            self.heard_at = time.monotonic()
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
                # First return what came before it.
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


class _Socket(_Transport):
    """Reads from the connection's socket, as much at a time as there is. From then on libpq reads nothing."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._socket = socket.socket(fileno=os.dup(pgconn.socket))
        self._socket.setblocking(False)
        self._buffer = memoryview(bytearray(BYTES_A_READ))
        # The beginning of a message that is not whole yet.
        self._rest = bytearray()
        # How many reads in a row did not wait, and how long to sleep before the next one.
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
            # `_skip` raises an error message; notices are ignored.
            if not self._skip():
                await self._receive()
        while not self._skip():
            await self._receive()

    async def read(self) -> bytes:
        while not self._over:
            if self._rest[:1] == b"d" and len(self._rest) >= COPY and _length(self._rest) > MOST_BYTES:
                if wide := await self._cut():
                    return wide
                continue
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

    async def _cut(self) -> bytes:
        """Receive a message that is too large to be held; return what stands for it, nothing if it is no row."""
        left = 1 + _length(self._rest)
        while len(self._rest) < BEGINNING:
            await self._receive()
        head = bytes(self._rest[:BEGINNING])
        while left:
            gone = min(left, len(self._rest))
            del self._rest[:gone]
            left -= gone
            if left:
                await self._receive()
        if head[PAYLOAD : PAYLOAD + 1] not in _ROWS:
            # A message of pg_logical_emit_message, which nobody can read anyway.
            return b""
        body = head[COPY:PAYLOAD] + pgoutput.WIDE + head[PAYLOAD:]
        return _HEAD.pack(b"d", len(body) + 4) + body

    def _skip(self) -> bool:
        """Skip a message that is not CopyData if it is whole; return whether it was."""
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
        self.heard_at = time.monotonic()
        waited = self.heard_at - asked
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
                    # First take what came before the end: it may tell the cause. The next read finds the end again.
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
            # The server has gone. Its last messages can still be read; there is no point in sending.
            sent = len(data)
        # If the server does not read, the rest goes with the next message, or as soon as it reads again.
        self._unsent = data[sent:]

    def close(self) -> None:
        self._socket.close()


def _length(data: bytearray) -> int:
    """Return the length of the first message, without its tag."""
    return int.from_bytes(data[1:COPY], "big")


def _is_of_the_change(error: Exception) -> bool:
    """Return whether the walsender has failed at what it was to send, rather than being gone."""
    state = getattr(error, "sqlstate", None) or ""
    return (
        bool(state)
        and not state.startswith(_OF_THE_SERVER)
        and not isinstance(translate(error), errors.PositionGivenUp)
    )


def _of_result(result: pq.abc.PGresult | None) -> Exception:
    if result is None:
        return errors.PostgresUnavailable("PostgreSQL does not answer START_REPLICATION; it is started anew.")
    return psycopg.errors.error_from_result(result, encoding="utf-8")


def _of_fields(body: bytes) -> Exception:
    """Return the driver's error for the content of an ErrorResponse, with the same text as the driver's."""
    fields = {field[:1]: field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field}
    sentence = fields.get(b"M", "")
    try:
        return psycopg.errors.lookup(fields.get(b"C", ""))(sentence)
    except KeyError:
        return psycopg.OperationalError(sentence)
