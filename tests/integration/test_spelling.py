"""Keys are spelled as the database has it: not as our role, the connection string or the environment would."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING

import psycopg
import pytest
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

RULES = """
version: 1
caches:
  day: {key: "t:day:{d}", ttl: 1h}
  all: {key: "t:all:{d}|{t}|{i}|{b}|{f}|{m}", ttl: 1h}
  event: {key: "t:event:{n}", ttl: 1h}
rules:
  - name: days
    table: public.days
    bust: [day, all, event: {via: "SELECT n FROM public.events WHERE d = {d}"}]
"""
STYLES = {
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "iso_8601",
    "TimeZone": "America/New_York",
    "bytea_output": "escape",
    "extra_float_digits": "0",
}
UPDATE = "UPDATE days SET note = note || '.'"


@pytest.fixture
def role(database: str, postgres: Postgres, slot_name: str) -> Iterator[str]:
    """The connection string of a role that the daemon has for itself."""
    execute(
        database,
        "CREATE TABLE days (id int PRIMARY KEY, d date, t timestamptz, i interval, b bytea, "
        " f float8, m money, note text)",
        "ALTER TABLE days REPLICA IDENTITY FULL",
        "INSERT INTO days VALUES (1, '2026-03-04', '2026-03-04 10:00+00', '1 day 2 h', decode('615c00', 'hex'),"
        " 0.1::float8 + 0.2, '1.5', '')",
        "CREATE TABLE events (n int PRIMARY KEY, d date)",
        "INSERT INTO events VALUES (77, '2026-03-04')",
        f"CREATE ROLE {slot_name} LOGIN SUPERUSER PASSWORD 'pw'",
    )
    yield postgres.dsn_for(database.rpartition("/")[2], user=slot_name, password="pw")
    execute(database, f"DROP OWNED BY {slot_name}", f"DROP ROLE {slot_name}")


def keys(dsn: str) -> list[str]:
    """The keys that a session of the application makes of the row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute(
            "SELECT format('t:day:%s', d), format('t:all:%s|%s|%s|%s|%s|%s', d, t, i, b, f, m), 't:event:77' FROM days"
        ).fetchall()
    return list(found[0])


def sets(what: str, values: dict[str, str]) -> list[str]:
    return [f"ALTER {what} SET {name} = '{value}'" for name, value in values.items()]


@pytest.mark.parametrize("of_database", [False, True])
@pytest.mark.parametrize("place", ["role", "role in database", "connection string", "environment"])
def test_only_the_settings_of_the_database_decide(
    database: str, role: str, redis_url: str, redis_client: redis.Redis, rules: Path, slot_name: str,
    monkeypatch: pytest.MonkeyPatch, *, place: str, of_database: bool,
) -> None:  # fmt: skip
    name = database.rpartition("/")[2]
    dsn = role
    if of_database:
        execute(database, *sets(f"DATABASE {name}", {**STYLES, "TimeZone": "Asia/Kolkata", "DateStyle": "German"}))
    if place.startswith("role"):
        execute(database, *sets(f"ROLE {slot_name}{f' IN DATABASE {name}' if 'in' in place else ''}", STYLES))
    elif place == "connection string":
        dsn += "?options=-c%20TimeZone%3DAsia/Tokyo%20-c%20DateStyle%3DGerman"
    with monkeypatch.context() as environment:
        if place == "environment":
            environment.setenv("PGTZ", "Asia/Tokyo")
            environment.setenv("PGDATESTYLE", "Postgres")
            environment.setenv("PGOPTIONS", "-c extra_float_digits=0 -c TimeZone=Asia/Tokyo")
        daemon = RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name)
        servers = {"postgres_dsn": dsn, "rules": str(rules)}
        change = ["--table", "public.days", "--op", "insert", "--new", '{"id": 2, "d": "2026-12-24"}']
        explained = command("explain", "--format", "json", *change, **servers)
    with psycopg.connect(database, autocommit=True) as connection:
        ((day,),) = connection.execute("SELECT format('t:day:%s', date '2026-12-24')").fetchall()
    assert explained.returncode == 0, explained.stderr
    assert day in [bust["key"] for bust in json.loads(explained.stdout)["busts"]]
    with daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        wanted = keys(database)
        redis_client.mset(dict.fromkeys([*wanted, "t:day:other"], "cached"))
        execute(database, UPDATE)
        settled(database, redis_client, slot_name)
        assert redis_client.keys("t:*") == [b"t:day:other"]
        assert not daemon.named("session_lost")
        assert not daemon.named("query_failed")


def told(daemon: RunningDaemon, sweeps: int) -> bool:
    return len(daemon.named("gap", reason="rules_changed")) >= sweeps


def test_when_the_settings_of_the_database_change_the_caches_are_swept_and_keys_follow(
    database: str, role: str, redis_url: str, redis_client: redis.Redis, rules: Path, slot_name: str
) -> None:
    name = database.rpartition("/")[2]
    with RunningDaemon(dsn=role, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        for sweeps, statements in enumerate((sets(f"DATABASE {name}", STYLES), [f"ALTER DATABASE {name} RESET ALL"])):
            redis_client.mset(dict.fromkeys([*keys(database), "t:day:other"], "cached"))
            execute(database, *statements)
            eventually(lambda: not redis_client.keys("t:*"), "the caches are swept")
            eventually(functools.partial(told, daemon, sweeps + 1), "that is told")
            settled(database, redis_client, slot_name)
            redis_client.mset(dict.fromkeys([*keys(database), "t:day:other"], "cached"))
            execute(database, UPDATE)
            settled(database, redis_client, slot_name)
            assert redis_client.keys("t:*") == [b"t:day:other"]
        assert "settings for printing values" in daemon.seen("session_lost")["error"]
        assert not daemon.named("query_failed")


def test_a_change_while_no_daemon_runs_is_found_at_the_next_start(
    database: str, role: str, redis_url: str, redis_client: redis.Redis, rules: Path, slot_name: str
) -> None:
    daemon = RunningDaemon(dsn=role, redis_url=redis_url, rules=rules, slot=slot_name)
    with daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
    redis_client.set("t:day:other", "cached")
    execute(database, f"ALTER DATABASE {database.rpartition('/')[2]} SET DateStyle = 'German'")
    with daemon:
        daemon.ready()
        eventually(lambda: not redis_client.keys("t:*"), "the caches are swept")
    assert daemon.seen("gap", reason="rules_changed")


def test_settings_of_the_role_are_refused_where_those_of_the_others_can_t_be_read(
    redis_url: str, rules: Path, slot_name: str
) -> None:
    with Postgres(own_identity=True) as server:
        # Connections to databases, also of walsenders, but none without.
        (server.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        dsn = server.create_database("shop")
        execute(dsn, "SELECT pg_reload_conf()", "CREATE TABLE days (id int PRIMARY KEY, d date, t timestamptz)")
        execute(dsn, "ALTER TABLE days ADD i interval, ADD b bytea, ADD f float8, ADD m money, ADD note text")
        execute(dsn, "ALTER TABLE days REPLICA IDENTITY FULL", "CREATE TABLE events (n int PRIMARY KEY, d date)")
        role = server.user
        execute(dsn, f"ALTER ROLE {role} SET DateStyle = 'German'")
        execute(dsn, f"ALTER ROLE {role} IN DATABASE shop SET TimeZone = 'Asia/Tokyo'")
        servers = {"postgres_dsn": dsn, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
        checked = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
        (finding,) = [each["sentence"] for each in checked["findings"] if each["code"] == "settings_hidden"]
        remedies = re.findall(r"ALTER ROLE [^;]*;", finding)
        assert remedies == [
            f'ALTER ROLE "{role}" RESET DateStyle;',
            f'ALTER ROLE "{role}" IN DATABASE "shop" RESET TimeZone;',
        ]
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
            assert daemon.wait() == 3
            assert any(finding in line for line in daemon.errors)
        execute(dsn, *remedies)
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
            daemon.ready()


def test_check_says_that_floats_are_rounded_and_dates_are_not_iso(
    database: str, role: str, redis_url: str, rules: Path, slot_name: str
) -> None:
    name = database.rpartition("/")[2]
    execute(database, *sets(f"DATABASE {name}", {"extra_float_digits": "0", "DateStyle": "German"}))
    servers = {"postgres_dsn": role, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
    checked = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
    assert {"floats_rounded", "dates_not_iso"} <= {each["code"] for each in checked["findings"]}
    assert "DateStyle of the database is German, DMY" in str(checked["findings"])
