"""Gaps: the caches that may lack busts, and how each comes back into the watermark. Pure.

The steps of a gap: the watermark no longer names the cache; the gap is logged, and the cache is swept; all transactions
of that time are over; the cache is swept again; the watermark names it again.

Why it is swept twice: a transaction that is in flight at the first sweep may commit later without being in the stream
with all its changes. A reader that comes in between caches what that commit replaces. Prepared transactions are in
flight, and so are commits that wait for a synchronous standby.

The rule that holds here: a gap is in the watermark, not only in memory. A cache that the watermark does not name is
swept by the next daemon. So a gap holds neither the position nor any WAL back, however long it lasts.

A cache whose busts or sweep Redis denies, because a right is missing, has a gap as well. Its sweep is tried again after
a growing pause, and while it is denied the gap begins again each time; the other caches go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.postgres.snapshot import Horizon
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.trouble import Trouble

_log = structlog.get_logger()

# How often it is asked whether transactions are over.
FIRST_SECONDS = 0.005
MOST_SECONDS = 0.5
# A gap that waits so long for them is logged.
LONG_SECONDS = 10.0
# The pauses between two sweeps that Redis denies. Within CALM_SECONDS after a sweep was granted they go on growing.
FIRST_PAUSE_SECONDS = 0.5
MOST_PAUSE_SECONDS = 30.0
CALM_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class Gap:
    """One cache's gap; times are of the monotonic clock.

    ``silent``: it is not logged. ``horizon``: looked at before the first sweep; ``None`` until then. ``over_at``: when
    all transactions of that time were over, and ``reached``: the end of the WAL then. ``last_sweep``: the sweep that
    ends the gap, once it is asked for.
    """

    cache: Cache
    reason: str
    silent: bool
    horizon: Horizon | None = None
    began_at: float = 0.0
    over_at: float | None = None
    reached: int = 0
    last_sweep: GapTicket | None = None
    waits_long: bool = False

    @property
    def settling(self) -> bool:
        """Whether it waits for transactions, or for what must follow them."""
        return self.horizon is not None and self.last_sweep is None


@dataclass(slots=True, eq=False)
class GapTicket(Ticket):
    """A sweep of a gap. The checkpoint does not know it."""

    gap: Gap | None = None


@dataclass(slots=True)
class Denial:
    """That Redis denies the busts or the sweep of a cache; times are of the monotonic clock.

    ``trouble``: why, and since when; ``retry_at``: when the gap's sweep is tried again; ``granted_at``: when one was
    over; ``None`` while it is denied.
    """

    trouble: Trouble
    retry_at: float
    granted_at: float | None = None
    backoff: Backoff = field(default_factory=lambda: Backoff(first=FIRST_PAUSE_SECONDS, most=MOST_PAUSE_SECONDS))


class Gaps:
    """The gaps that are not over.

    Args:
        rules: the caches.
        events: where gaps are logged.
        metrics: what to count.
        standbys: the standbys that busts wait for.
        since: the LSN that gaps are logged with.
        received: gives the end of what PostgreSQL had written at the start, or has sent since.
        enabled: False to only log gaps (``CDC_ON_GAP=warn``).
    """

    def __init__(
        self,
        rules: RuleSet,
        events: Events,
        metrics: Metrics,
        standbys: Standbys,
        *,
        since: int,
        received: Callable[[], int],
        enabled: bool,
    ) -> None:
        self._rules = rules
        self._events = events
        self._metrics = metrics
        self._standbys = standbys
        self._since = since
        self._received = received
        self.enabled = enabled
        self._open: dict[str, Gap] = {}
        self._denials: dict[str, Denial] = {}
        for name in rules.kept:
            metrics.cache_denied.labels(name).set(0)
        self._sweeps: set[GapTicket] = set()
        self._queued: list[tuple[Batch, Ticket]] = []
        # The caches that the watermark leaves out because of a gap; None if it must be written whatever it says.
        self._left_out: frozenset[str] | None = None
        self._backoff = Backoff(first=FIRST_SECONDS, most=MOST_SECONDS)
        self._ask_at = 0.0

    # Found.

    def report(self, broken: Mapping[str, str]) -> None:
        """Begin gaps of caches whose changes may have been missed; ``broken`` is from a cache's name to the reason."""
        if self.enabled:
            self._begin(broken, silent=False)
        else:
            self._tell(broken)

    def sweep(self, broken: Mapping[str, str]) -> None:
        """Begin gaps without logging them, and also where gaps are only logged."""
        self._begin(broken, silent=True)

    def deny(self, denied: Mapping[str, errors.RedisUnavailable], now: float) -> None:
        """Begin gaps of caches whose busts or sweep lack a right; gaps that are open begin again after a pause.

        Args:
            denied: from a cache's name to the error.
            now: the time.
        """
        new: dict[str, list[str]] = {}
        for name, error in denied.items():
            self._metrics.redis_errors.labels(error.code).inc()
            denial, gap = self._denials.get(name), self._open.get(name)
            if denial is not None and denial.granted_at is None and gap is not None and gap.horizon is None:
                continue  # in its pause already
            if denial is None or denial.granted_at is not None:
                new.setdefault(str(error), []).append(name)
            if denial is None or (denial.granted_at is not None and now - denial.granted_at > CALM_SECONDS):
                self._denials[name] = Denial(Trouble.now(str(error)), retry_at=now)
            else:
                goes_on = denial.trouble if denial.granted_at is None else None
                denial.trouble, denial.granted_at = Trouble.now(str(error), goes_on), None
                denial.retry_at = now + denial.backoff.next()
            self._metrics.cache_denied.labels(name).set(1)
            # What has been withdrawn and logged stays so.
            told = gap is not None and (gap.silent or gap.horizon is not None)
            reason = gap.reason if gap is not None else "denied"
            self._open[name] = Gap(self._rules.caches[name], reason, silent=told or not self.enabled)
        self._metrics.gaps_open.set(len(self._open))
        for text, caches in new.items():
            _log.error("caches_denied", caches=sorted(caches), error=text)

    @property
    def denied(self) -> dict[str, Trouble]:
        """The caches whose busts or sweep Redis denies, and why."""
        return {name: denial.trouble for name, denial in self._denials.items() if denial.granted_at is None}

    def log(self, reason: str, caches: list[str], since: int, *, swept: bool) -> None:
        """Log that changes to these caches since an LSN may have been missed."""
        self._events.gap(reason, caches, swept=swept, lsn=lsn.text(since))

    def _begin(self, broken: Mapping[str, str], *, silent: bool) -> None:
        for name, reason in broken.items():
            self._open[name] = Gap(self._rules.caches[name], reason, silent)
        self._metrics.gaps_open.set(len(self._open))

    # Withdrawn: what the watermark may say.

    @property
    def reasons(self) -> dict[str, str]:
        """The caches that the watermark must leave out, and why."""
        return {name: gap.reason for name, gap in self._open.items()}

    @property
    def must_write(self) -> bool:
        """Whether the watermark says of a cache what is no longer, or not yet, true."""
        return self._left_out != self._open.keys()

    def rewrite(self) -> None:
        """Let the watermark be written again: its caches are others, or it is another Redis."""
        self._left_out = None

    def written(self, left_out: Iterable[str]) -> None:
        """Note that the watermark has been written without these caches."""
        self._left_out = frozenset(left_out)

    # Swept.

    @property
    def to_begin(self) -> list[Gap]:
        """The gaps to log and to sweep for: the watermark leaves them out, and no pause holds them."""
        left_out, now = self._left_out or (), time.monotonic()
        return [
            gap
            for name, gap in self._open.items()
            if gap.horizon is None and name in left_out and not self._pauses(name, now)
        ]

    def _pauses(self, name: str, now: float) -> bool:
        denial = self._denials.get(name)
        return denial is not None and denial.granted_at is None and denial.retry_at > now

    def begin(self, gaps: Iterable[Gap], horizon: Horizon) -> None:
        """Log gaps, and ask for their first sweeps.

        Args:
            gaps: what was `to_begin` before the horizon was looked at. One that was found since then needs a later
                look: a transaction may have begun in between that is not in the stream with all its changes.
            horizon: looked at after the watermark was written.
        """
        gaps = [gap for gap in gaps if self._open.get(gap.cache.name) is gap]
        self._tell({gap.cache.name: gap.reason for gap in gaps if not gap.silent})
        now = time.monotonic()
        quiet = horizon.covers(horizon) and not self._standbys.awaited
        for gap in gaps:
            gap.horizon, gap.began_at = horizon, now
            ticket = self._sweep(gap)
            if quiet and gap.cache.again_after is None:
                gap.last_sweep = ticket
        self._backoff.reset()
        self._ask_at = now

    @property
    def queued(self) -> bool:
        """Whether there are batches to `take`."""
        return bool(self._queued)

    def take(self) -> list[tuple[Batch, Ticket]]:
        """Take the sweeps that were asked for, as batches."""
        queued, self._queued = self._queued, []
        return queued

    @property
    def sweeping(self) -> set[str]:
        """The caches with a sweep of a gap that is not over."""
        found = {name for name, gap in self._open.items() if gap.horizon is None}
        return found | {ticket.gap.cache.name for ticket in self._sweeps if ticket.gap}

    def resolve(self, ticket: Ticket) -> None:
        """Note that a part of a sweep's work is done; with the last part of its last sweep, a gap is over."""
        if not isinstance(ticket, GapTicket) or ticket.parts:
            return
        self._sweeps.discard(ticket)
        gap = ticket.gap
        if gap is None or self._open.get(gap.cache.name) is not gap:
            return
        # Whatever the gap still waits for: this sweep had its rights.
        self._grant(gap.cache.name)
        if gap.last_sweep is ticket:
            del self._open[gap.cache.name]
            self._metrics.gaps_open.set(len(self._open))

    def _grant(self, name: str) -> None:
        denial = self._denials.get(name)
        if denial is not None and denial.granted_at is None:
            denial.granted_at = time.monotonic()
            self._metrics.cache_denied.labels(name).set(0)
            _log.info("cache_granted", cache=name)

    # Settled.

    def asks_in(self, now: float) -> float | None:
        """Return the seconds until `settle` is to be called; ``None`` if nothing settles."""
        return self._ask_at - now if any(gap.settling for gap in self._open.values()) else None

    def settle(self, horizon: Horizon, reached: int, now: float) -> None:
        """Ask for the last sweeps of gaps whose transactions are over.

        Args:
            horizon: which transactions are over now.
            reached: the end of the WAL, asked for after that.
            now: the time.
        """
        for gap in self._open.values():
            if gap.horizon is None or not gap.settling:
                continue
            if gap.over_at is None and horizon.covers(gap.horizon):
                gap.over_at, gap.reached = now, reached
            if gap.over_at is None or self._standbys.replayed < gap.reached:
                continue
            # Readers without the fill contract store what they loaded before.
            if now >= gap.over_at + (gap.cache.again_after or 0) / 1000:
                gap.last_sweep = self._sweep(gap)
        self._ask_at = now + self._backoff.next()
        self._tell_long(horizon, now)

    @property
    def unreplayed(self) -> tuple[float, int] | None:
        """Since when a gap waits for standbys, and the last LSN that does not do."""
        waits = [
            (gap.over_at, gap.reached - 1)
            for gap in self._open.values()
            if gap.settling and gap.over_at is not None and self._standbys.replayed < gap.reached
        ]
        return min(waits, default=None)

    def _sweep(self, gap: Gap) -> GapTicket:
        # Before the end of what was received, as commits are.
        batch = Batch(self._received() - 1, None, 0)
        batch.sweep(Target("", gap.cache, ""), (gap.reason,), "gap")
        ticket = GapTicket(lsn.NEVER, gap=gap)
        self._sweeps.add(ticket)
        self._queued.append((batch, ticket))
        return ticket

    def _tell(self, broken: Mapping[str, str]) -> None:
        for reason in sorted(set(broken.values())):
            caches = sorted(name for name, why in broken.items() if why == reason)
            self.log(reason, caches, self._since, swept=self.enabled)

    def _tell_long(self, horizon: Horizon, now: float) -> None:
        late = [
            gap
            for gap in self._open.values()
            if gap.settling and gap.over_at is None and not gap.waits_long and now - gap.began_at > LONG_SECONDS
        ]
        if not late:
            return
        for gap in late:
            gap.waits_long = True
        _log.warning(
            "gap_waits",
            caches=sorted(gap.cache.name for gap in late),
            xid=horizon.oldest & 0xFFFFFFFF,
            error="A transaction that ran when these caches were swept is not over, so the watermark leaves them out. "
            "Look for its xid in pg_stat_activity (backend_xid) and in pg_prepared_xacts (transaction).",
        )
