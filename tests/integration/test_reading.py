"""A `via` query may only read, on each PostgreSQL, and nothing of it is left in its session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import execute

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs
from cdc_invalidator.pipeline.ask import Asker
from cdc_invalidator.pipeline.batch import Target
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.reading import array
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.packed import join_arguments
from cdc_invalidator.rules.sql import not_only_a_select

if TYPE_CHECKING:
    from collections.abc import Iterator

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{key}", ttl: 5m}
rules:
  - {name: asks, table: public.things, bust: [thing: {via: "%s"}]}
"""
FUNCTIONS = """
CREATE FUNCTION lift(id int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_config('statement_timeout', '0', false), set_config('default_transaction_read_only', 'off', false),
    set_config('row_security', 'on', false);
  RETURN id;
END $$;
CREATE FUNCTION limits(id int) RETURNS text LANGUAGE sql AS $$
  SELECT current_setting('statement_timeout') || ' ' || current_setting('transaction_read_only') || ' '
    || current_setting('default_transaction_read_only') || ' ' || current_setting('row_security')
$$;
CREATE FUNCTION writes(id int) RETURNS text LANGUAGE sql AS $$ INSERT INTO things VALUES (id) RETURNING 'x' $$;
CREATE FUNCTION lifts_and_writes(id int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_config('transaction_read_only', 'off', true);
  INSERT INTO things VALUES (id);
  RETURN id;
END $$;
CREATE FUNCTION counts(id int) RETURNS text LANGUAGE sql AS $$ SELECT nextval('numbers')::text $$;
"""
# PostgreSQL calls them volatile, but they harm nobody, or can't be called in a query.
HARMLESS = {
    *("array_sample", "array_shuffle", "clock_timestamp", "currval", "lastval", "gen_random_uuid", "random"),
    *("random_normal", "setseed", "timeofday", "uuidv4", "uuidv7", "bernoulli", "system", "amvalidate"),
    *("dsnowball_init", "dsnowball_lexize", "heap_tableam_handler", "unique_key_recheck"),
    *("tsvector_update_trigger", "tsvector_update_trigger_column", "suppress_redundant_updates_trigger"),
    *("plpgsql_call_handler", "plpgsql_inline_handler", "plpgsql_validator"),
}


@pytest.fixture(params=postgres_bin_dirs().items(), ids=lambda found: f"postgresql {found[0]}", scope="module")
def dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    with Postgres(bin_dir=request.param[1]) as server:
        execute(server.dsn, "CREATE TABLE things (id int PRIMARY KEY)", "CREATE SEQUENCE numbers", FUNCTIONS)
        yield server.dsn


def target(query: str) -> Target:
    (rule,) = parse_rules([("rules.yaml", RULES % query)], {}).rules
    return Target(rule.name, rule.busts[0].cache, str(rule.table), rule.busts[0])


class Questions:
    """Asks queries one after the other on one connection."""

    def __init__(self, dsn: str) -> None:
        self.asker = Asker(DsnSource.fixed(dsn), lambda _: None)

    async def ask(self, query: str, *values: bytes | None) -> list[bytes]:
        arguments = [join_arguments([value]) for value in values or (b"7",)]
        answer = await self.asker.ask_twice(target(query), arguments)
        return [key for argument in arguments for key in answer.get(argument, [])]

    async def refused(self, query: str) -> str:
        with pytest.raises(errors.InvalidatorError) as refused:
            await self.ask(query)
        return str(refused.value)


@pytest.fixture
def questions(dsn: str) -> Iterator[Questions]:
    made = Questions(dsn)
    yield made
    made.asker.close()


async def test_what_a_query_sets_is_over_with_it(questions: Questions) -> None:
    assert await questions.ask("SELECT limits({id}) AS key") == [b"t:thing:10s on on off"]
    assert await questions.ask("SELECT lift({id}) AS key") == [b"t:thing:7"]
    assert await questions.ask("SELECT limits({id}) AS key") == [b"t:thing:10s on on off"]


@pytest.mark.parametrize("function", ["writes", "lifts_and_writes", "counts"])
async def test_no_query_writes_whatever_its_functions_set(dsn: str, questions: Questions, function: str) -> None:
    await questions.ask("SELECT lift({id}) AS key")
    assert "read" in await questions.refused(f"SELECT {function}({{id}}) AS key")
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*) FROM things").fetchone() == (0,)
        assert connection.execute("SELECT is_called FROM numbers").fetchone() == (False,)


async def test_a_query_works_again_after_one_that_failed(questions: Questions) -> None:
    assert "division by zero" in await questions.refused("SELECT 1 / ({id} - 7) AS key")
    assert await questions.ask("SELECT {id} + 1 AS key") == [b"t:thing:8"]
    assert await questions.ask("SELECT {id} + 1 AS key", b"8", b"1") == [b"t:thing:9", b"t:thing:2"]


async def test_rows_that_are_too_large_end_before_they_fill_the_memory(questions: Questions) -> None:
    query = "SELECT repeat('x', 1000000) AS key FROM generate_series(1, {rows})"
    assert "larger than 64 MB" in await questions.refused(query.format(rows=100))
    assert len(await questions.ask(query.format(rows=2))) == 2


async def test_values_arrive_as_they_are(questions: Questions) -> None:
    odd = ["", "NULL", "null", 'a"b', "a\\b", "{a,b}", "é☃", "a\nb", " blanks ", "%s $1"]
    found = await questions.ask("SELECT {name} AS key", *(each.encode() for each in odd), None)
    assert found == [b"t:thing:" + each.encode() for each in odd]


def test_functions_that_postgresql_calls_volatile_are_refused_unless_they_harm_nobody(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        found: list[Any] = connection.execute(
            "SELECT DISTINCT proname FROM pg_proc WHERE provolatile = 'v' AND pronamespace = 'pg_catalog'::regnamespace"
            " AND prorettype NOT IN ('trigger'::regtype, 'index_am_handler'::regtype)"
        ).fetchall()
    assert len(found) > 150
    allowed = {name for (name,) in found if not_only_a_select([f"SELECT {name}(1)"]) is None}
    assert allowed <= HARMLESS


def test_an_array_is_written_as_postgresql_reads_it(dsn: str) -> None:
    values = [b"a", None, b'"', b"\\", b"", b"NULL", b"{,}"]
    with psycopg.connect(dsn) as connection:
        ((found,),) = connection.execute("SELECT %s::text::text[]", [array(values).decode()]).fetchall()
    assert found == [None if value is None else value.decode() for value in values]


def test_what_is_refused_is_told_with_its_place() -> None:
    for query, why in {
        "SELECT {id} AS key, pg_sleep(600) AS x": "calls pg_sleep(), which may do more than read",
        "SELECT {id} AS key, set_config('statement_timeout', '0', false)": "calls set_config()",
        "SELECT {id} AS key, pg_create_logical_replication_slot('evil', 'pgoutput')": "calls pg_create_logical_",
        "SELECT {id} AS key) AS x, (SELECT 1": "has a `)` that ends it",
    }.items():
        with pytest.raises(errors.WrongRules) as refused:
            parse_rules([("rules.yaml", RULES % query)], {})
        (problem,) = refused.value.problems
        assert problem.line == 6
        assert why in problem.sentence
