"""Options that cost something or promise less: old values when loads fail, refreshes in the background, compression."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, assert_type

import pytest
import redis
import redis.asyncio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from readers import Face, Loader, Reads, rules_file

from cdc_invalidator.reader import AsyncCaches, Caches, testing
from cdc_invalidator.reader.background import WAITING, AsyncCrew, Crew
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{{{id}}}", ttl: 5m, negative_ttl: 1m}
  page: {key: "t:page:{{{id}}}:{version}", version: "t:page:{{{id}}}:ver", ttl: 5m}
  old: {key: "t:old:{{{id}}}", ttl: 5m, stale_for: 1m}
  olds: {key: "t:olds:{{{id}}}:{version}", version: "t:olds:{{{id}}}:ver", ttl: 5m, stale_for: 1m}
  rate: {key: "t:rate:{{{id}}}", ttl: 5m, ttl_only: true}
rules:
  - {name: user-changed, table: public.users, bust: [user, page, old, olds]}
"""
TTL, SAFE = 300, 600


class Broken(Exception):
    """The database is gone."""


class Place(NamedTuple):
    """Caches somewhere: ``bust(cache)`` is what the daemon does to the entry of 1, ``wait(seconds)`` lets time pass."""

    caches: Any
    bust: Callable[[str], None]
    wait: Callable[[float], None]
    counted: Callable[..., float]


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture(params=["memory", "redis"])
def place(
    request: pytest.FixtureRequest, reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> Place:
    registry = CollectorRegistry()
    rules = rules_file(tmp_path, RULES)

    def count(name: str, cache: str = "user") -> float:
        return registry.get_sample_value(f"cdc_invalidator_reader_{name}", {"cache": cache}) or 0.0

    if request.param == "memory":
        ahead = 0.0
        kind: Any = Caches if reads.kind == "sync" else AsyncCaches
        made = kind.in_memory(rules, clock=lambda: time.time() + ahead, registry=registry)

        def pass_by(seconds: float) -> None:
            nonlocal ahead
            ahead += seconds

        return Place(Face(reads, made), lambda name: testing.bust(made[name], id=1), pass_by, count)

    def bust(name: str) -> None:
        key, version = f"t:{name}:{{1}}".encode(), f"t:{name}:{{1}}:ver".encode()
        if name in {"page", "olds"}:
            before = redis_client.get(version)
            assert isinstance(before, bytes)
            redis_client.incr(version)
            if name == "olds":
                redis_client.set(version + STALE_SUFFIX, before, px=60_000)
            return
        redis_client.unlink(key + LOCK_SUFFIX)
        if name == "old" and redis_client.pexpire(key, 60_000):
            redis_client.rename(key, key + STALE_SUFFIX)
        redis_client.unlink(key)

    def wait(seconds: float) -> None:
        """Let entries be older by so much, instead."""
        for key in list(redis_client.scan_iter("t:*")):
            entry, left = redis_client.get(key), redis_client.pttl(key) - int(seconds * 1000)
            if not isinstance(entry, bytes):
                continue  # its time has come meanwhile
            if entry.startswith(b"cdc1"):
                word, schema, began, expires, rest = entry.split(b" ", 4)
                times = [b"%013d" % (int(each) - int(seconds * 1000)) for each in (began, expires)]
                entry = b" ".join([word, schema, *times, rest])
            if left > 0:
                redis_client.set(key, entry, px=left)
            else:
                redis_client.unlink(key)

    return Place(reads.caches(rules, redis_url, registry=registry), bust, wait, count)


def broken(**_: Any) -> Any:
    raise Broken


# ── Fail-safe ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["user", "page", "rate"])
def test_an_expired_value_is_served_while_loads_fail_for_so_long_and_not_longer(name: str, place: Place) -> None:
    cache = place.caches[name].using(fail_safe=SAFE)
    load = Loader({1: "Ada", 2: "Eve"})
    cache.get(id=1, load=load)
    place.wait(TTL - 10)
    assert cache.get(id=1, load=broken) == "Ada", "it is a hit"
    place.wait(20)
    assert cache.get(id=1, load=broken) == "Ada"
    assert cache.get_many([1], load=lambda _: broken()) == ["Ada"]
    with pytest.raises(Broken):
        cache.get_many([1, 2], load=lambda _: broken())
    assert place.counted("fail_safe_hits_total", name) == 2
    place.wait(SAFE - 20)
    assert cache.get(id=1, load=broken) == "Ada"
    place.wait(20)
    with pytest.raises(Broken):
        cache.get(id=1, load=broken)


@pytest.mark.parametrize("name", ["user", "page"])
def test_when_loads_work_an_expired_value_is_loaded_again(name: str, place: Place) -> None:
    cache = place.caches[name].using(fail_safe=SAFE)
    load = Loader({1: "Ada"})
    cache.get(id=1, load=load)
    place.wait(TTL + 10)
    load.rows[1] = "Grace"
    assert cache.get(id=1, load=load) == "Grace"
    assert cache.get(id=1, load=load) == "Grace"
    place.wait(TTL + 10)
    assert cache.warm([1], load=load) == 1
    assert load.asked == [1, 1, 1]


def test_readers_without_the_option_take_an_expired_value_for_none(place: Place) -> None:
    load = Loader({1: "Ada"})
    place.caches.user.using(fail_safe=SAFE).get(id=1, load=load)
    assert place.caches.user.get(id=1, load=load) == "Ada"
    place.wait(TTL + 10)
    load.rows[1] = "Grace"
    assert place.caches.user.get(id=1, load=load) == "Grace"
    assert load.asked == [1, 1]


@pytest.mark.parametrize("name", ["user", "page"])
@pytest.mark.parametrize("expired", [False, True])
def test_a_busted_value_is_never_served(name: str, expired: bool, place: Place) -> None:
    cache = place.caches[name].using(fail_safe=SAFE)
    cache.get(id=1, load=Loader({1: "Ada"}))
    if expired:
        place.wait(TTL + 10)
    place.bust(name)
    with pytest.raises(Broken):
        cache.get(id=1, load=broken)


@pytest.mark.parametrize("name", ["user", "page"])
def test_a_bust_while_the_load_fails_wins(name: str, place: Place) -> None:
    cache = place.caches[name].using(fail_safe=SAFE)
    cache.get(id=1, load=Loader({1: "Ada"}))
    place.wait(TTL + 10)

    def busted(**_: Any) -> Any:
        place.bust(name)
        raise Broken

    with pytest.raises(Broken):
        cache.get(id=1, load=busted)


@pytest.mark.parametrize("name", ["old", "olds"])
def test_a_busted_value_is_served_within_the_limit_of_the_rules(name: str, place: Place) -> None:
    cache = place.caches[name].using(fail_safe=SAFE)
    cache.get(id=1, load=Loader({1: "Ada"}))
    place.bust(name)
    place.wait(20)
    assert cache.get(id=1, load=broken) == "Ada"
    place.wait(20)  # for this long nobody is told any more that a load has failed
    with pytest.raises(Broken):
        place.caches[name].get(id=1, load=broken)
    place.wait(30)
    with pytest.raises(Broken):
        cache.get(id=1, load=broken)


def test_reads_that_ask_for_a_freshness_get_the_failure(place: Place) -> None:
    place.caches.user.using(fail_safe=SAFE).get(id=1, load=Loader({1: "Ada"}))
    place.wait(TTL + 10)
    with pytest.raises(Broken):
        place.caches.user.using(fail_safe=SAFE).get(id=1, load=broken, max_staleness=1e6)
    with pytest.raises(Broken):
        place.caches.user.using(fail_safe=SAFE, max_staleness=1e6).get(id=1, load=broken)
    with pytest.raises(Broken):
        place.caches.at_least(1).user.using(fail_safe=SAFE).get(id=1, load=broken)


def test_only_failures_that_are_named_count(place: Place) -> None:
    cache = place.caches.user.using(fail_safe=SAFE, fail_safe_on=(OSError,))
    cache.get(id=1, load=Loader({1: "Ada"}))
    place.wait(TTL + 10)
    with pytest.raises(Broken):
        cache.get(id=1, load=broken)


def test_a_missing_row_is_not_served_as_an_old_value(place: Place) -> None:
    cache = place.caches.user.using(fail_safe=SAFE)
    assert cache.get(id=1, load=Loader()) is None
    place.wait(70)
    with pytest.raises(Broken):
        cache.get(id=1, load=broken)


def test_the_staleness_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    cache = place.caches.user.using(fail_safe=SAFE)
    load = Loader({1: "Ada"})
    value, age, old = cache.get_with_age(id=1, load=load)
    assert (value, age, old) == ("Ada", 0, False)
    place.wait(100)
    value, age, old = cache.get_with_age(id=1, load=load)
    assert (value, old) == ("Ada", False)
    assert 100 <= age < 130
    place.wait(300)
    for _ in range(3):
        value, age, old = cache.get_with_age(id=1, load=broken)
        assert (value, old) == ("Ada", True)
        assert 400 <= age < 430
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["a load of cache user failed (Broken); old values are served"]


def test_readers_that_wait_for_a_load_that_fails_get_the_old_value_too(reads: Reads, place: Place) -> None:
    cache = place.caches.user.using(fail_safe=SAFE)
    cache.get(id=1, load=Loader({1: "Ada"}))
    place.wait(TTL + 10)
    barrier, loads, found = threading.Barrier(5), [], []

    def failing(**_: Any) -> Any:
        loads.append(1)
        time.sleep(0.2)  # the others come while it loads
        raise Broken

    def read() -> None:
        barrier.wait(30)
        found.append(cache.get(id=1, load=failing))

    readers = [threading.Thread(target=read) for _ in range(5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == ["Ada"] * 5
    assert len(loads) < 5


# ── Refreshes in the background ──────────────────────────────────────────────────────────────────────────────────────


def _finish(caches: Any) -> None:
    """Wait for what is refreshed in the background."""
    (caches.aclose if isinstance(caches._of, AsyncCaches) else caches.close)(30)


def _a_while(rows: dict[Any, Any]) -> Loader:
    """A loader that takes some time: the sooner its values are refreshed."""
    return Loader(rows, before=lambda: time.sleep(0.005))


def test_a_refresh_in_the_background_keeps_no_reader_waiting_and_is_stored(place: Place) -> None:
    cache = place.caches.user.using(early=1e9, background=True)
    load = _a_while({1: "Ada"})
    cache.get(id=1, load=load)
    go_on = threading.Event()
    load.rows[1], load.before = "Grace", lambda: _held(go_on)
    assert [cache.get(id=1, load=load) for _ in range(5)] == ["Ada"] * 5
    go_on.set()
    _finish(place.caches)
    assert load.asked == [1, 1], "one reader refreshes"
    assert place.caches.user.get(id=1, load=load) == "Grace"


def _held(event: threading.Event) -> None:
    assert event.wait(30)


def test_a_refresh_that_a_bust_overtakes_is_not_stored(place: Place) -> None:
    cache = place.caches.user.using(early=1e9, background=True)
    load = _a_while({1: "Ada"})
    cache.get(id=1, load=load)
    load.before = lambda: place.bust("user")
    assert cache.get(id=1, load=load) == "Ada"
    _finish(place.caches)
    load.rows[1], load.before = "Grace", lambda: None
    assert cache.get(id=1, load=load) == "Grace"


def test_a_refresh_that_fails_is_logged_and_nothing_else(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    cache = place.caches.user.using(early=1e9, background=True)
    cache.get(id=1, load=_a_while({1: "Ada"}))
    assert cache.get(id=1, load=broken) == "Ada"
    _finish(place.caches)
    assert "an early refresh of cache user failed" in caplog.text
    assert cache.get(id=1, load=broken) == "Ada"
    _finish(place.caches)


class Connection:
    """Looks like one of a driver, outside a transaction."""

    class info:  # noqa: N801  as the driver names it
        transaction_status = 0


def test_a_read_that_names_its_connection_refreshes_in_its_own_time(place: Place) -> None:
    cache = place.caches.user.using(early=1e9, background=True)
    load = _a_while({1: "Ada"})
    cache.get(id=1, load=load)
    assert cache.get(id=1, load=load, connection=Connection()) == "Ada"
    assert load.asked == [1, 1], "and is done when the read is"


def test_many_are_refreshed_in_the_background_too(place: Place) -> None:
    cache = place.caches.user.using(early=1e9, background=True)
    load = _a_while({1: "Ada", 2: "Eve"})
    cache.get_many([1, 2], load=load.many)
    load.rows = {1: "Grace", 2: "Joan"}
    assert cache.get_many([1, 2], load=load.many) == ["Ada", "Eve"]
    _finish(place.caches)
    assert place.caches.user.get_many([1, 2], load=load.many) == ["Grace", "Joan"]
    assert load.asked == [[1, 2]] * 2


def test_no_more_is_begun_than_fits_and_what_waits_too_long_is_dropped() -> None:
    crew, go_on, done = Crew(), threading.Event(), []

    def work() -> None:
        _held(go_on)
        done.append(1)

    taken = sum(crew.start(work) for _ in range(3 * WAITING))
    assert WAITING <= taken <= WAITING + 4
    crew.finish(0.01)
    go_on.set()
    crew.finish(30)
    assert len(done) <= 4


async def test_work_of_event_loops_that_are_gone_leaves_room_for_that_of_another() -> None:
    crew = AsyncCrew()

    async def left_alone() -> None:
        for _ in range(WAITING // 2):
            crew.start(asyncio.Event().wait)

    def gone() -> None:
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            loop.set_exception_handler(lambda *_: None)  # it says that tasks are left, which is meant
            loop.run_until_complete(left_alone())

    for _ in range(4):
        await asyncio.to_thread(gone)
        go_on = asyncio.Event()
        assert [crew.start(go_on.wait) for _ in range(WAITING)] == [True] * WAITING
        go_on.set()
        await crew.finish(30)


async def test_a_refresh_that_takes_too_long_is_cancelled_at_the_end_and_leaves_no_lease(
    redis_url: str, tmp_path: Path, redis_client: redis.Redis
) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    caches = AsyncCaches.from_rules(rules_file(tmp_path, RULES), client)
    cache = caches.user.using(early=1e9, background=True)

    async def load(id: int) -> str:  # noqa: A002  the parameter's name
        await asyncio.sleep(0.005)
        return "Ada"

    begun = asyncio.Event()

    async def slowly(id: int) -> str:  # noqa: A002  the parameter's name
        begun.set()
        await asyncio.sleep(60)
        return "never"

    await cache.get(id=1, load=load)
    assert await cache.get(id=1, load=slowly) == "Ada"
    gc.collect()  # the task is kept
    await asyncio.wait_for(begun.wait(), 30)
    await caches.aclose(0.01)
    assert not redis_client.exists(b"t:user:{1}" + LOCK_SUFFIX)
    await client.aclose()


# ── Refresh now ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["user", "page", "old"])
def test_refresh_loads_and_stores_whatever_is_there(name: str, place: Place) -> None:
    load = Loader({1: "Ada"})
    place.caches[name].get(id=1, load=load)
    load.rows[1] = "Grace"
    assert place.caches[name].refresh(id=1, load=load) == "Grace"
    assert place.caches[name].get(id=1, load=load) == "Grace"
    assert load.asked == [1, 1]


@pytest.mark.parametrize("name", ["user", "page"])
def test_a_bust_while_it_refreshes_wins(name: str, place: Place) -> None:
    load = Loader({1: "Ada"})
    place.caches[name].get(id=1, load=load)
    load.before = lambda: place.bust(name)
    assert place.caches[name].refresh(id=1, load=load) == "Ada"
    load.rows[1], load.before = "Grace", lambda: None
    assert place.caches[name].get(id=1, load=load) == "Grace"


def test_a_reader_that_began_before_a_refresh_does_not_store(place: Place) -> None:
    load = Loader({1: "Ada"})

    def refresh() -> None:
        load.before = lambda: None
        load.rows[1] = "Grace"
        place.caches.user.refresh(id=1, load=load)

    load.before = refresh
    assert place.caches.user.get(id=1, load=load) == "Ada"
    assert place.caches.user.get(id=1, load=load) == "Grace"


def test_refresh_loads_without_redis_and_without_a_key(reads: Reads, tmp_path: Path, place: Place) -> None:
    kind: Any = Caches if reads.kind == "sync" else AsyncCaches
    nowhere = Face(reads, kind.disabled(rules_file(tmp_path, RULES)))
    assert nowhere.user.refresh(id=1, load=Loader({1: "Ada"})) == "Ada"
    assert nowhere.user.get_with_age(id=1, load=Loader({1: "Ada"})) == ("Ada", 0, False)
    assert place.caches.user.refresh(id=None, load=Loader({None: "Ada"})) == "Ada"


# ── Decorated functions ──────────────────────────────────────────────────────────────────────────────────────────────


class Users:
    """A function and a method that are decorated, and their rows."""

    def __init__(self, caches: Caches) -> None:
        self.rows = {1: "Ada"}
        self.loads: list[int] = []

        class Table:
            @caches.user.cached(ignore=["table"])
            def load(table, id: int) -> str | None:  # noqa: A002, N805  self is the other one
                self.loads.append(id)
                return self.rows.get(id)

        @caches.user.cached(ignore=["session"])
        def load(session: str, id: int) -> str | None:  # noqa: A002  the parameter's name
            self.loads.append(id)
            return self.rows.get(id)

        self.load, self.table = load, Table


def test_a_decorated_function_invalidates_refreshes_and_loads(redis_url: str, tmp_path: Path) -> None:
    caches = Caches.from_rules(rules_file(tmp_path, RULES), redis.Redis.from_url(redis_url))
    users = Users(caches)
    load = users.load
    assert_type(load("session", 1), str | None)
    assert (load.__name__, type(load).__name__) == ("load", "function")
    assert load("session", id=1) == "Ada"
    users.rows[1] = "Grace"
    assert_type(load.invalidate("session", 1), bool)
    assert load("session", 1) == "Grace"
    assert users.loads == [1, 1]
    users.rows[1] = "Joan"
    assert_type(load.refresh("session", 1), str | None)
    assert load("session", 1) == "Joan"
    users.rows[1] = "Eve"
    assert assert_type(load.load("session", 1), str | None) == "Eve"
    assert load("session", 1) == "Joan"
    assert load.cache is not None
    caches.close()


def test_to_invalidate_arguments_that_are_no_parameters_may_be_left_out(redis_url: str, tmp_path: Path) -> None:
    caches = Caches.from_rules(rules_file(tmp_path, RULES), redis.Redis.from_url(redis_url))
    users = Users(caches)
    users.load("session", 1)
    assert users.load.invalidate(id=1)
    users.load("session", 1)
    assert users.loads == [1, 1]
    with pytest.raises(TypeError, match="the argument id is missing"):
        users.load.invalidate("session")
    caches.close()


def test_a_decorated_method_takes_its_object_first(redis_url: str, tmp_path: Path) -> None:
    caches = Caches.from_rules(rules_file(tmp_path, RULES), redis.Redis.from_url(redis_url))
    users = Users(caches)
    table = users.table()
    assert assert_type(table.load(1), str | None) == "Ada"
    users.rows[1] = "Grace"
    assert users.table.load.refresh(table, 1) == "Grace"
    assert table.load(1) == "Grace"
    assert users.table.load.invalidate(table, 1)
    assert table.load(1) == "Grace"
    assert users.loads == [1, 1, 1]
    caches.close()


async def test_so_does_a_decorated_coroutine_function(redis_url: str, tmp_path: Path) -> None:
    caches = AsyncCaches.from_rules(rules_file(tmp_path, RULES), redis.asyncio.Redis.from_url(redis_url))
    rows = {1: "Ada"}

    @caches.user.cached
    async def load(id: int) -> str | None:  # noqa: A002  the parameter's name
        return rows.get(id)

    assert inspect.iscoroutinefunction(load)
    assert assert_type(await load(1), str | None) == "Ada"
    rows[1] = "Grace"
    assert assert_type(await load.load(1), str | None) == "Grace"
    assert await load(1) == "Ada"
    assert assert_type(await load.refresh(1), str | None) == "Grace"
    rows[1] = "Joan"
    assert assert_type(await load.invalidate(1), bool)
    assert await load(1) == "Joan"
    await caches.aclose()


# ── Compression ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("fail_safe", [0, SAFE])
def test_large_values_are_compressed_and_everybody_reads_them(
    compression: str, fail_safe: float, reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    caches = reads.caches(rules_file(tmp_path, RULES), redis_url)
    cache = caches.user.using(compress_from=500, compression=compression, fail_safe=fail_safe)
    large, small = {"text": "all the same " * 1000}, {"text": "short"}
    load = Loader({1: large, 2: small})
    cache.get_many([1, 2], load=load.many)
    stored = [redis_client.strlen(b"t:user:{%d}" % number) for number in (1, 2)]
    assert stored[0] < 500
    entry = redis_client.get(b"t:user:{2}")
    assert isinstance(entry, bytes)
    assert b"short" in entry
    for reader in (cache, caches.user):
        assert [reader.get(id=number, load=broken) for number in (1, 2)] == [large, small]
        assert reader.get_many([1, 2], load=broken) == [large, small]


def test_what_does_not_shrink_is_stored_as_it_is(place: Place) -> None:
    text = "".join(chr(33 + 7 * at % 89) for at in range(20))
    assert place.caches.user.using(compress_from=0).get(id=1, load=Loader({1: text})) == text
    assert place.caches.user.get(id=1, load=broken) == text


def test_a_compressed_value_that_nobody_can_read_is_loaded_again(
    reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    caches = reads.caches(rules_file(tmp_path, RULES), redis_url)
    cache = caches.user.using(compress_from=1)
    load = Loader({1: "a" * 1000})
    cache.get(id=1, load=load)
    whole = redis_client.get(b"t:user:{1}")
    assert isinstance(whole, bytes)
    for broken_one in (whole[:-5], whole.replace(b"z", b"?", 1)):
        redis_client.set(b"t:user:{1}", broken_one, px=300_000)
        assert cache.get(id=1, load=load) == "a" * 1000
    assert load.asked == [1, 1, 1]


# ── Spans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def spans() -> tuple[Any, InMemorySpanExporter]:
    """A tracer, and what it exports."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("shop"), exporter


def _told(exporter: InMemorySpanExporter) -> list[tuple[str, dict[str, Any]]]:
    found = [(span.name, dict(span.attributes or {})) for span in exporter.get_finished_spans()]
    exporter.clear()
    return found


def test_each_read_is_a_span_that_says_what_became_of_it(
    reads: Reads, redis_url: str, tmp_path: Path, spans: tuple[Any, InMemorySpanExporter]
) -> None:
    tracer, exporter = spans
    caches = reads.caches(rules_file(tmp_path, RULES), redis_url, tracer=tracer)
    load = Loader({1: "Ada", 2: "Eve"})
    caches.user.get(id=1, load=load)
    caches.user.get(id=1, load=load)
    caches.user.get(id=None, load=load)
    caches.user.get_many([1, 2], load=load.many)
    cache = {"cdc.cache": "user"}
    assert _told(exporter) == [
        ("cache get", cache | {"cdc.outcome": "miss", "cdc.miss": 1}),
        ("cache get", cache | {"cdc.outcome": "hit", "cdc.hit": 1}),
        ("cache get", cache | {"cdc.outcome": "bypass", "cdc.bypass": 1, "cdc.reason": "null"}),
        ("cache get_many", cache | {"cdc.outcome": "miss", "cdc.hit": 1, "cdc.miss": 1}),
    ]


def test_a_span_tells_no_key_and_no_value(
    reads: Reads, redis_url: str, tmp_path: Path, spans: tuple[Any, InMemorySpanExporter]
) -> None:
    tracer, exporter = spans
    caches = reads.caches(rules_file(tmp_path, RULES), redis_url, tracer=tracer)

    def failing(**_: Any) -> Any:
        raise Broken("secret-1 of Ada")

    with pytest.raises(Broken):
        caches.user.get(id="secret-1", load=failing)
    (span,) = exporter.get_finished_spans()
    assert (span.attributes or {})["error.type"] == "Broken"
    assert not span.status.is_ok
    assert "secret" not in span.to_json()
    assert "Ada" not in span.to_json()


def test_a_read_in_a_loader_has_a_span_of_its_own(redis_url: str, tmp_path: Path, spans: Any) -> None:
    tracer, exporter = spans
    client = redis.Redis.from_url(redis_url)
    caches = Caches.from_rules(rules_file(tmp_path, RULES), client, tracer=tracer)
    inner = Loader({7: "Ada"})
    caches.user.get(id=1, load=lambda **_: caches.page.get(id=7, load=inner))
    first, second = exporter.get_finished_spans()
    assert (first.attributes["cdc.cache"], first.attributes["cdc.outcome"]) == ("page", "miss")
    assert (second.attributes["cdc.cache"], second.attributes["cdc.outcome"]) == ("user", "miss")
    assert first.parent.span_id == second.context.span_id
    caches.close()


def test_a_refresh_in_the_background_writes_into_no_span_that_is_over(
    reads: Reads, redis_url: str, tmp_path: Path, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracer, exporter = spans
    caches = reads.caches(rules_file(tmp_path, RULES), redis_url, tracer=tracer)
    cache = caches.user.using(early=1e9, background=True)
    cache.get(id=1, load=_a_while({1: "Ada"}))
    cache.get(id=1, load=_a_while({1: "Grace"}))
    _finish(caches)
    assert [told["cdc.outcome"] for _, told in _told(exporter)] == ["miss", "hit"]
    assert "ended span" not in caplog.text


def test_without_a_tracer_reads_run_the_code_of_ever(redis_url: str, tmp_path: Path, spans: Any) -> None:
    client = redis.Redis.from_url(redis_url)
    rules = rules_file(tmp_path, RULES)
    assert "get" not in vars(Caches.from_rules(rules, client).user)
    assert "get" in vars(Caches.from_rules(rules, client, tracer=spans[0]).user)
