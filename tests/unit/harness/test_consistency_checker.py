"""The checker of histories: what it must find, what it must leave alone, and a small model of cache, bust and lease."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from consistency.checker import History, Impossible, behind
from consistency.history import ABSENT, Read, Reads, Write, Writes
from hypothesis import assume, example, find, given

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 1_000_000_000


def write(version: int, lsn: int, at: int, *, subject: int = 0, gone: bool = False) -> Write:
    return Write(subject, version, lsn, at, at + 1, gone)


def read(seen: int, watermark: int, at: int, *, subject: int = 0, cached: bool = True) -> Read:
    return Read(0, 0, subject, at, at + 1, watermark, seen, cached)


# One row: version 2 is committed at LSN 200, version 3 at 300.
ROW = [write(1, 0, 0), write(2, 200, 20), write(3, 300, 30)]


def required_of(writes: list[Write], *reads: Read) -> list[int]:
    return [stale.required for stale in History(writes).stale(reads)]


def test_a_version_that_a_commit_below_the_watermark_superseded_is_stale() -> None:
    assert required_of(ROW, read(1, 200, 40)) == [2]
    assert required_of(ROW, read(2, 300, 40)) == [3]
    assert required_of(ROW, read(1, 999, 40)) == [3]


def test_a_version_that_a_commit_above_the_watermark_superseded_is_not() -> None:
    assert required_of(ROW, read(1, 199, 40), read(2, 299, 40), read(3, 999, 40)) == []


def test_no_watermark_promises_nothing() -> None:
    assert required_of(ROW, read(1, 0, 40)) == []


def test_a_read_may_be_newer_than_its_watermark() -> None:
    assert required_of(ROW, read(3, 0, 40)) == []


def test_a_load_is_judged_as_an_entry_is() -> None:
    assert required_of(ROW, read(1, 300, 40, cached=False)) == [3]


def test_a_later_commit_that_is_known_to_be_in_vouches_for_those_before_it() -> None:
    # The writer of version 2 asked late for its LSN.
    late = [write(1, 0, 0), write(2, 900, 20), write(3, 300, 30)]
    assert required_of(late, read(1, 300, 40), read(2, 300, 40)) == [3, 3]
    assert required_of(late, read(1, 299, 40)) == []


def test_subjects_do_not_disturb_each_other() -> None:
    others = [*ROW, write(1, 0, 0, subject=1), write(2, 250, 25, subject=1)]
    assert required_of(others, read(2, 250, 40), read(1, 240, 40, subject=1)) == []
    assert required_of(others, read(1, 250, 40, subject=1)) == [2]


GONE = [write(1, 0, 0), write(2, 200, 20, gone=True), write(3, 300, 30), write(4, 400, 40, gone=True)]


def test_that_there_is_no_row_may_be_stale_as_well() -> None:
    assert required_of(GONE, read(ABSENT, 300, 35)) == [3]
    assert required_of(GONE, read(ABSENT, 200, 35)) == []


def test_of_several_times_without_a_row_a_read_saw_the_last_that_it_can_have_seen() -> None:
    assert required_of(GONE, read(ABSENT, 400, 45)) == []
    assert required_of(GONE, read(ABSENT, 300, 45)) == []


def test_a_row_that_is_shown_after_it_was_deleted_is_stale() -> None:
    assert required_of(GONE, read(1, 200, 25)) == [2]


@pytest.mark.parametrize(
    ("writes", "seen"),
    [
        (ROW, read(3, 0, 10)),
        (ROW, read(4, 0, 40)),
        (ROW, read(0, 0, 40)),
        (ROW, read(ABSENT, 0, 40)),
        (GONE, read(ABSENT, 0, 10)),
    ],
    ids=["before its commit", "never committed", "no version", "never absent", "not absent yet"],
)
def test_what_no_database_can_give_is_a_mistake_of_the_record(writes: list[Write], seen: Read) -> None:
    with pytest.raises(Impossible):
        required_of(writes, seen)


@pytest.mark.parametrize(
    "writes",
    [[write(2, 0, 0)], [write(1, 0, 0), write(3, 9, 9)], [write(1, 0, 0), write(1, 9, 9)]],
    ids=["no first", "a hole", "twice"],
)
def test_a_version_that_was_not_recorded_is_noticed(writes: list[Write]) -> None:
    with pytest.raises(Impossible):
        History(writes)


def test_commits_of_one_subject_that_overlap_are_noticed() -> None:
    with pytest.raises(Impossible, match="overlap"):
        History([write(1, 0, 30), write(2, 200, 20)])


def test_after_the_end_only_the_latest_version_will_do() -> None:
    history = History(ROW)
    assert [one.required for one in history.stale(history.latest([read(2, 0, 40), read(3, 0, 40)]))] == [3]


def test_without_a_daemon_a_read_is_held_against_what_was_committed_for_some_time() -> None:
    writes = [write(1, 0, 0), write(2, 200, 10 * SECOND)]
    history = History(writes)
    judged = history.without_watermark([read(1, 0, 10 * SECOND + at) for at in (5, SECOND, SECOND + 1)], seconds=1)
    assert [one.required for one in history.stale(judged)] == [2]


def test_what_may_be_behind_is_held_against_the_watermark_of_before() -> None:
    reads = [
        read(1, 100, 0),
        read(1, 200, 2 * SECOND),
        read(1, 300, 3 * SECOND),
        read(1, 300, 3 * SECOND + 1)._replace(reader=7),
        read(1, 400, 4 * SECOND)._replace(cache=1),
    ]
    assert [each.watermark for each in behind(reads, 2, careful=7)] == [0, 100, 100, 300, 0]


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    writes, reads = Writes(), Reads()
    for one in GONE:
        writes.add(one)
    for seen in (read(ABSENT, 2**63, 2**62), read(3, 7, 35, subject=4_000_000_000)):
        reads.add(seen)
    writes.save(tmp_path / "writes")
    reads.save(tmp_path / "reads")
    assert list(Writes().load(tmp_path / "writes")) == GONE
    loaded = Reads().load(tmp_path / "reads")
    loaded.extend(reads)
    assert list(loaded) == list(reads) * 2


# Any history at all, against the definition written out.


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Write], list[Read]]:
    writes = []
    for subject in range(draw(st.integers(1, 3))):
        began = sorted(draw(st.lists(st.integers(0, 50), min_size=1, max_size=6)))
        gone = draw(st.lists(st.booleans(), min_size=len(began), max_size=len(began)))
        for version, at in enumerate(began, start=1):
            lsn = 0 if version == 1 else 10 * at + draw(st.integers(1, 40))
            writes.append(write(version, lsn, at, subject=subject, gone=gone[version - 1]))
    reads = []
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, 60))
        shown = [one for one in writes if one.began <= at]
        assume(shown)
        one = draw(st.sampled_from(shown))
        seen = ABSENT if one.gone else one.version
        reads.append(read(seen, draw(st.integers(0, 700)), at, subject=one.subject))
    return draw(st.permutations(writes)), reads


def is_stale(writes: list[Write], one: Read) -> bool:
    """Whether each version that the read can have seen was superseded by one that is known to be in."""
    of_subject = [each for each in writes if each.subject == one.subject]
    seen = [
        each.version
        for each in of_subject
        if (each.gone if one.seen == ABSENT else each.version == one.seen) and each.began <= one.ended
    ]
    return all(any(later.version > version and later.lsn <= one.watermark for later in of_subject) for version in seen)


# The second commit begins as the read ends.
@example(([write(1, 0, 0, gone=True), write(2, 11, 1, gone=True)], [read(ABSENT, 11, 0)]))
@example(([write(1, 0, 0), write(2, 11, 1, gone=True)], [read(ABSENT, 0, 0)]))
@given(histories())
def test_the_checker_finds_what_the_definition_says(drawn: tuple[list[Write], list[Read]]) -> None:
    writes, reads = drawn
    found = [stale.read for stale in History(writes).stale(reads)]
    assert found == [one for one in reads if is_stale(writes, one)]


# Cache, bust, lease and watermark as a model: what the lease allows is never stale, what it prevents can be found.


class Model:
    """One row and its key: commits, a daemon that busts them in order, readers that can be anywhere on their way."""

    def __init__(self, *, lease: bool, daemon: bool = True) -> None:
        self._lease, self._daemon = lease, daemon
        self.writes = [write(1, 0, 0)]
        self.reads: list[Read] = []
        self._now = 0
        self._busted = 1
        self._entry: int | None = None
        self._lock: int | None = None
        self._loading: dict[int, int] = {}

    def step(self, action: str, reader: int) -> None:
        self._now += 10
        if action == "commit":
            version = len(self.writes) + 1
            self.writes.append(write(version, 100 * version, self._now))
        elif action == "bust" and self._daemon and self._busted < len(self.writes):
            self._busted += 1
            self._entry = self._lock = None
        elif action == "read" and reader not in self._loading:
            self._read(reader)
        elif action == "store" and reader in self._loading:
            version = self._loading.pop(reader)
            if not self._lease or self._lock == reader:
                self._entry = version
                self._lock = None

    def _read(self, reader: int) -> None:
        watermark = self.writes[self._busted - 1].lsn
        cached = self._entry is not None
        seen = len(self.writes) if self._entry is None else self._entry
        self.reads.append(Read(reader, 0, 0, self._now, self._now + 1, watermark, seen, cached))
        if not cached and (not self._lease or self._lock is None):
            self._lock = reader
            self._loading[reader] = seen

    def stale(self) -> int:
        history = History(self.writes)
        judged = self.reads if self._daemon else history.latest(self.reads[-1:])
        return sum(1 for _ in history.stale(judged))


STEPS = st.lists(
    st.tuples(st.sampled_from(["commit", "bust", "read", "store"]), st.integers(0, 2)), min_size=1, max_size=40
)


def stale_after(steps: list[tuple[str, int]], **model: bool) -> int:
    played = Model(**model)
    for action, reader in steps:
        played.step(action, reader)
    return played.stale()


@given(STEPS)
def test_what_the_lease_allows_is_never_stale(steps: list[tuple[str, int]]) -> None:
    assert stale_after(steps, lease=True) == 0


@pytest.mark.parametrize("model", [{"lease": False}, {"lease": True, "daemon": False}], ids=["no lease", "no daemon"])
def test_the_races_that_lease_and_daemon_prevent_are_found(model: dict[str, bool]) -> None:
    steps = find(STEPS, lambda steps: stale_after(steps, **model) > 0)
    assert len(steps) <= 6
