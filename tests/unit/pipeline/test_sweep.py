"""The pace of sweeps: as many keys a second as CDC_SWEEP_RATE says, evenly, and none lost by waiting."""

from __future__ import annotations

import time
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.messages import Messages
from cdc_invalidator.pipeline.sweep import Asked, Cause, Pass, Request, Sweeps
from cdc_invalidator.redis.server import SCAN_COUNT, BustReply, CacheServer, Cursor
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.suffixes import BESIDE

RULES = "version: 1\ncaches: {a: {key: 'a:{id}'}, b: {key: 'b:{id}'}, v: {key: 'v:{version}', version: 'v:{id}'}}"
CACHES = parse_rules([("rules.yaml", RULES)], {}).caches


class Clock:
    """The time, which passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Scanned:
    """A server of that many keys, none of them ours, which notes when how many were looked at."""

    beside = BESIDE

    def __init__(self, clock: Clock, keys: int) -> None:
        self.clock = clock
        self.keys = keys
        self.steps: list[tuple[float, int]] = []
        self.patterns: list[bytes] = []

    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        self.steps.append((self.clock.now, count))
        self.patterns.append(pattern)
        reached = (cursor or 0) + count
        return (reached if reached < self.keys else None), []

    async def size(self) -> int | None:
        return self.keys

    async def bust(self, deletes: list[list[bytes]], _bumps: dict[bytes, int]) -> BustReply:
        return BustReply([0] * len(deletes), {})


def sweeping(*names: str, rate: int) -> Sweeps:
    sweeps = Sweeps(Metrics(CollectorRegistry()), lambda _ticket: None, Messages([]), rate=rate)
    for name in names:
        sweeps.request(
            CACHES[name], Cause("r", "public.t", "truncate", "truncate"), Request(1, None, None), [Ticket(0)]
        )
    return sweeps


def ask(sweeps: Sweeps, lsn: int, bust: str = "first", xid: int | None = 7) -> Ticket:
    """Ask for a sweep as a batch of a transaction does; return its ticket."""
    ticket = Ticket(lsn)
    request = Request(lsn, xid, None, bust=bust)
    sweeps.request(CACHES["a"], Cause("r", "t", "delete", "unanswered"), request, [ticket])
    return ticket


async def step(sweeps: Sweeps, server: Scanned) -> list[Pass]:
    # Of a server, a sweep that finds nothing needs no more.
    over, denied = await sweeps.step(cast("CacheServer", server))
    assert not denied
    return over


async def run(sweeps: Sweeps, server: Scanned, clock: Clock) -> list[Pass]:
    """Step as apply does, each time after just as much patience as is asked for."""
    over: list[Pass] = []
    while sweeps:
        clock.now += sweeps.patience()
        over += await step(sweeps, server)
    return over


async def test_the_batches_of_one_transaction_share_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 10 * SCAN_COUNT)
    resolved: list[Ticket] = []
    sweeps = Sweeps(Metrics(CollectorRegistry()), resolved.append, Messages([]))
    ask(sweeps, 1)
    await step(sweeps, server)
    second = ask(sweeps, 1)
    assert len(sweeps) == 1, "one that has begun since the commit does"
    assert resolved == [second], "the first ticket stands for both"
    (over,) = await run(sweeps, server, clock)
    assert [request.transactions for request in over.asked["a"].requests.values()] == [1]
    third = ask(sweeps, 1)
    assert (len(sweeps), resolved) == (0, [second, third]), "and so does one that is over"
    # Not for another transaction, nor for the same one when standbys show it; what no transaction asks for, never.
    ask(sweeps, 2)
    await step(sweeps, server)
    ask(sweeps, 2, "standby")
    assert len(sweeps) == 2
    ask(sweeps, 3)
    await run(sweeps, server, clock)
    assert len(sweeps) == 0
    ask(sweeps, 3, xid=None)
    assert len(sweeps) == 1
    await run(sweeps, server, clock)
    # Another Redis has had none of it.
    ask(sweeps, 4)
    await run(sweeps, server, clock)
    sweeps.restart()
    ask(sweeps, 4)
    assert len(sweeps) == 1


async def test_without_a_rate_no_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 10 * SCAN_COUNT)

    await run(sweeping("a", rate=0), server, clock)

    assert server.steps == [(1000.0, SCAN_COUNT)] * 20


@pytest.mark.parametrize(("rate", "count"), [(1, 10), (100, 10), (1000, 100), (10_000, 1000), (1_000_000, 1000)])
async def test_a_slow_pace_takes_small_steps(rate: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 1)

    await run(sweeping("a", rate=rate), server, clock)

    assert {step for _, step in server.steps} == {count}


async def test_all_sweeps_together_keep_to_the_rate_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 5000)
    sweeps = sweeping("a", "b", "v", rate=1000)

    over = await run(sweeps, server, clock)

    # Locks and keys of two caches, and the counters of the third one.
    assert sum(count for _, count in server.steps) == 25_000
    # A second may be caught up with, at the beginning as well.
    assert 23.9 <= clock.now - 1000 <= 25
    assert [name for each in over for name in each.asked] == ["v", "a", "b"]
    assert {pattern[:1] for pattern in server.patterns[60:63]} == {b"a", b"b", b"v"}


async def test_in_a_hurry_no_step_waits_and_the_pace_comes_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 10_000)
    sweeps = sweeping("a", rate=100)
    while sweeps.patience() == 0:
        await step(sweeps, server)
    paced = len(server.steps)
    assert await step(sweeps, server) == []
    assert len(server.steps) == paced

    sweeps.hurry = True
    for _ in range(50):
        assert sweeps.patience() == 0
        await step(sweeps, server)
    assert len(server.steps) == paced + 50

    sweeps.hurry = False
    assert sweeps.patience() > 0
    assert await step(sweeps, server) == []
    assert len(server.steps) == paced + 50


@given(
    st.integers(1, 20_000),
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
    st.lists(st.sampled_from(list(CACHES)), min_size=1, max_size=3, unique=True),
)
async def test_whenever_the_steps_come_no_stretch_of_time_sees_more_than_the_rate(
    rate: int, pauses: list[float], names: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        server = Scanned(clock, 2**60)
        sweeps = sweeping(*names, rate=rate)
        for pause in pauses:
            clock.now += pause
            await step(sweeps, server)

    most = max(count for _, count in server.steps)
    for first, (begin, _) in enumerate(server.steps):
        looked_at = 0
        for end, count in server.steps[first:]:
            looked_at += count
            # What was missed in the second before may be caught up with, and a step is not cut.
            assert looked_at <= rate * (end - begin + 1) + most + 0.01


async def test_what_was_asked_for_goes_on_until_its_pass_is_over_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    server = Scanned(clock, 2 * SCAN_COUNT)
    sweeps = sweeping(rate=0)

    def ask(prefix: bytes) -> Asked:
        request = Request(1, None, None, prefixes={prefix: None})
        return sweeps.request(CACHES["a"], Cause("r", "public.t", "insert", "change"), request, [Ticket(0)])

    first = ask(b"a:1")
    await step(sweeps, server)
    behind = ask(b"a:2")
    assert first is not behind, "the search has begun"
    sweeps.restart()
    assert (first.over, behind.over) == (False, False), "both go on in one, on the next connection"
    await run(sweeps, server, clock)
    assert (first.over, behind.over) == (True, True)

    last = ask(b"a:3")
    await step(sweeps, server)
    assert not last.over
    sweeps.end()
    assert last.over
