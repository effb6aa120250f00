"""The replication stream by the socket itself: whole messages, whatever comes how, and the server's last words."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from cdc_invalidator import errors
from cdc_invalidator.postgres import pgoutput, replication
from cdc_invalidator.postgres.replication import _Socket

ROW = b"d" + struct.pack(">I", 4 + 30) + b"w" + b"x" * 29
SHUTDOWN = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
LAST_WORDS = b"E" + struct.pack(">I", 4 + len(SHUTDOWN)) + SHUTDOWN


class Server:
    def __init__(self) -> None:
        self.socket, self._client = socket.socketpair()
        connection: Any = SimpleNamespace(socket=self._client.fileno())
        self.stream = _Socket(connection)

    def close(self) -> None:
        self.socket.close()
        self._client.close()
        self.stream.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


async def test_what_comes_with_the_end_of_the_connection_is_given_before_it(server: Server) -> None:
    server.socket.sendall(ROW + ROW)
    server.socket.shutdown(socket.SHUT_WR)

    assert await server.stream.read() == ROW + ROW
    with pytest.raises(errors.PostgresUnavailable):
        await server.stream.read()


async def test_the_servers_last_words_are_heard_though_it_has_gone(server: Server) -> None:
    server.socket.sendall(ROW + LAST_WORDS)
    server.socket.shutdown(socket.SHUT_WR)

    assert await server.stream.read() == ROW
    with pytest.raises(psycopg.errors.AdminShutdown, match="administrator command"):
        await server.stream.read()


async def test_the_servers_last_words_are_heard_though_it_hung_up_on_us() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    connection: Any = SimpleNamespace(socket=client.fileno())
    stream = _Socket(connection)
    peer.sendall(ROW + LAST_WORDS)
    client.send(b"never read")
    peer.close()  # a reset, since not all was read

    try:
        for _ in range(3):
            stream.send(b"r" * 33)
        assert await stream.read() == ROW
        with pytest.raises(psycopg.errors.AdminShutdown):
            await stream.read()
    finally:
        stream.close()
        client.close()
        listener.close()


@pytest.mark.parametrize("size", [1, 4, 5, 20, len(ROW) - 1])
async def test_a_read_that_is_cancelled_loses_nothing(server: Server, size: int) -> None:
    server.socket.sendall(ROW[:size])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.stream.read(), 0.05)

    server.socket.sendall(ROW[size:])

    assert await server.stream.read() == ROW


async def test_what_the_server_did_not_take_goes_with_the_next_and_with_the_end(server: Server) -> None:
    server.stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    while not server.stream._unsent:
        server.stream.send(b"r" * 33)
        sent += 1
    server.stream.end()
    server.socket.setblocking(False)

    async def answer() -> bytes:
        seen = b""
        while not seen.endswith(b"c\0\0\0\x04"):
            try:
                seen += server.socket.recv(1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0.001)
        server.socket.sendall(b"c\0\0\0\x04")
        return seen

    answering = asyncio.create_task(answer())
    assert await asyncio.wait_for(server.stream.read(), 10) == b""
    assert (await answering).count(b"r" * 33) == sent


async def test_a_busy_stream_is_left_alone_no_longer_than_a_unix_socket_holds_what_comes(server: Server) -> None:
    # More than what ends a nap; a Unix socket has no room for the tenth part of a long one's.
    busy = ROW * (20_000 // len(ROW))
    server.stream._nap = replication.NAP_SECONDS
    naps = []
    for _ in range(10):
        server.socket.sendall(busy)
        await server.stream.read()
        naps.append(server.stream._nap)

    assert max(naps) == replication.LONGEST_NAP_ON_UNIX_SECONDS


async def test_a_nap_ends_where_the_buffer_runs_full_meanwhile() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    connection: Any = SimpleNamespace(socket=client.fileno())
    stream = _Socket(connection)
    stream._nap = replication.LONGEST_NAP_SECONDS
    much = ROW * (3 * replication.BYTES_A_READ // len(ROW))
    sending = asyncio.create_task(asyncio.to_thread(peer.sendall, much))

    try:
        got = 0
        naps = []
        while got < len(much):
            got += len(await stream.read())
            naps.append(stream._nap)
        await sending
        assert min(naps) < replication.LONGEST_NAP_SECONDS
    finally:
        for each in (stream, client, peer, listener):
            each.close()


def wide(tag: bytes) -> bytes:
    """A row of 4 MB in XLogData."""
    body = b"w" + b"\1" * 24 + tag + struct.pack(">I", 16384) + b"N" + b"x" * (4 << 20)
    return b"d" + struct.pack(">I", 4 + len(body)) + body


async def test_a_row_that_is_too_large_is_not_held_and_only_its_table_is_known(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "MOST_BYTES", 1 << 20)
    sending = asyncio.create_task(
        asyncio.to_thread(server.socket.sendall, ROW + wide(b"U") + ROW + wide(b"M") + ROW + ROW)
    )
    most = 0
    read = b""
    while len(read) < 4 * len(ROW) + 40:
        read += await server.stream.read()
        most = max(most, len(server.stream._rest))
    await sending

    stands = b"w" + b"\1" * 24 + pgoutput.WIDE + b"U" + struct.pack(">I", 16384) + b"Nxxx"
    assert read == ROW + b"d" + struct.pack(">I", 4 + len(stands)) + stands + ROW + ROW + ROW
    assert most <= 2 * replication.BYTES_A_READ
