"""What the look at the tables, every three seconds, costs the database that it must not hurt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from running import execute

from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.publication import Publication, run_statements
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    import psycopg

# Enough that the planner prefers an index to reading a small catalog whole.
TABLES = 2000


class Explained:
    """A connection that adds up how many rows the plans of its queries have looked at."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.info, self.pgconn = connection.info, connection.pgconn
        self.looked_at = 0.0
        self._connection = connection

    async def execute(self, query: str | bytes, given: dict[str, Any]) -> psycopg.AsyncCursor[Any]:
        text = query if isinstance(query, bytes) else query.encode()
        found = await self._connection.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + text, given)
        (plans,) = await found.fetchall()
        self.looked_at += _rows(plans[0][0]["Plan"])
        return await self._connection.execute(text, given)


def _rows(plan: dict[str, Any]) -> float:
    removed = sum(count for name, count in plan.items() if name.startswith("Rows Removed by"))
    own: float = (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    return own + sum(map(_rows, plan.get("Plans", ())))


async def test_a_table_costs_the_same_among_many_and_nothing_new_is_the_same_survey(database: str) -> None:
    text = "version: 1\ncaches: {thing: {key: 't:thing:{id}', ttl: 1m}}\nrules:\n" + "".join(
        f"  - {{name: r{n}, table: public.things_{n}, bust: [thing]}}\n" for n in range(TABLES)
    )
    rule_set = parse_rules([("rules.yaml", text)], {})
    execute(database, *(f"CREATE TABLE things_{n} (id int PRIMARY KEY)" for n in range(TABLES)))
    async with await connect(DsnSource.fixed(database), "test") as connection:
        publication = Publication(connection, "p")
        await run_statements(connection, publication.statements(await publication.survey(rule_set)))
        explained = Explained(connection)
        survey = await Publication(cast("psycopg.AsyncConnection[Any]", explained), "p").survey(rule_set)
        assert len(survey.published) == TABLES
        assert explained.looked_at < 100 * TABLES
        first = await publication.survey(rule_set)
        assert await publication.survey(rule_set) is first
        await connection.execute("ALTER TABLE things_7 REPLICA IDENTITY NOTHING")
        now = await publication.survey(rule_set)
        assert now is not first
        assert [str(table) for table in now.harmful] == ["public.things_7"]
