"""`debounce`: at most one bust of a key in a rule's time, and the last change is always followed by one. Pure.

The first change of a key is busted at once. Changes within the time after that are held, and the key is busted once
when the time is over. The position does not pass what is held, so a restart busts it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from cdc_invalidator.pipeline.batch import Batch, PlainBatch, Target
from cdc_invalidator.pipeline.checkpoint import Ticket

# Keys whose last bust is remembered, some 200 bytes each; past that, keys are busted as if there were no time to keep.
CAPACITY = 100_000
# Transactions that one held key remembers; with more, it is busted before its time.
MOST_XIDS = 1000


@dataclass(slots=True)
class _Held:
    """A key that waits for its time; ``last``: the newest transaction that changed it, ``xids``: all of them.

    Their batches are empty: what else a transaction did does not matter here.
    """

    last: Batch
    xids: dict[int, Batch]
    ticket: Ticket
    due: float
    ops: dict[str, None]
    reason: str


class Debounce:
    """Keys busted a moment ago, and keys held for that. Times are of the monotonic clock, in seconds.

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
        self._full_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, taken: Iterable[tuple[Batch | PlainBatch, Ticket]], now: float) -> None:
        """Take those keys out of batches that have to wait."""
        for batch, ticket in taken:
            if isinstance(batch, PlainBatch):
                continue
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
            held.last = held.xids[batch.xid] = _empty(batch)
            held.ops.update(busts.ops)
            if len(held.xids) > MOST_XIDS:
                held.due = now
            return True
        until = self._quiet.get(name, now)
        if until > now:
            ticket.parts += 1
            last = _empty(batch)
            self._held[name] = _Held(last, {batch.xid: last}, ticket, until, dict(busts.ops), busts.reason)
            return True
        self._note(name, now)
        return False

    def _note(self, name: tuple[Target, bytes], now: float) -> None:
        if len(self._quiet) >= self._capacity and now >= self._full_until:
            self._quiet = {other: until for other, until in self._quiet.items() if until > now}
            # Looked through again when the first of them is over, not for each key.
            self._full_until = min(self._quiet.values(), default=now)
        if len(self._quiet) < self._capacity:
            self._quiet[name] = now + name[0].debounce / 1000

    def xids(self, now: float) -> set[int]:
        """Return the transactions that changed keys whose time is over."""
        return {xid for held in self._held.values() if held.due <= now for xid in held.xids if xid}

    def due(self, now: float, hidden: Container[int]) -> list[tuple[Batch, Ticket]]:
        """Take what has waited for long enough: a batch for each transaction that changed such keys last.

        Args:
            now: the time.
            hidden: transactions that readers don't see yet: each of them has a batch of its own, and is waited for.
        """
        over = [name for name, held in self._held.items() if held.due <= now]
        found: dict[int, tuple[Batch, Ticket]] = {}
        for name in over:
            held = self._held.pop(name)
            target, key = name
            for last in [held.last, *(one for xid, one in held.xids.items() if xid in hidden and one is not held.last)]:
                if last is not held.last:
                    held.ticket.parts += 1
                batch, ticket = found.get(last.commit_lsn) or (_empty(last), None)
                if ticket is None:
                    ticket = held.ticket
                else:
                    # One ticket stands for all: that which holds back most.
                    ticket, other = sorted((ticket, held.ticket), key=lambda one: one.below)
                    self._resolve(other)
                found[last.commit_lsn] = (batch, ticket)
                batch.add(target, held.ops, key, held.reason)
            self._note(name, now)
        return list(found.values())

    def next_due(self) -> float | None:
        """Return when the next key is due; ``None`` when none is held."""
        return min((held.due for held in self._held.values()), default=None)


def _empty(batch: Batch) -> Batch:
    return Batch(batch.commit_lsn, batch.committed_at, batch.xid)
