"""Large transactions: streamed while they run, held as keys, busted at their commit and at no other time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from running import RunningDaemon, eventually, execute, settled

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

RULES = """
version: 1
caches:
  item: {key: "t:item:{id}", ttl: 5m}
  group: {key: "t:group:{group_id}:v{version}", version: "t:group:{group_id}:ver", ttl: 5m}
rules:
  - {name: item-changed, table: public.items, old_row: ignore, bust: [item, group]}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that streams every transaction of more than 64 kB."""
    settings = {"logical_decoding_work_mem": "64kB", "max_prepared_transactions": "5"}
    with Postgres(settings=settings) as postgres:
        yield postgres


@pytest.fixture
def dsn(server: Postgres, slot_name: str) -> Iterator[str]:
    dsn = server.create_database(slot_name)
    execute(
        dsn,
        "CREATE TABLE items (id int PRIMARY KEY, group_id int, body text)",
        "INSERT INTO items SELECT n, n % 10, repeat('x', 100) FROM generate_series(1, 20000) n",
    )
    yield dsn
    server.drop_database(slot_name)


@pytest.fixture
def daemon(
    dsn: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> Iterator[RunningDaemon]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as running:
        running.ready()
        settled(dsn, redis_client, slot_name)
        fill(redis_client)
        yield running


def fill(client: redis.Redis) -> None:
    pipeline = client.pipeline(transaction=False)
    for number in range(1, 20001):
        pipeline.set(f"t:item:{number}", "cached")
    for number in range(10):
        pipeline.set(f"t:group:{number}:ver", 1)
    pipeline.execute()


def left(client: redis.Redis) -> set[int]:
    return {int(key.rpartition(b":")[2]) for key in client.scan_iter(match="t:item:*", count=1000)}


def streamed(dsn: str, slot: str) -> int:
    """How many transactions the walsender has streamed so far."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT stream_txns FROM pg_stat_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
    return int(row[0]) if row else 0


def test_nothing_is_busted_before_the_commit_and_everything_after_it(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE items SET body = body || '!' WHERE id <= 10000")
        settled(dsn, redis_client, slot_name)
        eventually(lambda: streamed(dsn, slot_name), "the transaction is streamed")
        execute(dsn, "UPDATE items SET body = 'small' WHERE id = 20000")
        settled(dsn, redis_client, slot_name)
        assert left(redis_client) == set(range(1, 20000))
        connection.commit()
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set(range(10001, 20000))

    def existed() -> int:
        return sum(line["existed"] for line in daemon.named("bust", cache="item", op="update"))

    eventually(lambda: existed() == 10_001, "all events are written")


def test_a_rolled_back_transaction_and_rolled_back_parts_bust_nothing(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE items SET body = body || '!' WHERE id <= 5000")
        connection.rollback()
        connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN 5001 AND 6000")
        connection.execute("SAVEPOINT outer_one")
        connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN 6001 AND 8000")
        connection.execute("SAVEPOINT inner_one")
        connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN 8001 AND 10000")
        connection.execute("RELEASE inner_one")
        connection.execute("ROLLBACK TO outer_one")
        connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN 10001 AND 12000")
        connection.execute("SAVEPOINT kept")
        connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN 12001 AND 13000")
        connection.commit()
    settled(dsn, redis_client, slot_name)
    assert streamed(dsn, slot_name)
    assert left(redis_client) == {*range(1, 5001), *range(6001, 10001), *range(13001, 20001)}
    assert daemon.alive()


def test_several_large_transactions_interleaved_each_bust_at_their_own_commit(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, psycopg.connect(dsn) as third:
        for start in range(1, 3001, 500):
            for number, connection in enumerate((first, second, third)):
                low = number * 5000 + start
                connection.execute("UPDATE items SET body = body || '!' WHERE id BETWEEN %s AND %s", [low, low + 499])
        second.commit()
        settled(dsn, redis_client, slot_name)
        assert left(redis_client) == set(range(1, 20001)) - set(range(5001, 8001))
        third.rollback()
        first.commit()
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set(range(1, 20001)) - set(range(5001, 8001)) - set(range(1, 3001))


def test_a_column_added_in_a_rolled_back_transaction_leaves_the_next_rows_readable(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("ALTER TABLE items ADD COLUMN more int DEFAULT 1")
        connection.execute("UPDATE items SET body = body || '!' WHERE id <= 5000")
        connection.rollback()
    execute(dsn, "UPDATE items SET body = 'a' WHERE id = 1")
    with psycopg.connect(dsn) as connection:
        connection.execute("ALTER TABLE items ADD COLUMN first_of_all int DEFAULT 1")
        connection.execute("ALTER TABLE items DROP COLUMN body")
        connection.execute("UPDATE items SET first_of_all = 2 WHERE id BETWEEN 2 AND 5000")
        connection.commit()
    execute(dsn, "UPDATE items SET first_of_all = 3 WHERE id = 6000")
    # A table with other columns shows other rows: its caches are swept.
    daemon.seen("gap", reason="table_changed")
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set()
    assert daemon.alive()
    assert not daemon.named("postgres_unavailable")


def test_a_prepared_transaction_busts_when_it_is_committed(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name, low in (("kept", 1), ("dropped", 10001), ("small", 19000)):
            connection.execute("BEGIN")
            high = low + (4999 if name != "small" else 0)
            connection.execute(f"UPDATE items SET body = body || '!' WHERE id BETWEEN {low} AND {high}")
            connection.execute(f"PREPARE TRANSACTION '{name}'")
        settled(dsn, redis_client, slot_name)
        assert left(redis_client) == set(range(1, 20001))
        connection.execute("COMMIT PREPARED 'kept'")
        connection.execute("ROLLBACK PREPARED 'dropped'")
        connection.execute("COMMIT PREPARED 'small'")
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set(range(5001, 20001)) - {19000}


def test_a_truncate_inside_a_streamed_transaction_sweeps_at_its_commit(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE items SET body = body || '!' WHERE id <= 5000")
        connection.execute("TRUNCATE items")
        connection.execute("INSERT INTO items SELECT n, 1, repeat('x', 100) FROM generate_series(1, 3000) n")
        connection.commit()
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set()


def test_a_daemon_killed_between_blocks_and_commit_receives_the_transaction_again(
    daemon: RunningDaemon, dsn: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE items SET body = body || '!' WHERE id <= 5000")
        settled(dsn, redis_client, slot_name)
        eventually(lambda: streamed(dsn, slot_name), "the transaction is streamed")
        daemon.kill()
        daemon.start().ready()
        connection.commit()
    settled(dsn, redis_client, slot_name)
    assert left(redis_client) == set(range(5001, 20001))
    assert not daemon.named("gap", reason="missed_changes")


# Twice that as text: more than the daemon holds.
WIDE = 20 << 20


@pytest.mark.parametrize("work_mem", ["64kB", "1GB"], ids=["streamed", "at commit"])
def test_a_row_that_is_too_large_to_be_held_sweeps_the_caches_of_its_table(
    daemon: RunningDaemon, server: Postgres, dsn: str, redis_client: redis.Redis, work_mem: str
) -> None:
    execute(dsn, f"ALTER SYSTEM SET logical_decoding_work_mem = '{work_mem}'", "SELECT pg_reload_conf()")
    try:
        execute(dsn, "ALTER TABLE items ADD COLUMN document bytea")
        daemon.seen("gap", reason="table_changed")
        settled(dsn, redis_client, daemon.slot)
        fill(redis_client)
        redis_client.set("u:other", "not ours")
        with psycopg.connect(dsn) as connection:
            connection.execute("UPDATE items SET group_id = 3 WHERE id = 5")
            with connection.transaction(force_rollback=True):
                connection.execute("UPDATE items SET document = decode(repeat('00', %s), 'hex') WHERE id = 6", [WIDE])
            connection.rollback()
        execute(dsn, "UPDATE items SET body = 'y' WHERE id = 7")
        settled(dsn, redis_client, daemon.slot)
        # What was rolled back sweeps nothing.
        assert left(redis_client) == set(range(1, 20001)) - {7}
        execute(dsn, f"UPDATE items SET document = decode(repeat('00', {WIDE}), 'hex') WHERE id = 8")
        settled(dsn, redis_client, daemon.slot)
        assert left(redis_client) == set()
        assert redis_client.exists("u:other")
        sweeps = daemon.named("bust", action="sweep", reason="change")
        assert {(sweep["cache"], sweep["op"]) for sweep in sweeps} == {("item", "update"), ("group", "update")}
        assert not daemon.named("session_lost")
    finally:
        execute(dsn, "ALTER SYSTEM SET logical_decoding_work_mem = '64kB'", "SELECT pg_reload_conf()")
