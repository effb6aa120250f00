"""Messages: each key is told on its own channel or to everybody, none is left out, and none grows without bound."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_invalidator import errors
from cdc_invalidator.pipeline.batch import BustEvent, Target
from cdc_invalidator.pipeline.messages import MOST_BYTES, MOST_KEYS, MOST_MESSAGES, Messages
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from cdc_invalidator.rules.model import Cache


def cache_of(fields: str) -> Cache:
    return parse_rules([("rules.yaml", f"version: 1\ncaches:\n  c: {fields}\n")], {}).caches["c"]


def told(cache: Cache, keys: list[bytes], action: str = "delete") -> list[tuple[str, dict[str, Any]]]:
    event = BustEvent(Target("r", cache, "s.t"), action, "insert", keys, "change", 77, 1_000_000, 5)
    messages = Messages([cache]).of_events([event])
    return [(message.channel.decode(), json.loads(message.payload)) for message in messages]


@given(st.lists(st.tuples(st.text("a:b", max_size=6), st.text("a:b", max_size=6)), min_size=1, max_size=5))
@example([("a:b", "a")])
@example([("", ":")])
def test_a_key_is_told_on_its_own_channel_or_to_everybody_and_never_on_another(rows: list[tuple[str, str]]) -> None:
    cache = cache_of("{key: 'k:{x}:{y}:{x}', publish: 'c/{x}'}")
    rendered = {cache.key.render({"x": x, "y": y}): f"c/{x}" for x, y in rows}

    found = told(cache, [key for key in rendered if key is not None])

    assert sorted(key for _, each in found for key in each["keys"]) == sorted(key.decode() for key in rendered if key)
    for channel, each in found:
        assert channel == "c/*" or {rendered[key.encode()] for key in each["keys"]} == {channel}


def test_a_key_that_can_be_read_in_one_way_is_told_on_its_own_channel_only() -> None:
    cache = cache_of("{key: 'k:{x|sha256}:{y}', publish: 'c/{x|sha256}'}")
    key = cache.key.render({"x": "1", "y": "2"})
    assert key is not None
    assert [channel for channel, _ in told(cache, [key])] == [f"c/{key.split(b':')[1].decode()}"]


def test_many_keys_are_several_messages_and_too_many_are_a_sweep() -> None:
    cache = cache_of("{key: 'k:{x}', publish: 'c'}")
    keys = [b"k:%d" % n for n in range(MOST_KEYS * MOST_MESSAGES)]
    found = told(cache, keys)
    assert [len(each["keys"]) for _, each in found] == [MOST_KEYS] * MOST_MESSAGES
    assert found[0][1] | {"keys": 0} == {"cache": "c", "keys": 0, "lsn": 77, "committed_at": 946684801000}
    assert told(cache, [*keys, b"k:more"]) == [
        ("c", {"cache": "c", "sweep": True, "lsn": 77, "committed_at": 946684801000})
    ]
    long = told(cache, [b"k:%d" % n + b"x" * 1000 for n in range(100)])
    assert len(long) == 2
    assert max(sum(map(len, each["keys"])) for _, each in long) <= MOST_BYTES


def test_a_key_that_is_no_text_is_told_as_a_sweep() -> None:
    assert "sweep" in told(cache_of("{key: 'k:{x}', publish: 'c'}"), [b"k:\xff"])[0][1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("{key: 'k:{x}', publish: 'c:{y}'}", "a channel is read from the `key`, which does not hold `{y}`"),
        ("{key: 'k:{x|sha256}', publish: 'c:{x}'}", "which does not hold `{x}`"),
        ("{key: 'k:{x}:{version}', version: 'v:{y}', publish: 'c:{x}'}", "read from the `version`"),
        ("{key: 'k:{x}', ttl_only: true, publish: 'c'}", "nothing busts a cache that is `ttl_only`"),
        ("{key: 'k:{x}', publish: 'c:*'}", "a `*` stands for the rest of a `key` only"),
    ],
)
def test_a_channel_that_no_bust_can_name_is_refused(fields: str, sentence: str) -> None:
    with pytest.raises(errors.WrongRules, match=r"rules\.yaml:3:") as wrong:
        cache_of(fields)
    assert sentence in str(wrong.value)
