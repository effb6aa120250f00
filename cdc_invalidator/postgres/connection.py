"""Opens ordinary connections to PostgreSQL, and translates the driver's errors into ours.

A failure becomes `errors.PostgresUnavailable` (try again later), `errors.Locked` (try the statement again),
`errors.SlotInUse` (stand by), `errors.PositionGivenUp` (start over with a new slot) or `errors.ServerRefuses` (give up,
with the remedy).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from cdc_invalidator import errors

# For every connection. A server that vanished without a word is noticed in half a minute, not in two hours.
OPTIONS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # Names and keys are UTF-8 here, whatever the database's own encoding.
    "client_encoding": "UTF8",
}
# Our statements never wait long for a lock, and so never make others wait behind them.
PATIENCE = "SET statement_timeout = '30s'; SET lock_timeout = '2s'"
# Creating a slot waits for all running transactions, and blocks nobody.
ENDLESS = "SET statement_timeout = 0; SET lock_timeout = 0"

# Errors that never go away by themselves, with what an administrator must do.
_REMEDIES: dict[str, str] = {
    "42501": "grant the role of CDC_POSTGRES_DSN the privilege (to stream: ALTER ROLE … REPLICATION)",
    "28P01": "put the right user and password into CDC_POSTGRES_DSN",
    "28000": "allow the role in pg_hba.conf and give it LOGIN and REPLICATION",
    "3D000": "put the name of an existing database into CDC_POSTGRES_DSN",
    "53400": "raise max_replication_slots, or drop a slot that nobody uses",
    "0A000": "use PostgreSQL 15 or later with logical replication",
}


_PUBLICATION_GONE = re.compile(r'publication ".*" does not exist')
_WORDS = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "no pg_hba.conf entry": "28000",
    "is not permitted to log in": "28000",
    "permission denied to start WAL sender": "42501",
    "must be superuser or replication role": "42501",
    '" does not exist': "3D000",
}


def check_dsn(dsn: str, setting: str = "CDC_POSTGRES_DSN") -> None:
    """Refuse a text that can't be a connection string.

    Raises:
        errors.WrongSettings: the message leaves out libpq's text, which may repeat the password.
    """
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        given = {}
    if not given:
        raise errors.WrongSettings(
            f"{setting} can't be read; write postgresql://user:password@host:port/database, "
            "the password percent-encoded."
        )


async def connect(dsn: str, application: str) -> psycopg.AsyncConnection[Any]:
    """Open an ordinary connection with this application_name, which never waits long for a lock."""
    with translated():
        connection = await psycopg.AsyncConnection.connect(
            dsn,
            autocommit=True,
            application_name=application,
            row_factory=namedtuple_row,
            **OPTIONS,
        )
        await connection.execute(PATIENCE)
        return connection


async def rows(
    connection: psycopg.AsyncConnection[Any], query: str, given: Mapping[str, Any] | None = None
) -> list[Any]:
    """Run a query and return its rows, as named tuples."""
    with translated():
        cursor = await connection.execute(query.encode(), given)
        return await cursor.fetchall() if cursor.description is not None else []


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except (psycopg.Error, OSError) as error:
        raise translate(error) from error


def translate(error: Exception) -> errors.InvalidatorError:
    """Return our error for an error of the driver.

    It keeps the server's sentence, which holds no connection string.
    """
    state = getattr(error, "sqlstate", None) or ""
    if state == "55006":
        return errors.SlotInUse()
    if state == "42704" and _PUBLICATION_GONE.search(str(error)):
        # The slot's position is older than the publication, and PostgreSQL can't decode from there.
        return errors.PositionGivenUp("The publication was dropped; slot and publication are made anew.")
    if state == "55P03":
        return errors.Locked(f"PostgreSQL did not give a lock in time ({first_line(error)}); it is tried again.")
    if state in _REMEDIES:
        return errors.ServerRefuses(f"PostgreSQL refuses ({first_line(error)}); {_REMEDIES[state]}.")
    # While connecting, psycopg gives no SQLSTATE: only the server's text tells what is wrong.
    for words, sqlstate in _WORDS.items():
        if not state and words in str(error):
            return errors.ServerRefuses(f"PostgreSQL refuses ({first_line(error)}); {_REMEDIES[sqlstate]}.")
    return errors.PostgresUnavailable(
        f"PostgreSQL is not available ({first_line(error)}); check CDC_POSTGRES_DSN and the server."
    )


def first_line(error: Exception) -> str:
    """Return the server's sentence, without the lines that follow it."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


async def ready(descriptor: int, *, writable: bool = False) -> None:
    """Wait until the socket can be read or, with ``writable``, written."""
    # The reader is removed each time: while the backlog is full nobody reads, and it must not fire then.
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _wake, ready)
    if writable:
        loop.add_writer(descriptor, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
        if writable:
            loop.remove_writer(descriptor)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
