"""What becomes of the daemon when nobody reads what it tells."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import nursery
import psycopg
import pytest
import redis
from running import SECONDS, RunningDaemon, confirmed, eventually, execute, settled, wal_position

from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
# So much may be unwritten: an eighth of what is usual, so that an eighth of the rows will do.
LITTLE = {"log.UNWRITTEN": 1 << 20}


@pytest.fixture
def daemon(
    request: pytest.FixtureRequest, database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> Iterator[nursery.Forked]:
    """A daemon whose output stands in a pipe that nobody reads yet.

    A parameter has further settings, and its deadlines that are other than usual.
    """
    settings, deadlines = getattr(request, "param", ({}, {}))
    execute(database, "CREATE TABLE users (id int PRIMARY KEY)")
    (tmp_path / "rules.yaml").write_text(RULES)
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")} | {
        "CDC_POSTGRES_DSN": database,
        "CDC_REDIS_URL": redis_url,
        "CDC_RULES": str(tmp_path),
        "CDC_SLOT": slot_name,
        "CDC_PUBLICATION": slot_name,
        "CDC_HTTP_PORT": str(port),
        **{f"CDC_{name.upper()}": value for name, value in settings.items()},
    }
    assert nursery.can_fork(env)
    with nursery.Forked(["run"], env, deadlines) as process:
        process.port = port  # type: ignore[attr-defined]
        try:
            eventually(lambda: page(process, "/readyz") == 200, "the daemon is ready")
            yield process
        finally:
            process.kill()


def page(process: nursery.Forked, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{process.port}{path}", timeout=2) as answer:  # type: ignore[attr-defined]
            status: int = answer.status
            return status
    except OSError:
        return 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("daemon", [({}, {"log.MOST_WAIT_SECONDS": 60.0, **LITTLE})], indirect=True)
def test_a_reader_that_dawdles_holds_up_the_busts_and_nothing_else_and_misses_none(
    daemon: nursery.Forked, database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(database, redis_client, slot_name)
    count = 100_000
    for start in range(0, count, 25_000):
        execute(database, f"INSERT INTO users SELECT generate_series({start + 1}, {start + 25_000})")
    with pytest.raises(AssertionError, match="the watermark passes"):
        # 1 MiB of hashes is unwritten then, and as much is to come.
        settled_soon(database, redis_client, slot_name)
    assert page(daemon, "/livez") == 200
    told: list[dict[str, Any]] = []
    while sum(event["keys"] for event in told) < count:
        event = json.loads(daemon.stdout.readline())
        if event["event"] == "bust" and event["reason"] == "change":
            told.append(event)
    assert sum(event["keys"] for event in told) == count
    settled(database, redis_client, slot_name)


def settled_soon(dsn: str, client: redis.Redis, slot: str) -> None:
    from running import wal_position, watermark

    position = wal_position(dsn)
    passed = lambda: int(watermark(client, slot)[b"lsn"]) >= position  # noqa: E731
    eventually(passed, "the watermark passes the last commit", seconds=3)


def told(lines: Iterable[str]) -> set[str]:
    """The keys whose busts are in the output; its last line may be cut."""
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return {key for event in events if event["event"] == "bust" for key in event.get("raw_keys", ())}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("daemon", [({"log_keys": "raw"}, {})], indirect=True)
def test_what_nobody_has_read_is_not_confirmed_and_told_by_the_next_daemon(
    daemon: nursery.Forked,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
    tmp_path: Path,
    how: signal.Signals,
) -> None:
    count = 2000
    with psycopg.connect(database, autocommit=True) as connection:
        for number in range(count):
            connection.execute("INSERT INTO users VALUES (%s)", [number])
    settled(database, redis_client, slot_name)
    # Long enough for a confirmation, which comes every second.
    time.sleep(1.5)
    daemon.send_signal(how)
    daemon.wait(SECONDS)
    output, _ = daemon.communicate(SECONDS)
    before = told(output.splitlines(keepends=True))
    assert len(before) < count
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=tmp_path, slot=slot_name, log_keys="raw") as following:
        following.ready()
        settled(database, redis_client, slot_name)
        eventually(
            lambda: (
                len(before | {key for event in following.named("bust") for key in event.get("raw_keys", ())}) == count
            ),
            "each bust is told",
        )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("daemon", [({"log_keys": "raw"}, LITTLE)], indirect=True)
def test_while_nobody_reads_at_all_busts_go_on_and_are_told_when_somebody_does(
    daemon: nursery.Forked, database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    count = 100_000
    began = datetime.now(UTC)
    for start in range(0, count, 25_000):
        execute(database, f"INSERT INTO users SELECT generate_series({start + 1}, {start + 25_000})")
    redis_client.set("t:user:0", "cached")
    execute(database, "INSERT INTO users VALUES (0)")
    eventually(lambda: not redis_client.exists("t:user:0"), "busts go on, after some seconds", 60)
    settled(database, redis_client, slot_name)
    assert "standard output" in (status(daemon)["last_error"] or "").lower()
    assert datetime.fromisoformat(status(daemon)["last_error_since"]) > began
    assert page(daemon, "/readyz") == 200
    assert confirmed(database, slot_name) < wal_position(database)
    assert page(daemon, "/livez") == 200
    rows: set[str] = set()
    while len(rows) < count + 1:
        rows |= told([daemon.stdout.readline()])
    position = wal_position(database)
    reading = threading.Thread(target=lambda: [None for _ in daemon.stdout])
    reading.start()
    eventually(lambda: confirmed(database, slot_name) >= position, "all of it is confirmed then")
    assert status(daemon)["last_error"] is None
    daemon.kill()
    reading.join()


def status(process: nursery.Forked) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{process.port}/status", timeout=5) as answer:  # type: ignore[attr-defined]
        found: dict[str, Any] = json.load(answer)
        return found


def test_a_reader_that_is_gone_ends_the_daemon_with_a_word(daemon: nursery.Forked, database: str) -> None:
    daemon.stdout.close()
    execute(database, "INSERT INTO users VALUES (1)")
    assert daemon.wait(SECONDS) == 1
    assert daemon.stderr.read().startswith("Standard output was closed")


def test_without_standard_output_the_daemon_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    command = (
        f'exec "{sys.executable}" -m cdc_invalidator run --postgres-dsn host=/nowhere --redis-url redis://127.0.0.1:1'
        f' --rules "{tmp_path}" >&-'
    )
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Standard output is closed")


@pytest.mark.parametrize(("form", "lines"), [("json", 1), ("console", 0)])
def test_why_the_daemon_ends_is_a_line_of_its_log_too(form: str, lines: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cdc_invalidator", "run", "--postgres-dsn", "host=/nowhere", "--redis-url", "x"]
    command += ["--rules", str(tmp_path), "--log-format", form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    shown = done.stdout.splitlines()
    assert len(shown) == lines
    for line in map(json.loads, shown):
        assert (line["event"], line["level"], line["exit_code"]) == ("exit", "error", 2)
        assert line["error"] == done.stderr.strip()


def test_a_daemon_that_ends_does_not_wait_for_a_reader_that_is_stuck() -> None:
    ours, theirs = os.pipe()
    while select.select([], [theirs], [], 0)[1]:
        os.write(theirs, b"x" * 4096)
    command = [
        sys.executable,
        "-m",
        "cdc_invalidator",
        "run",
        "--postgres-dsn",
        "x",
        "--redis-url",
        "x",
        "--rules",
        "x",
    ]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    os.close(ours)
    os.close(theirs)
