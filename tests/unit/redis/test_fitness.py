"""When a daemon that stands by says that it could lead."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cdc_invalidator import errors
from cdc_invalidator.redis import fitness
from cdc_invalidator.redis.fitness import Fitness
from cdc_invalidator.trouble import Trouble


class World:
    """A Redis that answers or not, and a clock that a question moves by a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fitness, "PROBE_SECONDS", 0.0)
        self.now = 1000.0
        self.answers: list[bool] = []
        self.idle = asyncio.Event()
        self.fitness = Fitness(cast("Any", self._open), patience=5.0, clock=lambda: self.now)

    def _open(self) -> World:
        return self

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def probe(self) -> None:
        if not self.answers:
            self.idle.set()
            # What follows is not asked any more.
            await asyncio.Event().wait()
        self.now += 1
        if not self.answers.pop(0):
            raise errors.RedisUnavailable(f"It failed at {self.now}.", code="CLOSED")

    async def ask(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.idle.clear()
        asking = asyncio.create_task(self.fitness.run())
        await self.idle.wait()
        asking.cancel()
        await asyncio.wait({asking})

    def could(self) -> bool:
        return self.fitness.found_at is not None

    def trouble(self) -> Trouble | None:
        return self.fitness.trouble


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_nobody_could_lead_before_redis_has_answered_and_long_after_it(world: World) -> None:
    assert not world.could()
    assert "CDC_REDIS_URL" in str(world.trouble())
    await world.ask(True)
    assert world.could()
    assert world.trouble() is None
    world.now += 5
    assert not world.could()
    assert world.trouble() is not None


async def test_a_failure_counts_at_once_and_is_told_after_the_patience_since_it_began(world: World) -> None:
    await world.ask(True, False)
    assert not world.could()
    assert world.trouble() is None
    await world.ask(False, False)
    first = world.trouble()
    world.now += 5
    assert (first, str(world.trouble())[:9]) == (None, "It failed")
    await world.ask(True)
    assert world.could()


async def test_who_has_led_could_lead_again_once_redis_has_answered_anew(world: World) -> None:
    await world.ask(True)
    world.fitness.leads()
    assert not world.could()
    await world.ask(True)
    assert world.could()


async def test_who_has_handed_over_is_in_trouble_until_an_answer_and_could_lead_after_a_while_of_them(
    world: World,
) -> None:
    why = Trouble.now("Redis is away.")
    world.fitness.gave_way(why, worked=True)
    assert world.trouble() is why
    await world.ask(True)
    assert world.trouble() is None
    assert not world.could()
    await world.ask(True, True)
    assert world.could()


async def test_who_leads_in_vain_again_and_again_could_lead_after_longer_and_longer_times(world: World) -> None:
    pauses = []
    for _ in range(8):
        world.fitness.leads()
        world.fitness.gave_way(Trouble.now("Redis is away."), worked=False)
        pause = 0
        while not world.could():
            pause += 1
            await world.ask(True)
        pauses.append(pause)
    assert fitness.FIRST_PENANCE_SECONDS / 2 <= pauses[0] <= fitness.FIRST_PENANCE_SECONDS + 2
    assert fitness.MOST_PENANCE_SECONDS / 2 <= pauses[-1] <= fitness.MOST_PENANCE_SECONDS + 2
    world.fitness.leads()
    world.fitness.gave_way(Trouble.now("Redis is away."), worked=True)
    await world.ask(True, True, True)
    assert world.could()
