"""When a stream that fails again and again at one position is to skip it. Knows no clock and never sleeps.

What the server can't send (a byte that has no Unicode character, a value beyond the size of a message) it can't send
the next time either: retried for ever, it would hold back all that follows, and the WAL.
"""

from __future__ import annotations

from dataclasses import dataclass

# So often, and for so long, the stream must fail without getting any further.
ATTEMPTS = 3
SECONDS = 5.0


@dataclass(slots=True)
class Impasse:
    """Counts failures at one position, across sessions."""

    position: int = -1
    since: float = 0.0
    attempts: int = 0

    def failed(self, received: int, now: float) -> bool:
        """Note that a stream failed at what comes next.

        Args:
            received: the LSN up to which it had been received.
            now: the time, in seconds.

        Returns:
            Whether to skip it; then the count starts over.
        """
        if received > self.position:
            self.position, self.since, self.attempts = received, now, 0
        self.attempts += 1
        if self.attempts < ATTEMPTS or now - self.since < SECONDS:
            return False
        self.position = -1
        return True
