"""One `via` query, asked of PostgreSQL: from the columns of changed rows to the keys that the query's rows name.

All changes of one flush are one query for each rule: the arguments go in as arrays, and the rule's query stands behind
a LATERAL join. It runs on an ordinary connection, in a transaction of its own that is READ ONLY from its first word and
rolled back at its end. So whatever a function sets or does for its session is over with it, limits of time included.

A query that fails is tried once more, on a new connection, unless it has used up its time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import psycopg
import structlog
from psycopg import pq

from cdc_invalidator import errors
from cdc_invalidator.pipeline.batch import Target
from cdc_invalidator.postgres.connection import connect, first_line, rows
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.queries import columns
from cdc_invalidator.postgres.reading import Reading, TooLargeError, array
from cdc_invalidator.rules.model import Query
from cdc_invalidator.rules.packed import split_arguments
from cdc_invalidator.rules.table import read_table
from cdc_invalidator.rules.template import Param

_log = structlog.get_logger()

QUERY_SECONDS = 10
# Rows of one query for one flush, each of which may be a key; with more, the cache is swept.
MOST_ROWS = 50_000
# What a query must not be able to do, and how long it may take. Where a policy would hide rows from it, it fails, and
# its cache is swept: without, it would give too few keys and say nothing. Texts end where `rules.sql` saw them end.
_LIMITS = {
    "default_transaction_read_only": "on",
    "statement_timeout": f"{QUERY_SECONDS}s",
    "jit": "off",
    "row_security": "off",
    "standard_conforming_strings": "on",
}

# From an argument to the keys that the query's rows name for it.
Answer = dict[bytes, list[bytes]]


class TooSlow(errors.PostgresUnavailable):
    """A query has used up its time; give it an index, or narrow it down."""


class Asker:
    """Asks queries, each on a connection that no other one has at the same time; one connection is kept.

    Args:
        dsn: where they run.
        asked: is told the rule whose query is asked.
    """

    def __init__(self, dsn: DsnSource, asked: Callable[[str], None]) -> None:
        self._dsn = dsn
        self._asked = asked
        # The settings that values are spelled with; set it before the first query.
        self.spelling: Mapping[str, str] = {}
        self._idle: list[Reading] = []
        self._busy: set[Reading] = set()
        # By table: its columns' types.
        self._types: dict[str, Mapping[str, str]] = {}

    def close(self) -> None:
        """Drop the connections at once."""
        for reading in (*self._idle, *self._busy):
            reading.close()
        self._idle.clear()

    async def ask_twice(self, target: Target, arguments: Sequence[bytes]) -> Answer:
        """Ask the query of a target, once more if that fails.

        Args:
            target: one with a query.
            arguments: packed values.

        Returns:
            For each of the arguments, the keys that the query's rows name; without those that have none.

        Raises:
            TooSlow: it has used up its time.
            errors.InvalidatorError: it fails.
        """
        began = time.monotonic()
        try:
            return await self._ask(target, arguments)
        except (errors.WrongRules, TooLargeError):
            # That is no better the second time.
            raise
        except errors.InvalidatorError as error:
            if time.monotonic() - began >= QUERY_SECONDS:
                # Nor is this.
                raise TooSlow(str(error)) from error.__cause__
            _log.warning("query_retried", rule=target.rule, cache=target.cache.name, error=self.told(target, error))
            self._types.pop(target.table, None)
            return await self._ask(target, arguments)

    def told(self, target: Target, error: errors.InvalidatorError) -> str:
        """Return an error in words that name the rule where its query is to blame."""
        query = target.query
        assert query is not None
        found = objection(query, self._types.get(target.table, {}), error)
        if found is None:
            return str(error)
        return f"{query.place}: the `via` query of rule {target.rule} for cache {target.cache.name} fails: {found}."

    async def _ask(self, target: Target, arguments: Sequence[bytes]) -> Answer:
        query = target.query
        assert query is not None
        reading = self._idle.pop() if self._idle else await self._open()
        self._busy.add(reading)
        began = time.monotonic()
        try:
            changed = [split_arguments(argument) for argument in arguments]
            given = [array([_checked(row[at]) for row in changed]) for at in range(len(query.columns))]
            types = await self._types_of(reading.connection, target.table)
            self._asked(target.rule)
            sql = _as_sent(statement(query, types)).encode()
            result = await reading.read(sql, given or [b"%d" % len(changed)], QUERY_SECONDS + 1)
        except BaseException:
            reading.close()
            if time.monotonic() - began >= QUERY_SECONDS:
                await self._end(reading.pid)
            raise
        finally:
            self._busy.discard(reading)
        self._idle.append(reading)
        if len(self._idle) > 1:
            self._idle.pop().close()
        return _keys(target, query, result, arguments, changed)

    async def _open(self) -> Reading:
        return Reading(await connect(self._dsn, "cdc-invalidator queries", {**_LIMITS, **self.spelling}))

    async def _end(self, pid: int) -> None:
        """End the session of a query that may still run there: a function may ignore that it is cancelled."""
        with suppress(errors.Retryable):
            connection = await connect(self._dsn, "cdc-invalidator queries")
            try:
                await rows(connection, "SELECT pg_terminate_backend(%(pid)s)", {"pid": pid})
            finally:
                connection.pgconn.finish()

    async def _types_of(self, connection: psycopg.AsyncConnection[Any], table: str) -> Mapping[str, str]:
        types = self._types.get(table)
        if types is None:
            named = read_table(table)
            found = await columns(connection, [named])
            # Without lengths: a cast to a length that is not the column's any more would cut values.
            types = self._types[table] = {column.name: column.bare_type for column in found.get(named, ())}
        return types


def _keys(
    target: Target,
    query: Query,
    result: pq.abc.PGresult,
    arguments: Sequence[bytes],
    changed: Sequence[Sequence[bytes | None]],
) -> Answer:
    names = [(result.fname(at) or b"").decode() for at in range(1, result.nfields)]
    assert target.bust is not None
    mapped = list(target.bust.given)
    wanted = set(target.cache.bust_template.params)
    lacking = wanted - set(names) - set(mapped)
    if lacking:
        raise _wrong(target, f"gives no {', '.join(sorted(lacking))}; name a column so, or give it in the mapping")
    found: Answer = {}
    if result.ntuples > MOST_ROWS:
        raise _wrong(target, f"gives more than {MOST_ROWS:,} rows at once, so its cache is swept; narrow it down")
    for number in range(result.ntuples):
        values = {name: result.get_value(number, 1 + at) for at, name in enumerate(names)}
        argument = int(result.get_value(number, 0) or 0) - 1
        # Not strict: without any argument, there is one empty text of them.
        values |= dict(zip(mapped, changed[argument][len(query.columns) :], strict=False))
        key = target.cache.bust_template.render({name: values[name] for name in wanted})
        if key is not None:
            found.setdefault(arguments[argument], []).append(key)
    return found


def statement(query: Query, types: Mapping[str, str]) -> str:
    """Return the SQL that runs a query for many changes at once.

    Its parameters are arrays of text, one for each of the query's columns; without columns, how many changes there are.
    The first column of its rows is the number of the change, from 1.
    """
    inner = "".join(_bound(query, types, part).replace("%", "%%") for part in query.parts).rstrip()
    source, columns = "generate_series(1, %s)", "n"
    if query.columns:
        source = f"unnest({', '.join('%s::text[]' for _ in query.columns)}) WITH ORDINALITY"
        columns = ", ".join([*(f"c{number}" for number in range(len(query.columns))), "n"])
    # What is pasted is the rule file's own SQL; values are bound.
    return _AROUND.format(source=source, columns=columns, inner=inner, limit=MOST_ROWS + 1)


def _as_sent(sql: str) -> str:
    """Return what `statement` gives as PostgreSQL gets it, with $1 for the first parameter."""
    numbers = count(1)
    return re.sub("%[%s]", lambda sign: "%" if sign[0] == "%%" else f"${next(numbers)}", sql)


def _bound(query: Query, types: Mapping[str, str], part: str | Param) -> str:
    """Return a part of a query as PostgreSQL gets it."""
    if isinstance(part, str):
        return part
    return f"(cdc_row.c{query.columns.index(part.name)}::{types.get(part.name, 'text')})"


def objection(query: Query, types: Mapping[str, str], error: errors.InvalidatorError, *, ahead: str = "") -> str | None:
    """Return what PostgreSQL objects to in a query, where in its text, and a remedy.

    Args:
        query: the query.
        types: what `statement` was made with.
        error: what `answered` has raised.
        ahead: what was sent before `statement`.

    Returns:
        ``None`` if the query is not to blame, but the server, the connection or a policy.
    """
    cause = error.__cause__
    state = (getattr(cause, "sqlstate", None) or "") if isinstance(cause, psycopg.Error) else ""
    if not isinstance(cause, psycopg.Error) or "row-level security" in str(cause):
        return None
    if state == "57014":
        return f"{first_line(cause)}; it may take {QUERY_SECONDS} s: give it an index, or narrow it down"
    if not state.startswith(_OF_QUERY):
        return None
    remedy = "grant it to the role of CDC_POSTGRES_DSN" if state == "42501" else "correct it"
    return f"{first_line(cause)}{_near(query, types, cause.diag.statement_position, ahead)}; {remedy}"


# Classes of SQLSTATE for which a statement is to blame.
_OF_QUERY = ("0A", "20", "21", "22", "23", "25006", "2F", "34", "38", "39", "42", "54", "P0")
# How much of a query is shown from where the error is.
_SHOWN = 40


def _near(query: Query, types: Mapping[str, str], position: str | None, ahead: str) -> str:
    """Return where in a query an error is, of which PostgreSQL gives the place in the whole statement, from 1."""
    if position is None:
        return ""
    before = ahead + _as_sent(statement(query, types).partition(_BEFORE)[0]) + _BEFORE
    at, left = 0, int(position) - 1 - len(before)
    for part in query.parts:
        written = part if isinstance(part, str) else f"{{{part.name}}}"
        length = len(_bound(query, types, part))
        if left < length:
            at += left if isinstance(part, str) else 0
            break
        at, left = at + len(written), left - length
    found = query.text[max(0, at) : max(0, at) + _SHOWN].split("\n", 1)[0].rstrip()
    return f", at `{found}`" if left >= 0 and found else ""


# What stands before the rule's own query.
_BEFORE = ", LATERAL (\n"
_AROUND = "SELECT cdc_row.n, cdc_found.* FROM {source} AS cdc_row({columns})%s{inner}\n) AS cdc_found LIMIT {limit}"
_AROUND %= _BEFORE


def _wrong(target: Target, what: str) -> errors.WrongRules:
    return errors.WrongRules([errors.Problem(*target.cache.place, f"the query of rule {target.rule} {what}")])


def _checked(value: bytes | None) -> bytes | None:
    try:
        if value is not None:
            value.decode()
    except UnicodeDecodeError as error:
        raise errors.WrongMessage("A row holds text that is not UTF-8, which no query can be asked for.") from error
    return value
