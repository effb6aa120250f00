"""What crowds of clients can't make of the server: real sockets, and pages that are a line of text."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from cdc_invalidator.web import server
from cdc_invalidator.web.server import Page, Request, serve, text

HOST = "127.0.0.1"
LARGE = b"x" * 8_000_000


async def get(request: Request) -> Page:
    if request.path == "/large":
        return Page(200, "text/plain", LARGE)
    if request.path == "/mistake":
        raise ValueError("secret")
    if request.path == "/slow":
        await asyncio.sleep(60)
    return text(200, f"{request.path} {dict(request.query)} {request.accept}")


@contextmanager
def serving() -> Iterator[int]:
    with serve(get, HOST, 0) as port:
        yield port


def ask(port: int, path: str, more: bytes = b"") -> bytes:
    with socket.create_connection((HOST, port), timeout=20) as client:
        client.sendall(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_a_request_is_taken_apart() -> None:
    with serving() as port:
        answer = ask(port, "/page?key=a%20b&key=%3Cc%3E&other", b"Accept: one\r\nAccept: two\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n/page {'key': '<c>'} one, two\n")


def test_a_mistake_in_a_page_is_answered_and_names_no_value() -> None:
    with serving() as port:
        answer = ask(port, "/mistake")
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"ValueError" in answer
        assert b"secret" not in answer
        assert ask(port, "/next").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("half", [b"", b"GET /livez HTTP/1.1\r\nX: ", b"GET /livez HTTP/1.1\r\nX: " + b"a" * 15_000])
def test_more_slow_clients_than_there_is_room_for_keep_nobody_out(
    half: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 20)
    with serving() as port, ExitStack() as stack:
        for _ in range(10):
            for _ in range(30):
                client = stack.enter_context(socket.create_connection((HOST, port), timeout=20))
                client.sendall(half)
            assert ask(port, "/livez").startswith(b"HTTP/1.1 200 ")
    assert capfd.readouterr() == ("", "")


def test_clients_that_take_nothing_of_their_answers_give_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 5)
    with serving() as port, ExitStack() as stack:
        for path in ("/large", "/slow"):
            for _ in range(8):
                client = stack.enter_context(socket.create_connection((HOST, port), timeout=20))
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert ask(port, "/livez").startswith(b"HTTP/1.1 200 ")
        assert ask(port, "/large").endswith(LARGE)


def test_a_slow_client_has_its_seconds_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    with serving() as port, socket.create_connection((HOST, port), timeout=20) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        assert client.recv(1) == b""


def test_a_header_that_is_too_long_is_refused_and_the_client_gets_to_know(capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as port:
        answer = ask(port, "/livez", b"X: " + b"a" * 500_000 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.endswith(b"bad request\n")
    assert capfd.readouterr() == ("", "")


def test_few_descriptors_leave_most_of_them_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: Any = (64, 64)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    with serving() as port, ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, port), timeout=20)) for _ in range(40)]
        assert ask(port, "/livez").startswith(b"HTTP/1.1 200 ")
        for client in clients[:20]:
            # Dropped, to make room.
            assert client.recv(1) == b""


def test_it_ends_at_once_whatever_its_clients_do() -> None:
    with ExitStack() as stack:
        with serving() as port:
            for path in (b"", b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"):
                client = stack.enter_context(socket.create_connection((HOST, port), timeout=20))
                client.sendall(path)
            assert ask(port, "/livez").startswith(b"HTTP/1.1 200 ")
            began = time.monotonic()
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=20)
