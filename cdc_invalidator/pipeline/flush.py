"""A flush: one round trip to Redis, and the bust events of its answer.

The rule that holds here: an event is logged only after Redis has acknowledged its bust, and no position is confirmed
while such an event is not handed to the kernel; after a crash, what was confirmed would not be sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from cdc_invalidator import errors, lsn
from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.messages import Messages
from cdc_invalidator.pipeline.record import WatermarkRecord
from cdc_invalidator.redis.server import BustReply, CacheServer
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.packed import Pair


class Flush:
    """Busts batches, and logs what came of it while the next flush is on its way.

    Args:
        events: where busts are logged.
        record: lets a position be confirmed.
        rules: the rule set.
        denied: is called with the caches whose busts lack a right, each with the error.
    """

    def __init__(
        self,
        events: Events,
        record: WatermarkRecord,
        rules: RuleSet,
        *,
        denied: Callable[[Mapping[str, errors.RedisUnavailable]], None],
    ) -> None:
        self._events = events
        self._record = record
        self._denied = denied
        self._messages = Messages(rules.kept.values())
        self._keeps_stale = any(cache.stale_for for cache in rules.caches.values())
        # Acknowledged by Redis at that time (Unix, in µs), and not logged yet.
        self._unlogged: deque[tuple[list[BustEvent], BustReply, int, int]] = deque()

    async def bust(
        self,
        server: CacheServer,
        batches: Iterable[Batch | PlainBatch],
        choose: Callable[[Sequence[BustEvent], Sequence[Sequence[bytes]]], Sequence[bytes]] | None = None,
        *,
        named: bool = False,
    ) -> tuple[list[BustEvent], BustReply]:
        """Bust all keys of some batches.

        Args:
            server: where to.
            batches: what to bust.
            choose: given the events, and the keys of each that deletes, returns those of the keys whose fingerprints
                are wanted, as they are just before.
            named: the keys of caches with `bump_over` are under their versions already.

        Returns:
            Their events, and what Redis answered; for `log_later`. What lacks a right is in neither.

        Raises:
            errors.RedisUnavailable: not all may be busted.
        """
        events = [event for batch in batches for event in batch.events()]
        pairs = [event for event in events if event.target.pairs and event.action == "delete"]
        if pairs and not named:
            events = await _name_versions(server, events, pairs)
        deletes = [event.keys for event in events if event.action == "delete"]
        bumps = {
            key: event.target.cache.version_ttl for event in events if event.action == "bump" for key in event.keys
        }
        graces: dict[bytes, int] = {}
        for event in events if self._keeps_stale else ():
            if event.target.cache.stale_for is not None:
                graces |= dict.fromkeys(event.keys, event.target.cache.stale_for)
        looks = choose(events, deletes) if choose is not None else ()
        busting = asyncio.create_task(server.bust(deletes, bumps, graces, looks), name="bust")
        try:
            # Once it is on its way, there is time to log the one before.
            await asyncio.sleep(0)
            self.log_due()
            reply = await busting
        finally:
            # Where this was cancelled; nobody would await it.
            busting.cancel()
        if reply.denied:
            events, reply = self._without_denied(events, reply)
        if self._messages:
            await self._publish(server, events)
        return events, reply

    async def _publish(self, server: CacheServer, events: Iterable[BustEvent]) -> None:
        """Tell others what was busted; a cache of which they may not be told waits, as one whose busts are denied."""
        messages = self._messages.of_events(events)
        denied = await server.publish([(message.channel, message.payload) for message in messages])
        for message in messages:
            if message.channel not in denied:
                self._events.published(message.cache)
        if denied:
            self._denied({message.cache: denied[message.channel] for message in messages if message.channel in denied})

    def _without_denied(self, events: Iterable[BustEvent], reply: BustReply) -> tuple[list[BustEvent], BustReply]:
        """Report the caches whose busts lack a right, and leave out what was not busted."""
        denied: dict[str, errors.RedisUnavailable] = {}
        left, existed = [], []
        groups = enumerate(reply.existed)
        for event in events:
            if event.action == "delete":
                number, count = next(groups)
                error = reply.denied.get(number)
                if error is None:
                    left.append(event)
                    existed.append(count)
            else:
                error = next((reply.denied[key] for key in event.keys if key in reply.denied), None)
                keys = [key for key in event.keys if key not in reply.denied] if error else event.keys
                left += [event._replace(keys=keys)] if keys else []
            if error is not None:
                denied[event.target.cache.name] = error
        self._denied(denied)
        return left, BustReply(existed, reply.versions)

    def log_later(self, events: list[BustEvent], reply: BustReply, replay_until: int = lsn.NEVER) -> None:
        """Have events logged when there is time.

        Args:
            events: what was busted.
            reply: what Redis answered.
            replay_until: what was committed before this LSN had been busted before; by default, all.
        """
        self._unlogged.append((events, reply, replay_until, time.time_ns() // 1000))

    def log_derived(
        self, events: Iterable[BustEvent], reply: BustReply, visible: Container[int], replay_until: int
    ) -> None:
        """Have those events logged that a query gave only now, because their transaction was not visible before.

        Args:
            events: what was busted.
            reply: what Redis answered.
            visible: the commit LSNs of these transactions.
            replay_until: see `log_later`.
        """
        existed = iter(reply.existed)
        derived, counts = [], []
        for event in events:
            count = next(existed) if event.action == "delete" else None
            if event.target.query is not None and event.commit_lsn in visible:
                derived.append(event)
                counts += [] if count is None else [count]
        if derived:
            self.log_later(derived, BustReply(counts, reply.versions), replay_until)

    def log_due(self) -> None:
        """Log what has been acknowledged; what the watermark covers may be confirmed then."""
        while self._unlogged:
            self._events.busted(*self._unlogged.popleft())
        self._record.confirm(self._events.mark)

    def confirm(self) -> None:
        """Let what the watermark covers be confirmed, if all of it is logged."""
        if not self._unlogged:
            self._record.confirm(self._events.mark)


async def _name_versions(
    server: CacheServer, events: Iterable[BustEvent], pairs: Iterable[BustEvent]
) -> list[BustEvent]:
    """Name the keys under the versions that caches with `bump_over` have now; what has no version has no key.

    A version that is bumped in between makes those keys unreachable, which serves as well. So one that may not be read
    is bumped.

    Args:
        server: knows the versions.
        events: all of a flush.
        pairs: those among them whose keys are to be named.
    """
    split = {id(event): [Pair.split(key) for key in event.keys] for event in pairs}
    counters = list(dict.fromkeys(pair.version for found in split.values() for pair in found))
    versions = dict(zip(counters, await server.versions(counters), strict=True))
    named = []
    for event in events:
        found = split.get(id(event))
        if found is None:
            named.append(event)
            continue
        known = [(pair, versions[pair.version]) for pair in found]
        keys = [pair.key(version) for pair, version in known if isinstance(version, bytes)]
        unread = [pair.version for pair, version in known if isinstance(version, errors.RedisUnavailable)]
        named += [event._replace(keys=keys)] if keys else []
        named += [event._replace(action="bump", keys=list(dict.fromkeys(unread)))] if unread else []
    return named
