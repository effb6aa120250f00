"""A cluster whose slots move and whose masters die, under writers and readers: nothing stale is left."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import reading
import redis
from clusters import SLOTS, Cluster, Node, slot_of
from running import RunningDaemon, eventually, execute, settled
from stage import Stage
from writing import assert_nothing_confirmed_too_early

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


class ClusterStage(Stage):
    """A daemon on a cluster that an application uses."""

    def __init__(self, daemon: RunningDaemon, cluster: Cluster, client: Any = None) -> None:
        super().__init__(daemon, client)
        self.cluster = cluster
        self.app = reading.Application(self.dsn, cluster.client, writers=2, readers=4, settle=self.settle)

    def end(self) -> None:
        """Judge nothing: tests do."""

    def connect(self) -> contextlib.closing[Any]:
        return contextlib.closing(self.cluster.client())

    def assert_nothing_stale(self) -> None:
        self.app.stop()
        self.settle()
        with self.connect() as client:
            assert reading.stale(self.dsn, client) == {}
            assert reading.entries(client) > 0
            assert_nothing_confirmed_too_early(self.dsn, client, self.daemon.slot)
        assert self.app.hits > 0
        assert self.app.refused >= 0
        assert not self.daemon.errors
        print(f"written {self.app.written}, read {self.app.reads}, hits {self.app.hits}, refused {self.app.refused}")


@pytest.fixture
def stage(database: str, cluster: Cluster, tmp_path: Path, slot_name: str) -> Iterator[ClusterStage]:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        contextlib.closing(cluster.client()) as client,
        ClusterStage.playing(database, cluster.url, rules, slot_name, cluster, client=client) as stage,
        stage.app,
    ):
        yield stage


def test_slots_move_while_busts_flow_and_then_a_master_dies(stage: ClusterStage) -> None:
    stage.app.run(1)
    target = stage.cluster.masters()[1]
    used = sorted({slot_of(f"t:{{{number}}}:count") for number in range(1, reading.ROWS + 1)})
    moving = [slot for slot in used if stage.cluster.master_of_slot(slot) is not target][:12]
    for slot in moving:
        stage.cluster.move_slots(slot, slot, target, pause=0.1)
    assert all(stage.cluster.master_of_slot(slot) is target for slot in moving)
    stage.app.run(1)
    stage.cluster.kill(target)
    stage.cluster.failed_over(target)
    stage.app.run(2)
    stage.assert_nothing_stale()


def test_a_master_fails_over_to_a_replica_that_has_not_had_the_last_busts(stage: ClusterStage) -> None:
    stage.app.run(1)
    victim = stage.cluster.masters()[0]
    replica = stage.cluster.replica_of(victim)
    with contextlib.closing(stage.cluster.client()) as client:
        settled(stage.dsn, client, stage.daemon.slot)
    replica.pause()
    # What is sent to a frozen process waits in the kernel: it would be read after all.
    victim.ask("CLIENT", "KILL", "TYPE", "replica")
    stage.app.run(2)
    busted = stage.daemon.metric("cdc_invalidator_busted_keys_total")
    assert busted > 0
    stage.cluster.kill(victim)
    replica.resume()
    stage.cluster.failed_over(victim)
    stage.app.run(1)
    stage.assert_nothing_stale()
    assert stage.daemon.named("gap", reason="redis_behind")
    assert not stage.daemon.named("bust", action="sweep", op="missed_changes")


def test_a_new_master_is_taken_in_and_nothing_is_swept_for_it(stage: ClusterStage) -> None:
    stage.app.run(0.5)
    before = stage.daemon.metric("cdc_invalidator_sweeps_total")
    newcomer = stage.cluster.add_master()
    stage.app.run(2.5)
    slot = slot_of("t:{7}:count")
    stage.cluster.move_slots(slot, slot, newcomer, pause=0.05)
    stage.app.run(1)
    stage.assert_nothing_stale()
    assert stage.daemon.metric("cdc_invalidator_sweeps_total") == before


def test_keys_of_a_slot_that_stays_open_are_busted_on_either_side(
    database: str, cluster: Cluster, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        RunningDaemon(dsn=database, redis_url=cluster.url, rules=rules, slot=slot_name) as daemon,
        contextlib.closing(cluster.client()) as client,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        here, there = "t:{7}:count", "t:{7}:ver"
        client.set(here, 0)
        client.set(there, 1)
        slot = slot_of(here)
        source = cluster.master_of_slot(slot)
        target = next(node for node in cluster.masters() if node is not source)
        cluster.open_slot(slot, target)
        cluster.move_key(there, target)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 7")
        settled(database, client, slot_name)
        assert source.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 0
        assert int(client.get(there)) > 1  # type: ignore[arg-type]
        # A sweep finds them on both sides as well.
        client.set(there, 1)
        execute(database, "TRUNCATE counters")
        settled(database, client, slot_name)
        assert int(client.get(there)) > 1  # type: ignore[arg-type]
        cluster.move_slots(slot, slot, target)


def test_a_node_of_a_cluster_under_a_plain_url_is_told_to_the_operator(
    database: str, cluster: Cluster, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    url = f"redis://127.0.0.1:{cluster.nodes[0].port}/0"
    with RunningDaemon(dsn=database, redis_url=url, rules=reading.rules_file(tmp_path), slot=slot_name) as daemon:
        # If the watermark lies on another node, nothing else is tried, and no slot is made.
        eventually(lambda: daemon.named("slot_waits_for_redis") or daemon.status().get("role") == "leader", "it began")
        execute(database, "UPDATE counters SET n = 1")
        (event, *_) = eventually(
            lambda: daemon.named("slot_waits_for_redis") or daemon.named("redis_unavailable", level="error"),
            "it is told",
        )
        assert event["level"] == "error"
        assert "redis+cluster://" in event["error"]
        assert event.get("code", "MOVED") in {"MOVED", "CROSSSLOT"}
        eventually(lambda: daemon.get("/readyz")[0] == 503, "it is not ready")


def test_keys_without_a_hash_tag_are_busted_and_the_operator_is_warned(
    database: str, cluster: Cluster, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    text = reading.RULES.replace('"t:{{{id}}}:count"', '"t:{id}:count"')
    # What nobody may change is not warned of.
    text = text.replace("caches:\n", "caches:\n  old: {key: 'old:{id}', ttl: 1m, given: true}\n")
    rules = reading.rules_file(tmp_path, text)
    with (
        RunningDaemon(dsn=database, redis_url=cluster.url, rules=rules, slot=slot_name) as daemon,
        contextlib.closing(cluster.client()) as client,
    ):
        daemon.ready()
        assert daemon.seen("no_hash_tag")["caches"] == ["count"]
        settled(database, client, slot_name)
        for number in range(1, 31):
            client.set(f"t:{number}:count", 0)
            client.set(f"t:{number}:count\0lock", "token")
        execute(database, "UPDATE counters SET n = n + 1 WHERE id <= 20")
        settled(database, client, slot_name)
        left = {number for number in range(1, 31) if client.exists(f"t:{number}:count")}
        locks = {number for number in range(1, 31) if client.exists(f"t:{number}:count\0lock")}
        assert left == locks == set(range(21, 31))
        execute(database, "TRUNCATE counters")
        settled(database, client, slot_name)
        assert not any(client.exists(f"t:{number}:count", f"t:{number}:count\0lock") for number in left)


def test_while_a_shard_is_down_the_watermark_stands_and_afterwards_goes_on(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    with (
        Cluster(replicas=False) as cluster,
        RunningDaemon(
            dsn=database, redis_url=cluster.url, rules=reading.rules_file(tmp_path), slot=slot_name
        ) as daemon,
        contextlib.closing(cluster.client()) as client,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        victim = cluster.master_of("t:{7}:count")
        client.set("t:{7}:count", 0)
        victim.pause()
        execute(database, "UPDATE counters SET n = 1 WHERE id = 7")
        daemon.seen("redis_unavailable")
        victim.resume()
        eventually(lambda: not _exists(client, "t:{7}:count"), "it is busted when the shard is back")
        settled(database, client, slot_name)


def test_a_node_that_is_in_no_cluster_yet_is_waited_for(database: str, tmp_path: Path, slot_name: str) -> None:
    reading.create(database)
    with (
        Node() as node,
        RunningDaemon(
            dsn=database,
            redis_url=f"redis+cluster://{HOST}:{node.port}",
            rules=reading.rules_file(tmp_path),
            slot=slot_name,
        ) as daemon,
    ):
        waits = daemon.seen("slot_waits_for_redis")
        assert "The cluster serves not all slots" in waits["error"]
        assert daemon.alive()
        node.ask("CLUSTER", "ADDSLOTS", *range(SLOTS))
        eventually(node.is_well, "it is a cluster of one")
        daemon.ready()
        with redis.Redis.from_url(node.url) as client:
            settled(database, client, slot_name)
            client.set("t:{7}:count", 0)
            execute(database, "UPDATE counters SET n = 1 WHERE id = 7")
            settled(database, client, slot_name)
            assert not client.exists("t:{7}:count")
            assert_nothing_confirmed_too_early(database, client, slot_name)
        assert not daemon.errors


def test_what_a_node_refuses_while_it_is_watched_is_told_under_its_own_name(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with Node() as node:
        node.ask("CLUSTER", "ADDSLOTS", *range(SLOTS))
        eventually(node.is_well, "it is a cluster of one")
        node.ask("ACL", "SETUSER", "app", "on", "nopass", "~*", "+@all")
        url = f"redis+cluster://app:any@{HOST}:{node.port}"
        with (
            RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name) as daemon,
            redis.Redis.from_url(node.url) as client,
        ):
            daemon.ready()
            settled(database, client, slot_name)
            node.ask("ACL", "SETUSER", "app", "-cluster")
            lost = daemon.seen("redis_unavailable")
            assert (lost["code"], lost["level"]) == ("NOPERM", "error")
            node.ask("ACL", "SETUSER", "app", "+cluster")
            execute(database, "UPDATE counters SET n = 1 WHERE id = 7")
            settled(database, client, slot_name)


def _exists(client: Any, key: str) -> bool:
    try:
        return bool(client.exists(key))
    except Exception:  # noqa: BLE001  the cluster is not whole yet
        return True


async def test_a_probe_asks_each_master_for_a_write(cluster: Cluster) -> None:
    server = cache_server(EndpointSource.fixed(cluster.url), "slot")
    await server.connect()
    await server.probe()
    for node in server.nodes:
        (stats,) = await node.ask(("INFO", "commandstats"))
        assert b"cmdstat_unlink:calls=1," in stats
    server.scripts.read_only = True
    await server.probe()
    await server.close()
