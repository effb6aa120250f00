"""Since when something is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import Mock

from cdc_invalidator.trouble import Trouble

if TYPE_CHECKING:
    import pytest


def test_a_trouble_goes_on_since_it_began_in_whatever_words(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Mock(return_value=1_800_000_000.25)
    monkeypatch.setattr("cdc_invalidator.trouble.time.time", clock)
    first = Trouble.now("Redis is away.")
    clock.return_value += 60
    second = Trouble.now("Redis is loading.", first)

    assert second == ("Redis is loading.", 1_800_000_000.25)
    assert str(second) == "Redis is loading. (since 2027-01-15T08:00:00.250Z)"
    assert Trouble.now("It is another one.", ago=10).since == clock.return_value - 10
