"""A circuit breaker: a server that is gone costs its time-out a few times, not at each read. Pure."""

from __future__ import annotations


class Breaker:
    """Opens after some failures in a row, and lets one attempt through now and then.

    It may be shared by threads: at worst a few more attempts are let through.

    Args:
        threshold: failures in a row that open it.
        pause: seconds between attempts while it is open.
    """

    def __init__(self, threshold: int = 3, pause: float = 1.0) -> None:
        self._threshold = threshold
        self._pause = pause
        self._next_at = 0.0
        self.failures = 0

    def like(self) -> Breaker:
        """Return another one of the same kind: each server of a cluster has its own."""
        return Breaker(self._threshold, self._pause)

    @property
    def open(self) -> bool:
        """Whether the server counts as gone."""
        return self.failures >= self._threshold

    def allows(self, now: float) -> bool:
        """Return whether it may be asked now (a monotonic time in seconds); when open, the first to ask may try."""
        if not self.open:
            return True
        if now < self._next_at:
            return False
        self._next_at = now + self._pause
        return True

    def failed(self, now: float) -> None:
        """Note that an attempt had no answer."""
        self.failures += 1
        if self.failures >= self._threshold:
            self._next_at = now + self._pause

    def worked(self) -> None:
        """Note that it has answered."""
        self.failures = 0
