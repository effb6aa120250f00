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
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.connection import ENDLESS, first_line, limited, rows, translate
from cdc_invalidator.postgres.queries import ancestors
from cdc_invalidator.postgres.quoting import identifier
from cdc_invalidator.postgres.survey import Leaf, Survey, Surveyor
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

    async def carries(self, oid: int) -> bool:
        """Return whether it carries the table with this OID, as it is now; False if there is none."""
        return await self._surveyor.carries(oid)

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
        add = [(table, state.partitioned) for table in survey.unpublished if (state := survey.tables[table])]
        if not survey.exists:
            tables = [remedies.published(table, partitioned=partitioned) for table, partitioned in add]
            return [remedies.make_publication(self._name, tables, stores=survey.stores)]
        # One by one, so that a failure of one does not stop the others.
        return (
            self.removals(survey)
            + self.options(survey)
            + [remedies.add_table(self._name, table, partitioned=partitioned) for table, partitioned in add]
        )

    def options(self, survey: Survey) -> list[str]:
        """Return the SQL that makes the publication hide nothing, at most one statement."""
        # While it does not publish UPDATE or DELETE, it may carry tables without an identity.
        all_ops = not (survey.all_ops or survey.harmful or survey.bystanders)
        if all_ops or survey.via_root or survey.awaits_stored:
            return [remedies.set_options(self._name, all_ops=all_ops, stored=survey.awaits_stored)]
        return []

    def removals(self, survey: Survey) -> list[str]:
        """Return the SQL that takes out the tables that must not be published."""
        return [remedies.remove_table(self._name, table) for table in survey.harmful]

    async def bystanders(self) -> list[Leaf]:
        """See `Surveyor.bystanders`."""
        return await self._surveyor.bystanders()

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
        try:
            # Creating a slot waits for all running transactions, which may take long.
            if "create_logical_replication_slot" in statement:
                async with connection.transaction():
                    await connection.execute(
                        "; ".join(f"SET LOCAL {name} = {value}" for name, value in ENDLESS.items()).encode()
                    )
                    await connection.execute(statement.encode())
            else:
                with limited(connection):
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
    if locked is not None:
        raise translate(locked) from locked


async def rehearse(connection: psycopg.AsyncConnection[Any], statements: Sequence[str]) -> None:
    """Run set-up statements and roll them all back, to learn whether the role has the privileges.

    Raises:
        errors.ServerRefuses: as in `run_statements`.
    """
    for number, statement in enumerate(statements):
        try:
            with limited(connection):
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
