"""Plain batches and others on their way to a Redis that fails, loses data, and is asked for what readers can't see yet.

Two things must hold whatever happens: no watermark, and so no confirmation, passes a transaction that has not been
busted in the Redis that is there, at a time when all readers saw it; and none is confirmed whose event is not written.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors, lsn
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import apply, record, redis_connection
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.backlog import BATCH, Backlog
from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.continuity import Kept
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.followup import PostgresView
from cdc_invalidator.pipeline.recent import CAPACITY, Recent
from cdc_invalidator.pipeline.sweep import SweepOptions
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.postgres.snapshot import Horizon
from cdc_invalidator.redis.lookups import Lookups
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.redis.watermark import Position, Watermark
from cdc_invalidator.rules.load import parse_rules

START = 1000
DIGESTS = {"user": "1"}
RULES = parse_rules(
    [
        (
            "rules.yaml",
            (
                'version: 1\ncaches:\n  user: {key: "user:{id}"}\n'
                "rules:\n  - {name: changed, table: public.users, bust: [user]}\n"
            ),
        )
    ],
    {},
)
TARGET = Target("changed", RULES.caches["user"], "public.users")


@dataclasses.dataclass
class Redis:
    """What one has: the keys that are busted for good, by the commit that asked for it, and a watermark."""

    busted: set[int] = dataclasses.field(default_factory=set)
    mark: Watermark | None = None

    def copy(self) -> Redis:
        return Redis(set(self.busted), self.mark)


class World:
    """A daemon's apply task with all that it talks to."""

    def __init__(self, *, standby: bool) -> None:
        self.lsn = START
        self.commits: set[int] = set()
        self.hidden: set[int] = set()
        self.redis = Redis(mark=Watermark(START, 0, "7", 1, DIGESTS))
        self.saved = self.redis.copy()
        self.opened = 0
        self.failures = 0
        self.standbys = Mock(
            awaited=standby, replayed=START, known={}, **{"returned.return_value": False, "recall.return_value": False}
        )
        metrics = Metrics(CollectorRegistry())
        self.backlog = Backlog()
        self.checkpoint = Checkpoint(START)
        self.written = b""
        output: Any = Mock(full=False, stuck=False, dropped=0, failure=None, mark=0, written=0, write=self._write)
        events = Events(metrics, KeyDisplay("hash"), EventLog(output, "json", "info"))
        queries: Any = Mock(derive=AsyncMock(), late=list)
        server: Any = lambda: Server(self)  # noqa: E731
        self.apply = Apply(
            server,
            PostgresView(self._hidden, queries, self.standbys, self._horizon, self._reached),
            Kept(RULES, DIGESTS, Position("7", 1, START, 2**60), Recent()),
            backlog=self.backlog,
            checkpoint=self.checkpoint,
            suspicious=False,
            sweeps=SweepOptions(),
            metrics=metrics,
            events=events,
            inspection=Verify(0, 0, metrics=metrics, events=events),
        )

    async def _hidden(self, xids: Iterable[int]) -> set[int]:
        return self.hidden & set(xids)

    async def _horizon(self) -> Horizon:
        return Horizon(1000, 1000)

    async def _reached(self) -> int:
        return self.lsn

    def _write(self, text: bytes) -> None:
        self.written += text

    # What happens.

    def commit(self, hidden: Sequence[bool], *, plain: bool) -> None:
        """Transactions, each with a key of its own; as a PlainBatch, or batch by batch."""
        events = []
        for is_hidden in hidden:
            self.lsn += 10
            self.commits.add(self.lsn)
            if is_hidden:
                self.hidden.add(self.lsn)
            events.append(BustEvent(TARGET, "delete", "insert", [b"%d" % self.lsn], "change", self.lsn, 77, self.lsn))
        if plain:
            self.backlog.put(PlainBatch(events, [event.xid for event in events], self.lsn + 5), self.checkpoint.track())
            self.checkpoint.received(self.lsn + 5)
            return
        for event in events:
            batch = Batch(event.commit_lsn, 77, event.xid, event.commit_lsn + 5)
            batch.add_all(TARGET, ["insert"], event.keys, "change")
            self.backlog.put(batch, self.checkpoint.track())
            self.checkpoint.received(event.commit_lsn + 5)

    def show(self, count: int) -> None:
        self.hidden -= set(sorted(self.hidden)[:count])

    def replay(self) -> None:
        self.standbys.replayed = self.lsn + 1

    def save(self) -> None:
        self.saved = self.redis.copy()

    def lose(self) -> None:
        """Another Redis stands there, as this one was when it was saved."""
        self.redis = self.saved.copy()
        self.opened += 1

    def turn(self) -> None:
        async def one() -> None:
            await self.apply._turn()

        asyncio.run(one())
        # Nobody would send it again after a crash.
        confirmed = {commit for commit in self.commits if commit < self.checkpoint.confirmable}
        untold = {commit for commit in confirmed if b'"lsn":"%b"' % lsn.text(commit).encode() not in self.written}
        assert not untold, (self.checkpoint.confirmable, untold)

    def drain(self) -> None:
        while self.backlog:
            self.turn()

    def bust(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            commit = int(key)
            if commit not in self.hidden and (not self.standbys.awaited or self.standbys.replayed > commit):
                self.redis.busted.add(commit)

    def record(self, mark: Watermark) -> None:
        self.redis.mark = mark
        missing = {commit for commit in self.commits if commit < mark.lsn} - self.redis.busted
        assert not missing, (mark.lsn, missing)


class Server:
    """A connection."""

    watermarked = True

    def __init__(self, world: World) -> None:
        self.lookups = Lookups()
        self._world = world
        self._opened = world.opened

    def _ask(self) -> None:
        if self._world.failures or self._opened != self._world.opened:
            self._world.failures = max(0, self._world.failures - 1)
            raise errors.RedisUnavailable("it is gone", code="CLOSED")

    async def connect(self) -> None:
        self._ask()

    async def close(self) -> None:
        pass

    async def read_watermarks(self) -> list[Watermark | None]:
        self._ask()
        return [self._world.redis.mark]

    async def bust(
        self, deletes: Sequence[Sequence[bytes]], _bumps: Mapping[bytes, int], _graces: Mapping[bytes, int], _looks: Any
    ) -> BustReply:
        half = len(deletes) // 2
        if self._world.failures == 1:
            # It may have had a part of it.
            self._world.bust(key for keys in deletes[:half] for key in keys)
        self._ask()
        self._world.bust(key for keys in deletes for key in keys)
        return BustReply([len(keys) for keys in deletes], {})

    async def write_watermark(self, watermark: Watermark) -> bool:
        self._ask()
        self._world.record(watermark)
        return True

    async def info(self) -> None:
        pass


_steps = st.one_of(
    st.tuples(st.just("plain"), st.lists(st.booleans(), min_size=1, max_size=4)),
    st.tuples(st.just("plain"), st.lists(st.just(value=False), min_size=1, max_size=4)),
    st.tuples(st.just("batches"), st.lists(st.booleans(), min_size=1, max_size=2)),
    st.tuples(st.sampled_from(["show", "fail"]), st.integers(1, 3)),
    st.tuples(st.sampled_from(["turn", "turn", "turn", "replay", "save", "lose"]), st.none()),
)


@settings(max_examples=200)
@given(st.lists(_steps, max_size=20), st.booleans())
def test_no_watermark_passes_a_transaction_that_was_not_busted_while_readers_saw_it(
    steps: list[tuple[str, Any]], standby: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (record, redis_connection):
            patch.setattr(module, "_log", Mock())
        # As fast as the test asks: it waits for nothing, and every position is recorded.
        patch.setattr(record, "HEARTBEAT_SECONDS", 0.0)
        # Two batches of a key each: what piles up takes several turns.
        patch.setattr(apply, "FLUSH_WEIGHT", 18)
        patch.setattr(Backlog, "wait", AsyncMock())
        patch.setattr(asyncio, "sleep", AsyncMock())
        patch.setattr(redis_connection, "within", AsyncMock())
        world = World(standby=standby)
        for step, given_with in [*steps, ("show", 100), ("replay", None), *[("turn", None)] * 10, ("drain", None)]:
            if step in {"plain", "batches"}:
                world.commit(given_with, plain=step == "plain")
            elif step == "fail":
                world.failures = given_with
            elif step == "show":
                world.show(given_with)
            else:
                getattr(world, step)()
        assert world.redis.mark is not None
        assert world.redis.mark.lsn == world.checkpoint.received_lsn == world.checkpoint.confirmable
        assert world.redis.busted >= world.commits


@pytest.mark.parametrize("plain", [True, False])
async def test_it_ends_as_soon_as_what_was_left_is_recorded(monkeypatch: pytest.MonkeyPatch, *, plain: bool) -> None:
    """At SIGTERM a standby waits for it to end: there is no heartbeat left to wait for."""
    monkeypatch.setattr(record, "HEARTBEAT_SECONDS", 1000.0)
    monkeypatch.setattr(redis_connection, "_log", Mock())
    world = World(standby=False)
    running = asyncio.create_task(world.apply.run())
    async with asyncio.timeout(30):
        world.commit([False], plain=plain)
        while world.checkpoint.confirmable < world.checkpoint.received_lsn:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.001)
        world.commit([False, False], plain=plain)
        world.apply.finish()
        await running
    assert world.checkpoint.confirmable == world.checkpoint.received_lsn
    assert world.redis.busted == world.commits


def test_what_a_query_gives_once_its_transaction_is_visible_is_counted_as_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_connection, "_log", Mock())
    monkeypatch.setattr(Backlog, "wait", AsyncMock())
    world = World(standby=False)

    async def derive(taken: Iterable[tuple[str, Batch, Ticket]]) -> None:
        for _, batch, _ in taken:
            batch.grow(60_000)

    queries: Any = world.apply._postgres.queries
    queries.derive = derive
    recent = world.apply._recent
    for _ in range(5):
        world.commit([True], plain=False)
        world.drain()
        world.show(1)
        world.turn()

    assert recent._weight == sum(batch.weight + BATCH for batch in recent.since(0)) <= CAPACITY
    assert len(recent.since(0)) == 1
