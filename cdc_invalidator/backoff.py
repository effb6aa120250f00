"""How long to wait before the next attempt. Knows no clock and never sleeps: it only gives a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Delays that double from ``first`` to ``most`` seconds, each shortened at random by up to a half.

    The random part keeps daemons that lost the same server from coming back in step.
    """

    first: float = 0.05
    most: float = 5.0
    random: random.Random = field(default_factory=random.Random)
    attempts: int = 0

    def next(self) -> float:
        """Give the seconds to wait before the coming attempt, and count it."""
        delay = min(self.most, self.first * 2.0 ** min(self.attempts, 30))
        self.attempts += 1
        return delay * (1 - self.random.random() / 2)

    def reset(self) -> None:
        """Start over: the last attempt succeeded."""
        self.attempts = 0
