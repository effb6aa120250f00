"""Whether a query reads a table, and whether it only reads, by its text alone."""

from __future__ import annotations

import pytest
from rule_texts import parse

from cdc_invalidator.rules.sql import not_only_a_select

RULES = """
version: 1
caches: {c: {key: "c:{x}"}}
rules:
  - name: r
    table: s.t
    bust:
      - c:
          via: |-
            QUERY
"""
NOTHING = [
    "SELECT 'DEVICE' AS x",
    "SELECT {settings} #>> '{{theme,name}}' AS x",
    "SELECT unnest({tags}) AS x",
    "SELECT tag AS x FROM unnest({tags}) AS tag, generate_series(1, 3) n WHERE tag <> 'from t'",
    "SELECT f AS x FROM (VALUES ('json'), ('html')) AS formats (f)",
    "SELECT y AS x FROM LATERAL (SELECT lower({name}) AS y) a JOIN jsonb_array_elements_text({list}) b ON true",
    "SELECT extract(year FROM {at}) AS x, substring({name} FROM 2) /* FROM t */",
    "SELECT {a} AS x WHERE {a} IS DISTINCT FROM {b} -- from t",
    "SELECT pg_catalog.lower({a}) AS x",
]
SOMETHING = [
    "SELECT slug AS x FROM public.tags WHERE id = {id}",
    "SELECT x FROM tags",
    'SELECT x FROM "tags"',
    "SELECT x FROM unnest({tags}) AS tag, public.tags",
    "SELECT x FROM unnest({tags}) AS tag LEFT JOIN public.tags ON true",
    "SELECT (SELECT x FROM t WHERE id = {id}) AS x",
    "SELECT a AS x FROM LATERAL (SELECT 1) q, LATERAL t",
    "WITH q AS (TABLE tags) SELECT x FROM q",
    "SELECT shop.name_of({id}) AS x",
    "SELECT x FROM ONLY t",
]


@pytest.mark.parametrize("query", [*NOTHING, *SOMETHING])
def test_an_expression_has_its_answer_in_the_row_and_so_no_answer_means_nothing(query: str) -> None:
    found = parse(RULES.replace("QUERY", query)).rules[0].busts[0].query
    assert found is not None
    assert found.ignores_empty == (query in NOTHING)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("SELECT 1; DROP TABLE t", "has a `;` that ends it"),
        ("SELECT 1) AS x, (SELECT 2", "has a `)` that ends it"),
        ("SELECT (1", "has a `(` that nothing closes"),
        ("DELETE FROM t", "does not begin with SELECT"),
        ("", "does not begin with SELECT"),
        ("SELECT pg_sleep(1)", "calls pg_sleep()"),
        ("SELECT PG_Sleep (1)", "calls pg_sleep()"),
        ("SELECT pg_catalog . pg_sleep /* x */ -- y\n (1)", "calls pg_sleep()"),
        ('SELECT "pg_catalog"."pg_sleep"(1)', "calls pg_sleep()"),
        ("SELECT extensions.dblink('host=x', 'DELETE FROM t')", "calls dblink()"),
        ("SELECT query_to_xml('SELECT 1', true, true, '')", "calls query_to_xml()"),
        ("SELECT set_config('role', 'x', false)", "calls set_config()"),
        ("SELECT nextval('s')", "calls nextval()"),
        ('SELECT U&"pg\\005fsleep"(1)', 'U&"…"'),
        ("SELECT '/*' || pg_sleep(1) || '*/'", "calls pg_sleep()"),
        ("SELECT 'a''' || pg_sleep(1) || ''", "calls pg_sleep()"),
        ("SELECT E'a\\'' || pg_sleep(1)", "calls pg_sleep()"),
        ("SELECT $$'$$ || pg_sleep(1) || $$'$$", "calls pg_sleep()"),
        ("SELECT a$$b, pg_sleep(1), c$$d FROM t", "calls pg_sleep()"),
        ("SELECT /* /* */ ' */ pg_sleep(1) --'", "has a comment in a comment"),
        ("SELECT E'a'\n'\\' ' || pg_sleep(1) || '", "goes on after E'…'"),
    ],
)
def test_a_query_that_may_do_more_than_read_is_recognized(query: str, why: str) -> None:
    assert why in (not_only_a_select([query]) or "")


@pytest.mark.parametrize(
    "query",
    [
        "VALUES (1)",
        "(SELECT 1) UNION (SELECT 2)",
        "-- which teams\nWITH t AS (SELECT 1 AS x) SELECT x FROM t",
        "SELECT ';' || $$ ) pg_sleep(1) $$ || E'\\' pg_sleep(' AS \"a)\" -- ; )",
        "SELECT app.owner_of(1), app.lo_x(2), pg_typeof(3), lower('PG_SLEEP(1)'), count(*) FROM pg_class",
        "SELECT clock_timestamp(), random(), gen_random_uuid()",
    ],
)
def test_a_query_that_only_reads_is_one(query: str) -> None:
    assert not_only_a_select([query]) is None
