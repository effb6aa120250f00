"""``cdc-invalidator test --live``: runs the tests of rule files with a real daemon, PostgreSQL and Valkey.

One database and one daemon serve all tests. Before each test, the tables get the rows of the schema file again, and the
test's old row. Then the change is executed as SQL, and the busts of that transaction are compared with those that the
test expects. `via` queries run on that database.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import redis
from psycopg import sql

from cdc_invalidator import errors
from cdc_invalidator.commands.explain import read_key
from cdc_invalidator.commands.simulate import Change, Row, simulate
from cdc_invalidator.commands.trial import TestResult, compare
from cdc_invalidator.embedded.daemon import DaemonProcess
from cdc_invalidator.embedded.process import HOST, plain_environment
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.postgres.connection import first_line
from cdc_invalidator.rules.model import RuleSet, Test

# `debounce` and `again_after` delay busts by up to a minute.
SETTLE_SECONDS: Final = 150.0
# The value of versions before a test: no other number in a key equals it, and a bump makes it larger.
VERSION: Final = "7318220946"
_SAVED: Final = "cdc_invalidator_saved"

Connection = psycopg.Connection[tuple[Any, ...]]


def run(rules: RuleSet, path: Path, schema: Path) -> Iterator[TestResult]:
    """Run all tests of a rule set.

    Args:
        rules: What ``path`` holds.
        path: The rule file, or the directory of rule files.
        schema: A file of SQL that creates the tables, and rows that the tests need; psql runs it.

    Raises:
        errors.InvalidatorError: A wheel is missing, the schema has a mistake, or the daemon does not start with it.
    """
    if not schema.is_file():
        raise errors.WrongSettings(f"--live: {schema} is no file; name one with the SQL of your tables.")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Postgres())
        valkey = stack.enter_context(Valkey())
        dsn = server.create_database("rehearsal")
        _load(server, schema)
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        tables = _save(connection)
        client = stack.enter_context(redis.Redis.from_url(valkey.url))
        daemon = stack.enter_context(DaemonProcess(dsn, valkey.url, path, {"CDC_LOG_KEYS": "raw"}))
        daemon.wait_until_ready()
        runner = _TestRunner(connection, client, daemon, rules, tables)
        for test in rules.tests:
            yield runner.run(test)


# The database, and the rows of the schema file


def _load(server: Postgres, schema: Path) -> None:
    environment = plain_environment() | {
        "PGHOST": HOST,
        "PGPORT": str(server.port),
        "PGUSER": server.user,
        "PGPASSWORD": server.password,
        "PGDATABASE": "rehearsal",
    }
    psql = str(server.bin_dir / "psql")
    command = [psql, "-X", "-q", "-o", "/dev/null", "-v", "ON_ERROR_STOP=1", "-f", str(schema)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if ran.returncode != 0:
        raise errors.InvalidatorError(f"{schema} can't be loaded; correct it. psql said:\n{ran.stderr.strip()}")


class _SavedTable(NamedTuple):
    """A table, the copy of its rows, and those of its columns that are not generated."""

    table: sql.Identifier
    copy: sql.Identifier
    columns: sql.Composable


def _save(connection: Connection) -> list[_SavedTable]:
    """Copy the rows of all tables."""
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(_SAVED)))
    tables = []
    for number, (schema, name, columns) in enumerate(connection.execute(_TABLES).fetchall()):
        table, copy = sql.Identifier(schema, name), sql.Identifier(_SAVED, f"t{number}")
        connection.execute(sql.SQL("CREATE TABLE {} AS TABLE {}").format(copy, table))
        tables.append(_SavedTable(table, copy, sql.SQL(", ").join(map(sql.Identifier, columns))))
    return tables


_TABLES = """
SELECT n.nspname, c.relname, array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated = '')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
    AND a.attnum > 0 AND NOT a.attisdropped
GROUP BY n.nspname, c.relname ORDER BY n.nspname, c.relname
"""


class _TestRunner:
    """Runs one test after the other on the same servers and daemon."""

    def __init__(
        self,
        connection: Connection,
        client: redis.Redis,
        daemon: DaemonProcess,
        rules: RuleSet,
        tables: Sequence[_SavedTable],
    ) -> None:
        self._connection = connection
        self._client = client
        self._daemon = daemon
        self._rules = rules
        self._tables = tables

    def run(self, test: Test) -> TestResult:
        """Run one test."""
        try:
            self._prepare(test)
        except psycopg.Error as error:
            return compare(test, (), [f"the old row can't be stored: {first_line(error)}"])
        self._daemon.settle(SETTLE_SECONDS)
        keys, versions = self._named(test)
        self._client.mset(dict.fromkeys(keys, "old") | dict.fromkeys(versions, VERSION) | {_SAVED: ""})
        try:
            xid, rows = self._change(test)
        except psycopg.Error as error:
            return compare(test, (), [f"the change can't be made: {first_line(error)}"])
        self._daemon.settle(SETTLE_SECONDS)
        faults = [] if rows else ["the change finds no row; a trigger or a rule of the database may be the cause"]
        logged = list(self._logged(xid))
        found = [*logged, *(bust for bust in self._seen(keys, versions) if bust not in logged)]
        self._client.delete(_SAVED, *keys, *versions)
        return compare(test, found, faults)

    # PostgreSQL: the rows before the change, and the change

    def _prepare(self, test: Test) -> None:
        with self._connection.transaction():
            # No triggers and no foreign keys while the rows before the change are stored.
            self._connection.execute("SET LOCAL session_replication_role = replica")
            if self._tables:
                names = sql.SQL(", ").join(table for table, _, _ in self._tables)
                self._connection.execute(sql.SQL("TRUNCATE {}").format(names))
            for table, copy, columns in self._tables:
                self._connection.execute(_RESTORE.format(table=table, columns=columns, copy=copy))
            if test.old is not None:
                where = self._where(test, test.old)
                self._connection.execute(_DELETE.format(table=_identifier(test), where=where))
                self._connection.execute(_insert(test, test.old))

    def _change(self, test: Test) -> tuple[int, int]:
        """Execute the change; return its transaction's id (32 bits) and the number of rows it found."""
        table, old, new = _identifier(test), test.old or {}, test.new or {}
        statement: sql.Composed
        if test.op == "insert":
            statement = _insert(test, new)
        elif test.op == "truncate":
            statement = sql.SQL("TRUNCATE {}").format(table)
        elif test.op == "delete":
            statement = _DELETE.format(table=table, where=self._where(test, old))
        else:
            statement = _UPDATE.format(table=table, pairs=_pairs(old, new), where=self._where(test, old))
        with self._connection.transaction():
            rows = self._connection.execute(statement).rowcount
            found = self._connection.execute("SELECT pg_current_xact_id()::text").fetchone()
        assert found
        return int(found[0]) & 0xFFFFFFFF, rows

    def _where(self, test: Test, row: Row) -> sql.Composable:
        """Return the condition that finds a row: by its primary key, or else by all given columns."""
        found = self._connection.execute(_KEY, [str(test.table)]).fetchone()
        key = [name for name in (found[0] if found else None) or () if name in row]
        complete = found is not None and found[0] is not None and len(key) == len(found[0])
        names = key if complete else list(row)
        same = (sql.SQL("{} IS NOT DISTINCT FROM {}").format(sql.Identifier(n), _value(row[n])) for n in names)
        return sql.SQL(" AND ").join(same) if names else sql.SQL("true")

    # Valkey: the keys before the change, and after

    def _named(self, test: Test) -> tuple[dict[str, str], dict[str, str]]:
        """Return the keys and the versions' keys that test and rules name, each with its bust as tests write it."""
        change = Change(test.table, test.op, test.old, test.new, test.types)
        given = [str(bust) for verdict in simulate(self._rules, change, test.via) for bust in verdict.busts]
        keys: dict[str, str] = {}
        versions: dict[str, str] = {}
        for bust in dict.fromkeys([*test.busts, *given]):
            if bust.startswith("bump "):
                versions[bust.removeprefix("bump ")] = bust
            elif not bust.startswith("sweep "):
                keys[bust.replace("{version}", VERSION)] = bust
                # A cache with `bump_over` deletes keys under the current version, so the version must exist.
                found = [reading.version_key for reading in read_key(self._rules, bust)]
                versions |= {name: f"bump {name}" for name in found if name is not None and name not in versions}
        return keys, versions

    def _logged(self, xid: int) -> Iterator[str]:
        """Return the busts of a transaction that the daemon has logged, as tests write them."""
        for event in self._daemon.events:
            if event.get("event") != "bust" or event.get("xid") != xid:
                continue
            if event["action"] == "sweep":
                yield f"sweep {event['cache']}"
            for key in event.get("raw_keys", ()):
                key_of = {"bump": f"bump {key}", "search": f"{key}*"}
                yield key_of.get(event["action"], key.replace(VERSION, "{version}"))
        self._daemon.events.clear()

    def _seen(self, keys: dict[str, str], versions: dict[str, str]) -> Iterable[str]:
        """Return the busts that the keys in Valkey show."""
        gone = [bust for key, bust in keys.items() if not self._client.exists(key)]
        bumped = [bust for key, bust in versions.items() if self._client.get(key) != VERSION.encode()]
        return gone + bumped


# SQL of rows


_RESTORE = sql.SQL("INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {copy}")
_DELETE = sql.SQL("DELETE FROM {table} WHERE {where}")
_UPDATE = sql.SQL("UPDATE {table} SET {pairs} WHERE {where}")
_INSERT = sql.SQL("INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE VALUES ({values})")
_KEY = """
SELECT array_agg(a.attname::text) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary AND a.attnum = ANY (i.indkey)
"""


def _identifier(test: Test) -> sql.Identifier:
    return sql.Identifier(test.table.schema, test.table.name)


def _value(value: str | None) -> sql.Composable:
    """Return a literal that takes the type of its column."""
    return sql.SQL("NULL") if value is None else sql.Literal(value)


def _pairs(old: Row, new: Row) -> sql.Composable:
    """Return the SET list of an UPDATE: the columns that differ, or one set to itself; not every column can be set."""
    values = {**dict.fromkeys(old), **new}
    changed = {name: value for name, value in values.items() if name not in old or old[name] != value}
    if not changed:
        same = [sql.SQL("{0} = {0}").format(sql.Identifier(name)) for name in values]
        return same[-1] if same else sql.SQL("")
    pairs = (sql.SQL("{} = {}").format(sql.Identifier(name), _value(value)) for name, value in changed.items())
    return sql.SQL(", ").join(pairs)


def _insert(test: Test, row: Row) -> sql.Composed:
    columns = sql.SQL(", ").join(map(sql.Identifier, row))
    values = sql.SQL(", ").join(map(_value, row.values()))
    return _INSERT.format(table=_identifier(test), columns=columns, values=values)
