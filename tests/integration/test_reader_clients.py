"""Clients of all kinds, as people build them: redis-py's and valkey-py's, with time-outs and without, in many loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
import redis.sentinel
import valkey
import valkey.asyncio
from prometheus_client import CollectorRegistry
from proxy import Proxy
from readers import PATIENT, Loader, rules_file
from running import eventually
from tls import TLSFront

from cdc_invalidator.embedded.process import HOST, free_port
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import AsyncCaches, Caches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CACHES = ("user", "page", "far", "both", "known")
PACKAGES = {"redis-py": (redis, "Redis"), "valkey-py": (valkey, "Valkey")}


class Program:
    """An application with a client of its own, which it builds anew for each test; reads are code that waits."""

    def __init__(self, package: str, rules: Path, *, awaits: bool) -> None:
        self.awaits = awaits
        self.package, self.name = PACKAGES[package]
        self._rules = rules
        self._runner = asyncio.Runner()
        self.registry = CollectorRegistry()

    @property
    def driver(self) -> Any:
        """The package whose clients it builds."""
        return self.package.asyncio if self.awaits else self.package

    def client(self, **options: Any) -> Any:
        return getattr(self.driver, self.name)(**options)

    def from_url(self, url: str, **options: Any) -> Any:
        return getattr(self.driver, self.name).from_url(url, **options)

    def caches(self, client: Any) -> Any:
        return (AsyncCaches if self.awaits else Caches).from_rules(self._rules, client, registry=self.registry)

    def read(self, cache: Any, load: Loader, number: int = 1) -> Any:
        found = cache.get(id=number, load=load)
        return self._runner.run(found) if self.awaits else found

    def close(self) -> None:
        self._runner.close()

    def bypasses(self) -> dict[str, float]:
        samples = [sample for metric in self.registry.collect() for sample in metric.samples]
        name = "cdc_invalidator_reader_bypasses_total"
        return {each.labels["reason"]: each.value for each in samples if each.name == name}


@pytest.fixture(params=["redis-py", "valkey-py"])
def package(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(params=["sync", "async"])
def program(request: pytest.FixtureRequest, package: str, tmp_path: Path) -> Iterator[Program]:
    program = Program(package, rules_file(tmp_path), awaits=request.param == "async")
    yield program
    program.close()


def reads_once(program: Program, caches: Any) -> None:
    load = Loader({1: "Ada"})
    for name in CACHES:
        assert program.read(caches[name], load) == program.read(caches[name], load) == "Ada"
    assert load.asked == [1] * len(CACHES)
    assert program.bypasses() == {}


@pytest.mark.parametrize(
    "options",
    [
        {"decode_responses": True},
        {"single_connection_client": True},
        {"protocol": 3},
        {"protocol": 2},
        {"socket_timeout": None, "socket_connect_timeout": None},
        {"max_connections": 1},
        {"health_check_interval": 1},
        {"client_name": "shop"},
    ],
    ids=lambda options: next(iter(options)) + f"-{next(iter(options.values()))}",
)
def test_a_client_as_people_build_it(options: dict[str, Any], program: Program, redis_url: str) -> None:
    port, number = redis_url.rpartition(":")[2].split("/")
    reads_once(program, program.caches(program.client(host=HOST, port=int(port), db=int(number), **options)))


def test_a_pool_that_blocks(program: Program, redis_url: str) -> None:
    pool = program.driver.BlockingConnectionPool.from_url(redis_url, max_connections=1, timeout=20)
    reads_once(program, program.caches(program.client(connection_pool=pool)))


def test_a_unix_socket(program: Program, tmp_path: Path) -> None:
    # Such a path is a hundred bytes long at most.
    path = os.path.relpath(tmp_path / "socket")
    with Valkey(settings={"unixsocket": str(tmp_path / "socket")}):
        reads_once(program, program.caches(program.client(unix_socket_path=path)))


def test_tls(program: Program, valkey: Valkey, redis_client: redis.Redis) -> None:
    number = redis_client.connection_pool.connection_kwargs["db"]
    with TLSFront(valkey.port) as front:
        caches = program.caches(program.from_url(front.url[:-1] + str(number), ssl_ca_certs=str(front.ca_file)))
        reads_once(program, caches)
        program.close()


def test_the_programs_own_client_is_not_touched(
    program: Program, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    name = f"{tmp_path.name}-{os.getpid()}"  # other processes run this test at the same server
    client = program.from_url(redis_url, client_name=name)
    caches = program.caches(client)
    reads_once(program, caches)
    assert client.connection_pool.connection_kwargs["client_name"] == name
    assert not client.connection_pool._available_connections
    assert not client.connection_pool._in_use_connections
    assert len([each for each in redis_client.client_list() if each["name"] == name]) == 1


def test_a_server_that_is_gone(program: Program) -> None:
    """With the client's own retries, five reads took 10.8 s."""
    caches = program.caches(program.client(host=HOST, port=free_port()))
    load = Loader({1: "Ada"})
    began = time.monotonic()
    assert [program.read(caches.user, load) for _ in range(5)] == ["Ada"] * 5
    assert time.monotonic() - began < 1.0
    assert program.bypasses() == {"redis_down": 3, "breaker_open": 2}


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that connections are never answered at: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(4):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("chosen", [None, 0.1])
def test_an_address_that_swallows_everything(chosen: float | None, silent: int, program: Program) -> None:
    options = {"socket_connect_timeout": chosen} if chosen else {}
    caches = program.caches(program.client(host=HOST, port=silent, **options))
    load = Loader({1: "Ada"})
    began = time.monotonic()
    assert [program.read(caches.user, load) for _ in range(5)] == ["Ada"] * 5
    taken = time.monotonic() - began
    assert 3 * (chosen or 0.5) <= taken < 3 * (chosen or 0.5) + 1.0
    assert program.bypasses() == {"redis_down": 3, "breaker_open": 2}


def test_the_server_stops_and_comes_back(program: Program) -> None:
    load = Loader({1: "Ada"})
    with Valkey() as server:
        caches = program.caches(program.client(host=HOST, port=server.port))
        reads_once(program, caches)
        server.kill()
        for name in CACHES:
            assert program.read(caches[name], load) == "Ada"
        server.start()

        def hits() -> bool:
            load.asked.clear()
            return program.read(caches.user, load) == "Ada" and not load.asked

        eventually(hits, "reads hit again")


def test_connections_that_died_while_they_were_idle(
    program: Program, valkey: Valkey, redis_client: redis.Redis
) -> None:
    """That is no failure of the server, and no read loads for it."""
    number = redis_client.connection_pool.connection_kwargs["db"]
    with Proxy(valkey.port) as proxy:
        caches = program.caches(program.client(host=HOST, port=proxy.port, db=number))
        load = Loader({1: "Ada"})
        for _ in range(6):
            assert program.read(caches.user, load) == "Ada"
            proxy.cut()
        assert load.asked == [1]
        assert program.bypasses() == {}


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda url: redis.Redis.from_url(url).pipeline(), "a pipeline, whose commands wait"),
        (lambda url: redis.Redis.from_url(url).pipeline, "a method is no client such as redis.Redis; pass one of"),
        (lambda url: valkey.Valkey.from_url(url).pipeline(), "a pipeline, whose commands wait"),
        (lambda url: url, "a str is no client such as redis.Redis; make one by redis.Redis.from_url"),
        (lambda _: None, "a NoneType is no client such as redis.Redis"),
        (redis.asyncio.Redis.from_url, "take AsyncCaches, or a redis.Redis"),
        (valkey.asyncio.Valkey.from_url, "take AsyncCaches, or a valkey.Valkey"),
        (lambda _: redis.sentinel.Sentinel([(HOST, 1)]), "pass master_for"),  # type: ignore[no-untyped-call]
        (lambda _: redis.sentinel.Sentinel([(HOST, 1)]).slave_for("x"), "a replica refuses; pass master_for"),  # type: ignore[no-untyped-call]
    ],
)
def test_what_is_no_client_is_refused(make: Callable[[str], Any], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=remedy):
        Caches.from_rules(rules_file(tmp_path), make("redis://127.0.0.1/0"))


def test_who_awaits_needs_a_client_that_is_awaited(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"take Caches, or a redis\.asyncio\.Redis"):
        AsyncCaches.from_rules(rules_file(tmp_path), redis.Redis())
    with pytest.raises(TypeError, match="a pipeline, whose"):
        AsyncCaches.from_rules(rules_file(tmp_path), redis.asyncio.Redis().pipeline())


# ── Event loops ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def module_level(package: str, redis_url: str, tmp_path: Path) -> Any:
    """Caches that were made before there was any event loop."""
    made, name = PACKAGES[package]
    return AsyncCaches.from_rules(rules_file(tmp_path), getattr(made.asyncio, name).from_url(redis_url, **PATIENT))


def test_each_test_has_a_loop_of_its_own(module_level: AsyncCaches) -> None:
    load = Loader({1: "Ada"})

    async def test() -> list[Any]:
        return list(
            await asyncio.gather(*(module_level[name].get(id=1, load=load) for name in CACHES for _ in range(5)))
        )

    for _ in range(4):
        assert asyncio.run(test()) == ["Ada"] * 25
    assert load.asked == [1] * len(CACHES), "all but the first loop read what that has stored"
    gc.collect()  # nothing that belongs to a loop that is gone complains


def test_a_loop_ends_while_readers_load_and_wait(module_level: AsyncCaches) -> None:
    async def never(id: int) -> None:  # noqa: A002
        await asyncio.Event().wait()

    async def left_alone() -> None:
        tasks = [asyncio.create_task(module_level.user.get(id=1, load=never)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)

    asyncio.run(left_alone())
    load = Loader({1: "Ada"})
    began = time.monotonic()
    assert asyncio.run(module_level.user.using(wait=0.0).get(id=1, load=load)) == "Ada"
    assert asyncio.run(module_level.user.get(id=1, load=load)) == "Ada"
    assert time.monotonic() - began < 2.0, "nobody waits for a load of a loop that is gone"


def test_a_loop_is_closed_without_ado(module_level: AsyncCaches) -> None:
    """Its connections can't be closed any more; the next loop has others."""
    load = Loader({1: "Ada"})
    for _ in range(2):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(module_level.user.get(id=1, load=load)) == "Ada"
        loop.run_until_complete(module_level.aclose())
        loop.close()
    assert load.asked == [1]


def test_loops_of_two_threads_at_once(module_level: AsyncCaches) -> None:
    load = Loader({number: str(number) for number in range(20)})
    found: list[Any] = []

    async def reading() -> None:
        for _ in range(20):
            found.extend(await asyncio.gather(*(module_level.page.get(id=number, load=load) for number in range(20))))

    threads = [threading.Thread(target=lambda: asyncio.run(reading())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(number) for _ in range(60) for number in range(20)]


def test_the_memory_of_the_process_in_the_next_loop(module_level: AsyncCaches) -> None:
    load = Loader({1: "Ada"})

    async def test() -> None:
        async with module_level.local("user"):
            for _ in range(3):
                assert await module_level.user.get(id=1, load=load) == "Ada"

    for _ in range(3):
        asyncio.run(test())
    assert load.asked == [1]


def test_a_forked_process_has_connections_of_its_own(program: Program, redis_url: str) -> None:
    if program.awaits:
        pytest.skip("a loop can't be forked")
    caches = program.caches(program.from_url(redis_url))
    load = Loader({number: str(number) for number in range(50)})
    for number in range(50):
        program.read(caches.user, load, number)
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            wrong = [
                number
                for _ in range(20)
                for number in range(50)
                if caches.user.get(id=number, load=load) != str(number)
            ]
            os._exit(1 if wrong else 0)
        children.append(child)
    for _ in range(20):
        assert [caches.user.get(id=number, load=load) for number in range(50)] == [str(number) for number in range(50)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_a_forked_process_waits_for_no_load_of_its_parent(redis_url: str, tmp_path: Path) -> None:
    """It would have waited for a minute, as the thread that loads is not there."""
    caches = Caches.from_rules(rules_file(tmp_path), redis.Redis.from_url(redis_url, **PATIENT))
    begun, go_on = threading.Event(), threading.Event()

    def load(id: int) -> str:  # noqa: A002
        begun.set()
        assert go_on.wait(60)
        return f"user {id}"

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(caches.user.get, id=1, load=load)
        assert begun.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(20)
            found = caches.user.using(wait=0.0).get(id=1, load=lambda id: f"child {id}")  # noqa: A006
            os._exit(0 if found == "child 1" else 1)
        ended = os.waitpid(child, 0)[1]
        go_on.set()
        assert ended == 0
        assert loading.result() == "user 1"
