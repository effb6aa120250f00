"""What follows a bust: the sweeps that it asks for, and the busts that are applied again.

The rule that holds here: a batch's ticket stays unresolved until everything that follows its bust is done in Redis.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from cdc_invalidator import errors
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.again import Again, Waiting
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.flush import Flush
from cdc_invalidator.pipeline.sweep import Cause, Request, Sweeps
from cdc_invalidator.postgres.snapshot import Horizon
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.rules.model import RuleSet

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PostgresView:
    """What PostgreSQL is asked between two busts.

    ``hidden``: which of some committed transactions readers can't see yet; ``queries``: what `via` asks; ``standbys``:
    those that busts wait for; ``horizon`` and ``reached``: as of `Snapshots`.
    """

    hidden: Callable[[Iterable[int]], Awaitable[set[int]]]
    queries: Queries
    standbys: Standbys
    horizon: Callable[[], Awaitable[Horizon]]
    reached: Callable[[], Awaitable[int]]


class FollowUps:
    """The sweeps and the busts that are due again.

    Args:
        postgres: says what readers see.
        flush: busts.
        sweeps: those that run.
        rules: the rule set.
        resolve: ends a part of a ticket.
        grown: is told of batches that may have got more keys.
        denied: is called with the caches whose sweeps lack a right, each with the error.
        events: where sweeps are logged.
        metrics: what to count.
    """

    def __init__(
        self,
        postgres: PostgresView,
        flush: Flush,
        sweeps: Sweeps,
        *,
        rules: RuleSet,
        resolve: Callable[[Ticket], None],
        grown: Callable[[Batch], None],
        denied: Callable[[Mapping[str, errors.RedisUnavailable]], None],
        events: Events,
        metrics: Metrics,
    ) -> None:
        self._postgres = postgres
        self._flush = flush
        self.sweeps = sweeps
        self._resolve = resolve
        self._grown = grown
        self._denied = denied
        self._events = events
        self._metrics = metrics
        self._again = Again(resolve)
        self._asks_again = any(cache.again_after for cache in rules.caches.values())
        # In the hands of this turn until Redis has acknowledged them.
        self._due: list[tuple[str, Waiting]] = []
        self._early_backoff = Backoff(first=0.002, most=0.1)

    def begin(self, batch: Batch, ticket: Ticket, bust: str, now: float) -> None:
        """Begin what follows a bust.

        Args:
            batch: what was busted.
            ticket: its ticket.
            bust: which one it was: first, or why it was done again; gap: nothing but its sweeps follows.
            now: the time.
        """
        self._request_sweeps(batch, ticket, bust)
        if bust in {"first", "visible"} and self._postgres.standbys.awaited:
            self._again.until_replayed(batch, ticket, now)
        if bust not in {"again_after", "gap"} and self._asks_again:
            self._again.until_later(batch, ticket, now)

    def until_visible(self, batch: Batch, ticket: Ticket, now: float) -> None:
        """Bust a batch again when readers see its transaction, and begin what follows then."""
        self._again.until_visible(batch, ticket, now)

    async def bust_again(self, server: CacheServer, replay_until: int, gap: tuple[float, int] | None = None) -> None:
        """Bust what is due again.

        Args:
            server: where to.
            replay_until: see `Flush.log_later`.
            gap: what a gap waits for, as of `Gaps.unreplayed`.

        Raises:
            errors.RedisUnavailable: it stays due.
        """
        if not self._due:
            if self._again:
                hidden = await self._postgres.hidden(self._again.hidden) if self._again.hidden else set()
                replayed = self._postgres.standbys.replayed
                self._due = list(self._again.ready(hidden.__contains__, replayed, time.monotonic()))
            self._ask_standbys(gap)
        if not self._due:
            return
        self._early_backoff.reset()
        batches = [waiting.batch for _, waiting in self._due]
        await self._postgres.queries.derive((reason, each.batch, each.ticket) for reason, each in self._due)
        for batch in batches:
            self._grown(batch)
        events, reply = await self._flush.bust(server, batches)
        visible = {each.batch.commit_lsn for reason, each in self._due if reason == "visible"}
        self._flush.log_derived(events, reply, visible, replay_until)
        now = time.monotonic()
        for reason, waiting in self._due:
            self._metrics.again.labels(reason).inc()
            self.begin(waiting.batch, waiting.ticket, reason, now)
            self._resolve(waiting.ticket)
        self._due = []

    def _ask_standbys(self, gap: tuple[float, int] | None) -> None:
        """Have the standbys asked while anything waits for them, and drop those that it waits for too long."""
        standbys, waits = self._postgres.standbys, self._again.unreplayed
        if waits is None and gap is None:
            standbys.rest()
            return
        standbys.want()
        if waits is not None:
            standbys.overdue(waits.since, waits.due)
        if gap is not None:
            standbys.overdue(*gap)

    async def sweep(self, server: CacheServer) -> None:
        """Take one step of each sweep, and of the search, that runs.

        Raises:
            errors.RedisUnavailable: they begin again on the next connection.
        """
        if not self.sweeps:
            return
        over, denied = await self.sweeps.step(server)
        for each in over:
            self._events.swept(each)
        if denied:
            # Now they are gaps, which hold no position back.
            self._denied({asked.cache.name: error for asked, error in denied})
        for asked in (*(asked for each in over for asked in each.asked.values()), *(asked for asked, _ in denied)):
            for ticket in asked.tickets:
                self._resolve(ticket)
        self.sweeps.show()

    def hurry(self, *, much_wal: bool) -> None:
        """Note whether PostgreSQL keeps more WAL than it may; if so, hold the position back only where it must be."""
        if much_wal and self._again.unreplayed is not None:
            reason = "the slot holds more than CDC_MAX_RETAINED_WAL"
            self._postgres.standbys.relent(self._again.unreplayed.due, reason)
        if much_wal and self.sweeps and not self.sweeps.hurry:
            _log.warning("sweeps_hurry", error="The slot holds more than CDC_MAX_RETAINED_WAL; CDC_SWEEP_RATE is left.")
        self.sweeps.hurry = much_wal

    def let_go(self) -> set[str]:
        """Let the position move on, whatever holds it back here; return the caches for which that is a gap."""
        return self._again.let_go() | self.sweeps.let_go(self._resolve)

    def patience(self, patience: float, now: float) -> float:
        """Return after how many seconds there is something to do here, at most ``patience``."""
        if self._again.hidden:
            patience = min(patience, self._early_backoff.next())
        due = self._again.next_due()
        return patience if due is None else min(patience, due - now)

    def _request_sweeps(self, batch: Batch, ticket: Ticket, bust: str) -> None:
        asked = False
        for target, busts in batch.busts.items():
            prefixes = busts.prefixes(target)
            if busts.sweep or prefixes:
                ticket.parts += 1
                cause = Cause(target.rule, target.table, ",".join(busts.ops), busts.reason_beyond_keys)
                request = Request(batch.commit_lsn, batch.xid or None, batch.committed_at, prefixes=prefixes, bust=bust)
                busts.asked = self.sweeps.request(target.cache, cause, request, [ticket])
                asked = True
        if asked:
            self.sweeps.show()
