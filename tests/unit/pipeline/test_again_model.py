"""What waits for its second bust, against a model: none is forgotten or comes too early, and no position passes it.

`test_waiting` has the single cases.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cdc_invalidator.pipeline.again import Again, Waiting
from cdc_invalidator.pipeline.backlog import BATCH
from cdc_invalidator.pipeline.batch import Batch, Target, TargetBusts
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.rules.load import parse_rules

RULES = """
version: 1
caches:
  once: {key: "once:{id}"}
  soon: {key: "soon:{id}", again_after: 1s}
  late: {key: "late:{id}", again_after: 5s}
  dash: {key: "dash:{id}:{version}", version: "dash:{id}", again_after: 5s}
  counts: {key: "counts", again_after: 1s}
"""
CACHES = parse_rules([("rules.yaml", RULES)], {}).caches
TARGETS = {name: Target("r", cache, "public.users") for name, cache in CACHES.items()}
FAR = 2**64
CAPACITY = 60

Content = dict[Target, tuple[frozenset[bytes], bool]]


def content_of(batch: Batch) -> Content:
    return {target: (frozenset(busts.keys), busts.sweep) for target, busts in batch.busts.items()}


def covers(busts: TargetBusts, keys: frozenset[bytes], *, sweep: bool) -> bool:
    return busts.sweep or (not sweep and keys <= busts.keys.keys())


@dataclass
class Entry:
    """One thing that was asked for; ``number`` is its batch's ``committed_at``, which no other one has."""

    number: int
    content: Content
    due: float
    below: int
    late_since: float | None = None


def batch_of(number: int, commit_lsn: int, xid: int, content: Iterable[tuple[str, int]]) -> Batch:
    """A batch of keys by number; of a whole cache where that is 0."""
    batch = Batch(commit_lsn, number, xid)
    for name, key in content:
        target = TARGETS[name]
        if key:
            batch.add(target, ("update",), target.template.render({"id": str(key)}) or b"", "change")
        else:
            batch.sweep(target, ("truncate",), "truncate")
    return batch


class AgainAgainstModel(RuleBasedStateMachine):
    """Any course of events, as apply handles them, against lists that keep all that was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(1000)
        self.again = Again(self.checkpoint.resolve, CAPACITY)
        self.numbers = count()
        self.lsn = 1000
        self.now = 0.0
        self.replayed = 1000
        self.unseen: set[int] = set()
        self.xids = count(730)
        self.tickets: list[Ticket] = []
        # By the reason, and what else it takes to make each list one that is in order.
        self.asked: dict[tuple[str, int], deque[Entry]] = {}
        # Given, and not yet acknowledged by Redis.
        self.in_hand: list[tuple[str, Waiting]] = []

    # What apply does.

    @rule(
        batches=st.lists(
            st.lists(st.tuples(st.sampled_from(list(TARGETS)), st.integers(0, 20)), min_size=1, max_size=8),
            min_size=1,
            max_size=3,
        ),
        hidden=st.booleans(),
        standbys=st.booleans(),
    )
    def a_transaction_is_applied(self, batches: list[list[tuple[str, int]]], hidden: bool, standbys: bool) -> None:
        xid = next(self.xids)
        commit_lsn = self.lsn
        self.lsn += 10
        if hidden:
            self.unseen.add(xid)
        for content in batches:
            ticket = self.checkpoint.track()
            self.tickets.append(ticket)
            batch = batch_of(next(self.numbers), commit_lsn, xid, content)
            if hidden:
                self.ask("visible", xid, batch, ticket, self.now)
                self.again.until_visible(batch, ticket, self.now)
            else:
                self.follow_up("first", batch, ticket, standbys=standbys)
            self.checkpoint.resolve(ticket)
        self.checkpoint.received(self.lsn)

    @precondition(lambda self: self.in_hand)
    @rule(standbys=st.booleans())
    def what_was_due_is_acknowledged(self, standbys: bool) -> None:
        for reason, waiting in self.in_hand:
            self.follow_up(reason, waiting.batch, waiting.ticket, standbys=standbys)
            self.checkpoint.resolve(waiting.ticket)
        self.in_hand = []

    def follow_up(self, reason: str, batch: Batch, ticket: Ticket, *, standbys: bool) -> None:
        if standbys and reason in {"first", "visible"}:
            batch = replace(batch, committed_at=next(self.numbers))
            self.ask("standby", 0, batch, ticket, batch.commit_lsn)
            self.again.until_replayed(batch, ticket, self.now)
        if reason != "again_after":
            batch = replace(batch, committed_at=next(self.numbers))
            for delay in {target.cache.again_after for target in batch.busts} - {None}:
                assert delay is not None
                busts = {target: busts for target, busts in batch.busts.items() if target.cache.again_after == delay}
                self.ask("again_after", delay, replace(batch, busts=busts), ticket, self.now + delay / 1000)
            self.again.until_later(batch, ticket, self.now)

    def ask(self, reason: str, which: int, batch: Batch, ticket: Ticket, due: float) -> None:
        assert batch.committed_at is not None
        entry = Entry(batch.committed_at, content_of(batch), due, ticket.below)
        self.asked.setdefault((reason, which), deque()).append(entry)

    # What makes things due.

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(behind=st.integers(0, 60))
    def the_standbys_replay(self, behind: int) -> None:
        self.replayed = max(self.replayed, self.lsn - behind)

    @precondition(lambda self: self.unseen)
    @rule(data=st.data())
    def a_transaction_becomes_visible(self, data: st.DataObject) -> None:
        self.unseen.discard(data.draw(st.sampled_from(sorted(self.unseen))))

    @precondition(lambda self: not self.in_hand)
    @rule()
    def what_is_due_is_taken(self) -> None:
        self.take(self.unseen, self.replayed, self.now)

    def take(self, unseen: set[int], replayed: int, now: float) -> None:
        for reason, waiting in self.again.ready(unseen.__contains__, replayed, now):
            which = {"visible": waiting.batch.xid, "standby": 0}.get(reason)
            if which is None:
                (which,) = {target.cache.again_after or 0 for target in waiting.batch.busts}
            for entry in self.given(reason, which, waiting):
                if reason == "visible":
                    assert which not in unseen
                else:
                    assert entry.due < (replayed if reason == "standby" else now)
                assert waiting.ticket.below <= entry.below
            self.in_hand.append((reason, waiting))
        self.assert_nothing_stays_for_good(now)

    def given(self, reason: str, which: int, waiting: Waiting) -> list[Entry]:
        """Find what was asked for and is now given: one entry as it was, or all up to one as sweeps."""
        entries = self.asked[reason, which]
        given = [entries.popleft()]
        while given[-1].number != waiting.batch.committed_at:
            given.append(entries.popleft())
        if not waiting.widened:
            assert content_of(waiting.batch) == given[-1].content
            assert len(given) == 1
        for entry in given:
            for target, (keys, sweep) in entry.content.items():
                assert covers(waiting.batch.busts[target], keys, sweep=sweep)
        assert waiting.batch.busts.keys() == {target for entry in given for target in entry.content}
        return given

    def assert_nothing_stays_for_good(self, now: float) -> None:
        """What is due and was widened waits for the last one that came before now, and for none after that."""
        for (reason, delay), entries in self.asked.items():
            for entry in entries if reason == "again_after" else ():
                if entry.due < now:
                    entry.late_since = now if entry.late_since is None else entry.late_since
                    assert now <= entry.late_since + delay / 1000

    @rule()
    def all_becomes_due(self) -> None:
        self.unseen.clear()
        # Visible, then replayed, then later: what waits for one after the other waits three times.
        for _ in range(4):
            self.what_was_due_is_acknowledged(standbys=False)
            self.now += 10
            self.take(set(), FAR, self.now)
        assert not self.again
        assert not self.in_hand
        assert not any(self.asked.values())
        assert all(ticket.parts == 0 for ticket in self.tickets)
        assert self.checkpoint.idle
        assert self.checkpoint.position == self.lsn
        self.replayed = self.lsn
        self.tickets = []

    # What holds at any time.

    @invariant()
    def what_waits_holds_the_position(self) -> None:
        waits = [entry.below for entries in self.asked.values() for entry in entries]
        waits += [waiting.ticket.below for _, waiting in self.in_hand]
        assert self.checkpoint.position <= min(waits, default=self.lsn)
        assert self.checkpoint.idle is not bool(waits)

    @invariant()
    def each_part_of_a_ticket_waits_once(self) -> None:
        waiting = [*self.waiting(), *(waiting for _, waiting in self.in_hand)]
        for ticket in self.tickets:
            assert ticket.parts == sum(each.ticket is ticket for each in waiting)

    def waiting(self) -> Iterator[Waiting]:
        yield from self.again._hidden
        yield from self.again._unreplayed.waiting
        for queue in self.again._later.values():
            yield from queue.waiting

    @invariant()
    def it_tells_what_waits(self) -> None:
        waits = {key for key, entries in self.asked.items() if entries}
        assert bool(self.again) is bool(waits)
        assert self.again.hidden == {xid for reason, xid in waits if reason == "visible"}
        assert (self.again.unreplayed is not None) is (("standby", 0) in waits)
        due = self.again.next_due()
        times = [entries[0].due for (reason, _), entries in self.asked.items() if reason == "again_after" and entries]
        assert (due is None) is (not times)
        assert due is None or due >= min(times)

    @invariant()
    def what_waits_is_bounded(self) -> None:
        for queue in (self.again._unreplayed, *self.again._later.values()):
            assert sum(each.batch.weight + BATCH for each in queue.waiting if not each.widened) <= CAPACITY
        hidden = [each.batch for each in self.again._hidden]
        # Of each transaction one batch may wait, however many there are.
        if len(hidden) > len({batch.xid for batch in hidden}):
            assert sum(batch.weight + BATCH for batch in hidden) <= CAPACITY


TestAgainAgainstModel = AgainAgainstModel.TestCase
# A mistake shows in many ways, and to make each of them small takes minutes.
TestAgainAgainstModel.settings = settings(TestAgainAgainstModel.settings, report_multiple_bugs=False)


def test_what_is_widened_becomes_due_while_more_and_more_is_added() -> None:
    again = Again(lambda _: None, CAPACITY)
    given: list[Waiting] = []
    for number in range(1000):
        now = number / 100
        again.until_later(batch_of(number, number, 730, [("soon", number + 1)]), Ticket(0), now)
        given += [waiting for _, waiting in again.ready(lambda _: False, 0, now)]
        # Due after a second, which is 100 batches; what was widened waits for the last of some six.
        assert not given or given[-1].batch.commit_lsn >= number - 100 - CAPACITY // BATCH

    assert all(waiting.widened for waiting in given)
    assert given[-1].batch.commit_lsn >= 1000 - 100 - CAPACITY // BATCH


def test_only_what_is_too_much_at_one_time_is_widened() -> None:
    again = Again(lambda _: None, CAPACITY)
    for number in range(100):
        batch = batch_of(number, number, 730, [("once", 1), ("soon", 2)])
        again.until_visible(batch, Ticket(0), number)
        again.until_replayed(batch, Ticket(0), number)
        again.until_later(batch, Ticket(0), number)
        due = [waiting for _, waiting in again.ready(lambda _: False, number + 1, number + 1.5)]
        assert [waiting.widened for waiting in due] == [False] * 3


def test_what_comes_after_a_widening_keeps_its_keys() -> None:
    again = Again(lambda _: None, CAPACITY)
    fits = CAPACITY // (BATCH + 1)
    for number in range(fits + 1 + fits):
        again.until_replayed(batch_of(number, number, 730, [("once", number + 1)]), Ticket(0), 0.0)

    due = [waiting for _, waiting in again.ready(lambda _: False, 1000, 0.0)]
    assert [waiting.widened for waiting in due] == [True] + [False] * fits


def test_the_next_one_due_is_the_first_of_all_delays() -> None:
    again = Again(lambda _: None)
    again.until_later(batch_of(1, 1, 730, [("late", 1)]), Ticket(0), 100.0)
    assert again.next_due() == 105.0
    again.until_later(batch_of(2, 2, 731, [("once", 1), ("soon", 1), ("late", 1)]), Ticket(0), 102.0)
    assert again.next_due() == 103.0
    assert [waiting.due for _, waiting in again.ready(lambda _: False, 0, 103.1)] == [103.0]
    assert again.next_due() == 105.0


def test_what_is_widened_is_due_when_the_last_of_it_is_replayed_whichever_came_last() -> None:
    again = Again(lambda _: None, CAPACITY)
    # Those that were hidden for a while come behind a later one that was not.
    for number, commit_lsn in enumerate([900, *range(200, 1000, 10)]):
        again.until_replayed(batch_of(number, commit_lsn, 730, [("once", number + 1)]), Ticket(0), 0.0)
        oldest = again.unreplayed
        if oldest is not None and oldest.widened:
            break

    assert list(again.ready(lambda _: False, 900, 0.0)) == []
    assert len(list(again.ready(lambda _: False, 901, 0.0))) == 1
