"""What a walsender sends, written by hand, and a receive task that reads it without any server."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import receive
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import MESSAGE_PREFIX, ManualBusts
from cdc_invalidator.postgres.stream import whole
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import UNCHANGED, Value

# Of these, the rules name users, orders and one that is not there (it may be EXTRA); PART is a partition of orders.
USERS, ORDERS, PART, OTHER, EXTRA = 0x4001, 0x4112, 0x4223, 0x4334, 0x4445
TABLES = {USERS: "users", ORDERS: "orders", PART: "orders_1", OTHER: "other", EXTRA: "extra"}
COLUMNS = ("id", "team", "name", "bio")


class Content(NamedTuple):
    """A message inside a transaction, without the id of its subtransaction."""

    tag: bytes
    rest: bytes

    def payload(self, xid: int | None = None) -> bytes:
        return self.tag + (b"" if xid is None or self.tag == b"O" else struct.pack(">I", xid)) + self.rest


KEEPALIVE = Content(b"k", b"")
"""One in the middle of a transaction."""


def row(values: Sequence[Value]) -> bytes:
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if value is None or value is UNCHANGED:
            parts.append(b"n" if value is None else b"u")
        else:
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
    return b"".join(parts)


def insert(oid: int, new: Sequence[Value]) -> Content:
    return Content(b"I", struct.pack(">I", oid) + b"N" + row(new))


def update(oid: int, old_kind: bytes, old: Sequence[Value], new: Sequence[Value]) -> Content:
    return Content(b"U", struct.pack(">I", oid) + (old_kind + row(old) if old_kind else b"") + b"N" + row(new))


def delete(oid: int, old_kind: bytes, old: Sequence[Value]) -> Content:
    return Content(b"D", struct.pack(">I", oid) + old_kind + row(old))


def truncate(oids: Sequence[int]) -> Content:
    return Content(b"T", struct.pack(f">IB{len(oids)}I", len(oids), 0, *oids))


def relation(
    oid: int, identity: bytes = b"d", keys: Iterable[str] = ("id",), columns: Sequence[str] = COLUMNS
) -> Content:
    carried = {b"f": columns, b"n": ()}.get(identity, keys)
    shape = [
        struct.pack(">B", name in carried) + name.encode() + b"\0" + struct.pack(">Ii", 25, -1) for name in columns
    ]
    head = struct.pack(">I", oid) + b"public\0" + TABLES[oid].encode() + b"\0" + identity
    return Content(b"R", head + struct.pack(">H", len(columns)) + b"".join(shape))


def message(content: bytes, *, transactional: bool = True, lsn: int = 5, prefix: str = MESSAGE_PREFIX) -> Content:
    head = struct.pack(">BQ", transactional, lsn) + prefix.encode() + b"\0"
    return Content(b"M", head + struct.pack(">I", len(content)) + content)


class Unit(NamedTuple):
    """What comes in one piece: a transaction, a block of one, its end, or a message outside of any."""

    kind: str
    xid: int = 0
    contents: Sequence[tuple[int, Content]] = ()
    first: bool = False


class Payloads(list[bytes]):
    """Whatever comes in a CopyData message, one after the other; to look at, long ones are told in short."""

    def __repr__(self) -> str:
        shown = [repr(each) for each in self[:100]]
        return f"Payloads([{', '.join(shown)}{f', and {len(self) - 100} more' if len(self) > 100 else ''}])"


@dataclass
class Server:
    """Gives units their place in the WAL, and writes them as a walsender does."""

    lsn: int = 1000
    payloads: Payloads = field(default_factory=Payloads)

    def write(self, unit: Unit) -> None:
        put = self.payloads.append
        if unit.kind == "transaction":
            self.lsn += 100
            put(struct.pack(">cQqI", b"B", self.lsn, self.lsn * 7, unit.xid))
            self._contents(unit, streamed=False)
            put(struct.pack(">cBQQq", b"C", 0, self.lsn, self.lsn + 48, self.lsn * 7))
        elif unit.kind == "block":
            put(struct.pack(">cIB", b"S", unit.xid, unit.first))
            self._contents(unit, streamed=True)
            put(b"E")
        elif unit.kind == "stream commit":
            self.lsn += 100
            put(struct.pack(">cIBQQq", b"c", unit.xid, 0, self.lsn, self.lsn + 48, self.lsn * 7))
        elif unit.kind == "stream abort":
            put(struct.pack(">cII", b"A", unit.xid, unit.contents[0][0]))
        elif unit.kind == "keepalive":
            self._keepalive()
        elif unit.kind == "manual":
            self.lsn += 70
            put(message(unit.contents[0][1].rest, transactional=False, lsn=self.lsn - 10).payload())
        else:
            put(unit.contents[0][1].payload())

    def _contents(self, unit: Unit, *, streamed: bool) -> None:
        for subxid, content in unit.contents:
            if content is KEEPALIVE:
                self._keepalive()
            else:
                self.payloads.append(content.payload(subxid if streamed else None))

    def _keepalive(self) -> None:
        self.payloads.append(struct.pack(">cQqB", b"k", self.lsn + 50, 0, self.lsn % 200 == 0))


def copied(payloads: Iterable[bytes]) -> bytes:
    """The same as CopyData messages; keepalives are ones already."""
    frames = [each if each[:1] == b"k" else struct.pack(">cQQq", b"w", 1, 1, 1) + each for each in payloads]
    return b"".join(b"d" + struct.pack(">I", len(frame) + 4) + frame for frame in frames)


# ── Who reads it ─────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Rules, and what the catalogs say of the tables."""

    def __init__(self, rule_set: RuleSet) -> None:
        self.invalidation = Invalidation(rule_set)
        self.manual = ManualBusts(rule_set)
        self.unknown = [table for table in (Table("public", "gone"),) if self.invalidation.names(table)]

    def known_as(self, _oid: int) -> list[Table]:
        return []

    @property
    def partitioned(self) -> list[Table]:
        return []

    def leaf(self, _oid: int) -> None:
        """Nothing is known of the tables as they were, so that no shape is another one."""

    def types(self, _oid: int, _tables: list[Table]) -> dict[str, ColumnType]:
        return {}

    async def look(self) -> None:
        pass

    async def ancestors(self, oid: int) -> list[Table]:
        return [Table("public", "orders")] if oid == PART else []


class Over(Exception):
    """There is no more to read."""


class Stream:
    """A replication that brings bytes in the pieces that are put into ``pieces``."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._rest = b""

    async def read(self) -> bytes:
        while self.pieces:
            self._rest += self.pieces.pop(0)
            if size := whole(self._rest):
                data, self._rest = self._rest[:size], self._rest[size:]
                return data
        assert not self._rest
        raise Over

    def status(self, confirmed: int, received: int) -> None:
        assert confirmed <= received


class Collecting(Backlog):
    """Keeps all that is put, and never is full."""

    def __init__(self) -> None:
        super().__init__(capacity=2**60)
        self.batches: list[Batch] = []
        self.runs = 0

    def put(self, batch: Batch | PlainBatch, ticket: Ticket) -> None:
        # Until it is resolved no position at or after its first commit may be confirmed.
        assert ticket.below <= batch.first_lsn
        assert ticket.parts == 1
        assert batch.weight > 0
        if isinstance(batch, PlainBatch):
            self.runs += 1
            self.batches += batch.batches()
        else:
            self.batches.append(batch)
        super().put(batch, ticket)


class Reader:
    """A receive task with nothing around it.

    Args:
        rule_set: the rules.
        backlog: where batches go; one that is never full.
    """

    def __init__(self, rule_set: RuleSet, backlog: Backlog) -> None:
        self.world = World(rule_set)
        self.checkpoint = Checkpoint(0)
        self.metrics = Metrics(CollectorRegistry())
        self._stream = Stream()
        stream: Any = self._stream
        world: Any = self.world
        self._receive = receive.Receive(
            stream,
            world,
            world.invalidation,
            world.manual,
            lambda: world,
            world.look,
            backlog=backlog,
            checkpoint=self.checkpoint,
            metrics=self.metrics,
        )

    def read(self, *pieces: bytes) -> None:
        """Receive all of this.

        Raises:
            errors.MalformedMessage: it is no stream.
        """
        self._stream.pieces += pieces
        receiving = self._receive.run()
        try:
            # It waits for nothing here but its turn.
            while True:
                receiving.send(None)
        except Over:
            return
        finally:
            receiving.close()
