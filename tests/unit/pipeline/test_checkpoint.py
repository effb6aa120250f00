"""The position: nothing unresolved below it, never backwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cdc_invalidator.pipeline import checkpoint as checkpoint_module
from cdc_invalidator.pipeline.checkpoint import CROWD, Checkpoint, Ticket


def test_it_starts_where_the_stream_starts() -> None:
    checkpoint = Checkpoint(100)

    assert checkpoint.received_lsn == checkpoint.position == checkpoint.confirmable == 100
    assert checkpoint.idle


def test_when_idle_the_received_position_is_the_position() -> None:
    checkpoint = Checkpoint(100)

    checkpoint.received(250)

    assert checkpoint.position == 250


def test_work_in_flight_holds_what_had_been_received_before_it() -> None:
    checkpoint = Checkpoint(100)
    checkpoint.received(200)
    ticket = checkpoint.track()
    checkpoint.received(300)

    assert (checkpoint.position, checkpoint.idle) == (200, False)

    checkpoint.resolve(ticket)

    assert (checkpoint.position, checkpoint.idle) == (300, True)


def test_work_resolved_out_of_order_waits_for_the_oldest() -> None:
    checkpoint = Checkpoint(0)
    tickets = []
    for end in (10, 20, 30):
        tickets.append(checkpoint.track())
        checkpoint.received(end)

    checkpoint.resolve(tickets[1])
    assert checkpoint.position == 0
    checkpoint.resolve(tickets[2])
    assert checkpoint.position == 0
    checkpoint.resolve(tickets[0])
    assert checkpoint.position == 30


def test_a_time_counts_once_the_position_has_reached_what_had_been_committed_then() -> None:
    checkpoint = Checkpoint(100)
    assert checkpoint.as_of == 0
    checkpoint.committed(300, at=1)
    checkpoint.received(299)
    assert checkpoint.as_of == 0
    ticket = checkpoint.track()
    checkpoint.received(300)
    assert checkpoint.as_of == 0
    checkpoint.resolve(ticket)
    assert checkpoint.as_of == 1


def test_while_the_position_is_behind_the_oldest_time_is_the_one_to_reach() -> None:
    checkpoint = Checkpoint(100)
    checkpoint.committed(200, at=1)
    checkpoint.committed(300, at=2)
    checkpoint.received(250)
    assert checkpoint.as_of == 1
    checkpoint.committed(300, at=3)
    assert checkpoint.as_of == 1
    checkpoint.received(300)
    assert checkpoint.as_of == 3


def test_batches_of_one_large_transaction_hold_the_position_before_it() -> None:
    checkpoint = Checkpoint(0)
    checkpoint.received(10)
    first = checkpoint.track()
    checkpoint.resolve(first)
    last = checkpoint.track()

    assert checkpoint.position == 10

    checkpoint.received(90)
    assert checkpoint.position == 10
    checkpoint.resolve(last)
    assert checkpoint.position == 90


def test_work_in_parts_is_resolved_with_its_last_part() -> None:
    checkpoint = Checkpoint(0)
    ticket = checkpoint.track()
    ticket.parts += 2
    checkpoint.received(10)

    for _ in range(2):
        checkpoint.resolve(ticket)
        assert checkpoint.position == 0
        assert not checkpoint.idle
    checkpoint.resolve(ticket)

    assert checkpoint.position == 10


def test_equal_tickets_are_different_work() -> None:
    checkpoint = Checkpoint(0)
    one, other = checkpoint.track(), checkpoint.track()
    checkpoint.received(10)

    assert one != other
    checkpoint.resolve(other)
    assert checkpoint.position == 0
    checkpoint.resolve(one)
    assert checkpoint.position == 10


def test_a_position_that_was_received_before_changes_nothing() -> None:
    checkpoint = Checkpoint(100)
    checkpoint.received(50)
    assert checkpoint.received_lsn == 100

    checkpoint.received(200)
    checkpoint.received(150)

    assert checkpoint.received_lsn == checkpoint.position == 200


def test_only_what_is_recorded_may_be_confirmed() -> None:
    checkpoint = Checkpoint(100)
    checkpoint.received(200)
    assert checkpoint.confirmable == 100

    checkpoint.record(checkpoint.position)
    assert checkpoint.confirmable == 200

    checkpoint.record(150)
    assert checkpoint.confirmable == 200


def test_what_is_done_behind_one_that_is_held_up_does_not_pile_up() -> None:
    checkpoint = Checkpoint(100)
    held_up = checkpoint.track()
    for end in range(200, 200 + 5 * CROWD):
        ticket = checkpoint.track()
        checkpoint.received(end)
        checkpoint.resolve(ticket)

    assert len(checkpoint._in_flight) <= CROWD
    assert (checkpoint.position, checkpoint.idle) == (100, False)

    checkpoint.resolve(held_up)
    assert (checkpoint.position, checkpoint.idle) == (199 + 5 * CROWD, True)


def test_a_crowd_of_which_none_is_done_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "CROWD", 10)
    checkpoint = Checkpoint(0)
    tickets = []
    for end in range(1, 1001):
        tickets.append(checkpoint.track())
        checkpoint.received(end)

    assert list(checkpoint._in_flight) == tickets
    for end, ticket in enumerate(tickets):
        assert checkpoint.position == end
        checkpoint.resolve(ticket)
    assert checkpoint.position == 1000


@dataclass(eq=False)
class Work:
    """What the model knows of a ticket: where its transaction ends, and how many parts are to do."""

    ticket: Ticket
    end: int
    left: int = 1


@dataclass
class Model:
    """All work ever tracked, looked through anew at each question."""

    work: list[Work] = field(default_factory=list)

    def unresolved(self) -> list[Work]:
        return [work for work in self.work if work.left]


class CheckpointAgainstModel(RuleBasedStateMachine):
    """Any course of events, against a model that keeps everything.

    Position and confirmable are looked at after some steps only: looking must not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(1000)
        self.received = 1000
        self.model = Model()
        self.seen = 1000
        self.recorded = 1000

    @rule(length=st.integers(1, 50), parts=st.integers(1, 3))
    def a_transaction_comes(self, length: int, parts: int) -> None:
        ticket = self.checkpoint.track()
        ticket.parts = parts
        self.received += length
        self.model.work.append(Work(ticket, self.received, parts))
        self.checkpoint.received(self.received)

    @rule(length=st.integers(1, 50), batches=st.integers(2, 4))
    def a_large_transaction_comes_in_batches(self, length: int, batches: int) -> None:
        self.received += length
        for _ in range(batches):
            self.model.work.append(Work(self.checkpoint.track(), self.received))
        self.checkpoint.received(self.received)

    @rule(length=st.integers(1, 50))
    def a_transaction_without_busts_comes(self, length: int) -> None:
        self.received += length
        self.checkpoint.received(self.received)

    @rule(behind=st.integers(0, 100))
    def a_keepalive_of_an_earlier_position_comes(self, behind: int) -> None:
        self.checkpoint.received(self.received - behind)

    @precondition(lambda self: self.model.unresolved())
    @rule(data=st.data())
    def some_part_of_some_work_is_done(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(self.model.unresolved()))
        work.left -= 1
        self.checkpoint.resolve(work.ticket)

    @precondition(lambda self: self.model.unresolved())
    @rule()
    def the_oldest_work_is_done(self) -> None:
        work = self.model.unresolved()[0]
        while work.left:
            work.left -= 1
            self.checkpoint.resolve(work.ticket)

    @rule()
    def the_position_is_looked_at(self) -> None:
        position = self.checkpoint.position
        unresolved = self.model.unresolved()
        assert all(position < work.end for work in unresolved)
        before_oldest = [work.end for work in self.model.work if not unresolved or work.end < unresolved[0].end]
        assert position >= max(before_oldest, default=1000)
        assert unresolved or position == self.received
        assert self.seen <= position <= self.received
        self.seen = position

    @rule()
    def the_position_is_recorded(self) -> None:
        self.recorded = self.checkpoint.position
        self.checkpoint.record(self.recorded)

    @invariant()
    def what_was_not_recorded_is_not_confirmed(self) -> None:
        assert self.checkpoint.confirmable == self.recorded
        assert self.checkpoint.received_lsn == self.received
        assert self.checkpoint.idle == (not self.model.unresolved())


TestCheckpointAgainstModel = CheckpointAgainstModel.TestCase


class CrowdedCheckpointAgainstModel(CheckpointAgainstModel):
    """The same where few tickets make a crowd, so that those are forgotten all the time which are done."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(checkpoint_module, "CROWD", 3)
        super().__init__()
        self.most = 0

    @rule(count=st.integers(1, 10))
    def many_are_done_at_once_behind_the_others(self, count: int) -> None:
        for _ in range(count):
            ticket = self.checkpoint.track()
            self.received += 1
            self.checkpoint.received(self.received)
            self.checkpoint.resolve(ticket)
            self.model.work.append(Work(ticket, self.received, 0))

    @invariant()
    def what_is_done_is_forgotten(self) -> None:
        self.most = max(self.most, len(self.model.unresolved()) + 1)
        assert len(self.checkpoint._in_flight) <= max(3, 2 * self.most)

    def teardown(self) -> None:
        self.patch.undo()


TestCrowdedCheckpointAgainstModel = CrowdedCheckpointAgainstModel.TestCase


def test_a_position_is_confirmed_when_the_events_up_to_it_are_told() -> None:
    told = 0
    checkpoint = Checkpoint(0, lambda mark: mark <= told)
    for lsn, mark in ((100, 1), (200, 1), (300, 2), (400, 3)):
        checkpoint.record(lsn, mark)

    assert checkpoint.confirmable == 0
    told = 1
    assert checkpoint.confirmable == 200
    told = 3
    assert checkpoint.confirmable == 400


def test_positions_that_wait_to_be_told_are_few() -> None:
    told = False
    checkpoint = Checkpoint(0, lambda _mark: told)
    for lsn in range(5 * CROWD):
        checkpoint.record(lsn, lsn)

    assert len(checkpoint._recorded) <= CROWD + 1
    told = True
    assert checkpoint.confirmable == 5 * CROWD - 1
