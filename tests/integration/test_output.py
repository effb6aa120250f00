"""What becomes of the daemon when nobody reads what it tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import redis
from running import SECONDS, eventually, execute, settled

from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""


@pytest.fixture
def daemon(database: str, redis_url: str, tmp_path: Path, slot_name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon whose output stands in a pipe that nobody reads yet."""
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
    }
    command = [sys.executable, "-m", "cdc_invalidator", "run"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.port = port  # type: ignore[attr-defined]
    with process:
        eventually(lambda: page(process, "/readyz") == 200, "the daemon is ready")
        yield process
        if process.poll() is None:
            process.kill()
        process.communicate()


def page(process: subprocess.Popen[bytes], path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{process.port}{path}", timeout=2) as answer:  # type: ignore[attr-defined]
            status: int = answer.status
            return status
    except OSError:
        return 0


@pytest.mark.timeout(120)
def test_a_reader_that_dawdles_holds_up_the_busts_and_nothing_else_and_misses_none(
    daemon: subprocess.Popen[bytes], database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(database, redis_client, slot_name)
    count = 800_000
    for start in range(0, count, 200_000):
        execute(database, f"INSERT INTO users SELECT generate_series({start + 1}, {start + 200_000})")
    with pytest.raises(AssertionError, match="the watermark passes"):
        # 8 MB of hashes are unwritten then, and as many are to come.
        settled_soon(database, redis_client, slot_name)
    assert page(daemon, "/livez") == 200
    told: list[dict[str, Any]] = []
    assert daemon.stdout is not None
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


def test_a_reader_that_is_gone_ends_the_daemon_with_a_word(daemon: subprocess.Popen[bytes], database: str) -> None:
    assert daemon.stdout is not None
    assert daemon.stderr is not None
    daemon.stdout.close()
    execute(database, "INSERT INTO users VALUES (1)")
    assert daemon.wait(SECONDS) == 1
    assert daemon.stderr.read().decode().startswith("Standard output was closed")
    daemon.stdout = None


def test_without_standard_output_the_daemon_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    command = (
        f'exec "{sys.executable}" -m cdc_invalidator run --postgres-dsn host=/nowhere --redis-url redis://127.0.0.1:1'
        f' --rules "{tmp_path}" >&-'
    )
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Standard output is closed")
