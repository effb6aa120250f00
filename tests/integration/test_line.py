"""The whole line on real servers: a committed change busts the right keys, and the position follows."""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import RunningDaemon, confirmed, eventually, execute, settled, wal_position, watermark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

RULES = """
version: 1
caches:
  user:
    key: "t:${APP_ENV:-test}:user:{id}"
    ttl: 5m
  orders-of-user:
    key: "t:${APP_ENV:-test}:user:{id}:orders"
    ttl: 5m
  dashboard:
    key: "t:${APP_ENV:-test}:user:{id}:dash:v{version}"
    version: "t:${APP_ENV:-test}:user:{id}:dash:ver"
    version_ttl: 1h
    ttl: 5m
  catalog:
    key: "t:${APP_ENV:-test}:catalog:{page}:v{version}"
    version: "t:${APP_ENV:-test}:catalog:ver"
    ttl: 5m
  front-page:
    key: "t:${APP_ENV:-test}:front"
    ttl: 5m
rules:
  - name: user-changed
    table: public.users
    columns: [name, email]
    bust: [user, dashboard]
  - name: order-changed
    table: public.orders
    bust:
      - orders-of-user: {id: user_id}
      - dashboard: {id: user_id}
  - name: product-changed
    table: public.products
    bust: [catalog, front-page]
"""

SCHEMA = [
    "CREATE TABLE users (id bigint PRIMARY KEY, name text, email text, seen timestamptz)",
    "ALTER TABLE users REPLICA IDENTITY FULL",
    "CREATE TABLE orders (id bigint PRIMARY KEY, user_id bigint, total numeric)",
    "ALTER TABLE orders REPLICA IDENTITY FULL",
    "CREATE TABLE products (id bigint PRIMARY KEY, name text)",
    "INSERT INTO users SELECT n, 'user ' || n, n || '@example.org' FROM generate_series(1, 50) n",
    "INSERT INTO orders SELECT n, 1 + n % 50, n FROM generate_series(1, 100) n",
    "INSERT INTO products SELECT n, 'product ' || n FROM generate_series(1, 10) n",
]


@pytest.fixture
def shop(database: str) -> str:
    execute(database, *SCHEMA)
    return database


@pytest.fixture
def daemon(shop: str, redis_url: str, rules: Path, slot_name: str) -> Iterator[RunningDaemon]:
    with RunningDaemon(dsn=shop, redis_url=redis_url, rules=rules, slot=slot_name) as running:
        yield running.ready()


def fill(client: redis.Redis, *keys: str) -> None:
    for key in keys:
        client.set(key, "cached")


def left(client: redis.Redis) -> set[str]:
    return {key.decode() for key in client.keys("t:*")}  # type: ignore[union-attr]


def test_an_update_deletes_the_key_and_the_lock_and_nothing_else(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:1", "t:test:user:1\0lock", "t:test:user:2", "t:test:user:2\0lock")
    execute(shop, "UPDATE users SET name = 'Grace' WHERE id = 1")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:2", "t:test:user:2\0lock"}
    event = daemon.seen("bust", cache="user", reason="change")
    assert event["rule"] == "user-changed"
    assert event["action"] == "delete"
    assert event["table"] == "public.users"
    assert event["op"] == "update"
    assert event["keys"] == 1
    assert event["existed"] == 1
    assert event["key_prefix"] == "t:test:user:"
    assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", event["lsn"])
    assert event["xid"] > 0
    assert event["lag_ms"] > 0
    assert "raw_keys" not in event
    assert len(event["key_hashes"]) == 1


def test_an_update_of_other_columns_busts_nothing(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:1")
    execute(shop, "UPDATE users SET seen = now() WHERE id = 1")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:1"}
    assert not daemon.named("bust", reason="change")


def test_a_row_that_moves_busts_its_old_and_its_new_owner(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, *(f"t:test:user:{n}:orders" for n in (7, 8, 9)))
    execute(shop, "UPDATE orders SET user_id = 7 WHERE id = 1", "UPDATE orders SET user_id = 9 WHERE id = 1")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:8:orders"}


def test_a_changed_primary_key_busts_both_keys(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:3", "t:test:user:4", "t:test:user:1003")
    execute(shop, "UPDATE users SET id = 1003 WHERE id = 3")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:4"}


def test_inserts_and_deletes_bust(daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:5", "t:test:user:500", "t:test:front")
    execute(shop, "DELETE FROM users WHERE id = 5", "INSERT INTO users VALUES (500, 'new', 'e')")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:front"}


def test_a_version_is_bumped_past_the_time_and_a_missing_one_is_left_missing(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    future = int(time.time() * 1_000_000) + 3_600_000_000
    redis_client.set("t:test:user:1:dash:ver", 5)
    redis_client.set("t:test:user:2:dash:ver", future)
    before = int(time.time() * 1_000_000) - 60_000_000
    execute(shop, "UPDATE users SET name = 'x' WHERE id IN (1, 2, 3)")
    settled(shop, redis_client, slot_name)
    bumped: Any = redis_client.get("t:test:user:1:dash:ver")
    assert int(bumped) > before
    ahead: Any = redis_client.get("t:test:user:2:dash:ver")
    assert int(ahead) > future
    assert redis_client.get("t:test:user:3:dash:ver") is None
    ttl: Any = redis_client.pttl("t:test:user:1:dash:ver")
    assert 0 < ttl <= 3_600_000
    event = daemon.seen("bust", cache="dashboard", reason="change")
    assert event["action"] == "bump"
    assert event["keys"] == 3
    assert event["existed"] == 2
    assert len(event["versions"]) == 3


def test_caches_without_parameters_are_busted_by_any_change(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:front")
    redis_client.set("t:test:catalog:ver", 1)
    execute(shop, "UPDATE products SET name = 'x' WHERE id < 4")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:catalog:ver"}
    version: Any = redis_client.get("t:test:catalog:ver")
    assert int(version) > 1
    assert daemon.seen("bust", cache="front-page", reason="change")["keys"] == 1


def test_truncate_sweeps_the_caches_of_the_table(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, *(f"t:test:user:{n}:orders" for n in range(3000)), "t:test:user:7", "t:test:front")
    fill(redis_client, *(f"t:test:user:{n}:orders\0lock" for n in range(10)))
    redis_client.set("t:test:user:7:dash:ver", 1)
    execute(shop, "TRUNCATE orders")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:7", "t:test:front", "t:test:user:7:dash:ver"}
    version: Any = redis_client.get("t:test:user:7:dash:ver")
    assert int(version) > 1
    event = daemon.seen("bust", cache="orders-of-user", action="sweep", reason="truncate")
    assert event["existed"] == 3000
    assert event["op"] == "truncate"


def test_a_rolled_back_transaction_busts_nothing(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:1", "t:test:user:2")
    with psycopg.connect(shop) as connection:
        connection.execute("UPDATE users SET name = 'never' WHERE id = 1")
        connection.rollback()
        with connection.transaction():
            connection.execute("SAVEPOINT s")
            connection.execute("UPDATE users SET name = 'never' WHERE id = 1")
            connection.execute("ROLLBACK TO s")
            connection.execute("UPDATE users SET name = 'kept' WHERE id = 2")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:1"}


def test_a_large_transaction_busts_every_key(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    execute(shop, "INSERT INTO users SELECT n, 'x' FROM generate_series(1000, 26000) n")
    settled(shop, redis_client, slot_name)
    fill(redis_client, *(f"t:test:user:{n}" for n in range(1000, 26000)), "t:test:user:99")
    execute(shop, "UPDATE users SET name = 'y' WHERE id >= 1000")
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {"t:test:user:99"}

    def busts() -> list[dict[str, Any]]:
        return daemon.named("bust", cache="user", op="update", reason="change")

    eventually(lambda: sum(line["existed"] for line in busts()) == 25_000, "all events are written")
    assert max(line["keys"] for line in busts()) <= 1000


def test_partitions_bust_by_the_rule_of_their_root(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(
        database,
        "CREATE TABLE events (tenant int, id int, body text, PRIMARY KEY (tenant, id)) PARTITION BY LIST (tenant)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1)",
    )
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: 1\ncaches:\n  event: {key: 't:test:event:{tenant}:{id}', ttl: 1m}\n"
        "rules:\n  - {name: event-changed, table: public.events, bust: [event]}\n"
    )
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        execute(
            database,
            "CREATE TABLE events_2 PARTITION OF events FOR VALUES IN (2)",
            "INSERT INTO events VALUES (2, 9, 'what has the new partition looked at')",
        )
        # It might have been attached with rows in it: the cache is swept.
        settled(database, redis_client, slot_name)
        fill(redis_client, "t:test:event:1:1", "t:test:event:2:1", "t:test:event:3:1")
        execute(database, "INSERT INTO events VALUES (1, 1, 'a'), (2, 1, 'b')")
        settled(database, redis_client, slot_name)
        assert left(redis_client) == {"t:test:event:3:1"}
        fill(redis_client, "t:test:event:2:7")
        execute(database, "TRUNCATE events_2")
        settled(database, redis_client, slot_name)
        assert left(redis_client) == set()


def test_the_slot_of_an_idle_database_moves_on(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    # WAL that is none of ours: another database of the same server, and a table without rules.
    execute(shop, "CREATE TABLE noise (x int)", "INSERT INTO noise SELECT generate_series(1, 1000)")
    position = wal_position(shop)
    eventually(lambda: confirmed(shop, slot_name) >= position, "the slot has moved past WAL that no rule reads")
    fields = watermark(redis_client, slot_name)
    # Since when all is in (as_of) is known a little later, once the position has passed an end of the WAL.
    position_of = {b"lsn", b"at", b"system_id", b"timeline", b"rules", b"crash_free_since"}
    assert set(fields) - {b"as_of"} == position_of | {b"agreed", b"templates", b"types", b"settings"}
    first = int(fields[b"at"])
    eventually(lambda: int(watermark(redis_client, slot_name)[b"at"]) > first, "the watermark's time moves")


def test_sigterm_drains_confirms_and_exits_0(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, *(f"t:test:user:{n}" for n in range(1, 51)))
    execute(shop, "UPDATE users SET name = name || '!'")
    settled(shop, redis_client, slot_name)
    position = wal_position(shop)
    started = time.monotonic()
    assert daemon.terminate() == 0
    assert time.monotonic() - started < 10
    assert daemon.named("stopped")
    assert not daemon.errors
    assert confirmed(shop, slot_name) >= position - 200_000
    assert left(redis_client) == set()


def test_a_daemon_that_was_killed_applies_what_it_missed(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    daemon.kill()
    fill(redis_client, *(f"t:test:user:{n}" for n in range(1, 51)))
    execute(shop, "UPDATE users SET name = 'while away' WHERE id <= 25", "DELETE FROM users WHERE id = 26")
    daemon.start().ready()
    settled(shop, redis_client, slot_name)
    assert left(redis_client) == {f"t:test:user:{n}" for n in range(27, 51)}


def test_the_pages_tell_what_the_daemon_does(
    daemon: RunningDaemon, shop: str, redis_client: redis.Redis, slot_name: str
) -> None:
    settled(shop, redis_client, slot_name)
    fill(redis_client, "t:test:user:1")
    execute(shop, "UPDATE users SET name = 'x' WHERE id IN (1, 2)")
    settled(shop, redis_client, slot_name)
    assert daemon.get("/livez") == (200, "ok\n")
    assert daemon.get("/readyz") == (200, "ok\n")
    assert daemon.get("/nothing")[0] == 404
    status = daemon.status()
    assert status["role"] == "leader"
    assert status["slot"] == slot_name
    assert status["last_error"] is None
    labels = {"rule": "user-changed", "cache": "user", "action": "delete"}
    assert daemon.metric("cdc_invalidator_busts_total", **labels) == 1
    assert daemon.metric("cdc_invalidator_busted_keys_total", **labels) == 2
    assert daemon.metric("cdc_invalidator_busted_keys_existed_total", **labels) == 1
    assert daemon.metric("cdc_invalidator_changes_total", table="public.users", op="update") == 2
    assert daemon.metric("cdc_invalidator_commit_to_bust_seconds_count", cache="user") == 1
    assert daemon.metric("cdc_invalidator_leader") == 1
    assert daemon.metric("cdc_invalidator_watermark_lsn") > 0
    assert daemon.metric("cdc_invalidator_gaps_total", reason="new_slot") == 1


def test_a_second_daemon_stands_by_and_takes_over(
    daemon: RunningDaemon, shop: str, redis_url: str, redis_client: redis.Redis, rules: Path, slot_name: str
) -> None:
    with RunningDaemon(dsn=shop, redis_url=redis_url, rules=rules, slot=slot_name) as second:
        second.ready()
        assert second.status()["role"] == "standby"
        daemon.send(signal.SIGTERM)
        eventually(lambda: second.status().get("role") == "leader", "the second daemon leads")
        assert daemon.wait() == 0
        fill(redis_client, "t:test:user:1")
        execute(shop, "UPDATE users SET name = 'z' WHERE id = 1")
        settled(shop, redis_client, slot_name)
        assert left(redis_client) == set()
        assert not second.named("gap")
