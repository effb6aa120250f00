"""Bust events: compiled or not, they are told and counted the same; and a run is its batches."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from cdc_invalidator import lsn
from cdc_invalidator.log import EventLog, KeyDisplay, KeyForm
from cdc_invalidator.metrics import LAG_BUCKETS, Metrics
from cdc_invalidator.pipeline import events
from cdc_invalidator.pipeline.batch import KEYS_AN_EVENT, Batch, BustEvent, PlainBatch, Target
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.redis.scripts import BUMP_DELETED, BUMP_MISSING
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.rules.load import parse_rules

if not events.COMPILED:
    assert not os.environ.get("CI"), "the compiled part is not there"
    pytest.skip("the compiled part is not there", allow_module_level=True)

RULES = r"""
version: 1
caches:
  user: {key: "user:{id}"}
  odd: {key: "\"ä\\{id}"}
  counts: {key: "counts"}
  dash: {key: "dash:{id}:v{version}", version: "dash:{id}:ver"}
  pairs: {key: "pairs:{team}:v{version}:{id}", version: "pairs:{team}:ver", bump_over: 2}
"""
CACHES = parse_rules([("rules.yaml", RULES)], {}).caches
TARGETS = [
    *(Target(name, cache, 'public."quoted ä"') for name in ("r", "s") for cache in CACHES.values()),
    # As by hand.
    *(Target("", cache, "") for cache in CACHES.values()),
]
NOW_US = 1_795_000_000_123_456
NOW_2000 = NOW_US - lsn.EPOCH_OFFSET_US


class Collecting:
    """Takes what is written."""

    full = False
    dropped = 0

    def __init__(self) -> None:
        self.text = b""

    def write(self, text: bytes) -> int:
        self.text += text
        return len(text)


class Said(NamedTuple):
    text: bytes
    metrics: list[bytes]


def say(
    flushes: Iterable[tuple[list[BustEvent], BustReply]],
    replay_until: int,
    *,
    form: KeyForm = "hash",
    compiled: bool,
    logged: float = 1.0,
    stream: Any = None,
) -> Said:
    """What a process writes and counts for some flushes."""
    output: Any = Collecting()
    metrics = Metrics(CollectorRegistry())
    log = EventLog(output, "json", "info")
    told = Events(metrics, KeyDisplay(form, b"secret"), log, compiled=compiled, logged=logged, stream=stream)
    for lines, reply in flushes:
        told.busted(lines, reply, replay_until, NOW_US)
    counted = [line for line in generate_latest(metrics.registry).splitlines() if b"_created" not in line]
    return Said(re.sub(rb'"ts":"[^"]*"', b'"ts":""', output.text), counted)


_lags = st.sampled_from(
    [0, 1, 10, 12_000, 12_500, 12_345, 12_340, 100, 999, 1000, -1, -3_600_000_000]
    + [round(bound * 1_000_000) + off for bound in LAG_BUCKETS for off in (-1, 0, 1)]
)
# Any time until the year 9999, or from before 1970: a server's clock may be wrong.
_ages = st.integers(NOW_US - 253_402_300_799_999_999, NOW_US + 315_619_200_000_000) | st.sampled_from(
    [NOW_US + 1, NOW_US + 1_000_000, NOW_US + 1_000_001]
)
_keys = st.one_of(
    st.lists(st.binary(max_size=8), min_size=1, max_size=4),
    st.integers(1, KEYS_AN_EVENT).map(lambda count: [b"%d" % at for at in range(count)]),
)


@st.composite
def _lines(draw: st.DrawFn) -> BustEvent:
    target = draw(st.sampled_from(TARGETS))
    return BustEvent(
        target,
        draw(st.sampled_from(["delete", "bump"])) if target.pairs else target.action,
        draw(st.sampled_from(["insert", "insert,update", "delete", "truncate", "message"])),
        draw(_keys),
        draw(st.sampled_from(["change", "change", "truncate", "manual"])),
        draw(st.integers(0, 2**64 - 2) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 0x16B374D848])),
        draw(st.none() | st.one_of(_lags, _lags, _ages).map(lambda lag: NOW_2000 - lag)),
        draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def _flushes(draw: st.DrawFn) -> tuple[list[BustEvent], BustReply]:
    lines = draw(st.lists(_lines(), max_size=6))
    existed = [draw(st.integers(0, len(line.keys))) for line in lines if line.action == "delete"]
    answers = draw(st.lists(st.sampled_from([BUMP_MISSING, BUMP_DELETED, 1, NOW_US, 2**53]), min_size=1, max_size=9))
    bumped = dict.fromkeys(key for line in lines if line.action == "bump" for key in line.keys)
    return lines, BustReply(existed, {key: answers[at % len(answers)] for at, key in enumerate(bumped)})


@settings(max_examples=200)
@given(
    st.lists(_flushes(), min_size=1, max_size=3),
    st.sampled_from([0, 2**32, 0x16B374D848, lsn.NEVER]),
    st.sampled_from(["hash", "prefix"]),
)
def test_any_flush_is_told_and_counted_the_same_by_the_compiled_part_and_by_the_reference(
    flushes: list[tuple[list[BustEvent], BustReply]], replay_until: int, form: KeyForm
) -> None:
    wanted = say(flushes, replay_until, form=form, compiled=False)
    found = say(flushes, replay_until, form=form, compiled=True)

    assert found.text.split(b"\n") == wanted.text.split(b"\n")
    assert found.metrics == wanted.metrics
    for line in found.text.splitlines():
        json.loads(line)


def test_what_is_applied_anew_is_told_as_a_replay() -> None:
    line = BustEvent(TARGETS[0], "delete", "insert", [b"user:1"], "change", 2**64 - 2, None, 730)

    said = say([([line], BustReply([1], {}))], lsn.NEVER, compiled=True)

    assert json.loads(said.text)["reason"] == "replay"


def test_the_second_before_1970_is_a_second_as_any() -> None:
    line = BustEvent(TARGETS[0], "delete", "insert", [b"user:1"], "change", 5, -lsn.EPOCH_OFFSET_US - 1, 730)

    for compiled in (False, True):
        said = say([([line], BustReply([1], {}))], 0, compiled=compiled)
        assert json.loads(said.text)["committed_at"] == "1969-12-31T23:59:59.999999Z"


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def _plain_batches(draw: st.DrawFn) -> list[BustEvent]:
    lines = []
    for at in range(draw(st.integers(1, 5))):
        for target in draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True)):
            op = draw(st.sampled_from(["insert", "insert,update", "delete,update,insert"]))
            keys = draw(st.lists(st.binary(max_size=3), min_size=1, max_size=4, unique=True))
            lines.append(BustEvent(target, target.action, op, keys, "change", 1000 + 10 * at, 77 + at, 730 + at))
    return lines


def by_transaction(lines: Iterable[BustEvent]) -> list[tuple[Any, ...]]:
    return [(line.commit_lsn, line.xid, line.committed_at, *line[:5]) for line in lines]


@given(_plain_batches())
def test_the_batches_of_a_plain_batch_are_its_transactions(lines: list[BustEvent]) -> None:
    plain = PlainBatch(lines, [730], 2000)

    batches = plain.batches()

    assert by_transaction(line for batch in batches for line in batch.events()) == by_transaction(lines)
    assert [batch.commit_lsn for batch in batches] == list(dict.fromkeys(line.commit_lsn for line in lines))
    assert all(batch.weight == sum(len(line.keys) for line in batch.events()) for batch in batches)
    assert (plain.first_lsn, plain.commit_lsn) == (batches[0].commit_lsn, batches[-1].commit_lsn)
    assert set(plain.targets) == {target for batch in batches for target in batch.targets}
    assert plain.weight >= sum(batch.weight for batch in batches)
    assert all(isinstance(batch, Batch) and batch.end_lsn is None for batch in batches)


class Taking:
    """A stream that keeps what it takes."""

    def __init__(self) -> None:
        self.text = b""

    def take(self, text: bytes) -> None:
        self.text += text


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("logged", [0.0, 0.1, 1.0])
def test_of_a_sample_whole_transactions_are_logged_and_the_stream_and_the_counters_get_all(
    logged: float, compiled: bool
) -> None:
    transactions = 2000
    lines = [
        BustEvent(TARGETS[at % 2], "delete", "update", [b"user:%d" % xid], "change", xid, None, xid)
        for xid in range(transactions)
        for at in (0, 1)
    ]
    flushes = [(lines, BustReply([1] * len(lines), {}))]
    everything, stream = say(flushes, 0, compiled=compiled), Taking()
    sampled = say(flushes, 0, compiled=compiled, logged=logged, stream=stream)
    assert sampled.metrics == everything.metrics
    assert len(stream.text.splitlines()) == len(lines)
    kept = [json.loads(line)["xid"] for line in sampled.text.splitlines()]
    assert len(kept) == 2 * len(set(kept)), "of each transaction all lines, or none"
    assert logged * transactions * 0.9 <= len(set(kept)) <= logged * transactions * 1.1
    assert set(sampled.text.splitlines()) <= set(everything.text.splitlines())
