"""Entries in the process's own memory: Redis's messages take them out, and silence does as well."""

from __future__ import annotations

import os
import signal
import threading
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
from cdc_invalidator.reader import tracking

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


class Hits:
    """Reads of one key that the process's memory answered."""

    def __init__(self, caches: Any, registry: CollectorRegistry) -> None:
        self._caches = caches
        self._registry = registry

    def count(self) -> float:
        name = "cdc_invalidator_reader_l1_hits_total"
        return self._registry.get_sample_value(name, {"cache": "user"}) or 0.0

    def read(self, load: Loader) -> tuple[Any, bool]:
        """Read it, and tell whether that was from memory."""
        before = self.count()
        return self._caches.user.get(id=1, load=load), self.count() > before


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.mark.parametrize("decode", [False, True])
def test_a_change_in_redis_reaches_the_memory_of_the_process(
    decode: bool,
    reads: Reads,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
    registry: CollectorRegistry,
) -> None:
    client = {"decode_responses": decode}
    caches = reads.caches(rules_file(tmp_path), redis_url, client=client, registry=registry)
    hits = Hits(caches, registry)
    load = Loader({1: "Ada"})
    with caches.local("user", "known"):
        for name in ("Ada", "Grace", "Barbara"):
            load.rows[1] = name
            redis_client.unlink("t:user:{1}\0lock", "t:user:{1}")
            eventually(lambda: hits.read(load) == (load.rows[1], True), "it is kept, and gone when it is busted")
        redis_client.flushall()
        load.rows[1] = "after a flush"
        eventually(lambda: hits.read(load)[0] == "after a flush", "a flush empties it")
        eventually(lambda: hits.read(load)[1], "it is kept again")
        assert caches.user.get(id=1, load=load, max_staleness=0.0) == "after a flush", "that asks Redis"
    assert not hits.read(load)[1]


def test_a_value_that_was_asked_for_before_a_bust_is_not_kept_after_it(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path, registry: CollectorRegistry
) -> None:
    class Slow:
        """What is decoded is what Redis gave: here, the bust comes between that and the keeping."""

        busting = False

        def dumps(self, value: str, /) -> bytes:
            return value.encode()

        def loads(self, data: bytes, /) -> str:
            if self.busting:
                self.busting = False
                redis_client.unlink("t:user:{1}\0lock", "t:user:{1}")
                if reads.kind == "sync":
                    time.sleep(0.2)  # long enough that the message comes first, as a rule
            return data.decode()

    slow = Slow()
    caches = reads.caches(rules_file(tmp_path), redis_url, registry=registry)
    users = caches.user.using(serializer=slow)
    load = Loader({1: "Ada"})
    with caches.local("user"):
        for round_ in range(5):
            eventually(lambda: users.get(id=1, load=load) == load.rows[1], "a value is there")
            redis_client.set("another key", 1)
            slow.busting = True
            before = len(load.asked)
            load.rows[1] = f"Grace {round_}"
            eventually(lambda: users.get(id=1, load=load) == load.rows[1], "the old one is not kept")
            assert len(load.asked) > before


def test_when_the_messages_stop_nothing_is_served_from_memory(
    reads: Reads, tmp_path: Path, registry: CollectorRegistry
) -> None:
    with Valkey() as valkey, Proxy(valkey.port) as proxy, redis.Redis.from_url(valkey.url) as direct:
        url = f"redis://{HOST}:{proxy.port}/0"
        caches = reads.caches(rules_file(tmp_path), url, client={"socket_timeout": 1.0}, registry=registry)
        hits = Hits(caches, registry)
        load = Loader({1: "Ada"})
        with caches.local("user"):
            eventually(lambda: hits.read(load)[1], "it is kept")
            proxy.stall()
            direct.unlink("t:user:{1}")
            load.rows[1] = "Grace"
            # At most two seconds later, by the clock of the reader, not by that of the test.
            eventually(lambda: hits.read(load) == ("Grace", False), "silence is noticed")
            proxy.mend()
            eventually(lambda: hits.read(load) == ("Grace", True), "it is kept again")
            proxy.cut()
            proxy.refuse()
            direct.unlink("t:user:{1}")
            load.rows[1] = "Barbara"
            eventually(lambda: hits.read(load) == ("Barbara", False), "the end of the connection is noticed")
            proxy.mend()
            eventually(lambda: hits.read(load) == ("Barbara", True), "it is kept again")


@pytest.mark.parametrize("how", ["invalidate", "set", "not set"])
def test_a_process_does_not_read_from_memory_what_it_has_just_changed(
    how: str,
    reads: Reads,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url, registry=registry)
    hits = Hits(caches, registry)
    load = Loader({1: "old"})
    # Redis's messages come late, so they can't be what takes the old value out.
    monkeypatch.setattr(tracking, "_keys", lambda _message: [])
    with caches.local("user"):
        eventually(lambda: hits.read(load) == ("old", True), "it is kept")
        load.rows[1] = "new"
        if how == "invalidate":
            assert caches.user.invalidate(id=1) is True
        else:
            with caches.user.writing(id=1) as write:
                if how == "set":
                    assert write.set("new") is True
                else:
                    redis_client.unlink("t:user:{1}")
        assert hits.read(load) == ("new", False)


def test_many_are_read_from_memory_and_kept_there(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path, registry: CollectorRegistry
) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url, registry=registry)
    hits = Hits(caches, registry)
    load = Loader({number: f"user {number}" for number in range(1, 6)})

    def read(*numbers: int) -> float:
        before = hits.count()
        assert caches.user.get_many(numbers, load=load.many) == [load.rows.get(number) for number in numbers]
        return hits.count() - before

    with caches.local("user"):
        eventually(lambda: hits.read(load)[1], "it is kept")
        assert read(1, 2, 3, 1) == 1
        eventually(lambda: read(1, 2, 3, 1) == 3, "what a look has found is kept")
        assert read(1, 2, 3, 4) == 3
        load.rows[2] = "Grace"
        assert caches.user.invalidate(id=2) is True
        assert read(1, 2, 3) == 2
        assert caches.user.get_many([3], load=load.many, max_staleness=0.0) == ["user 3"]
    assert read(1, 2, 3) == 0


def test_the_end_of_one_local_leaves_the_others_as_they_are(
    reads: Reads, redis_url: str, tmp_path: Path, registry: CollectorRegistry
) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url, registry=registry)
    hits = Hits(caches, registry)
    load = Loader({1: "Ada"})
    with caches.local("user"):
        eventually(lambda: hits.read(load)[1], "it is kept")
        with caches.local("known"):
            assert hits.read(load)[1], "another cache's does not replace it"
        with caches.local("user", "known"):
            eventually(lambda: hits.read(load)[1], "the inner one keeps it too")
            assert caches.user.invalidate(id=1) is True
            load.rows[1] = "Grace"
        assert hits.read(load) == ("Grace", False)
        eventually(lambda: hits.read(load)[1], "it is kept again")
    assert not hits.read(load)[1]


def test_an_old_value_that_is_served_for_a_while_is_not_kept(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path, registry: CollectorRegistry
) -> None:
    rules = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m, stale_for: 1m}
rules: []
"""
    caches = reads.caches(rules_file(tmp_path, rules), redis_url, registry=registry)
    hits = Hits(caches, registry)
    load = Loader({1: "old"})
    with caches.local("user"):
        eventually(lambda: hits.read(load)[1], "it is kept")
        redis_client.rename("t:user:1", "t:user:1\0stale")
        redis_client.set("t:user:1\0lock", "somebody else")
        load.rows[1] = "new"
        eventually(lambda: not hits.read(load)[1], "the message is there")
        assert caches.user.get_many([1], load=load.many) == ["old"]
        redis_client.unlink("t:user:1\0lock", "t:user:1\0stale")
        assert caches.user.get_many([1], load=load.many) == ["new"]


def test_local_ends_whatever_its_connection_is_doing(reads: Reads, redis_url: str, tmp_path: Path) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url)
    for pause in range(30):
        with caches.local("user"):
            time.sleep(pause / 10_000)


def test_what_can_not_be_kept_is_told(reads: Reads, redis_url: str, tmp_path: Path) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url)
    with pytest.raises(ValueError, match="cache page has a version"), caches.local("page"):
        pass


def test_a_process_that_is_forked_while_a_message_is_taken_reads_from_redis(
    redis_url: str, tmp_path: Path, registry: CollectorRegistry
) -> None:
    """A thread of the parent had the lock, and gives it back in the parent alone."""
    with Reads("sync") as reads:
        caches = reads.caches(rules_file(tmp_path), redis_url, registry=registry)
        hits, load = Hits(caches, registry), Loader({1: "Ada"})
        with caches.local("user"):
            eventually(lambda: hits.read(load) == ("Ada", True), "it is kept")
            memory = caches._of._link.locals.of["user"]
            foreign = [b"foreign"] * 5_000_000
            taking = threading.Thread(target=memory.invalidate, args=[foreign])
            taking.start()
            while not memory._lock.locked():
                pass
            child = os.fork()
            if not child:
                signal.alarm(20)
                os._exit(0 if hits.read(load) == ("Ada", False) else 1)
            taking.join()
            assert os.waitpid(child, 0)[1] == 0
            eventually(lambda: hits.read(load) == ("Ada", True), "the parent has its memory still")
