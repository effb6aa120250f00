"""What an administrator runs on PostgreSQL and Redis, run on real ones; then the daemon lives with these rights."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from manifests import DEPLOY
from proxy import Proxy
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator.embedded.process import free_port
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = DEPLOY / "kustomize/example/standalone/rules.yaml"
ROLE = "cdc_invalidator"


@pytest.fixture
def dsn(database: str, postgres: Postgres, slot_name: str, tmp_path: Path) -> Iterator[str]:
    """A DSN of the role that deploy/postgresql.sql makes; role and publication are named like the slot here."""
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        "CREATE TABLE orders (id int PRIMARY KEY, user_id int)",
    )
    script = tmp_path / "postgresql.sql"
    psql: list[str | Path] = [
        postgres.bin_dir / "psql",
        "--single-transaction",
        "--set=ON_ERROR_STOP=1",
        f"--file={script}",
        database,
    ]
    text = (DEPLOY / "postgresql.sql").read_text().replace(ROLE, slot_name)
    script.write_text(text)
    forgotten = subprocess.run(psql, capture_output=True, text=True, check=False)
    assert forgotten.returncode == 3
    assert "put a password into this file" in forgotten.stderr
    script.write_text(text.replace("change-me", "pw"))
    subprocess.run(psql, check=True)
    name = database.rpartition("/")[2]
    yield postgres.dsn_for(name, user=slot_name, password="pw")
    execute(
        postgres.dsn,
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{slot_name}'",
    )
    # Its publication goes with the database.
    execute(database, f"REASSIGN OWNED BY {slot_name} TO CURRENT_USER", f"DROP OWNED BY {slot_name}")
    execute(postgres.dsn, f"DROP ROLE {slot_name}")


def test_the_role_has_no_more_rights_than_it_needs_and_the_daemon_lives_with_them(
    dsn: str, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert connection.execute("SHOW wal_sender_timeout").fetchone() == ("10s",)
        for refused in (
            "SELECT * FROM users",
            "DELETE FROM orders",
            "CREATE TABLE public.more ()",
            "CREATE SCHEMA more",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(refused)
    given = {"postgres_dsn": dsn, "redis_url": redis_url, "rules": RULES, "slot": slot_name, "publication": slot_name}
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=RULES, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        for number, change in enumerate(
            ("INSERT INTO users VALUES (1, 'Ada')", "UPDATE users SET name = 'Grace'", "DELETE FROM users")
        ):
            redis_client.set("shop:prod:user:1", number)
            execute(database, change)
            settled(database, redis_client, slot_name)
            assert not redis_client.exists("shop:prod:user:1")
        checked = command("check", **given)
        assert checked.returncode == 0, checked.stdout
        assert daemon.terminate() == 0
        assert not daemon.errors
        assert not [
            event for event in daemon.events if event["level"] in {"warning", "error"} and event["event"] != "gap"
        ]


def test_a_table_that_loses_its_identity_is_taken_out_before_it_hurts_for_long(
    dsn: str, database: str, redis_url: str, slot_name: str
) -> None:
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=RULES, slot=slot_name) as daemon:
        daemon.ready()
        execute(database, "INSERT INTO users VALUES (1, 'Ada')", "ALTER TABLE users REPLICA IDENTITY NOTHING")
        daemon.seen("table_taken_out")
        eventually(lambda: updates(database), "the application's UPDATE works again")
        execute(database, "ALTER TABLE users REPLICA IDENTITY DEFAULT")
        # To put it in again takes its owner.
        told = daemon.seen("not_set_up")["error"]
        assert "have an administrator run, on the primary: ALTER PUBLICATION" in told
        assert daemon.terminate() == 0


def updates(dsn: str) -> bool:
    try:
        execute(dsn, "UPDATE users SET name = 'Grace'")
    except psycopg.errors.ObjectNotInPrerequisiteState:
        return False
    return True


def test_a_rule_for_another_table_is_refused_with_the_statement_to_run(
    dsn: str, database: str, redis_url: str, slot_name: str, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.read_text().replace("public.users", "public.orders"))
    given = {"postgres_dsn": dsn, "redis_url": redis_url, "rules": rules, "slot": slot_name, "publication": slot_name}
    refused = command("run", **given, http_port=free_port())
    assert refused.returncode == 3
    (statement,) = re.findall(r"have an administrator run, on the primary: (ALTER PUBLICATION [^;]+;)", refused.stderr)
    execute(database, statement)
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        assert daemon.terminate() == 0


# Redis.


def test_the_acl_files_grant_what_the_readme_does() -> None:
    readme = (DEPLOY / "README.md").read_text()
    granted = re.findall(r"^ACL SETUSER (.+)$", readme, re.MULTILINE)
    files = [(DEPLOY / name).read_text() for name in ("redis.acl", "sentinel.acl", "init.acl", "observe.acl")]
    assert [f"user {line}\n" for line in granted] == files


def test_a_server_loads_the_acl_file_and_the_daemon_lives_with_its_rights(
    database: str, slot_name: str, tmp_path: Path
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    acl = tmp_path / "redis.acl"
    acl.write_text((DEPLOY / "redis.acl").read_text().replace(ROLE, slot_name))
    with Valkey(settings={"aclfile": str(acl)}) as server, redis.Redis.from_url(server.url) as client:
        url = server.url.replace("://", "://cdc:secret@")
        with redis.Redis.from_url(url) as limited, pytest.raises(redis.exceptions.NoPermissionError):
            limited.delete("other:key")
        with RunningDaemon(dsn=database, redis_url=url, rules=RULES, slot=slot_name) as daemon:
            daemon.ready()
            client.set("shop:prod:user:1", "cached")
            execute(database, "INSERT INTO users VALUES (1, 'Ada')")
            eventually(lambda: not client.exists("shop:prod:user:1"), "the key is busted")
            settled(database, client, slot_name)
            assert daemon.terminate() == 0
            assert not daemon.named("redis_unavailable")


def test_with_these_rights_a_leader_that_redis_does_not_hear_hands_over(
    dsn: str, database: str, slot_name: str, tmp_path: Path
) -> None:
    acl = tmp_path / "redis.acl"
    acl.write_text((DEPLOY / "redis.acl").read_text().replace(ROLE, slot_name))
    with (
        Valkey(settings={"aclfile": str(acl)}) as server,
        Proxy(server.port) as way,
        redis.Redis.from_url(server.url) as client,
    ):
        url = server.url.replace("://", "://cdc:secret@")
        given = {"dsn": dsn, "rules": RULES, "slot": slot_name, "handover_seconds": "3"}
        cut_off = url.replace(f":{server.port}", f":{way.port}")
        with RunningDaemon(redis_url=cut_off, **given) as first:  # type: ignore[arg-type]
            first.ready()
            with RunningDaemon(redis_url=url, **given) as second:  # type: ignore[arg-type]
                second.ready()
                way.refuse()
                client.set("shop:prod:user:1", "stale")
                execute(database, "INSERT INTO users VALUES (1, 'Ada')")
                eventually(lambda: not client.exists("shop:prod:user:1"), "the key is busted")
                assert second.status()["role"] == "leader"
                assert not second.named("redis_unavailable")
