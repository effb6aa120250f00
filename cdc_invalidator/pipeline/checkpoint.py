"""The position up to which everything is done. Nothing else computes a position to record or to confirm.

Work is tracked in stream order and resolved in any order. The position is the highest one with nothing unresolved
below it: while work is in flight, that is what had been received before the oldest unresolved piece; otherwise it is
all that has been received. It never goes back.

The order in receive is what makes this safe: track the batch, put it on the queue, then note the commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Tickets behind one that is not resolved, before those among them that are resolved are forgotten.
CROWD = 10_000


@dataclass(slots=True, eq=False)
class Ticket:
    """Work in flight, in one or more parts; ``below`` is the position that holds until all of them are resolved."""

    below: int
    parts: int = 1


class Checkpoint:
    """Owner of three LSNs: received, applied (``position``) and ``confirmable``.

    Args:
        start: the position where the stream starts (the slot's confirmed_flush_lsn).
        told: whether the events up to a mark are told; without it, they always are.
    """

    def __init__(self, start: int, told: Callable[[int], bool] = lambda _mark: True) -> None:
        self._received = start
        self._position = start
        self._confirmable = start
        self._told = told
        # Positions that the watermark has, each with the mark up to which events must be told.
        self._recorded: deque[tuple[int, int]] = deque()
        self._in_flight: deque[Ticket] = deque()
        self._crowd = CROWD
        self._awaited: tuple[int, int] | None = None
        self._as_of = 0

    def track(self) -> Ticket:
        """Note work, in one part, that must be resolved before any position after now may be confirmed."""
        ticket = Ticket(self._received)
        self._in_flight.append(ticket)
        if len(self._in_flight) > self._crowd:
            # One that is held up must not make those behind it pile up that are done.
            self._in_flight = deque(held for held in self._in_flight if held.parts)
            self._crowd = max(CROWD, 2 * len(self._in_flight))
        return ticket

    def received(self, lsn: int) -> None:
        """Note that all before ``lsn`` has been received and tracked.

        Call it with a commit's end LSN after its work is tracked, or with a keepalive's position between
        transactions; a keepalive inside a transaction says nothing about that transaction.
        """
        self._received = max(self._received, lsn)

    def resolve(self, ticket: Ticket) -> None:
        """Note that a part of the work is done: its busts are acknowledged by Redis."""
        ticket.parts -= 1
        while self._in_flight and not self._in_flight[0].parts:
            self._in_flight.popleft()

    @property
    def received_lsn(self) -> int:
        """The LSN up to which the stream has been received and tracked."""
        return self._received

    @property
    def position(self) -> int:
        """The LSN up to which every bust is acknowledged."""
        reached = self._in_flight[0].below if self._in_flight else self._received
        self._position = max(self._position, reached)
        return self._position

    @property
    def oldest(self) -> Ticket | None:
        """The piece of work that holds the position back; ``None``: nothing of ours does."""
        return self._in_flight[0] if self._in_flight else None

    def committed(self, lsn: int, at: int) -> None:
        """Note that all that had been committed at a time lies below ``lsn``.

        Args:
            lsn: the end of the server's WAL, asked for at that time or later.
            at: the time, in ms since 1970.
        """
        # One at a time: while the position is behind, the oldest is the one that it reaches first.
        if self._awaited is None:
            self._awaited = (lsn, at)

    @property
    def as_of(self) -> int:
        """The last known time at which nothing above the position had been committed; 0 for none."""
        if self._awaited is not None and self._awaited[0] <= self.position:
            self._as_of = self._awaited[1]
            self._awaited = None
        return self._as_of

    @property
    def idle(self) -> bool:
        """True when nothing is in flight."""
        return not self._in_flight

    def record(self, lsn: int, mark: int = 0) -> None:
        """Note that the watermark in Redis has been brought to ``lsn`` (a former ``position``).

        Args:
            lsn: the position.
            mark: it may be confirmed when the events up to there are told.
        """
        if self._recorded and (self._recorded[-1][1] == mark or len(self._recorded) > CROWD):
            self._recorded.pop()
        self._recorded.append((lsn, mark))

    @property
    def confirmable(self) -> int:
        """The LSN that may be confirmed to PostgreSQL: applied, recorded in the watermark, and told."""
        while self._recorded and self._told(self._recorded[0][1]):
            self._confirmable = max(self._confirmable, self._recorded.popleft()[0])
        return self._confirmable
