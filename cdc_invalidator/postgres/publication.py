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
from cdc_invalidator.postgres.connection import ENDLESS, PATIENCE, first_line, translate, translated
from cdc_invalidator.postgres.survey import Leaf, Survey, TableState, identifier, quoted
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
        self._last: tuple[object, Survey] | None = None

    async def survey(self, rules: RuleSet) -> Survey:
        """Look at the publication and at the tables of the rules; the same object while nothing has changed."""
        tables = rules.tables
        # PostgreSQL 14 publishes no schemas.
        schemas = _SCHEMAS if self._connection.info.server_version >= 150000 else ""
        of_roots = _ROOTS.format(carriers=_CARRIERS.format(table="roots", schemas=schemas))
        of_leaves = _LEAVES.format(
            usable=_USABLE, identity=_IDENTITY, carriers=_CARRIERS.format(table="tree", schemas=schemas)
        )
        given = {
            "publication": self._name,
            "schemas": [table.schema for table in tables],
            "names": [table.name for table in tables],
        }
        with translated():
            publications = await (await self._connection.execute(_PUBLICATION, given)).fetchall()
            roots = await (await self._connection.execute((_KIN + of_roots).encode(), given)).fetchall()
            leaves = await (await self._connection.execute((_KIN + of_leaves).encode(), given)).fetchall()
            harmed = await (await self._connection.execute(_WITHOUT_IDENTITY, given)).fetchall()
        seen = (tables, publications, roots, leaves, harmed)
        if self._last is not None and self._last[0] == seen:
            return self._last[1]
        states: dict[Table, TableState | None] = dict.fromkeys(tables)
        for row in roots:
            states[Table(row.schema, row.name)] = TableState(
                row.oid, row.partitioned, row.keyed, row.parent, row.listed, tuple(row.carriers)
            )
        for row in leaves:
            state = states[Table(row.root_schema, row.root_name)]
            if state is not None:
                state.leaves.append(_leaf(row))
        suits = bool(publications) and publications[0].suits
        survey = Survey(bool(publications), suits, states, [Table(row.schema, row.name) for row in harmed])
        self._last = seen, survey
        return survey

    async def filled(self, oids: Sequence[int]) -> set[int]:
        """Give those of these tables that take any space, or may: one that is locked is not waited for long."""
        if not oids:
            return set()
        try:
            with translated():
                cursor = await self._connection.execute(_FILLED, {"oids": oids})
                return {row.oid for row in await cursor.fetchall()}
        except errors.Locked:
            return set(oids)

    def statements(self, survey: Survey) -> list[str]:
        """Give the SQL that makes the publication what it must be; it takes an owner of the database and the tables."""
        name = identifier(self._name)
        # Without ONLY, PostgreSQL would publish the tables that inherit from it as well. A partitioned one has no rows.
        add = [
            quoted(table) if (state := survey.tables[table]) and state.partitioned else f"ONLY {quoted(table)}"
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
            f"ALTER PUBLICATION {identifier(self._name)} DROP TABLE ONLY {quoted(table)};" for table in survey.harmful
        ]

    async def drop(self) -> list[str]:
        """Drop the publication if it is there, and give what was run."""
        with translated():
            found = await self._connection.execute(_PUBLICATION, {"publication": self._name})
            if not await found.fetchall():
                return []
        statements = [f"DROP PUBLICATION {identifier(self._name)};"]
        await run(self._connection, statements)
        return statements

    async def ancestors(self, oid: int) -> list[Table]:
        """Give the partitioned tables above a partition, nearest first; empty for any other table."""
        with translated():
            cursor = await self._connection.execute(_ANCESTORS, {"oid": oid})
            return [Table(row.schema, row.name) for row in await cursor.fetchall()]


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


_PUBLICATION = """
SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate AND NOT pubviaroot AS suits
FROM pg_publication WHERE pubname = %(publication)s
"""

# No function that looks at a table itself (pg_publication_tables, pg_partition_tree, pg_relation_size): it would wait
# for whoever has locked that table.
_KIN = """
WITH RECURSIVE publication AS (
  SELECT oid, puballtables FROM pg_publication WHERE pubname = %(publication)s
), roots AS (
  SELECT n.nspname AS schema, c.relname AS name, c.oid, c.relkind
  FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
), tree (schema, name, oid, relkind) AS (
  SELECT schema, name, oid, relkind FROM roots
  UNION ALL
  SELECT tree.schema, tree.name, c.oid, c.relkind FROM tree
  JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid
  WHERE tree.relkind = 'p'
)
"""

# What of the publication carries a table: it or a table above it, its schema, all tables. One look-up in an index for
# each table: joined as a whole, the planner would compare each table with each, every three seconds.
# The two columns of `limited` came with PostgreSQL 15. A filter on a root holds for its partitions.
_CARRIERS = """
LEFT JOIN LATERAL (
  SELECT array_agg(DISTINCT entries.oid) AS oids, bool_or(entries.limited) AS limited
  FROM (SELECT {table}.oid UNION SELECT above.relid FROM pg_partition_ancestors({table}.oid) above) AS kin (oid)
  CROSS JOIN LATERAL (
    SELECT r.oid, coalesce(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL AS limited
    FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = kin.oid
    UNION ALL
    SELECT p.oid, false FROM publication p WHERE p.puballtables
    {schemas}
  ) AS entries
) AS carriers ON true
"""

_SCHEMAS = """UNION ALL
    SELECT s.oid, false FROM publication p JOIN pg_publication_namespace s ON s.pnpubid = p.oid
    JOIN pg_class c ON c.oid = kin.oid AND c.relnamespace = s.pnnspid"""

_ROOTS = """
SELECT schema, name, oid, relkind = 'p' AS partitioned,
  EXISTS (SELECT FROM pg_index i WHERE i.indrelid = roots.oid AND i.indisprimary AND i.indimmediate) AS keyed,
  relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = roots.oid) AS parent,
  EXISTS (SELECT FROM publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = roots.oid) AS listed,
  coalesce(carriers.oids, '{{}}') AS carriers
FROM roots {carriers}
"""

# A primary key that is deferrable does not serve as replica identity.
_IDENTITY = """
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
  AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
"""
# From PostgreSQL 18 on, an identity must not contain a generated column, which the publication does not have.
_USABLE = """(
  (c.relreplident = 'f' OR (c.relreplident <> 'n' AND i.indexrelid IS NOT NULL))
  AND NOT (current_setting('server_version_num')::int >= 180000 AND EXISTS (
    SELECT FROM pg_attribute g WHERE g.attrelid = c.oid AND g.attnum > 0 AND NOT g.attisdropped
      AND g.attgenerated <> '' AND (c.relreplident = 'f' OR g.attnum = ANY (i.indkey::int2[]))
  ))
)"""

# Of an index, INCLUDEd columns are not part of the identity.
_LEAVES = """
SELECT tree.schema AS root_schema, tree.name AS root_name, n.nspname AS schema, c.relname AS name, c.oid,
  CASE c.relpersistence WHEN 'p' THEN c.relkind ELSE c.relpersistence END::text AS kind,
  ARRAY(SELECT attname::text FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
  ARRAY(SELECT attname::text FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated <> '') AS generated,
  CASE c.relreplident
    WHEN 'f' THEN ARRAY(SELECT attname::text FROM pg_attribute
                        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
    WHEN 'n' THEN '{{}}'
    ELSE ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid
               AND attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])) END AS carried,
  {usable} AS usable,
  coalesce(carriers.oids, '{{}}') AS carriers,
  coalesce(carriers.limited, false) AS limited
FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
{identity} {carriers}
WHERE tree.relkind <> 'p'
ORDER BY 1, 2, 3, 4
"""

_WITHOUT_IDENTITY = f"""
WITH RECURSIVE tree (root, oid) AS (
  SELECT r.prrelid, r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
  WHERE p.pubname = %(publication)s
  UNION ALL
  SELECT tree.root, i.inhrelid FROM tree
  JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'p' JOIN pg_inherits i ON i.inhparent = tree.oid
)
SELECT DISTINCT n.nspname AS schema, root.relname AS name
FROM tree JOIN pg_class root ON root.oid = tree.root JOIN pg_namespace n ON n.oid = root.relnamespace
JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'r' {_IDENTITY}
WHERE NOT {_USABLE}
"""

_FILLED = "SELECT oid FROM pg_class WHERE oid = ANY (%(oids)s::oid[]) AND pg_relation_size(oid) > 0"

_ANCESTORS = """
SELECT n.nspname AS schema, c.relname AS name
FROM pg_partition_ancestors(%(oid)s::oid) WITH ORDINALITY above (oid, nearness)
JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid <> %(oid)s::oid ORDER BY above.nearness
"""


def _leaf(row: Any) -> Leaf:
    return Leaf(
        table=Table(row.schema, row.name),
        oid=row.oid,
        kind=row.kind,
        columns=frozenset(row.columns),
        generated=frozenset(row.generated),
        carried=frozenset(row.carried),
        usable=row.usable,
        carriers=tuple(row.carriers),
        limited=row.limited,
    )
