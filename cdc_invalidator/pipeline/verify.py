"""Verification: of a sample of busts, is what comes back the new content, or the old?

A reader without the fill contract may load a row before a commit, and store it after the bust. Nothing shows that to
the daemon, but the content that comes back is then the one that was deleted. So of a sample of deletes Redis makes a
fingerprint just before, and another one a grace later. The same content again has two causes: a fill that the bust
overtook, or a value that does not depend on this change. To tell them apart, the key is busted once more: the old row
can't be loaded any more, so other content is the proof that the first fill was stale.

The grace begins when all is done that follows the bust, such as `again_after`. If the key is busted for another change
while the proof is awaited, that explains the other content, and the sample is left.

Versions that are bumped are not sampled: a fill that such a bust overtakes is stored under the old version, which
nobody reads any more.

The rule that holds here: nothing waits for a sample, no position and no bust; what is lost with a connection is
forgotten. Samples are bounded by `MOST`, and so is what they cost.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice, takewhile
from typing import Any

import structlog

from cdc_invalidator import errors
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.inspection import Bust
from cdc_invalidator.redis.fingerprint import ABSENT, LARGE, Look
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.rules.model import RuleSet

_log = structlog.get_logger()

# Samples that may be under way, and the bytes of their keys. While there are so many, no others are taken.
MOST = 2000
MOST_BYTES = 1 << 20
# How often it is looked whether any are due, and how many are looked at then; no more are taken in that time. So it
# costs little at any speed, and no other client of Redis waits for long.
STEP_SECONDS = 0.2
STEP = 50
# Beyond so many events in a flush, all proofs that are awaited are left: to look for their keys would cost too much.
MANY_EVENTS = 1000
# For how much of the grace a verdict of `overtaken` waits for a later change that would explain the other content.
SETTLE = 0.2


class Stage(Enum):
    """How far a sample is."""

    FOLLOWED = "something still follows its bust"
    FILLED = "the key is being filled again"
    PROVEN = "the same came back, and was busted once more"
    SETTLED = "then something else came back"


@dataclass(slots=True, eq=False)
class Sample:
    """One key of a bust, with what it held then; ``due``: when to look again, of the monotonic clock."""

    event: BustEvent
    key: bytes
    content: bytes
    ticket: Ticket | None
    stage: Stage = Stage.FILLED
    due: float = 0.0


class Verify:
    """The samples that are under way, and what has come of the others; see `Inspection`.

    Args:
        share: how many of the bust events that delete are sampled, with their keys; 0 to 1.
        grace: after how many seconds it is looked at what came back.
        metrics: what to count.
        events: where fills that were overtaken are logged.
        seed: of the choice; by default another one each time.
    """

    name = "verify"

    def __init__(
        self, share: float, grace: float, *, metrics: Metrics, events: Events, seed: int | None = None
    ) -> None:
        self._share = share
        self._grace = grace
        self._metrics = metrics
        self._events = events
        self._random = random.Random(seed)  # noqa: S311  a sample is no secret
        # How many events are passed over until the next one is taken.
        self._skip = self._next_skip()
        # How many more may be taken, and until when.
        self._left, self._left_until = 0, 0.0
        self._chosen: list[tuple[BustEvent, bytes]] = []
        self._watched: dict[bytes, Sample] = {}
        self._bytes = 0
        # By stage, in the order in which they are due.
        self._waiting: dict[Stage, dict[Sample, None]] = {stage: {} for stage in Stage}
        self._step_at = 0.0
        self._refused: str | None = None
        self._told: str | None = None
        self._results: dict[str, Counter[str]] = {}

    def connected(self) -> None:
        """Leave all samples: what was busted last is not known for sure."""
        self._chosen = []
        self._watched.clear()
        self._bytes = 0
        for queue in self._waiting.values():
            queue.clear()
        self._refused = None

    def status(self) -> dict[str, Any]:
        """Return what /status shows: the results by cache, and why nothing is sampled."""
        return {
            "sample": self._share,
            "results": {cache: dict(found) for cache, found in sorted(self._results.items())},
            "error": self._refused,
        }

    def show(self, rules: RuleSet) -> None:
        """Show all caches, if any are sampled."""
        for cache in rules.kept if self._share else ():
            for result in ("overtaken", "unaffected", "refilled", "empty"):
                self._metrics.verified.labels(cache, result)

    # Taken.

    def choose(self, events: Sequence[BustEvent], deletes: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Choose samples, and leave those under way that the busts make worthless."""
        self._supersede(deletes)
        self._chosen = []
        places = []
        # Whole events, since to count their keys would cost more than all else here.
        while self._skip < len(deletes):
            places.append(self._skip)
            self._skip += 1 + self._next_skip()
        self._skip -= len(deletes)
        room = self._room() if places and self._refused is None else 0
        if not room:
            return []
        whole = len(deletes) == len(events)
        deleting = events if whole else [event for event in events if event.action == "delete"]
        for place in places[:room]:
            event = deleting[place]
            self._chosen += [(event, key) for key in islice(event.keys, room - len(self._chosen))]
        self._left -= len(self._chosen)
        return [key for _, key in self._chosen]

    def _room(self) -> int:
        """Return how many samples may be taken now."""
        now = time.monotonic()
        if now >= self._left_until:
            self._left, self._left_until = STEP, now + STEP_SECONDS
        return max(0, min(self._left, MOST - len(self._watched))) if self._bytes < MOST_BYTES else 0

    def _supersede(self, deletes: Sequence[Sequence[bytes]]) -> None:
        """Leave the samples for which another change explains what comes next."""
        proven = self._waiting[Stage.PROVEN] | self._waiting[Stage.SETTLED]
        if proven:
            keys = {sample.key: sample for sample in proven}
            busted = keys.keys() if len(deletes) > MANY_EVENTS else keys.keys() & chain.from_iterable(deletes)
            for key in busted:
                self._end(keys[key], "superseded")

    def _next_skip(self) -> int:
        if self._share in {0, 1}:
            return 0 if self._share else sys.maxsize
        return int(math.log(1 - self._random.random()) / math.log(1 - self._share))

    def begin(self, looks: Sequence[Look], taken: Iterable[tuple[Batch | PlainBatch, Ticket]], now: float) -> None:
        """Begin with what was there."""
        chosen, self._chosen = self._chosen, []
        tickets = (
            {batch.commit_lsn: ticket for batch, ticket in taken if not isinstance(batch, PlainBatch)} if chosen else {}
        )
        for (event, key), look in zip(chosen, looks, strict=False):
            if isinstance(look, errors.RedisUnavailable):
                self._refuse(look)
                return
            if look == LARGE:
                self._count(event, "too_large")
            elif look != ABSENT and key not in self._watched:
                sample = Sample(event._replace(keys=[key]), key, look, tickets.get(event.commit_lsn))
                self._watched[key] = sample
                self._bytes += len(key)
                if sample.ticket is not None and sample.ticket.parts:
                    self._wait(sample, Stage.FOLLOWED, now)
                else:
                    self._wait(sample, Stage.FILLED, now + self._grace)

    def swept(self, caches: Iterable[str]) -> None:
        """Leave the samples that this makes worthless."""
        proven = [*self._waiting[Stage.PROVEN], *self._waiting[Stage.SETTLED]]
        names = set(caches) if proven else ()
        for sample in proven:
            if sample.event.target.cache.name in names:
                self._end(sample, "superseded")

    def _refuse(self, error: errors.RedisUnavailable) -> None:
        self._refused = str(error)
        # Not once more on each connection.
        if self._told != self._refused:
            self._told = self._refused
            _log.warning("verify_refused", error=self._told)

    # Looked at again.

    def due_in(self, now: float) -> float | None:
        """See `Inspection`."""
        return max(0.0, self._step_at - now) if self._watched else None

    async def step(self, server: CacheServer, bust: Bust) -> None:
        """Look at what is due, and bust what has come back the same."""
        now = time.monotonic()
        if not self._watched or now < self._step_at:
            return
        self._step_at = now + STEP_SECONDS
        self._release(now)
        for sample in self._take(Stage.SETTLED, now):
            self._events.overtaken(sample.event)
            self._end(sample, "overtaken")
        due = [*self._take(Stage.FILLED, now), *self._take(Stage.PROVEN, now)]
        if not due:
            return
        suspects = []
        for sample, look in zip(due, await server.fingerprints([each.key for each in due]), strict=True):
            if isinstance(look, errors.RedisUnavailable):
                self._refuse(look)
                self._end(sample, "undecided")
            elif look == sample.content and sample.stage is Stage.FILLED:
                suspects.append(sample)
            elif sample.stage is Stage.PROVEN and look not in {ABSENT, sample.content}:
                self._wait(sample, Stage.SETTLED, now + SETTLE * self._grace)
            else:
                self._end(sample, _verdict(sample, look))
        if suspects:
            await bust(server, [PlainBatch([_once_more(each) for each in suspects], (), 0)])
            for sample in suspects:
                self._wait(sample, Stage.PROVEN, time.monotonic() + self._grace)

    def _release(self, now: float) -> None:
        """Begin the grace of those whose busts are followed by nothing more."""
        followed = self._waiting[Stage.FOLLOWED]
        for sample in [each for each in followed if each.ticket is None or not each.ticket.parts]:
            del followed[sample]
            self._wait(sample, Stage.FILLED, now + self._grace)

    def _take(self, stage: Stage, now: float) -> list[Sample]:
        queue = self._waiting[stage]
        taken = list(takewhile(lambda sample: sample.due <= now, islice(queue, STEP)))
        for sample in taken:
            del queue[sample]
        return taken

    def _wait(self, sample: Sample, stage: Stage, due: float) -> None:
        sample.stage, sample.due = stage, due
        self._waiting[stage][sample] = None

    def _end(self, sample: Sample, result: str) -> None:
        self._waiting[sample.stage].pop(sample, None)
        del self._watched[sample.key]
        self._bytes -= len(sample.key)
        self._count(sample.event, result)

    def _count(self, event: BustEvent, result: str) -> None:
        name = event.target.cache.name
        self._metrics.verified.labels(name, result).inc()
        self._results.setdefault(name, Counter())[result] += 1


def _verdict(sample: Sample, look: bytes) -> str:
    """Return what an entry proves that was looked at for the last time."""
    if sample.stage is Stage.PROVEN:
        return "undecided" if look == ABSENT else "unaffected"
    return "empty" if look == ABSENT else "refilled"


def _once_more(sample: Sample) -> BustEvent:
    # Its own time, not that of the commit: it would count as a late bust.
    return sample.event._replace(reason="verify", committed_at=None)
