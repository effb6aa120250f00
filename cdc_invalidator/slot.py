"""The edge to PostgreSQL's catalogs: slot, publication, replica identities. What is missing, made or refused.

Promise 4 holds here: a table is published only with a replica identity that PostgreSQL can use, because publishing it
without one makes the application's UPDATE and DELETE fail. Statements wait for locks only briefly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import namedtuple_row

from cdc_invalidator import errors, lsn
from cdc_invalidator.errors import Problem
from cdc_invalidator.rules import Rule, RuleSet, Table

# A server that vanished without a word is noticed in half a minute, not in two hours.
KEEPALIVES: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_OPTIONS = "-c statement_timeout=30s -c lock_timeout=2s -c idle_in_transaction_session_timeout=30s"

# What never gets better by itself; the remedy is an administrator's.
_REMEDIES: dict[str, str] = {
    "42501": "grant the role of CDC_POSTGRES_DSN the privilege, or run what `cdc-invalidator setup --print` prints",
    "28P01": "put the right user and password into CDC_POSTGRES_DSN",
    "28000": "allow the role in pg_hba.conf and give it LOGIN and REPLICATION",
    "3D000": "put the name of an existing database into CDC_POSTGRES_DSN",
    "53400": "raise max_replication_slots, or drop a slot that nobody uses",
    "0A000": "use PostgreSQL 14 or later with logical replication",
}


class Identity(NamedTuple):
    """One published table (a partition, where the rule names a partitioned one) and what its old rows carry."""

    table: Table
    kind: str
    columns: frozenset[str]
    generated: frozenset[str]
    carried: frozenset[str]
    usable: bool


class State(NamedTuple):
    """The slot's row in pg_replication_slots."""

    active: bool
    confirmed: int
    wal_status: str
    retained: int


class Activity(NamedTuple):
    """The database's own transaction counters, from pg_stat_database."""

    commits: int
    rollbacks: int


@dataclass(slots=True)
class Missing:
    """What must be made before the stream can carry what the rules read.

    ``unknown``: tables of rules that don't exist (yet); ``added``: tables that the publication lacks; ``statements``:
    SQL that an owner of the tables and of the database can run, in order.
    """

    unknown: list[Table] = field(default_factory=list)
    added: list[Table] = field(default_factory=list)
    slot: bool = False
    statements: list[str] = field(default_factory=list)


async def connect(dsn: str, application: str) -> psycopg.AsyncConnection[Any]:
    """Open an ordinary connection that shows itself under this name and never waits long for a lock."""
    with translated():
        return await psycopg.AsyncConnection.connect(
            dsn,
            autocommit=True,
            application_name=application,
            options=_OPTIONS,
            row_factory=namedtuple_row,
            **KEEPALIVES,
        )


class Catalog:
    """One ordinary connection to the database of the stream.

    Args:
        connection: opened by `open`.
        name: the slot.
        publication: the publication.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], name: str, publication: str) -> None:
        self._connection = connection
        self._slot = name
        self._publication = publication

    @classmethod
    async def open(cls, dsn: str, name: str, publication: str) -> Catalog:
        """Connect."""
        return cls(await connect(dsn, "cdc-invalidator catalog"), name, publication)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()

    async def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with translated():
            cursor = await self._connection.execute(query, parameters)
            return await cursor.fetchall()

    async def check_server(self) -> None:
        """Refuse a server that can't decode.

        Raises:
            errors.ServerRefuses: with what must be set.
        """
        (row,) = await self._rows(
            "SELECT current_setting('server_version_num')::int AS version, current_setting('wal_level') AS wal_level"
        )
        if row.version < 140000:
            raise errors.ServerRefuses(f"PostgreSQL {row.version // 10000} can't be used; run PostgreSQL 14 or later.")
        if row.wal_level != "logical":
            raise errors.ServerRefuses(f"wal_level is {row.wal_level}; set wal_level = logical and restart PostgreSQL.")

    async def identities(self, table: Table) -> list[Identity]:
        """Give the table, or its leaves if it is partitioned; empty if it does not exist."""
        rows = await self._rows(_IDENTITIES, [table.schema, table.name])
        return [
            Identity(
                Table(row.schema, row.name),
                row.kind if row.persistence == "p" else row.persistence,
                frozenset(row.columns),
                frozenset(row.generated),
                frozenset(row.carried),
                row.usable,
            )
            for row in rows
        ]

    async def missing(self, rules: RuleSet) -> Missing:
        """Compare the rules with the database.

        Raises:
            errors.WrongRules: rules that can't be kept on this database, each with its place and the SQL that helps.
        """
        missing = Missing()
        problems: list[Problem] = []
        usable: list[Table] = []
        for table in dict.fromkeys(rule.table for rule in rules.rules):
            identities = await self.identities(table)
            if not identities and not await self._exists(table):
                missing.unknown.append(table)
                continue
            found = _mistakes(table, identities, [rule for rule in rules.rules if rule.table == table])
            problems += found
            if not found:
                usable.append(table)
        if problems:
            raise errors.WrongRules(problems)
        await self._missing_publication(missing, usable)
        if await self.state() is None:
            missing.slot = True
            missing.statements.append(f"SELECT pg_create_logical_replication_slot({_literal(self._slot)}, 'pgoutput');")
        return missing

    async def _exists(self, table: Table) -> bool:
        return bool(
            await self._rows(
                "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE n.nspname = %s AND c.relname = %s",
                [table.schema, table.name],
            )
        )

    async def _missing_publication(self, missing: Missing, tables: list[Table]) -> None:
        name = _identifier(self._publication)
        rows = await self._rows(
            "SELECT puballtables AS all_tables, pubviaroot AS via_root,"
            " pubinsert AND pubupdate AND pubdelete AND pubtruncate AS all_operations"
            " FROM pg_publication WHERE pubname = %s",
            [self._publication],
        )
        if not rows:
            missing.added = tables
            listed = f" FOR TABLE {', '.join(map(_table, tables))}" if tables else ""
            missing.statements.append(f"CREATE PUBLICATION {name}{listed};")
            return
        (row,) = rows
        if row.via_root or not row.all_operations:
            missing.statements.append(
                f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate',"
                " publish_via_partition_root = false);"
            )
        if row.all_tables:
            return
        published = {Table(*pair) for pair in await self._published()}
        for table in tables:
            leaves = {identity.table for identity in await self.identities(table)}
            if table not in published and not (leaves and leaves <= published):
                missing.added.append(table)
        if missing.added:
            missing.statements.append(f"ALTER PUBLICATION {name} ADD TABLE {', '.join(map(_table, missing.added))};")

    async def _published(self) -> list[Any]:
        rows = await self._rows(
            "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s"
            " UNION SELECT n.nspname, c.relname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
            " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s",
            [self._publication, self._publication],
        )
        return [tuple(row) for row in rows]

    async def make(self, missing: Missing) -> None:
        """Run the statements.

        Raises:
            errors.ServerRefuses: the role may not; the message holds what an administrator must run.
        """
        for number, statement in enumerate(missing.statements):
            try:
                # Making a slot waits for the transactions that are running, which may take long.
                await self._connection.execute(
                    "SET statement_timeout = 0" if "replication_slot" in statement else "RESET statement_timeout"
                )
                await self._connection.execute(statement.encode())
            except psycopg.errors.DuplicateObject:
                # Another daemon of the same rules was faster.
                continue
            except psycopg.errors.InsufficientPrivilege as error:
                rest = " ".join(missing.statements[number:])
                raise errors.ServerRefuses(
                    f"The role of CDC_POSTGRES_DSN may not set up the stream ({_message(error)}); "
                    f"have an administrator run: {rest}"
                ) from error
            except psycopg.Error as error:
                raise translate(error) from error

    async def drop(self) -> list[str]:
        """Drop slot and publication, if they exist, and give the statements that were run."""
        done = []
        state = await self.state()
        if state is not None and state.active:
            raise errors.ServerRefuses(
                f"Slot {self._slot} is in use; stop the daemons that stream from it, then run teardown again."
            )
        if state is not None:
            done.append(f"SELECT pg_drop_replication_slot({_literal(self._slot)});")
        if await self._rows("SELECT 1 FROM pg_publication WHERE pubname = %s", [self._publication]):
            done.append(f"DROP PUBLICATION {_identifier(self._publication)};")
        with translated():
            for statement in done:
                await self._connection.execute(statement.encode())
        return done

    async def state(self) -> State | None:
        """Look at the slot; ``None`` when there is none of that name in this database.

        Raises:
            errors.ServerRefuses: a slot of that name belongs to something else.
        """
        rows = await self._rows(
            "SELECT active, plugin, database = current_database() AS here, confirmed_flush_lsn::text AS confirmed,"
            " coalesce(wal_status, 'lost') AS wal_status, coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery()"
            " THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn), 0)::bigint AS retained"
            " FROM pg_replication_slots WHERE slot_name = %s",
            [self._slot],
        )
        if not rows:
            return None
        (row,) = rows
        if row.plugin != "pgoutput" or not row.here:
            raise errors.ServerRefuses(
                f"Slot {self._slot} belongs to another database or plugin; set CDC_SLOT to a name of your own."
            )
        return State(row.active, lsn.parse(row.confirmed or "0/0"), row.wal_status, row.retained)

    async def activity(self) -> Activity:
        """Read the database's transaction counters."""
        (row,) = await self._rows(
            "SELECT xact_commit AS commits, xact_rollback AS rollbacks FROM pg_stat_database"
            " WHERE datname = current_database()"
        )
        return Activity(row.commits, row.rollbacks)

    async def ancestors(self, oid: int) -> list[Table]:
        """Give the partitioned tables above a partition, nearest first; empty for any other table."""
        rows = await self._rows(
            "SELECT n.nspname AS schema, c.relname AS name FROM pg_partition_ancestors(%s) a"
            " JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid <> %s",
            [oid, oid],
        )
        return [Table(row.schema, row.name) for row in rows]


# relkind r: plain, p: partitioned. A primary key that is deferrable does not serve as replica identity.
_IDENTITIES = """
WITH named AS (
  SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname = %s AND c.relname = %s
), tables AS (
  SELECT t.relid AS oid FROM named, pg_partition_tree(named.oid) t WHERE t.isleaf
  UNION SELECT named.oid FROM named JOIN pg_class c USING (oid) WHERE c.relkind <> 'p'
)
SELECT n.nspname AS schema, c.relname AS name, c.relkind::text AS kind, c.relpersistence::text AS persistence,
  ARRAY(SELECT attname::text FROM pg_attribute a WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
  ARRAY(SELECT attname::text FROM pg_attribute a
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated <> '') AS generated,
  CASE c.relreplident
    WHEN 'f' THEN ARRAY(SELECT attname::text FROM pg_attribute a
                        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
    WHEN 'n' THEN '{}'
    ELSE ARRAY(SELECT attname::text FROM pg_attribute a WHERE attrelid = c.oid
               AND attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])) END AS carried,
  c.relreplident = 'f' OR (c.relreplident <> 'n' AND i.indexrelid IS NOT NULL) AS usable
FROM tables JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
  AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
ORDER BY 1, 2
"""

_NOT_TABLES = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "u": "an unlogged table",
    "t": "a temporary table",
    "S": "a sequence",
}


def _mistakes(table: Table, identities: list[Identity], rules: Sequence[Rule]) -> list[Problem]:
    problems: list[Problem] = []

    def add(rule: Rule, sentence: str) -> None:
        problems.append(Problem(rule.place.file, rule.place.line, rule.place.column, sentence))

    for identity in identities:
        name = _table(identity.table)
        if identity.kind in _NOT_TABLES:
            add(
                rules[0],
                f"{table} is {_NOT_TABLES[identity.kind]}, whose changes PostgreSQL does not publish; name a table.",
            )
            continue
        if not identity.usable:
            add(
                rules[0],
                f"{identity.table} has no usable replica identity, and publishing it would make the application's "
                f"UPDATE and DELETE fail; add a primary key, or run ALTER TABLE {name} REPLICA IDENTITY FULL.",
            )
            continue
        for rule in rules:
            for column in sorted((rule.key_columns | set(rule.columns)) - (identity.columns - identity.generated)):
                add(rule, _no_column(rule, identity, column))
            unknown = _unknown_old(rule, identity)
            if unknown and rule.old_row == "require":
                add(
                    rule,
                    f"rule {rule.name} needs {', '.join(unknown)} of the old row, which the replica identity of "
                    f"{identity.table} does not carry; run ALTER TABLE {name} REPLICA IDENTITY FULL, "
                    "or set old_row to sweep or ignore.",
                )
    return problems


def _no_column(rule: Rule, identity: Identity, column: str) -> str:
    if column in identity.generated:
        return (
            f"rule {rule.name} reads column {column} of {identity.table}, a generated column, "
            "which PostgreSQL does not publish; use the columns that it is generated from."
        )
    near = get_close_matches(column, identity.columns, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(identity.columns))}."
    return f"rule {rule.name} reads column {column}, which {identity.table} does not have; {hint}"


def _unknown_old(rule: Rule, identity: Identity) -> list[str]:
    """Give the key columns whose old values an UPDATE or DELETE of this table does not tell."""
    unknown: set[str] = set()
    if "delete" in rule.on:
        unknown |= rule.key_columns - identity.carried
    if "update" in rule.on:
        unknown |= rule.key_columns - identity.carried - rule.immutable
    return sorted(unknown & identity.columns)


def _identifier(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None)


def _table(table: Table) -> str:
    return sql.Identifier(table.schema, table.name).as_string(None)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except (psycopg.Error, OSError) as error:
        raise translate(error) from error


def translate(error: Exception) -> errors.InvalidatorError:
    """Tell what an error of the driver means for the session: come back later, stand by, or give up.

    The server's sentence is kept; connection strings are not part of it.
    """
    state = getattr(error, "sqlstate", None) or ""
    if state == "55006":
        return errors.SlotInUse()
    if state in _REMEDIES:
        return errors.ServerRefuses(f"PostgreSQL refuses ({_message(error)}); {_REMEDIES[state]}.")
    # Before a session exists, psycopg gives no SQLSTATE: the server's words must do.
    if "password authentication failed" in str(error) or "no pg_hba.conf entry" in str(error):
        return errors.ServerRefuses(f"PostgreSQL refuses ({_message(error)}); {_REMEDIES['28000']}.")
    return errors.PostgresUnavailable(
        f"PostgreSQL is not available ({_message(error)}); check CDC_POSTGRES_DSN and the server."
    )


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
