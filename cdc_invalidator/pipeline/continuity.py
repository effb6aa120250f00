"""Continuity: is this Redis the one that has had all busts, and what does it lack if not?

After a restart or failover, Redis may have lost writes that it acknowledged. So at each connection its watermark is
compared with what was applied.

The rule that holds here: what a Redis lacks is re-applied from `Recent`, or the caches are swept; until that is done,
no watermark says that this Redis has had anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cdc_invalidator import errors, lsn
from cdc_invalidator.pipeline.batch import Batch, PlainBatch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.record import WatermarkRecord
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.watermark import Position, Watermark, gaps
from cdc_invalidator.rules.model import Cache, RuleSet


@dataclass(frozen=True, slots=True)
class Kept:
    """What a stream keeps up to date, and where it goes on.

    ``digests``: for each cache that the stream keeps, what the watermark says of its rules.
    """

    rules: RuleSet
    digests: Mapping[str, str]
    position: Position


class GapSweeps:
    """The sweeps of gaps: asked for, and not over yet.

    Args:
        kept: the caches, and where the stream goes on.
        checkpoint: tracks them, as all work.
        events: where gaps are logged.
        enabled: False to only report gaps (``CDC_ON_GAP=warn``).
    """

    def __init__(self, kept: Kept, checkpoint: Checkpoint, events: Events, *, enabled: bool) -> None:
        self._kept = kept
        self._checkpoint = checkpoint
        self._events = events
        self.enabled = enabled
        self.queued: list[tuple[Batch, Ticket]] = []
        self._unfinished: set[Ticket] = set()

    @property
    def unfinished(self) -> bool:
        """Whether one holds the watermark back."""
        return bool(self._unfinished)

    @property
    def received(self) -> int:
        """The end of what PostgreSQL had written at the start, or has sent since."""
        return max(self._kept.position.flushed, self._checkpoint.received_lsn)

    def take(self) -> list[tuple[Batch, Ticket]]:
        """Take those that were asked for, as batches."""
        queued, self.queued = self.queued, []
        return queued

    def report(self, broken: Mapping[str, str]) -> None:
        """Sweep caches whose changes may have been missed; ``broken`` is from a cache's name to the reason."""
        for reason in sorted(set(broken.values())):
            caches = sorted(name for name, why in broken.items() if why == reason)
            self.log(reason, caches, self._kept.position.start, swept=self.enabled)
            if self.enabled:
                self.sweep(reason, [self._kept.rules.caches[name] for name in caches])

    def log(self, reason: str, caches: list[str], since: int, *, swept: bool) -> None:
        """Log that changes to these caches since an LSN may have been missed."""
        self._events.gap(reason, caches, swept=swept, lsn=lsn.text(since))

    def sweep(self, why: str, caches: Iterable[Cache]) -> None:
        """Queue a batch that sweeps these caches for everything that has been received."""
        # Before the end of that, as commits are.
        batch = Batch(self.received - 1, None, 0)
        for cache in caches:
            batch.sweep(Target("", cache, ""), (why,), "gap")
        if not batch.busts:
            return
        ticket = self._checkpoint.track()
        # Until it is done, the watermark must not say that this Redis has had anything.
        self._unfinished.add(ticket)
        self.queued.append((batch, ticket))

    def resolve(self, ticket: Ticket) -> None:
        """Resolve a part of any ticket, which may be one of these."""
        self._checkpoint.resolve(ticket)
        if not ticket.parts:
            self._unfinished.discard(ticket)


class Continuity:
    """Compares what a Redis says that it has had with what was applied.

    Args:
        kept: what the stream keeps.
        gap_sweeps: sweeps where continuity is broken.
        record: knows what was written into the watermark.
        recent: remembers what was applied.
        standbys: the standbys that busts wait for.
    """

    def __init__(
        self,
        kept: Kept,
        gap_sweeps: GapSweeps,
        record: WatermarkRecord,
        *,
        recent: Recent,
        standbys: Standbys,
    ) -> None:
        self._position = kept.position
        self._digests = kept.digests
        self._gap_sweeps = gap_sweeps
        self._record = record
        self._recent = recent
        self._standbys = standbys
        # Applied before, and lost by a Redis that came back older.
        self._lost: deque[Batch | PlainBatch] = deque()
        # What was committed before this LSN had been busted by an earlier run.
        self.replay_until = 0
        recent.begin((kept.position.system_id, kept.position.timeline), kept.position.start)

    @property
    def proven(self) -> bool:
        """Whether this Redis has had all busts up to the position."""
        return not self._gap_sweeps.unfinished and not self._lost

    @property
    def must_reapply(self) -> bool:
        """Whether Redis lacks something that can be re-applied."""
        return bool(self._lost)

    def prove(self, found: Sequence[Watermark | None]) -> None:
        """Compare the watermarks of a Redis; have what it lacks re-applied or swept.

        Raises:
            errors.Superseded: another daemon has written there since.
        """
        position = self._position
        if self._record.lsn is not None:
            # The stream has been going: this Redis must have had what was recorded, and can't have had more than
            # what was received.
            received = self._gap_sweeps.received
            position = replace(position, start=self._record.lsn, flushed=received, new_slot=False)
        broken: dict[str, str] = {}
        lowest = lsn.NEVER
        for watermark in found:
            broken |= self._broken(watermark, position)
            lowest = min(lowest, watermark.lsn if watermark else 0)
        if self._record.lsn is None:
            self.replay_until = lowest
        self._record.found(found)
        self._lost.clear()
        # Where all is swept anyway, nothing need be re-applied.
        if not (self._gap_sweeps.enabled and broken.keys() >= self._digests.keys()):
            self._lost.extend(self._recent.since(lowest))
        if self._lost and lowest < position.start:
            caches = sorted({target.cache.name for batch in self._lost for target in batch.targets})
            self._gap_sweeps.log("redis_behind", caches, lowest, swept=False)
        if broken:
            self._gap_sweeps.report(broken)

    def _broken(self, watermark: Watermark | None, position: Position) -> dict[str, str]:
        recorded = self._record.lsn is not None
        if watermark is None:
            self._standbys.recall(None)
        else:
            if recorded and (watermark.lsn > position.flushed or not self._record.is_ours(watermark)):
                raise errors.Superseded
            if self._standbys.recall(watermark.standbys):
                return dict.fromkeys(self._digests, "standby_removed")
            if self._recent.reaches(watermark.lsn):
                position = replace(position, start=min(position.start, watermark.lsn))
            elif recorded:
                # What was acknowledged after the watermark may be lost as well.
                position = replace(position, start=max(position.start, watermark.lsn + 1))
        return gaps(watermark, position, self._digests)

    def next_to_reapply(self, weight: int) -> list[Batch | PlainBatch]:
        """Return a part of what Redis has lost, about so many keys; `reapplied` when it has been applied."""
        some, total = [], 0
        for batch in self._lost:
            some.append(batch)
            total += batch.weight
            if total >= weight:
                break
        return some

    def reapplied(self, some: Iterable[Batch | PlainBatch]) -> None:
        """Note that the next of what Redis has lost is applied; sweep what was swept then."""
        for batch in some:
            self._lost.popleft()
            swept = {target.cache for target, busts in batch.busts.items() if busts.sweep}
            self._gap_sweeps.sweep("redis_behind", swept)

    def redigest(self, digests: Mapping[str, str]) -> None:
        """Take other digests of the rules."""
        self._digests = digests

    def all_broken(self, reason: str) -> None:
        """Sweep all caches that the stream keeps."""
        self._gap_sweeps.report(dict.fromkeys(self._digests, reason))

    def recorded(self) -> None:
        """Note that the watermark has been written."""
        if self._record.lsn is not None:
            self._recent.recorded(self._record.lsn)

    def watermark(self, position: int, at: int, as_of: int) -> Watermark:
        """Return what can be said of this Redis; see `WatermarkRecord.write`."""
        return Watermark(
            lsn=position,
            at=at,
            system_id=self._position.system_id,
            timeline=self._position.timeline,
            rules=self._digests,
            standbys=self._standbys.known,
            as_of=as_of,
        )
