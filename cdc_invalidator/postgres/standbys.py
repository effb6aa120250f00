"""The standbys that readers use: how far each has replayed, and which of them busts wait for.

A reader on a lagging standby loads the old row, and caches it again after the bust. So each bust is applied again once
every standby has replayed its commit. A standby that is down or too far behind is dropped from the wait, with an error;
when it has caught up, all caches are swept, since nobody knows what was read from it meanwhile. A restarted standby
shows older rows than before until it has caught up, so it is dropped too, and so is a new one. The watermark lists the
standbys that it covers, so that a daemon that starts later knows which of them it may go on waiting for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors, lsn
from cdc_invalidator.backoff import Backoff, Refusals
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.postgres.connection import AT_ONCE_SECONDS, answered, connect
from cdc_invalidator.postgres.dsn import DsnSource, check_dsn
from cdc_invalidator.waiting import within

_log = structlog.get_logger()

_SETTING = "CDC_POSTGRES_STANDBYS"
# Seconds between two questions to a standby: while something waits for it, and otherwise.
ASK_SECONDS = 0.02
REST_SECONDS = 1.0


class _Standby:
    """One standby, and what is known of it."""

    def __init__(self, name: str, dsn: DsnSource) -> None:
        self.name = name
        self.dsn = dsn
        # Whether the watermark's word on it has been taken over, and when the server was started.
        self.judged = False
        self.started: str | None = None
        self.replayed = 0
        # Dropped: no bust waits for it. With a `target` it is returning: new busts wait for it again, and once it has
        # replayed `target`, which covers the busts that did not wait, the caches are swept.
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
        read: returns their connection strings of now, with spaces between; may be empty. Which standbys there are is
            read once.
        limit: seconds that busts wait for a standby before it is dropped.
        metrics: what to count.
    """

    def __init__(self, read: Callable[[], str], *, limit: float, metrics: Metrics) -> None:
        names = [name(dsn) for dsn in read().split()]
        if len(set(names)) < len(names):
            raise errors.WrongSettings("CDC_POSTGRES_STANDBYS names a standby twice; leave one of the two out.")
        self._standbys = [_Standby(one, DsnSource(partial(_of_one, read, one), _SETTING)) for one in names]
        self._limit = limit
        self._metrics = metrics
        self._wake: Callable[[], None] = lambda: None
        self._position: Callable[[], int] = lambda: 0
        self._received: Callable[[], int] = lambda: 0
        self._system_id = ""
        self._returned = False

    @property
    def known(self) -> dict[str, str | None]:
        """What the watermark records of them: when each was started, ``None`` for a dropped one."""
        return {standby.name: None if standby.dropped else standby.started for standby in self._standbys}

    @property
    def dropped(self) -> list[str]:
        """The names of the dropped ones."""
        return [standby.name for standby in self._standbys if standby.dropped]

    @property
    def awaited(self) -> bool:
        """Whether busts wait for any standby."""
        return any(standby.awaited for standby in self._standbys)

    @property
    def replayed(self) -> int:
        """The LSN that all awaited standbys have replayed; if none is awaited, one that no WAL reaches."""
        return min((standby.replayed for standby in self._standbys if standby.awaited), default=2**64)

    def want(self) -> None:
        """Ask often from now on: something waits."""
        for standby in self._standbys:
            standby.wanted.set()

    def rest(self) -> None:
        """Ask seldom from now on: nothing waits any more."""
        for standby in self._standbys:
            standby.wanted.clear()

    def returned(self) -> bool:
        """Return whether a standby has come back since the last call, so that the caches must be swept."""
        returned, self._returned = self._returned, False
        return returned

    def recall(self, known: Mapping[str, str | None] | None) -> bool:
        """Take over a watermark's record of them; return whether a dropped standby is not in the settings any more.

        Without a watermark (``None``), nothing is known of the standbys that are new.
        """
        for standby in self._standbys:
            started = (known or {}).get(standby.name)
            if not standby.judged and started is not None and standby.started in {None, started}:
                # Whether it has run since then shows when it is asked, if it has not been asked already.
                standby.started, standby.dropped = started, False
                self._show(standby)
            elif known is not None and started is None and not standby.dropped:
                self._drop(standby, "the watermark does not speak for it")
            standby.judged = True
        if known is None:
            return False
        return bool({name for name, started in known.items() if started is None} - {r.name for r in self._standbys})

    def overdue(self, since: float, due: float) -> None:
        """Drop the standbys that have not replayed ``due`` if that has waited too long (``since``, monotonic clock)."""
        if time.monotonic() - since > self._limit:
            self.relent(due, f"it has not caught up within {self._limit:g} s")

    def relent(self, due: float, why: str) -> None:
        """Drop the standbys that have not replayed this LSN."""
        for standby in self._standbys:
            if standby.awaited and standby.replayed <= due:
                self._drop(standby, why)

    async def run(
        self, *, system_id: str, position: Callable[[], int], received: Callable[[], int], wake: Callable[[], None]
    ) -> None:
        """Ask the standbys until cancelled.

        Args:
            system_id: the primary's; a server with another one is not its standby.
            position: returns the LSN up to which everything is applied.
            received: returns the LSN up to which the stream has been received.
            wake: is called when a standby has replayed more.
        """
        self._system_id, self._position, self._received, self._wake = system_id, position, received, wake
        for standby in self._standbys:
            self._show(standby)
        # Without standbys, too, this ends only by being cancelled.
        await asyncio.gather(asyncio.Event().wait(), *map(self._follow, self._standbys))

    async def _follow(self, standby: _Standby) -> None:
        backoff = Backoff(first=0.1, most=2.0)
        refusals = Refusals()
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
                    if not isinstance(error, errors.LoginRefused) or refusals.tell(str(error)):
                        tell = _log.warning if isinstance(error, errors.Retryable) else _log.error
                        tell("standby_unavailable", standby=standby.name, error=str(error), retry_in_s=round(delay, 2))
                    _close(standby)
                    await asyncio.sleep(delay)
                    continue
                backoff.reset()
                refusals.reset()
                self._replayed(standby, replayed, passed)
                passed = self._position()
                await asyncio.sleep(ASK_SECONDS)
        finally:
            _close(standby)

    def close(self) -> None:
        """Close the connections at once, so that a task in the middle of a query does not wait for the server."""
        for standby in self._standbys:
            _close(standby)

    def _replayed(self, standby: _Standby, replayed: int, passed: int) -> None:
        before = standby.replayed
        standby.replayed = replayed
        self._metrics.standby_replayed.labels(standby.name).set(replayed)
        if standby.judged and standby.dropped and standby.target is None and replayed >= passed > 0:
            # It has reached our position of a moment ago, so it keeps up: wait for it again.
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
            with answered(connection, AT_ONCE_SECONDS):
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
        with answered(connection, AT_ONCE_SECONDS):
            row = await (await connection.execute(_REPLAYED, prepare=True)).fetchone()
        assert row is not None
        return lsn.parse(row.replayed)


def _close(standby: _Standby) -> None:
    connection, standby.connection = standby.connection, None
    # A standby that comes back may have replayed less than before.
    standby.replayed = 0
    if connection is not None:
        connection.pgconn.finish()


_WHO = """
SELECT system_identifier AS system, extract(epoch FROM pg_postmaster_start_time())::text AS started
FROM pg_control_system()
"""
# A promoted standby has its own writes: its readers see all of them.
_REPLAYED = """
SELECT coalesce(
  CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, '0/0'
)::text AS replayed
"""


def name(dsn: str) -> str:
    """Return a standby's name in logs, metrics and the watermark: its hosts and ports, no secrets.

    Raises:
        errors.WrongSettings: the connection string can't be read.
    """
    if "://" not in dsn:
        raise errors.WrongSettings(
            "CDC_POSTGRES_STANDBYS can't be read; write each standby as postgresql://user:password@host:port/database, "
            "with spaces between."
        )
    check_dsn(dsn, _SETTING)
    parts: Mapping[str, Any] = psycopg.conninfo.conninfo_to_dict(dsn)
    hosts = str(parts.get("host") or parts.get("hostaddr") or "localhost").split(",")
    ports = str(parts.get("port") or 5432).split(",")
    return errors.visible(",".join(f"{host}:{ports[min(at, len(ports) - 1)]}" for at, host in enumerate(hosts)))


def _of_one(read: Callable[[], str], wanted: str) -> str:
    """Return the connection string of one standby.

    Raises:
        errors.WrongSettings: it is not there any more.
    """
    for dsn in read().split():
        if name(dsn) == wanted:
            return dsn
    raise errors.WrongSettings(f"{_SETTING} names {wanted} no more; name it again, or restart the daemon.")
