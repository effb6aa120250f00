"""The LSN of a commit, for `Caches.at_least`: read-your-writes.

The LSN is the end of the WAL right after the commit. Within the transaction it can't be known, since the commit record
is written last: ``pg_current_wal_insert_lsn()`` asked before is lower, and the watermark may pass that without the
commit. Asked afterwards, by any session of the same server, it is the end of the commit record or a little later,
whatever ``synchronous_commit`` is. "A little later" costs at most one read from the database that the cache could have
answered.

No driver is imported: connections are recognised by their attributes.
"""

from __future__ import annotations

from typing import Any

SQL = "SELECT pg_current_wal_insert_lsn() - '0/0'"

_OPEN = "this connection is inside a transaction; commit it first, since the LSN of a commit is known only after it"


def commit_lsn(connection: Any) -> int:
    """Return an LSN that is not lower than the last commit's; call it right after the commit.

    Args:
        connection: of psycopg 3; SQLAlchemy's Engine, Connection or Session; or Django's ``connection``. Of
            SQLAlchemy's, the engine is asked for another connection, so that no transaction is begun on this one.

    Raises:
        ValueError: it is inside a transaction.
    """
    engine = _engine(connection)
    if engine is not None:
        with engine.connect() as other:
            return int(other.exec_driver_sql(SQL).scalar_one())
    _refuse_open(connection)
    with connection.cursor() as cursor:
        cursor.execute(SQL)
        (lsn,) = cursor.fetchone()
    if _opened(connection):
        connection.rollback()
    return int(lsn)


async def acommit_lsn(connection: Any) -> int:
    """Return the same for an async connection.

    Args:
        connection: psycopg's AsyncConnection; SQLAlchemy's AsyncEngine, AsyncConnection or AsyncSession.

    Raises:
        ValueError: it is inside a transaction.
    """
    engine = _engine(connection)
    if engine is not None:
        # An AsyncSession is bound to the sync engine inside the async one.
        if not hasattr(engine, "sync_engine"):
            from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415  whoever has a session has it

            engine = AsyncEngine(engine)
        async with engine.connect() as other:
            return int((await other.exec_driver_sql(SQL)).scalar_one())
    _refuse_open(connection)
    async with connection.cursor() as cursor:
        await cursor.execute(SQL)
        (lsn,) = await cursor.fetchone()
    if _opened(connection):
        await connection.rollback()
    return int(lsn)


def _engine(connection: Any) -> Any:
    """Return the engine of SQLAlchemy's Engine, Connection or Session; None for anything else."""
    if hasattr(connection, "get_bind"):
        bound = connection.get_bind()
        return getattr(bound, "engine", bound)
    return getattr(connection, "engine", None)


def _refuse_open(connection: Any) -> None:
    if getattr(connection, "in_atomic_block", False) or _opened(connection):
        raise ValueError(_OPEN)


def _opened(connection: Any) -> bool:
    """Return whether psycopg's connection is inside a transaction; Django's commits by itself."""
    info = getattr(connection, "info", None)
    return info is not None and hasattr(info, "transaction_status") and bool(info.transaction_status)
