"""The small parts of the reader: keys, entries, the breaker, the bound on keys, the process's own memory."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator.reader.breaker import Breaker
from cdc_invalidator.reader.envelope import Envelope, Times
from cdc_invalidator.reader.handle import in_order
from cdc_invalidator.reader.keys import Keys
from cdc_invalidator.reader.keyspace import KeySpace
from cdc_invalidator.reader.local import Local, Locals, Pulse
from cdc_invalidator.reader.spelling import NoKey
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import Cache


def cache(**fields: str) -> Cache:
    lines = "".join(f"    {name}: {value!r}\n" for name, value in ({"ttl": "5m"} | fields).items())
    return parse_rules([("rules.yaml", f"version: 1\ncaches:\n  one:\n{lines}rules: []\n")], {}).caches["one"]


class Plan(enum.Enum):
    PRO = "pro"


class Level(enum.IntEnum):
    HIGH = 3


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (-1, "-1"),
        (True, "t"),
        (False, "f"),
        ("Ada Ü", "Ada Ü"),
        (b"raw", "raw"),
        (uuid.UUID("{12345678-1234-5678-1234-567812345678}"), "12345678-1234-5678-1234-567812345678"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (decimal.Decimal("1E+2"), "100"),
        (decimal.Decimal("1.50"), "1.50"),
        (Plan.PRO, "pro"),
        (Level.HIGH, "3"),
    ],
)
def test_values_are_written_as_postgresql_prints_them(value: Any, text: str) -> None:
    assert Keys(cache(key="t:{id}")).of({"id": value}) == (f"t:{text}".encode(), b"")


@pytest.mark.parametrize("value", [1.5, [1], object()])
def test_what_it_may_print_in_several_ways_must_be_text(value: Any) -> None:
    with pytest.raises(TypeError, match=r"parameter id is a \w+, .*; give it as text"):
        Keys(cache(key="t:{id}")).of({"id": value})


def test_a_moment_has_a_key_only_once_the_type_of_its_column_is_known() -> None:
    moment, types = {"id": dt.datetime(2026, 1, 2, 3, 4, 5, 600_000, tzinfo=dt.UTC)}, {"id": "timestamp with time zone"}
    with pytest.raises(NoKey, match="spelling"):
        Keys(cache(key="t:{id}")).of(moment)
    settings = {"DateStyle": "ISO, MDY", "TimeZone": "Etc/UTC"}
    assert Keys(cache(key="t:{id}"), types, settings).of(moment) == (b"t:2026-01-02 03:04:05.6+00", b"")


@given(st.dictionaries(st.sampled_from(["id", "name"]), st.text(st.characters(codec="utf-8"), max_size=20), min_size=2))
def test_keys_are_those_that_the_daemon_makes(values: dict[str, str]) -> None:
    one = cache(key="t:{{x}}:{id}:{name|lower|urlencode}:{id|sha256}:{name ':' id|sha1}")
    if any("\0" in value for value in values.values()):
        with pytest.raises(NoKey, match="unprintable"):
            Keys(one).of(values)
        return
    assert Keys(one).of(values) == (one.key.render(values), b"")


def test_of_a_version_both_keys_are_given_and_text_may_be_long_where_it_is_hashed() -> None:
    keys = Keys(cache(key="t:{q|sha256}:{version}", version="t:{team}:ver"))
    assert keys.names == ("q", "team")
    key, version = keys.of({"q": "x" * 100_000, "team": 7})
    assert (len(key), key[-2:], version) == (2 + 64 + 2, b":\0", b"t:7:ver")
    for value, reason in (("x" * 513, "unbounded"), (None, "null"), ("a\0", "unprintable"), ("\ud800", "unprintable")):
        with pytest.raises(NoKey, match=reason):
            keys.of({"q": "", "team": value})


def test_a_value_may_be_long_where_it_is_hashed_together_with_others() -> None:
    keys = Keys(cache(key="t:{team ':' q|md5}:{team}"))
    assert keys.names == ("team", "q")
    assert len(keys.of({"team": 7, "q": "x" * 100_000})[0]) == 2 + 32 + 2
    with pytest.raises(NoKey, match="unbounded"):
        keys.of({"team": "7" * 513, "q": "x"})


# ── Entries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 99), st.binary(), st.tuples(*[st.integers(0, 2**50)] * 3))
def test_an_entry_gives_back_what_it_was_made_of(schema: int, payload: bytes, times: tuple[int, int, int]) -> None:
    envelope = Envelope(schema)
    entry = envelope.seal(payload, Times(*times))
    assert envelope.payload(entry) == payload
    bounded = (min(times[0], 10**13 - 1), min(times[1], 10**13 - 1), min(times[2], 10**7 - 1))
    assert envelope.times(entry) == bounded
    assert Envelope(schema + 1).payload(entry) is None
    assert all(envelope.payload(entry[:size]) is None for size in range(envelope.size))


@given(st.binary(max_size=80))
def test_whatever_else_is_stored_is_no_entry(data: bytes) -> None:
    assert Envelope(1).payload(data) is None


# ── The breaker ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_breaker_opens_and_lets_one_attempt_through_now_and_then() -> None:
    breaker = Breaker(threshold=2, pause=1.0)
    breaker.failed(0.0)
    assert (breaker.allows(0.1), breaker.open) == (True, False)
    breaker.failed(0.2)
    assert [breaker.open, *(breaker.allows(now) for now in (0.3, 1.1, 1.3, 1.4, 2.2, 2.4))] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    breaker.worked()
    assert breaker.allows(2.41)
    breaker.failed(2.5)
    assert breaker.allows(2.6), "it counts anew"


# ── The bound on keys ────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_bounded_by_about_the_hint_and_anew_after_a_ttl() -> None:
    space = KeySpace(1000, ttl=60.0)
    admitted = [number for number in range(3000) if space.admits(b"key %d" % number, 1.0)]
    assert len(set(range(1000)) - set(admitted)) == 0, "never fewer than the hint"
    assert len(admitted) < 2200
    assert all(space.admits(b"key %d" % number, 2.0) for number in range(1000)), "those that are there may be there"
    assert space.admits(b"another", 62.0)
    assert space.estimate == pytest.approx(1, abs=0.1)


# ── The process's own memory ─────────────────────────────────────────────────────────────────────────────────────────


def local(*keys: str, size: int = 10) -> Local:
    found = [cache(key=key) for key in keys or ("t:{id}",)]
    made = Local(found, size, patience=2.0)
    made.proven(100.0)
    return made


def test_an_entry_is_kept_until_a_message_names_it() -> None:
    memory = local()
    memory.keep(b"t:1", memory.ask(b"t:1"), b"one", 1000.0)
    memory.keep(b"t:2", memory.ask(b"t:2"), b"two", 1000.0)
    assert (memory.get(b"t:1", 101.0), memory.get(b"t:2", 101.0)) == (b"one", b"two")
    memory.invalidate([b"t:1", b"t:9"])
    assert (memory.get(b"t:1", 101.0), memory.get(b"t:2", 101.0)) == (None, b"two")
    memory.invalidate(None)
    assert len(memory) == 0


def test_what_was_asked_for_before_a_message_is_not_kept_after_it() -> None:
    memory = local()
    for message in ([b"t:1"], None):
        token = memory.ask(b"t:1")
        memory.invalidate(message)
        memory.keep(b"t:1", token, b"old", 1000.0)
        assert memory.get(b"t:1", 101.0) is None
    first, second = memory.ask(b"t:1"), memory.ask(b"t:1")
    memory.keep(b"t:1", first, b"old, perhaps", 1000.0)
    assert memory.get(b"t:1", 101.0) is None
    memory.keep(b"t:1", second, b"new", 1000.0)
    assert memory.get(b"t:1", 101.0) == b"new"


def test_nothing_is_given_while_the_messages_are_silent_or_after_its_time() -> None:
    memory = local()
    memory.keep(b"t:1", memory.ask(b"t:1"), b"one", 101.5)
    assert memory.get(b"t:1", 101.0) == b"one"
    assert memory.get(b"t:1", 102.1) is None
    memory.proven(102.0)
    assert memory.get(b"t:1", 102.1) is None, "its time is up"
    token = memory.ask(b"t:1")
    memory.lost()
    memory.keep(b"t:1", token, b"one", 1000.0)
    memory.proven(103.0)
    assert memory.get(b"t:1", 103.0) is None


def test_many_keys_are_given_and_kept_like_one() -> None:
    memory = local()
    token = memory.ask(b"t:1", b"t:2", b"t:3", b"t:4")
    memory.invalidate([b"t:2"])
    for key, until in ((b"t:1", 1000.0), (b"t:2", 1000.0), (b"t:3", 101.0)):
        memory.keep(key, token, b"value", until)
    memory.keep(b"t:4", token, None, 0.0)
    keys = [b"t:1", b"t:2", b"t:3", b"t:4", b"t:5"]
    assert memory.get_many(keys, 100.5) == [b"value", None, b"value", None, None]
    assert memory.get_many(keys, 101.5) == [b"value", None, None, None, None], "the time of one is up"
    assert memory.get_many(keys, 102.5) == [None] * 5, "the messages are silent"


def test_of_several_memories_each_serves_its_caches_until_it_is_left() -> None:
    memories = Locals()
    caches = {name: replace(cache(key=f"t:{name}:{{id}}"), name=name) for name in ("user", "other")}
    users = Local([caches["user"]], 10)
    both = Local(caches.values(), 10)
    others = Local([caches["other"]], 10)
    for memory in (users, both, others):
        memories.enter(memory)
    assert memories.of == {"user": both, "other": others}
    for memory in (users, both):
        memory.proven(100.0)
        memory.keep(b"t:user:1", memory.ask(b"t:user:1"), b"one", 1000.0)
    memories.forget(b"t:user:1")
    assert [len(memory) for memory in (users, both)] == [0, 0], "also where it is not served from now"
    memories.leave(both)
    assert memories.of == {"user": users, "other": others}
    memories.leave(users)
    memories.leave(others)
    assert memories.of == {}


def test_the_least_used_entries_go_first() -> None:
    memory = local(size=3)
    for number in (1, 2, 3):
        memory.keep(b"%d" % number, memory.ask(b"%d" % number), b"x", 1000.0)
    memory.get(b"1", 101.0)
    memory.keep(b"4", memory.ask(b"4"), b"x", 1000.0)
    assert [memory.get(b"%d" % number, 101.0) for number in (1, 2, 3, 4)] == [b"x", None, b"x", b"x"]


def test_who_never_hears_of_what_was_asked_for_leaves_no_trace() -> None:
    one = local("a:{id}", size=2)
    one.proven(0.0)
    first = one.ask(b"1")
    for number in range(2, 100):
        one.ask(b"%d" % number)
    assert len(one._asked) == 2
    one.keep(b"1", first, b"Ada", 100.0)
    assert one.get(b"1", 1.0) is None
    token = one.ask(b"1", b"2", b"3")
    for key in (b"1", b"2", b"3"):
        one.keep(key, token, key, 100.0)
    assert one.get_many([b"1", b"2", b"3"], 1.0) == [None, b"2", b"3"]


def test_prefixes_that_overlap_are_asked_for_once() -> None:
    assert local("a:{id}", "a:b:{id}", "c:{id}").command[3:] == ("BCAST", "PREFIX", b"a:", "PREFIX", b"c:")
    assert local("{id}:a", "c:{id}").command[3:] == ("BCAST",)


def test_a_ping_that_is_answered_proves_what_was_before_it() -> None:
    memory = local()
    pulse = Pulse(memory, beat=0.5, patience=2.0)
    memory.lost()
    assert [pulse.due(200.0), pulse.due(200.1)] == [True, False]
    memory.keep(b"t:1", memory.ask(b"t:1"), b"one", 1000.0)
    assert memory.get(b"t:1", 200.2) is None, "not proven yet"
    pulse.answered()
    memory.keep(b"t:1", memory.ask(b"t:1"), b"one", 1000.0)
    assert [memory.get(b"t:1", now) for now in (200.3, 202.0, 202.1)] == [b"one", b"one", None]
    assert [pulse.due(200.4), pulse.due(200.6), pulse.due(202.5)] == [False, True, False]
    with pytest.raises(TimeoutError):
        pulse.due(202.7)


# ── Loaders of many ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_loader_of_many_gives_is_brought_into_order() -> None:
    assert in_order([1, 2, 3], {3: "c", 1: "a"}) == ["a", None, "c"]
    assert in_order([1, 2], ("a", None)) == ("a", None)
    for wrong in ("ab", b"ab", ["a"], iter("ab"), None):
        with pytest.raises(TypeError, match="asked for 2 values gives as many"):
            in_order([1, 2], wrong)
