"""The event stream without a Redis: which keys it may have, what waits for it, and what it is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors, settings
from cdc_invalidator.log import EventLog, Form, KeyDisplay, Level
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import eventstream
from cdc_invalidator.pipeline.batch import BustEvent, Target
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.eventstream import EventStream
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.rules.load import parse_rules

FILE = """
version: 1
caches:
  user: {key: "shop:user:{id}"}
  dash: {key: "shop:dash:{id}:v{version}", version: "shop:dash:{id}:ver"}
  counts: {key: "shop:counts"}
  mail: {key: "shop:mail:{email|sha256}", ttl_only: true}
"""
RULES = parse_rules([("rules.yaml", FILE)], {})

# The key


@pytest.mark.parametrize("key", ["cdc:s:watermark", "cdc:s:watermark:{3}", "cdc:s:check", "cdc:s:check:hash"])
def test_a_key_that_the_daemon_or_check_uses_is_refused(key: str) -> None:
    with pytest.raises(errors.WrongSettings, match=r"take cdc:s:events\.$"):
        eventstream.check_key(key, "s")


@pytest.mark.parametrize("key", ["", "cdc:s:events", "cdc:s:watermarks", "cdc:other:watermark"])
def test_any_other_key_will_do(key: str) -> None:
    eventstream.check_key(key, "s")
    eventstream.check_rules(key, RULES)


@pytest.mark.parametrize(
    ("key", "cache"),
    [
        ("shop:user:events", "user"),
        ("shop:user:", "user"),
        ("shop:user:a:b:c", "user"),
        ("shop:counts", "counts"),
        ("shop:counts:lock", "counts"),
        ("shop:dash:events:v1", "dash"),
        ("shop:dash:events:ver", "dash"),
        ("shop:mail:events", "mail"),
    ],
)
def test_a_key_that_a_sweep_or_a_reader_could_overwrite_is_refused(key: str, cache: str) -> None:
    with pytest.raises(errors.WrongRules, match=f"is among the keys of cache {cache}") as raised:
        eventstream.check_rules(key, RULES)
    assert raised.value.problems[0].line == list(RULES.caches).index(cache) + 4


@pytest.mark.parametrize("key", ["shop:events", "shop:dash:events", "shop:count", "shop:counts:1"])
def test_a_key_beside_those_of_the_caches_will_do(key: str) -> None:
    eventstream.check_rules(key, RULES)


def test_a_key_with_a_blank_is_a_mistake() -> None:
    with pytest.raises(errors.WrongSettings, match="CDC_EVENT_STREAM is wrong"):
        settings.load(settings.CheckOffline, {"rules": "rules.yaml", "event_stream": "a b"})


# What waits


class Redis:
    """A server that fails, refuses or takes, as the test says."""

    scripts = Mock(append="sha")

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.rounds = 0
        self.refuses: Exception | None = None
        self.fails = False

    async def ask_about(self, key: bytes, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert key == b"s"
        self.rounds += 1
        if self.fails:
            raise errors.RedisUnavailable("it is gone", code="CLOSED")
        if self.refuses is not None:
            return [self.refuses for _ in commands]
        for _, script, keys, stream, _length, *events in commands:
            assert (script, keys, stream) == ("sha", 1, b"s")
            assert len(events) <= eventstream.EVENTS_A_COMMAND
            self.entries += events
        return [len(command) - 5 for command in commands]


def lines(first: int, last: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(first, last + 1))


async def test_what_was_under_way_when_the_connection_was_lost_comes_first_on_the_next_one() -> None:
    redis: Any = Redis()
    stream = EventStream("s", 5000, Metrics(CollectorRegistry()))
    await stream.write(redis)
    assert redis.rounds == 0
    stream.take(lines(1, 2500))
    redis.fails = True
    with pytest.raises(errors.RedisUnavailable):
        await stream.write(redis)
    stream.take(lines(2501, 2600))
    redis.fails = False
    await stream.write(redis)
    assert redis.entries == lines(1, 2600).splitlines()
    assert redis.rounds == 2
    await stream.write(redis)
    assert redis.rounds == 2


async def test_no_more_events_wait_than_the_stream_would_keep() -> None:
    redis: Any = Redis()
    stream = EventStream("s", 10, Metrics(CollectorRegistry()))
    redis.fails = True
    for number in range(1, 30):
        stream.take(lines(number, number))
        with pytest.raises(errors.RedisUnavailable):
            await stream.write(redis)
    redis.fails = False
    await stream.write(redis)
    assert redis.entries == lines(20, 29).splitlines()


async def test_refusals_are_counted_and_told_once_until_it_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Mock()
    monkeypatch.setattr(eventstream, "_log", log)
    redis: Any = Redis()
    registry = CollectorRegistry()
    stream = EventStream("s", 5000, Metrics(registry))
    for warnings, refuses in [(1, True), (1, True), (1, False), (2, True)]:
        redis.refuses = errors.RedisUnavailable("no", code="BUSYKEY") if refuses else None
        stream.take(lines(1, 1500))
        await stream.write(redis)
        assert log.warning.call_count == warnings
    assert registry.get_sample_value("cdc_invalidator_event_stream_refused_total") == 4500
    assert "look at the server's log" in log.warning.call_args.kwargs["error"]


# What it is given


@pytest.mark.parametrize("level", ["info", "warning"])
@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_stream_is_given_the_logs_json_whatever_the_log_is_set_to(
    form: Form, level: Level, *, compiled: bool
) -> None:
    written: list[bytes] = []
    taken: list[bytes] = []
    output: Any = Mock(write=written.append, full=False, dropped=0)
    stream: Any = Mock(take=taken.append)
    log = EventLog(output, form, level)
    log._log = Mock()
    events = Events(Metrics(CollectorRegistry()), KeyDisplay("prefix"), log, stream=stream, compiled=compiled)
    target = Target("r", RULES.caches["user"], "public.users")
    bust = BustEvent(target, "delete", "update", [b"shop:user:1"], "change", 5, None, 730)
    events.busted([bust], BustReply([1], {}), 0, 0)
    events.gap("new_slot", ["user"], swept=True, lsn="0/5")
    told = [json.loads(text) for text in taken]
    assert [(each["event"], each["level"]) for each in told] == [("bust", "info"), ("gap", "warning")]
    assert told[0]["cache"] == "user"
    assert told[1].items() >= {"reason": "new_slot", "caches": ["user"], "swept": True, "lsn": "0/5"}.items()
    if form == "json":
        assert written == (taken if level == "info" else taken[1:])
    else:
        shown = [call.args[1] for call in log._log.log.call_args_list]
        assert shown == (["bust", "gap"] if level == "info" else ["gap"])
