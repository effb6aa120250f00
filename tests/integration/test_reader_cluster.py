"""The reader on a cluster, whose slots move, and on a master that Sentinel names."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.sentinel
from clusters import Cluster, slot_of
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, rules_file
from running import eventually
from sentinels import SERVICE, Sentinels

from cdc_invalidator.reader import Caches
from cdc_invalidator.redis import topology
from cdc_invalidator.redis.source import EndpointSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CACHES = ("user", "page", "far", "both")
RULES = """
version: 1
caches:
  user: {key: "t:user:{{{id}}}", ttl: 5m}
  page: {key: "t:page:{{{id}}}:{version}", version: "t:page:{{{id}}}:ver", ttl: 5m}
  far: {key: "t:far:{id}:{version}", version: "t:far:ver", ttl: 5m}
  both: {key: "t:both:{{{id}}}:{version}", version: "t:both:{{{id}}}:ver", bump_over: 100, ttl: 5m}
  untagged: {key: "t:untagged:{id}", ttl: 5m}
  old: {key: "t:old:{{{id}}}", ttl: 5m, stale_for: 1m}
  old-page: {key: "t:old-page:{{{id}}}:{version}", version: "t:old-page:{{{id}}}:ver", ttl: 5m, stale_for: 1m}
rules: []
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(replicas=False) as cluster:
        yield cluster


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture
def client(cluster: Cluster) -> Iterator[redis.RedisCluster]:
    with contextlib.closing(cluster.client()) as client:
        client.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
        yield client


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def caches(
    cluster: Cluster, client: redis.RedisCluster, reads: Reads, tmp_path: Path, registry: CollectorRegistry
) -> Any:
    return reads.caches(rules_file(tmp_path, RULES), cluster.url, registry=registry)


def bust(cluster: Cluster, keys: list[bytes], versions: list[bytes], graces: dict[bytes, int] | None = None) -> None:
    """What the daemon does."""

    async def busting() -> None:
        server = topology.cache_server(EndpointSource.fixed(cluster.url), "slot")
        await server.connect()
        await server.bust([keys], dict.fromkeys(versions, 10_000), graces or {})
        await server.close()

    asyncio.run(busting())


def bypasses(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    return {
        (each.labels["cache"], each.labels["reason"]): each.value
        for each in samples
        if each.name == "cdc_invalidator_reader_bypasses_total"
    }


@pytest.mark.parametrize("name", CACHES)
def test_keys_on_all_nodes(name: str, cluster: Cluster, caches: Any, registry: CollectorRegistry) -> None:
    load = Loader({number: f"user {number}" for number in range(40)})
    for _ in range(2):
        for number in range(20):
            assert caches[name].get(id=number, load=load) == f"user {number}"
    assert load.asked == list(range(20))
    load.asked.clear()
    for _ in range(2):
        assert caches[name].get_many(range(40), load=load.many) == [f"user {number}" for number in range(40)]
    assert load.asked == [list(range(20, 40))]
    keys = [b"t:user:{%d}" % number for number in range(40)] if name == "user" else []
    versions = [b"t:far:ver"] if name == "far" else [b"t:%b:{%d}:ver" % (name.encode(), at) for at in range(40)]
    load.rows = {number: f"new {number}" for number in range(40)}
    bust(cluster, keys, [] if keys else versions)
    assert caches[name].get_many(range(40), load=load.many) == [f"new {number}" for number in range(40)]
    assert caches[name].get(id=7, load=load) == "new 7"
    assert caches[name].invalidate(id=7) is True
    load.rows[7] = "newest"
    assert caches[name].get(id=7, load=load) == "newest"
    with caches[name].writing(id=8) as write:
        assert write.set("written") is True
    assert caches[name].get(id=8, load=load) == "written"
    assert bypasses(registry) == {}
    with contextlib.closing(cluster.client()) as client:
        nodes: list[Any] = client.get_primaries()  # type: ignore[no-untyped-call]
        assert not [key for node in nodes for key in client.keys("*\0lock", target_nodes=node)]


@pytest.mark.parametrize("name", CACHES)
def test_a_load_that_a_bust_overtakes_is_not_kept(name: str, cluster: Cluster, caches: Any) -> None:
    keys = [b"t:user:{1}"] if name == "user" else []
    versions = [b"t:far:ver"] if name == "far" else [b"t:%b:{1}:ver" % name.encode()]
    load = Loader({1: "Ada"}, before=lambda: bust(cluster, keys, [] if keys else versions))
    assert caches[name].get(id=1, load=load) == "Ada"
    load.before, load.rows[1] = (lambda: None), "Grace"
    assert caches[name].get(id=1, load=load) == "Grace"


@pytest.mark.parametrize("name", ["old", "old-page"])
def test_the_old_value_is_shown_while_somebody_loads(
    name: str, cluster: Cluster, client: redis.RedisCluster, caches: Any
) -> None:
    load = Loader({1: "Ada"})
    caches[name].get(id=1, load=load)
    key = b"t:old:{1}" if name == "old" else b"t:old-page:{1}:ver"
    bust(cluster, [key] if name == "old" else [], [] if name == "old" else [key], {key: 60_000})
    lock = key
    if name == "old-page":
        version = client.get(key)
        assert isinstance(version, bytes)
        lock = b"t:old-page:{1}:" + version
    client.set(lock + b"\0lock", "somebody else")
    assert caches[name].get(id=1, load=load) == "Ada"
    assert load.asked == [1]
    assert client.get(key + b"\0stale") is not None


def test_slots_move_while_readers_read(cluster: Cluster, caches: Any) -> None:
    load = Loader({number: f"user {number}" for number in range(30)})
    for name in CACHES:
        caches[name].get_many(range(30), load=load.many)
    target = cluster.masters()[1]
    for slot in {slot_of(f"t:user:{{{number}}}") for number in range(30)}:
        if cluster.master_of_slot(slot) is not target:
            cluster.move_slots(slot, slot, target)
    for name in CACHES:
        for number in range(30):
            assert caches[name].get(id=number, load=load) == f"user {number}"
        assert caches[name].get_many(range(30), load=load.many) == [f"user {number}" for number in range(30)]


def test_a_cache_whose_locks_lie_elsewhere_is_refused(caches: Any) -> None:
    with pytest.raises(ValueError, match="a key of cache untagged and its lock lie in different slots"):
        _ = caches._of.untagged
    with pytest.raises(ValueError, match="a cluster has many"), caches.local("user"):
        pass


def test_a_master_that_sentinel_names(tmp_path: Path) -> None:
    with Sentinels() as sentinels:
        addresses = [("127.0.0.1", each.port) for each in sentinels.sentinels]
        found: Any = redis.sentinel.Sentinel(addresses, socket_timeout=5)  # type: ignore[no-untyped-call]
        client = found.master_for(SERVICE, socket_timeout=1)
        caches = Caches.from_rules(rules_file(tmp_path, RULES), client)
        load = Loader({1: "Ada"})
        for name in CACHES:
            assert caches[name].get(id=1, load=load) == caches[name].get(id=1, load=load) == "Ada"
        assert load.asked == [1] * len(CACHES)
        with caches.local("user"):
            sentinels.hold_back()
            sentinels.lose_master()
            assert caches.user.get(id=1, load=load) == "Ada"
            sentinels.promoted()

        def hits() -> bool:
            load.asked.clear()
            return caches.user.get(id=1, load=load) == "Ada" and not load.asked

        eventually(hits, "the new master is read from")
        client.close()
        for sentinel in found.sentinels:
            sentinel.close()
