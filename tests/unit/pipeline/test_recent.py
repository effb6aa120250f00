"""What was busted of late: remembered only where nobody else can have led in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cdc_invalidator.pipeline.backlog import BATCH
from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Sequence

HISTORY = ("7300000000000000001", 1)


def remembering(*commits: int) -> Recent:
    """A stream from 0 with these commits, all of which are recorded."""
    recent = Recent()
    recent.begin(HISTORY, 0)
    for lsn in commits:
        recent.note(Batch(lsn, None, 730))
    recent.recorded(commits[-1] + 10)
    return recent


def commits(recent: Recent, position: int) -> list[int]:
    return [batch.commit_lsn for batch in recent.since(position)]


def test_a_stream_that_goes_on_where_the_last_one_ended_keeps_what_is_known() -> None:
    recent = remembering(100, 110, 120)

    recent.begin(HISTORY, 130)

    assert recent.reaches(105)
    assert commits(recent, 105) == [110, 120]


def test_what_a_stream_brings_again_is_forgotten_until_it_has() -> None:
    recent = remembering(100, 110, 120)

    recent.begin(HISTORY, 110)

    assert recent.reaches(100)
    assert commits(recent, 0) == [100]


def test_a_stream_that_begins_where_another_daemon_has_led_knows_nothing_from_before() -> None:
    recent = remembering(100, 110, 120)

    recent.begin(HISTORY, 140)

    assert not recent.reaches(139)
    assert recent.reaches(140)
    assert commits(recent, 0) == []


def test_a_stream_that_begins_lower_lowers_what_counts_as_recorded() -> None:
    recent = remembering(100, 110, 120)
    # Not all that was recorded had been confirmed: it comes again, and this daemon loses the slot in the middle.
    recent.begin(HISTORY, 110)
    recent.note(Batch(110, None, 730))
    recent.recorded(115)

    # Another one has led from 115 to here, though that is lower than what was recorded at first.
    recent.begin(HISTORY, 125)

    assert not recent.reaches(116)
    assert commits(recent, 0) == []


def test_another_history_is_known_from_its_beginning_on() -> None:
    recent = remembering(100, 110, 120)

    recent.begin((HISTORY[0], 2), 110)

    assert not recent.reaches(109)
    assert commits(recent, 0) == []


CAPACITY = 100


def test_a_transaction_of_which_a_part_is_forgotten_is_not_known() -> None:
    recent = Recent(CAPACITY)
    recent.begin(HISTORY, 0)
    for lsn in (100, 100, 110):
        recent.note(Batch(lsn, None, 730, weight=30))

    assert commits(recent, 0) == [100, 110]
    assert not recent.reaches(100)
    assert recent.reaches(101)


def test_what_comes_again_and_again_does_not_add_up() -> None:
    recent = Recent(CAPACITY)
    recent.begin(HISTORY, 0)
    for _ in range(10):
        for lsn in (100, 110):
            recent.note(Batch(lsn, None, 730, weight=30))
        recent.begin(HISTORY, 0)
    recent.note(Batch(100, None, 730))

    assert recent.reaches(0)
    assert commits(recent, 0) == [100]


class RecentAgainstModel(RuleBasedStateMachine):
    """Any course of streams, against a list of what the stream has brought and would not bring again."""

    def __init__(self) -> None:
        super().__init__()
        self.recent = Recent(CAPACITY)
        self.history = HISTORY
        self.forget_all(1000)

    def forget_all(self, start: int) -> None:
        self.streamed: list[Batch] = []
        self.all_since = self.lowest_start = self.reached = self.recorded = start
        self.gaps = 0
        self.fits = True
        self.recent.begin(self.history, start)

    def note(self, batch: Batch) -> None:
        self.recent.note(batch)
        self.fits = self.fits and self.weight(self.streamed) + self.gaps * (1 + BATCH) <= CAPACITY

    def weight(self, batches: Sequence[Batch | PlainBatch]) -> int:
        return sum(batch.weight + BATCH for batch in batches)

    @rule(
        length=st.integers(1, 10),
        weights=st.lists(st.integers(0, 9) | st.just(30) | st.just(CAPACITY), min_size=1, max_size=3),
    )
    def a_transaction_is_applied_in_batches(self, length: int, weights: list[int]) -> None:
        commit_lsn = self.reached
        self.reached += length
        for weight in weights:
            batch = Batch(commit_lsn, None, 730, weight=weight)
            self.streamed.append(batch)
            self.note(batch)

    @rule(data=st.data(), more=st.integers(1, 9) | st.just(CAPACITY), partly=st.booleans())
    def a_query_gives_more_keys_for_what_was_noted(self, data: st.DataObject, more: int, partly: bool) -> None:
        if not self.streamed:
            return
        batch = data.draw(st.sampled_from(self.streamed))
        grown = Batch(batch.commit_lsn, None, 730, whole=batch) if partly else batch
        grown.grow(more)
        self.recent.grown(grown)
        self.fits = self.fits and self.weight(self.streamed) + self.gaps * (1 + BATCH) <= CAPACITY

    @rule(ahead=st.integers(0, 30))
    def a_gap_is_swept_before_what_was_received_first(self, ahead: int) -> None:
        self.gaps += 1
        self.note(Batch(self.reached + ahead, None, 0, weight=1))

    @rule(behind=st.integers(0, 20))
    def a_position_is_recorded(self, behind: int) -> None:
        self.recorded = max(self.recorded, self.reached - behind)
        self.recent.recorded(self.recorded)

    @rule(behind=st.integers(0, 30))
    def the_stream_begins_again(self, behind: int) -> None:
        start = max(1, self.recorded - behind)
        # What comes again is not to be given from before: it would stand there twice.
        self.streamed = [batch for batch in self.streamed if batch.commit_lsn < start]
        self.reached = self.recorded = start
        self.lowest_start = min(self.lowest_start, start)
        self.recent.begin(self.history, start)

    @rule(later=st.integers(1, 20))
    def another_daemon_has_led(self, later: int) -> None:
        self.forget_all(self.recorded + later)

    @rule(later=st.integers(-10, 10))
    def a_standby_was_promoted(self, later: int) -> None:
        self.history = (HISTORY[0], self.history[1] + 1)
        self.forget_all(max(1, self.recorded + later))

    @rule(data=st.data(), beside=st.integers(-1, 1))
    def a_redis_is_found_that_was_left_behind(self, data: st.DataObject, beside: int) -> None:
        lsns = {self.reached, self.all_since, *(batch.commit_lsn for batch in self.streamed)}
        position = data.draw(st.sampled_from(sorted(lsns))) + beside
        if self.recent.reaches(position):
            assert position >= self.lowest_start
            wanted = [batch for batch in self.streamed if batch.commit_lsn >= position]
            assert [batch for batch in self.recent.since(position) if batch.xids] == wanted

    @invariant()
    def nothing_is_given_twice_or_out_of_order(self) -> None:
        known = [id(batch) for batch in self.streamed]
        given = [id(batch) for batch in self.recent.since(0) if batch.xids]
        assert given == known[len(known) - len(given) :]

    @invariant()
    def what_is_remembered_is_bounded_and_counted(self) -> None:
        assert self.weight(self.recent.since(0)) == self.recent._weight <= CAPACITY

    @invariant()
    def what_fits_is_there(self) -> None:
        assert not self.fits or self.recent.reaches(self.all_since)
        assert not self.fits or [batch for batch in self.recent.since(0) if batch.xids] == self.streamed


TestRecentAgainstModel = RecentAgainstModel.TestCase
