"""What is observed: which entries count as stale, which as mended, and what bounds them."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry

from cdc_invalidator import lsn
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import observe
from cdc_invalidator.pipeline.batch import Batch, BustEvent, Target
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.observe import Observe
from cdc_invalidator.redis.fingerprint import ABSENT, LARGE, Look
from cdc_invalidator.redis.writes import Writes
from cdc_invalidator.rules.load import parse_rules

TEXT = """
version: 1
caches:
  user: {key: "user:{id}"}
rules:
  - {name: changed, table: public.users, bust: [user]}
"""
USER = Target("changed", parse_rules([("rules.yaml", TEXT)], {}).caches["user"], "public.users")
RESULTS = {"changes", "absent", "mended", "stale", "too_large", "skipped"}
OLD, NEW = b"string:1", b"string:2"


class World:
    """A Redis whose entries all have one fingerprint, and who observes it."""

    def __init__(self) -> None:
        metrics = Metrics(CollectorRegistry())
        output: Any = Mock(full=False, stuck=False, dropped=0, failure=None, mark=0, written=0)
        events = Events(metrics, KeyDisplay("hash"), EventLog(output, "json", "info"), observing=True)
        self.writes = Writes([b"user:"], 60)
        self.writes._began = self.writes._heard = 0
        self.observe = Observe(0.0, self.writes, metrics=metrics, events=events)
        self.look: Look = OLD

    def change(self, *keys: bytes, ticket: Ticket | None = None, age: float = 0.0) -> None:
        at = int((time.time() - age) * 1e6) - lsn.EPOCH_OFFSET_US
        events = [BustEvent(USER, "delete", "update", [key], "change", 100, at, 5) for key in keys]
        chosen = self.observe.choose(events, [event.keys for event in events])
        taken = [(Batch(100, at, 5), ticket)] if ticket else []
        self.observe.begin([self.look] * len(chosen), taken, time.monotonic())

    async def fingerprints(self, keys: list[bytes]) -> list[Look]:
        return [self.look] * len(keys)

    async def step(self) -> None:
        server: Any = self
        self.observe._step_at = 0
        await self.observe.step(server, Mock())

    @property
    def results(self) -> dict[str, Any]:
        return {name: value for name, value in self.figures.items() if name in RESULTS}

    @property
    def figures(self) -> dict[str, Any]:
        (found,) = self.observe.status()["caches"]
        return found  # type: ignore[no-any-return]


async def test_the_same_content_is_stale_until_it_is_gone() -> None:
    world = World()
    world.change(b"user:1", age=1.0)
    await world.step()
    assert world.results == {"changes": 1, "stale": 1}
    assert world.observe.status()["stale_now"] == 1
    world.look = ABSENT
    await world.step()
    assert world.observe.status()["stale_now"] == 0
    (worst,) = world.observe.status()["worst"]
    assert worst["key_hashes"]
    assert world.observe.due_in(0) is None


async def test_other_content_is_mended() -> None:
    world = World()
    world.change(b"user:1", age=1.0)
    world.look = NEW
    await world.step()
    assert world.results == {"changes": 1, "mended": 1}


async def test_what_was_written_between_the_commit_and_the_look_is_mended() -> None:
    world = World()
    world.writes.note([b"user:1"])
    world.change(b"user:1", b"user:2", age=1.0)
    await world.step()
    assert world.results == {"changes": 2, "mended": 1, "stale": 1}


async def test_what_was_committed_before_writes_were_told_can_not_be_judged() -> None:
    world = World()
    world.writes.begin()
    world.change(b"user:1", age=1.0)
    assert world.results == {"changes": 1, "skipped": 1}


async def test_changes_that_the_same_content_survives_are_all_stale() -> None:
    world = World()
    for _ in range(3):
        world.change(b"user:1", age=1.0)
    await world.step()
    world.change(b"user:1", age=1.0)
    await world.step()
    assert world.results == {"changes": 4, "stale": 4}
    assert world.observe.status()["stale_now"] == 1


async def test_a_commit_that_is_hidden_is_looked_at_again_when_it_is_visible() -> None:
    world, ticket = World(), Ticket(0)
    world.change(b"user:1", ticket=ticket, age=1.0)
    await world.step()
    assert world.results == {"changes": 1}
    ticket.parts = 0
    world.look = NEW
    await world.step()
    await world.step()
    assert world.results == {"changes": 1, "stale": 1}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The monotonic clock, as the test sets it; that of the day goes with it."""
    clock = Mock(return_value=1000.0)
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + clock.return_value)
    return clock


async def test_of_changes_that_one_content_meets_each_is_judged_by_its_own_commit(clock: Mock) -> None:
    world = World()
    # Filled after the first, and not after the second, which comes within the grace of the first.
    world.change(b"user:1")
    world.writes.note([b"user:1"])
    clock.return_value += 2
    world.change(b"user:1")
    await world.step()
    assert world.results == {"changes": 2, "mended": 1, "stale": 1}


async def test_a_stale_entry_that_is_filled_with_the_same_content_is_mended(clock: Mock) -> None:
    world = World()
    world.change(b"user:1")
    clock.return_value += 1
    await world.step()
    assert world.observe.status()["stale_now"] == 1
    # A change brings back the row as it was before, and the application fills it before the stream tells.
    clock.return_value += 1
    world.writes.note([b"user:1"])
    world.change(b"user:1", age=0.5)
    await world.step()
    assert world.results == {"changes": 2, "stale": 1, "mended": 1}
    assert world.observe.status()["stale_now"] == 0
    assert world.figures["stale_s"] == 2.0
    assert world.observe.due_in(clock()) is None


async def test_a_stale_entry_outlives_the_connection_and_is_looked_at_at_once(clock: Mock) -> None:
    world = World()
    world.change(b"user:1")
    await world.step()
    clock.return_value += 7000
    world.writes.begin()
    world.observe.connected()
    assert world.observe.status()["stale_now"] == 1
    world.look = ABSENT
    await world.step()
    assert world.figures["stale_s"] == 7000
    assert world.results == {"changes": 1, "stale": 1}
    assert (world.observe._open, world.observe._stale, world.observe._bytes) == (0, 0, 0)


async def test_what_is_visible_late_is_judged_by_its_commit_all_the_same(clock: Mock) -> None:
    world, ticket = World(), Ticket(0)
    world.writes.begin()
    clock.return_value += 1
    world.change(b"user:1", ticket=ticket)
    clock.return_value += 9
    ticket.parts = 0
    await world.step()
    await world.step()
    assert world.results == {"changes": 1, "stale": 1}


@pytest.mark.parametrize(("heard", "result"), [(0.0, "skipped"), (1.0, "stale")])
async def test_what_was_not_judged_when_the_connection_was_lost_is_judged_if_all_writes_are_known(
    clock: Mock, heard: float, result: str
) -> None:
    world = World()
    world.change(b"user:1", b"user:2")
    clock.return_value += heard
    world.writes.heard()
    clock.return_value += 5
    world.writes.begin()
    world.observe.connected()
    await world.step()
    assert world.results == {"changes": 2, result: 2}


async def test_what_waits_for_readers_when_the_connection_is_lost_is_skipped() -> None:
    world, ticket = World(), Ticket(0)
    world.change(b"user:1", ticket=ticket, age=1.0)
    world.observe.connected()
    assert world.results == {"changes": 1, "skipped": 1}
    assert world.observe.due_in(0) is None


async def test_of_a_stream_so_far_behind_that_writes_are_forgotten_nothing_is_stale(clock: Mock) -> None:
    world = World()
    world.writes.note([b"user:1"])
    world.change(b"user:1", age=2.0)
    # Before it is judged, its fill is forgotten.
    for _ in range(2):
        clock.return_value += 61
        world.writes.note([b"user:2"])
    # And this one was committed before what is remembered.
    world.change(b"user:3", age=200.0)
    await world.step()
    assert world.results == {"changes": 2, "skipped": 2}


@pytest.mark.parametrize(("look", "result"), [(ABSENT, "absent"), (LARGE, "too_large")])
def test_what_can_not_be_compared_is_counted(look: Look, result: str) -> None:
    world = World()
    world.look = look
    world.change(b"user:1", age=1.0)
    assert world.results == {"changes": 1, result: 1}


def test_entries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MOST", 5)
    world = World()
    world.change(*(b"user:%d" % number for number in range(8)), age=1.0)
    assert world.results == {"changes": 8, "skipped": 3}


def test_prefixes_that_others_cover_are_left_out() -> None:
    named = Writes([b"shop:user:", b"shop:", b"app:", b"shop:"], 60).command
    assert named == ("CLIENT TRACKING", "ON", "BCAST", "PREFIX", b"app:", "PREFIX", b"shop:")
    assert Writes([b"", b"shop:"], 60).command == ("CLIENT TRACKING", "ON", "BCAST")


def test_writes_are_remembered_for_a_while_only() -> None:
    writes = Writes([b"user:"], 0.0)
    writes.note([b"user:1"])
    assert writes.between(b"user:1", 0, time.monotonic())
    writes.note([b"user:2"])
    writes.note([b"user:3"])
    assert not writes.between(b"user:1", 0, time.monotonic())
    assert writes.between(b"user:3", 0, time.monotonic())


async def test_it_is_told_what_share_of_the_entries_that_were_there_is_stale_and_for_how_long(clock: Mock) -> None:
    world = World()
    world.change(b"user:1", b"user:2", b"user:3")
    world.look = ABSENT
    world.change(b"user:4")
    assert (world.figures["there"], world.figures["stale_share"], world.figures["stale_max_s"]) == (3, None, None)
    # One is filled anew; two are stale, and one of them for 2 s.
    world.look = NEW
    world.change(b"user:1")
    world.look = OLD
    await world.step()
    clock.return_value += 2
    world.look = ABSENT
    world.change(b"user:2")
    clock.return_value += 4
    found = world.figures
    assert (found["mended"], found["stale"], found["there"]) == (2, 2, 4)
    assert found["stale_share"] == 0.5
    assert (found["stale_s"], found["stale_median_s"], found["stale_max_s"]) == (2.0, 4.0, 6.0)
