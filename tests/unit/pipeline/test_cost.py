"""What a change costs, as a multiple of the least that Python can do for it; nothing here is allowed to creep up.

The measure is a loop that finds each message and cuts the key's value out of it, in the same process a moment ago: so a
slow machine, or a busy one, is slow on both sides. The limits are about three times what was measured when this was
written (CPython 3.11, x86-64), which each test tells.
"""

from __future__ import annotations

import functools
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from walsender import TABLES, USERS, Content, Reader, Server, Unit, copied, relation, update

from cdc_invalidator import lsn
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import events, scan
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import BustEvent, Target
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.rules.load import parse_rules

CHANGES = 2000
ROUNDS = 7
RULES = parse_rules(
    [
        (
            "rules.yaml",
            """
version: 1
caches:
  user: {key: "user:{id}"}
rules:
  - {name: user-changed, table: public.users, columns: [name, bio], bust: [user]}
""",
        )
    ],
    {},
)
TARGET = Target("user-changed", RULES.caches["user"], "public.users")

compiled = pytest.mark.skipif(
    not (scan.COMPILED and events.COMPILED) and not os.environ.get("CI"), reason="the compiled part is not there"
)


def rows(*, changes: int = CHANGES) -> list[Content]:
    return [
        update(USERS, b"", (), (b"%d" % at, b"7", b"Ada", b"a few words of text"))
        for at in range(100_000, 100_000 + changes)
    ]


@functools.cache
def stream(*, each_its_own: bool) -> bytes:
    """So many changes, as transactions of one row each, or as one of all of them."""
    server = Server()
    contents = [(0, row) for row in rows()]
    units = [[content] for content in contents] if each_its_own else [contents]
    for xid, some in enumerate(units, 700):
        server.write(Unit("transaction", xid, some))
    return copied(server.payloads)


def best(work: Callable[[], object]) -> float:
    """Seconds of the processor, at the best of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def least(data: bytes) -> list[bytes]:
    """The measure: each row's key, by the shortest way that Python has."""
    length = struct.Struct(">I").unpack_from
    keys = []
    pos = 0
    while pos < len(data):
        end = pos + 1 + length(data, pos + 1)[0]
        if data[pos + 30] == 0x55:  # U
            start = pos + 43
            keys.append(b"user:%b" % data[start : start + length(data, start - 4)[0]])
        pos = end
    return keys


def ratio_of_reading(*, each_its_own: bool) -> float:
    """What it costs to receive the stream, from bytes to the backlog, as a multiple of the measure."""
    data = stream(each_its_own=each_its_own)
    assert least(data) == [b"user:%d" % at for at in range(100_000, 100_000 + CHANGES)]
    server = Server()
    server.write(Unit("transaction", 699, [(0, relation(oid)) for oid in TABLES]))
    backlog = Backlog(capacity=2**60)
    reader = Reader(RULES, backlog)
    reader.read(copied(server.payloads))
    measure = best(lambda: least(data))
    cost = best(lambda: reader.read(data))
    keys = [key for batch, _ in backlog.take(2**60) for line in batch.events() for key in line.keys]
    assert len(keys) == CHANGES * ROUNDS
    return cost / measure


def ratio_of_telling(*, compiled: bool) -> float:
    """What it costs to render and count the events of those transactions, as a multiple of the same measure."""
    output: Any = Nowhere()
    told = Events(Metrics(CollectorRegistry()), KeyDisplay("hash"), EventLog(output, "json", "info"), compiled=compiled)
    now = time.time_ns() // 1000 - lsn.EPOCH_OFFSET_US
    lines = [
        BustEvent(TARGET, "delete", "update", [b"user:%d" % at], "change", 10**10 + at, now - at, at)
        for at in range(CHANGES)
    ]
    outcome = BustReply([1] * CHANGES, {})
    data = stream(each_its_own=True)
    measure = best(lambda: least(data))
    return best(lambda: told.busted(lines, outcome, 0, now + lsn.EPOCH_OFFSET_US)) / measure


class Nowhere:
    full = False
    dropped = 0

    def write(self, text: bytes) -> int:
        return len(text)


@compiled
def test_small_transactions_cost_little_by_the_compiled_pass() -> None:
    assert ratio_of_reading(each_its_own=True) < 3  # 0.9 when this was written


@compiled
def test_rows_of_a_large_transaction_cost_little_by_the_compiled_pass() -> None:
    assert ratio_of_reading(each_its_own=False) < 1.6  # 0.53 when this was written


def test_small_transactions_cost_what_they_did_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "COMPILED", False)

    assert ratio_of_reading(each_its_own=True) < 60  # 20 when this was written


def test_rows_of_a_large_transaction_cost_what_they_did_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "COMPILED", False)

    assert ratio_of_reading(each_its_own=False) < 55  # 18 when this was written


@compiled
def test_events_cost_little_by_the_compiled_part() -> None:
    assert ratio_of_telling(compiled=True) < 4.5  # 1.4 when this was written


def test_events_cost_what_they_did_by_the_reference() -> None:
    assert ratio_of_telling(compiled=False) < 19  # 6.3 when this was written
