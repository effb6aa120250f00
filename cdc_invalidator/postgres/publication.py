"""The edge to the publication: which tables the stream carries, and whether their old rows carry what rules read.

Promise 4 holds here: a table is published only with a replica identity that PostgreSQL can use, because publishing it
without one makes the application's UPDATE and DELETE fail; and it is taken out again when it loses that. Statements
wait for locks only briefly, and none of them blocks reads or writes. A look at the catalogs takes no lock on a table,
so that nobody who has locked one keeps the daemon from the others.
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
        name: the publication's.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], name: str) -> None:
        self._connection = connection
        self._name = name
        self._surveyor = Surveyor(connection, name)

    async def survey(self, rules: RuleSet) -> Survey:
        """Look at the publication and at the tables of the rules; the same object while nothing has changed."""
        return await self._surveyor.survey(rules)

    async def filled(self, oids: Sequence[int]) -> set[int]:
        """Give those of these tables that take any space, or may: one that is locked is not waited for long."""
        if not oids:
            return set()
        try:
            return {row.oid for row in await rows(self._connection, _FILLED, {"oids": oids})}
        except errors.Locked:
            return set(oids)

    def statements(self, survey: Survey) -> list[str]:
        """Give the SQL that makes the publication what it must be; it takes an owner of the database and the tables."""
        name = identifier(self._name)
        # Without ONLY, PostgreSQL would publish the tables that inherit from it as well. A partitioned one has no rows.
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
        # One by one: what fails for one of them must not keep the others in or out.
        return statements + self.removals(survey) + [f"ALTER PUBLICATION {name} ADD TABLE {table};" for table in add]

    def removals(self, survey: Survey) -> list[str]:
        """Give the SQL that takes out the tables that must not be published."""
        # Without ONLY, PostgreSQL would look for the tables that inherit from it, and not find them.
        return [
            f"ALTER PUBLICATION {identifier(self._name)} DROP TABLE ONLY {qualified(table)};"
            for table in survey.harmful
        ]

    async def drop(self) -> list[str]:
        """Drop the publication if it is there, and give what was run."""
        if not await rows(self._connection, _EXISTS, {"publication": self._name}):
            return []
        statements = [f"DROP PUBLICATION {identifier(self._name)};"]
        await run(self._connection, statements)
        return statements

    async def ancestors(self, oid: int) -> list[Table]:
        """Return the partitioned tables above a partition, nearest first; empty for any other table."""
        return await ancestors(self._connection, oid)


async def run(connection: psycopg.AsyncConnection[Any], statements: Sequence[str]) -> None:
    """Run set-up statements one after the other.

    Raises:
        errors.ServerRefuses: the role may not; the message holds what an administrator must run.
        errors.Locked: a lock was not to be had for one of them; all others have been run.
    """
    locked: psycopg.errors.LockNotAvailable | None = None
    for number, statement in enumerate(statements):
        # Making a slot waits for the transactions that are running, which may take long.
        slow = "create_logical_replication_slot" in statement
        try:
            await connection.execute(ENDLESS if slow else PATIENCE)
            await connection.execute(statement.encode())
        except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedObject):
            # Another daemon of the same rules was faster, or an administrator.
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
    """Run set-up statements and take them all back, to know whether the role may.

    Raises:
        errors.ServerRefuses: as of `run`.
    """
    for number, statement in enumerate(statements):
        try:
            async with connection.transaction(force_rollback=True):
                await connection.execute(statement.encode())
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
            raise _may_not(error, statements[number:]) from error
        except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedObject, psycopg.errors.LockNotAvailable):
            # What does not come of the role is `run`'s to deal with.
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
