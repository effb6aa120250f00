"""Searches that are cut off: by a restart, by a lost Redis, by one that comes back without the last busts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import redis
from running import RunningDaemon, confirmed, eventually, execute, settled, wal_position, watermark
from writing import assert_nothing_confirmed_too_early, create, invisible_commits

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}:*", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
"""
# With these, a pass takes some four seconds at 1,000 keys a second.
STRANGERS = 2000
SLOW = {"sweep_rate": "1000"}


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with Valkey(settings={"enable-debug-command": "yes"}) as valkey:
        yield valkey


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
def searching(
    database: str, valkey: Valkey, client: redis.Redis, rules: Path, slot_name: str
) -> Iterator[RunningDaemon]:
    """A daemon in the middle of a search for ``t:thing:1:``."""
    create(database)
    with RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name, **SLOW) as daemon:
        daemon.ready()
        settled(database, client, slot_name)
        client.execute_command("DEBUG", "POPULATE", STRANGERS, "stranger", 1)  # type: ignore[no-untyped-call]
        client.mset({"t:thing:1:a": "old", "t:thing:2:a": "other"})
        execute(database, "INSERT INTO things VALUES (1, 'new')")
        eventually(lambda: daemon.metric("cdc_invalidator_search_prefixes") == 1, "the search has begun")
        yield daemon


def test_a_daemon_that_is_killed_in_a_search_begins_it_again(
    searching: RunningDaemon, database: str, client: redis.Redis, slot_name: str
) -> None:
    position = wal_position(database)
    searching.kill()
    assert confirmed(database, slot_name) < position
    assert int(watermark(client, slot_name)[b"lsn"]) < position
    # Stored by a reader that had loaded before the commit.
    client.set("t:thing:1:b", "old")
    searching.start().ready()
    settled(database, client, slot_name)
    assert client.exists("t:thing:1:a", "t:thing:1:b") == 0
    assert client.exists("t:thing:2:a")
    assert_nothing_confirmed_too_early(database, client, slot_name)


def test_a_search_begins_again_on_a_new_connection_with_what_waited_for_it(
    searching: RunningDaemon, database: str, client: redis.Redis, slot_name: str
) -> None:
    client.set("t:thing:3:a", "old")
    execute(database, "INSERT INTO things VALUES (3, 'new')")
    eventually(lambda: searching.metric("cdc_invalidator_search_prefixes") == 2, "another one waits behind it")
    position = wal_position(database)
    connects = searching.metric("cdc_invalidator_redis_connects_total")
    client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: searching.metric("cdc_invalidator_redis_connects_total") > connects, "a new connection")
    assert confirmed(database, slot_name) < position
    assert int(watermark(client, slot_name)[b"lsn"]) < position
    settled(database, client, slot_name)
    assert client.exists("t:thing:1:a", "t:thing:3:a") == 0
    assert client.exists("t:thing:2:a"), "nothing is swept for what still ran"
    assert len(searching.named("bust", action="search")) == 1, "what waited has joined it"
    assert searching.named("bust", action="search")[0]["transactions"] == 2
    assert_nothing_confirmed_too_early(database, client, slot_name)


def test_a_redis_that_comes_back_without_the_search_is_swept(
    database: str, valkey: Valkey, client: redis.Redis, rules: Path, slot_name: str
) -> None:
    create(database)
    with RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, client, slot_name)
        before = client.hgetall(f"cdc:{slot_name}:watermark")
        execute(database, "INSERT INTO things VALUES (1, 'new')")
        settled(database, client, slot_name)
        # As after a failover to a replica that lagged: the key is back, and the watermark is the one before.
        with client.pipeline() as pipeline:
            pipeline.set("t:thing:1:a", "old")
            pipeline.hset(f"cdc:{slot_name}:watermark", mapping=before)  # type: ignore[arg-type]
            pipeline.execute()
        client.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: not client.exists("t:thing:1:a"), "it is busted again")
        settled(database, client, slot_name)
        assert_nothing_confirmed_too_early(database, client, slot_name)


def test_a_commit_that_readers_cannot_see_yet_is_searched_for_when_they_see_it(
    redis_url: str, redis_client: redis.Redis, rules: Path
) -> None:
    with Postgres() as postgres:
        create(postgres.dsn)
        with RunningDaemon(dsn=postgres.dsn, redis_url=redis_url, rules=rules, slot="early") as daemon:
            daemon.ready()
            settled(postgres.dsn, redis_client, "early")
            with invisible_commits(postgres.dsn):
                writer = threading.Thread(target=execute, args=[postgres.dsn, "INSERT INTO things VALUES (1, 'new')"])
                writer.start()
                eventually(lambda: daemon.metric("cdc_invalidator_changes_total", op="insert"), "it is received")
                position = wal_position(postgres.dsn)
                # A reader loads what it can see, which is the old row, and caches it.
                redis_client.set("t:thing:1:a", "old")
                assert writer.is_alive()
                assert int(watermark(redis_client, "early")[b"lsn"]) < position
            writer.join()
            settled(postgres.dsn, redis_client, "early")
            assert not redis_client.exists("t:thing:1:a")
