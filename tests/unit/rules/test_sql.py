"""Whether a query reads a table, by its text alone."""

from __future__ import annotations

import pytest
from rule_texts import parse

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
