"""Opens ordinary connections to PostgreSQL, and translates the driver's errors into ours.

A failure becomes `errors.PostgresUnavailable` (try again later), `errors.Locked` (try the statement again),
`errors.SlotInUse` (stand by), `errors.PositionGivenUp` (start over with a new slot), `errors.LoginRefused` (read the
connection string again) or `errors.ServerRefuses` (give up, with the remedy).

Behind a pooler the session is the application's, and would keep what is SET for it. So what we need is asked for as the
connection is opened, or for one transaction (SET LOCAL), and a pooler is refused before any other statement.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg.rows import namedtuple_row

from cdc_invalidator import errors
from cdc_invalidator.postgres.dsn import DsnSource

# For every connection. A server that vanished without a word is noticed in half a minute, not in two hours.
OPTIONS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # A pooler sets these two on a session of the application, and leaves them there. So libpq sends none, not even
    # those of the connection string; ours are among the parameters of the session.
    "client_encoding": "",
    "application_name": "",
}
# A server with several hosts and addresses is tried at one after the other, each for 10 s.
CONNECT_SECONDS = 60.0
# The server ends our statements after 30 s, but for those that have limits of their own.
ANSWER_SECONDS = 40.0
# What costs the server nothing.
AT_ONCE_SECONDS = 10.0
# Our statements never wait long for a lock, and so never make others wait behind them. As SHOW writes them.
PATIENCE: Mapping[str, str] = {"statement_timeout": "30s", "lock_timeout": "2s"}
# A role or a database may limit how long its sessions live; ours are few, idle most of the time, and wait for long.
UNLIMITED: Mapping[str, str] = {"idle_in_transaction_session_timeout": "0", "idle_session_timeout": "0"}
# The same, but servers before PostgreSQL 17 don't know it, and would refuse the connection.
UNLIMITED_SINCE_17 = "SET transaction_timeout = 0"
# Streaming never ends, and creating a slot waits for all running transactions; both block nobody.
ENDLESS: Mapping[str, str] = {"statement_timeout": "0", "lock_timeout": "0"}

# Errors that never go away by themselves, with what an administrator must do.
_REMEDIES: dict[str, str] = {
    "42501": "grant the role of {setting} the privilege (to stream: ALTER ROLE … REPLICATION)",
    "28P01": "put the right user and password into {setting}",
    "28000": "allow the role in pg_hba.conf and give it LOGIN and REPLICATION",
    "3D000": "put the name of an existing database into {setting}",
    # No SQLSTATE of its own.
    "no role": "make the role, as deploy/postgresql.sql does, or put the user that you meant into {setting}",
    "53400": "raise max_replication_slots, or drop a slot that nobody uses",
    "0A000": "use PostgreSQL 15 or later with logical replication",
}
_LOGIN = ("28P01", "28000", "no role")


_PUBLICATION_GONE = re.compile(r'publication ".*" does not exist')
# What the server's text tells, and the remedy.
_WORDS = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    r"no pg_hba\.conf entry": "28000",
    "is not permitted to log in": "28000",
    # With LDAP, PAM (RDS with IAM), certificates and so on.
    r"\w+ authentication failed for user": "28000",
    'role ".*" does not exist': "no role",
    "permission denied to start WAL sender": "42501",
    "must be superuser or replication role": "42501",
    'database ".*" does not exist': "3D000",
}
# What poolers say of parameters that they can't pass on: PgBouncer, and RDS Proxy.
_WORDS_OF_POOLERS = ("unsupported startup parameter", "RDS Proxy")
# Variables by which libpq sets parameters of a session.
_SETTINGS_OF_LIBPQ = ("PGTZ", "PGDATESTYLE", "PGGEQO")
# Connections that were cut, and why.
_hung: WeakKeyDictionary[psycopg.AsyncConnection[Any], str] = WeakKeyDictionary()


async def connect(
    dsn: DsnSource, application: str, parameters: Mapping[str, str] | None = None
) -> psycopg.AsyncConnection[Any]:
    """Open an ordinary connection with this application_name, which never waits long for a lock.

    Args:
        dsn: the connection string.
        application: the name in pg_stat_activity.
        parameters: the server's parameters that hold for the connection, besides `PATIENCE`, as SHOW writes them.

    Raises:
        errors.PoolerInBetween: it leads to a connection pooler.
    """
    wanted = {**PATIENCE, **(parameters or {})}
    return await open_alone(dsn, application, wanted, row_factory=namedtuple_row)


async def open_alone(
    dsn: DsnSource, application: str, parameters: Mapping[str, str], **arguments: Any
) -> psycopg.AsyncConnection[Any]:
    """Open a connection whose session on the server is ours alone, with just these parameters of the server.

    Raises:
        errors.PoolerInBetween: it leads to a connection pooler.
    """
    # Names and keys are UTF-8 here, whatever the database's own encoding.
    wanted = {"application_name": application, "client_encoding": "UTF8", **UNLIMITED, **parameters}
    text = dsn.now()
    with translated(dsn.setting):
        try:
            connection = await _open(text, dsn.setting, options=_options(text, wanted), **arguments)
        except psycopg.OperationalError as error:
            if any(words in str(error) for words in _WORDS_OF_POOLERS):
                raise errors.PoolerInBetween(dsn.setting, "it does not take the parameters of a session") from error
            raise
        try:
            with limited(connection):
                await _refuse_pooler(connection, wanted, dsn.setting)
                if connection.info.server_version >= 170000:
                    await connection.execute(UNLIMITED_SINCE_17)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection


async def connect_through_anything(dsn: DsnSource) -> psycopg.AsyncConnection[Any]:
    """Open a connection for single statements, each a transaction of its own, through a pooler too: nothing is set."""
    text = dsn.now()
    with translated(dsn.setting):
        return await _open(text, dsn.setting, prepare_threshold=None, row_factory=namedtuple_row)


async def connect_for_defaults(dsn: DsnSource) -> psycopg.AsyncConnection[Any]:
    """Open a connection without any setting of a role, a database, a connection string or the environment.

    A walsender that is not of a database has none of them. It knows SHOW.
    """
    text = dsn.now()
    with translated(dsn.setting):
        return await _open(text, dsn.setting, replication="true", options=" ")


async def _open(dsn: str, setting: str, **arguments: Any) -> psycopg.AsyncConnection[Any]:
    for name in _SETTINGS_OF_LIBPQ:
        # libpq would have them come after the parameters that we give.
        os.environ.pop(name, None)
    try:
        # The driver limits each attempt, but not the look-up of the addresses.
        async with asyncio.timeout(CONNECT_SECONDS):
            return await psycopg.AsyncConnection.connect(dsn, autocommit=True, **OPTIONS, **arguments)
    except TimeoutError as error:
        raise errors.PostgresUnavailable(
            f"No connection to PostgreSQL within {CONNECT_SECONDS:g} s; check the host in {setting}, and DNS."
        ) from error


def _options(dsn: str, wanted: Mapping[str, str]) -> str:
    given = psycopg.conninfo.conninfo_to_dict(dsn).get("options") or os.environ.get("PGOPTIONS", "")
    ours = ("-c " + f"{name}={value}".replace(" ", "\\ ") for name, value in wanted.items())
    # The last one counts.
    return " ".join([str(given), *ours]).strip()


async def _refuse_pooler(connection: psycopg.AsyncConnection[Any], wanted: Mapping[str, str], setting: str) -> None:
    """Refuse a pooler, which answers the connection itself, and then hands each statement to a session of its own."""
    shown = ", ".join(f"current_setting('{name}')" for name in wanted)
    cursor = await connection.execute(f"SELECT pg_backend_pid(), ARRAY[{shown}]::text[]".encode())
    ((pid, settings),) = await cursor.fetchall()
    if pid != connection.pgconn.backend_pid:
        raise errors.PoolerInBetween(setting, "another server process than the connection's answers")
    if settings != list(wanted.values()):
        raise errors.PoolerInBetween(setting, "it drops the parameters of a session")


async def rows(
    connection: psycopg.AsyncConnection[Any], query: str, given: Mapping[str, Any] | None = None
) -> list[Any]:
    """Run a query and return its rows, as named tuples."""
    with answered(connection):
        cursor = await connection.execute(query.encode(), given)
        return await cursor.fetchall() if cursor.description is not None else []


@contextmanager
def answered(connection: psycopg.AsyncConnection[Any], seconds: float | None = None) -> Iterator[None]:
    """Turn the driver's errors into ours, and cut the connection if the server does not answer: see `limited`."""
    with translated(), limited(connection, seconds):
        yield


@contextmanager
def limited(connection: psycopg.AsyncConnection[Any], seconds: float | None = None) -> Iterator[None]:
    """Cut the connection if the server has not answered in time, which is ANSWER_SECONDS unless it is given.

    The server's own limits do not help against a backend that hangs. To cut the socket ends the wait as a server that
    goes away does: the driver, if cancelled, would wait for the server once more.

    Raises:
        errors.PostgresUnavailable: the server has not answered.
    """
    seconds = ANSWER_SECONDS if seconds is None else seconds
    pgconn = connection.pgconn
    pid, application = pgconn.backend_pid, pgconn.parameter_status(b"application_name")
    late = False

    def cut() -> None:
        nonlocal late
        late = True
        shut(pgconn.socket)

    timer = asyncio.get_running_loop().call_later(seconds, cut)
    try:
        yield
    except (psycopg.Error, OSError) as error:
        if late:
            _hung[connection] = (
                f"PostgreSQL has not answered {(application or b'a session').decode()} for {seconds:g} s; look for a "
                f"backend that hangs, pid {pid}."
            )
        # Also for those who waited for their turn.
        if connection in _hung:
            raise errors.PostgresUnavailable(_hung[connection]) from error
        raise
    finally:
        timer.cancel()


def shut(descriptor: int) -> None:
    """End a socket's connection; whoever waits for it is told. The descriptor stays open."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as wire:
        wire.shutdown(socket.SHUT_RDWR)


@contextmanager
def translated(setting: str = "CDC_POSTGRES_DSN") -> Iterator[None]:
    """Turn the driver's errors into ours; ``setting`` is where the connection string is from."""
    try:
        yield
    except (psycopg.Error, OSError) as error:
        raise translate(error, setting) from error


def translate(error: Exception, setting: str = "CDC_POSTGRES_DSN") -> errors.InvalidatorError:
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
    if state == "42501" and "row-level security" in str(error):
        return errors.ServerRefuses(
            f"PostgreSQL refuses ({first_line(error)}); give the role of {setting} the right to see all rows: "
            "ALTER ROLE … BYPASSRLS."
        )
    if not state:
        # While connecting, psycopg gives no SQLSTATE: only the server's text tells what is wrong.
        state = next((sqlstate for words, sqlstate in _WORDS.items() if re.search(words, str(error))), "")
    if state in _REMEDIES:
        refused = errors.LoginRefused if state in _LOGIN else errors.ServerRefuses
        return refused(f"PostgreSQL refuses ({first_line(error)}); {_REMEDIES[state].format(setting=setting)}.")
    return errors.PostgresUnavailable(
        f"PostgreSQL is not available ({first_line(error)}); check {setting} and the server."
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
