"""What a read that asks for a freshness is served: only what the watermark proves that lies beside it."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, rules_file
from running import eventually

from cdc_invalidator.reader import Caches, Options, own_writes
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Valkey

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m, negative_ttl: 1m}
  page: {key: "t:page:{id}:{version}", version: "t:page:{id}:ver", ttl: 5m}
  both: {key: "t:both:{id}:{version}", version: "t:both:ver", bump_over: 10, ttl: 5m}
  old-user: {key: "t:old-user:{id}", ttl: 5m, stale_for: 1m}
  rate: {key: "t:rate:{id}", ttl: 5m, ttl_only: true}
rules: []
"""
BUSTED = ("user", "page", "both")
MARK = b"cdc:slot:watermark"
STANDBY = "replica-1:5432"
BIG = 2**63 + 11  # beyond what Lua counts exactly


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return rules_file(tmp_path, RULES)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def total(registry: CollectorRegistry, name: str, cache: str, **labels: str) -> float:
    found = registry.get_sample_value(f"cdc_invalidator_reader_{name}_total", {"cache": cache, **labels})
    return found or 0.0


def mark(client: Any, key: bytes = MARK, **fields: Any) -> None:
    """What the daemon writes, as far as it concerns us here: all caches up to an LSN, as of now."""
    known: dict[str, Any] = {
        "rules": json.dumps(dict.fromkeys((*BUSTED, "old-user"), "x")),
        "lsn": 10,
        "as_of": now(),
    }
    known |= fields
    client.delete(key)
    client.hset(key, mapping={name: value for name, value in known.items() if value is not None})


def now() -> int:
    return int(time.time() * 1000)


@pytest.mark.parametrize(
    ("fields", "asks", "refused"),
    [
        ({}, {"lsn": 10}, ""),
        ({}, {"lsn": 11}, "behind"),
        ({"lsn": 9}, {"lsn": 10}, "behind"),
        ({"lsn": BIG}, {"lsn": BIG}, ""),
        ({"lsn": BIG}, {"lsn": BIG + 1}, "behind"),
        ({"lsn": BIG}, {"lsn": 10**18}, ""),
        ({"lsn": 10**18}, {"lsn": BIG}, "behind"),
        ({"lsn": "ten"}, {"lsn": 10}, "no_watermark"),
        ({"lsn": ""}, {"lsn": 10}, "no_watermark"),
        ({"lsn": None}, {"lsn": 10}, "no_watermark"),
        ({"rules": None}, {"lsn": 10}, "no_watermark"),
        ({"rules": "["}, {"lsn": 10}, "not_covered"),
        ({"rules": '{"us": "user", "user-2": "x", "2-user": "x"}'}, {"lsn": 10}, "not_covered"),
        ({"rules": '{"user":"x"}'}, {"lsn": 10}, ""),
        ({"as_of": None}, {"lsn": 10}, ""),
        ({}, {"age": 5.0}, ""),
        ({"as_of": now() - 60_000}, {"age": 5.0}, "old"),
        ({"as_of": None}, {"age": 5.0}, "old"),
        ({"as_of": "now"}, {"age": 5.0}, "old"),
        ({"lsn": 9}, {"lsn": 10, "age": 5.0}, "behind"),
    ],
)
def test_the_watermark_decides(
    fields: dict[str, Any],
    asks: dict[str, Any],
    refused: str,
    rules: Path,
    redis_url: str,
    redis_client: redis.Redis,
    registry: CollectorRegistry,
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        caches = Caches.from_rules(rules, client, slot="slot", registry=registry)
        view = caches.at_least(asks.get("lsn", 0))
        for name in BUSTED:
            # A mark for all, and "user" for those that only say what it says.
            mark(redis_client, **{key: _for(name, value) for key, value in fields.items()})
            caches[name].get_many([1, 2], load=Loader({1: "one", 2: "two"}).many)
            load = Loader({1: "loaded", 2: "loaded", 3: "three"})
            one = view[name].get(id=1, load=load, max_staleness=asks.get("age"))
            many = view[name].get_many([1, 2], load=load.many, max_staleness=asks.get("age"))
            assert [one, *many] == (["loaded"] * 3 if refused else ["one", "one", "two"])
            assert load.asked == ([1, [1, 2]] if refused else []), "many that are refused are loaded at once"
            if refused:
                assert total(registry, "bypasses", name, reason=refused) == 3
            # What is not there is loaded as always; it is stored if the cache may be used.
            assert view[name].get(id=3, load=load, max_staleness=asks.get("age")) == "three"
            assert len(redis_client.keys(f"t:{name}:3*")) == (0 if refused else 1 + (name == "page"))
            assert not redis_client.keys("*lock*")


def _for(name: str, value: Any) -> Any:
    return value.replace("user", name) if isinstance(value, str) else value


def test_the_watermark_is_looked_at_each_time(
    rules: Path, redis_url: str, redis_client: redis.Redis, reads: Reads
) -> None:
    user = reads.caches(rules, redis_url, slot="slot", options=Options(max_staleness=60.0)).user
    mark(redis_client)
    assert user.get(id=1, load=Loader({1: "before"})) == "before"
    assert user.get(id=1, load=Loader({1: "not asked"})) == "before"
    # Redis comes back from a snapshot of an hour ago, with what it had then.
    mark(redis_client, as_of=now() - 3600_000)
    assert user.get(id=1, load=Loader({1: "now"})) == "now"
    assert user.get_many([1], load=Loader({1: "now"}).many) == ["now"]


@pytest.mark.parametrize("asks", [{"lsn": 10}, {"age": 3600.0}])
def test_who_asks_for_a_freshness_is_never_shown_an_old_value(
    asks: dict[str, Any], rules: Path, redis_url: str, redis_client: redis.Redis, reads: Reads
) -> None:
    mark(redis_client)
    caches = reads.caches(rules, redis_url, slot="slot", options=Options(wait=0.01))
    cache = caches["old-user"]
    redis_client.set(b"t:old-user:1" + STALE_SUFFIX, b'cdc1 1 %013d %013d 0000000\n"old"' % (0, now() + 60_000))
    redis_client.set(b"t:old-user:1" + LOCK_SUFFIX, "somebody else")
    load = Loader({1: "new"})
    assert cache.get(id=1, load=load) == "old"
    view = caches.at_least(asks.get("lsn", 0))["old-user"]
    assert view.get(id=1, load=load, max_staleness=asks.get("age")) == "new"
    assert view.get_many([1], load=load.many, max_staleness=asks.get("age")) == ["new"]


class TwoMasters:
    """The way to one of two masters: which one, that may be another for each round trip."""

    def __init__(self, masters: tuple[Caches, Caches], turns: tuple[int, ...]) -> None:
        self._ways = [caches._link.here() for caches in masters]
        self._turns = iter((*turns, *itertools.repeat(1, 50)))

    def send(self, commands: Any) -> Any:
        return self._ways[next(self._turns)].send(commands)


def between(masters: tuple[Caches, Caches], turns: tuple[int, ...], rules: Path, client: redis.Redis) -> Caches:
    """Make caches that are read by that way."""
    caches = Caches.from_rules(rules, client, slot="slot")
    # The look at what the daemon says is another matter.
    caches.rate.get(id=9, load=Loader())
    caches._link._way = TwoMasters(masters, turns)  # type: ignore[assignment]
    return caches


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", BUSTED)
def test_whichever_of_two_masters_answers_no_read_is_older_than_it_asks_for(
    name: str, held: bool, rules: Path, valkey: Valkey, redis_url: str, redis_client: redis.Redis
) -> None:
    other = valkey.url_for(0)
    with redis.Redis.from_url(other) as old, redis.Redis.from_url(redis_url) as new:
        masters = (Caches.from_rules(rules, old, slot="slot"), Caches.from_rules(rules, new, slot="slot"))
        for turns in itertools.product((0, 1), repeat=4):
            old.flushdb()
            new.flushdb()
            # The old master has what was true at LSN 9, and goes on answering.
            mark(old, lsn=9, as_of=now() - 60_000)
            masters[0][name].get_many([1, 2], load=lambda _: ["old", "old"])
            for key in old.keys("*ver"):
                new.set(key, old.get(key))
            mark(new)
            if held:
                # Another process loads, so that the read waits and looks again.
                version = new.get("t:page:1:ver" if name == "page" else "t:both:ver") or b""
                key = b"t:%b:1%b" % (name.encode(), version and b":" + version)
                new.set(key + LOCK_SUFFIX, "somebody else", px=30)
            if sum(turns) % 2:
                new.script_flush()
            caches = between(masters, turns, rules, new)
            load = Loader({1: "new", 2: "new"})
            view = caches.at_least(10)[name].using(wait=0.02)
            assert view.get(id=1, load=load) == "new", turns
            assert view.get_many([1, 2], load=load.many) == ["new", "new"], turns
            caches = between(masters, turns, rules, new)
            assert caches[name].using(wait=0.02).get(id=2, load=load, max_staleness=5.0) == "new", turns
        old.flushdb()


def test_a_load_that_began_before_what_is_asked_for_is_not_shared(
    rules: Path, redis_url: str, registry: CollectorRegistry
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        rate = Caches.from_rules(rules, client, registry=registry).rate.using(max_staleness=0.0)
        row, began = "before", threading.Event()

        def slow(id: int) -> str:  # noqa: A002  the parameter's name
            value = row
            began.set()
            eventually(lambda: total(registry, "waits", "rate") == 1, "another reader waits")
            return value

        got: list[Any] = []
        first = threading.Thread(target=lambda: got.append(rate.get(id=1, load=slow)))
        first.start()
        assert began.wait(60)
        row = "after"
        time.sleep(0.002)  # now the load is too old for whoever comes
        assert rate.get(id=1, load=lambda **_: row) == "after"
        first.join()
        assert got == ["before"]


# ── Loaders that read from a standby ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("standbys", "proven"),
    [
        (json.dumps({STANDBY: "2026-01-01"}), True),
        (json.dumps({STANDBY: None}), False),
        (json.dumps({"another": "2026-01-01"}), False),
        ("{}", False),
        ("[", False),
        (None, False),
    ],
)
def test_a_standby_that_is_not_waited_for_is_not_spoken_for(
    standbys: str | None, proven: bool, rules: Path, redis_url: str, redis_client: redis.Redis, reads: Reads
) -> None:
    mark(redis_client, standbys=standbys)
    caches = reads.caches(rules, redis_url, slot="slot", standby=STANDBY).at_least(10)
    lagging, primary = Loader({1: "lagging"}), Loader({1: "primary"})
    for _ in range(2):
        value = caches.user.get(id=1, load=lagging, primary=primary)
        assert value == ("lagging" if proven else "primary")
    assert lagging.asked == ([1] if proven else [])


def test_what_the_cache_may_not_serve_is_loaded_from_the_primary(
    rules: Path, redis_url: str, redis_client: redis.Redis, reads: Reads
) -> None:
    mark(redis_client, standbys=json.dumps({STANDBY: "2026-01-01"}))
    caches = reads.caches(rules, redis_url, slot="slot", standby=STANDBY)
    lagging = Loader({1: "lagging", None: "lagging"})
    primary = Loader({1: "primary", None: "primary"})
    assert caches.user.get(id=1, load=lagging, primary=primary) == "lagging", "who asks for nothing"
    for view in (caches.at_least(11).user, caches.user.using(max_staleness=0.0), caches.rate.using(max_staleness=9.0)):
        assert view.get(id=1, load=lagging, primary=primary) == "primary"
        assert view.get(id=None, load=lagging, primary=primary) == "primary", "without a key"
        assert view.get_many([1], load=lagging.many, primary=primary.many) == ["primary"]
        assert view.cached(lagging, primary=primary)(1) == "primary" if reads.kind == "sync" else True
    assert lagging.asked == [1]
    gone = reads.caches(rules, "redis://127.0.0.1:1/0", slot="slot", standby=STANDBY)
    assert gone.at_least(1).user.get(id=1, load=lagging, primary=primary) == "primary"
    assert gone.user.get(id=1, load=lagging, primary=primary) == "lagging", "an outage does not move all load there"


def test_a_loader_of_the_primary_is_asked_for_in_time(
    rules: Path, redis_url: str, redis_client: redis.Redis, reads: Reads
) -> None:
    mark(redis_client, standbys=json.dumps({STANDBY: "2026-01-01"}))
    caches = reads.caches(rules, redis_url, slot="slot", standby=STANDBY)
    load = Loader({1: "one"})
    assert caches.user.get(id=1, load=load) == "one"
    remedy = pytest.raises(
        TypeError, match=r"cache user is loaded from the standby replica-1:5432, .* give .* primary="
    )
    # Also where the value is in the cache, and would be served.
    with remedy:
        caches.user.get(id=1, load=load, max_staleness=60.0)
    for view in (caches.at_least(10).user, caches.user.using(max_staleness=60.0)):
        with remedy:
            view.get(id=1, load=load)
        with remedy:
            view.get_many([1], load=load.many)
        with remedy:
            view.cached(load)
    # A visitor of an adapter may have written; the loader is missed with the first request, not with that one's.
    request = own_writes.Visitors("secret").request("GET", None)
    with request if reads.kind == "sync" else contextlib.nullcontext():
        if reads.kind == "sync":
            with remedy:
                caches.user.get(id=1, load=load)
    assert caches.user.warm([1], load=load) == 0
