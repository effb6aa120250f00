"""Continuity: is this Redis the one that has had all busts, and what does it lack if not?

After a restart or failover, Redis may have lost writes that it acknowledged. So at each connection its watermark is
compared with what was applied.

The rule that holds here: what a Redis lacks is re-applied from `Recent`, and until that is done, no watermark says that
this Redis has had anything; or the caches are swept, and no watermark names them until their gap is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cdc_invalidator import errors, lsn
from cdc_invalidator.pipeline.batch import Batch, PlainBatch
from cdc_invalidator.pipeline.gaps import Gaps
from cdc_invalidator.pipeline.lineage import Lineage
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.record import WatermarkRecord
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.watermark import Position, Watermark, gaps
from cdc_invalidator.rules.agreement import Agreement
from cdc_invalidator.rules.model import RuleSet


@dataclass(frozen=True, slots=True)
class Kept:
    """What a stream keeps up to date, and where it goes on.

    ``digests``: for each cache that the stream keeps, what the watermark says of its rules. ``recent``: what was
    applied lately. ``agreement``: what readers are told.
    """

    rules: RuleSet
    digests: Mapping[str, str]
    position: Position
    recent: Recent
    agreement: Agreement | None = None


class Continuity:
    """Compares what a Redis says that it has had with what was applied.

    Args:
        kept: what the stream keeps.
        open_gaps: is told where continuity is broken.
        record: knows what was written into the watermark.
        received: gives the end of what PostgreSQL had written at the start, or has sent since.
        standbys: the standbys that busts wait for.
        lineage: knows whether the stream is of the history that the watermark speaks of.
    """

    def __init__(
        self,
        kept: Kept,
        open_gaps: Gaps,
        record: WatermarkRecord,
        *,
        received: Callable[[], int],
        standbys: Standbys,
        lineage: Lineage,
    ) -> None:
        self._position = kept.position
        self._digests = kept.digests
        self._agreement = kept.agreement
        self._gaps = open_gaps
        self._record = record
        self._received = received
        self._recent = kept.recent
        self._standbys = standbys
        self._lineage = lineage
        self._compared = False
        # Applied before, and lost by a Redis that came back older.
        self._lost: deque[Batch | PlainBatch] = deque()
        # What was committed before this LSN had been busted by an earlier run.
        self.replay_until = 0
        self._recent.begin((kept.position.system_id, kept.position.timeline), kept.position.start)

    @property
    def proven(self) -> bool:
        """Whether this Redis has had all busts up to the position, but for the caches with a gap."""
        return not self._lost and self._lineage.proven

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
            received = self._received()
            position = replace(position, start=self._record.lsn, flushed=received, new_slot=False)
        broken: dict[str, str] = {}
        lowest = lsn.NEVER
        for watermark in found:
            broken |= self._broken(watermark, position)
            lowest = min(lowest, watermark.lsn if watermark else 0)
        if self._record.lsn is None:
            self.replay_until = lowest
        if not self._compared and not broken.keys() >= self._digests.keys():
            self._lineage.expect(found, position.start)
        self._compared = True
        self._record.found(found)
        self._gaps.rewrite()
        self._lost.clear()
        # Where all is swept anyway, nothing need be re-applied.
        if not (self._gaps.enabled and broken.keys() >= self._digests.keys()):
            self._lost.extend(self._recent.since(lowest))
            # What still runs begins again, and holds the position back.
            swept = {
                target.cache.name
                for batch in self._lost
                for target, busts in batch.busts.items()
                if (busts.sweep or busts.prefixes(target)) and (busts.asked is None or busts.asked.over)
            }
            self._gaps.sweep(dict.fromkeys(swept, "redis_behind"))
        if self._lost and lowest < position.start:
            caches = sorted({target.cache.name for batch in self._lost for target in batch.targets})
            self._gaps.log("redis_behind", caches, lowest, swept=False)
        self._gaps.report(broken)

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
        """Note that the next of what Redis has lost is applied."""
        for _ in some:
            self._lost.popleft()

    def redigest(self, digests: Mapping[str, str], agreement: Agreement | None) -> None:
        """Take other digests of the rules and their tables, and what readers are told from now on."""
        self._digests, self._agreement = digests, agreement
        self._gaps.rewrite()

    def all_broken(self, reason: str) -> None:
        """Sweep all caches that the stream keeps."""
        self._gaps.report(dict.fromkeys(self._digests, reason))

    def recorded(self) -> None:
        """Note that the watermark has been written."""
        if self._record.lsn is not None:
            self._recent.recorded(self._record.lsn)

    def watermark(self, position: int, at: int, as_of: int) -> Watermark:
        """Return what can be said of this Redis; see `WatermarkRecord.write`."""
        reasons = self._gaps.reasons
        return Watermark(
            lsn=position,
            at=at,
            system_id=self._position.system_id,
            timeline=self._position.timeline,
            rules={name: digest for name, digest in self._digests.items() if name not in reasons},
            standbys=self._standbys.known,
            as_of=as_of,
            crash_free_since=self._position.crash_free_since,
            last_commit=str(self._lineage.last or ""),
            gaps=reasons,
            agreement=self._agreement,
        )
