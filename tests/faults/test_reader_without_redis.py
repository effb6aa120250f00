"""Readers while Redis is stopped, frozen, or full: each read is answered, and in about the time of its load."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from proxy import Proxy
from readers import Loader, Reads, rules_file
from running import eventually

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import Breaker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CACHES = ("user", "page", "far", "both", "known")


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


class Rig:
    """A Valkey behind a proxy, and caches that give up on it after a fifth of a second."""

    def __init__(self, reads: Reads, valkey: Valkey, proxy: Proxy, rules: Path) -> None:
        self.valkey = valkey
        self.proxy = proxy
        self.registry = CollectorRegistry()
        self.breaker = Breaker(threshold=2, pause=0.5)
        client = {"socket_timeout": 0.2, "socket_connect_timeout": 0.2}
        url = f"redis://{HOST}:{proxy.port}/0"
        self.caches = reads.caches(rules, url, client=client, registry=self.registry, breaker=self.breaker)

    def bypasses(self, reason: str) -> float:
        name = "cdc_invalidator_reader_bypasses_total"
        samples = [sample for metric in self.registry.collect() for sample in metric.samples]
        return sum(each.value for each in samples if each.name == name and each.labels["reason"] == reason)

    def all_ways(self, load: Loader) -> list[Any]:
        caches = self.caches
        values = [caches[name].get(id=1, load=load) for name in CACHES]
        values += [caches[name].get_many([1, 2], load=load.many)[0] for name in CACHES]
        values.append(caches.at_least(1).user.get(id=1, load=load))
        values.append(caches.user.get(id=1, load=load, max_staleness=5.0))
        values.append(caches.user.using(early=1.0).get(id=1, load=load))
        return values


@pytest.fixture
def rig(reads: Reads, tmp_path: Path) -> Iterator[Rig]:
    with Valkey() as valkey, Proxy(valkey.port) as proxy:
        yield Rig(reads, valkey, proxy, rules_file(tmp_path))


@pytest.mark.parametrize("fault", ["stopped", "frozen", "deaf"])
def test_reads_go_on_without_redis_and_come_back_to_it(fault: str, rig: Rig) -> None:
    load = Loader({1: "Ada", 2: "Barbara"})
    assert rig.all_ways(load) == ["Ada"] * 13
    if fault == "stopped":
        rig.proxy.refuse()
    elif fault == "frozen":
        rig.valkey.pause()
    else:
        rig.proxy.go_deaf()
    load.rows[1] = "Grace"
    assert rig.all_ways(load) == ["Grace"] * 13
    assert rig.breaker.open
    assert rig.bypasses("redis_down") >= 2
    assert rig.bypasses("breaker_open") > 0
    assert rig.caches.user.invalidate(id=1) is False
    with rig.caches.user.writing(id=1) as write:
        assert write.set("new") is False
    assert rig.caches.user.warm([1, 2, 3], load=load) == 0
    rig.proxy.mend()
    if fault == "frozen":
        rig.valkey.resume()
    load.rows[1] = "Ada"  # what Redis has
    eventually(lambda: rig.caches.user.get(id=1, load=load) and not rig.breaker.open, "it is tried again")
    load.asked.clear()
    eventually(lambda: rig.caches.user.get(id=1, load=load) and not load.asked, "reads hit again")


def test_redis_goes_away_while_a_value_is_loaded(rig: Rig) -> None:
    load = Loader({1: "Ada", 2: "Barbara"}, before=rig.proxy.refuse)
    for name in CACHES:
        assert rig.caches[name].get(id=1, load=load) == "Ada"
        rig.proxy.mend()
        eventually(lambda: rig.caches.rate.get(id=1, load=Loader({1: 1})) and not rig.breaker.failures, "it is back")
        assert rig.caches[name].get_many([2], load=load.many) == ["Barbara"]
        rig.proxy.mend()
        eventually(lambda: rig.caches.rate.get(id=1, load=Loader({1: 1})) and not rig.breaker.failures, "it is back")
    assert len(load.asked) == 2 * len(CACHES), "nothing is loaded twice"


def test_a_redis_that_forgets_scripts_is_given_them_again(rig: Rig) -> None:
    load = Loader({1: "Ada", 2: "Barbara"})
    rig.all_ways(load)
    with redis.Redis.from_url(rig.valkey.url) as client:
        client.flushall()
        client.script_flush()
    load.asked.clear()
    rig.all_ways(load)
    assert [load.asked.count(1), rig.bypasses("redis_down"), rig.bypasses("refused")] == [len(CACHES) + 2, 0, 0], (
        "two find no watermark"
    )


def test_a_redis_without_memory_or_rights_fails_no_read(rig: Rig) -> None:
    load = Loader({1: "Ada", 2: "Barbara"})
    with redis.Redis.from_url(rig.valkey.url) as client:
        client.config_set("maxmemory", "1")
        assert rig.all_ways(load) == ["Ada"] * 13
        assert rig.bypasses("refused") > 0
        client.config_set("maxmemory", "0")
        rig.caches.page.get(id=1, load=load)
        client.execute_command("ACL", "SETUSER", "default", "-@scripting")
        assert rig.all_ways(load) == ["Ada"] * 13
        client.execute_command("ACL", "SETUSER", "default", "+@all", "-get", "-mget")
        assert rig.all_ways(load) == ["Ada"] * 13
        client.execute_command("ACL", "SETUSER", "default", "+@all")
        client.set("t:known:{1}\0lock", "x")
        client.unlink("t:known:{1}")
        client.hset("t:known:{1}", "not", "a string")
        assert rig.all_ways(load) == ["Ada"] * 13
    assert not rig.breaker.open, "Redis has answered"


def test_the_time_of_a_read_without_redis_is_that_of_its_load(rig: Rig, reads: Reads) -> None:
    load = Loader({1: "Ada"}, before=lambda: time.sleep(0.02))
    rig.valkey.pause()
    while not rig.breaker.open:
        rig.caches.user.get(id=1, load=load)
    loads, read = [], []
    for _ in range(30):
        started = time.perf_counter()
        load(1)
        loads.append(time.perf_counter() - started)
        started = time.perf_counter()
        rig.caches.user.get(id=1, load=load)
        read.append(time.perf_counter() - started)
    rig.valkey.resume()
    print(f"{reads.kind}: a read takes {statistics.median(read) / statistics.median(loads):.2f} times its load")
    assert rig.bypasses("breaker_open") >= 20
