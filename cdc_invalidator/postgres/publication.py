"""Creates, alters and drops the publication, which says which tables the stream carries.

Promise 4 holds here: a table is published only with a replica identity that PostgreSQL can use, because without one the
application's UPDATE and DELETE fail; a table that loses its identity is taken out. Statements wait for locks only
briefly, and none of them blocks reads or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import ENDLESS, PATIENCE, first_line, rows, translate, translated
from cdc_invalidator.postgres.queries import ancestors
from cdc_invalidator.postgres.quoting import identifier, qualified
from cdc_invalidator.postgres.survey import Survey, Surveyor
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table


class Publication:
    """The publication of one database.

    Args:
        connection: an ordinary one.
        name: the publication's name.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], name: str) -> None:
        self._connection = connection
        self._name = name
        self._surveyor = Surveyor(connection, name)

    async def survey(self, rules: RuleSet) -> Survey:
        """Return the publication and the tables of the rules as they are; the same object while nothing has changed."""
        return await self._surveyor.survey(rules)

    async def filled(self, oids: Sequence[int]) -> set[int]:
        """Return those of these tables that hold data; if a lock prevents the look, all of them."""
        if not oids:
            return set()
        try:
            return {row.oid for row in await rows(self._connection, _FILLED, {"oids": oids})}
        except errors.Locked:
            return set(oids)

    def statements(self, survey: Survey) -> list[str]:
        """Return the SQL that makes the publication fit; it takes an owner of the database and of the tables."""
        name = identifier(self._name)
        # Without ONLY, PostgreSQL would also publish tables that inherit from it. A partitioned table has no rows.
        add = [
            qualified(table) if (state := survey.tables[table]) and state.partitioned else f"ONLY {qualified(table)}"
            for table in survey.unpublished
        ]
        if not survey.exists:
            return [f"CREATE PUBLICATION {name}{' FOR TABLE ' if add else ''}{', '.join(add)};"]
        statements = []
        if not survey.suits:
            statements.append(
                f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate',"
                " publish_via_partition_root = false);"
            )
        # One by one, so that a failure of one does not stop the others.
        return statements + self.removals(survey) + [f"ALTER PUBLICATION {name} ADD TABLE {table};" for table in add]

    def removals(self, survey: Survey) -> list[str]:
        """Return the SQL that takes out the tables that must not be published."""
        # Without ONLY, PostgreSQL would also look for tables that inherit from it, and not find them.
        return [
            f"ALTER PUBLICATION {identifier(self._name)} DROP TABLE ONLY {qualified(table)};"
            for table in survey.harmful
        ]

    async def drop(self) -> list[str]:
        """Drop the publication if it exists, and return the statements that were run."""
        if not await rows(self._connection, _EXISTS, {"publication": self._name}):
            return []
        statements = [f"DROP PUBLICATION {identifier(self._name)};"]
        await run_statements(self._connection, statements)
        return statements

    async def ancestors(self, oid: int) -> list[Table]:
        """Return the partitioned tables above a partition, nearest first; empty for any other table."""
        return await ancestors(self._connection, oid)


async def run_statements(connection: psycopg.AsyncConnection[Any], statements: Sequence[str]) -> None:
    """Run set-up statements one after the other.

    Raises:
        errors.ServerRefuses: the role lacks a privilege; the message says what an administrator must run.
        errors.Locked: one of them did not get a lock in time; all others have been run.
    """
    locked: psycopg.errors.LockNotAvailable | None = None
    for number, statement in enumerate(statements):
        # Creating a slot waits for all running transactions, which may take long.
        slow = "create_logical_replication_slot" in statement
        try:
            await connection.execute(ENDLESS if slow else PATIENCE)
            await connection.execute(statement.encode())
        except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedObject):
            # Another daemon or an administrator was faster.
            continue
        except psycopg.errors.LockNotAvailable as error:
            locked = error
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
            raise _may_not(error, statements[number:]) from error
        except psycopg.Error as error:
            raise translate(error) from error
        finally:
            if slow and connection.pgconn.status == psycopg.pq.ConnStatus.OK:
                with translated():
                    await connection.execute(PATIENCE)
    if locked is not None:
        raise translate(locked) from locked


async def rehearse(connection: psycopg.AsyncConnection[Any], statements: Sequence[str]) -> None:
    """Run set-up statements and roll them all back, to learn whether the role has the privileges.

    Raises:
        errors.ServerRefuses: as in `run_statements`.
    """
    for number, statement in enumerate(statements):
        try:
            async with connection.transaction(force_rollback=True):
                await connection.execute(statement.encode())
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
            raise _may_not(error, statements[number:]) from error
        except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedObject, psycopg.errors.LockNotAvailable):
            # Only privileges matter here; `run_statements` deals with the rest.
            continue
        except psycopg.Error as error:
            raise translate(error) from error


def _may_not(error: psycopg.Error, statements: Sequence[str]) -> errors.ServerRefuses:
    return errors.ServerRefuses(
        f"The stream can't be set up with CDC_POSTGRES_DSN ({first_line(error)}); "
        f"have an administrator run, on the primary: {' '.join(statements)}"
    )


_EXISTS = "SELECT FROM pg_publication WHERE pubname = %(publication)s"

_FILLED = "SELECT oid FROM pg_class WHERE oid = ANY (%(oids)s::oid[]) AND pg_relation_size(oid) > 0"
