"""The samples of `verify`: how many are taken, and that neither their number nor a refusal costs anything."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import verify
from cdc_invalidator.pipeline.batch import BustEvent, PlainBatch, Target
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.redis.fingerprint import ABSENT, LARGE, Look
from cdc_invalidator.rules.load import parse_rules

TEXT = """
version: 1
caches:
  user: {key: "user:{id}"}
  both: {key: "both:{id}:{version}", version: "both:{id}", bump_over: 9}
rules:
  - {name: changed, table: public.users, bust: [user, both]}
"""
RULES = parse_rules([("rules.yaml", TEXT)], {})
USER = Target("changed", RULES.caches["user"], "public.users")
BOTH = Target("changed", RULES.caches["both"], "public.users")


def made(share: float, grace: float = 5.0) -> Verify:
    metrics = Metrics(CollectorRegistry())
    output: Any = Mock(full=False, stuck=False, dropped=0, failure=None, mark=0, written=0)
    events = Events(metrics, KeyDisplay("hash"), EventLog(output, "json", "info"))
    return Verify(share, grace, metrics=metrics, events=events, seed=7)


def busts(*groups: list[bytes], target: Target = USER, action: str = "delete") -> list[BustEvent]:
    return [BustEvent(target, action, "update", keys, "change", 100 + at, 1, 5) for at, keys in enumerate(groups)]


def chosen_of(verifier: Verify, events: list[BustEvent]) -> list[bytes]:
    return verifier.choose(events, [event.keys for event in events if event.action == "delete"])


def begun(verifier: Verify, events: list[BustEvent], look: Look = b"string:1") -> list[bytes]:
    keys = chosen_of(verifier, events)
    verifier.begin([look] * len(keys), [], time.monotonic())
    return keys


class Redis:
    """What answers `step`: the fingerprints of all keys, and what was busted once more."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.busted: list[bytes] = []

    async def fingerprints(self, keys: list[bytes]) -> list[Look]:
        return [self.look] * len(keys)

    async def bust(self, _server: Any, batches: list[PlainBatch]) -> None:
        self.busted += [key for batch in batches for event in batch.events() for key in event.keys]

    async def step(self, verifier: Verify) -> None:
        server: Any = self
        await verifier.step(server, self.bust)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 400), min_size=100, max_size=200))
def test_the_share_is_what_was_asked_for_however_events_come(sizes: list[int]) -> None:
    verifier = made(0.01)
    taken = 0
    for size in sizes:
        verifier._left_until = 0
        events = busts(*([b"%d" % number] for number in range(size)))
        chosen = chosen_of(verifier, events)
        assert {(key,) for key in chosen} <= {tuple(event.keys) for event in events}
        taken += len(chosen)
    # Ten standard deviations.
    expected = sum(sizes) / 100
    assert abs(taken - expected) < 10 * expected**0.5 + 10


def test_with_a_share_of_1_all_deletes_are_taken() -> None:
    verifier = made(1)
    events = [
        *busts([b"a"], [b"b", b"c"], []),
        *busts([b"v"], action="bump"),
        *busts([b"both:1:7"], target=BOTH),
        *busts([b"d"]),
    ]
    assert chosen_of(verifier, events) == [b"a", b"b", b"c", b"both:1:7", b"d"]


def test_what_is_not_there_or_too_large_is_not_looked_at_again() -> None:
    verifier = made(1)
    begun(verifier, busts([b"a"]), ABSENT)
    begun(verifier, busts([b"b"]), LARGE)
    assert verifier.due_in(0) is None
    assert verifier.status()["results"] == {"user": {"too_large": 1}}


def test_no_more_are_taken_than_can_be_looked_at() -> None:
    verifier = made(1)
    many = [[b"%d" % number] for number in range(3 * verify.STEP)]
    assert len(begun(verifier, busts(*many))) == verify.STEP
    assert begun(verifier, busts([b"more"])) == []
    verifier._left_until = 0
    assert begun(verifier, busts([b"more"])) == [b"more"]


async def test_samples_are_bounded_and_taken_again_once_some_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STEP_SECONDS", 0)
    verifier = made(1, grace=0)
    for flush in range(50):
        begun(verifier, busts(*([b"%d:%d" % (flush, number)] for number in range(verify.STEP))))
    assert len(verifier._watched) == verify.MOST
    await Redis(ABSENT).step(verifier)
    assert verifier.status()["results"] == {"user": {"empty": verify.STEP}}
    assert begun(verifier, busts([b"more"])) == [b"more"]


def test_the_keys_of_samples_are_bounded_in_bytes() -> None:
    verifier = made(1)
    for number in range(9):
        begun(verifier, busts([b"%d" % number + b"x" * (verify.MOST_BYTES // 4)]))
    assert len(verifier._watched) == 4


async def test_a_refusal_ends_sampling_until_the_next_connection_and_says_what_to_grant() -> None:
    verifier = made(1)
    refusal = errors.RedisUnavailable("grant +dump", code="NOPERM")
    begun(verifier, busts([b"a"]), refusal)
    assert verifier.status()["error"] == "grant +dump"
    assert begun(verifier, busts([b"b"])) == []
    verifier.connected()
    assert verifier.status()["error"] is None
    assert begun(verifier, busts([b"b"])) == [b"b"]


async def test_the_same_content_is_busted_once_more_unless_the_connection_was_lost() -> None:
    verifier, found = made(1, grace=0), Redis(b"string:1")
    begun(verifier, busts([b"a"]))
    await found.step(verifier)
    assert found.busted == [b"a"]
    begun(verifier, busts([b"b"]))
    verifier.connected()
    verifier._step_at = 0
    await found.step(verifier)
    assert found.busted == [b"a"]
    assert verifier.due_in(0) is None


async def test_a_bust_for_another_change_leaves_the_sample_that_is_to_be_proven() -> None:
    verifier = made(1, grace=0)
    begun(verifier, busts([b"a"]))
    begun(verifier, busts([b"a"]))
    assert len(verifier._watched) == 1
    await Redis(b"string:1").step(verifier)
    begun(verifier, busts([b"b", b"a", b"c"]))
    assert verifier.status()["results"] == {"user": {"superseded": 1}}
    # A sample of that other change has begun.
    assert verifier._watched.keys() == {b"a", b"b", b"c"}


async def test_while_much_is_busted_at_once_no_proof_is_awaited() -> None:
    verifier = made(1, grace=0)
    begun(verifier, busts([b"a"]))
    await Redis(b"string:1").step(verifier)
    chosen_of(verifier, busts(*([b"%d" % number] for number in range(verify.MANY_EVENTS))))
    assert verifier.status()["results"] == {}
    chosen_of(verifier, busts(*([b"%d" % number] for number in range(verify.MANY_EVENTS + 1))))
    assert verifier.status()["results"] == {"user": {"superseded": 1}}


async def test_a_sweep_of_the_cache_leaves_its_samples() -> None:
    verifier = made(1, grace=0)
    begun(verifier, busts([b"a"]))
    await Redis(b"string:1").step(verifier)
    verifier.swept(["other"])
    assert verifier.due_in(0) is not None
    verifier.swept(["user"])
    assert verifier.due_in(0) is None
    assert verifier.status()["results"] == {"user": {"superseded": 1}}
