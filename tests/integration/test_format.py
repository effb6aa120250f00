"""What rule files can say beyond keys and columns, on a real daemon: when, via, debounce, bump_over, vars."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import redis
from running import RunningDaemon, confirmed, eventually, execute, settled, wal_position
from stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = (
    "CREATE TABLE users (id int PRIMARY KEY, name text, plan text, score float8, active bool)",
    "ALTER TABLE users REPLICA IDENTITY FULL",
    "CREATE TABLE team_members (team_id int, user_id int, PRIMARY KEY (team_id, user_id))",
    "CREATE INDEX ON team_members (user_id)",
    "CREATE TABLE products (id int PRIMARY KEY, name text)",
    "INSERT INTO users SELECT n, 'u' || n, 'free', 1.5, true FROM generate_series(1, 2000) n",
    "INSERT INTO team_members SELECT 1 + n % 10, n FROM generate_series(1, 2000) n",
    "INSERT INTO products SELECT n, 'p' || n FROM generate_series(1, 3000) n",
)


@contextmanager
def staged(dsn: str, url: str, client: redis.Redis, folder: Path, slot: str, rules: str) -> Iterator[Stage]:
    execute(dsn, *SCHEMA)
    path = folder / "rules.yaml"
    path.write_text("version: 1\n" + rules)
    with Stage.playing(dsn, url, path, slot, client=client, log_keys="raw") as stage:
        yield stage


# when


def test_a_condition_lets_only_those_changes_bust_for_which_it_holds_or_fails(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {user: {key: "t:user:{id}", ttl: 5m}}
rules:
  - name: r
    table: public.users
    when: "op == 'delete' || (op == 'update' && new.plan != old.plan) || new.score > 9.0 || !new.active"
    bust: [user]
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        keys = [f"t:user:{n}" for n in range(1, 8)]
        stage.cache(*keys)
        stage.run(
            "UPDATE users SET name = 'x' WHERE id = 1",
            "UPDATE users SET plan = 'pro' WHERE id = 2",
            "UPDATE users SET score = 9.5 WHERE id = 3",
            "UPDATE users SET active = false WHERE id = 4",
            "DELETE FROM users WHERE id = 5",
            # Nobody can say whether NULL is more than 9: it busts.
            "UPDATE users SET score = NULL WHERE id = 6",
            "UPDATE users SET score = 8.5 WHERE id = 7",
        )
        assert stage.cached(*keys) == ["t:user:1", "t:user:7"]


# via


VIA = """
caches:
  members: {key: "t:team:{team_id}:members:{version}", version: "t:team:{team_id}:ver", ttl: 5m}
rules:
  - name: user-changed
    table: public.users
    bust:
      - members: {via: "SELECT team_id FROM public.team_members WHERE user_id = {id}"}
"""


def test_the_rows_of_a_query_give_the_keys(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, redis_url, redis_client, tmp_path, slot_name, VIA) as stage:
        execute(database, "INSERT INTO team_members VALUES (77, 5), (78, 5)")
        stage.cache("t:team:77:ver", "t:team:78:ver", "t:team:79:ver")
        stage.run("UPDATE users SET name = 'x' WHERE id = 5")
        versions = [int(redis_client.get(f"t:team:{team}:ver") or 0) for team in (77, 78, 79)]
        assert versions[0] > 1
        assert versions[1] > 1
        assert versions[2] == 1
        event = stage.daemon.seen("bust", cache="members", op="update")
        assert event["rule"] == "user-changed"
        assert {"t:team:77:ver", "t:team:78:ver"} <= set(event["raw_keys"])


def test_ten_thousand_changes_of_one_transaction_are_at_most_ten_queries(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, redis_url, redis_client, tmp_path, slot_name, VIA) as stage:
        execute(database, "INSERT INTO users SELECT n, 'u' FROM generate_series(2001, 10000) n")
        settled(database, redis_client, slot_name)
        before = stage.daemon.metric("cdc_invalidator_via_queries_total")
        stage.cache(*(f"t:team:{team}:ver" for team in range(1, 11)))
        stage.run("UPDATE users SET name = name || '!'")
        assert all(int(redis_client.get(f"t:team:{team}:ver") or 0) > 1 for team in range(1, 11))
        assert 1 <= stage.daemon.metric("cdc_invalidator_via_queries_total") - before <= 10


def test_a_query_that_fails_sweeps_its_cache_and_is_told(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, redis_url, redis_client, tmp_path, slot_name, VIA) as stage:
        execute(database, "ALTER TABLE team_members RENAME COLUMN user_id TO member_id")
        stage.cache("t:team:1:ver", "t:team:99:ver")
        stage.run("UPDATE users SET name = 'x' WHERE id = 5")
        assert int(redis_client.get("t:team:99:ver") or 0) > 1
        error = stage.daemon.seen("query_failed", rule="user-changed")["error"]
        assert error.startswith(f"{tmp_path / 'rules.yaml'}:")
        assert "the `via` query of rule user-changed for cache members fails: " in error
        assert error.endswith('column "user_id" does not exist, at `user_id = {id}`; correct it.')
        assert "CDC_POSTGRES_DSN" not in error, "that is the rule's fault"
        assert stage.daemon.metric("cdc_invalidator_rule_errors_total", rule="user-changed") == 1
        execute(database, "ALTER TABLE team_members RENAME COLUMN member_id TO user_id")
        stage.cache("t:team:99:ver")
        stage.run("UPDATE users SET name = 'y' WHERE id = 5")
        assert redis_client.get("t:team:99:ver") == b"1", "the query is asked again"


def test_a_query_can_not_write_and_values_are_bound_never_pasted(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {name: {key: "t:name:{who}", ttl: 5m}}
rules:
  - name: r
    table: public.users
    bust:
      - name: {via: "SELECT {name} || '%' AS who WHERE {name} NOT LIKE '50%'"}
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        evil = "x'; DROP TABLE products; --"
        stage.cache(f"t:name:{evil}%")
        with_quotes = evil.replace("'", "''")
        stage.run(f"UPDATE users SET name = '{with_quotes}' WHERE id = 5")
        assert not stage.cached(f"t:name:{evil}%")
        stage.run("UPDATE products SET name = 'still there' WHERE id = 1")


def test_a_query_is_asked_for_null_as_well_and_for_values_longer_than_the_column_took_once(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {name: {key: "t:name:{who}", ttl: 5m}}
rules:
  - name: r
    table: public.users
    bust:
      - name: {via: "SELECT coalesce({name}, 'nobody') AS who"}
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        stage.cache("t:name:nobody")
        stage.run("UPDATE users SET name = NULL WHERE id = 5")
        assert not stage.cached("t:name:nobody")
        stage.run("ALTER TABLE users ALTER COLUMN name TYPE varchar(8)", "UPDATE users SET name = 'short' WHERE id = 5")
        stage.cache("t:name:longer than before")
        stage.run(
            "ALTER TABLE users ALTER COLUMN name TYPE varchar(80)",
            "UPDATE users SET name = 'longer than before' WHERE id = 5",
        )
        assert not stage.cached("t:name:longer than before")


def test_a_query_without_arguments_and_one_with_too_many_rows(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {name: {key: "t:name:{who}", ttl: 5m}, many: {key: "t:many:{n}", ttl: 5m}}
rules:
  - name: r
    table: public.users
    bust:
      - name: {via: "SELECT 'all' AS who"}
      - many: {via: "SELECT n FROM generate_series(1, 60000) n"}
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        stage.cache("t:name:all", "t:many:99999999")
        stage.run("UPDATE users SET name = 'x' WHERE id = 5")
        assert stage.cached("t:name:all", "t:many:99999999") == []
        assert "50,000 rows" in stage.daemon.seen("query_failed", cache="many")["error"]


def test_a_condition_that_fails_in_an_odd_way_ends_nothing(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {user: {key: "t:user:{id}", ttl: 5m}}
rules: [{name: r, table: public.users, when: "[true, false][new.id]", bust: [user]}]
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        stage.cache("t:user:0", "t:user:1", "t:user:7")
        stage.run("UPDATE users SET name = 'x' WHERE id IN (1, 7)")
        assert stage.cached("t:user:0", "t:user:1", "t:user:7") == ["t:user:0", "t:user:1"]


# bump_over


def test_single_keys_go_until_a_transaction_touches_many_then_the_version_is_bumped_once(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches:
  product: {key: "t:product:{id}:v{version}", version: "t:catalog:ver", bump_over: 1500, ttl: 5m}
rules:
  - {name: r, table: public.products, bust: [product]}
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        redis_client.set("t:catalog:ver", 100)
        stage.cache("t:product:1:v100", "t:product:1:v100\0lock", "t:product:2:v100", "t:product:1:v99")
        stage.run("UPDATE products SET name = 'x' WHERE id = 1")
        assert stage.cached("t:product:1:v100", "t:product:1:v100\0lock") == []
        assert stage.cached("t:product:2:v100", "t:product:1:v99") == ["t:product:2:v100", "t:product:1:v99"]
        assert redis_client.get("t:catalog:ver") == b"100"
        event = stage.daemon.seen("bust", action="delete", cache="product")
        assert event["raw_keys"] == ["t:product:1:v100"]
        stage.run("UPDATE products SET name = name || 'x'")
        assert int(redis_client.get("t:catalog:ver") or 0) > 10**15
        eventually(lambda: stage.daemon.named("bust", action="bump", rule="r"), "the bump is told")
        assert len(stage.daemon.named("bust", action="bump", rule="r")) == 1
        # Without a version there is no key to delete, and a TRUNCATE is one bump.
        redis_client.delete("t:catalog:ver")
        stage.run("UPDATE products SET name = 'y' WHERE id = 1")
        redis_client.set("t:catalog:ver", 5)
        stage.run("TRUNCATE products")
        assert int(redis_client.get("t:catalog:ver") or 0) > 10**15


# debounce


def test_a_hot_key_is_busted_at_once_and_then_once_in_its_time_and_never_too_seldom(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = """
caches: {user: {key: "t:user:{id}", ttl: 5m}}
rules:
  - {name: r, table: public.users, debounce: 1s, bust: [user]}
"""
    with staged(database, redis_url, redis_client, tmp_path, slot_name, rules) as stage:
        stage.cache("t:user:1")
        execute(database, "UPDATE users SET name = 'first' WHERE id = 1")
        eventually(lambda: not stage.cached("t:user:1"), "the first change busts at once")
        began = time.monotonic()
        stage.cache("t:user:1")
        changes = 0
        while time.monotonic() - began < 0.5:
            execute(database, f"UPDATE users SET name = 'again {changes}' WHERE id = 1")
            changes += 1
        position = wal_position(database)
        assert confirmed(database, slot_name) < position, "confirmed only after the last one"
        settled(database, redis_client, slot_name)
        assert not stage.cached("t:user:1")
        eventually(lambda: len(stage.daemon.named("bust", cache="user", action="delete")) >= 2, "both are told")
        busts = len(stage.daemon.named("bust", cache="user", action="delete"))
        assert busts <= 2 + (time.monotonic() - began) // 1
        assert changes > busts


# vars and several files


def test_variables_of_one_file_hold_in_all(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    (tmp_path / "vars.yaml").write_text('version: 1\nvars: {prefix: "t:${STAGE:-dev}"}\n')
    rules = """
caches: {user: {key: "${prefix}:user:{id}", ttl: 5m}}
rules: [{name: r, table: public.users, bust: [user]}]
"""
    execute(database, *SCHEMA)
    (tmp_path / "rules.yaml").write_text("version: 1\n" + rules)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=tmp_path, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.set("t:dev:user:1", 1)
        execute(database, "UPDATE users SET name = 'x' WHERE id = 1")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("t:dev:user:1")
