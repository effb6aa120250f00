"""Caches in memory behave as those in Redis: the same scenarios on both, and commands with the same replies."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from readers import Face, Loader, Reads, rules_file
from running import eventually

from cdc_invalidator.reader import AsyncCaches, Caches, testing
from cdc_invalidator.reader.memory import Store
from cdc_invalidator.reader.scripts import FillScripts
from cdc_invalidator.redis import scripts as daemon
from cdc_invalidator.redis import server as cache
from cdc_invalidator.redis import topology
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{{{id}}}", ttl: 5m, jitter: 30s}
  known: {key: "t:known:{{{id}}}", ttl: 5m, negative_ttl: 1m}
  page: {key: "t:page:{{{id}}}:{version}", version: "t:page:{{{id}}}:ver", ttl: 5m}
  both: {key: "t:both:{{{id}}}:{version}", version: "t:both:{{{id}}}:ver", bump_over: 100, ttl: 5m}
  old: {key: "t:old:{{{id}}}", ttl: 5m, stale_for: 1m}
  olds: {key: "t:olds:{{{id}}}:{version}", version: "t:olds:{{{id}}}:ver", ttl: 5m, stale_for: 1m}
  few: {key: "t:few:{{{id}}}", ttl: 5m, max_keys_hint: 10}
rules:
  - {name: user-changed, table: public.users, bust: [user, known, page, both, old, olds, few]}
"""
VERSIONED = ("page", "both", "olds")
ALL = ("user", "known", "page", "both", "old", "olds")


class Place(NamedTuple):
    """Caches somewhere: ``bust(cache, id)`` is what a commit's bust does there, ``there()`` which keys."""

    caches: Any
    reads: Reads
    bust: Callable[[str, int], None]
    there: Callable[[], list[bytes]]


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture(params=["memory", "redis"])
def place(
    request: pytest.FixtureRequest, reads: Reads, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> Place:
    rules = rules_file(tmp_path, RULES)
    if request.param == "memory":
        made: Any = (Caches if reads.kind == "sync" else AsyncCaches).in_memory(rules)
        return Place(
            Face(reads, made),
            reads,
            lambda name, number: testing.bust(made[name], id=number),
            lambda: testing.keys(made),
        )

    async def busting(name: str, number: int) -> None:
        prefix = f"t:{name}:{{{number}}}".encode()
        graces = dict.fromkeys([b"t:old:{%d}" % number, b"t:olds:{%d}:ver" % number], 60_000)
        server: cache.CacheServer = topology.cache_server(EndpointSource.fixed(redis_url), "slot")
        await server.connect()
        if name == "both":
            version = redis_client.get(prefix + b":ver")
            assert version is None or isinstance(version, bytes)
            await server.bust([[prefix + b":" + version]] if version else [], {}, graces)
        elif name in VERSIONED:
            await server.bust([], {prefix + b":ver": 10_000}, graces)
        else:
            await server.bust([[prefix]], {}, graces)
        await server.close()

    return Place(
        reads.caches(rules, redis_url),
        reads,
        lambda name, number: asyncio.run(busting(name, number)),
        lambda: sorted(redis_client.scan_iter("t:*")),
    )


@pytest.mark.parametrize("name", ALL)
def test_a_value_is_loaded_once_until_a_bust(name: str, place: Place) -> None:
    load = Loader({1: {"name": "Ada"}})
    for _ in range(3):
        assert place.caches[name].get(id=1, load=load) == {"name": "Ada"}
    place.bust(name, 1)
    load.rows[1] = {"name": "Grace"}
    assert place.caches[name].get(id=1, load=load) == {"name": "Grace"}
    assert place.caches[name].get(id=1, load=load) == {"name": "Grace"}
    assert load.asked == [1, 1]


@pytest.mark.parametrize("name", ALL)
def test_a_load_that_a_bust_overtakes_is_not_kept(name: str, place: Place) -> None:
    load = Loader({1: "Ada"}, before=lambda: place.bust(name, 1))
    assert place.caches[name].get(id=1, load=load) == "Ada"
    load.rows[1], load.before = "Grace", lambda: None
    assert place.caches[name].get(id=1, load=load) == "Grace"


def test_missing_rows_are_kept_only_with_a_time_for_them(place: Place) -> None:
    load = Loader()
    for _ in range(2):
        assert place.caches.user.get(id=1, load=load) is None
        assert place.caches.known.get(id=2, load=load) is None
    assert load.asked == [1, 2, 1]
    # A lock may hold a word to those that wait, for a moment.
    assert [key for key in place.there() if not key.endswith(LOCK_SUFFIX)] == [b"t:known:{2}"]


@pytest.mark.parametrize("name", ALL)
def test_many_are_looked_up_at_once_and_what_is_invalidated_is_loaded_again(name: str, place: Place) -> None:
    load = Loader(dict.fromkeys(range(5), "Ada"))
    assert place.caches[name].get_many([0, 1, 2], load=load.many) == ["Ada"] * 3
    assert place.caches[name].invalidate(id=1)
    assert place.caches[name].get_many([0, 1, 2, 3], load=load.many) == ["Ada"] * 4
    assert load.asked == [[0, 1, 2], [1, 3]]


@pytest.mark.parametrize("name", ["old", "olds"])
def test_the_old_value_is_served_while_another_loads(name: str, place: Place) -> None:
    load = Loader({1: "Ada"})
    place.caches[name].get(id=1, load=load)
    place.bust(name, 1)
    began, go_on = threading.Event(), threading.Event()
    load.rows[1] = "Grace"

    def slowly() -> None:
        began.set()
        assert go_on.wait(30)

    load.before = slowly
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(place.caches[name].get(id=1, load=load)))
    reader.start()
    assert began.wait(30)
    assert place.caches[name].get(id=1, load=load) == "Ada"
    go_on.set()
    reader.join()
    assert first == ["Grace"]
    assert place.caches[name].get(id=1, load=load) == "Grace"


@pytest.mark.parametrize("name", ["user", "page"])
def test_writing_through_and_warming(name: str, place: Place) -> None:
    load = Loader({1: "Ada", 2: "Grace"})
    with place.caches[name].writing(id=1) as write:
        assert write.set("Eve")
    assert place.caches[name].warm([1, 2], load=load, rate=1e6) == 1
    assert place.caches[name].get(id=1, load=load) == "Eve"
    assert place.caches[name].get(id=2, load=load) == "Grace"
    assert load.asked == [2]


def test_a_parameter_without_its_name_is_refused_with_the_remedy(place: Place) -> None:
    load = Loader({7: "Ada"})
    sentence = "parameters of cache user are passed by name; write id=7"
    for call in (place.caches.user.get, place.caches.user.get_with_age, place.caches.user.refresh):
        with pytest.raises(TypeError, match=sentence):
            call(7, load=load)
    with pytest.raises(TypeError, match=sentence):
        place.caches.user.invalidate(7)
    with pytest.raises(TypeError, match=sentence), place.caches.user.writing(7):
        pass
    with pytest.raises(TypeError, match="passed by name; write id='a'"):
        place.caches.user.get("a", load=load)
    assert load.asked == []


def _fails(**_: Any) -> Any:
    raise KeyError("nothing")


def test_no_lease_is_left_and_no_more_keys_than_the_hint(place: Place) -> None:
    for number in range(30):
        place.caches.few.get(id=number, load=Loader({number: "Ada"}))
        with pytest.raises(KeyError):
            place.caches.user.get(id=number, load=_fails)
    eventually(lambda: not any(LOCK_SUFFIX in key for key in place.there()), "the words to those that wait end soon")
    assert 10 <= len(place.there()) < 15


def test_reads_with_a_demand_load_since_there_is_no_daemon(place: Place) -> None:
    load = Loader({1: "Ada"})
    for _ in range(2):
        place.caches.at_least(7).user.get(id=1, load=load)
        place.caches.user.get(id=1, load=load, max_staleness=5.0)
    assert load.asked == [1] * 4


# ── Command by command ───────────────────────────────────────────────────────────────────────────────────────────────

VERSION, _ = VERSIONS = b"t:{k}:ver", b"t:{k}:verb"
UNDER = b"t:{k}:v\0"  # its NUL stands for the version that is there
KEYS = (b"t:{k}:a", b"t:{k}:b", UNDER)
LOCKS = tuple(key + LOCK_SUFFIX for key in KEYS)
STALES = tuple(key + STALE_SUFFIX for key in KEYS)
BUMP = ("bump",)
SCRIPTS = FillScripts()
token = st.sampled_from([b"r", b"s"])
header = st.sampled_from([b"", b"cdc1 1 ", b"\0"])
value = st.sampled_from([b"cdc1 1 x", b"cdc1 2 y", b"other"])
which = st.integers(0, 1)
# A lease is written as (token, number of the grant); the numbers differ between the two sides.
lease = st.tuples(token, st.integers(0, 3))


def _script(digest: bytes, keys: list[bytes], *args: Any) -> tuple[Any, ...]:
    return ("EVALSHA", digest, len(keys), *keys, *args)


COMMANDS = {
    SCRIPTS.take: st.builds(
        lambda at, who, head, old: _script(
            SCRIPTS.take, [LOCKS[at], KEYS[at], *([STALES[at]] if old else [])], who, 9999, head
        ),
        *(which, token, header, st.booleans()),
    ),
    SCRIPTS.versioned: st.builds(
        lambda who, head, old, more: _script(
            *(SCRIPTS.versioned, [VERSION, *([VERSIONS[1], VERSION] if more else [])], who, 9999, head, 9999),
            *(LOCK_SUFFIX, STALE_SUFFIX if old else b"", UNDER, *([b"t:{k}:w\0", b"t:{k}:x\0"] if more else [])),
        ),
        *(st.sampled_from([b"r", b"s", b""]), header, st.booleans(), st.booleans()),
    ),
    SCRIPTS.version: st.just(_script(SCRIPTS.version, [VERSION], 9999)),
    SCRIPTS.seize: st.builds(lambda at, who: _script(SCRIPTS.seize, [LOCKS[at]], who, 9999), which, token),
    SCRIPTS.fill: st.builds(
        lambda at, held, what: _script(SCRIPTS.fill, [LOCKS[at], KEYS[at]], held, what, 9999),
        *(st.integers(0, 2), lease, value),
    ),
    SCRIPTS.renew: st.builds(lambda at, held: _script(SCRIPTS.renew, [LOCKS[at]], held, 9999), which, lease),
    SCRIPTS.release: st.builds(
        lambda at, held, telling: _script(SCRIPTS.release, [LOCKS[at]], held, *((9999,) if telling else ())),
        *(which, st.one_of(lease, st.sampled_from([b"r:"])), st.booleans()),
    ),
    # Where no daemon is, nothing is proven, whatever the script behind the proof.
    **{
        script: st.just(_script(script, list(KEYS[:2]), b"t:mark", b"", b"user", 1, b"", b"", b""))
        for script in SCRIPTS.proven.values()
    },
}
PLAIN = st.one_of(
    st.builds(lambda at: ("GET", KEYS[at]), which),
    st.just(("MGET", *KEYS, VERSION)),
    st.builds(lambda at: ("UNLINK", (KEYS + LOCKS + STALES + VERSIONS)[at]), st.integers(0, 10)),
    st.just(("HMGET", b"t:mark", b"lsn", b"as_of")),
    st.just(BUMP),
)


class Side:
    """One of the two: its numbers, of leases and versions, are told by the order in which they were seen."""

    def __init__(self, ask: Callable[..., Any], bump: Callable[[], Any]) -> None:
        self._ask, self._bump = ask, bump
        self._numbers: dict[bytes, bytes] = {}

    def play(self, command: tuple[Any, ...]) -> Any:
        if command == BUMP:
            self._bump()
            return None
        version = self._ask("GET", VERSION) or b"none"
        words = [self._lease(*word) if isinstance(word, tuple) else word for word in command]
        if command[1] != SCRIPTS.versioned:
            words = [
                word.replace(UNDER, UNDER.replace(b"\0", version)) if isinstance(word, bytes) else word
                for word in words
            ]
        return self.told(self._ask(*words))

    def _lease(self, who: bytes, number: int) -> bytes:
        known = list(self._numbers)
        return b"%b:%b" % (who, known[number] if number < len(known) else b"0")

    def told(self, reply: Any) -> Any:
        if isinstance(reply, list):
            return [self.told(each) for each in reply]
        if isinstance(reply, int):
            return self.told(b"%d" % reply) if reply > 1000 else reply
        if isinstance(reply, bytes):
            return re.sub(
                rb"\d{13,}", lambda found: self._numbers.setdefault(found[0], b"<%d>" % len(self._numbers)), reply
            )
        return reply


def test_each_script_is_played() -> None:
    assert set(COMMANDS) == set(SCRIPTS.texts) == set(Store().scripts)


def _look(who: bytes, head: bytes = b"cdc1 1 ") -> tuple[Any, ...]:
    return _script(SCRIPTS.versioned, [VERSION], who, 9999, head, 9999, LOCK_SUFFIX, STALE_SUFFIX, UNDER)


def _two(who: bytes) -> tuple[Any, ...]:
    words = (who, 9999, b"cdc1 1 ", 9999, LOCK_SUFFIX, STALE_SUFFIX, UNDER, b"t:{k}:w\0")
    return _script(SCRIPTS.versioned, [VERSION, VERSIONS[1]], *words)


def _fill(number: int, what: bytes, key: bytes = UNDER) -> tuple[Any, ...]:
    return _script(SCRIPTS.fill, [LOCKS[2], key], (b"r", number), what, 9999)


# A value of this and one of another schema under a version; then a bump, and what was there before it.
@example(commands=[_look(b"r"), _fill(0, b"cdc1 1 x"), _look(b"s"), _look(b"s", b"\0"), BUMP, _look(b"r"), _look(b"s")])
@example(commands=[_look(b"r"), _fill(0, b"cdc1 2 y"), _look(b"s"), _look(b"r"), BUMP, _look(b""), _look(b"s")])
@example(commands=[_two(b"r"), BUMP])
@example(
    commands=[
        *(_look(b"r"), _fill(0, b"cdc1 1 x"), BUMP, _look(b"r"), _fill(2, b"cdc1 1 y", STALES[2])),
        *(_look(b"s"), _look(b"r")),
    ]
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=st.lists(st.one_of(*COMMANDS.values(), PLAIN), max_size=25))
def test_both_give_the_same_replies(commands: list[tuple[Any, ...]], redis_client: redis.Redis) -> None:
    for text in SCRIPTS.texts.values():
        redis_client.script_load(text)
    names = (*KEYS, *LOCKS, *STALES, *VERSIONS)
    redis_client.unlink(*redis_client.keys("t:*"), b"t:none")
    store = Store()
    there = Side(
        redis_client.execute_command,
        lambda: redis_client.eval(daemon.BUMP, 1, VERSION, 9999, 9999, STALE_SUFFIX),
    )
    here = Side(store.ask, lambda: store.bump(VERSION, 9999, VERSION + STALE_SUFFIX, 9999))
    for command in commands:
        assert here.play(command) == there.play(command), command
    assert here.told([store.ask("GET", name) for name in names]) == there.told(redis_client.mget(names))


def test_times_end_as_they_do_in_redis() -> None:
    now = 1000.0
    store = Store(lambda: now)
    number = store.ask("EVALSHA", SCRIPTS.seize, 1, b"lock", b"r", 3000)
    now += 2.9
    assert store.ask("EVALSHA", SCRIPTS.renew, 1, b"lock", b"r:%d" % number, 3000) == 1
    now += 2.9
    assert store.ask("EVALSHA", SCRIPTS.fill, 2, b"lock", b"key", b"r:%d" % number, b"value", 5000) == 1
    now += 4.9
    assert store.ask("GET", b"key") == b"value"
    now += 0.1
    assert store.ask("GET", b"key") is None
    assert store.keys() == []


def test_what_no_reader_sends_is_refused() -> None:
    with pytest.raises(ValueError, match="knows no FLUSHALL"):
        Store().ask("FLUSHALL")
