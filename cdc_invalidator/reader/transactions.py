"""Whether a loader's connection is inside a transaction whose view is not everybody's: asked before a read.

The rule that holds here: a read goes through the cache only if its connection is outside a transaction, or inside one
that has written nothing and takes a new snapshot for each statement. A row that a transaction has written may be rolled
back, and a row of an old snapshot was overtaken already; no bust would come for either, if it were stored. And the
cache lacks what the transaction has written, so it must not answer either.

Outside a transaction nothing is sent: the driver knows its state. Inside one, the question is one short query. What can
give no answer (a failed transaction, a busy connection) counts as a view of its own.

No driver is imported: connections are recognised by their attributes.
"""

from __future__ import annotations

import sys
from inspect import isawaitable
from typing import Any

# A row if the transaction has written, in a subtransaction too, or locked a row; or keeps its first snapshot.
SQL = (
    "SELECT 1 WHERE pg_current_xact_id_if_assigned() IS NOT NULL "
    "OR current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted')"
)
_IDLE, _IN_TRANSACTION = 0, 2  # PQtransactionStatus


def own_view(connection: Any, *, objects: bool = True) -> bool:
    """Return whether reads by a connection must go beside the cache now.

    Args:
        connection: of psycopg 3 or psycopg2; SQLAlchemy's Connection or Session; Django's ``connection``; or a function
            that returns one of them, or None where there is none.
        objects: whether those count that a session has loaded; they do for what reads by it.

    Raises:
        TypeError: it is none of these.
    """
    connection, known = _unasked(connection, objects=objects)
    if known is not None:
        return known
    try:
        if hasattr(connection, "exec_driver_sql") or hasattr(connection, "get_bind"):
            of_session = hasattr(connection, "get_bind")
            asked = connection.connection() if of_session else connection
            return asked.exec_driver_sql(SQL).first() is not None
        with _driver(connection).cursor() as cursor:
            cursor.execute(SQL)
            return bool(cursor.rowcount)
    except Exception:  # noqa: BLE001  the loader, which asks the same connection, raises what is wrong with it
        return True


async def aown_view(connection: Any, *, objects: bool = True) -> bool:
    """Return the same for an async connection, or one that waits.

    Args:
        connection: as for `own_view`; or psycopg's AsyncConnection; SQLAlchemy's AsyncConnection or AsyncSession.
        objects: as for `own_view`.

    Raises:
        TypeError: it is none of these.
    """
    connection, known = _unasked(connection, objects=objects)
    if known is not None:
        return known
    try:
        if hasattr(connection, "exec_driver_sql") or hasattr(connection, "get_bind"):
            of_session = hasattr(connection, "get_bind")
            asked = await _awaited(connection.connection()) if of_session else connection
            return (await _awaited(asked.exec_driver_sql(SQL))).first() is not None
        cursor = _driver(connection).cursor()
        try:
            await _awaited(cursor.execute(SQL))
            return bool(cursor.rowcount)
        finally:
            await _awaited(cursor.close())
    except Exception:  # noqa: BLE001  the loader, which asks the same connection, raises what is wrong with it
        return True


def _unasked(connection: Any, *, objects: bool) -> tuple[Any, bool | None]:
    """Return the connection itself, and what is known of it without a query that waits; ``None`` if it must be asked.

    Raises:
        TypeError: it is no connection.
    """
    if _is_source(connection):
        connection = connection()
    if isinstance(connection, DjangoConnections):
        return connection, any(own_view(each) for each in connection.open())
    return connection, _known(connection, objects=objects)


def is_connection(value: Any) -> bool:
    """Return whether a value can be asked."""
    return hasattr(value, "in_atomic_block") or hasattr(value, "in_transaction") or _status(value) is not None


class DjangoConnections:
    """All connections that Django has open in the current thread."""

    def open(self) -> list[Any]:
        """Return those to PostgreSQL."""
        connections = sys.modules["django.db"].connections
        return [each for each in connections.all(initialized_only=True) if each.vendor == "postgresql"]

    def close(self) -> None:
        """Close those of a thread that has served no request, which Django would close."""
        sys.modules["django.db"].connections.close_all()


def usual(connection: Any) -> Any:
    """Return the connection to ask where a read names none: Django's, in a program that has set up Django.

    Raises:
        TypeError: it can't be asked.
    """
    if connection is None:
        settings = getattr(sys.modules.get("django.conf"), "settings", None)
        return (
            DjangoConnections() if "django.db" in sys.modules and settings is not None and settings.configured else None
        )
    if not _is_source(connection):
        _known(connection)
    return connection


def _is_source(connection: Any) -> bool:
    """Return whether it is a function that returns a connection; SQLAlchemy's scoped_session is both."""
    if hasattr(connection, "class_"):
        raise TypeError(
            "a sessionmaker makes a new session each time, and not the one that loads; give a scoped_session, or a "
            "function that returns the session of the request"
        )
    return callable(connection)


def _known(connection: Any, *, objects: bool = True) -> bool | None:
    """Return what is known without a query; ``None`` if the server must be asked.

    Raises:
        TypeError: it is no connection.
    """
    if connection is None:
        return False
    if hasattr(connection, "in_atomic_block"):
        if connection.connection is None:
            return False
        if connection.needs_rollback:
            return True
        connection = connection.connection
    if hasattr(connection, "identity_map"):
        # A session answers with objects that it has from earlier, and writes what it has changed before it loads.
        held = objects and any(not state.expired for state in connection.identity_map.all_states())
        if held or connection.new or connection.dirty or connection.deleted:
            return True
    if hasattr(connection, "in_transaction"):
        return False if _unbegun(connection) else None
    status = _status(connection)
    if status is None:
        raise TypeError(
            f"a {type(connection).__name__} can't be asked whether its transaction has written; give a connection of "
            "psycopg, a Connection or Session of SQLAlchemy, or Django's connection"
        )
    return {_IDLE: False, _IN_TRANSACTION: None}.get(status, True)


def _unbegun(connection: Any) -> bool:
    """Return whether SQLAlchemy's session or connection has no transaction on the server, or none yet.

    One that was begun is there only from its first statement on. Nothing is sent, and nothing is taken out of a pool.
    """
    session = getattr(connection, "sync_session", connection)
    if hasattr(session, "get_bind"):
        transaction = session.get_transaction()
        if not session.is_active:
            return False
        # The outermost has the connections of all savepoints, too.
        used = vars(transaction).get("_connections") if transaction is not None else {}
        if not isinstance(used, dict):
            return False
        bound = [session.bind] if hasattr(session.bind, "exec_driver_sql") else []
        return all(_unbegun(each) for each in [*bound, *(each for each, *_ in used.values())])
    connection = getattr(connection, "sync_connection", connection)
    if connection is None or not connection.in_transaction():
        return True
    if connection.closed or connection.invalidated:
        return False
    driver: Any = getattr(connection.connection, "driver_connection", None)
    if hasattr(driver, "is_in_transaction"):
        return not driver.is_in_transaction()
    return _status(driver) == _IDLE


def _status(connection: Any) -> int | None:
    status = getattr(getattr(connection, "info", None), "transaction_status", None)
    return status if isinstance(status, int) else None


def _driver(connection: Any) -> Any:
    return connection.connection if hasattr(connection, "in_atomic_block") else connection


async def _awaited(value: Any) -> Any:
    return await value if isawaitable(value) else value
