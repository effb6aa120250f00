"""RDB files as servers write them: the names, types and ends that are read are those that the server itself tells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import redis_binaries

from cdc_invalidator import errors
from cdc_invalidator.discovery.dumpfile import Dump, sample
from cdc_invalidator.embedded.servers import Valkey

# More than fit into the small encoding of any type.
LARGE = 600
# So that a double, an integer and a text each occur.
SCORES = (1.5, 3, -2e300, float("inf"))


def bulk(number: int) -> bytes:
    """A text that can't be compressed."""
    return b"".join(hash((number, at)).to_bytes(8, "big", signed=True) for at in range(40))


def write(client: redis.Redis, key: bytes, kind: str, size: int) -> None:
    texts = [bulk(size + at) if at % 3 == 0 else b"%d" % (at * 7 - 30) for at in range(size)]
    with client.pipeline(transaction=False) as pipe:
        match kind:
            case "string":
                pipe.set(key, [b"", b"12", b"-70000", b"3000000000", b"ab" * 300, bulk(1)][size % 6])
            case "list":
                pipe.rpush(key, *texts)
            case "integers":
                pipe.sadd(key, *range(size))
            case "set":
                pipe.sadd(key, *texts)
            case "zset":
                pipe.zadd(key, {text: SCORES[at % 4] for at, text in enumerate(texts)})
            case "hash" | "expiring hash":
                pipe.hset(key, mapping={b"%d" % at: text for at, text in enumerate(texts)})
                if kind != "hash":
                    pipe.hpexpire(key, 1_000_000, "0")
            case "stream":
                for at, text in enumerate(texts):
                    pipe.xadd(key, {"a": text, "b": b"%d" % at})
                pipe.xgroup_create(key, "readers", "0")
                pipe.xgroup_createconsumer(key, "readers", "idle")
                pipe.xreadgroup("readers", "busy", {key: ">"}, count=max(1, size // 2))
                pipe.xgroup_create(key, "others", "$")
        pipe.execute()


KINDS = ("string", "list", "integers", "set", "zset", "hash", "stream")


class Server(NamedTuple):
    client: redis.Redis
    folder: Path
    kinds: tuple[str, ...]


@pytest.fixture(params=redis_binaries().items(), ids=lambda found: found[0], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Valkey(binary=request.param[1]) as running, redis.Redis.from_url(running.url, socket_timeout=120) as client:
        kinds: tuple[str, ...] = KINDS
        try:
            client.hset("probe", "a", "b")
            client.hpexpire("probe", 1000, "a")
        except redis.ResponseError:
            pass
        else:
            kinds += ("expiring hash",)
        yield Server(client, running.folder, kinds)


@pytest.fixture
def empty(server: Server) -> Server:
    server.client.flushall()
    return server


def dumped(server: Server) -> dict[bytes, tuple[str, int | None]]:
    """What is read of a fresh file: by key, its type and its end in milliseconds."""
    server.client.save()
    with (server.folder / "dump.rdb").open("rb") as file:
        return {key.name or b"": (key.type, key.ends) for key in Dump(file, "dump.rdb").read()}


def told(client: redis.Redis) -> dict[bytes, tuple[str, int | None]]:
    """What the server says of its keys."""
    answers = {}
    for key in client.scan_iter(count=1000):
        left = client.pttl(key)
        seconds, micros = client.time()
        ends = None if left == -1 else seconds * 1000 + micros // 1000 + left
        kind = client.type(key)
        assert isinstance(kind, bytes)
        answers[key] = kind.decode(), ends
    return answers


def assert_same(read: dict[bytes, tuple[str, int | None]], of_server: dict[bytes, tuple[str, int | None]]) -> None:
    assert {key: kind for key, (kind, _) in read.items()} == {key: kind for key, (kind, _) in of_server.items()}
    for key, (_, ends) in read.items():
        expected = of_server[key][1]
        # Between its two answers, a slow machine may let some time pass.
        assert (ends is None) == (expected is None)
        assert ends is None or expected is None or abs(ends - expected) < 10_000


def test_all_types_in_small_and_in_large(empty: Server) -> None:
    for kind in empty.kinds:
        for size in (1, 5, LARGE):
            write(empty.client, f"{kind}:{size}".encode(), kind, size)
            write(empty.client, f"{kind}:{size}:ends".encode(), kind, size)
            empty.client.pexpire(f"{kind}:{size}:ends", 10_000_000 + size)
    assert len(told(empty.client)) == 6 * len(empty.kinds)
    assert_same(dumped(empty), told(empty.client))


def test_names_of_every_form(empty: Server) -> None:
    names = [b"", b"0", b"-128", b"127", b"128", b"-32769", b"2147483648", b"007", b"\xff\x00", b"ab" * 250]
    names += [b"x" * 63, b"x" * 64, b"user:profile:settings:" * 5, bulk(3), b"a" * 20 + b"b" * 300 + b"c" * 20]
    for name in names:
        empty.client.set(name, b"1")
    assert set(dumped(empty)) == set(names)


def test_a_longer_name_is_counted_and_not_kept(empty: Server) -> None:
    for name in (b"y" * 513, bulk(4) * 10, b"y" * 512):
        empty.client.set(name, b"1")
    empty.client.save()
    with (empty.folder / "dump.rdb").open("rb") as file:
        found = sample(file, "dump.rdb", 0, 0, lambda *_: None)
    assert [each.key for each in found.samples] == [b"y" * 512]
    assert (found.long, found.all_keys, found.complete) == (2, 3, True)


def test_databases_scripts_and_hints_are_no_keys(empty: Server) -> None:
    empty.client.config_set("maxmemory-policy", "allkeys-lfu")
    if int(empty.client.info()["redis_version"].split(".")[0]) >= 7:
        library = "#!lua name=mine\nredis.register_function('f', function() return 1 end)"
        empty.client.function_load(library, replace=True)
    for database in (0, 3):
        empty.client.select(database)
        empty.client.set(f"of {database}", b"1")
    empty.client.select(0)
    empty.client.save()
    with (empty.folder / "dump.rdb").open("rb") as file:
        assert {(key.database, key.name) for key in Dump(file, "dump.rdb").read()} == {(0, b"of 0"), (3, b"of 3")}


@pytest.mark.parametrize("size", [1, 40])
def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(size: int, empty: Server) -> None:
    for kind in empty.kinds:
        write(empty.client, kind.encode(), kind, size)
        empty.client.pexpire(kind, 10_000_000)
    whole = len(dumped(empty))
    text = (empty.folder / "dump.rdb").read_bytes()
    step = max(1, len(text) // 500)
    for length in [*range(9, len(text), step), len(text) - 1]:
        with pytest.raises(errors.WrongSettings, match="ends too early"):
            list(Dump(BytesIO(text[:length]), "cut.rdb").read())
    assert whole == len(empty.kinds)


def test_no_more_keys_are_read_than_wanted_and_times_count_from_when_the_file_was_made(empty: Server) -> None:
    for number in range(50):
        empty.client.set(f"user:{number}", b"1", ex=600)
    empty.client.save()
    with (empty.folder / "dump.rdb").open("rb") as file:
        found = sample(file, "dump.rdb", 0, 20, lambda *_: None)
    assert (len(found.samples), found.all_keys, found.complete) == (20, 50, False)
    assert all(each.ttl is not None and 590 < each.ttl <= 601 for each in found.samples)


NAMES = st.one_of(
    st.binary(max_size=40),
    st.from_regex(r"(app|shop):(user|order):[0-9]{1,12}(:[a-z]{1,20}){0,4}", fullmatch=True).map(str.encode),
    st.integers(-(2**33), 2**33).map(lambda number: b"%d" % number),
)


class Wanted(NamedTuple):
    kind: str
    size: int
    seconds: int | None


SPACES = st.dictionaries(
    NAMES,
    st.builds(
        Wanted,
        st.sampled_from((*KINDS, "expiring hash")),
        st.sampled_from([1, 2, 3, 30, 130, LARGE]),
        st.none() | st.integers(1000, 10**9),
    ),
    max_size=12,
)


def test_what_is_read_is_what_the_server_tells(server: Server) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SPACES)
    def check(space: dict[bytes, Wanted]) -> None:
        server.client.flushall()
        for name, wanted in space.items():
            write(server.client, name, wanted.kind if wanted.kind in server.kinds else "hash", wanted.size)
            if wanted.seconds is not None:
                server.client.expire(name, wanted.seconds)
        assert_same(dumped(server), told(server.client))

    check()


def test_a_value_of_any_size_is_skipped_and_not_read(empty: Server) -> None:
    empty.client.config_set("rdbcompression", "no")
    for number in range(3):
        empty.client.setrange(f"large:{number}", 60_000_000, "z")
    empty.client.save()
    empty.client.flushall()
    path = empty.folder / "dump.rdb"
    assert path.stat().st_size > 180_000_000
    began = time.process_time()
    with path.open("rb") as file:
        assert {key.name for key in Dump(file, "dump.rdb").read()} == {b"large:0", b"large:1", b"large:2"}
    assert time.process_time() - began < 0.05
