"""`publish` of a cache: who listens learns of each bust once it is done, at least once, on Redis of every kind."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
import resp
from clusters import Cluster
from running import RunningDaemon, command, eventually, execute, settled
from stage import Stage

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m, publish: "inv:users"}
  order: {key: "t:shop:{shop}:order:{id}", ttl: 5m, publish: "inv:{shop}"}
  list: {key: "t:list:{shop}:v{version}", version: "t:list:{shop}:ver", ttl: 5m, publish: "inv:{shop}"}
  page: {key: "t:page:{shop}:*", ttl: 5m, publish: "inv:{shop}"}
  late: {key: "t:late:{id}", ttl: 5m, again_after: 50ms, publish: "inv:late"}
  quiet: {key: "t:quiet:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user, late, quiet]}
  - {name: order-changed, table: public.orders, bust: [order, list, page]}
"""
SCHEMA = (
    "CREATE TABLE users (id int PRIMARY KEY, n int)",
    "CREATE TABLE orders (id int, shop text, n int, PRIMARY KEY (id, shop))",
)
Told = tuple[str, dict[str, Any]]


class Listener:
    """A subscriber; it forgets what the daemon tells at its start."""

    def __init__(self, client: Any) -> None:
        self._subscription = client.pubsub(ignore_subscribe_messages=True)
        self._subscription.psubscribe("inv:*")
        self._subscription.get_message(timeout=5)
        self.told: list[Told] = []

    def listen(self) -> list[Told]:
        """Take what has come."""
        while (message := self._subscription.get_message(timeout=0.01)) is not None:
            if message["type"] == "pmessage":
                self.told.append((message["channel"].decode(), json.loads(message["data"])))
        return self.told

    def on(self, channel: str, cache: str, what: str) -> list[Any]:
        """Give the content of each message on a channel about a cache, as far as it has that field."""
        return [
            told[what] for name, told in self.listen() if (name, told["cache"]) == (channel, cache) and what in told
        ]

    def hears(self, channel: str, cache: str, what: str) -> list[Any]:
        """Wait for messages."""
        found: list[Any] = eventually(lambda: self.on(channel, cache, what), f"{what} of {cache} on {channel}")
        return found

    def close(self) -> None:
        self._subscription.close()


class PublishStage(Stage):
    """A daemon, and somebody who listens."""

    listener: Listener

    def begin(self) -> None:
        super().begin()
        self.listener = Listener(self.client)

    def close(self) -> None:
        if "listener" in vars(self):
            self.listener.close()
        super().close()


@contextlib.contextmanager
def staged(dsn: str, url: str, folder: Path, slot: str, client: Any, rules: str = RULES) -> Iterator[PublishStage]:
    execute(dsn, *SCHEMA)
    path = folder / "rules.yaml"
    path.write_text(rules)
    with PublishStage.playing(dsn, url, path, slot, client=client) as stage:
        yield stage


@pytest.fixture
def stage(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, redis_client: redis.Redis
) -> Iterator[PublishStage]:
    with staged(database, redis_url, tmp_path, slot_name, redis_client) as stage:
        yield stage


def test_a_bust_is_told_once_the_key_is_gone_with_its_position_and_its_time(stage: PublishStage) -> None:
    for number in range(20):
        stage.cache(f"t:user:{number}")
        execute(stage.dsn, f"INSERT INTO users VALUES ({number}, 0)")
        eventually(lambda: [f"t:user:{number}"] in stage.listener.on("inv:users", "user", "keys"), "it is told")  # noqa: B023
        assert not stage.cached(f"t:user:{number}")
    stage.settle()
    _, told = next(each for each in stage.listener.told if each[1]["cache"] == "user")
    event = stage.daemon.seen("bust", cache="user", action="delete")
    high, low = event["lsn"].split("/")
    assert told["lsn"] == (int(high, 16) << 32) + int(low, 16)
    assert abs(told["committed_at"] / 1000 - time.time()) < 120
    assert {told["cache"] for _, told in stage.listener.told} == {"user", "late"}
    # One sweep at the start, told twice.
    assert stage.daemon.metric("cdc_invalidator_messages_total", cache="user") == 2 + len(
        stage.listener.on("inv:users", "user", "keys")
    )


def test_a_channel_has_the_parameters_of_the_key_or_is_that_for_everybody(stage: PublishStage) -> None:
    stage.cache("t:list:7:ver")
    stage.run("INSERT INTO orders VALUES (1, '7', 0), (2, '7', 0), (3, 'x:y', 0), (4, 'a:order:b', 0)")
    assert sorted(stage.listener.hears("inv:7", "order", "keys")[0]) == ["t:shop:7:order:1", "t:shop:7:order:2"]
    assert stage.listener.hears("inv:7", "list", "versions") == [["t:list:7:ver"]]
    assert stage.listener.hears("inv:x:y", "order", "keys") == [["t:shop:x:y:order:3"]]
    assert stage.listener.hears("inv:*", "order", "keys") == [["t:shop:a:order:b:order:4"]]
    prefixes = stage.listener.hears("inv:*", "page", "prefixes")[0]
    assert set(prefixes) == {"t:page:7:", "t:page:x:y:", "t:page:a:order:b:"}


def test_a_sweep_and_what_takes_too_many_messages_are_told_as_one_sweep(stage: PublishStage) -> None:
    stage.run("INSERT INTO users SELECT n, 0 FROM generate_series(1, 1200) n")
    lists = stage.listener.hears("inv:users", "user", "keys")
    assert sorted(key for some in lists for key in some) == sorted(f"t:user:{n}" for n in range(1, 1201))
    assert max(map(len, lists)) == 500
    assert not stage.listener.on("inv:users", "user", "sweep")
    stage.run("TRUNCATE orders")
    assert stage.listener.hears("inv:*", "order", "sweep")
    with psycopg.connect(stage.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_logical_emit_message(true, 'cdc_invalidator', '{\"cache\": \"user\"}')")
    assert stage.listener.hears("inv:users", "user", "sweep")


def test_the_second_bust_is_told_again(stage: PublishStage) -> None:
    stage.run("INSERT INTO users VALUES (5, 0)")
    eventually(lambda: len(stage.listener.on("inv:late", "late", "keys")) == 2, "both busts are told")


def test_a_daemon_killed_between_a_bust_and_its_message_tells_it_after_its_next_start(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        Valkey() as valkey,
        redis.Redis.from_url(valkey.url) as client,
        resp.RespProxy(valkey.port) as proxy,
        staged(database, proxy.url, tmp_path, slot_name, client) as stage,
    ):
        stage.cache("t:user:1")
        proxy.fail_next(5, resp.LOADING, resp.named("PUBLISH"), times=5)
        execute(database, "INSERT INTO users VALUES (1, 0)")
        stage.daemon.seen("redis_unavailable", code="LOADING")
        stage.daemon.kill()
        assert not stage.cached("t:user:1")
        assert stage.listener.listen() == []
        stage.daemon.start()
        assert stage.listener.hears("inv:users", "user", "keys")[0] == ["t:user:1"]
        stage.settle()


def test_a_channel_that_the_acl_denies_holds_back_its_cache_only_until_it_is_granted(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        administrator: Any = client
        channels = ("&inv:late", "&inv:7", "&inv:[*]")
        administrator.execute_command("ACL", "SETUSER", "cdc", "on", ">pw", "~*", "resetchannels", *channels, "+@all")
        url = valkey.url.replace("redis://", "redis://cdc:pw@")

        class Started(PublishStage):
            def begin(self) -> None:
                self.listener = Listener(self.client)
                eventually(lambda: "late" in self.named(), "other caches are kept")

        execute(database, *SCHEMA)
        path = tmp_path / "rules.yaml"
        path.write_text(RULES)
        with Started.playing(database, url, path, slot_name, client=client) as stage:
            eventually(lambda: stage.daemon.status()["denied_caches"].keys() == {"user"}, "it is told")
            assert "PUBLISH" in stage.daemon.status()["denied_caches"]["user"]
            execute(database, "INSERT INTO users VALUES (1, 0)")
            assert ["t:late:1"] in stage.listener.hears("inv:late", "late", "keys")
            stage.passed()
            assert "user" not in stage.named()
            checked = command("check", postgres_dsn=database, redis_url=url, rules=path, slot=slot_name)
            assert "grant it +publish and &inv:users" in " ".join(checked.stdout.split())
            administrator.execute_command("ACL", "SETUSER", "cdc", "&inv:users")
            assert stage.listener.hears("inv:users", "user", "sweep")
            stage.settle()
            assert "user" in stage.named()
            checked = command("check", postgres_dsn=database, redis_url=url, rules=path, slot=slot_name)
            assert "&inv:users" not in checked.stdout


def test_in_a_cluster_a_listener_at_any_node_is_told(database: str, tmp_path: Path, slot_name: str) -> None:
    with Cluster() as cluster, contextlib.closing(cluster.client()) as client:
        execute(database, *SCHEMA)
        rules = tmp_path / "rules.yaml"
        rules.write_text(RULES)
        with RunningDaemon(dsn=database, redis_url=cluster.url, rules=rules, slot=slot_name) as daemon:
            daemon.ready()
            settled(database, client, slot_name)
            clients = [redis.Redis.from_url(node.url) for node in cluster.nodes]
            listeners = [Listener(each) for each in clients]
            execute(database, "INSERT INTO users VALUES (1, 0)", "INSERT INTO orders VALUES (1, '7', 0)")
            for listener in listeners:
                assert listener.hears("inv:users", "user", "keys") == [["t:user:1"]]
                assert listener.hears("inv:7", "order", "keys") == [["t:shop:7:order:1"]]
                listener.close()
            for each in clients:
                each.close()
