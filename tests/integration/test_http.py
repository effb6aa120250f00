"""The daemon's pages over real sockets: what is served, and what no client can make of them."""

from __future__ import annotations

import errno
import json
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import redis
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from running import RunningDaemon, eventually, execute, settled

from cdc_invalidator.embedded.process import HOST, free_port
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
"""


@pytest.fixture(scope="module")
def daemon(postgres: Postgres, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """One for all of these tests; each leaves it running."""
    name = "pages"
    dsn = postgres.create_database(name)
    execute(dsn, "CREATE TABLE things (id int PRIMARY KEY)")
    rules = tmp_path_factory.mktemp(name) / "rules.yaml"
    rules.write_text(RULES)
    with RunningDaemon(dsn=dsn, redis_url=valkey.url, rules=rules, slot=name) as running:
        yield running.ready()
    postgres.drop_database(name)


def connect(daemon: RunningDaemon) -> socket.socket:
    return socket.create_connection((HOST, daemon.port), timeout=20)


def answer(daemon: RunningDaemon, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send these bytes; give status, headers and body. An answer ends the connection."""
    with connect(daemon) as client:
        client.sendall(request)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split(" ")[1]), dict(line.lower().split(": ", 1) for line in lines), body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def hung_up(client: socket.socket) -> bool:
    """Wait until the other end has closed without a word."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def lives_on(daemon: RunningDaemon) -> None:
    assert daemon.alive()
    assert daemon.get("/livez") == (200, "ok\n")
    assert not daemon.errors


@pytest.mark.parametrize(
    ("request_", "status", "start"),
    [
        (get("/livez"), 200, b"ok"),
        (get("/livez?verbose=1"), 200, b"ok"),
        (get("/readyz"), 200, b"ok"),
        (get("/metrics"), 200, b"# HELP"),
        (get("/status"), 200, b"{"),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200, b"ok"),
        (get("/"), 200, b"<!doctype html>"),
        (get("//livez"), 404, b"not found"),
        (get("/../../etc/passwd"), 404, b"not found"),
        (get("/%00%ff"), 404, b"not found"),
        (get("/livez", method="POST"), 405, b"GET only"),
        (get("/livez", method="DELETE"), 405, b"GET only"),
        (get("*", method="OPTIONS"), 405, b"GET only"),
    ],
)
def test_each_page_answers_with_its_status_and_closes_the_connection(
    daemon: RunningDaemon, request_: bytes, status: int, start: bytes
) -> None:
    code, headers, body = answer(daemon, request_)
    assert code == status
    assert body.startswith(start)
    assert int(headers["content-length"]) == len(body)
    assert headers["connection"] == "close"
    lives_on(daemon)


@pytest.mark.parametrize("path", ["/livez", "/metrics", "/status", "/nothing"])
def test_head_gives_the_head_alone(daemon: RunningDaemon, path: str) -> None:
    code, headers, body = answer(daemon, get(path, method="HEAD"))
    assert code == (404 if path == "/nothing" else 200)
    assert int(headers["content-length"]) > 0
    assert body == b""
    lives_on(daemon)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/plain"),
        ("text/plain;version=0.0.4", "text/plain"),
        ("text/html", "text/plain"),
        ("", "text/plain"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", "application/openmetrics-text"),
        ("application/openmetrics-text;version=99;escaping=nonsense", ""),
        ("text/plain;version=1.0.0;escaping=nonsense;q=zero", ""),
        (";;;,,,===;q=", ""),
        ("x" * 4000, "text/plain"),
        ("\xff\xfe", "text/plain"),
    ],
)
def test_metrics_are_served_whatever_the_client_accepts(daemon: RunningDaemon, accept: str, content_type: str) -> None:
    code, headers, body = answer(daemon, get("/metrics", f"Accept: {accept}"))
    assert code == 200
    assert headers["content-type"].startswith(content_type)
    parse = parse_openmetrics if "openmetrics" in headers["content-type"] else parse_text
    names = {family.name for family in parse(body.decode())}
    assert "cdc_invalidator_leader" in names
    lives_on(daemon)


def test_the_status_is_json_without_secrets(daemon: RunningDaemon, postgres: Postgres) -> None:
    _, headers, body = answer(daemon, get("/status"))
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["role"] == "leader"
    assert postgres.password.encode() not in body


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"nonsense\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
        bytes(range(256)) * 100,
    ],
    ids=lambda garbage: garbage[:20].decode("ascii", "replace"),
)
def test_garbage_is_answered_with_a_4xx_or_not_at_all(daemon: RunningDaemon, garbage: bytes) -> None:
    with connect(daemon) as client:
        try:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: client.recv(65536), b""))
        except OSError as problem:
            # Already hung up on: by then shutdown() may find no connection (ENOTCONN), which is no ConnectionError.
            if not isinstance(problem, ConnectionError) and problem.errno != errno.ENOTCONN:
                raise
            received = b""
    assert not received or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    lives_on(daemon)


def test_slow_clients_are_dropped_and_hold_up_nobody(daemon: RunningDaemon, postgres: Postgres, valkey: Valkey) -> None:
    dsn = postgres.dsn_for(daemon.slot)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(daemon)) for _ in range(50)]
        half = stack.enter_context(connect(daemon))
        half.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        # Takes nothing of its answer.
        greedy = [stack.enter_context(connect(daemon)) for _ in range(20)]
        for client in greedy:
            client.sendall(get("/metrics"))
        with redis.Redis.from_url(valkey.url) as client_of_redis:
            settled(dsn, client_of_redis, daemon.slot)
            client_of_redis.set("t:thing:1", "cached")
            execute(dsn, "INSERT INTO things VALUES (1)")
            settled(dsn, client_of_redis, daemon.slot)
            assert not client_of_redis.exists("t:thing:1")
        lives_on(daemon)
        began = time.monotonic()
        for client in [*silent, half]:
            assert hung_up(client)
        assert time.monotonic() - began < 20
    lives_on(daemon)


def test_clients_that_hang_up_in_the_middle_leave_nothing(daemon: RunningDaemon) -> None:
    for _ in range(100):
        with connect(daemon) as client:
            client.sendall(get("/metrics"))
    for _ in range(100):
        with connect(daemon) as client:
            client.sendall(b"GET /met")
    lives_on(daemon)


def test_sigterm_with_idle_connections_ends_at_once_without_a_traceback(daemon: RunningDaemon) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(daemon))
            stack.enter_context(connect(daemon)).sendall(b"GET /metrics HTTP/1.1\r\nHost:")
            stack.enter_context(connect(daemon)).sendall(get("/metrics"))
        lives_on(daemon)
        began = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - began < 8
    assert not daemon.errors
    assert daemon.named("stopped")
    daemon.start().ready()


def test_a_port_that_is_taken_is_refused_in_one_sentence(
    daemon: RunningDaemon, postgres: Postgres, redis_url: str, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    settings = {"dsn": postgres.dsn, "redis_url": redis_url, "slot": "second", "http_port": str(daemon.port)}
    with RunningDaemon(rules=rules, **settings) as second:
        assert second.wait() == 2
    (sentence,) = second.errors
    assert "CDC_HTTP_PORT" in sentence


def test_a_daemon_that_waits_for_postgres_is_live_and_not_ready(redis_url: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    dsn = f"postgresql://app:topsecret@127.0.0.1:{free_port()}/db"
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot="nobody") as daemon:
        eventually(lambda: daemon.alive() and daemon.get("/livez")[0] == 200, "it is live")
        daemon.seen("session_lost")
        code, why = daemon.get("/readyz")
        assert code == 503
        assert why.startswith("not ready: PostgreSQL is not available")
        status = daemon.status()
        assert status["role"] == "connecting"
        assert "CDC_POSTGRES_DSN" in status["last_error"]
        assert "topsecret" not in f"{why}{status}{daemon.events}"
        assert daemon.terminate() == 0
