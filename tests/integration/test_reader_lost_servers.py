"""A shard of a cluster is lost, or Sentinel names another master: what reads of the others, and of the old one, get."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.sentinel
import valkey
import valkey.asyncio.cluster
import valkey.asyncio.sentinel
import valkey.sentinel
from clusters import Cluster, slot_of
from prometheus_client import CollectorRegistry
from readers import Face, Loader, Reads, rules_file
from running import eventually
from sentinels import SERVICE, Sentinels

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.reader import AsyncCaches, Caches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{{{id}}}", ttl: 5m}
  page: {key: "t:page:{{{id}}}:{version}", version: "t:page:{{{id}}}:ver", ttl: 5m}
rules: []
"""
NUMBERS = range(60)
TIMEOUTS: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}
CLUSTERS: dict[tuple[str, str], Any] = {
    ("sync", "redis-py"): redis.RedisCluster,
    ("sync", "valkey-py"): valkey.ValkeyCluster,
    ("async", "redis-py"): redis.asyncio.cluster.RedisCluster,
    ("async", "valkey-py"): valkey.asyncio.cluster.ValkeyCluster,
}
SENTINELS: dict[tuple[str, str], Any] = {
    ("sync", "redis-py"): redis.sentinel.Sentinel,
    ("sync", "valkey-py"): valkey.sentinel.Sentinel,
    ("async", "redis-py"): redis.asyncio.sentinel.Sentinel,
    ("async", "valkey-py"): valkey.asyncio.sentinel.Sentinel,
}


@pytest.fixture
def shells() -> Iterator[dict[str, Reads]]:
    with Reads("sync") as waiting, Reads("async") as awaiting:
        yield {"sync": waiting, "async": awaiting}


def bypasses(registry: CollectorRegistry) -> dict[str, float]:
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    found: dict[str, float] = {}
    for each in samples:
        if each.name == "cdc_invalidator_reader_bypasses_total":
            reason = each.labels["reason"]
            found[reason] = found.get(reason, 0) + each.value
    return found


def over(reads: Reads, rules: Path, client: Any, **settings: Any) -> Any:
    kind = Caches if reads.kind == "sync" else AsyncCaches
    return Face(reads, kind.from_rules(rules, client, **settings))


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_shard_that_is_lost_costs_the_others_nothing(fault: str, shells: dict[str, Reads], tmp_path: Path) -> None:
    rules = rules_file(tmp_path, RULES)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(replicas=False, settings={"cluster-require-full-coverage": "no"}))
        lost = cluster.masters()[1]
        names = {"user": "t:user:{%d}", "page": "t:page:{%d}:ver"}
        dead = {name: [at for at in NUMBERS if cluster.master_of(key % at) is lost] for name, key in names.items()}
        programs = []
        load = Loader({number: f"user {number}" for number in NUMBERS})
        for (shell, _), make in CLUSTERS.items():
            client = _client(shells[shell], make, cluster.masters()[0].port)
            stack.callback(_close, shells[shell], client)
            registry = CollectorRegistry()
            caches = over(shells[shell], rules, client, registry=registry)
            for name in names:
                assert caches[name].get_many(NUMBERS, load=load.many) == [f"user {number}" for number in NUMBERS]
            programs.append((caches, registry))
        if fault == "killed":
            cluster.kill(lost)
        else:
            lost.pause()
        for caches, registry in programs:
            for name, gone in dead.items():
                load.asked.clear()
                began = time.monotonic()
                for number in NUMBERS:
                    assert caches[name].get(id=number, load=load) == f"user {number}"
                assert load.asked == gone, "the others are read from the cache"
                assert time.monotonic() - began < 5.0, "three times half a second, if it is frozen"
                load.asked.clear()
                assert caches[name].get_many(NUMBERS, load=load.many) == [f"user {number}" for number in NUMBERS]
                assert load.asked == [gone], "in one call"
            assert set(bypasses(registry)) == {"redis_down", "breaker_open"}
            healthy = next(number for number in NUMBERS if number not in dead["user"])
            assert caches.user.invalidate(id=healthy) is True
            assert caches.user.invalidate(id=dead["user"][0]) is False
            load.asked.clear()
            assert caches.user.warm([dead["user"][0], healthy], load=load) == 1, "a shard that is lost does not end it"
        if fault == "killed":
            lost.start()
        else:
            lost.resume()
        for caches, _ in programs:
            for name, gone in dead.items():

                def hits(caches: Any = caches, name: str = name, number: int = gone[0]) -> bool:
                    load.asked.clear()
                    return caches[name].get(id=number, load=load) == f"user {number}" and not load.asked

                eventually(hits, "it is read from again")


@pytest.fixture(scope="module")
def whole() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def test_two_reads_of_the_same_shards_do_not_wait_for_each_others_connection(whole: Cluster, tmp_path: Path) -> None:
    """Each had the only connection to what the other one needed next, for five seconds."""
    rules = rules_file(tmp_path, RULES)
    shards = whole.masters()[:2]
    pair = [next(n for n in NUMBERS if whole.master_of(f"t:user:{{{n}}}") is each) for each in shards]
    load = Loader({number: f"user {number}" for number in NUMBERS})

    async def reads() -> list[Any]:
        make = redis.asyncio.cluster.RedisCluster
        client = make(host=HOST, port=shards[0].port, max_connections=1, **TIMEOUTS)
        caches = AsyncCaches.from_rules(rules, client)
        assert await caches.user.get_many(pair, load=load.many)
        await caches.aclose()  # so each read connects first
        began = time.monotonic()
        found = await asyncio.gather(*(caches.user.get_many(each, load=load.many) for each in (pair, pair[::-1])))
        assert time.monotonic() - began < 4.0
        await client.aclose()
        return found

    assert asyncio.run(reads()) == [[f"user {n}" for n in pair], [f"user {n}" for n in pair[::-1]]]
    assert load.asked == [pair]


def test_connections_to_a_server_that_has_no_slots_any_more_are_closed(
    whole: Cluster, shells: dict[str, Reads], tmp_path: Path
) -> None:
    """Where servers come and go with new addresses, they would be as many as ever were."""
    rules = rules_file(tmp_path, RULES)
    old = whole.masters()[1]
    heir = whole.replica_of(old)
    number = next(n for n in NUMBERS if whole.master_of(f"t:user:{{{n}}}") is old)
    start = whole.masters()[0].port
    load = Loader({number: f"user {number}"})
    programs = []
    for kind, make in (("sync", redis.RedisCluster), ("async", redis.asyncio.cluster.RedisCluster)):
        client = _client(shells[kind], make, start)
        programs.append((kind, over(shells[kind], rules, client), client))
        assert programs[-1][1].user.get(id=number, load=load) == f"user {number}"
    heir.ask("CLUSTER", "FAILOVER")
    eventually(lambda: whole.master_of_slot(slot_of(f"t:user:{{{number}}}")) is heir, "the other one has the slots")
    for kind, caches, client in programs:
        way = caches._of._link._way if kind == "sync" else next(iter(caches._of._link._loops.values()))[0]
        assert way._at((HOST, old.port))._idle

        def left(caches: Any = caches, way: Any = way) -> bool:
            assert caches.user.get(id=number, load=load) == f"user {number}"
            return (HOST, old.port) not in way._servers

        eventually(left, "nothing is kept of the old one")
        _close(shells[kind], client)


def test_sentinel_names_another_master(shells: dict[str, Reads], tmp_path: Path) -> None:
    """The old one thinks that it is master for ten seconds more, and has what nobody busts any longer."""
    rules = rules_file(tmp_path, RULES)
    with Sentinels() as sentinels, contextlib.ExitStack() as stack:
        addresses = [(HOST, each.port) for each in sentinels.sentinels]
        programs = []
        load = Loader({1: "old"})
        for (shell, _), make in SENTINELS.items():
            reads = shells[shell]
            for local in (False, True):
                client = make(addresses, **TIMEOUTS).master_for(SERVICE, **TIMEOUTS)
                caches = over(reads, rules, client)
                if local:
                    stack.enter_context(caches.local("user"))
                    eventually(functools.partial(_kept, caches, load), "it is in the memory of the process")
                assert caches.user.get(id=1, load=load) == caches.page.get(id=1, load=load) == "old"
                programs.append(caches)
        sentinels.catch_up()
        sentinels.ask(sentinels.sentinels[0], "SENTINEL", "FAILOVER", SERVICE)
        new = sentinels.replica

        def named() -> bool:
            address = sentinels.ask(sentinels.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
            return bool(int(address[1]) == new.port)

        eventually(named, "the Sentinel that leads names the other")
        sentinels.ask(new, "FLUSHALL")
        load.rows[1] = "new"
        time.sleep(1.1)  # a read looks once a second
        for caches in programs:
            assert caches.user.get(id=1, load=load) == caches.page.get(id=1, load=load) == "new"
        assert sentinels.role(sentinels.master) == "master", "it would have served the old ones"


def _client(reads: Reads, make: Any, port: int) -> Any:
    async def made() -> Any:
        return make(host=HOST, port=port, **TIMEOUTS)

    return make(host=HOST, port=port, **TIMEOUTS) if reads.kind == "sync" else reads.wait(made())


def _close(reads: Reads, client: Any) -> None:
    reads.wait(client.close() if reads.kind == "sync" else client.aclose())


def _kept(caches: Any, load: Loader) -> bool:
    caches.user.get(id=1, load=load)
    return bool(len(next(iter(caches._of._link.locals.of.values()))))
