"""`debounce`: at most one bust of a key in a rule's time, and the last change is always followed by one. Pure.

The first change of a key is busted at once. What changes within the time after that is held, and busted once when the
time is over. The position does not pass what is held, so a restart busts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cdc_invalidator.checkpoint import Ticket
from cdc_invalidator.invalidation import Batch, Target

# Keys whose last bust is remembered, some 200 bytes each; past that, keys are busted as if there were no time to keep.
CAPACITY = 100_000


@dataclass(slots=True)
class _Held:
    """A key that waits for its time; ``last``: the newest transaction that changed it."""

    last: Batch
    ticket: Ticket
    due: float
    ops: dict[str, None]
    reason: str


class Debounce:
    """What was busted a moment ago, and what is held for that; times are of the monotonic clock, in seconds.

    Args:
        resolve: ends a part of a ticket whose work another ticket stands for.
        capacity: how many keys are remembered.
    """

    def __init__(self, resolve: Callable[[Ticket], None], capacity: int = CAPACITY) -> None:
        self._resolve = resolve
        self._capacity = capacity
        # Until when a key is left alone.
        self._quiet: dict[tuple[Target, bytes], float] = {}
        self._held: dict[tuple[Target, bytes], _Held] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, taken: Iterable[tuple[Batch, Ticket]], now: float) -> None:
        """Take those keys out of batches that have to wait."""
        for batch, ticket in taken:
            for target, busts in batch.busts.items():
                if target.debounce and not busts.sweep:
                    for key in [key for key in busts.keys if self._waits(batch, ticket, target, key, now)]:
                        del busts.keys[key]
                        batch.weight -= 1

    def _waits(self, batch: Batch, ticket: Ticket, target: Target, key: bytes, now: float) -> bool:
        name = (target, key)
        busts = batch.busts[target]
        held = self._held.get(name)
        if held is not None:
            # The older ticket holds the position back for this change as well.
            held.last = batch
            held.ops.update(busts.ops)
            return True
        until = self._quiet.get(name, now)
        if until > now:
            ticket.parts += 1
            self._held[name] = _Held(batch, ticket, until, dict(busts.ops), busts.reason)
            return True
        self._note(name, now)
        return False

    def _note(self, name: tuple[Target, bytes], now: float) -> None:
        if len(self._quiet) >= self._capacity:
            self._quiet = {other: until for other, until in self._quiet.items() if until > now}
        if len(self._quiet) < self._capacity:
            self._quiet[name] = now + name[0].debounce / 1000

    def due(self, now: float) -> list[tuple[Batch, Ticket]]:
        """Take what has waited for long enough: a batch for each transaction that changed such keys last."""
        over = [name for name, held in self._held.items() if held.due <= now]
        found: dict[int, tuple[Batch, Ticket]] = {}
        for name in over:
            held = self._held.pop(name)
            batch, ticket = found.get(held.last.commit_lsn) or (None, held.ticket)
            if batch is None:
                batch = Batch(held.last.commit_lsn, held.last.committed_at, held.last.xid)
            else:
                # One ticket stands for all: that which holds back most.
                ticket, other = sorted((ticket, held.ticket), key=lambda one: one.below)
                self._resolve(other)
            found[held.last.commit_lsn] = (batch, ticket)
            target, key = name
            batch.add(target, held.ops, key, held.reason)
            self._note(name, now)
        return list(found.values())

    def next_due(self) -> float | None:
        """Give when the next key is due; ``None`` when none is held."""
        return min((held.due for held in self._held.values()), default=None)
