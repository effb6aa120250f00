"""How long to wait before the next attempt."""

from __future__ import annotations

import random

import pytest

from cdc_invalidator.backoff import Backoff, Refusals


class Fixed(random.Random):
    """Chance that always gives the same."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def random(self) -> float:
        return self._value


def test_delays_double_up_to_the_longest() -> None:
    backoff = Backoff(first=0.05, most=1.0, random=Fixed(0.0))

    assert [backoff.next() for _ in range(7)] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_chance_shortens_a_delay_by_up_to_a_half() -> None:
    assert Backoff(first=1.0, random=Fixed(0.5)).next() == pytest.approx(0.75)
    assert Backoff(first=1.0, random=Fixed(1.0)).next() == pytest.approx(0.5)


def test_every_delay_lies_between_half_and_all_of_its_step() -> None:
    for seed in range(200):
        backoff = Backoff(first=0.05, most=5.0, random=random.Random(seed))
        for attempt in range(12):
            step = min(5.0, 0.05 * 2**attempt)
            assert step / 2 <= backoff.next() <= step


def test_daemons_that_lost_the_same_server_do_not_come_back_in_step() -> None:
    assert len({Backoff().next() for _ in range(20)}) > 1


def test_a_success_starts_over() -> None:
    backoff = Backoff(first=0.05, random=Fixed(0.0))
    for _ in range(5):
        backoff.next()
    assert backoff.attempts == 5

    backoff.reset()

    assert backoff.attempts == 0
    assert backoff.next() == pytest.approx(0.05)


def test_a_server_that_never_comes_back_does_not_overflow_the_delay() -> None:
    backoff = Backoff(most=5.0, random=Fixed(0.0), attempts=100_000)

    assert backoff.next() == pytest.approx(5.0)


def test_a_refused_login_is_told_once_and_not_before_the_second_attempt() -> None:
    refusals = Refusals()
    assert [refusals.tell("wrong") for _ in range(4)] == [False, True, False, False]
    assert refusals.tell("locked")
    refusals.reset()
    assert [refusals.tell("wrong") for _ in range(3)] == [False, True, False]
