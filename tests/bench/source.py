"""The PostgreSQL side: one database, one publication, one slot, and a copy of that slot for each run.

A backlog begins with a lead: rows of a table that is not published. A contender that starts to stream is made to wait
by it, without receiving anything, until everybody is up; the clock starts when the walsender has passed it.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import psycopg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cdc_invalidator.embedded.servers import Postgres

SLOT = PUBLICATION = "bench"
MARKER = "the backlog ends with this message"

SETTINGS = {
    "autovacuum": "off",  # what it does would fall into one contender's run and not into the other's
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "shared_buffers": "256MB",
}

# Enough for a slow start: about half a second of decoding.
LEAD_BATCHES, LEAD_ROWS = 20, 20_000


class Sender(NamedTuple):
    """A walsender: its process, and whether it has passed an LSN."""

    pid: int
    passed: bool


class Source:
    """One database with tables of seven columns.

    Args:
        postgres: a server of `SETTINGS` that nobody else uses.
        tables: names of the tables, all of them published.
    """

    def __init__(self, postgres: Postgres, tables: Sequence[str]) -> None:
        self.dsn = postgres.create_database("bench")
        self.tables = tables
        self.connection = psycopg.connect(self.dsn, autocommit=True)
        self.version = self.connection.info.parameter_status("server_version") or ""
        self._numbers = itertools.count()
        self.lead_end = self.end = "0/0"
        self.execute("SET synchronous_commit = off", "CREATE TABLE lead (id int)")
        for table in tables:
            self.execute(
                f"CREATE TABLE {table} (id bigint PRIMARY KEY, name text, price numeric(12, 2), changed_at timestamptz,"
                " active bool, attributes jsonb, note text)"
            )
        self.execute(
            f"CREATE PUBLICATION {PUBLICATION} FOR TABLE {', '.join(tables)}",
            f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')",
        )

    def execute(self, *statements: str) -> None:
        for statement in statements:
            self.connection.execute(statement.encode())

    def value(self, query: str) -> str:
        row = self.connection.execute(query.encode()).fetchone()
        assert row is not None
        return str(row[0])

    def fill(self, table: str, numbers: str) -> None:
        """Insert rows; ``numbers`` is a query that gives their ids as ``i``."""
        self.execute(f"INSERT INTO {table} SELECT {row('i')} FROM ({numbers}) AS numbers")

    def lead(self) -> None:
        """Write what keeps a contender waiting; the backlog follows."""
        for _ in range(LEAD_BATCHES):
            self.execute(f"INSERT INTO lead SELECT generate_series(1, {LEAD_ROWS})")
        self.lead_end = self.value("SELECT pg_current_wal_insert_lsn()")

    def close_backlog(self) -> None:
        """Write the message that ends the backlog, and bring all of it to the disk."""
        self.execute(f"SELECT pg_logical_emit_message(false, 'bench', '{MARKER}')", "CHECKPOINT")
        self.end = self.flushed()

    def flushed(self) -> str:
        return self.value("SELECT pg_current_wal_flush_lsn()")

    def catch_up(self) -> None:
        """Move the slot to the end of the WAL."""
        self.execute(f"SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_flush_lsn())")

    def copy_slot(self) -> str:
        name = f"{SLOT}_{next(self._numbers)}"
        self.execute(f"SELECT pg_copy_logical_replication_slot('{SLOT}', '{name}')")
        return name

    def confirmed(self, slot: str) -> int:
        return int(
            self.value(
                f"SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_name = '{slot}'"
            )
        )

    def sender(self, slot: str, lsn: str) -> Sender | None:
        """Look at the walsender that streams from a slot."""
        found = self.connection.execute(
            "SELECT sender.pid, sender.sent_lsn >= %s::pg_lsn FROM pg_replication_slots AS slot"
            " JOIN pg_stat_replication AS sender ON sender.pid = slot.active_pid WHERE slot_name = %s",
            [lsn, slot],
        ).fetchone()
        return Sender(found[0], bool(found[1])) if found else None

    def drop_slot(self, name: str) -> None:
        """Drop a slot as soon as its walsender has noticed that its client is gone."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.execute(f"SELECT pg_drop_replication_slot('{name}')")
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def close(self) -> None:
        self.connection.close()


def row(number: str) -> str:
    """The values of a row with this id."""
    return (
        f"{number}, 'product ' || {number}, {number} % 1000 + 0.99, now(), {number} % 2 = 0,"
        f" jsonb_build_object('colour', 'blue', 'stock', {number} % 50), repeat('note ', 12)"
    )
