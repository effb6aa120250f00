"""Which names a query's text proves for the columns of its rows, and where it proves none."""

from __future__ import annotations

import json

import pytest

from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.selected import selected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("SELECT team_id FROM public.team_members WHERE user_id = {id}", ("team_id",)),
        ('select t.Team_Id, m."Größe" from t', ("team_id", "Größe")),
        ("SELECT DISTINCT a, b FROM t", ("a", "b")),
        ("SELECT ALL a FROM t", ("a",)),
        ("SELECT 'DEVICE' AS entity_type", ("entity_type",)),
        ("SELECT key, CASE {n} WHEN 1 THEN 'a, b' ELSE 'it''s FROM' END AS scope FROM d", ("key", "scope")),
        ("SELECT coalesce(a, (SELECT b FROM c)) AS x FROM t", ("x",)),
        ("SELECT a /* , b */ -- , c\n, d FROM t", ("a", "d")),
        ("SELECT a UNION SELECT b", ("a",)),
        ("SELECT a;", ("a",)),
        ("SELECT {id} AS id", ("id",)),
        ("SELECT {id}", None),
        ("SELECT * FROM t", None),
        ("SELECT t.* FROM t", None),
        ("SELECT lower(name) FROM t", None),
        ("SELECT a b FROM t", None),
        ("SELECT DISTINCT ON (a) a, b FROM t", None),
        ("SELECT NULL", None),
        ("SELECT a::text FROM t", None),
        ("SELECT E'\\'' AS a, b FROM t", None),
        ("SELECT $$ FROM $$ AS a, b FROM t", None),
        ("WITH x AS (SELECT 1 AS a) SELECT a FROM x", None),
    ],
)
def test_a_name_is_told_only_where_the_text_proves_it(text: str, names: tuple[str, ...] | None) -> None:
    cache, rule = {"key": "a:b:{p}"}, {"name": "r", "table": "t.t", "bust": [{"c": {"via": text}}]}
    rules = parse_rules([("r.yaml", json.dumps({"version": 1, "caches": {"c": cache}, "rules": [rule]}))], {})
    query = rules.rules[0].busts[0].query
    assert query is not None
    assert selected(query) == names
