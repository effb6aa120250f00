"""What the ACL of Redis denies: whose keys the daemon leaves alone, and which caches wait while others go on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from running import command, eventually, execute
from stage import Stage

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  other: {key: "t:other:{id}", ttl: 5m}
  rate: {key: "rates:{currency}", ttl: 5m, ttl_only: true}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: other-changed, table: public.others, bust: [other]}
"""
SCHEMA = (
    "CREATE TABLE things (id int PRIMARY KEY, n int)",
    "CREATE TABLE others (id int PRIMARY KEY, n int)",
    "INSERT INTO things SELECT n, 0 FROM generate_series(1, 9) n",
    "INSERT INTO others SELECT n, 0 FROM generate_series(1, 9) n",
)
# The rights of deploy/README.md, but for the keys.
COMMANDS = (
    "+unlink",
    "+scan",
    "+evalsha",
    "+script|load",
    "+get",
    "+set",
    "+time",
    "+hmget",
    "+hgetall",
    "+hset",
    "+hdel",
)
MORE = ("+client|setname", "+select", "+info", "+dbsize")


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


class RightsStage(Stage):
    """A daemon with the rights of its ACL user, which its client, the administrator, may change."""

    def grant(self, *words: str) -> None:
        self.client.execute_command("ACL", "SETUSER", "cdc", *words)

    def change(self, table: str, number: int) -> str:
        """Cache a row, change it, and give its key."""
        key = f"t:{table.removesuffix('s')}:{number}"
        self.cache(key)
        execute(self.dsn, f"UPDATE {table} SET n = n + 1 WHERE id = {number}")
        return key

    def end(self) -> None:
        """Judge that it has said all in its log."""
        assert not self.daemon.errors


@contextmanager
def staged(
    dsn: str, valkey: Valkey, folder: Path, slot: str, *keys: str, rules: str = RULES, **settings: str
) -> Iterator[RightsStage]:
    execute(dsn, *SCHEMA)
    path = folder / "rules.yaml"
    path.write_text(rules)
    with redis.Redis.from_url(valkey.url) as client:
        administrator: Any = client
        granted = ["resetkeys", f"~cdc:{slot}:*", *keys, "resetchannels", "-@all", *COMMANDS, *MORE]
        administrator.execute_command("ACL", "SETUSER", "cdc", "on", ">secret", *granted)
        client.set("rates:EUR", "1.1")
        url = valkey.url.replace("redis://", "redis://cdc:secret@")
        with RightsStage.playing(dsn, url, path, slot, client=client, **settings) as stage:
            yield stage


# A cache that is `ttl_only`.


def test_a_cache_that_is_ttl_only_is_never_swept_and_needs_no_rights(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey, tmp_path, slot_name, "~t:*") as stage:
        assert stage.daemon.seen("gap", reason="new_slot")["caches"] == ["other", "thing"]
        assert stage.named() == {"other", "thing"}
        checked = command("check", postgres_dsn=database, redis_url=stage.redis_url, rules=stage.rules, slot=slot_name)
        assert "rights" not in checked.stdout
        # Another history, other rules, a Redis that lost its watermark, and somebody who asks for it.
        stage.rules.write_text(RULES.replace('"rates:{currency}"', '"rates:{currency}", negative_ttl: 9s'))
        stage.daemon.seen("reloaded")
        stage.client.delete(f"cdc:{slot_name}:watermark")
        stage.daemon.seen("gap", reason="no_watermark")
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("SELECT pg_logical_emit_message(true, 'cdc_invalidator', '{\"cache\": \"rate\"}')")
        assert "which is `ttl_only`" in stage.daemon.seen("manual_bust_skipped")["error"]
        key = stage.change("things", 1)
        stage.settle()
        assert stage.cached("rates:EUR", key) == ["rates:EUR"]
        assert not stage.daemon.named("redis_unavailable", code="NOPERM")
        assert not [event for event in stage.daemon.events if event.get("cache") == "rate"]


def test_a_cache_that_is_ttl_only_no_longer_is_swept_once(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey, tmp_path, slot_name, "~t:*", "~rates:*") as stage:
        stage.rules.write_text(RULES.replace(", ttl_only: true", ""))
        assert stage.daemon.seen("gap", reason="rules_changed")["caches"] == ["rate"]
        eventually(lambda: "rate" in stage.named(), "the cache is kept")
        assert not stage.cached("rates:EUR")
