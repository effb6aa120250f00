"""What waits for its second bust: bounded by widening, and never passed by the position."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdc_invalidator.pipeline.again import Again
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.rules.load import parse_rules

RULES = """
version: 1
caches:
  user: {key: "user:{id}", ttl: 5m, again_after: 5s}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
TARGET = Target("user-changed", parse_rules([("rules.yaml", RULES)], {}).caches["user"], "public.users")
NEVER = 2**64

Wait = Callable[[Again, Batch, Ticket], None]


def batch(commit_lsn: int, *, xid: int = 730) -> Batch:
    batch = Batch(commit_lsn, None, xid)
    batch.add(TARGET, ("update",), b"user:%d" % commit_lsn, "change")
    return batch


def later(again: Again, batch: Batch, ticket: Ticket) -> None:
    again.until_later(batch, ticket, 0.0)


def replayed(again: Again, batch: Batch, ticket: Ticket) -> None:
    again.until_replayed(batch, ticket, 0.0)


def visible(again: Again, batch: Batch, ticket: Ticket) -> None:
    again.until_visible(batch, ticket, 0.0)


@pytest.mark.parametrize("wait", [later, replayed, visible])
def test_what_is_widened_holds_the_position_where_its_oldest_work_does(wait: Wait) -> None:
    checkpoint = Checkpoint(100)
    again = Again(checkpoint.resolve, capacity=30)
    oldest = checkpoint.track()
    checkpoint.received(120)
    # It was received after the other one, and begins to wait before it: as a gap's sweep does, which overtakes.
    overtaking = checkpoint.track()
    for held, lsn in ((overtaking, 119), (oldest, 110)):
        wait(again, batch(lsn), held)
        checkpoint.resolve(held)
    for lsn in range(200, 220):
        ticket = checkpoint.track()
        checkpoint.received(lsn + 1)
        wait(again, batch(lsn), ticket)
        checkpoint.resolve(ticket)

    assert checkpoint.position == 100

    due = list(again.ready(lambda _: False, NEVER, NEVER))
    assert len(due) < 10
    assert due[0][1].batch.busts[TARGET].sweep
    for _, waiting in due:
        checkpoint.resolve(waiting.ticket)
    assert checkpoint.position == 220
    assert checkpoint.idle
    assert not again


def test_what_waits_to_be_visible_is_bounded_by_widening() -> None:
    checkpoint = Checkpoint(0)
    again = Again(checkpoint.resolve, capacity=50)
    for lsn in range(1000):
        ticket = checkpoint.track()
        again.until_visible(batch(lsn, xid=730 + lsn % 2), ticket, 0.0)
        checkpoint.resolve(ticket)

    assert again.hidden == {730, 731}
    due = list(again.ready(lambda xid: xid == 731, 0, 0.0))
    assert {reason for reason, _ in due} == {"visible"}
    assert {waiting.batch.xid for _, waiting in due} == {730}
    assert any(waiting.batch.busts[TARGET].sweep for _, waiting in due)
    assert len(due) < 10
    assert again.hidden == {731}


@pytest.mark.parametrize("wait", [later, visible])
def test_what_is_let_go_holds_no_position_and_is_told(wait: Wait) -> None:
    checkpoint = Checkpoint(100)
    again = Again(checkpoint.resolve)
    ticket = checkpoint.track()
    wait(again, batch(110), ticket)
    checkpoint.resolve(ticket)
    checkpoint.received(120)

    assert checkpoint.position == 100
    assert again.let_go() == {"user"}
    assert checkpoint.position == 120
    assert not again
    assert again.let_go() == set()
