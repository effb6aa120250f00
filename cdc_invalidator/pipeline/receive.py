"""The receive and confirm tasks: the two ends of the data path that touch the walsender.

receive: CopyData → pgoutput → assembly (with the plans of invalidation) → backlog; in the common case, `scan` does it
all in one pass. Its order makes confirming safe: track the batch, put it, then note the commit. confirm sends the
position that checkpoint gives, never one of its own.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable, Iterable

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import scan
from cdc_invalidator.pipeline.assembly import Assembly
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import MESSAGE_PREFIX, ManualBusts
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.definitions import streamed
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.replication import COPY, PAYLOAD, Keepalive, Replication
from cdc_invalidator.postgres.survey import Survey
from cdc_invalidator.rules.table import Table

_log = structlog.get_logger()

# A confirmation says how much WAL PostgreSQL may drop: once a second is often enough, and it asks for the server's
# position in return, which keeps the watermark of a quiet database moving.
CONFIRM_SECONDS = 1.0

_XLOGDATA = b"w"
_LENGTH = struct.Struct(">I").unpack_from


class Receive:
    """Reads the stream and puts what it busts on the backlog.

    Args:
        replication: a started stream.
        publication: to find the table above a partition.
        invalidation: the rules.
        manual: reads manual busts.
        survey: gives the tables of the rules as they were seen last.
        look: has them looked at again.
        backlog: where batches go.
        checkpoint: is told what is in flight and what has been received.
        metrics: what to count.
    """

    def __init__(
        self,
        replication: Replication,
        publication: Publication,
        invalidation: Invalidation,
        manual: ManualBusts,
        survey: Callable[[], Survey],
        look: Callable[[], Awaitable[None]],
        *,
        backlog: Backlog,
        checkpoint: Checkpoint,
        metrics: Metrics,
    ) -> None:
        self._replication = replication
        self._publication = publication
        self._invalidation = invalidation
        self._manual = manual
        self._survey = survey
        self._look = look
        self._assembly = Assembly()
        self._backlog = backlog
        self._checkpoint = checkpoint
        self._metrics = metrics
        self._decoder = pgoutput.Decoder()

    async def run(self) -> None:
        """Receive until cancelled, or until the stream fails."""
        while True:
            await self._backlog.room()
            data = await self._replication.read()
            pos = 0
            while pos < len(data):
                if self._backlog.full:
                    await self._backlog.room()
                if scan.COMPILED:
                    before, pos = pos, self._common(data, pos)
                    if pos > before:
                        continue
                end = pos + 1 + _LENGTH(data, pos + 1)[0]
                await self._one(data[pos + COPY : end])
                pos = end
            # The busts go first.
            await asyncio.sleep(0)
            self._count()

    def _common(self, data: bytes, pos: int) -> int:
        """Take the common case in one pass, a batch at most; return where it stopped, ``pos`` if it took nothing."""
        if self._assembly.in_transaction:
            pos, batches = self._assembly.rows(data, pos)
            for batch in batches:
                self._put(batch)
            return pos
        found = self._assembly.transactions(data, pos)
        if found.taken:
            if found.events:
                self._backlog.put(PlainBatch(found.events, found.xids, found.end_lsn), self._checkpoint.track())
            self._checkpoint.received(found.end_lsn)
            self._metrics.transactions.inc(found.taken)
        return found.pos

    async def _one(self, frame: bytes) -> None:
        """Take what one CopyData message carries."""
        if frame[:1] != _XLOGDATA:
            self._keepalive(Keepalive.read(frame))
            return
        for batch in await self._batches(frame, PAYLOAD - COPY):
            if self._backlog.full:
                await self._backlog.room()
            self._put(batch)

    async def _batches(self, frame: bytes, start: int) -> Iterable[Batch]:
        if frame.startswith(pgoutput.WIDE, start):
            return self._assembly.wide(self._decoder.wide(frame, start))
        message = self._decoder.decode(frame, start)
        if isinstance(message, pgoutput.Relation):
            return await self._relation(message)
        return self._manual_bust(message) if isinstance(message, pgoutput.Message) else self._assembly.feed(message)

    def _manual_bust(self, message: pgoutput.Message) -> Iterable[Batch]:
        if message.prefix != MESSAGE_PREFIX:
            return ()
        try:
            target, key = self._manual.read(message.content)
        except errors.WrongMessage as error:
            self._metrics.rule_errors.labels("").inc()
            _log.error("manual_bust_skipped", lsn=lsn.text(message.lsn), error=str(error))
            return ()
        return self._assembly.manual(message, target, key)

    def _put(self, batch: Batch) -> None:
        if batch.busts:
            self._backlog.put(batch, self._checkpoint.track())
        if batch.end_lsn is not None:
            self._checkpoint.received(batch.end_lsn)
            self._metrics.transactions.inc()

    def _keepalive(self, keepalive: Keepalive) -> None:
        # Inside a transaction its position may lie behind changes that are still to come.
        if not self._assembly.in_transaction:
            self._checkpoint.received(keepalive.end)
        if keepalive.reply:
            self._replication.status(self._checkpoint.confirmable, self._checkpoint.received_lsn)

    async def _relation(self, message: pgoutput.Relation) -> list[Batch]:
        """Take a Relation message; return the batches that are complete by now.

        If its columns are not those that were seen last, all rows may show something else: sweep, in its transaction.
        """
        tables = await self._tables(message)
        if tables and self._survey().leaf(message.oid) is None:
            # A partition that is made, written and dropped between two looks would not be missed. So the watermark has
            # to know it before it passes this transaction.
            await self._look()
            tables = await self._tables(message)
        # A table that was renamed a moment ago, or only within its transaction, is still the one of the rule.
        tables = tables or self._survey().known_as(message.oid)
        plan = None
        homeless = [] if tables else await self._homeless(message.oid)
        if tables:
            types = self._survey().types(message.oid, tables)
            plan, complaints = self._invalidation.compile(message, tables, types)
            for complaint in complaints:
                self._metrics.rule_errors.labels(complaint.rule).inc()
                _log.error("rule_broken", rule=complaint.rule, error=complaint.sentence)
        elif homeless:
            name = f"{message.schema}.{message.name}"
            error = f"It may be {', '.join(map(str, homeless))}, renamed, or a former partition of it."
            _log.error("unknown_table", table=name, error=error)
            plan = self._invalidation.compile_unknown(message, homeless)
        self._assembly.relation(message, plan)
        leaf = self._survey().leaf(message.oid) if tables else None
        columns = ((column.name, column.type_oid, column.type_modifier) for column in message.columns)
        if leaf is None or leaf.definition.streamed == streamed(columns):
            return []
        _log.info("table_altered", table=f"{message.schema}.{message.name}")
        # Readers write keys by the types that they are told. So others have to be told before the watermark passes this
        # transaction, whose values are printed by them.
        await self._look()
        return list(self._assembly.sweep(self._invalidation.targets(tables), message.xid))

    async def _homeless(self, oid: int) -> list[Table]:
        """Return the tables that a relation may have been, or a partition of, if nothing tells where it belongs."""
        survey = self._survey()
        partitioned = survey.partitioned
        if partitioned and await self._publication.carries(oid):
            partitioned = []
        return survey.unknown + partitioned

    async def _tables(self, message: pgoutput.Relation) -> list[Table]:
        """Find the tables that rules know the relation by: itself, and for a partition those above it."""
        above = await self._publication.ancestors(message.oid)
        return [table for table in (Table(message.schema, message.name), *above) if self._invalidation.names(table)]

    def _count(self) -> None:
        for (table, op), count in self._invalidation.counted().items():
            self._metrics.changes.labels(errors.visible(table), op).inc(count)
        self._metrics.backlog.set(self._backlog.weight)
        self._metrics.received_lsn.set(self._checkpoint.received_lsn)


async def confirm(
    replication: Replication, checkpoint: Checkpoint, metrics: Metrics, written: Callable[[], Awaitable[int | None]]
) -> None:
    """Confirm the position once a second until cancelled; while Redis is down, the same one again.

    Args:
        replication: a started stream.
        checkpoint: knows the position.
        metrics: what to count.
        written: asks for an LSN above everything that has been committed by now; see `Snapshots.written`.
    """
    while True:
        await asyncio.sleep(CONFIRM_SECONDS)
        at = time.time_ns() // 1_000_000
        if (end := await written()) is not None:
            # The position that is asked for below tells whether the stream has got there.
            checkpoint.committed(end, at)
        replication.status(checkpoint.confirmable, checkpoint.received_lsn, reply=True)
        metrics.confirmed_lsn.set(checkpoint.confirmable)
