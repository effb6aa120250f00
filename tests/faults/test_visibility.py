"""The stream is faster than the commit: a bust that comes before readers can see the row is applied again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import reading
import redis
from running import RunningDaemon, eventually, execute, settled, wal_position, watermark
from writing import create, invisible_commits, rules_file

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOT = "early"


@pytest.fixture
def server() -> Iterator[Postgres]:
    with Postgres() as postgres:
        yield postgres


def test_a_commit_that_waits_for_its_standby_is_busted_again_once_readers_see_it(
    server: Postgres, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    create(server.dsn)
    with RunningDaemon(dsn=server.dsn, redis_url=redis_url, rules=rules_file(tmp_path), slot=SLOT) as daemon:
        daemon.ready()
        settled(server.dsn, redis_client, SLOT)
        redis_client.set("t:thing:1", "old")
        with invisible_commits(server.dsn):
            writer = threading.Thread(target=execute, args=[server.dsn, "INSERT INTO things VALUES (1, 'new')"])
            writer.start()
            eventually(lambda: not redis_client.exists("t:thing:1"), "the bust comes at once")
            # A reader loads what it can see, which is the old row, and caches it.
            redis_client.set("t:thing:1", "old again")
            position = wal_position(server.dsn)
            assert writer.is_alive()
        writer.join()
        eventually(lambda: int(watermark(redis_client, SLOT)[b"lsn"]) >= position, "the watermark passes the commit")
        assert not redis_client.exists("t:thing:1")
        assert daemon.metric("cdc_invalidator_busted_again_total", reason="visible") >= 1


AGAIN = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m, again_after: 3s}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
"""


def test_the_time_until_the_second_bust_counts_from_when_readers_see_the_commit(
    server: Postgres, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    create(server.dsn)
    rules = reading.rules_file(tmp_path, AGAIN)
    with RunningDaemon(dsn=server.dsn, redis_url=redis_url, rules=rules, slot=SLOT) as daemon:
        daemon.ready()
        settled(server.dsn, redis_client, SLOT)
        redis_client.set("t:thing:1", "old")
        with invisible_commits(server.dsn):
            writer = threading.Thread(target=execute, args=[server.dsn, "INSERT INTO things VALUES (1, 'new')"])
            writer.start()
            eventually(lambda: not redis_client.exists("t:thing:1"), "the bust comes at once")
            busted_at = int(watermark(redis_client, SLOT)[b"at"])
            eventually(
                lambda: int(watermark(redis_client, SLOT)[b"at"]) > busted_at + 4500, "it stays invisible for longer"
            )
            position = wal_position(server.dsn)
            assert writer.is_alive()
        writer.join()
        eventually(
            lambda: daemon.metric("cdc_invalidator_busted_again_total", reason="visible") == 1, "it is busted again"
        )
        # A reader that loaded the old row at the last moment takes its time to store it.
        redis_client.set("t:thing:1", "old again")
        eventually(lambda: int(watermark(redis_client, SLOT)[b"lsn"]) >= position, "the watermark passes the commit")
        assert not redis_client.exists("t:thing:1")
