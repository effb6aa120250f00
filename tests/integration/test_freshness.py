"""The watermark for others: it moves on an idle database, and the reader of deploy/README.md reads its own write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import redis
from proxy import Proxy
from running import RunningDaemon, eventually, execute, settled, watermark

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Sequence

README = Path(__file__).parents[2] / "deploy" / "README.md"
RULES = """
version: 1
caches:
  user: {key: "shop:prod:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
# The page calls redis-cli; the servers' wheels bring none.
REDIS_CLI = """#!{python}
import sys, redis
reply = redis.Redis.from_url("{url}", decode_responses=True).execute_command(*sys.argv[1:])
print("" if reply is None else reply)
"""


def blocks(language: str) -> Sequence[str]:
    section = README.read_text().split("## Freshness")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_readers_way_of_the_readme_reads_its_own_write(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    (sql,), (shell,) = blocks("sql"), blocks("sh")
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (42, 'Ada')")
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    cli = tmp_path / "redis-cli"
    cli.write_text(REDIS_CLI.format(python=sys.executable, url=redis_url))
    cli.chmod(0o755)
    slot = "cdc_invalidator"
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot) as daemon:
        daemon.ready()
        settled(database, redis_client, slot)
        redis_client.set("shop:prod:user:42", "Ada")
        with psycopg.connect(database, autocommit=True) as connection:
            *statements, last = [part for part in sql.split(";") if part.strip()]
            for statement in statements:
                connection.execute(statement.encode())
            row = connection.execute(last.encode()).fetchone()
        assert row is not None
        script = re.sub(r"^LSN=\d+", f"LSN={row[0]}", shell, flags=re.MULTILINE)
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["sh", "-euc", script], env=env, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == "", "Ada is gone"
        assert int(watermark(redis_client, slot)[b"lsn"]) >= row[0]


def test_the_watermark_moves_at_least_once_a_second_on_an_idle_database(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        seen = set()
        until = time.monotonic() + 6
        while time.monotonic() < until:
            seen.add(watermark(redis_client, slot_name)[b"at"])
            time.sleep(0.05)
        # A machine that is slow now and then is given one second of the six.
        assert len(seen) >= 6


def all_in_since(then: float, client: redis.Redis, slot: str) -> int:
    """Wait until the watermark says that all is in that had been committed then (Unix, in ms), and give its time."""
    eventually(lambda: int(watermark(client, slot).get(b"as_of", 0)) > then, "all up to then is in")
    return int(watermark(client, slot)[b"as_of"])


def test_the_watermark_tells_since_when_all_is_in_also_on_an_idle_database(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        for _ in range(3):
            assert all_in_since(time.time() * 1000, redis_client, slot_name) <= time.time() * 1000


def test_a_feed_that_stands_tells_no_later_time_though_the_daemon_lives(
    postgres: Postgres,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
    slot_name: str,
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Proxy(postgres.port) as way:
        dsn = psycopg.conninfo.make_conninfo(database, port=way.port)
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
            daemon.ready()
            all_in_since(time.time() * 1000, redis_client, slot_name)
            way.stall()
            stalled = time.time() * 1000
            redis_client.set("shop:prod:user:42", "Ada")
            execute(database, "INSERT INTO users VALUES (42, 'Grace')")
            committed = time.time() * 1000
            eventually(lambda: int(watermark(redis_client, slot_name)[b"at"]) > stalled + 3000, "the daemon lives")
            assert redis_client.exists("shop:prod:user:42")
            assert int(watermark(redis_client, slot_name)[b"as_of"]) < stalled
            way.mend()
            all_in_since(committed, redis_client, slot_name)
            assert not redis_client.exists("shop:prod:user:42")


def test_the_watermark_stops_when_busts_can_not_be_proven_applied(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (42, 'Ada')")
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        client.acl_setuser("app", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all"])
        url = valkey.url.replace("redis://", "redis://app:secret@")
        with RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name) as daemon:
            daemon.ready()
            settled(database, client, slot_name)
            client.acl_setuser("app", enabled=True, commands=["-evalsha"])
            execute(database, "UPDATE users SET name = 'Grace' WHERE id = 42")
            daemon.seen("redis_unavailable", code="NOPERM")
            before = watermark(client, slot_name)
            eventually(lambda: len(daemon.named("redis_unavailable")) > 3, "it is tried again and again")
            assert watermark(client, slot_name) == before
            assert daemon.status()["lag_bytes"] > 0
            client.acl_setuser("app", enabled=True, commands=["+evalsha"])
            settled(database, client, slot_name)
