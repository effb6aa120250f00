"""Busts by hand: through PostgreSQL's WAL, in order with the writes, and recorded like them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, ClassVar

import psycopg
import pytest
import reading
import redis
from paths import ROOT
from running import RunningDaemon, command, eventually, execute, settled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  list: {key: "t:list:{owner}:v{version}", version: "t:list:{owner}:ver", ttl: 5m}
  front: {key: "t:front", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""


@pytest.fixture
def daemon(
    database: str, redis_url: str, redis_client: redis.Redis, rules: Path, slot_name: str
) -> Iterator[RunningDaemon]:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY)")
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as running:
        running.ready()
        settled(database, redis_client, slot_name)
        for key in ("t:user:1", "t:user:2", "t:list:ä 1:ver", "t:list:2:ver", "t:front"):
            redis_client.set(key, 1)
        yield running


def emit(connection: psycopg.Connection[object], order: object, *, transactional: bool = True) -> None:
    content = order if isinstance(order, str) else json.dumps(order)
    connection.execute("SELECT pg_logical_emit_message(%s, 'cdc_invalidator', %s)", [transactional, content])


def test_a_message_busts_at_its_commit_with_the_writes_of_its_transaction(
    daemon: RunningDaemon, database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO users VALUES (2)")
        emit(connection, {"cache": "user", "params": {"id": 1}})
        emit(connection, {"cache": "list", "params": {"owner": "ä 1"}})
        settled(database, redis_client, slot_name)
        assert redis_client.exists("t:user:1")
        connection.commit()
    settled(database, redis_client, slot_name)
    assert redis_client.keys("t:user:*") == []
    assert redis_client.get("t:list:ä 1:ver") != b"1"
    assert redis_client.get("t:list:2:ver") == b"1"
    event = daemon.seen("bust", reason="manual", cache="user")
    assert event["op"] == "message"
    assert event["rule"] is None
    assert event["existed"] == 1
    assert event["xid"] == daemon.seen("bust", reason="change")["xid"]


def test_a_message_of_a_rolled_back_transaction_busts_nothing_and_one_outside_of_any_busts_at_once(
    daemon: RunningDaemon, database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(database) as connection:
        emit(connection, {"cache": "user", "params": {"id": 1}})
        emit(connection, {"cache": "user", "params": {"id": "2"}}, transactional=False)
        connection.rollback()
    settled(database, redis_client, slot_name)
    assert redis_client.keys("t:user:*") == [b"t:user:1"]


def test_without_parameters_the_whole_cache_goes(
    daemon: RunningDaemon, database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        emit(connection, {"cache": "user"})
        emit(connection, {"cache": "front"}, transactional=False)
        emit(connection, {"cache": "list"}, transactional=False)
    settled(database, redis_client, slot_name)
    assert redis_client.keys("t:user:*") == []
    assert not redis_client.exists("t:front")
    assert b"1" not in redis_client.mget("t:list:ä 1:ver", "t:list:2:ver")
    assert daemon.seen("bust", reason="manual", cache="user")["action"] == "sweep"


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object"),
        ({"params": {}}, "must be an object"),
        ({"cache": "usr"}, "which the rules do not have"),
        ({"cache": "user", "params": {"uid": 1}}, "just its parameters: id"),
        ({"cache": "user", "params": {"id": None}}, "neither text nor integer"),
        ({"cache": "user", "params": {"id": 1.5}}, "neither text nor integer"),
        ({"cache": "user", "params": [1]}, "just its parameters: id"),
        ({"cache": "user", "parms": {"id": 1}}, "must be an object"),
    ],
)
def test_a_malformed_message_is_reported_and_skipped(
    daemon: RunningDaemon, database: str, redis_client: redis.Redis, slot_name: str, order: object, sentence: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        emit(connection, order)
        connection.execute("SELECT pg_logical_emit_message(true, 'somebody else', '{')")
        emit(connection, {"cache": "user", "params": {"id": 1}})
    settled(database, redis_client, slot_name)
    assert redis_client.keys("t:user:*") == [b"t:user:2"]
    (skipped,) = daemon.named("manual_bust_skipped")
    assert sentence in skipped["error"]
    assert daemon.alive()


def test_the_bust_command_writes_the_message_and_refuses_what_no_cache_fits(
    daemon: RunningDaemon, database: str, redis_client: redis.Redis, rules: Path, slot_name: str
) -> None:
    given = {"postgres_dsn": database, "rules": rules}
    done = command("bust", "user", "id=1", **given)
    assert done.returncode == 0, done.stderr
    assert "written at " in done.stdout
    assert command("bust", "front", **given).returncode == 0
    settled(database, redis_client, slot_name)
    assert redis_client.keys("t:user:*") == [b"t:user:2"]
    assert not redis_client.exists("t:front")
    for words in (["usr"], ["user", "uid=1"], ["user", "id"]):
        refused = command("bust", *words, **given)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr


class Unwatchful(RunningDaemon):
    """It does not look at the catalogs while a test runs."""

    deadlines: ClassVar[Mapping[str, float]] = {"watch.WATCH_SECONDS": 3600.0}


def test_a_migration_that_busts_its_caches_leaves_nothing_stale_before_anybody_looks_at_the_tables(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    guide = (ROOT / "deploy/README.md").read_text()
    (remedy,) = re.findall(r"^SELECT pg_logical_emit_message.*;$", guide, re.MULTILINE)
    order = remedy.replace(', "params": {"id": 42}', "")
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        Unwatchful(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon,
        reading.Application(database, lambda: redis.Redis.from_url(redis_url), writers=1, readers=4) as app,
    ):
        daemon.ready()
        settled(database, redis_client, slot_name)
        eventually(lambda: reading.entries(redis_client) > reading.ROWS / 2, "readers have filled the cache")
        daemon.events.clear()
        with psycopg.connect(database) as connection:
            # Of the same shape, so that nothing in the stream tells of it.
            connection.execute("ALTER TABLE counters ALTER n TYPE int USING n + 1000000")
            for cache in ("count", "page"):
                connection.execute(order.replace('"user"', f'"{cache}"').encode())
        app.stop_writing()
        settled(database, redis_client, slot_name)
        assert reading.stale(database, redis_client) == {}
        app.stop()
        assert reading.stale(database, redis_client) == {}
        assert {event["cache"] for event in daemon.named("bust", action="sweep", reason="manual")} == {"count", "page"}
        assert not daemon.named("gap"), "nothing else has swept"
