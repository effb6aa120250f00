"""The reader on a cluster, whose slots move, and on a master that Sentinel names."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.sentinel
from clusters import Cluster, Node, slot_of
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, rules_file
from running import eventually
from sentinels import SERVICE, Sentinels

from cdc_invalidator.reader import Caches
from cdc_invalidator.redis import topology
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.agreement import Agreement, templates_digest
from cdc_invalidator.rules.load import parse_rules

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


# ── Reads that ask for a freshness ───────────────────────────────────────────────────────────────────────────────────

# Others than those whose hash slots have been moved.
KEYS = range(100, 130)
BUSTED = ("user", "page", "far", "both")


class Feed:
    """What the daemon writes on each node: the watermarks of its own connections to the cluster."""

    def __init__(self, url: str) -> None:
        self._url = url

    def write(self, lsn: int) -> None:
        async def writing() -> None:
            server = topology.cache_server(EndpointSource.fixed(self._url), "cdc_invalidator")
            await server.connect()
            await server.read_watermarks()
            mark = Watermark(lsn, int(time.time() * 1000), "7", 1, dict.fromkeys(BUSTED, "x"), agreement=SAID)
            assert await server.write_watermark(mark)
            await server.close()

        asyncio.run(writing())


SAID = Agreement({name: templates_digest(cache) for name, cache in parse_rules([("", RULES)], {}).caches.items()})


@pytest.fixture
def feed(cluster: Cluster, client: redis.RedisCluster) -> Feed:
    feed = Feed(cluster.url)
    feed.write(10)
    return feed


def served(caches: Any, name: str, lsn: int, *, many: bool = False) -> set[int]:
    """Give the numbers that are served from the cache to reads that ask for an LSN."""
    load = Loader({number: f"loaded {number}" for number in KEYS})
    view = caches.at_least(lsn)[name]
    values = view.get_many(KEYS, load=load.many) if many else [view.get(id=number, load=load) for number in KEYS]
    return {number for number, value in zip(KEYS, values, strict=True) if value != f"loaded {number}"}


def filled(caches: Any, name: str) -> None:
    caches[name].get_many(KEYS, load=lambda ids: [f"stored {number}" for number in ids])


@pytest.mark.parametrize("name", BUSTED)
def test_what_the_nodes_watermarks_prove_is_served(
    name: str, feed: Feed, caches: Any, client: redis.RedisCluster, registry: CollectorRegistry
) -> None:
    # The first read of a process is one that asks.
    assert served(caches, name, 10) == set()
    filled(caches, name)
    assert bypasses(registry) == {}
    client.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
    feed.write(10)
    filled(caches, name)
    assert served(caches, name, 10) == served(caches, name, 10, many=True) == set(KEYS)
    assert served(caches, name, 11) == served(caches, name, 11, many=True) == set()
    assert bypasses(registry) == {(name, "behind"): 2 * len(KEYS)}


@pytest.mark.parametrize("name", BUSTED)
def test_a_node_that_lags_proves_nothing_of_its_keys(
    name: str, cluster: Cluster, client: redis.RedisCluster, feed: Feed, caches: Any
) -> None:
    filled(caches, name)
    public = cluster.master_of("cdc:cdc_invalidator:watermark")
    lagging = next(node for node in cluster.masters() if node is not public)
    client.hset(_mark_of(lagging), "lsn", 9)
    theirs = {number for number in KEYS if cluster.master_of(f"t:{name}:{{{number}}}") is lagging}
    if name == "far":
        theirs = {number for number in KEYS if lagging in _nodes_of_far(cluster, client, number)}
    assert served(caches, name, 10) == served(caches, name, 10, many=True) == set(KEYS) - theirs
    assert 0 < len(theirs) <= len(KEYS)


def _nodes_of_far(cluster: Cluster, client: redis.RedisCluster, number: int) -> set[Any]:
    version = client.get("t:far:ver")
    assert isinstance(version, bytes)
    return {cluster.master_of("t:far:ver"), cluster.master_of(b"t:far:%d:%b" % (number, version))}


def test_a_key_that_has_moved_is_proven_when_the_daemon_has_seen_it(
    cluster: Cluster, feed: Feed, caches: Any, registry: CollectorRegistry
) -> None:
    filled(caches, "user")
    slot = slot_of(f"t:user:{{{KEYS[7]}}}")
    source = cluster.master_of_slot(slot)
    target = next(node for node in cluster.masters() if node is not source)
    cluster.move_slots(slot, slot, target)
    # The key may have been on a node that lost what it had, before it came here.
    moved = {number for number in KEYS if slot_of(f"t:user:{{{number}}}") == slot}
    for _ in range(2):  # also when the client has learned where the slot is now
        assert served(caches, "user", 10) == set(KEYS) - moved
    assert bypasses(registry)["user", "elsewhere"] == 2 * len(moved)
    feed.write(11)
    assert served(caches, "user", 11) == set(KEYS)


def test_a_watermark_that_has_moved_proves_nothing_elsewhere(cluster: Cluster, feed: Feed, caches: Any) -> None:
    filled(caches, "user")
    public = cluster.master_of("cdc:cdc_invalidator:watermark")
    others = [node for node in cluster.masters() if node is not public]
    # On the target, the watermark that comes is the one with the first tag.
    (source, mark), (target, _) = sorted(((node, _mark_of(node)) for node in others), key=lambda pair: pair[1])
    slot = next(slot_of(f"t:user:{{{at}}}") for at in KEYS if cluster.master_of(f"t:user:{{{at}}}") is source)
    for each in (slot_of(mark), slot):
        cluster.move_slots(each, each, target)
    assert target.ask("HGET", mark, "lsn") == b"10"
    # Between the two, the source may have been lost to a replica that lagged.
    moved = {at for at in KEYS if slot_of(f"t:user:{{{at}}}") == slot}
    for _ in range(2):
        assert not served(caches, "user", 10) & moved
    feed.write(11)
    eventually(lambda: served(caches, "user", 11) == set(KEYS), "the client has learned where all is")


def test_a_client_learns_that_only_a_watermark_has_moved(cluster: Cluster, feed: Feed, caches: Any) -> None:
    filled(caches, "user")
    assert served(caches, "user", 10) == set(KEYS)
    public = cluster.master_of("cdc:cdc_invalidator:watermark")
    source, target = (node for node in cluster.masters() if node is not public)
    slot = slot_of(_mark_of(source))
    assert slot not in {slot_of(f"t:user:{{{at}}}") for at in KEYS}
    cluster.move_slots(slot, slot, target)
    feed.write(11)
    eventually(lambda: served(caches, "user", 11) == set(KEYS), "no key tells of the move, and yet it is seen")


def _mark_of(node: Node) -> bytes:
    (mark,) = (key for key in node.ask("KEYS", "cdc:*") if b"watermark:{" in key)
    return bytes(mark)


def test_a_watermark_of_a_daemon_that_says_no_home_proves_nothing(cluster: Cluster, feed: Feed, caches: Any) -> None:
    filled(caches, "user")
    # A daemon of an earlier release has written all but `home`, which still stands.
    for node in cluster.masters():
        for mark in node.ask("KEYS", "cdc:*:watermark*"):
            node.ask("HINCRBY", mark, "at", 1000)
    assert served(caches, "user", 10) == set()


def test_a_replica_that_lagged_proves_nothing_of_what_it_has_not_had(tmp_path: Path) -> None:
    with Cluster() as cluster, Reads("sync") as reads:
        feed = Feed(cluster.url)
        feed.write(10)
        caches = reads.caches(rules_file(tmp_path, RULES), cluster.url)
        filled(caches, "user")
        public = cluster.master_of("cdc:cdc_invalidator:watermark")
        lost = next(node for node in cluster.masters() if node is not public)
        cluster.settle()
        replica = cluster.replica_of(lost)
        theirs = {number for number in KEYS if cluster.master_of(f"t:user:{{{number}}}") is lost}
        replica.pause()
        lost.ask("CLIENT", "KILL", "TYPE", "replica")
        bust(cluster, [b"t:user:{%d}" % number for number in KEYS], [])
        feed.write(11)
        cluster.kill(lost)
        replica.resume()
        cluster.failed_over(lost)
        # What was busted is there again, and no daemon is there to see it.
        assert theirs
        assert replica.ask("EXISTS", f"t:user:{{{min(theirs)}}}")

        def back() -> bool:
            load = Loader(dict.fromkeys(KEYS, "loaded"))
            return all(caches.user.get(id=number, load=load) == f"stored {number}" for number in theirs)

        eventually(back, "plain reads meet the old values")
        assert served(caches, "user", 11) & theirs == set()
        assert served(caches, "user", 11, many=True) & theirs == set()


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
