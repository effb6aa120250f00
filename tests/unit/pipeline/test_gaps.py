"""A gap's steps, with readers, transactions that the stream does not have, failures and crashes in between.

What must hold at every moment: for a cache that the watermark names, no entry is older than a commit that readers can
see and that the watermark has passed; whether the stream had it or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import gaps, record, redis_connection
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.pipeline.continuity import Kept
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.followup import PostgresView
from cdc_invalidator.pipeline.gaps import Gaps
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.sweep import SweepOptions
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.postgres.snapshot import Horizon
from cdc_invalidator.redis import info
from cdc_invalidator.redis.lookups import Lookups
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.redis.watermark import Position, Watermark
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.suffixes import BESIDE

START = 1000
KEYS = 2
ENTRIES = [name for n in range(KEYS) for name in (b"user:%d" % n, b"user:%d\0lock" % n)]
RULES = parse_rules(
    [
        (
            "rules.yaml",
            (
                'version: 1\ncaches:\n  user: {key: "user:{id}"}\n  slow: {key: "slow:{id}", again_after: 5s}\n'
                "rules:\n  - {name: changed, table: public.users, bust: [user, slow]}\n"
            ),
        )
    ],
    {},
)
TARGET = Target("changed", RULES.caches["user"], "public.users")
DENIED = errors.RedisUnavailable("it may not", code="NOPERM", report=True)
EARLY = Watermark(START, 0, "7", 1, {"user": "0"})


@dataclass
class Redis:
    """Its entries: the version of a row that is cached, or the lease of a reader that loaded one. And a watermark."""

    entries: dict[bytes, int] = field(default_factory=dict)
    mark: Watermark = EARLY


@dataclass
class Commit:
    """What a transaction made of a row."""

    lsn: int
    row: int
    version: int
    in_stream: bool


@dataclass
class ReadStandby:
    """A standby that readers load from; ``replayed``: the LSN that it has reached."""

    replayed: int = START
    awaited: bool = True
    known: dict[str, str | None] = field(default_factory=dict)

    def recall(self, _: object) -> bool:
        return False

    def returned(self) -> bool:
        return False

    def want(self) -> None:
        pass

    rest = want

    def overdue(self, _since: float, _due: float) -> None:
        pass


class World:
    """A database with readers, a Redis, and the apply task of one daemon after the other.

    ``lags``: the readers load from a standby, which replays only when it is told to.
    """

    def __init__(self, runner: asyncio.Runner, *, lags: bool) -> None:
        self._runner = runner
        self.standby = ReadStandby() if lags else ReadStandby(2**64, awaited=False)
        self.late: int | None = None
        self.checkpoint = Checkpoint(START)
        self.lsn = START
        self.xid = 100
        self.commits: list[Commit] = []
        self.running: dict[int, int] = {}
        self.looks = 0
        self.redis = Redis()
        self.fills: dict[int, tuple[int, int]] = {}
        self.failures = 0
        self.denials = 0
        self.log: list[tuple[str, list[str]]] = []
        self.start()

    def start(self) -> None:
        """A daemon starts, the first or another after a crash; it receives again what was not confirmed."""
        start = self.checkpoint.confirmable
        self.checkpoint = Checkpoint(start)
        self.backlog = Backlog()
        metrics = Metrics(CollectorRegistry())
        events = Events(
            metrics, KeyDisplay("hash"), EventLog(Mock(full=False, dropped=0, failure=None), "json", "info")
        )
        standbys: Any = self.standby
        queries: Any = Mock(derive=AsyncMock(), late=list)
        server: Any = lambda: Server(self)  # noqa: E731
        self.apply = Apply(
            server,
            PostgresView(self._hidden, queries, standbys, self._horizon, self._reached),
            Kept(RULES, self.digests, Position("7", 1, start, self.lsn), Recent()),
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            sweeps=SweepOptions(),
            metrics=metrics,
            events=events,
            inspection=Verify(0, 0, metrics=metrics, events=events),
            suspicious=False,
        )
        for commit in self.commits:
            if commit.in_stream and commit.lsn >= start:
                self._receive(commit)

    @property
    def digests(self) -> dict[str, str]:
        return {"user": str(self.looks)}

    async def _hidden(self, _: Iterable[int]) -> set[int]:
        return set()

    async def _horizon(self) -> Horizon:
        horizon = Horizon(min(self.running, default=self.xid), self.xid)
        if self.late is not None:
            self._run(self.late)
            self.late = None
            self.apply.gap({"user": "table_changed"})
        return horizon

    async def _reached(self) -> int:
        return self.lsn + 5

    def version(self, row: int) -> int:
        """The version that readers see."""
        seen = (commit for commit in self.commits if commit.row == row and commit.lsn < self.standby.replayed)
        return max((commit.version for commit in seen), default=0)

    def _commit(self, row: int, *, in_stream: bool) -> Commit:
        self.lsn += 10
        commit = Commit(self.lsn, row, len(self.commits) + 1, in_stream)
        self.commits.append(commit)
        return commit

    def _receive(self, commit: Commit) -> None:
        batch = Batch(commit.lsn, 77, 7, commit.lsn + 5)
        batch.add(TARGET, ["update"], b"user:%d" % commit.row, "change")
        self.backlog.put(batch, self.checkpoint.track())
        self.checkpoint.received(commit.lsn + 5)

    def _run(self, row: int) -> None:
        self.running[self.xid] = row
        self.xid += 1

    # What happens.

    def write(self, row: int) -> None:
        """An ordinary transaction."""
        self.xid += 1
        self._receive(self._commit(row, in_stream=True))

    def unseen(self, row: int) -> None:
        """Something happens to a table while a transaction has changed it, and the daemon notices at once."""
        self._run(row)
        self.looks += 1
        self.apply.redigest(self.digests, None, {"user": "table_changed"})

    def unseen_late(self, row: int) -> None:
        """It is noticed just after the daemon has looked at the transactions for another gap."""
        self.late = row

    def replay(self, _: int) -> None:
        """The standby catches up."""
        self.standby.replayed = max(self.standby.replayed, self.lsn + 5)

    def end(self, number: int) -> None:
        """A transaction that the stream does not have commits."""
        if self.running:
            row = self.running.pop(sorted(self.running)[number % len(self.running)])
            commit = self._commit(row, in_stream=False)
            self.checkpoint.received(commit.lsn + 5)

    def load(self, row: int) -> None:
        """A reader takes the lease and loads, if there is nothing to read."""
        key = b"user:%d" % row
        if key not in self.redis.entries and key + b"\0lock" not in self.redis.entries:
            self.redis.entries[key + b"\0lock"] = len(self.fills)
            self.fills[len(self.fills)] = row, self.version(row)

    def store(self, row: int) -> None:
        """A reader that holds a lease stores what it loaded."""
        token = self.redis.entries.pop(b"user:%d\0lock" % row, None)
        if token is not None:
            self.redis.entries[b"user:%d" % row] = self.fills[token][1]
            self.judge()

    def read(self, row: int) -> None:
        """A reader loads and stores before anything else happens."""
        self.load(row)
        self.store(row)

    def deny(self, count: int) -> None:
        """For so many commands on keys, a right is missing."""
        self.denials = count

    def fail(self, count: int) -> None:
        self.failures = count

    def crash(self, _: int) -> None:
        self.start()

    def turns(self, count: int) -> None:
        async def turn() -> None:
            for _ in range(count):
                await self.apply._turn()

        self._runner.run(turn())

    def judge(self) -> None:
        mark = self.redis.mark
        if "user" not in mark.rules:
            return
        for commit in self.commits:
            cached = self.redis.entries.get(b"user:%d" % commit.row)
            assert cached is None or commit.lsn >= mark.lsn or cached >= commit.version, (mark, commit, cached)


class Server:
    """A connection; a search looks at one entry a step."""

    watermarked = True
    beside = BESIDE

    def __init__(self, world: World) -> None:
        self.lookups = Lookups()
        self._world = world
        self._redis = world.redis

    def _ask(self) -> None:
        if self._world.failures:
            self._world.failures -= 1
            raise errors.RedisUnavailable("it is gone", code="CLOSED")

    def _denied(self) -> bool:
        self._ask()
        denied = bool(self._world.denials)
        self._world.denials -= denied
        return denied

    async def connect(self) -> None:
        self._ask()

    async def close(self) -> None:
        pass

    async def read_watermarks(self) -> list[Watermark | None]:
        self._ask()
        return [self._redis.mark]

    async def bust(self, deletes: Sequence[Sequence[bytes]], _bumps: Mapping[bytes, int], *_more: Any) -> BustReply:
        if self._denied():
            return BustReply([0] * len(deletes), {}, dict.fromkeys(range(len(deletes)), DENIED))
        for keys in deletes:
            for key in keys:
                self._redis.entries.pop(key + b"\0lock", None)
                self._redis.entries.pop(key, None)
        return BustReply([len(keys) for keys in deletes], {})

    async def unlink(self, keys: Sequence[bytes]) -> int:
        if self._denied():
            raise DENIED
        for key in keys:
            self._redis.entries.pop(key, None)
        return len(keys)

    async def scan(self, cursor: int | None, pattern: bytes, _count: int) -> tuple[int | None, list[bytes]]:
        if self._denied():
            raise DENIED
        at = cursor or 0
        entry = ENTRIES[at]
        meant = entry in self._redis.entries and (not pattern.endswith(b"\0lock") or entry.endswith(b"\0lock"))
        return (at + 1 if at + 1 < len(ENTRIES) else None), [entry] if meant else []

    async def write_watermark(self, watermark: Watermark) -> bool:
        self._ask()
        self._redis.mark = watermark
        self._world.judge()
        return True

    async def size(self) -> int:
        return 0

    async def info(self) -> None:
        pass


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a clock."""
    monkeypatch.setattr(redis_connection, "_log", Mock())
    monkeypatch.setattr(info, "_log", Mock())
    monkeypatch.setattr(record, "HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(gaps, "_log", Mock())
    monkeypatch.setattr(gaps, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(gaps, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Backlog, "wait", AsyncMock())
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())
    monkeypatch.setattr(redis_connection, "within", AsyncMock())


_rows = st.integers(0, KEYS - 1)
_steps = st.one_of(
    st.tuples(
        st.sampled_from(["unseen", "unseen_late", "end", "read", "read", "write", "load", "store", "replay"]), _rows
    ),
    st.tuples(st.just("turns"), st.sampled_from([1, 2, 4, 8, 16, 32])),
    st.tuples(st.just("turns"), st.sampled_from([1, 2, 4, 8, 16, 32])),
    st.tuples(st.sampled_from(["fail", "crash", "deny"]), st.integers(1, 2)),
)


@pytest.mark.usefixtures("at_once")
def test_the_watermark_names_no_cache_with_an_entry_that_is_older_than_what_it_has_passed() -> None:
    @settings(max_examples=150)
    @given(st.lists(_steps, max_size=12), st.booleans())
    @example([("unseen", 0), ("turns", 32), ("read", 0), ("end", 0), ("turns", 1)], False)
    @example([("unseen", 0), ("turns", 16), ("crash", 0), ("turns", 32), ("read", 0), ("end", 0), ("turns", 1)], False)
    @example([("unseen", 0), ("unseen", 1), ("end", 0), ("turns", 32), ("read", 1), ("end", 0), ("turns", 1)], False)
    @example(
        [("unseen", 0), ("unseen_late", 0), ("end", 0), ("turns", 32), ("read", 0), ("end", 0), ("turns", 1)], False
    )
    @example([("unseen", 0), ("end", 0), ("turns", 32), ("read", 0), ("turns", 32)], True)
    @example([("write", 0), ("turns", 1), ("unseen_late", 0), ("deny", 1)], True)
    def play(steps: list[tuple[str, int]], lags: bool) -> None:
        world = World(runner, lags=lags)
        ends = [("turns", 8), *[("end", 0)] * len(steps), ("replay", 0), ("turns", 12 * len(ENTRIES))]
        # Twice: what is noticed late may begin only when the daemon looks for a gap of the end.
        for step, given_with in [*steps, *ends, *ends]:
            getattr(world, step)(given_with)
        assert world.redis.mark.rules == world.digests
        assert not world.redis.mark.gaps
        assert world.redis.mark.lsn == world.checkpoint.received_lsn

    with asyncio.Runner() as runner:
        play()


# One gap.


@dataclass
class One:
    """The gaps of a rule set, with what is asked of them and what they log."""

    events: Any = field(default_factory=Mock)
    standbys: Any = field(default_factory=lambda: Mock(awaited=False, replayed=2**64))
    enabled: bool = True

    def __post_init__(self) -> None:
        self.gaps = Gaps(
            RULES,
            self.events,
            Metrics(CollectorRegistry()),
            self.standbys,
            since=START,
            received=lambda: START + 5,
            enabled=self.enabled,
        )
        self.gaps.written(())

    def withdrawn(self, *names: str) -> None:
        self.gaps.report(dict.fromkeys(names, "table_changed"))
        self.gaps.written(self.gaps.reasons)

    def begin(self, horizon: Horizon) -> None:
        self.gaps.begin(self.gaps.to_begin, horizon)

    def sweep(self) -> list[str]:
        """Do what was asked for; give the caches."""
        taken = self.gaps.take()
        for _, ticket in taken:
            ticket.parts -= 1
            self.gaps.resolve(ticket)
        return [target.cache.name for batch, _ in taken for target in batch.busts]

    def settle(self, horizon: Horizon, now: float, reached: int = 0) -> list[str]:
        self.gaps.settle(horizon, reached, now)
        return self.sweep()


def test_with_no_transaction_running_one_sweep_is_enough() -> None:
    one = One()
    one.withdrawn("user")
    one.begin(Horizon(7, 7))
    assert one.gaps.sweeping == {"user"}
    assert one.sweep() == ["user"]
    assert one.gaps.reasons == {}
    assert one.gaps.must_write
    assert one.gaps.asks_in(0.0) is None


def test_a_gap_waits_for_the_transactions_of_its_first_sweep_and_for_no_later_ones() -> None:
    one = One()
    one.withdrawn("user")
    one.begin(Horizon(5, 9))
    assert one.sweep() == ["user"]
    assert one.gaps.reasons == {"user": "table_changed"}
    assert not one.gaps.sweeping
    assert one.settle(Horizon(7, 12), 0.0) == []
    assert one.settle(Horizon(10, 12), 0.0) == ["user"]
    assert one.gaps.reasons == {}


def test_the_last_sweep_of_a_cache_whose_readers_hold_no_lease_comes_after_again_after() -> None:
    one = One()
    one.withdrawn("slow")
    one.begin(Horizon(7, 7))
    assert one.sweep() == ["slow"]
    assert one.settle(Horizon(7, 7), 100.0) == []
    assert one.settle(Horizon(7, 7), 104.9) == []
    assert one.settle(Horizon(7, 7), 105.0) == ["slow"]


def test_the_last_sweep_comes_when_the_standbys_have_replayed_what_was_written_then() -> None:
    one = One(standbys=Mock(awaited=True, replayed=900))
    one.withdrawn("user")
    one.begin(Horizon(7, 7))
    assert one.sweep() == ["user"]
    assert one.settle(Horizon(7, 7), 1.0, reached=1000) == []
    assert one.gaps.unreplayed == (1.0, 999)
    one.standbys.replayed = 999
    assert one.settle(Horizon(8, 8), 2.0, reached=2000) == []
    one.standbys.replayed = 1000
    assert one.settle(Horizon(8, 8), 3.0, reached=3000) == ["user"]
    assert one.gaps.unreplayed is None


def test_a_gap_is_logged_and_swept_only_once_the_watermark_leaves_its_cache_out() -> None:
    one = One()
    one.gaps.report({"user": "table_changed"})
    while_it_is_written = list(one.gaps.reasons)
    one.gaps.report({"slow": "table_changed"})
    one.gaps.written(while_it_is_written)
    one.begin(Horizon(7, 7))
    one.events.gap.assert_called_once_with("table_changed", ["user"], swept=True, lsn="0/3E8")
    assert one.sweep() == ["user"]
    one.gaps.rewrite()
    one.begin(Horizon(7, 7))
    assert one.sweep() == [], "another Redis may name it"
    one.gaps.written(one.gaps.reasons)
    one.begin(Horizon(7, 7))
    assert one.sweep() == ["slow"]


def test_a_gap_that_begins_again_is_not_over_with_the_sweep_of_the_former() -> None:
    one = One()
    one.withdrawn("user")
    one.begin(Horizon(7, 7))
    one.gaps.report({"user": "table_unpublished"})
    assert one.sweep() == ["user"]
    assert one.gaps.reasons == {"user": "table_unpublished"}
    assert one.gaps.to_begin


def test_a_gap_that_is_found_while_transactions_are_looked_at_is_begun_after_the_next_look() -> None:
    one = One()
    one.withdrawn("user")
    before = one.gaps.to_begin
    one.withdrawn("user", "slow")
    one.gaps.begin(before, Horizon(7, 7))
    assert one.sweep() == []
    assert [gap.cache.name for gap in one.gaps.to_begin] == ["user", "slow"]


def test_a_gap_that_waits_long_is_logged_once_with_the_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Mock()
    monkeypatch.setattr(gaps, "_log", log)
    monkeypatch.setattr("cdc_invalidator.pipeline.gaps.time.monotonic", lambda: 100.0)
    one = One()
    one.withdrawn("user")
    one.begin(Horizon(2**32 + 5, 2**32 + 9))
    one.sweep()
    for now in (109.0, 110.5, 120.0):
        one.settle(Horizon(2**32 + 5, 2**32 + 9), now)
    (call,) = log.warning.call_args_list
    assert (call.kwargs["caches"], call.kwargs["xid"]) == (["user"], 5)


def test_where_gaps_are_only_logged_the_watermark_goes_on_naming_the_cache() -> None:
    one = One(enabled=False)
    one.gaps.report({"user": "new_slot"})
    one.events.gap.assert_called_once_with("new_slot", ["user"], swept=False, lsn="0/3E8")
    assert not one.gaps.must_write
    one.gaps.sweep({"user": "redis_behind"})
    assert one.gaps.reasons == {"user": "redis_behind"}


def test_a_denied_cache_stays_unnamed_and_its_sweep_is_tried_at_once_and_then_after_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Mock(return_value=100.0)
    monkeypatch.setattr("cdc_invalidator.pipeline.gaps.time.monotonic", clock)
    one = One()
    one.gaps.deny({"user": DENIED}, 100.0)
    pauses: list[float] = []
    for _ in range(12):
        assert one.gaps.denied.keys() == one.gaps.reasons.keys() == {"user"}
        one.gaps.written(one.gaps.reasons)
        began = clock.return_value
        while not one.gaps.to_begin:
            clock.return_value += 0.25
        pauses.append(clock.return_value - began)
        one.gaps.begin(one.gaps.to_begin, Horizon(7, 7))
        assert len(one.gaps.take()) == 1
        one.gaps.deny({"user": DENIED}, clock.return_value)
        # Busts that come meanwhile make no pause longer.
        one.gaps.deny({"user": DENIED}, clock.return_value)
    assert pauses[0] == 0
    assert 0.25 <= pauses[1] <= 0.5
    assert 15 <= pauses[-1] <= gaps.MOST_PAUSE_SECONDS
    one.events.gap.assert_called_once_with("denied", ["user"], swept=True, lsn="0/3E8")
    clock.return_value += gaps.MOST_PAUSE_SECONDS
    one.gaps.begin(one.gaps.to_begin, Horizon(7, 7))
    assert one.sweep() == ["user"]
    assert not one.gaps.denied
    assert not one.gaps.reasons


def test_a_cache_is_granted_with_the_sweep_that_redis_grants_and_named_when_its_gap_is_over() -> None:
    one = One()
    one.gaps.deny({"user": DENIED}, 0.0)
    one.gaps.written(one.gaps.reasons)
    one.gaps.begin(one.gaps.to_begin, Horizon(5, 9))
    assert {name: each.text for name, each in one.gaps.denied.items()} == {"user": "it may not"}
    assert one.sweep() == ["user"]
    assert one.gaps.denied == {}
    assert one.gaps.reasons == {"user": "denied"}
    assert one.settle(Horizon(10, 12), 0.0) == ["user"]
    assert one.gaps.reasons == {}
