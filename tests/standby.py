"""A physical standby of a running PostgreSQL, made as an operator makes one: with pg_basebackup."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import psycopg
from running import eventually, execute

from cdc_invalidator.embedded.process import as_nobody, give_to_nobody, plain_environment
from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Mapping


class Standby(Postgres):
    """A hot standby that streams from the primary; use it as a context manager, inside of the primary's.

    It is an `Postgres` in all else: its DSNs, its course of life, its promotion by ``pg_promote()``.

    Args:
        primary: Runs already; it need not be restarted.
        slot: A physical slot to make on the primary and to stream from. With one, and with ``sync_replication_slots``
            in the settings, PostgreSQL 17 and later copies the primary's failover slots to the standby.
        settings: Lines of postgresql.conf beside the primary's.
    """

    name = "The standby"

    def __init__(
        self, primary: Postgres, *, slot: str | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        feedback = {"hot_standby_feedback": "on"} if slot else {}
        super().__init__(bin_dir=primary.bin_dir, settings={**primary.settings, **feedback, **(settings or {})})
        self.primary = primary
        self._slot = slot

    def start(self) -> None:
        """Start it and wait until it streams; after a promotion it is only started."""
        fresh = not self.data.exists()
        super().start()
        if fresh:
            eventually(lambda: _value(self.dsn, "SELECT 1 FROM pg_stat_wal_receiver"), "the standby streams")

    def _make_data(self) -> None:
        give_to_nobody(self.folder)
        of_slot = ["--create-slot", "--slot", self._slot] if self._slot else []
        options = ["-d", self.primary.dsn, "-D", self.data, "-R", "--checkpoint=fast", "--no-sync"]
        # -R writes standby.signal, and the primary's address with its password and database (from 17 on) into
        # postgresql.auto.conf; what Postgres makes anew at each start is postgresql.conf.
        subprocess.run(  # type: ignore[call-overload]
            [self.bin_dir / "pg_basebackup", *options, *of_slot],
            **as_nobody(),
            cwd=self.folder,
            env=plain_environment(),
            check=True,
            capture_output=True,
        )

    def pause_replay(self) -> None:
        """Receive WAL but don't show what it brings; returns when the replay has stopped."""
        execute(self.dsn, "SELECT pg_wal_replay_pause()")
        eventually(
            lambda: _value(self.dsn, "SELECT pg_get_wal_replay_pause_state()") == "paused", "the replay is paused"
        )

    def resume_replay(self) -> None:
        execute(self.dsn, "SELECT pg_wal_replay_resume()")

    def catch_up(self) -> None:
        """Wait until it shows all that the primary has committed so far."""
        # Two servers are asked, so as bytes of WAL.
        end = _value(self.primary.dsn, "SELECT pg_current_wal_lsn() - '0/0'")
        eventually(
            lambda: _value(self.dsn, "SELECT pg_last_wal_replay_lsn() - '0/0'") >= end, "the standby has caught up"
        )

    def promote(self) -> None:
        """Make it a primary, and wait until it is."""
        execute(self.dsn, "SELECT pg_promote()")


def _value(dsn: str, query: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None
