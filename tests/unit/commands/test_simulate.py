"""What one change busts, rule by rule, and what keeps the others from it; and the tests of rule files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from example import DESIGN

from cdc_invalidator.commands import trial
from cdc_invalidator.commands.simulate import Change, Shape, Unanswered, Verdict, play, simulate
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import value_text, value_types

CACHES = """
version: 1
caches:
  user: {key: "user:{id}"}
  team: {key: "team:{team_id}"}
  dash: {key: "dash:{id}:v{version}", version: "dash:{id}:ver"}
  front: {key: "front:v{version}", version: "front:ver"}
  product: {key: "product:{id}:v{version}", version: "catalog:ver", bump_over: 2}
  meta: {key: "meta:{team_id}:*"}
rules:
"""


WHEN = "op != 'update' || new.plan != old.plan"


def rule_set(*entries: str) -> RuleSet:
    """The caches above, and rules r0, r1, … on public.t: ``bust: [user]``."""
    lines = [f"  - {{name: r{number}, table: public.t, {entry}}}\n" for number, entry in enumerate(entries)]
    return parse_rules([("rules.yaml", CACHES + "".join(lines))], {})


def change(op: str, old: Mapping[str, Any] | None = None, new: Mapping[str, Any] | None = None) -> Change:
    return Change(Table("public", "t"), op, texts(old), texts(new), value_types(old, new))


def texts(row: Mapping[str, Any] | None) -> dict[str, str | None] | None:
    return None if row is None else {name: value_text(value) for name, value in row.items()}


def verdict(entry: str, made: Change, answers: Mapping[str, list[dict[str, str | None]]] | None = None) -> Verdict:
    (only,) = simulate(rule_set(entry), made, answers or {})
    return only


def busts(entry: str, made: Change) -> list[str]:
    return [str(bust) for bust in verdict(entry, made).busts]


ROW = {"id": 1, "team_id": 7, "name": "a"}


@pytest.mark.parametrize(
    ("entry", "made", "expected"),
    [
        ("bust: [user, dash]", change("insert", new=ROW), ["user:1", "bump dash:1:ver"]),
        ("bust: [team]", change("update", ROW, {**ROW, "team_id": 9}), ["team:9", "team:7"]),
        ("bust: [team]", change("delete", ROW), ["team:7"]),
        ("bust: [team, front]", change("truncate"), ["sweep team", "bump front:ver"]),
        ("bust: [product]", change("insert", new=ROW), ["product:1:v{version}"]),
        ("bust: [product]", change("truncate"), ["bump catalog:ver"]),
        ("bust: [team]", change("delete", {"id": 1}), ["sweep team"]),
        ("immutable: [team_id], bust: [team]", change("update", {"id": 1}, ROW), ["team:7"]),
        ("old_row: ignore, bust: [team]", change("update", {"id": 1}, ROW), ["team:7"]),
        ("bust: [user: {id: owner}]", change("insert", new=ROW), []),
        ("where: row.team_id == 7, bust: [user, team]", change("insert", new=ROW), ["user:1", "team:7"]),
        ("where: row.team_id == 7, bust: [team]", change("update", ROW, {**ROW, "team_id": 9}), ["team:7"]),
        ("bust: [user, team: {where: row.team_id == 9}]", change("insert", new=ROW), ["user:1"]),
        ("where: row.team_id == 9, bust: [team]", change("truncate"), ["sweep team"]),
        ("bust: [meta]", change("insert", new=ROW), ["meta:7:*"]),
        ("bust: [meta]", change("update", ROW, {**ROW, "team_id": 9}), ["meta:9:*", "meta:7:*"]),
        ("bust: [meta]", change("insert", new={**ROW, "team_id": None}), []),
        ("bust: [meta]", change("delete", {"id": 1}), ["sweep meta"]),
        ("bust: [meta]", change("truncate"), ["sweep meta"]),
        ("bust: [team: {sweep: true}]", change("insert", new={"id": 1}), ["sweep team"]),
        ("bust: [team: {sweep: true}]", change("update", {"id": 1}, {"id": 1, "name": "b"}), ["sweep team"]),
        ("bust: [team: {sweep: true}]", change("delete", {"id": 1}), ["sweep team"]),
        ("bust: [front: {sweep: true}]", change("delete", {"id": 1}), ["bump front:ver"]),
        ("bust: [user, team: {sweep: true, where: row.team_id == 9}]", change("insert", new=ROW), ["user:1"]),
        (
            "bust: [team: {sweep: true, where: row.team_id == 9}]",
            change("delete", {**ROW, "team_id": 9}),
            ["sweep team"],
        ),
        (
            "bust: [team: {sweep: true, where: row.team_id == 9}]",
            change("update", {**ROW, "team_id": 9}, ROW),
            ["sweep team"],
        ),
    ],
)
def test_a_change_busts_what_the_daemon_would_bust(entry: str, made: Change, expected: list[str]) -> None:
    assert busts(entry, made) == expected
    assert verdict(entry, made).fired


@pytest.mark.parametrize(
    ("entry", "made", "reasons"),
    [
        ("on: [delete], bust: [user]", change("insert", new=ROW), ("its `on` has no insert",)),
        (
            "columns: [name], bust: [user]",
            change("update", ROW, {**ROW, "team_id": 8}),
            ("the update changes none of its columns (name)",),
        ),
        ("when: new.id > 5, bust: [user]", change("insert", new=ROW), ("its `when` is false: new.id > 5",)),
        (
            "when: new.id > 5, columns: [name], bust: [user]",
            change("update", ROW, ROW),
            ("the update changes none of its columns (name)", "its `when` is false: new.id > 5"),
        ),
        (
            "when: new.id > 5, columns: [name], bust: [user]",
            change("update", ROW, {**ROW, "name": "b"}),
            ("its `when` is false: new.id > 5",),
        ),
        (
            "when: new.id < 5, columns: [name], bust: [user]",
            change("update", ROW, ROW),
            ("the update changes none of its columns (name)",),
        ),
    ],
)
def test_what_keeps_a_rule_from_firing_is_told(entry: str, made: Change, reasons: tuple[str, ...]) -> None:
    told = verdict(entry, made)
    assert not told.fired
    assert told.busts == ()
    assert told.why_not == reasons


@pytest.mark.parametrize(
    ("entry", "made", "note"),
    [
        ("bust: [team]", change("delete", {"id": 1}), "the old row does not tell team_id, so cache team is swept"),
        (
            "old_row: ignore, bust: [team]",
            change("delete", {"id": 1}),
            "the old row does not tell team_id; `old_row: ignore` lets its key be",
        ),
        (
            "bust: [user]",
            change("insert", new={"id": None}),
            "the new row gives no key of cache user, because id is NULL",
        ),
        (
            "bust: [team]",
            change("update", {**ROW, "team_id": None}, ROW),
            "the old row gives no key of cache team, because team_id is NULL",
        ),
        (
            "columns: [name], bust: [user]",
            change("update", {"id": 1}, {"id": 1}),
            "the old row does not tell name, so any update counts as a change of it",
        ),
        (
            "when: new.plan != old.plan, bust: [user]",
            change("update", {"id": 1}, {"id": 1}),
            "its `when` fails, or reads what is not known, and so counts as true: new.plan != old.plan",
        ),
        ("bust: [user]", change("truncate"), "a truncate empties the table, so whole caches go"),
    ],
)
def test_a_sweep_or_a_missing_key_has_its_reason(entry: str, made: Change, note: str) -> None:
    assert verdict(entry, made).notes == (note,)


def test_a_change_that_is_plain_has_no_notes() -> None:
    assert verdict("columns: [name], bust: [user]", change("update", ROW, {**ROW, "name": "b"})).notes == ()


def test_values_have_the_types_that_the_file_speaks_for() -> None:
    entry = "when: \"new.n > 9 && new.f > 1.0 && new.b && new.s == '9'\", bust: [user]"
    row = {"id": 1, "n": 10, "f": 1.5, "b": True, "s": "9"}
    assert verdict(entry, change("insert", new=row)).fired
    assert verdict(entry, change("insert", new=row)).notes == ()
    assert not verdict(entry, change("insert", new={**row, "n": 9})).fired
    assert not verdict(entry, change("insert", new={**row, "b": False})).fired
    assert value_types({"a": 1, "b": None}, {"a": 1.5, "b": True}, None) == {"a": 701, "b": 16}
    assert value_types({"a": 1, "c": None}, {"a": "x"}) == {"a": 25, "c": 25}


VIA = 'bust: [team: {via: "SELECT team_id FROM m WHERE id = {id}"}]'
VIA_PRODUCT = 'bust: [product: {via: "SELECT id FROM m WHERE x = {x}"}]'


def test_the_rows_of_a_query_give_keys() -> None:
    told = verdict(VIA, change("insert", new=ROW), {"team": [{"team_id": "7"}, {"team_id": None}, {"team_id": "9"}]})
    assert [str(bust) for bust in told.busts] == ["team:7", "team:9"]
    assert told.unanswered == ()


def test_parameters_that_the_rule_maps_come_from_the_changed_row() -> None:
    text = """
version: 1
caches: {page: {key: "page:{team}:{user}"}}
rules:
  - name: r
    table: public.t
    bust: [page: {user: id, via: "SELECT team FROM m WHERE x = {team_id}"}]
"""
    (told,) = simulate(parse_rules([("a.yaml", text)], {}), change("insert", new=ROW), {"page": [{"team": "5"}]})
    assert [str(bust) for bust in told.busts] == ["page:5:1"]


def test_many_rows_of_a_query_are_one_bump() -> None:
    rows: list[dict[str, str | None]] = [{"id": str(number)} for number in range(3)]
    told = verdict(VIA_PRODUCT, change("insert", new={"x": 1}), {"product": rows})
    assert [str(bust) for bust in told.busts] == ["bump catalog:ver"]
    told = verdict(VIA_PRODUCT, change("insert", new={"x": 1}), {"product": rows[:2]})
    assert [str(bust) for bust in told.busts] == ["product:0:v{version}", "product:1:v{version}"]


def test_a_query_without_its_answer_is_told() -> None:
    assert verdict(VIA, change("insert", new=ROW)).unanswered == (Unanswered("team"),)
    assert verdict(VIA, change("insert", new=ROW), {"team": [{}]}).unanswered == (Unanswered("team", ("team_id",)),)
    # NULL can be asked for as well.
    assert verdict(VIA, change("insert", new={"id": None})).unanswered == (Unanswered("team"),)
    assert verdict(VIA, change("truncate")).unanswered == ()


def test_an_old_row_of_which_the_query_knows_no_key_sweeps() -> None:
    deleted = change("delete", old=ROW)
    answers: list[list[dict[str, str | None]]] = [[], [{"team_id": None}]]
    for answer in answers:
        told = verdict(VIA, deleted, {"team": answer})
        assert [str(bust) for bust in told.busts] == ["sweep team"]
        (note,) = told.notes
        assert note == (
            "the query gives no key for the old row, so cache team is swept; `on_empty: ignore` beside `via` says that "
            "nothing is stale then"
        )
    # A new row without an answer is nothing: what was joined and is gone busts by its own old row.
    assert verdict(VIA, change("insert", new=ROW), {"team": []}).busts == ()
    # Nor is an old row that asks what the new one asks, and one that joins nothing.
    same = change("update", old=ROW, new={**ROW, "name": "x"})
    assert verdict(VIA, same, {"team": []}).busts == ()
    assert verdict(VIA, change("delete", old={**ROW, "id": None}), {"team": []}).busts == ()
    moved = change("update", old=ROW, new={**ROW, "id": 2})
    assert [str(bust) for bust in verdict(VIA, moved, {"team": []}).busts] == ["sweep team"]
    # A row that does not count any more is gone for its key.
    counting = f"where: \"row.name != 'x'\", {VIA}"
    assert [str(bust) for bust in verdict(counting, same, {"team": []}).busts] == ["sweep team"]
    # Where the rule gives what the key begins with, that is searched.
    pages = """
version: 1
caches: {page: {key: "page:{user}:{team}"}}
rules:
  - {name: r, table: public.t, bust: [page: {user: id, via: "SELECT team FROM m WHERE x = {team_id}"}]}
"""
    (told,) = simulate(parse_rules([("a.yaml", pages)], {}), deleted, {"page": []})
    assert [str(bust) for bust in told.busts] == ["page:1:*"]
    assert "searched" in told.notes[0]
    ignoring = VIA.replace("{via", "{on_empty: ignore, via")
    assert verdict(ignoring, deleted, {"team": []}).busts == ()


def shape(identity: str, *keys: str, columns: tuple[str, ...] = ("id", "team_id", "name")) -> Shape:
    made = tuple(pgoutput.Column(name, name in keys, 25, -1) for name in columns)
    return Shape(pgoutput.Relation(None, 5, "public", "t", identity, made), (Table("public", "t"),))


def test_a_table_of_the_database_sends_what_its_identity_carries() -> None:
    moved = change("update", ROW, {**ROW, "team_id": 9})
    (told,) = simulate(rule_set("old_row: ignore, bust: [team]"), moved, {}, shape("d", "id"))
    assert [str(bust) for bust in told.busts] == ["team:9"]
    (told,) = simulate(rule_set("bust: [team]"), moved, {}, shape("f", "id", "team_id", "name"))
    assert [str(bust) for bust in told.busts] == ["team:9", "team:7"]
    (told,) = simulate(rule_set("bust: [user]"), change("update", ROW, {**ROW, "id": 2}), {}, shape("d", "id"))
    assert [str(bust) for bust in told.busts] == ["user:2", "user:1"]


def test_what_is_wrong_with_a_table_of_the_database_is_told() -> None:
    (told,) = simulate(rule_set("bust: [user]"), change("insert", new=ROW), {}, shape("d", "nr", columns=("nr",)))
    assert [str(bust) for bust in told.busts] == ["sweep user"]
    assert told.notes[0].startswith("public.t has no column id; ")


def test_a_partition_is_known_by_the_tables_above_it() -> None:
    leaf = shape("d", "id").relation._replace(name="t_2024")
    (told,) = simulate(rule_set("bust: [user]"), change("insert", new=ROW), {}, Shape(leaf, (Table("public", "t"),)))
    assert [str(bust) for bust in told.busts] == ["user:1"]


def test_a_table_that_no_rule_names_is_looked_at_by_none() -> None:
    assert play(rule_set("bust: [user]"), Change(Table("public", "u"), "truncate")) == []


# ── Tests of rule files ──────────────────────────────────────────────────────────────────────────────────────────────


def report(text: str) -> list[str]:
    return list(trial.Report().lines(trial.run(parse_rules([("a.yaml", text)], {}))))


def test_the_example_of_the_format_passes() -> None:
    assert report(DESIGN) == ["1 passed, 0 failed"]


def test_no_tests_are_no_failure() -> None:
    assert report(CACHES.replace("rules:", "")) == ["0 passed, 0 failed"]


def test_a_failure_shows_what_is_missing_and_what_is_unexpected() -> None:
    text = DESIGN.replace('busts: ["shop:prod:user:42"', 'busts: ["shop:prod:user:43", "sweep user"').replace(
        "7}, ", "}, "
    )
    text = text.replace("{team_id: }", "{team_id: 8}")
    assert report(text) == [
        "a.yaml:18: renaming a user busts the profile and the team lists",
        "  - shop:prod:user:43",
        "  - sweep user",
        "  - bump shop:prod:team:7:members:ver",
        "  + shop:prod:user:42",
        "  + bump shop:prod:team:8:members:ver",
        f"    rule user-changed: its `when` fails, or reads what is not known, and so counts as true: {WHEN}",
        "    rule user-changed: the old row does not tell email, plan, so any update counts as a change of it",
        "0 passed, 1 failed",
    ]


def test_a_failure_shows_why_a_rule_does_not_fire() -> None:
    text = DESIGN.replace("name: Ada}", "name: Ada, plan: x, email: x}").replace(
        "name: Grace}", "name: Ada, plan: x, email: x}"
    )
    assert report(text)[-3:] == [
        "    rule user-changed does not fire: the update changes none of its columns (name, email, plan)",
        "    rule user-changed does not fire: its `when` is false: op != 'update' || new.plan != old.plan",
        "0 passed, 1 failed",
    ]


@pytest.mark.parametrize(
    ("via", "fault"),
    [
        ("", "cache team-members is busted by a query whose rows the test does not give; add them under `via`"),
        ("    via: {team-members: [{team: 7}]}\n", "a row of `via` for cache team-members lacks team_id; add it"),
    ],
)
def test_a_test_without_the_answers_that_it_needs_fails(via: str, fault: str) -> None:
    given = "    via: {team-members: [{team_id: 7}, {team_id: 9}]}\n"
    assert given in DESIGN
    assert report(DESIGN.replace(given, via))[1] == f"  ! {fault}"


def test_an_answer_that_no_rule_asks_for_is_a_failure() -> None:
    text = DESIGN.replace("via: {team-members:", "via: {user: [], team-members:")
    assert report(text)[1] == "  ! no rule of public.users has a query for cache user; remove it from `via`"


WHERE = "where: \"row.name == 'a'\""
FALSE = "because the `where` of cache {} is false for it: row.name == 'a'"
UNDECIDED = "the `where` of cache user fails for the {} row, or reads what is not known, and so counts as true: {}"


def test_a_rule_that_no_image_satisfies_tells_so() -> None:
    told = verdict(f"{WHERE}, bust: [user]", change("insert", new={**ROW, "name": "b"}))
    assert (told.fired, told.busts) == (False, ())
    assert told.why_not == ("its `where` is false for each image of the row: row.name == 'a'",)
    both = verdict(f"{WHERE}, when: op == 'delete', bust: [user]", change("insert", new={**ROW, "name": "b"}))
    assert both.why_not == ("its `when` is false: op == 'delete'", *told.why_not)


@pytest.mark.parametrize(
    ("entry", "made", "notes"),
    [
        (f"{WHERE}, bust: [user]", change("insert", new=ROW), ()),
        (
            f"{WHERE}, bust: [team]",
            change("update", ROW, {**ROW, "name": "b"}),
            ("the new row gives no key, " + FALSE.format("team"),),
        ),
        (
            "bust: [front, user: {where: \"row.name == 'a'\"}]",
            change("delete", {**ROW, "name": "b"}),
            ("the old row gives no key, " + FALSE.format("user"),),
        ),
        (
            f"{WHERE}, bust: [user]",
            change("delete", {"id": 1}),
            (UNDECIDED.format("old", "row.name == 'a'"),),
        ),
        (
            f"{WHERE}, immutable: [name], bust: [front, user]",
            change("update", {"id": 1}, ROW),
            (),
        ),
        (
            "where: row.team_id > 5, bust: [user]",
            change("insert", new={**ROW, "team_id": None}),
            (UNDECIDED.format("new", "row.team_id > 5"),),
        ),
    ],
)
def test_an_image_that_does_not_count_or_counts_because_nobody_knows_is_noted(
    entry: str, made: Change, notes: tuple[str, ...]
) -> None:
    told = verdict(entry, made)
    assert (told.fired, told.notes) == (True, notes)
