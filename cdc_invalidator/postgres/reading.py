"""Queries each of which is a transaction of its own that may only read, from its first word to its end.

BEGIN, the query and ROLLBACK go to the server in one piece, in libpq's pipeline mode: one round trip. What a function
sets for its session is rolled back with the rest; READ ONLY can't be taken back once a query has begun. The driver's
own pipeline does the same at twice the CPU.
"""

from __future__ import annotations

import array as arrays
import fcntl
import termios
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import pq
from psycopg.errors import error_from_result

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import answered, ready

# Of one query; memory holds its rows several times.
MOST_BYTES = 64_000_000
_BEGIN, _END = b"BEGIN TRANSACTION READ ONLY", b"ROLLBACK"


class TooLargeError(errors.InvalidatorError):
    """The rows of a query are too large; select fewer, or shorter values."""


class Reading:
    """One connection, for one query at a time; after an error it is of no use.

    Args:
        connection: an ordinary one, in autocommit mode.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.connection = connection
        self.pid = connection.pgconn.backend_pid
        # The names of the statements that are prepared.
        self._prepared: dict[bytes, bytes] = {}

    def close(self) -> None:
        """Drop the connection at once."""
        self.connection.pgconn.finish()

    async def read(self, sql: bytes, given: Sequence[bytes], seconds: float) -> pq.abc.PGresult:
        """Return the rows of a query, as text.

        Args:
            sql: the query; its parameters are $1, $2, …
            given: their values, as text.
            seconds: after which the connection is cut.

        Raises:
            TooLargeError: its rows are.
            errors.InvalidatorError: it fails, or is not answered in time.
        """
        with answered(self.connection, seconds):
            pgconn = self.connection.pgconn
            pgconn.enter_pipeline_mode()
            pgconn.send_query_params(_BEGIN, None)
            name = self._prepared.get(sql)
            if name is None:
                name = b"cdc_%d" % len(self._prepared)
                pgconn.send_prepare(name, sql)
            pgconn.send_query_prepared(name, given)
            pgconn.send_query_params(_END, None)
            pgconn.pipeline_sync()
            rows = await self._rows()
            pgconn.exit_pipeline_mode()
            self._prepared[sql] = name
            return rows

    async def _rows(self) -> pq.abc.PGresult:
        """Return the one result that has rows, once all have come."""
        pgconn = self.connection.pgconn
        while pgconn.flush():
            await ready(pgconn.socket, writable=True)
            pgconn.consume_input()
        rows, ended, size = None, False, 0
        while True:
            while pgconn.is_busy():
                await ready(pgconn.socket)
                size += _waiting(pgconn.socket)
                if size > MOST_BYTES:
                    raise TooLargeError(
                        f"The rows of a query are larger than {MOST_BYTES // 1_000_000} MB, so its cache is swept; "
                        "select fewer, or shorter values."
                    )
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                # The end of the results of one statement; twice, nothing more comes.
                if ended:
                    raise psycopg.OperationalError(pgconn.get_error_message())
                ended = True
                continue
            ended = False
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                assert rows is not None
                return rows
            if result.status == pq.ExecStatus.TUPLES_OK:
                rows = result
            elif result.status != pq.ExecStatus.COMMAND_OK:
                raise error_from_result(result, encoding="utf-8")


def _waiting(descriptor: int) -> int:
    """Return how many bytes a socket has received that nobody has read."""
    found = arrays.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, found)
    return found[0]


def array(values: Sequence[bytes | None]) -> bytes:
    """Return a text[] as PostgreSQL reads it."""
    quoted = (b"NULL" if value is None else b'"%s"' % _escaped(value) for value in values)
    return b"{%s}" % b",".join(quoted)


def _escaped(value: bytes) -> bytes:
    return value.replace(b"\\", rb"\\").replace(b'"', rb"\"")
