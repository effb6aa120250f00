"""The reader on a real Valkey, both shells by the same tests; a bust is what the daemon's own code sends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import decimal
import functools
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, left, rules_file

from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import ROWS, AsyncCaches, Caches, Unstorable
from cdc_invalidator.redis import server as cache
from cdc_invalidator.redis import topology
from cdc_invalidator.redis.source import EndpointSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSIONED = ("page", "far", "both")
CACHES = ("user", *VERSIONED)


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def caches(reads: Reads, redis_url: str, tmp_path: Path, registry: CollectorRegistry) -> Any:
    return reads.caches(rules_file(tmp_path), redis_url, registry=registry)


@pytest.fixture
def bust(redis_url: str) -> Any:
    """What the daemon does to a key, or to a version."""

    async def busting(keys: list[bytes], versions: list[bytes]) -> None:
        server: cache.CacheServer = topology.cache_server(EndpointSource.fixed(redis_url), "slot")
        await server.connect()
        await server.bust([keys] if keys else [], dict.fromkeys(versions, 10_000))
        await server.close()

    def bust(name: str, number: int = 1) -> None:
        keys = [] if name in VERSIONED else [b"t:%b:{%d}" % (name.encode(), number)]
        version = b"t:far:ver" if name == "far" else b"t:%b:{%d}:ver" % (name.encode(), number)
        asyncio.run(busting(keys, [] if keys else [version]))

    return bust


class Counts:
    """The reader's counters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def __call__(self, name: str, cache: str = "user", **labels: str) -> float:
        return self._registry.get_sample_value(f"cdc_invalidator_reader_{name}", {"cache": cache, **labels}) or 0.0


@pytest.fixture
def count(registry: CollectorRegistry) -> Counts:
    return Counts(registry)


# ── Read-through ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CACHES)
def test_a_value_is_loaded_once_and_then_read(name: str, caches: Any, count: Counts) -> None:
    load = Loader({1: {"name": "Ada"}})
    for _ in range(3):
        assert caches[name].get(id=1, load=load) == {"name": "Ada"}
    assert load.asked == [1]
    assert (count("misses_total", name), count("fills_total", name), count("hits_total", name)) == (1, 1, 2)
    assert count("load_seconds_count", name) == 1


@pytest.mark.parametrize("name", CACHES)
def test_after_a_bust_it_is_loaded_again(name: str, caches: Any, bust: Any) -> None:
    load = Loader({1: "Ada"})
    caches[name].get(id=1, load=load)
    load.rows[1] = "Grace"
    assert caches[name].get(id=1, load=load) == "Ada"
    bust(name)
    assert caches[name].get(id=1, load=load) == "Grace"
    assert caches[name].get(id=1, load=load) == "Grace"
    assert load.asked == [1, 1]


@pytest.mark.parametrize("name", CACHES)
def test_a_load_that_a_bust_overtakes_is_not_kept(name: str, caches: Any, bust: Any, count: Counts) -> None:
    load = Loader({1: "Ada"}, before=lambda: bust(name))
    assert caches[name].get(id=1, load=load) == "Ada", "it was so when it was asked"
    load.rows[1], load.before = "Grace", lambda: None
    assert caches[name].get(id=1, load=load) == "Grace"
    if name not in VERSIONED:
        assert count("dropped_fills_total", name) == 1


def test_the_key_of_a_cache_with_bump_over_goes_by_itself_too(
    caches: Any, redis_client: redis.Redis, count: Counts
) -> None:
    def delete_both() -> None:
        version = redis_client.get("t:both:{1}:ver")
        assert isinstance(version, bytes)
        key = b"t:both:{1}:" + version
        redis_client.unlink(key + b"\0lock", key)

    load = Loader({1: "Ada"}, before=delete_both)
    caches.both.get(id=1, load=load)
    assert count("dropped_fills_total", "both") == 1
    load.before = lambda: None
    caches.both.get(id=1, load=load)
    caches.both.get(id=1, load=load)
    assert load.asked == [1, 1]


def test_what_is_invalidated_is_not_shown_under_the_version_before_either(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    key, version = "t:both:{{{id}}}:{version}", "t:both:{{{id}}}:ver"
    cache = f'{{key: "{key}", version: "{version}", bump_over: 100, stale_for: 1m, ttl: 5m}}'
    both = reads.caches(rules_file(tmp_path, f"version: 1\ncaches:\n  both: {cache}\nrules: []\n"), redis_url).both
    load = Loader({1: "Ada"})
    both.get(id=1, load=load)
    # As a bump leaves it, after which the new value was stored, and others are loading that again.
    before = redis_client.get("t:both:{1}:ver")
    assert before is not None
    redis_client.set("t:both:{1}:ver\0stale", before, ex=60)
    redis_client.set("t:both:{1}:ver", b"%d" % (int(before) + 1))
    load.rows[1] = "Grace"
    assert both.get(id=1, load=load) == "Grace"
    load.rows[1] = "Eve"
    assert both.invalidate(id=1)
    redis_client.set(b"t:both:{1}:%d\0lock" % (int(before) + 1), "another:1", px=200)
    assert both.get(id=1, load=load) == "Eve"


def test_a_version_may_have_parameters_that_the_key_lacks(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    cache = '{key: "t:page:{id}:{version}", version: "t:tenant:{tenant}:ver", ttl: 5m}'
    page = reads.caches(rules_file(tmp_path, f"version: 1\ncaches:\n  page: {cache}\nrules: []\n"), redis_url).page
    items = [{"id": 1, "tenant": tenant} for tenant in ("a", "b", "c")]

    def load(asked: Any) -> list[str]:
        return [item["tenant"] for item in asked]

    for _ in range(2):
        assert page.get_many(items, load=load) == ["a", "b", "c"]
    assert len({redis_client.get(f"t:tenant:{each}:ver") for each in "abc"}) == 3


def test_entries_expire_within_ttl_and_jitter_and_locks_are_given_back(caches: Any, redis_client: redis.Redis) -> None:
    load = Loader(dict.fromkeys(range(20), "Ada"))
    for number in range(20):
        caches.user.get(id=number, load=load)
    times = [redis_client.pttl(f"t:user:{{{number}}}") for number in range(20)]
    assert all(300_000 - 60_000 < int(left) <= 330_000 for left in times)
    assert len(set(times)) > 10, "what was filled together does not expire together"
    assert not left(redis_client, "*\0lock")


def test_what_the_loader_raises_comes_out_and_the_lease_is_given_back(caches: Any, redis_client: redis.Redis) -> None:
    def fail(id: int) -> None:  # noqa: A002
        raise LookupError(id)

    for name in CACHES:
        with pytest.raises(LookupError):
            caches[name].get(id=1, load=fail)
    assert not left(redis_client, "*\0lock")
    assert caches.user.get(id=1, load=Loader({1: "Ada"})) == "Ada"


def test_nothing_is_remembered_only_where_the_rules_say_so(caches: Any, bust: Any, count: Counts) -> None:
    load = Loader()
    for name in ("user", "known"):
        assert [caches[name].get(id=1, load=load) for _ in range(3)] == [None] * 3
    assert len(load.asked) == 3 + 1
    assert count("negative_hits_total", "known") == 2
    load.rows[1] = "Ada"
    bust("known")
    assert caches.known.get(id=1, load=load) == "Ada"


def test_a_hot_key_that_expires_under_500_readers_is_loaded_once(
    reads: Reads, redis_url: str, tmp_path: Path, redis_client: redis.Redis
) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url).user.using(wait=100.0)
    load = Loader({1: "Ada"}, before=lambda: None)
    caches.get(id=1, load=load)
    redis_client.delete("t:user:{1}")
    got: list[Any] = []
    if reads.kind == "sync":
        load.before = lambda: time.sleep(0.3)
        threads = [threading.Thread(target=lambda: got.append(caches.get(id=1, load=load))) for _ in range(500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:

        async def slow(id: int) -> Any:  # noqa: A002
            value = load(id)
            await asyncio.sleep(0.3)
            return value

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(caches._of.get(id=1, load=slow) for _ in range(500)))

        got = reads.wait(all_at_once())
    assert got == ["Ada"] * 500
    assert load.asked == [1, 1], "the first time, and once for all 500"


def at_once(reads: Reads, caches: Any, count: int, load: Any, **params: Any) -> list[Any]:
    """Read a key of the cache `user` by many readers of one process, and give their values, or what they raised."""
    got: list[Any] = []
    if reads.kind == "sync":

        def read() -> None:
            try:
                got.append(caches.get(load=load, **params))
            except (LookupError, Unstorable) as error:
                got.append(error)

        threads = [threading.Thread(target=read) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return got

    async def loading(**given: Any) -> Any:
        return await asyncio.to_thread(load, **given)

    async def all_at_once() -> list[Any]:
        reading = (caches._of.get(load=loading, **params) for _ in range(count))
        return await asyncio.gather(*reading, return_exceptions=True)

    return list(reads.wait(all_at_once()))


class Bound:
    """A value that belongs to the session that loaded it."""


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("value", [None, {"price": decimal.Decimal("9.90"), "tags": {b"x"}}], ids=["no row", "decimal"])
def test_readers_of_what_is_not_stored_share_a_load(
    name: str, value: Any, reads: Reads, caches: Any, redis_client: redis.Redis
) -> None:
    load = Loader({1: value}, before=lambda: time.sleep(0.3))
    got = at_once(reads, caches[name].using(strict=False), 40, load, id=1)
    assert got == [value] * 40
    assert len(load.asked) <= 2, "a reader may come as the load ends"
    assert value is None or len({id(each) for each in got}) > 40 - len(load.asked), "each has a copy of its own"
    assert not left(redis_client, "*\0lock")


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("value", [None, {b"x"}], ids=["no row", "a set"])
def test_other_processes_do_not_load_one_after_the_other_what_is_not_stored(
    name: str, value: Any, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Readers share loads by their `Caches`, so each of these is a process."""
    rules = rules_file(tmp_path)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(redis.Redis.from_url(redis_url, socket_timeout=20)) for _ in range(5)]
        handles = [Caches.from_rules(rules, client)[name].using(strict=False, wait=20.0) for client in clients]
        load = Loader({1: value}, before=lambda: time.sleep(0.4))
        for handle in handles:
            handle.get(id=2, load=Loader({2: "Ada"}))
        started = time.monotonic()
        with ThreadPoolExecutor(len(handles)) as pool:
            got = list(pool.map(lambda handle: handle.get(id=1, load=load), handles))
        took = time.monotonic() - started
    assert got == [value] * 5
    assert took < 4 * 0.4, "one load, and then all others at the same time"
    assert not left(redis_client, "*\0lock")


def test_a_failure_is_shared_too(reads: Reads, caches: Any, redis_client: redis.Redis) -> None:
    asked = []

    def fail(id: int) -> None:  # noqa: A002
        asked.append(id)
        time.sleep(0.3)
        raise LookupError(id)

    got = at_once(reads, caches.user, 40, fail, id=1)
    assert [type(each) for each in got] == [LookupError] * 40
    assert len(asked) <= 2
    assert not left(redis_client, "*\0lock")
    assert caches.user.get(id=1, load=Loader({1: "Ada"})) == "Ada"


def test_what_can_not_be_copied_is_loaded_by_each_reader_at_the_same_time(reads: Reads, caches: Any) -> None:
    def load(id: int) -> Bound:  # noqa: A002
        time.sleep(0.3)
        return Bound()

    started = time.monotonic()
    got = at_once(reads, caches.user.using(strict=False), 8, load, id=1)
    assert len({id(each) for each in got}) == 8
    assert time.monotonic() - started < 5 * 0.3, "not one after the other"


def test_a_load_that_takes_longer_than_lease_and_wait_is_one_load_and_is_stored(
    reads: Reads, caches: Any, redis_client: redis.Redis, redis_url: str, tmp_path: Path, count: Counts
) -> None:
    """Another process sees the lease all the time, too."""
    other = Caches.from_rules(rules_file(tmp_path), redis.Redis.from_url(redis_url, socket_timeout=20))

    def before() -> None:
        reader.start()
        time.sleep(1.5)

    own, their = Loader({1: "Ada"}, before=before), Loader({1: "Ada"})
    reader = threading.Thread(target=lambda: other.user.using(wait=100.0).get(id=1, load=their))
    brief = caches.user.using(lease=0.4, wait=0.1)
    assert at_once(reads, brief, 40, own, id=1) == ["Ada"] * 40
    reader.join()
    assert (len(own.asked), their.asked) == (1, [])
    assert count("fills_total") == 1
    assert not left(redis_client, "*\0lock")


def test_a_value_that_a_bust_overtakes_is_not_given_to_readers_that_came_after_the_bust(
    reads: Reads, caches: Any, bust: Any
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def held_up() -> None:
        started.set()
        assert go_on.wait(60)

    load = Loader({1: "old"}, before=held_up)
    first = threading.Thread(target=lambda: caches.user.get(id=1, load=load))
    first.start()
    assert started.wait(60)
    load.rows[1] = "new"
    bust("user")
    load.before = lambda: None
    got: list[Any] = []
    second = threading.Thread(target=lambda: got.append(caches.user.get(id=1, load=load)))
    second.start()
    second.join(0.2)
    go_on.set()
    second.join()
    first.join()
    assert got == ["new"]


def test_a_write_that_takes_longer_than_the_lease_is_stored(caches: Any) -> None:
    with caches.user.using(lease=0.2).writing(id=1) as write:
        time.sleep(0.5)
        assert write.set("new") is True


def test_a_full_redis_keeps_no_lease(reads: Reads, tmp_path: Path) -> None:
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as direct:
        caches = reads.caches(rules_file(tmp_path), valkey.url)
        direct.config_set("maxmemory-policy", "noeviction")

        def fill_up() -> None:
            direct.config_set("maxmemory", 1)

        load = Loader({1: "Ada"}, before=fill_up)
        assert caches.user.get(id=1, load=load) == "Ada"
        assert not direct.keys("*")


async def test_a_read_that_is_cancelled_while_it_takes_the_lease_leaves_none(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url, socket_timeout=20) as client:
        caches = AsyncCaches.from_rules(rules_file(tmp_path), client)
        send, taken = caches._link.send, asyncio.Event()

        async def held_up(commands: Any) -> Any:
            replies = await send(commands)
            if redis_client.exists("t:user:{1}\0lock"):
                taken.set()
                await asyncio.sleep(1000)  # the answer is on its way
            return replies

        caches._link.send = held_up  # type: ignore[method-assign]
        reading = asyncio.create_task(caches.user.get(id=1, load=Loader({1: "Ada"})))
        await taken.wait()
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()
        assert not left(redis_client, "*\0lock")


def test_a_loader_that_reads_its_own_key_does_not_wait_for_itself(caches: Any, count: Counts) -> None:
    asked: list[str] = []

    def inner(id: int) -> str:  # noqa: A002
        asked.append("inner")
        return f"Ada {id}"

    def outer(id: int) -> str:  # noqa: A002
        asked.append("outer")
        return f"{caches.user.get(id=id, load=inner)} the first"

    began = time.monotonic()
    assert caches.user.get(id=1, load=outer) == "Ada 1 the first"
    assert time.monotonic() - began < 30, "it waited for itself, up to longest_load"
    assert asked == ["outer", "inner"]
    assert count("bypasses_total", "user", reason="nested") == 1


async def test_a_loader_that_awaits_its_own_key_in_another_task_does_not_wait_for_itself(
    redis_url: str, tmp_path: Path
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url, socket_timeout=20) as client:
        caches = AsyncCaches.from_rules(rules_file(tmp_path), client)

        async def inner(id: int) -> str:  # noqa: A002
            return f"Ada {id}"

        async def outer(id: int) -> str:  # noqa: A002
            (name,) = await asyncio.gather(caches.user.get(id=id, load=inner))
            return f"{name} the first"

        async with asyncio.timeout(30):
            assert await caches.user.get(id=1, load=outer) == "Ada 1 the first"


async def test_readers_of_a_load_that_is_cancelled_load_themselves(redis_url: str, tmp_path: Path) -> None:
    async with redis.asyncio.Redis.from_url(redis_url, socket_timeout=20) as client:
        caches = AsyncCaches.from_rules(rules_file(tmp_path), client)
        loaders: list[asyncio.Task[Any] | None] = []
        loading = asyncio.Event()

        async def load(id: int) -> str:  # noqa: A002
            loaders.append(asyncio.current_task())
            loading.set()
            await asyncio.sleep(1000 if len(loaders) == 1 else 0)
            return "Ada"

        tasks = [asyncio.create_task(caches.user.get(id=1, load=load)) for _ in range(20)]
        await loading.wait()
        # Whose look was answered first loads.
        (who,) = loaders
        assert who is not None
        who.cancel()
        assert await asyncio.gather(*(task for task in tasks if task is not who)) == ["Ada"] * 19
        assert len(loaders) == 2


@pytest.mark.parametrize("name", CACHES)
def test_who_waits_in_vain_loads_by_itself_and_stores_nothing(
    name: str, caches: Any, redis_client: redis.Redis, count: Counts
) -> None:
    version = b"1700000000000000"
    redis_client.set("t:far:ver" if name == "far" else f"t:{name}:{{1}}:ver", version)
    redis_client.set(
        {"user": b"t:user:{1}", "far": b"t:far:1:" + version}.get(name, b"t:%b:{1}:%b" % (name.encode(), version))
        + b"\0lock",
        "somebody else",
    )
    load = Loader({1: "Ada"})
    assert caches[name].using(wait=0.05).get(id=1, load=load) == "Ada"
    assert (count("waits_total", name), count("bypasses_total", name, reason="waited")) == (1, 1)
    assert count("fills_total", name) == 0
    assert len(left(redis_client, "*\0lock")) == 1


def test_who_waits_is_given_what_somebody_else_stores(
    caches: Any, reads: Reads, redis_url: str, tmp_path: Path
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(id: int) -> str:  # noqa: A002
        started.set()
        assert go_on.wait(60)
        return "Ada"

    other = Caches.from_rules(rules_file(tmp_path), redis.Redis.from_url(redis_url, socket_timeout=20))
    loader = threading.Thread(target=lambda: other.user.get(id=1, load=slow))
    loader.start()
    assert started.wait(60)
    threading.Timer(0.1, go_on.set).start()
    load = Loader({1: "not asked"})
    assert caches.user.using(wait=100.0).get(id=1, load=load) == "Ada"
    loader.join()
    assert load.asked == []


def test_another_schema_is_a_miss_and_so_is_what_nobody_can_read(caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({1: {"name": "Ada"}})
    caches.user.get(id=1, load=load)
    newer = caches.user.using(schema=2)
    assert newer.get(id=1, load=load) == newer.get(id=1, load=load) == {"name": "Ada"}
    assert load.asked == [1, 1]
    for foreign in (
        b'{"name": "an older program\'s"}',
        b"",
        b"cdc1 2 ",
        b"cdc1 2 0000000000000 0000000000000 0000000\n{",
    ):
        redis_client.set("t:user:{1}", foreign)
        assert newer.get(id=1, load=load) == newer.get(id=1, load=load) == {"name": "Ada"}
    assert load.asked == [1] * 6


def test_a_serializer_of_ones_own(caches: Any, redis_client: redis.Redis) -> None:
    class Text:
        def dumps(self, value: str, /) -> bytes:
            return value.encode("utf-16")

        def loads(self, data: bytes, /) -> str:
            return data.decode("utf-16")

    texts = caches.user.using(serializer=Text())
    load = Loader({1: "Ada"})
    assert texts.get(id=1, load=load) == texts.get(id=1, load=load) == "Ada"
    entry = redis_client.get("t:user:{1}")
    assert isinstance(entry, bytes)
    assert entry.endswith("Ada".encode("utf-16"))


@dataclasses.dataclass(frozen=True)
class User:
    id: int
    at: dt.datetime
    tags: frozenset[str] = frozenset()


ADA = User(1, dt.datetime(2026, 1, 1, tzinfo=dt.UTC), frozenset({"a"}))


@pytest.mark.parametrize("name", CACHES)
def test_values_of_a_type_come_back_as_what_was_stored(name: str, caches: Any) -> None:
    load = Loader({1: ADA, 2: ADA})
    users = caches[name].of(User)
    for _ in range(2):
        assert users.get(id=1, load=load) == ADA
        assert users.get_many([1, 2], load=load.many) == [ADA, ADA]
    assert load.asked == [1, [2]]


def test_rows_come_back_as_the_driver_gives_them(caches: Any) -> None:
    row = {"id": uuid.UUID(int=7), "at": ADA.at, "price": decimal.Decimal("9.90"), "data": b"x", "tags": ("a",)}
    load = Loader({1: row})
    rows = caches.user.using(serializer=ROWS)
    assert rows.get(id=1, load=load) == rows.get(id=1, load=load) == row
    assert load.asked == [1]


def test_an_entry_of_another_serializer_or_of_a_changed_type_is_a_miss(caches: Any, redis_client: redis.Redis) -> None:
    @dataclasses.dataclass(frozen=True)
    class Changed:
        id: int
        at: dt.datetime
        tags: frozenset[str] = frozenset()
        plan: str = "free"

    # The class of the next release has the name of this one.
    Changed.__qualname__ = User.__qualname__
    rows = [({"id": 1}, caches.user), (ADA, caches.user.of(User))]
    rows += [(Changed(1, ADA.at, plan="pro"), caches.user.of(Changed)), (ADA, caches.user.of(User))]
    for value, users in rows:
        load = Loader({1: value})
        assert users.get(id=1, load=load) == users.get(id=1, load=load) == value
        assert load.asked == [1]


def test_a_value_that_would_not_come_back_as_it_is_is_an_error_in_development(
    reads: Reads, caches: Any, redis_client: redis.Redis, count: Counts
) -> None:
    load = Loader({1: {"at": ADA.at}, 2: "Ada"}, before=lambda: time.sleep(0.3))
    wrong = r'a value of cache user .* at \[.at.\] a datetime would come back as a str\. Write `caches\["user"\]\.of'
    with pytest.raises(TypeError, match=wrong):
        caches.user.get(id=1, load=load)
    with pytest.raises(TypeError, match=wrong):
        caches.user.get_many([1, 2], load=load.many)
    with caches.user.writing(id=1) as write, pytest.raises(TypeError, match=wrong):
        write.set({"at": ADA.at})
    assert count("bypasses_total", reason="unserializable") == 3
    load.asked.clear()
    got = at_once(reads, caches.user, 20, load, id=1)
    assert {type(each) for each in got} == {Unstorable}
    assert len(load.asked) <= 2
    assert not left(redis_client), "no lease is left either"


def test_a_value_that_would_not_come_back_as_it_is_is_read_in_production(
    caches: Any, redis_client: redis.Redis, count: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    lenient = caches.user.using(strict=False)
    for _ in range(2):
        value = {"a set": {1, 2}}
        assert lenient.get(id=1, load=Loader({1: value})) is value
    assert count("bypasses_total", reason="unserializable") == 2
    assert not left(redis_client)
    assert [record.getMessage() for record in caplog.records] == [
        "values of cache user are not stored: a dict would not come back as it is; CDC_READER_STRICT=1 tells more"
    ]


def test_a_client_that_decodes_replies_does_as_well(reads: Reads, redis_url: str, tmp_path: Path) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url, client={"decode_responses": True})
    load = Loader({1: "Ada", 2: "Grace"})
    for name in CACHES:
        load.asked.clear()
        assert caches[name].get(id=1, load=load) == caches[name].get(id=1, load=load)
        assert caches[name].get_many([1, 2], load=load.many)[1] == "Grace"
        assert load.asked == [1, [2]]


@pytest.mark.parametrize("protocol", [2, 3])
def test_either_protocol(protocol: int, reads: Reads, redis_url: str, tmp_path: Path) -> None:
    caches = reads.caches(rules_file(tmp_path), redis_url, client={"protocol": protocol})
    load = Loader({1: "Ada"})
    for name in CACHES:
        load.asked.clear()
        assert caches[name].get(id=1, load=load) == caches[name].get(id=1, load=load) == "Ada"
        assert load.asked == [1]


@pytest.mark.parametrize("name", CACHES)
async def test_a_read_that_is_cancelled_while_it_loads_gives_the_lease_back(
    name: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url, socket_timeout=20) as client:
        caches = AsyncCaches.from_rules(rules_file(tmp_path), client)
        loading = asyncio.Event()

        async def never(id: int) -> None:  # noqa: A002
            loading.set()
            await asyncio.sleep(1000)

        reading = asyncio.create_task(caches[name].get(id=1, load=never))
        await loading.wait()
        assert len(left(redis_client, "*\0lock")) == 1
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()
        assert not left(redis_client, "*\0lock")


# ── Parameters ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_by_name_or_as_a_mapping(caches: Any) -> None:
    asked = []

    def load(**params: Any) -> Any:
        asked.append(params)
        return 1

    teams = caches.team_members
    assert teams.get(id=7, kind="all", load=load) == teams.get({"id": 7, "kind": "all"}, load=load) == 1
    assert asked == [{"id": 7, "kind": "all"}]
    with pytest.raises(TypeError, match="cache team-members has the parameters id, kind, and was given id"):
        teams.get(id=7, load=load)
    with pytest.raises(TypeError, match="was given id, kind, more"):
        teams.get(id=7, kind="all", more=1, load=load)


@pytest.mark.parametrize(("value", "reason"), [(None, "null"), ("a" * 513, "unbounded"), ("a\0b", "unprintable")])
def test_what_has_no_key_is_loaded_each_time(
    value: Any, reason: str, caches: Any, count: Counts, redis_client: redis.Redis
) -> None:
    load = Loader({value: "Ada"})
    assert [caches.user.get(id=value, load=load) for _ in range(2)] == ["Ada", "Ada"]
    assert caches.user.get_many([value, value], load=load.many) == ["Ada", "Ada"]
    assert count("bypasses_total", reason=reason) == 4
    assert not left(redis_client)


def test_no_more_keys_than_the_hint_allows(caches: Any, redis_client: redis.Redis, count: Counts) -> None:
    load = Loader({number: number for number in range(100)})
    assert [caches.few.get(id=number, load=load) for number in range(100)] == list(range(100))
    assert 10 <= len(redis_client.keys("t:few:*")) < 20
    assert count("bypasses_total", "few", reason="max_keys") > 80
    assert not left(redis_client, "*\0lock")


def test_an_unknown_cache_is_told_with_the_nearest(caches: Any) -> None:
    with pytest.raises(AttributeError, match="there is no cache usr; did you mean `user`"):
        _ = caches._of.usr
    with pytest.raises(KeyError, match="did you mean `team-members`"):
        _ = caches._of["team-member"]


# ── Many at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CACHES)
def test_many_are_one_look_and_one_load(name: str, caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({number: f"user {number}" for number in range(1, 8)})
    caches[name].get(id=2, load=load)
    load.asked.clear()
    got = caches[name].get_many([1, 2, 3, 2, 9], load=load.many)
    assert got == ["user 1", "user 2", "user 3", "user 2", None]
    assert load.asked == [[1, 3, 9]]
    assert caches[name].get_many([3, 2, 1], load=load.many) == ["user 3", "user 2", "user 1"]
    assert len(load.asked) == 1
    assert caches[name].get_many([], load=load.many) == []
    assert not left(redis_client, "*\0lock")


@pytest.mark.parametrize("name", CACHES)
def test_more_keys_than_one_script_asks_for_are_read_and_bust_like_few(
    name: str, caches: Any, bust: Any, redis_client: redis.Redis
) -> None:
    load = Loader({number: f"user {number}" for number in range(250)})
    assert caches[name].get_many(range(120), load=load.many) == [f"user {number}" for number in range(120)]
    cold = caches[name].using()
    for handle in (caches[name], cold):
        assert handle.get_many(range(250), load=load.many) == [f"user {number}" for number in range(250)]
    assert load.asked == [list(range(120)), list(range(120, 250))]
    load.rows = dict.fromkeys(range(250), "new")
    bust(name, 7)
    got = cold.get_many(range(250), load=load.many)
    assert [number for number, value in enumerate(got) if value == "new"] == (
        list(range(250)) if name == "far" else [7]
    )
    assert not left(redis_client, "*\0lock")


def test_many_of_a_cache_with_two_parameters_are_mappings(caches: Any) -> None:
    asked = []

    def load(items: list[dict[str, Any]]) -> list[str]:
        asked.append(items)
        return [f"{item['id']} {item['kind']}" for item in items]

    items = [{"id": 1, "kind": "all"}, {"id": 2, "kind": "all"}]
    assert caches.team_members.get_many(items, load=load) == ["1 all", "2 all"]
    assert caches.team_members.get_many(items, load=load) == ["1 all", "2 all"]
    assert asked == [items]
    with pytest.raises(TypeError, match="gives a list of values, in the same order"):
        caches.team_members.get_many([{"id": 3, "kind": "x"}], load=lambda _: {})
    with pytest.raises(TypeError, match="asked for 1 values gives as many"):
        caches.team_members.get_many([{"id": 3, "kind": "x"}], load=lambda _: [1, 2])
    with pytest.raises(TypeError, match="give mappings of them"):
        caches.team_members.get_many([3], load=load)


def test_an_answer_to_what_was_not_asked_is_refused_and_nothing_is_stored(
    caches: Any, redis_client: redis.Redis
) -> None:
    """Rows by UUID, asked for by text as it comes from a URL: none of them "does not exist"."""
    wanted = [uuid.uuid4() for _ in range(3)]
    rows = dict.fromkeys(wanted, "Ada")
    with pytest.raises(TypeError, match="asked for items of type str gives a mapping with a key of type UUID that"):
        caches.known.get_many([str(each) for each in wanted], load=lambda _: rows)
    assert not left(redis_client)
    with pytest.raises(TypeError, match="of type UUID that was not asked for; use the items as keys, as they were"):
        caches.known.get_many(wanted[:1], load=lambda _: rows)
    with pytest.raises(TypeError, match="asked for items of type NoneType gives a mapping with a key of type UUID"):
        caches.known.get_many([None], load=lambda _: rows)
    assert not left(redis_client)
    assert caches.known.get_many(wanted, load=lambda _: rows) == ["Ada"] * 3


def test_one_of_many_that_a_bust_overtakes_is_dropped_alone(caches: Any, bust: Any, count: Counts) -> None:
    load = Loader({1: "one", 2: "two"}, before=lambda: bust("user", 2))
    assert caches.user.get_many([1, 2], load=load.many) == ["one", "two"]
    assert (count("fills_total"), count("dropped_fills_total")) == (1, 1)


def test_one_of_many_that_somebody_else_loads_is_waited_for(
    caches: Any, redis_client: redis.Redis, count: Counts
) -> None:
    redis_client.set("t:user:{2}\0lock", "somebody else")
    load = Loader({1: "one", 2: "two"})
    assert caches.user.using(wait=0.05).get_many([1, 2], load=load.many) == ["one", "two"]
    assert load.asked == [[1], [2]]
    assert redis_client.exists("t:user:{1}", "t:user:{2}") == 1


# ── Decorator, warming, writing ──────────────────────────────────────────────────────────────────────────────────────


def test_a_decorated_function_reads_through(caches: Any, reads: Reads) -> None:
    asked = []

    def user(session: str, id: int = 1) -> str:  # noqa: A002
        """Load a user."""
        asked.append((session, id))
        return "Ada"

    read = caches._of.user.cached(ignore=["session"])(user)
    assert [reads.wait(read("a")), reads.wait(read("b", 1)), reads.wait(read("c", id=1))] == ["Ada"] * 3
    assert asked == [("a", 1)]
    assert read.__doc__ == "Load a user."
    with pytest.raises(TypeError, match="the argument session of user is no parameter of the cache"):
        caches._of.user.cached(user)
    with pytest.raises(TypeError, match="user has no argument kind"):
        caches._of.team_members.cached(user)

    @caches._of.user.cached(params={"id": "number"})  # type: ignore[untyped-decorator]
    def numbered(number: int) -> str:
        raise AssertionError(number)

    assert reads.wait(numbered(1)) == "Ada"


def test_methods_and_partial_functions_are_decorated_like_functions(caches: Any, reads: Reads) -> None:
    cached = caches._of.user.cached

    class Users:
        def of_self(self, id: int) -> str:  # noqa: A002
            return f"self {id}"

        def of_class(cls, id: int) -> str:  # noqa: A002, N805  it becomes a class method
            return f"class {id}"

        def of_none(id: int) -> str:  # type: ignore[misc]  # noqa: A002, N805  it becomes a static method
            return f"none {id}"

        plain = cached(ignore=["self"])(of_self)
        classy: Any = classmethod(cached(ignore=["cls"])(of_class))
        static = staticmethod(cached(of_none))

    def greet(greeting: str, id: int) -> str:  # noqa: A002
        return f"{greeting} {id}"

    users = Users()
    for _ in range(2):
        assert reads.wait(users.plain(1)) == "self 1"
        assert reads.wait(users.classy(id=2)) == reads.wait(Users.classy(2)) == "class 2"
        assert reads.wait(users.static(3)) == reads.wait(Users.static(3)) == "none 3"
    assert reads.wait(cached(ignore=["greeting"])(functools.partial(greet, "hello"))(4)) == "hello 4"


def test_functions_that_can_not_be_decorated_are_told(caches: Any) -> None:
    def of_class(cls: type, id: int) -> tuple[type, int]:  # noqa: A002
        return cls, id

    def more(id: int, *more: int) -> tuple[int, ...]:  # noqa: A002
        return id, *more

    cached = caches._of.user.cached
    with pytest.raises(TypeError, match="of_class is a class method; write @classmethod above `cached`, not below it"):
        cached(classmethod(of_class))
    no_id = "has no argument id, which is a parameter of the cache; name one so, or say by `params=` which"
    for function in (lambda *id: id, lambda **id: id, functools.partial(lambda number: number)):
        with pytest.raises(TypeError, match=no_id):
            cached(function)
    with pytest.raises(TypeError, match="the argument more of more is no parameter of the cache"):
        cached(more)


def test_a_coroutine_function_is_no_loader_of_the_shell_that_waits(redis_url: str, tmp_path: Path) -> None:
    async def load(id: int) -> str:  # noqa: A002
        raise AssertionError(id)

    with redis.Redis.from_url(redis_url) as client:
        users = Caches.from_rules(rules_file(tmp_path), client).user
        for read in (
            lambda: users.get(id=1, load=load),
            lambda: users.get_many([2], load=load),  # type: ignore[arg-type]
            lambda: users.warm([3], load=load),
            lambda: users.cached(load),
        ):
            with pytest.raises(TypeError, match="the loader is a coroutine function; read through AsyncCaches"):
                read()
        assert not left(client)


@pytest.mark.parametrize("name", CACHES)
def test_warming_loads_what_is_missing_up_to_a_limit_and_respects_leases(
    name: str, caches: Any, redis_client: redis.Redis
) -> None:
    load = Loader({number: number for number in range(10)})
    caches[name].get(id=1, load=load)
    load.asked.clear()
    assert caches[name].warm(range(10), load=load, rate=10_000, limit=3) == 3
    assert load.asked == [0, 2, 3]
    if name == "user":
        redis_client.set("t:user:{4}\0lock", "somebody else")
        assert caches.user.warm([4, 5, None], load=load, rate=10_000) == 1
        assert load.asked == [0, 2, 3, 5]


def test_warming_keeps_its_pace(caches: Any) -> None:
    load = Loader({number: number for number in range(5)})
    started = time.monotonic()
    assert caches.user.warm(range(5), load=load, rate=20) == 5
    assert time.monotonic() - started >= 5 / 20


@pytest.mark.parametrize("name", CACHES)
def test_a_writer_stores_what_it_has_committed(name: str, caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({1: "old"})
    with caches[name].writing(id=1) as write:
        assert write.set("new") is True
        assert write.set("newer") is False, "once"
    assert caches[name].get(id=1, load=load) == "new"
    assert load.asked == []
    assert not left(redis_client, "*\0lock")


@pytest.mark.parametrize("name", ["user", "both"])
def test_a_bust_between_the_commit_and_the_write_wins(
    name: str, caches: Any, bust: Any, redis_client: redis.Redis, count: Counts
) -> None:
    with caches[name].writing(id=1) as write:
        if name == "user":
            bust(name)
        else:
            redis_client.unlink(*left(redis_client, "*\0lock"))
        assert write.set("old by now") is False
    assert count("dropped_fills_total", name) == 1
    assert caches[name].get(id=1, load=Loader({1: "new"})) == "new"


def test_a_write_under_a_version_that_was_bumped_is_never_read(caches: Any, bust: Any) -> None:
    with caches.page.writing(id=1) as write:
        bust("page")
        write.set("old by now")
    assert caches.page.get(id=1, load=Loader({1: "new"})) == "new"


def test_a_reader_that_loads_while_somebody_writes_does_not_store(caches: Any, count: Counts) -> None:
    writing = contextlib.ExitStack()
    load = Loader({1: "old"}, before=lambda: writing.enter_context(caches.user.writing(id=1)) and None)
    assert caches.user.get(id=1, load=load) == "old"
    writing.close()
    assert count("dropped_fills_total") == 1


def test_a_writer_that_stores_nothing_gives_the_lease_back(caches: Any, redis_client: redis.Redis) -> None:
    with contextlib.suppress(LookupError), caches.user.writing(id=1):
        raise LookupError
    assert not left(redis_client, "*\0lock")


@pytest.mark.parametrize("name", CACHES)
def test_an_invalidation_by_the_application(name: str, caches: Any) -> None:
    load = Loader({1: "old"})
    assert caches[name].invalidate(id=1) is True, "nothing there is fine"
    caches[name].get(id=1, load=load)
    load.rows[1] = "new"
    assert caches[name].invalidate(id=1) is True
    assert caches[name].get(id=1, load=load) == "new"
    assert caches[name].invalidate(id=None) is False


# ── Versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", VERSIONED)
def test_a_version_that_is_evicted_never_comes_again(name: str, caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({1: "old"})
    caches[name].get(id=1, load=load)
    counter = "t:far:ver" if name == "far" else f"t:{name}:{{1}}:ver"
    before = redis_client.get(counter)
    redis_client.unlink(counter)
    load.rows[1] = "new"
    assert caches[name].get(id=1, load=load) == "new"
    after = redis_client.get(counter)
    assert isinstance(before, bytes)
    assert isinstance(after, bytes)
    assert int(after) > int(before)
    assert int(redis_client.pttl(counter)) > 29 * 86_400_000


def test_a_hit_of_a_version_that_is_remembered_is_one_command(caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({1: "Ada"})
    caches.page.get(id=1, load=load)
    before: Any = redis_client.info("commandstats")
    assert caches.page.get(id=1, load=load) == "Ada"
    after: Any = redis_client.info("commandstats")
    grown = {name for name in after if after[name] != before.get(name)}
    assert grown - {"cmdstat_info", "cmdstat_select", "cmdstat_client|setinfo", "cmdstat_hello"} == {"cmdstat_mget"}


# ── Early refresh ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CACHES)
def test_an_entry_that_is_nearly_over_is_refreshed_by_one_reader(
    name: str, reads: Reads, caches: Any, count: Counts
) -> None:
    load = Loader({1: "old"}, before=lambda: time.sleep(0.002))
    eager = caches[name].using(early=1e9)
    assert eager.get(id=1, load=load) == "old"
    load.rows[1] = "new"
    assert eager.get(id=1, load=load) == "new"
    assert count("early_refreshes_total", name) == 1

    def fail(id: int) -> None:  # noqa: A002
        raise LookupError(id)

    assert eager.get(id=1, load=fail) == "new", "a value is there"
    assert caches[name].using(early=1e-9).get(id=1, load=fail) == "new"
