"""What becomes of a slot that holds too much WAL."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import pytest

from cdc_invalidator import errors, watch
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.postgres.slot import SlotState

MB = 1 << 20


class Looking:
    """A watch whose clock is set by hand; it looks every three seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.checkpoint = Checkpoint(0)
        self.apply: Any = Mock(**{"let_go.return_value": set()})
        self.apply.redis.away_since = None
        parts: Any = Mock()
        self.relief = False
        self.watch = watch.Watch(
            parts,
            parts,
            self.checkpoint,
            self.apply,
            replication=parts,
            tell=parts,
            relief=parts,
            max_retained_wal=10 * MB,
            metrics=parts,
        )

    def look(self, seconds: float, retained: float, unconfirmed: float = 0) -> None:
        """Look for so long, while so many MB are retained."""
        until = self.now + seconds
        while self.now < until:
            self.watch._bound(
                SlotState(True, 1, 0, "reserved", int(retained * MB), False, int(unconfirmed * MB)), relief=self.relief
            )
            self.now += 3.0


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Looking:
    looking = Looking()
    monkeypatch.setattr(time, "monotonic", lambda: looking.now)
    return looking


def test_below_the_limit_nothing_is_given_up_or_let_go(looking: Looking) -> None:
    looking.checkpoint.track()
    looking.look(1000, 9)

    looking.apply.let_go.assert_not_called()
    looking.apply.hurry.assert_called_with(much_wal=False)


def test_redis_away_gives_it_up(looking: Looking) -> None:
    looking.apply.redis.away_since = looking.now - 3
    looking.look(10, 9)

    with pytest.raises(errors.PositionGivenUp, match="Redis is away"):
        looking.look(3, 11)


def test_redis_away_for_us_alone_gives_it_up_only_if_nobody_takes_over(looking: Looking) -> None:
    looking.relief = True
    looking.apply.redis.away_since = looking.now
    looking.look(watch.RELIEF_SECONDS, 11)

    with pytest.raises(errors.PositionGivenUp, match="Redis is away"):
        looking.look(6, 11)


def test_what_can_be_let_go_is(looking: Looking) -> None:
    ticket = looking.checkpoint.track()

    def let_go() -> set[str]:
        looking.checkpoint.resolve(ticket)
        return {"user"}

    looking.apply.let_go.side_effect = let_go
    looking.look(9, 11)

    looking.apply.let_go.assert_called_once()
    looking.look(1000, 11)
    looking.apply.let_go.assert_called_once()


def test_what_can_not_be_let_go_is_given_up_after_a_time(looking: Looking) -> None:
    looking.checkpoint.track()
    looking.look(60, 11)

    with pytest.raises(errors.PositionGivenUp, match="has not been done for 78 s"):
        looking.look(60, 11)


def test_a_daemon_that_works_off_a_backlog_is_given_time(looking: Looking) -> None:
    looking.checkpoint.track()
    for retained in range(200, 10, -1):
        looking.checkpoint.track()
        looking.look(3, retained, retained)
        assert looking.checkpoint.oldest is not None
        looking.checkpoint.resolve(looking.checkpoint.oldest)

    looking.apply.let_go.assert_not_called()


@pytest.mark.parametrize(("unconfirmed", "why"), [(25, "more is written"), (0, "pg_prepared_xacts")])
def test_twice_the_limit_that_does_not_become_less_is_given_up(looking: Looking, unconfirmed: int, why: str) -> None:
    for retained in (30, 25, 21, 19, 30, 25):
        looking.look(30, retained, unconfirmed)

    with pytest.raises(errors.PositionGivenUp, match=why):
        looking.look(60, 25, unconfirmed)


def test_once_the_limit_is_no_reason_while_nothing_of_ours_holds_it(looking: Looking) -> None:
    looking.look(1000, 19)
