"""A Redis whose commands were renamed away: what can be done without is done without, the rest is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m, stale_for: 30s}
  team: {key: "t:team:{id}:v{version}", version: "t:team:{id}:ver", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing, team]}
"""


@pytest.fixture
def rules(database: str, tmp_path: Path) -> Path:
    execute(database, "CREATE TABLE things (id int PRIMARY KEY, n int)")
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


def without(*names: str) -> Valkey:
    return Valkey(arguments=[word for name in names for word in ("--rename-command", name, "")])


def client_of(valkey: Valkey) -> redis.Redis:
    return redis.Redis.from_url(valkey.url, driver_info=None)


@pytest.mark.parametrize("names", [["CLIENT", "INFO", "DBSIZE", "CONFIG", "KEYS"], ["PEXPIRE"], ["RENAME"]])
def test_what_is_cosmetic_is_done_without(database: str, rules: Path, slot_name: str, names: list[str]) -> None:
    with (
        without(*names) as valkey,
        client_of(valkey) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        client.mset({"t:thing:1": "old", "t:team:1:ver": 5})
        execute(database, "INSERT INTO things VALUES (1, 1)")
        settled(database, client, slot_name)
        assert not client.exists("t:thing:1")
        assert int(client.get("t:team:1:ver") or 0) > 5
        assert not daemon.named("redis_unavailable")
        assert not daemon.errors
        given = {"postgres_dsn": database, "redis_url": valkey.url, "rules": rules, "slot": slot_name}
        checked = command("check", **given, publication=slot_name)
        assert checked.returncode == 0
        told = set(names) - {"CONFIG", "KEYS"}
        assert all(name in checked.stdout for name in told), checked.stdout


NEEDED = ["SCRIPT", "EVALSHA", "SCAN", "UNLINK", "HGETALL", "TIME", "GET", "SET", "HMGET", "HSET", "HDEL"]
NEEDED += ["WATCH", "MULTI", "EXEC"]


@pytest.mark.parametrize("name", NEEDED)
def test_what_busts_need_is_named_and_the_daemon_is_not_ready(
    database: str, rules: Path, slot_name: str, name: str
) -> None:
    with (
        without(name) as valkey,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        said = daemon.seen("slot_waits_for_redis")["error"]
        assert f"Redis does not have {name}, " in said
        eventually(lambda: daemon.status().get("last_error") == said, "/status says so")
        assert daemon.get("/readyz")[0] == 503
        with psycopg.connect(database) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [slot_name]
            ).fetchone()
        assert row == (0,), "it holds no WAL"
        checked = command("check", postgres_dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name)
        assert checked.returncode == 1
        assert f"Redis does not have {name}, " in " ".join(checked.stdout.split())


def test_a_leader_whose_redis_comes_back_without_a_command_is_not_ready(
    database: str, rules: Path, slot_name: str
) -> None:
    with (
        Valkey() as valkey,
        client_of(valkey) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        valkey.stop()
        daemon.seen("redis_unavailable")
        assert daemon.get("/readyz")[0] == 200, "that may pass"
        valkey._arguments = ["--rename-command", "EVALSHA", ""]
        valkey.start()
        said = daemon.seen("redis_unavailable", code="NO_COMMAND")
        assert said["level"] == "error"
        eventually(lambda: daemon.get("/readyz")[0] == 503, "it is not ready")
        valkey.stop()
        valkey._arguments = []
        valkey.start()
        daemon.ready()
        settled(database, client, slot_name)


def test_a_numbered_database_without_select_is_said(database: str, rules: Path, slot_name: str) -> None:
    with (
        without("SELECT") as valkey,
        RunningDaemon(dsn=database, redis_url=valkey.url_for(1), rules=rules, slot=slot_name) as daemon,
    ):
        assert "SELECT" in daemon.seen("slot_waits_for_redis")["error"]
