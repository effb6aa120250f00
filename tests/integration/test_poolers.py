"""A connection pooler in front of PostgreSQL: it is refused, and the application's sessions stay as they were."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import psycopg
import pytest
from poolers import Mode, pgbouncer
from running import RunningDaemon, command, eventually, execute

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Postgres
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.replication import Replication

if TYPE_CHECKING:
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 1h}
  team: {key: "t:team:{team_id}", ttl: 1h}
rules:
  - name: user
    table: public.users
    bust: [user, team: {via: "SELECT team_id FROM members WHERE user_id = {id}"}]
"""
SETTINGS = "SELECT name, setting FROM pg_settings WHERE source NOT IN ('default', 'override', 'configuration file')"
COMMANDS = {
    "check": ("check",),
    "run": ("run",),
    "setup": ("setup",),
    "teardown": ("teardown",),
    "explain": ("explain", "--table", "public.users", "--op", "insert", "--new", '{"id": 1}'),
}


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.fixture
def rules(database: str, tmp_path: Path) -> Path:
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        "CREATE TABLE members (team_id int, user_id int)",
        "INSERT INTO users VALUES (1, 'Ada')",
    )
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.mark.parametrize("ignored", ["", "options"])
@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_pooler_is_refused_before_anything_is_set_or_made(
    words: tuple[str, ...], mode: Mode, ignored: str, database: str, redis_url: str, slot_name: str, rules: Path
) -> None:
    with pgbouncer(database, mode, ignored=ignored) as pooled:
        before = rows(pooled, SETTINGS)
        given = {"postgres_dsn": pooled, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
        done = command(*words, rules=rules, http_host="127.0.0.1", http_port=0, **given)
        assert done.returncode == 2, done.stdout + done.stderr
        told = done.stdout + done.stderr
        assert "CDC_POSTGRES_DSN leads to a connection pooler" in told
        assert "name the host and port of PostgreSQL itself" in told
        assert rows(pooled, SETTINGS) == before
        assert rows(pooled, "UPDATE users SET name = 'Eva' RETURNING id") == [(1,)]
        assert rows(pooled, "SELECT name FROM pg_prepared_statements") == []
    assert rows(database, f"SELECT FROM pg_replication_slots WHERE slot_name = '{slot_name}'") == []
    assert rows(database, "SELECT FROM pg_publication") == []


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_manual_bust_goes_through_a_pooler(
    mode: Mode, database: str, redis_url: str, slot_name: str, rules: Path
) -> None:
    daemon = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name)
    with daemon, pgbouncer(database, mode) as pooled:
        daemon.ready()
        before = rows(pooled, SETTINGS)
        given = {"postgres_dsn": pooled, "rules": rules, "slot": slot_name, "publication": slot_name}
        assert command("bust", "user", "id=1", **given).returncode == 0
        daemon.seen("bust", reason="manual")
        assert rows(pooled, SETTINGS) == before


@pytest.mark.parametrize("ignored", ["", "options"])
def test_the_refusal_names_the_setting_of_a_standby(ignored: str, database: str) -> None:
    with (
        pgbouncer(database, "transaction", ignored=ignored) as pooled,
        pytest.raises(errors.PoolerInBetween, match="CDC_POSTGRES_STANDBYS leads to"),
    ):
        asyncio.run(connect(DsnSource.fixed(pooled, "CDC_POSTGRES_STANDBYS"), "test"))


def test_a_pooler_is_refused_on_a_replication_connection_too(database: str) -> None:
    with pgbouncer(database, "session", ignored="replication") as pooled, pytest.raises(errors.PoolerInBetween):
        asyncio.run(Replication.open(DsnSource.fixed(pooled)))


def test_our_parameters_win_over_those_of_the_connection_string(database: str) -> None:
    async def shown(dsn: str) -> Any:
        connection = await connect(DsnSource.fixed(dsn), "test", {"jit": "off"})
        async with connection:
            found = await connection.execute(
                "SELECT current_setting('lock_timeout') a, current_setting('work_mem') b, current_setting('jit') c"
            )
            return await found.fetchone()

    given = f"{database}?options=-c%20lock_timeout%3D1h%20-c%20work_mem%3D5MB"
    assert tuple(asyncio.run(shown(given))) == ("2s", "5MB", "off")


@pytest.mark.parametrize("words", [("run",), ("setup",), ("check",)], ids=["run", "setup", "check"])
def test_no_slot_is_made_where_nobody_can_stream(
    words: tuple[str, ...], redis_url: str, slot_name: str, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Postgres(settings={"max_wal_senders": "0"}) as server:
        execute(server.dsn, "CREATE TABLE users (id int PRIMARY KEY)")
        if words == ("run",):
            with RunningDaemon(dsn=server.dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
                eventually(lambda: len(daemon.named("session_lost")) > 1, "it has tried twice")
        else:
            given = {"postgres_dsn": server.dsn, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
            done = command(*words, rules=rules, **given)
            assert done.returncode == 1
            assert "max_wal_senders" in done.stdout + done.stderr
        assert rows(server.dsn, "SELECT FROM pg_replication_slots") == []
