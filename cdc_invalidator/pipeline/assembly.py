"""From the messages of the stream to batches: which rows belong to which transaction, and what has committed. Pure.

A transaction between Begin and Commit has committed already: its keys leave in batches as they come. A large one may
come in blocks while it still runs (protocol version 2): its keys are held, by subtransaction, until Stream Commit, and
forgotten at Stream Abort.

What is held is bounded: past `HELD` keys, the targets with the most keys are widened to sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cdc_invalidator.pipeline import scan
from cdc_invalidator.pipeline.batch import Batch, BustEvent, Target
from cdc_invalidator.pipeline.plan import Plan, out_of_place
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.packed import Pair

# A transaction's keys leave for Redis once they are this many.
CHUNK = 1000
# Keys of transactions in progress that are held in memory, some 150 bytes each, and subtransactions, some 800.
HELD = 300_000
PARTS = 20_000
# Rows of transactions in progress between two looks at what is held.
UNCHECKED = 10_000

Plans = dict[int, Plan | None]


@dataclass(slots=True)
class _Touched:
    """Keys of one cache that a transaction has touched, and versions that it has bumped."""

    keys: int = 0
    bumped: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class _InProgress:
    """A transaction in progress: what it busts so far, by subtransaction, and the relations as it sees them."""

    parts: dict[int, Batch] = field(default_factory=dict)
    plans: Plans = field(default_factory=dict)
    # With too many parts, everything goes into this one; an aborted subtransaction can't be taken out of it.
    merged: Batch | None = None

    @property
    def keys(self) -> int:
        return sum(
            len(busts.keys) + len(busts.searches) for part in self.parts.values() for busts in part.busts.values()
        )

    def part(self, xid: int) -> Batch:
        part = self.merged or self.parts.get(xid)
        if part is None:
            part = self.parts[xid] = Batch(0, 0, xid)
        return part

    def merge(self, xid: int) -> None:
        """Merge all parts into one that sweeps every cache that one of them busts."""
        merged = Batch(0, 0, xid)
        for part in self.parts.values():
            for target, busts in part.busts.items():
                merged.sweep(target, busts.ops, busts.reason)
        self.merged = merged
        self.parts = {xid: merged}


class Assembly:
    """Takes the messages of the stream in order.

    Args:
        chunk: how many keys of one transaction make a batch of their own.
        held: how many keys of transactions in progress are held.
    """

    def __init__(self, *, chunk: int = CHUNK, held: int = HELD) -> None:
        self._chunk = chunk
        self._held = held
        self._plans: Plans = {}
        self._open: Batch | None = None
        self._in_progress: dict[int, _InProgress] = {}
        self._block: _InProgress | None = None
        self._unchecked = 0
        # What the transaction at hand did so far to caches with `bump_over`.
        self._touched: dict[Target, _Touched] = {}
        self.widened = 0
        self._take: dict[type, Callable[[Any], Iterable[Batch]]] = {
            pgoutput.Begin: self._begin,
            pgoutput.Commit: self._commit,
            pgoutput.Origin: _ignore,
            pgoutput.Type: _ignore,
            pgoutput.Message: _ignore,
            pgoutput.Insert: self._insert,
            pgoutput.Update: self._update,
            pgoutput.Delete: self._delete,
            pgoutput.Truncate: self._truncate,
            pgoutput.StreamStart: self._stream_start,
            pgoutput.StreamStop: self._stream_stop,
            pgoutput.StreamCommit: self._stream_commit,
            pgoutput.StreamAbort: self._stream_abort,
        }

    @property
    def in_transaction(self) -> bool:
        """Whether the stream stands between Begin and Commit, or in a block: a transaction is not whole then."""
        return self._open is not None or self._block is not None

    @property
    def held(self) -> int:
        """Keys of transactions in progress."""
        return sum(progress.keys for progress in self._in_progress.values())

    def relation(self, message: pgoutput.Relation, plan: Plan | None) -> None:
        """Take a Relation message with the plan that was compiled for it; ``None`` if no rule reads the relation."""
        # A transaction in progress may have altered the table and be rolled back: only it sees this shape.
        plans = self._plans if self._block is None else self._block.plans
        plans[message.oid] = plan

    def manual(self, message: pgoutput.Message, target: Target, key: bytes | None) -> Iterable[Batch]:
        """Take a manual bust: in order with the rows of its transaction, or at once if it is in none."""
        batch = self._into(message.xid) if message.transactional else Batch(message.lsn, None, 0)
        if key is None:
            batch.sweep(target, ("message",), "manual")
        else:
            batch.add(target, ("message",), key, "manual")
        return self._leave(batch) if message.transactional else (batch,)

    def wide(self, message: pgoutput.Wide) -> Iterable[Batch]:
        """Take a row that is too large to be held: its caches are swept."""
        batch = self._into(message.xid)
        plan = self._plan(message.oid)
        if plan is None:
            return ()
        plan.wide(batch, message.op)
        return self._leave(batch)

    def sweep(self, targets: Iterable[Target], xid: int | None) -> Iterable[Batch]:
        """Sweep caches in the transaction at hand, because a table was altered."""
        batch = self._into(xid)
        for target in targets:
            batch.sweep(target, ("alter",), "change")
        return self._leave(batch)

    def transactions(self, data: bytes, pos: int) -> scan.Transactions:
        """Take small, plain transactions as a whole, outside of any other; see `scan.transactions`."""
        return scan.transactions(data, pos, self._plans, BustEvent, limit=self._chunk)

    def rows(self, data: bytes, pos: int) -> tuple[int, Iterable[Batch]]:
        """Take plain rows of the transaction at hand; see `scan.rows`.

        Returns:
            Where it stopped, and what is complete by now.
        """
        progress = self._block
        found = scan.rows(
            data,
            pos,
            self._plans,
            progress.plans if progress else {},
            in_stream=progress is not None,
            limit=self._chunk,
        )
        if not found.taken:
            return pos, ()
        batch = self._into(found.xid)
        for target, ops, keys in found.found:
            # The first reason stays: a TRUNCATE is not made a change by what follows it.
            batch.add_all(target, ops.split(","), keys, batch.of(target).reason)
        self._unchecked += found.taken
        return found.pos, self._leave(batch)

    def feed(self, message: pgoutput.AnyMessage) -> Iterable[Batch]:
        """Take the next message, other than a Relation.

        Returns:
            The batches that are complete by now, to be taken one by one; the last one of a transaction has its
            ``end_lsn``.

        Raises:
            errors.MalformedMessage: the message can't stand here.
        """
        return self._take[type(message)](message)

    def _begin(self, message: pgoutput.Begin) -> Iterable[Batch]:
        if self.in_transaction:
            raise out_of_place("Begin")
        self._open = Batch(message.lsn, message.committed_at, message.xid)
        self._touched.clear()
        return ()

    def _commit(self, message: pgoutput.Commit) -> Iterable[Batch]:
        batch = self._open
        if batch is None:
            raise out_of_place("Commit")
        self._open = None
        batch.end_lsn = message.end_lsn
        self._bump(batch)
        return (batch,)

    # Rows: into the open transaction, or into the part of the streamed one that they belong to.

    def _into(self, xid: int | None) -> Batch:
        if self._block is not None and xid is not None:
            return self._block.part(xid)
        if self._open is None:
            raise out_of_place("a change outside a transaction")
        return self._open

    def _plan(self, oid: int) -> Plan | None:
        if self._block is not None and oid in self._block.plans:
            return self._block.plans[oid]
        try:
            return self._plans[oid]
        except KeyError:
            raise out_of_place("a change before its Relation") from None

    def _insert(self, message: pgoutput.Insert) -> Iterable[Batch]:
        batch = self._into(message.xid)
        plan = self._plan(message.oid)
        if plan is None:
            return ()
        plan.insert(batch, message)
        return self._leave(batch)

    def _update(self, message: pgoutput.Update) -> Iterable[Batch]:
        batch = self._into(message.xid)
        plan = self._plan(message.oid)
        if plan is None:
            return ()
        plan.update(batch, message)
        return self._leave(batch)

    def _delete(self, message: pgoutput.Delete) -> Iterable[Batch]:
        batch = self._into(message.xid)
        plan = self._plan(message.oid)
        if plan is None:
            return ()
        plan.delete(batch, message)
        return self._leave(batch)

    def _truncate(self, message: pgoutput.Truncate) -> Iterable[Batch]:
        batch = self._into(message.xid)
        for oid in message.oids:
            plan = self._plan(oid)
            if plan is not None:
                plan.truncate(batch)
        return self._leave(batch)

    def _leave(self, batch: Batch) -> Iterable[Batch]:
        """Let a committed transaction leave in pieces, and keep one in progress within bounds."""
        if batch is not self._open:
            self._unchecked += 1
            if self._unchecked >= UNCHECKED:
                self._bound()
            return ()
        if batch.weight < self._chunk:
            return ()
        self._open = Batch(batch.commit_lsn, batch.committed_at, batch.xid)
        self._bump(batch)
        return (batch,)

    def _bump(self, batch: Batch) -> None:
        """Trade single keys for bumps of their versions, where the transaction has touched more than `bump_over`."""
        for target, busts in batch.busts.items():
            if not target.pairs or target.query is not None or not busts.keys:
                continue
            touched = self._touched.setdefault(target, _Touched())
            touched.keys += len(busts.keys)
            if touched.keys > (target.cache.bump_over or 0):
                versions = {Pair.split(key).version for key in busts.keys}
                batch.bump(target, versions - touched.bumped)
                touched.bumped |= versions

    # Blocks of transactions in progress.

    def _stream_start(self, message: pgoutput.StreamStart) -> Iterable[Batch]:
        if self.in_transaction:
            raise out_of_place("Stream Start")
        if not message.first and message.xid not in self._in_progress:
            raise out_of_place("a later block of a transaction whose first one is missing")
        self._block = self._in_progress.setdefault(message.xid, _InProgress())
        return ()

    def _stream_stop(self, _message: pgoutput.StreamStop) -> Iterable[Batch]:
        self._block = None
        self._bound()
        return ()

    def _bound(self) -> None:
        """Widen until no more is held than may be."""
        self._unchecked = 0
        for xid, progress in self._in_progress.items():
            if len(progress.parts) > PARTS:
                progress.merge(xid)
                self.widened += 1
        while self.held > self._held and self._widen():
            self.widened += 1

    def _widen(self) -> bool:
        """Trade the keys of the target with the most keys for a sweep of its cache; False if there is none."""
        counts: dict[Target, int] = {}
        parts = [part for progress in self._in_progress.values() for part in progress.parts.values()]
        for part in parts:
            for target, busts in part.busts.items():
                # A cache with a single key is no smaller for being swept.
                held = len(busts.keys) + len(busts.searches)
                if held and (target.one is None or target.pairs or target.query is not None):
                    counts[target] = counts.get(target, 0) + held
        if not counts:
            return False
        largest = max(counts, key=counts.__getitem__)
        for part in parts:
            if largest in part.busts and (part.busts[largest].keys or part.busts[largest].searches):
                part.widen(largest)
        return True

    def _stream_commit(self, message: pgoutput.StreamCommit) -> Iterator[Batch]:
        progress = self._end(message.xid, "Stream Commit")
        self._plans.update(progress.plans)
        self._touched.clear()
        batch = Batch(message.lsn, message.committed_at, message.xid)
        for part in progress.parts.values():
            for target, busts in part.busts.items():
                if busts.sweep:
                    batch.sweep(target, busts.ops, busts.reason)
                if busts.bumps:
                    batch.bump(target, busts.bumps)
                    batch.of(target).ops.update(busts.ops)
                for prefix in busts.searches:
                    batch.search(target, busts.ops, prefix, busts.reason)
                keys = iter(busts.keys)
                while some := list(islice(keys, max(1, self._chunk - batch.weight))):
                    if batch.weight >= self._chunk:
                        self._bump(batch)
                        yield batch
                        batch = Batch(message.lsn, message.committed_at, message.xid)
                    batch.add_all(target, busts.ops, some, busts.reason)
        batch.end_lsn = message.end_lsn
        self._bump(batch)
        yield batch

    def _stream_abort(self, message: pgoutput.StreamAbort) -> Iterable[Batch]:
        if message.xid == message.subxid:
            self._end(message.xid, "Stream Abort")
        elif message.xid in self._in_progress and not self._in_progress[message.xid].merged:
            self._in_progress[message.xid].parts.pop(message.subxid, None)
        return ()

    def _end(self, xid: int, what: str) -> _InProgress:
        if self.in_transaction or xid not in self._in_progress:
            raise out_of_place(what)
        return self._in_progress.pop(xid)


def _ignore(_message: object) -> Iterable[Batch]:
    return ()
