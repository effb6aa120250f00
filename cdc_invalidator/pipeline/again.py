"""Busts that are applied again: what waits for its second bust, and when it is due. Pure.

A bust may come too early: a reader loads the old row after it and caches that again. There are three causes: the commit
is not visible on the primary yet, the reader uses a standby that has not replayed it, or the reader does not keep the
fill contract (``again_after``). The position does not pass what waits here, so a restart applies it again.

What waits is bounded. Past ``capacity`` keys, they are widened to sweeps; only the oldest of their tickets stays, and
holds the position back for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from cdc_invalidator.pipeline.backlog import BATCH
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.pipeline.checkpoint import Ticket

# Keys that may wait, some 150 bytes each.
CAPACITY = 100_000


@dataclass(slots=True)
class Waiting:
    """A batch to be busted again at ``due``, a time or an LSN, depending on its queue; that resolves its ticket."""

    batch: Batch
    ticket: Ticket
    since: float
    due: float
    widened: bool = False
    # What its queue has counted for it; a batch may grow meanwhile.
    weight: int = 0


class _Queue:
    """Batches in the order in which they become due."""

    def __init__(self, reason: str, capacity: int, resolve: Callable[[Ticket], None]) -> None:
        self.reason = reason
        self.waiting: deque[Waiting] = deque()
        self._capacity = capacity
        self._resolve = resolve
        self._weight = 0

    def append(self, item: Waiting) -> None:
        self.waiting.append(item)
        item.weight = item.batch.weight + BATCH
        self._weight += item.weight
        if self._weight > self._capacity:
            self._widen()

    def ready(self, reached: float) -> Iterator[Waiting]:
        while self.waiting and self.waiting[0].due < reached:
            item = self.waiting.popleft()
            if not item.widened:
                self._weight -= item.weight
            yield item

    def _widen(self) -> None:
        """Merge what is not widened yet into sweeps of its caches, due with the last of it."""
        some: list[Waiting] = []
        # What was widened before stays apart; otherwise it would never become due while more comes.
        while self.waiting and not self.waiting[-1].widened:
            some.append(self.waiting.pop())
        some.reverse()
        self.waiting.append(_widened(some, self._resolve))
        self._weight = 0


def _widened(some: Sequence[Waiting], resolve: Callable[[Ticket], None]) -> Waiting:
    """Merge several into sweeps, due with the last of them; the ticket that holds back most stays."""
    last = some[-1]
    whole = Batch(last.batch.commit_lsn, last.batch.committed_at, last.batch.xid)
    for item in some:
        for target, busts in item.batch.busts.items():
            whole.sweep(target, busts.ops, busts.reason)
            # What a query would have given is not known now: whoever re-applies the batch sweeps as well.
            busts.sweep |= target.query is not None
    oldest = min(some, key=lambda item: item.ticket.below)
    for item in some:
        if item is not oldest:
            resolve(item.ticket)
    due = max(item.due for item in some)
    return Waiting(whole, oldest.ticket, some[0].since, due, widened=True)


class Again:
    """Everything to be busted again. Times are of the monotonic clock, in seconds.

    Args:
        resolve: ends a part of a ticket whose work another ticket stands for.
        capacity: how many keys may wait to be visible, for standbys, and for each `again_after`.
    """

    def __init__(self, resolve: Callable[[Ticket], None], capacity: int = CAPACITY) -> None:
        self._resolve = resolve
        self._capacity = capacity
        self._hidden: list[Waiting] = []
        self._hidden_weight = 0
        self._unreplayed = _Queue("standby", capacity, resolve)
        # By the milliseconds that they wait: each queue is in order then.
        self._later: dict[int, _Queue] = {}

    def __bool__(self) -> bool:
        return bool(self._hidden or self._unreplayed.waiting or any(queue.waiting for queue in self._later.values()))

    @property
    def hidden(self) -> set[int]:
        """Transactions that readers of the primary don't see yet."""
        return {item.batch.xid for item in self._hidden}

    @property
    def unreplayed(self) -> Waiting | None:
        """The oldest one that waits for standbys; its ``due`` is an LSN."""
        waiting = self._unreplayed.waiting
        return waiting[0] if waiting else None

    def until_visible(self, batch: Batch, ticket: Ticket, now: float) -> None:
        """Let a batch wait until its transaction is visible."""
        ticket.parts += 1
        self._hidden.append(Waiting(batch, ticket, now, now))
        self._hidden_weight += batch.weight + BATCH
        if self._hidden_weight > self._capacity:
            self._widen_hidden()

    def let_go(self) -> set[str]:
        """Hold no position back, but for standbys, which can be dropped; return the caches that were to be busted."""
        waiting = [*self._hidden, *(item for queue in self._later.values() for item in queue.waiting)]
        self._hidden, self._hidden_weight = [], 0
        self._later.clear()
        for item in waiting:
            self._resolve(item.ticket)
        return {target.cache.name for item in waiting for target in item.batch.busts}

    def _widen_hidden(self) -> None:
        by_xid: dict[int, list[Waiting]] = {}
        for item in self._hidden:
            by_xid.setdefault(item.batch.xid, []).append(item)
        self._hidden = [_widened(some, self._resolve) if len(some) > 1 else some[0] for some in by_xid.values()]
        self._hidden_weight = sum(item.batch.weight + BATCH for item in self._hidden)

    def until_replayed(self, batch: Batch, ticket: Ticket, now: float) -> None:
        """Let a batch wait until the standbys have replayed its commit record."""
        ticket.parts += 1
        # A record is replayed when the position has passed its beginning.
        self._unreplayed.append(Waiting(batch, ticket, now, batch.commit_lsn))

    def until_later(self, batch: Batch, ticket: Ticket, now: float) -> None:
        """Let the busts of caches with ``again_after`` wait for that time."""
        for delay in {target.cache.again_after for target in batch.busts if target.cache.again_after is not None}:
            part = Batch(batch.commit_lsn, batch.committed_at, batch.xid, whole=batch)
            for target, busts in batch.busts.items():
                if target.cache.again_after == delay:
                    part.busts[target] = busts
                    named = len(busts.keys) + len(busts.bumps) + len(busts.derived) + len(busts.searches)
                    part.weight += named + busts.sweep
            ticket.parts += 1
            queue = self._later.setdefault(delay, _Queue("again_after", self._capacity, self._resolve))
            queue.append(Waiting(part, ticket, now, now + delay / 1000))

    def ready(self, hidden: Callable[[int], bool], replayed: int, now: float) -> Iterable[tuple[str, Waiting]]:
        """Take what is due, each with the reason why it waited.

        Args:
            hidden: whether readers of the primary still don't see a transaction.
            replayed: the LSN that all standbys have replayed.
            now: the time.
        """
        visible = [item for item in self._hidden if not hidden(item.batch.xid)]
        if visible:
            self._hidden = [item for item in self._hidden if hidden(item.batch.xid)]
            self._hidden_weight = sum(item.batch.weight + BATCH for item in self._hidden)
        yield from (("visible", item) for item in visible)
        for queue, reached in chain([(self._unreplayed, replayed)], ((later, now) for later in self._later.values())):
            yield from ((queue.reason, item) for item in queue.ready(reached))

    def next_due(self) -> float | None:
        """Return when the next one is due, of those that wait for a time; ``None`` without any."""
        return min((queue.waiting[0].due for queue in self._later.values() if queue.waiting), default=None)
