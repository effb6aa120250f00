"""The edge to the standbys that readers use: how far each has replayed, and which of them the busts wait for.

A reader of a standby that lags loads the old row and caches it again after the bust. So what was busted is busted again
once every named standby has replayed its commit. One that is down or too far behind is dropped from the wait, loudly;
when it has caught up, the caches are swept, since nobody knows what was read from it meanwhile. One that was restarted
shows older rows than before until it has caught up, so it is dropped as well, and so is one that is new. Which ones the
watermark speaks for stands in it: a daemon that starts later knows which of them it may go on with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.postgres.connection import check_dsn, connect, translated
from cdc_invalidator.waiting import within

_log = structlog.get_logger()

# A standby is asked this often while something waits for it, and otherwise.
ASK_SECONDS = 0.02
REST_SECONDS = 1.0


class _Standby:
    """One standby, and what it says."""

    def __init__(self, name: str, dsn: str) -> None:
        self.name = name
        self.dsn = dsn
        # Whether it is known what the watermark says of it, and since when it has been running.
        self.judged = False
        self.started: str | None = None
        self.replayed = 0
        # Dropped: nothing waits for it. Returning: what is busted from now on waits for it again, and once it has
        # replayed `target`, which covers what did not, the caches are swept.
        self.dropped = True
        self.target: int | None = None
        self.connection: psycopg.AsyncConnection[Any] | None = None
        self.wanted = asyncio.Event()

    @property
    def awaited(self) -> bool:
        return not self.dropped or self.target is not None


class Standbys:
    """The standbys of one daemon; they outlive its sessions.

    Args:
        dsns: their connection strings; an empty list is fine.
        limit: seconds that busts wait for one of them.
        metrics: what to count.
    """

    def __init__(self, dsns: Iterable[str], *, limit: float, metrics: Metrics) -> None:
        self._standbys = [_Standby(name(dsn), dsn) for dsn in dsns]
        names = [standby.name for standby in self._standbys]
        if len(set(names)) < len(names):
            raise errors.WrongSettings("CDC_POSTGRES_STANDBYS names a standby twice; leave one of the two out.")
        self._limit = limit
        self._metrics = metrics
        self._wake: Callable[[], None] = lambda: None
        self._position: Callable[[], int] = lambda: 0
        self._received: Callable[[], int] = lambda: 0
        self._system_id = ""
        self._returned = False

    @property
    def known(self) -> dict[str, str | None]:
        """What the watermark says of them: when each was started, ``None`` for one that is dropped."""
        return {standby.name: None if standby.dropped else standby.started for standby in self._standbys}

    @property
    def dropped(self) -> list[str]:
        """The names of those that are dropped."""
        return [standby.name for standby in self._standbys if standby.dropped]

    @property
    def awaited(self) -> bool:
        """Whether busts wait for any."""
        return any(standby.awaited for standby in self._standbys)

    @property
    def replayed(self) -> int:
        """The LSN that all that are awaited have replayed; without any, one that no WAL reaches."""
        return min((standby.replayed for standby in self._standbys if standby.awaited), default=2**64)

    def want(self) -> None:
        """Ask until told otherwise: something waits."""
        for standby in self._standbys:
            standby.wanted.set()

    def rest(self) -> None:
        """Nothing waits any more."""
        for standby in self._standbys:
            standby.wanted.clear()

    def returned(self) -> bool:
        """Tell, once, whether one has come back, so that the caches must be swept."""
        returned, self._returned = self._returned, False
        return returned

    def recall(self, known: Mapping[str, str | None] | None) -> bool:
        """Take over what a watermark says of them; True if one that was dropped is not named any more.

        Without a watermark nothing is known of those that are new.
        """
        for standby in self._standbys:
            started = (known or {}).get(standby.name)
            if not standby.judged and started is not None and standby.started in {None, started}:
                # Whether it has been running since then is seen when it is asked, if it was not already.
                standby.started, standby.dropped = started, False
                self._show(standby)
            elif known is not None and started is None and not standby.dropped:
                self._drop(standby, "the watermark does not speak for it")
            standby.judged = True
        if known is None:
            return False
        return bool({name for name, started in known.items() if started is None} - {r.name for r in self._standbys})

    def overdue(self, since: float, due: float) -> None:
        """Drop those that have not replayed ``due``, which waits since then by the monotonic clock, if for too long."""
        if time.monotonic() - since > self._limit:
            self.relent(due, f"it has not caught up within {self._limit:g} s")

    def relent(self, due: float, why: str) -> None:
        """Wait no longer for those that have not replayed this LSN."""
        for standby in self._standbys:
            if standby.awaited and standby.replayed <= due:
                self._drop(standby, why)

    async def run(
        self, *, system_id: str, position: Callable[[], int], received: Callable[[], int], wake: Callable[[], None]
    ) -> None:
        """Ask the standbys until cancelled.

        Args:
            system_id: the primary's; a server with another one is no standby of it.
            position: gives the LSN up to which all is applied.
            received: gives the LSN up to which the stream has been received.
            wake: is called when one has gone ahead.
        """
        self._system_id, self._position, self._received, self._wake = system_id, position, received, wake
        for standby in self._standbys:
            self._show(standby)
        # Without any, too, this ends by being cancelled.
        await asyncio.gather(asyncio.Event().wait(), *map(self._follow, self._standbys))

    async def _follow(self, standby: _Standby) -> None:
        backoff = Backoff(first=0.1, most=2.0)
        passed = 0
        try:
            while True:
                await within(REST_SECONDS, standby.wanted)
                try:
                    if standby.connection is None:
                        standby.connection = await self._connect(standby)
                    replayed = await self._ask(standby.connection)
                except (errors.Retryable, errors.ServerRefuses) as error:
                    self._metrics.postgres_errors.labels("standby").inc()
                    delay = backoff.next()
                    tell = _log.warning if isinstance(error, errors.Retryable) else _log.error
                    tell("standby_unavailable", standby=standby.name, error=str(error), retry_in_s=round(delay, 2))
                    _close(standby)
                    await asyncio.sleep(delay)
                    continue
                backoff.reset()
                self._replayed(standby, replayed, passed)
                passed = self._position()
                await asyncio.sleep(ASK_SECONDS)
        finally:
            _close(standby)

    def close(self) -> None:
        """Drop the connections at once: whoever is in the middle of a query need not wait for the server."""
        for standby in self._standbys:
            _close(standby)

    def _replayed(self, standby: _Standby, replayed: int, passed: int) -> None:
        before = standby.replayed
        standby.replayed = replayed
        self._metrics.standby_replayed.labels(standby.name).set(replayed)
        if standby.judged and standby.dropped and standby.target is None and replayed >= passed > 0:
            # It is where we were a moment ago: worth waiting for.
            standby.target = self._received()
        if standby.target is not None and replayed >= standby.target:
            standby.dropped, standby.target = False, None
            self._returned = True
            self._show(standby)
            _log.warning("standby_returned", standby=standby.name, lsn=lsn.text(replayed))
        if replayed != before:
            self._wake()

    def _drop(self, standby: _Standby, why: str) -> None:
        if standby.awaited:
            error = f"Busts wait no longer for {standby.name}, because {why}: its readers may cache old rows."
            _log.error("standby_dropped", standby=standby.name, error=error, lsn=lsn.text(standby.replayed))
        standby.dropped, standby.target = True, None
        self._show(standby)
        self._wake()

    def _show(self, standby: _Standby) -> None:
        self._metrics.standby_awaited.labels(standby.name).set(not standby.dropped)

    async def _connect(self, standby: _Standby) -> psycopg.AsyncConnection[Any]:
        connection = await connect(standby.dsn, "cdc-invalidator standby")
        try:
            with translated():
                row = await (await connection.execute(_WHO)).fetchone()
        except BaseException:
            connection.pgconn.finish()
            raise
        assert row is not None
        if str(row.system) != self._system_id:
            connection.pgconn.finish()
            raise errors.ServerRefuses(f"{standby.name} is no standby of this database; correct CDC_POSTGRES_STANDBYS.")
        if standby.started != row.started:
            if standby.started is not None:
                self._drop(standby, "it was restarted, and shows older rows until it has caught up")
            standby.started = row.started
        return connection

    async def _ask(self, connection: psycopg.AsyncConnection[Any]) -> int:
        with translated():
            row = await (await connection.execute(_REPLAYED, prepare=True)).fetchone()
        assert row is not None
        return lsn.parse(row.replayed)


def _close(standby: _Standby) -> None:
    connection, standby.connection = standby.connection, None
    # A standby that comes back may show less than before.
    standby.replayed = 0
    if connection is not None:
        connection.pgconn.finish()


_WHO = """
SELECT system_identifier AS system, extract(epoch FROM pg_postmaster_start_time())::text AS started
FROM pg_control_system()
"""
# One that was promoted has its own writes to show: its readers see all of them.
_REPLAYED = """
SELECT coalesce(
  CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, '0/0'
)::text AS replayed
"""


def name(dsn: str) -> str:
    """Give what a standby is called in logs, metrics and the watermark: its hosts and ports, no secrets.

    Raises:
        errors.WrongSettings: the connection string can't be read.
    """
    if "://" not in dsn:
        raise errors.WrongSettings(
            "CDC_POSTGRES_STANDBYS can't be read; write each standby as postgresql://user:password@host:port/database, "
            "with spaces between."
        )
    check_dsn(dsn, "CDC_POSTGRES_STANDBYS")
    parts: Mapping[str, Any] = psycopg.conninfo.conninfo_to_dict(dsn)
    hosts = str(parts.get("host") or parts.get("hostaddr") or "localhost").split(",")
    ports = str(parts.get("port") or 5432).split(",")
    return ",".join(f"{host}:{ports[min(at, len(ports) - 1)]}" for at, host in enumerate(hosts))
