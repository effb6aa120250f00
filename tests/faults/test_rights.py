"""What the ACL of Redis denies: whose keys the daemon leaves alone, and which caches wait while others go on."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pair
import psycopg
import pytest
import redis
from clusters import Cluster
from running import command, eventually, execute
from stage import Stage

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = pair.RULES.replace("rules:\n", '  rate: {key: "rates:{currency}", ttl: 5m, ttl_only: true}\nrules:\n')
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
    "+watch",
    "+multi",
    "+exec",
)
# In a cluster, these as well.
ASKED = ("+cluster|info", "+cluster|slots", "+cluster|nodes", "+asking")
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
    dsn: str, valkey: Valkey, folder: Path, slot: str, *keys: str, kind: type[RightsStage] = RightsStage
) -> Iterator[RightsStage]:
    execute(dsn, *pair.SCHEMA)
    path = folder / "rules.yaml"
    path.write_text(RULES)
    with redis.Redis.from_url(valkey.url) as client:
        administrator: Any = client
        granted = ["resetkeys", f"~cdc:{slot}:*", *keys, "resetchannels", "-@all", *COMMANDS, *MORE]
        administrator.execute_command("ACL", "SETUSER", "cdc", "on", ">secret", *granted)
        client.set("rates:EUR", "1.1")
        url = valkey.url.replace("redis://", "redis://cdc:secret@")
        with kind.playing(dsn, url, path, slot, client=client) as stage:
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


# Other caches: denied ones wait, and the others go on.


def denied(stage: RightsStage, *caches: str) -> None:
    """Wait until these caches are denied, and the daemon says so wherever an operator looks."""
    eventually(lambda: stage.daemon.status().get("denied_caches", {}).keys() == set(caches), f"{caches} are denied")
    for cache in caches:
        assert stage.daemon.metric("cdc_invalidator_cache_denied", cache=cache) == 1
        assert "NOPERM" in stage.daemon.status()["denied_caches"][cache]
    code, why = stage.daemon.get("/readyz")
    assert code == 503
    assert f"Redis denies the busts of {', '.join(sorted(caches))}: " in why
    assert "grant the ACL user" in why
    assert stage.daemon.status()["last_error"] in why


def granted(stage: RightsStage) -> None:
    """Wait until nothing is denied, and all caches are named again."""
    eventually(lambda: not stage.daemon.status()["denied_caches"], "nothing is denied")
    stage.settle()
    assert stage.named() == {"other", "thing"}
    assert stage.daemon.get("/readyz")[0] == 200
    assert stage.daemon.metric("cdc_invalidator_cache_denied") == 0


@contextmanager
def unharmed(stage: RightsStage) -> Iterator[None]:
    """While it lasts, the connection to Redis stays, and the position moves."""
    connects = stage.daemon.metric("cdc_invalidator_redis_connects_total")
    yield
    key = stage.change("others", 9)
    stage.passed()
    assert not stage.cached(key)
    assert not stage.daemon.named("redis_unavailable")
    assert stage.daemon.metric("cdc_invalidator_redis_connects_total") == connects
    eventually(lambda: stage.daemon.status()["lag_bytes"] == 0, "nothing is held back")


def test_a_denied_bust_makes_its_cache_a_gap_and_the_others_go_on_until_it_is_granted(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey, tmp_path, slot_name, "~t:*") as stage:
        with unharmed(stage):
            stage.grant("resetkeys", f"~cdc:{slot_name}:*", "~t:other:*")
            execute(database, "BEGIN; UPDATE things SET n = 1; UPDATE others SET n = 1; COMMIT")
            key = stage.change("things", 1)
            denied(stage, "thing")
            stage.passed()
            assert stage.named() == {"other"}
            assert stage.daemon.seen("gap", reason="denied")["caches"] == ["thing"]
            assert stage.cached(key)
            busy = stage.daemon.metric("cdc_invalidator_redis_errors_total", error="NOPERM")
            stage.change("things", 2)
            stage.passed()
        assert stage.daemon.metric("cdc_invalidator_redis_errors_total", error="NOPERM") < busy + 20
        stage.grant("~t:thing:*")
        granted(stage)
        assert stage.cached(key, "t:thing:2") == []
        assert len(stage.daemon.named("gap", reason="denied")) == 1
        assert len(stage.daemon.named("caches_denied")) == 1
        assert stage.daemon.seen("bust", action="sweep", cache="thing", reason="gap")


def test_a_cache_whose_rights_are_missing_at_the_first_start_holds_nothing_else_back(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:

    class Started(RightsStage):
        def begin(self) -> None:
            eventually(lambda: self.named() == {"other"}, "the other cache is kept")

    with staged(database, valkey, tmp_path, slot_name, "~t:other:*", kind=Started) as stage:
        with unharmed(stage):
            key = stage.change("things", 1)
            denied(stage, "thing")
        assert stage.daemon.terminate() == 0
        stage.daemon.start()
        denied(stage, "thing")
        stage.grant("~t:thing:*")
        granted(stage)
        assert not stage.cached(key)


@pytest.mark.parametrize("right", ["scan", "unlink"])
def test_without_a_command_sweeps_or_all_busts_wait_and_the_position_moves(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str, right: str
) -> None:
    with staged(database, valkey, tmp_path, slot_name, "~t:*") as stage:
        stage.cache("t:thing:1")
        stage.grant(f"-{right}")
        execute(database, "TRUNCATE things")
        denied(stage, "thing")
        if right == "scan":
            with unharmed(stage):
                assert stage.cached("t:thing:1")
                # Single keys go all the same.
                stage.cache("t:thing:77")
                execute(database, "INSERT INTO things VALUES (77, 0)")
                eventually(lambda: not stage.cached("t:thing:77"), "the bust")
        else:
            execute(database, "UPDATE others SET n = 2 WHERE id = 1")
            denied(stage, "other", "thing")
            eventually(lambda: stage.named() == set(), "no cache is named")
            stage.passed()
        stage.grant(f"+{right}")
        granted(stage)
        assert not stage.cached("t:thing:1")


def test_one_node_of_a_cluster_that_denies_a_cache_holds_back_that_cache_only(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *pair.SCHEMA)
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    with Cluster() as cluster, contextlib.closing(cluster.client()) as client:
        for node in cluster.nodes:
            node.ask("ACL", "SETUSER", "cdc", "on", ">secret", f"~cdc:{slot_name}:*", "~t:*", *COMMANDS, *MORE, *ASKED)
        url = cluster.url.replace("://", "://cdc:secret@")
        with RightsStage.playing(database, url, path, slot_name, client=client) as stage:
            master = cluster.master_of("t:thing:1")
            with unharmed(stage):
                master.ask("ACL", "SETUSER", "cdc", "resetkeys", f"~cdc:{slot_name}:*", "~t:other:*")
                key = stage.change("things", 1)
                denied(stage, "thing")
                stage.passed()
                assert stage.named() == {"other"}
                assert stage.cached(key)
            master.ask("ACL", "SETUSER", "cdc", "~t:thing:*")
            granted(stage)
            assert not stage.cached(key)
