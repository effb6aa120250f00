"""The edge to the standbys that readers use: how far each has replayed, and which of them the busts wait for.

A reader of a standby that lags loads the old row and caches it again after the bust. So what was busted is busted again
once every named standby has replayed its commit. One that is down or too far behind is dropped from the wait, loudly;
when it is back, the caches are swept, since nobody knows what was read from it meanwhile. Which ones are dropped stands
in the watermark: a daemon that starts later knows it as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors, lsn, postgres
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics

_log = structlog.get_logger()

# A standby is asked this often while something waits for it, and while it is dropped.
ASK_SECONDS = 0.02
DROPPED_SECONDS = 1.0


class _Replica:
    """One standby, and what it says."""

    def __init__(self, name: str, dsn: str) -> None:
        self.name = name
        self.dsn = dsn
        self.replayed = 0
        # Dropped: nothing waits for it. Returning: what is busted from now on waits for it again, and once it has
        # replayed `target`, which covers what did not, the caches are swept.
        self.dropped = False
        self.target: int | None = None
        self.connection: psycopg.AsyncConnection[Any] | None = None
        self.wanted = asyncio.Event()

    @property
    def awaited(self) -> bool:
        return not self.dropped or self.target is not None


class Replicas:
    """The standbys of one daemon; they outlive its sessions.

    Args:
        dsns: their connection strings; an empty list is fine.
        limit: seconds that busts wait for one of them.
        metrics: what to count.
    """

    def __init__(self, dsns: Iterable[str], *, limit: float, metrics: Metrics) -> None:
        self._replicas = [_Replica(name(dsn), dsn) for dsn in dsns]
        self._limit = limit
        self._metrics = metrics
        self._wake: Callable[[], None] = lambda: None
        self._position: Callable[[], int] = lambda: 0
        self._received: Callable[[], int] = lambda: 0
        self._system_id = ""
        self._passed = 0
        self._returned = False
        for replica in self._replicas:
            self._show(replica)

    def __bool__(self) -> bool:
        return bool(self._replicas)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names of those that are dropped, sorted."""
        return tuple(sorted(replica.name for replica in self._replicas if replica.dropped))

    @property
    def awaited(self) -> bool:
        """Whether busts wait for any."""
        return any(replica.awaited for replica in self._replicas)

    @property
    def replayed(self) -> int:
        """The LSN that all that are awaited have replayed; without any, one that no WAL reaches."""
        return min((replica.replayed for replica in self._replicas if replica.awaited), default=2**64)

    def want(self) -> None:
        """Ask until told otherwise: something waits."""
        for replica in self._replicas:
            replica.wanted.set()

    def rest(self) -> None:
        """Nothing waits any more."""
        for replica in self._replicas:
            if not replica.dropped:
                replica.wanted.clear()

    def returned(self) -> bool:
        """Tell, once, whether one has come back, so that the caches must be swept."""
        returned, self._returned = self._returned, False
        return returned

    def recall(self, dropped: Iterable[str]) -> bool:
        """Take over which ones an earlier daemon had dropped; True if one of them is not named any more."""
        strangers = set(dropped)
        for replica in self._replicas:
            if replica.name in strangers:
                strangers.remove(replica.name)
                if not replica.dropped:
                    self._drop(replica, "an earlier daemon had dropped it")
        return bool(strangers)

    def overdue(self, since: float) -> None:
        """Drop those that have not replayed what has waited since then, by the monotonic clock, if that is too long."""
        if time.monotonic() - since > self._limit:
            self.relent(f"it has not caught up within {self._limit:g} s")

    def relent(self, why: str) -> None:
        """Wait no longer for those that are farthest behind."""
        behind = self.replayed
        for replica in self._replicas:
            if replica.awaited and replica.replayed <= behind:
                self._drop(replica, why)

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
        # Without any, too, this ends by being cancelled.
        await asyncio.gather(asyncio.Event().wait(), *map(self._follow, self._replicas))

    async def _follow(self, replica: _Replica) -> None:
        backoff = Backoff(first=0.1, most=2.0)
        passed = 0
        try:
            while True:
                await replica.wanted.wait()
                try:
                    if replica.connection is None:
                        replica.connection = await self._connect(replica)
                    replayed = await self._ask(replica.connection)
                except (errors.Retryable, errors.ServerRefuses) as error:
                    self._metrics.postgres_errors.labels("replica").inc()
                    delay = backoff.next()
                    _log.warning(
                        "replica_unavailable", replica=replica.name, error=str(error), retry_in_s=round(delay, 2)
                    )
                    _close(replica)
                    await asyncio.sleep(delay)
                    continue
                backoff.reset()
                self._replayed(replica, replayed, passed)
                passed = self._position()
                await asyncio.sleep(ASK_SECONDS if replica.awaited else DROPPED_SECONDS)
        finally:
            _close(replica)

    def close(self) -> None:
        """Drop the connections at once: whoever is in the middle of a query need not wait for the server."""
        for replica in self._replicas:
            _close(replica)

    def _replayed(self, replica: _Replica, replayed: int, passed: int) -> None:
        before = replica.replayed
        replica.replayed = replayed
        self._metrics.replica_replayed.labels(replica.name).set(replayed)
        if replica.dropped and replica.target is None and replayed >= passed > 0:
            # It is where we were a moment ago: worth waiting for.
            replica.target = self._received()
        if replica.target is not None and replayed >= replica.target:
            replica.dropped, replica.target = False, None
            self._returned = True
            self._show(replica)
            _log.warning("replica_returned", replica=replica.name, lsn=lsn.text(replayed))
        if replayed != before:
            self._wake()

    def _drop(self, replica: _Replica, why: str) -> None:
        if not replica.dropped:
            error = f"Busts wait no longer for {replica.name}, because {why}: its readers may cache old rows."
            _log.error("replica_dropped", replica=replica.name, error=error, lsn=lsn.text(replica.replayed))
        replica.dropped, replica.target = True, None
        replica.wanted.set()
        self._show(replica)
        self._wake()

    def _show(self, replica: _Replica) -> None:
        self._metrics.replica_awaited.labels(replica.name).set(not replica.dropped)

    async def _connect(self, replica: _Replica) -> psycopg.AsyncConnection[Any]:
        connection = await postgres.connect(replica.dsn, "cdc-invalidator replica")
        try:
            with postgres.translated():
                row = await (await connection.execute(_WHO)).fetchone()
            assert row is not None
            if str(row.system) != self._system_id:
                raise errors.ServerRefuses(
                    f"{replica.name} is no standby of this database; correct CDC_POSTGRES_REPLICAS."
                )
        except errors.InvalidatorError:
            await connection.close()
            raise
        return connection

    async def _ask(self, connection: psycopg.AsyncConnection[Any]) -> int:
        with postgres.translated():
            row = await (await connection.execute(_REPLAYED, prepare=True)).fetchone()
        assert row is not None
        return lsn.parse(row.replayed)


def _close(replica: _Replica) -> None:
    connection, replica.connection = replica.connection, None
    if connection is not None:
        connection.pgconn.finish()


_WHO = "SELECT system_identifier AS system FROM pg_control_system()"
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
    postgres.check_dsn(dsn, "CDC_POSTGRES_REPLICAS")
    parts: Mapping[str, Any] = psycopg.conninfo.conninfo_to_dict(dsn)
    hosts = str(parts.get("host") or parts.get("hostaddr") or "localhost").split(",")
    ports = str(parts.get("port") or 5432).split(",")
    return ",".join(f"{host}:{ports[min(at, len(ports) - 1)]}" for at, host in enumerate(hosts))
