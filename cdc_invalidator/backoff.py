"""How long to wait before the next attempt, and whether a login that is refused is worth a word.

Knows no clock and never sleeps: it only answers.
"""

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


@dataclass(slots=True)
class Refusals:
    """Whether to tell that a server refuses user or password: once, and not before the secret was read again.

    While passwords are rotated, the first attempt may come a moment too early.
    """

    _last: str | None = None

    def tell(self, sentence: str) -> bool:
        """Note a refusal, and return whether to tell it."""
        if self._last is None:
            self._last = ""
            return False
        known, self._last = self._last, sentence
        return known != sentence

    def reset(self) -> None:
        """Start over: the login worked."""
        self._last = None
