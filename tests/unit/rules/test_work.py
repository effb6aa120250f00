"""No condition, whoever wrote it, takes long: neither to be read nor to be asked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cdc_invalidator import errors
from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import Condition, ConditionError, HoldsOf
from cdc_invalidator.rules.format import LONGEST_CONDITION
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.regex import found_in, states

COLUMNS = {
    "id": ColumnType("int4", 23, 23),
    "t": ColumnType("text", 25, 25, by_code_point=True),
    "n": ColumnType("numeric", 1700, 1700),
    "j": ColumnType("jsonb", 3802, 3802),
}
# A moment of a busy machine; without limits, the worst ones take years.
SECONDS = 5.0


def bound(condition: Condition, gave_up: list[int] | None = None) -> HoldsOf:
    told = [] if gave_up is None else gave_up
    return condition.bind_row(list(COLUMNS), list(COLUMNS.values()), gave_up=lambda: told.append(1))


def nested(macro: str, depth: int, over: str = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]") -> str:
    names = "abcdefghijklmnop"[:depth]
    return "".join(f"{over}.{macro}({name}, " for name in names) + "row.id > 0" + ")" * depth


def doubled(depth: int, first: str) -> str:
    steps = "".join(f"[a{at} + a{at}].all(a{at + 1}, " for at in range(depth))
    return f"[{first}].all(a0, {steps}true" + ")" * (depth + 1)


@pytest.mark.parametrize(
    ("where", "at", "sentence"),
    [
        (nested("all", 7), 62, "takes more than 10,000 steps for one row; take macros"),
        (nested("map", 5), 62, "takes more than 10,000 steps for one row"),
        (doubled(14, "row.t"), 0, "takes more than 10,000 steps for one row"),
        (doubled(14, "[1]"), 0, "takes more than 10,000 steps for one row"),
        (nested("exists", 2, "row.t.split('')"), 6, "calls split(), which is no function here"),
        ("(" * 60 + "row.id" + ")" * 60 + " > 0", 0, "nests more than 40 deep"),
        ("!" * 4000 + "true", 0, "nests more than 40 deep"),
        ("- " * 2000 + "row.id > 0", 0, "nests more than 40 deep"),
        ("true ? 1 : " * 50 + "1", 0, "nests more than 40 deep"),
        (" + ".join(["row.id"] * 120) + " > 0", 0, "nests too deep"),
        (r"row.t.matches('(\\w{100}){100}')", 14, "a regular expression of `where` is too much work"),
        (r"row.t.matches('(a{30}){30}') || [1,2,3,4].all(x, row.t.matches('(a{20}){40}'))", 0, "is too much work"),
        ("row.t.matches(row.t)", 6, "searches for an expression that is not written out"),
        ("row.t.matches('(')", 14, "a regular expression of `where` is none (unclosed group)"),
        ("row.t.matches('(?x)a')", 14, "is written with the flag x"),
    ],
)
def test_a_condition_that_may_take_long_is_refused_with_its_place(where: str, at: int, sentence: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConditionError) as refused:
        Condition(where, "where")
    assert sentence in str(refused.value)
    assert "`where`" in str(refused.value)
    assert refused.value.offset >= at
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "where",
    [
        " || ".join(f"row.id == {number}" for number in range(240)),
        "row.id in [" + ", ".join(map(str, range(800))) + "]",
        "[" + ", ".join(f"'kind{number}'" for number in range(100)) + "].exists(kind, row.t.startsWith(kind))",
        r"row.t.matches('^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$')",
        r"row.t.matches('^[\\w.+-]+@[\\w-]+\\.[\\w.]+$')",
        "row.exists(column, row[column] == null)",
        "size(row.t) > 10 && row.t.contains('draft') && !(row.t.endsWith('x') || row.id % 10 == 3)",
        "row.t == '" + "x" * 4000 + "'",
    ],
)
def test_ordinary_conditions_are_not_too_much(where: str) -> None:
    assert len(where) <= LONGEST_CONDITION
    assert bound(Condition(where, "where"))([b"1", b"text", b"1.5", b"{}"]) in {True, False}


def test_many_alternatives_are_decided() -> None:
    holds = bound(Condition(" || ".join(f"row.id == {number}" for number in range(240)), "where"))
    assert holds([b"239", None, None, None])
    assert not holds([b"240", None, None, None])


@pytest.mark.parametrize(
    "where",
    [
        "row.t.contains('b')",
        "row.t == row.t + 'b'",
        r"row.t.matches('[ab]*a[ab]{300}c')",
        "['b', 'c', 'd'].exists(each, row.t.contains(each))",
    ],
)
def test_a_row_that_is_too_long_for_a_condition_counts_and_is_told(where: str) -> None:
    told: list[int] = []
    holds = bound(Condition(where, "where"), told)
    assert not holds([b"1", b"a" * 1000, b"1.5", b"{}"])
    assert not told
    began = time.monotonic()
    assert holds([b"1", b"a" * 50_000_000, b"1.5", b"{}"])
    assert told == [1]
    assert time.monotonic() - began < SECONDS


NAMES = ("a", "b", "x")
LEAVES = st.sampled_from(
    [
        *("row.id", "row.t", "row.n", "row.j", "row", "null", "true", "1", "9223372036854775807", "1.5", "'ab'", "''"),
        *NAMES,
        *(r"'\\w{20}'", "'(a|b){30}c'", "timestamp('2026-01-01T00:00:00Z')", "duration('1h')", "[]", "{}"),
    ]
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def put(text: str, *given: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.tuples(*given).map(lambda values: text.format(*values))

    binary = st.sampled_from("|| && == != < <= > >= in + - * / %".split())  # noqa: SIM905
    return st.one_of(
        put("({} {} {})", inner, binary, inner),
        put("({} ? {} : {})", inner, inner, inner),
        put("{}({})", st.sampled_from(["!", "-", "size", "string", "int", "double", "bytes", "type", "dyn"]), inner),
        put(
            "({}).{}({}, {})",
            inner,
            st.sampled_from(["all", "exists", "exists_one", "map", "filter"]),
            st.sampled_from(NAMES),
            inner,
        ),
        put("({}).map({}, {}, {})", inner, st.sampled_from(NAMES), inner, inner),
        put("({}).{}({})", inner, st.sampled_from(["contains", "startsWith", "endsWith", "matches"]), inner),
        put("({})[{}]", inner, inner),
        st.lists(inner, max_size=12).map(lambda values: f"[{', '.join(values)}]"),
        st.lists(st.tuples(inner, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        ),
    )


@given(where=st.recursive(LEAVES, larger, max_leaves=40), text=st.sampled_from(["", "ab" * 50_000, "é" * 3_000]))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@example(where=nested("all", 3), text="")
@example(where=doubled(8, "row.t"), text="ab" * 50_000)
@example(where="row.map(a, row.map(b, row[a]))", text="ab" * 50_000)
def test_whatever_is_written_ends_soon(where: str, text: str) -> None:
    where = where[:LONGEST_CONDITION]
    began = time.monotonic()
    try:
        holds = bound(Condition(where, "where"))
    except ConditionError:
        pass
    else:
        holds([b"1", text.encode(), b"1" * 20_000, b'{"a": 1}'])
        Condition(where, "where").refuses("update")
    assert time.monotonic() - began < SECONDS, where


@given(pattern=st.text("ab()[]{}^$.*+?|\\wdpLx0123456789,:-&é", max_size=60), text=st.text("abé \n", max_size=200))
@settings(max_examples=300, deadline=None)
@example(pattern="((a{9}){9}){9}", text="")
@example(pattern="[(]{5}", text="(")
@example(pattern="a{99999999999999999999}", text="")
def test_a_regular_expression_is_refused_or_ends_soon(pattern: str, text: str) -> None:
    began = time.monotonic()
    try:
        if states(pattern) <= 1000:
            found_in(text * 100, pattern)
    except ValueError:
        pass
    assert time.monotonic() - began < SECONDS, pattern


@pytest.mark.parametrize(
    ("pattern", "least"),
    [("(a{100}){100}", 10_000), ("[[a](b{50}){50}]", 1), ("([(]{9}){100}", 900), (r"(\){9}a){90}", 900), ("a{3,}", 3)],
)
def test_the_states_of_a_regular_expression_are_not_counted_too_few(pattern: str, least: int) -> None:
    assert states(pattern) >= least


def test_a_rule_file_with_such_a_condition_is_refused_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(f"""version: 1
caches:
  user: {{key: "shop:prod:user:{{id}}", ttl: 5m}}
rules:
  - name: user-changed
    table: public.users
    where: "{nested("all", 7)}"
    bust: [user]
""")
    with pytest.raises(errors.WrongRules) as refused:
        load_rules(path, {})
    (problem,) = refused.value.problems
    assert problem.line == 7
    assert problem.column > 12
