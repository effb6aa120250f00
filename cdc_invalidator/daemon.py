"""A daemon's life, in reading order: start, one session after another, shutdown.

When anything fails on PostgreSQL's side, or the rules change, the session is thrown away and a new one starts from
scratch; there is no repair. Sessions are retried here and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff, Refusals
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.inspection import Inspection
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.postgres.impasse import Impasse
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.fitness import Fitness
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.reload import Reload
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.session import STANDBY_SECONDS, Opened, Role, Session, SessionOptions
from cdc_invalidator.trouble import Trouble
from cdc_invalidator.waiting import within
from cdc_invalidator.web import server
from cdc_invalidator.web.exposition import Exposition
from cdc_invalidator.web.page import StatusPage, View
from cdc_invalidator.web.pulse import Answer, Pulse
from cdc_invalidator.web.site import Site

_log = structlog.get_logger()

# SIGTERM: an end in order takes less. Kubernetes grants the sidecar 5 s.
LEAVE_SECONDS = 4.5
# A session that lived this long did not fail for the same reason as the one before it.
SETTLED_SECONDS = 10.0
# If somebody else has written the watermark, it is looked at for so long whether that goes on.
SUSPICION_SECONDS = 60.0


class Daemon:
    """Busts caches until it is told to stop.

    Args:
        options: the settings of its sessions.
        open_server: makes a `CacheServer` that is not connected yet.
        rules: what to bust.
        metrics: what to count.
        events: where busts are recorded.
        standbys: the standbys that busts wait for.
        source: the rule file, or the directory of rule files, that ``rules`` were read from.
        inspection: looks at what was busted, or would have been.
        fitness: whether Redis takes busts, while this daemon stands by.
        page: the page for people; ``None`` if there is none.
    """

    def __init__(
        self,
        options: SessionOptions,
        open_server: Callable[[], CacheServer],
        rules: RuleSet,
        metrics: Metrics,
        events: Events,
        standbys: Standbys,
        source: Path,
        inspection: Inspection,
        fitness: Fitness,
        page: StatusPage | None = None,
    ) -> None:
        self._page = page
        self._options = options
        self._open_server = open_server
        self._rules = rules
        self._metrics = metrics
        self._fitness = fitness
        metrics.retained_wal_limit.set(options.max_retained_wal)
        self._events = events
        self._stop = asyncio.Event()
        # Set to end the session: the daemon must stop, or the rules have changed.
        self._over = asyncio.Event()
        self._backoff = Backoff()
        self._impasse = Impasse()
        # The database could keep the rules once: from now on, keep them as far as possible instead of refusing.
        self._proven = False
        self._role: Role = "connecting"
        self._session: Session | None = None
        # Of that session, once the slot is ours.
        self._opened: Opened | None = None
        # The process id of the last walsender that was ours.
        self._walsender: int | None = None
        # Why the last sessions failed; until one leads or stands by.
        self._trouble: Trouble | None = None
        # Whether PostgreSQL has ever let us in: from then on, a password that it refuses is a rotated one.
        self._known = False
        self._refusals = Refusals()
        self._suspicious_until = float("-inf")
        self._recent = Recent()
        self._standbys = standbys
        self._inspection = inspection
        self._reload = Reload(
            source,
            os.environ,
            rules,
            dsn=options.postgres_dsn,
            publication=options.publication,
            event_stream=options.event_stream,
            metrics=metrics,
            switch=self._switch,
        )

    async def run(self, http_host: str, http_port: int, seconds: float | None = None) -> None:
        """Run until SIGTERM or SIGINT, or for so many seconds, and serve the HTTP pages on that address.

        Raises:
            errors.WrongSettings: this database can't keep the settings or the rules.
            errors.ServerRefuses: a server refuses for good. One that has let us in once, and refuses user or password
                now, is asked again with the connection string of then.
        """
        with (
            _signals(self._ask_to_stop, self._reload.ask),
            Pulse(self._look) as pulse,
            self._serve(pulse, http_host, http_port) as port,
        ):
            _log.info("started", http_port=port, slot=self._options.slot, rules=self._rules.digest)
            self._check_hash_tags()
            if seconds is not None:
                asyncio.get_running_loop().call_later(seconds, self._end)
            reloading = asyncio.create_task(self._reload.run(), name="reload")
            # It never ends by itself; if it does, the daemon stops rather than limps.
            reloading.add_done_callback(lambda _: self._end())
            try:
                while not self._stop.is_set():
                    await self._attempt()
                if reloading.done():
                    reloading.result()
            finally:
                reloading.cancel()
                await asyncio.wait({reloading})
        _log.info("stopped")

    @contextmanager
    def _serve(self, pulse: Pulse, host: str, port: int) -> Iterator[int]:
        slot, metrics = self._options.slot, self._metrics
        exposition = Exposition(lambda openmetrics: metrics.render(slot, openmetrics=openmetrics))
        site = Site(pulse, exposition, self._page, self.view)
        with server.serve(site.get, host, port, site.run) as found:
            yield found

    def _ask_to_stop(self) -> None:
        if self._stop.is_set():
            # The second signal. Nothing is lost: what was not confirmed is received again.
            os._exit(errors.InvalidatorError.exit_code)
        # A look-up of addresses that hangs would hold up the end of the process: nothing can interrupt it.
        asyncio.get_running_loop().call_later(LEAVE_SECONDS, os._exit, 0)
        self._end()

    def _end(self) -> None:
        self._stop.set()
        self._over.set()

    def _switch(self, rules: RuleSet) -> None:
        """End the session, and start one with other rules; the digests in the watermark tell it what to sweep."""
        self._rules = rules
        # The busts of the old rules don't tell what the new ones would have busted.
        self._recent = Recent()
        self._proven = True
        self._check_hash_tags()
        self._over.set()

    def _check_hash_tags(self) -> None:
        if self._options.redis.kind != "cluster":
            return
        caches = self._rules.caches.values()
        untagged = [cache.name for cache in caches if cache.lacks_hash_tag and not cache.given]
        if untagged:
            _log.warning(
                "no_hash_tag",
                caches=sorted(untagged),
                error="A key and its lock lie in different slots, so that no reader's script can store under the lock; "
                'write a hash tag into `key`, as in "user:{{{id}}}".',
            )

    async def _attempt(self) -> None:
        self._over.clear()
        self._opened = None
        session = self._session = Session(
            self._options,
            self._open_server,
            self._rules,
            self._metrics,
            self._events,
            self._be,
            self._lead,
            fitness=self._fitness,
            recent=self._recent,
            standbys=self._standbys,
            inspection=self._inspection,
            suspicious=time.monotonic() < self._suspicious_until,
            strict=not self._proven,
            former_walsender=self._walsender,
        )
        began = time.monotonic()
        try:
            await session.run(self._over)
        except errors.SlotInUse:
            # Another daemon was faster.
            self._be("standby")
            # Daemons on standby must not hold a walsender: there are few of them.
            await self._close(session)
            await self._pause(STANDBY_SECONDS)
        except errors.HandedOver as error:
            self._hand_over(error)
            await self._close(session)
        except errors.PositionGivenUp as error:
            self._be("connecting")
            self._trouble = Trouble.now(str(error), self._trouble)
            await self._close(session)
            await self._give_up(session, error)
            await self._pause(self._backoff.next())
        except errors.WatermarkTaken as error:
            self._suspicious_until = time.monotonic() + SUSPICION_SECONDS
            self._be("connecting")
            self._trouble = Trouble.now(str(error), self._trouble)
            delay = self._backoff.next()
            _log.error("watermark_taken", error=str(error), retry_in_s=round(delay, 2))
            await self._close(session)
            # The watermark tells nothing of our position: whenever we lead, everything is swept. So hold no WAL.
            await self._give_up(session, error)
            await self._pause(delay)
        except (errors.Retryable, errors.MalformedMessage, errors.LoginRefused) as error:
            if isinstance(error, errors.LoginRefused) and not self._known:
                raise
            if time.monotonic() - began > SETTLED_SECONDS:
                self._backoff.reset()
            if isinstance(error, errors.Superseded):
                self._suspicious_until = time.monotonic() + SUSPICION_SECONDS
            delay = self._backoff.next()
            self._be("connecting")
            self._trouble = Trouble.now(str(error), self._trouble)
            self._metrics.postgres_errors.labels(type(error.__cause__ or error).__name__).inc()
            self._tell_lost(error, delay)
            await self._close(session)
            if (skipped := self._skipped(error)) is not None:
                await self._give_up(session, skipped)
            await self._pause(delay)
        finally:
            await self._close(session)

    def _tell_lost(self, error: errors.InvalidatorError, delay: float) -> None:
        if not isinstance(error, errors.LoginRefused):
            _log.warning("session_lost", error=str(error), retry_in_s=round(delay, 2))
        elif self._refusals.tell(str(error)):
            _log.error("login_refused", error=str(error), retry_in_s=round(delay, 2))

    def _hand_over(self, error: errors.HandedOver) -> None:
        """Note why, for as long as Redis has not answered again, and stand by."""
        assert self._opened is not None
        apply, progress = self._opened.apply, self._opened.progress
        blocked = apply.blocked(0.0)
        assert blocked is not None
        self._fitness.gave_way(blocked, worked=progress.since - progress.began >= self._options.handover_seconds)
        self._metrics.handovers.labels("slow" if apply.redis.trouble is None else "lost").inc()
        self._be("standby")
        self._opened = None
        _log.warning("handed_over", error=f"{error} {blocked.text}", since=blocked.at)

    def _skipped(self, error: errors.InvalidatorError) -> errors.PositionSkipped | None:
        """Return why to skip what comes next in the stream, if that has failed often enough."""
        if self._opened is None or not isinstance(error, (errors.CannotSend, errors.MalformedMessage)):
            return None
        received = self._opened.checkpoint.received_lsn
        if not self._impasse.failed(received, time.monotonic()):
            return None
        return errors.PositionSkipped(f"The stream has failed again and again behind {lsn.text(received)}: {error}")

    async def _close(self, session: Session) -> None:
        await session.close()
        # Its tasks have ended and report nothing more.
        self._metrics.forget()

    async def _give_up(self, session: Session, reason: errors.PositionGivenUp | errors.WatermarkTaken) -> None:
        try:
            await session.give_up(reason)
        except (errors.Retryable, errors.LoginRefused) as error:
            # The server has other troubles; if its WAL still grows, the next session gets here again.
            _log.warning("postgres_unavailable", error=str(error))

    async def _pause(self, seconds: float) -> None:
        """Wait, but only until the daemon must stop or the rules change."""
        await within(seconds, self._over)

    def _lead(self, opened: Opened) -> None:
        self._be("leader")
        self._opened = opened
        self._walsender = opened.replication.backend_pid
        self._proven = True
        self._trouble = None

    def _be(self, role: Role) -> None:
        if role != self._role:
            _log.info("role", role=role)
        if role != "connecting":
            self._trouble = None
            self._known = True
            self._refusals.reset()
        self._role = role
        self._metrics.leader.set(role == "leader")
        self._metrics.can_lead.set(role == "leader")

    def _unready(self) -> str | None:
        """Return why busts don't work here, or would not if this daemon led."""
        if self._role == "connecting":
            return str(self._first_trouble() or "it is connecting")
        session, opened = self._session, self._opened
        trouble = (
            self._blocked()
            or (opened.apply.redis.trouble if opened and opened.apply.redis.refused else None)
            or (session.trouble if session else None)
            or self._denied()
        )
        return str(trouble) if trouble is not None else None

    def _blocked(self) -> Trouble | None:
        """Return why this daemon gets on with no bust, or could not if it led."""
        if self._role == "standby":
            return self._fitness.trouble
        return self._opened.apply.blocked(self._options.handover_seconds) if self._opened else None

    def _denied(self) -> Trouble | None:
        denied = self._opened.apply.denied if self._opened is not None else {}
        if not denied:
            return None
        why = " ".join(sorted({each.text for each in denied.values()}))
        since = min(each.since for each in denied.values())
        return Trouble(f"Redis denies the busts of {', '.join(sorted(denied))}: {why}", since)

    def _first_trouble(self) -> Trouble | None:
        """Return what an operator should know first."""
        session, opened = self._session, self._opened
        tables = session.tables if session else None
        return (
            (opened.apply.redis.trouble if opened else None)
            or self._blocked()
            or (session.trouble if session else None)
            or self._denied()
            or (session.slow_query if session else None)
            or self._events.trouble
            or self._trouble
            or (tables.trouble if tables else None)
        )

    def _look(self) -> Answer:
        return Answer(self.status(), self._unready(), time.time())

    def status(self) -> dict[str, Any]:
        """Return what /status shows."""
        session, opened = self._session, self._opened
        checkpoint = opened.checkpoint if opened else None
        apply = opened.apply if opened else None
        # Who observes has no watermark.
        promises = not self._options.observe
        recorded_at = apply.record.recorded_at if apply else None
        tables = session.tables if session else None
        trouble = self._first_trouble()
        return {
            "role": self._role,
            "slot": self._options.slot,
            "publication": self._options.publication,
            "received_lsn": lsn.text(checkpoint.received_lsn) if checkpoint else None,
            "watermark_lsn": lsn.text(checkpoint.confirmable) if checkpoint and promises else None,
            "watermark_age_s": round(time.time() - recorded_at, 3) if recorded_at else None,
            "lag_bytes": checkpoint.received_lsn - checkpoint.confirmable if checkpoint else None,
            "backlog_keys": session.backlog.weight if session else 0,
            "searches": apply.searches if apply else None,
            "dropped_standbys": self._standbys.dropped,
            "denied_caches": {name: each.text for name, each in apply.denied.items()} if apply else {},
            "mode": "observe" if self._options.observe else "bust",
            # One of the two.
            "verify": None,
            "observed": None,
            self._inspection.name: self._inspection.status(),
            "unpublished_tables": [str(table) for table in tables.unseen] if tables else [],
            "rules": {
                "digest": self._rules.digest,
                "caches": len(self._rules.caches),
                "rules": len(self._rules.rules),
                "last_reload": self._reload.last.shown() if self._reload.last else None,
            },
            "last_error": trouble.text if trouble else None,
            "last_error_since": trouble.at if trouble else None,
        }

    def view(self) -> View:
        """Return what the page shows besides; see `web.page.NOTHING` for its form."""
        options, metrics, rules = self._options, self._metrics, self._rules
        session, opened = self._session, self._opened
        apply = opened.apply if opened and self._role == "leader" else None
        tables = session.tables if session else None
        retained = metrics.retained_wal.value
        return {
            "postgres": options.postgres_dsn.place,
            "postgres_up": bool(metrics.postgres_up.value),
            "redis": options.redis.place,
            "redis_up": bool(metrics.redis_up.value),
            "retained": retained,
            "retained_limit": options.max_retained_wal,
            "standbys": ", ".join(name for (name,), _ in metrics.standby_awaited.items()),
            "caches": list(rules.kept),
            "rules": rules,
            "swept": apply.left_out if apply else {},
            "denied": list(apply.denied) if apply else [],
            "unpublished": [self._unseen(table) for table in tables.unseen] if tables else [],
            "remedies": [
                {"sentence": each.sentence, "sql": each.sql, "or_sql": each.or_sql} for each in tables.remedies()
            ]
            if tables and tables.unseen
            else [],
            "sweeps": apply.sweeps if apply else [],
        }

    def _unseen(self, table: Table) -> dict[str, Any]:
        of_table = [rule for rule in self._rules.rules if rule.table == table]
        tables = self._session.tables if self._session else None
        missing = tables is not None and table in tables.survey.unknown
        return {
            "table": str(table),
            "why": "does not exist" if missing else "exists, but is not published",
            "caches": sorted({bust.cache.name for rule in of_table for bust in rule.busts}),
        }


@contextmanager
def _signals(stop: Callable[[], None], reload: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at each SIGTERM or SIGINT, and ``reload`` at each SIGHUP; in the end, remove the handlers."""
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
