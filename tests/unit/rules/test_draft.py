"""What is right in a rule file becomes a rule set."""

from __future__ import annotations

import json

import pytest
from rule_texts import A_DURATION, CACHES, GOOD, busting, changed, digests, mistakes, parse

from cdc_invalidator.rules.format import RuleFile
from cdc_invalidator.rules.model import Query
from cdc_invalidator.rules.packed import Pair
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param

# ── What is right ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cache_has_its_templates_and_its_times_in_milliseconds() -> None:
    cache = parse(GOOD, APP_ENV="dev").caches["user"]
    assert cache.key.parts == (b"shop:dev:user:", Param("id"))
    assert (cache.ttl, cache.jitter, cache.ttl_only) == (300_000, 30_000, False)
    assert (cache.version, cache.sweep_template) == (None, cache.key)


def test_a_cache_with_a_version_is_busted_at_its_version() -> None:
    cache = parse(GOOD).caches["dashboard"]
    assert cache.version is not None
    assert cache.sweep_template == cache.version
    assert cache.sweep_template.parts == (b"shop:user:", Param("id"), b":dash:ver")
    assert (cache.version_ttl, cache.ttl, cache.jitter) == (10 * 86_400_000, None, 0)


def test_a_version_lives_for_thirty_days_where_nothing_is_said() -> None:
    cache = parse(GOOD.replace("    version_ttl: 10d\n", "")).caches["dashboard"]
    assert cache.version_ttl == 30 * 86_400_000


@pytest.mark.parametrize(("written", "milliseconds"), [("1ms", 1), ("5s", 5000), ("60s", 60_000), ("1m", 60_000)])
def test_a_cache_may_ask_for_a_second_bust_within_a_minute(written: str, milliseconds: int) -> None:
    rule_set = parse(GOOD.replace("    jitter: 30s\n", f"    again_after: {written}\n"))
    assert {name: cache.again_after for name, cache in rule_set.caches.items()} == {
        "user": milliseconds,
        "dashboard": None,
        "counts": None,
    }


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1ms", 1), ("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000), ("36500d", 36_500 * 86_400_000)],
)
def test_a_duration_is_a_number_and_a_unit(text: str, milliseconds: int) -> None:
    assert parse(f"version: 1\ncaches: {{a: {{key: a, ttl: {text}}}}}").caches["a"].ttl == milliseconds


def test_a_rule_has_its_table_operations_columns_and_place() -> None:
    rule = parse(GOOD).rules[0]
    assert (rule.name, rule.table) == ("user-changed", Table("public", "users"))
    assert rule.on == {"insert", "update"}
    assert rule.columns == ("name", "email")
    assert (rule.old_row, rule.immutable) == ("require", frozenset[str]())
    assert str(rule.place) == "a.yaml:18:5"


def test_a_rule_is_on_all_operations_and_any_column_where_nothing_is_said() -> None:
    rule = parse(GOOD).rules[1]
    assert rule.on == {"insert", "update", "delete", "truncate"}
    assert rule.columns == ()
    assert (rule.old_row, rule.immutable) == ("sweep", frozenset({"user_id"}))


def test_a_bust_knows_the_column_of_each_parameter() -> None:
    rule_set = parse(GOOD)
    assert [bust.columns for rule in rule_set.rules for bust in rule.busts] == [
        {"id": "id"},
        {"id": "id"},
        {"id": "user_id"},
    ]
    assert rule_set.rules[1].busts[0].cache is rule_set.caches["dashboard"]
    assert [rule.key_columns for rule in rule_set.rules] == [{"id"}, {"user_id"}]


def test_a_bust_of_a_versioned_cache_needs_only_what_its_version_needs() -> None:
    assert parse(busting("v")).rules[0].busts[0].columns == {}


def test_a_mapping_may_name_some_of_the_parameters() -> None:
    text = "version: 1\ncaches: {c: {key: 'c:{a}:{b}'}}\nrules: [{name: r, table: s.t, bust: [c: {b: x}]}]"
    assert parse(text).rules[0].busts[0].columns == {"a": "a", "b": "x"}


def test_one_rule_may_bust_a_cache_from_two_columns() -> None:
    busts = parse(busting("a: {id: seller}", "a: {id: buyer}")).rules[0].busts
    assert [bust.columns["id"] for bust in busts] == ["seller", "buyer"]


def test_tables_are_listed_once() -> None:
    more = "version: 1\nrules: [{name: x, table: PUBLIC.USERS, bust: [user]}]"
    assert parse(GOOD, more).tables == (Table("public", "users"), Table("sales", "Order"))


@pytest.mark.parametrize(
    ("written", "table", "shown"),
    [
        ("public.users", Table("public", "users"), "public.users"),
        ("Public.USERS", Table("public", "users"), "public.users"),
        ('\'"Public"."My Users"\'', Table("Public", "My Users"), '"Public"."My Users"'),
        ('\'public."a""b"\'', Table("public", 'a"b'), 'public."a""b"'),
        ('\'"a.b"."c.d"\'', Table("a.b", "c.d"), '"a.b"."c.d"'),
        ("public.größe$1", Table("public", "größe$1"), 'public."größe$1"'),
        ("public.Ä", Table("public", "Ä"), 'public."Ä"'),
        ("_a.b_", Table("_a", "b_"), "_a.b_"),
    ],
)
def test_a_table_is_read_as_postgresql_reads_it(written: str, table: Table, shown: str) -> None:
    rule = parse(f"version: 1\ncaches: {{a: {{key: a}}}}\nrules: [{{name: r, table: {written}, bust: [a]}}]").rules[0]
    assert rule.table == table
    assert str(rule.table) == shown


def test_on_and_off_and_yes_and_no_are_text_in_keys_and_values() -> None:
    columns = "[yes, no, on, off, y]"
    rule = f"{{name: off, table: y.n, columns: {columns}, bust: [on, no]}}"
    text = f"version: 1\ncaches: {{on: {{key: on}}, no: {{key: yes}}}}\nrules: [{rule}]"
    rule_set = parse(text)
    assert rule_set.rules[0].columns == ("yes", "no", "on", "off", "y")
    assert [rule_set.rules[0].name, *rule_set.caches] == ["off", "on", "no"]
    assert str(rule_set.rules[0].table) == "y.n"
    assert parse(GOOD).rules[0].on == {"insert", "update"}


def test_dates_sexagesimals_and_octals_are_no_special_values() -> None:
    text = "version: 1\ncaches: {2024-01-01: {key: 1:30}, 010: {key: 2024-01-01}}"
    assert {name: cache.key.text for name, cache in parse(text).caches.items()} == {
        "2024-01-01": "1:30",
        "010": "2024-01-01",
    }


def test_anchors_and_aliases_may_be_used() -> None:
    text = busting("a", fields="columns: &c [x, y], immutable: *c,")
    assert parse(text).rules[0].columns == ("x", "y")


def test_a_file_may_hold_only_caches_or_only_rules() -> None:
    caches, rest = GOOD.split("rules:\n")
    assert parse("version: 1\nrules:\n" + rest, caches).rules[1].busts[0].cache.name == "dashboard"
    assert parse("version: 1").rules == ()


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse("\ufeff" + GOOD).digest == parse(GOOD).digest
    assert mistakes("\ufeffversion: 3") == [
        "a.yaml:1:10: the format `3` is not known; write `version: 1`, without quotes"
    ]


def test_a_rule_set_can_be_hashed_with_its_caches() -> None:
    assert len({*parse(GOOD).caches.values(), *parse(GOOD).rules, parse(GOOD), parse(GOOD)}) == 3 + 2 + 1


def test_the_models_give_a_json_schema_in_which_each_field_is_described() -> None:
    schema = RuleFile.model_json_schema()
    objects = [schema, *schema["$defs"].values()]
    fields = [field for each in objects for field in each["properties"].values()]
    assert {each["title"] for each in objects} == {
        *("RuleFile", "DefaultsEntry", "CacheEntry", "RuleEntry", "TestEntry", "ChangeEntry")
    }
    assert all(field.get("description") for field in fields)
    assert json.dumps(schema)


# ── Which images count ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rule_and_its_busts_may_have_a_condition_each() -> None:
    rule = parse(busting("a: {where: row.y == 1, id: x}", "v", fields="where: row.z == 2,")).rules[0]
    assert (rule.where, [bust.where for bust in rule.busts]) == ("row.z == 2", ["row.y == 1", None])
    assert [[(each.source, str(each.place)) for each in rule.wheres(bust)] for bust in rule.busts] == [
        [("row.z == 2", "a.yaml:3:47"), ("row.y == 1", "a.yaml:5:16")],
        [("row.z == 2", "a.yaml:3:47")],
    ]
    assert [rule.where_of(bust) for bust in rule.busts] == ["(row.z == 2) && (row.y == 1)", "row.z == 2"]
    assert rule.key_columns == {"x"}


def test_a_hash_over_a_text_that_is_put_together_needs_a_column_for_each_of_its_parameters() -> None:
    text = """version: 1
caches: {c: {key: 'c:{team ":" name|sha256}'}}
rules: [{name: r, table: s.t, bust: [c: {name: title}]}]"""
    assert parse(text).rules[0].busts[0].columns == {"team": "team", "name": "title"}
    assert changed(digests(text), digests(text.replace('":"', '"/"'))) == {"", "c"}
    assert changed(digests(text), digests(text.replace('team ":"', 'team  ":" '))) == set()


def test_one_cache_may_be_busted_twice_from_the_same_columns_by_other_conditions() -> None:
    busts = parse(busting("a: {where: row.y == 1}", "a: {where: row.y == 2}", "a")).rules[0].busts
    assert [bust.where for bust in busts] == ["row.y == 1", "row.y == 2", None]


def test_a_condition_changes_the_digest_of_the_caches_that_it_is_for_and_no_other() -> None:
    before = digests(busting("a", "v"))
    assert changed(before, digests(busting("a: {where: row.y == 1}", "v"))) == {"", "a"}
    assert changed(before, digests(busting("a", "v", fields="where: row.y == 1,"))) == {"", "a", "v"}


# ── Defaults ────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULTS = "{ttl: 1m, jitter: 2s, negative_ttl: 3s, stale_for: 4s, again_after: 5s, given: true, old_row: ignore}"


def test_caches_and_rules_have_the_defaults_of_their_file_where_they_say_nothing_themselves() -> None:
    rule_set = parse(GOOD.replace("caches:", f"defaults: {DEFAULTS}\ncaches:"))
    user = rule_set.caches["user"]
    assert (user.ttl, user.jitter) == (300_000, 30_000)
    assert (user.negative_ttl, user.stale_for, user.again_after) == (3000, 4000, 5000)
    assert user.given
    assert [rule.old_row for rule in rule_set.rules] == ["ignore", "sweep"]


def test_a_cache_takes_no_default_that_it_has_no_use_for() -> None:
    caches = parse(
        f"version: 1\ndefaults: {DEFAULTS}\ncaches: {{v: {{key: 'v:{{version}}', version: 'v:ver'}}, "
        "b: {key: 'b:{version}', version: 'b:ver', bump_over: 5}, t: {key: t, ttl_only: true}}"
    ).caches
    assert {name: cache.again_after for name, cache in caches.items()} == {"v": None, "b": 5000, "t": None}
    assert {name: cache.stale_for for name, cache in caches.items()} == {"v": 4000, "b": 4000, "t": None}
    assert {(cache.ttl, cache.jitter, cache.negative_ttl) for cache in caches.values()} == {(60_000, 2000, 3000)}
    without = parse("version: 1\ndefaults: {jitter: 2s}\ncaches: {a: {key: a}, b: {key: b, ttl: 1m}}").caches
    assert {name: cache.jitter for name, cache in without.items()} == {"a": 0, "b": 2000}


def test_defaults_are_of_one_file_and_not_of_the_others() -> None:
    one = f"version: 1\ndefaults: {DEFAULTS}\ncaches: {{a: {{key: a}}}}\nrules: [{{name: r, table: s.t, bust: [b]}}]"
    other = "version: 1\ncaches: {b: {key: b}}\nrules: [{name: q, table: s.t, bust: [a]}]"
    rule_set = parse(one, other)
    assert {name: cache.ttl for name, cache in rule_set.caches.items()} == {"a": 60_000, "b": None}
    assert {rule.name: rule.old_row for rule in rule_set.rules} == {"r": "ignore", "q": "require"}


def test_a_default_is_the_same_as_the_field_written_out_and_sweeps_no_cache() -> None:
    out = GOOD.replace("    table: public.users\n", "    table: public.users\n    old_row: ignore\n")
    assert changed(digests(out), digests(GOOD.replace("caches:", f"defaults: {DEFAULTS}\ncaches:"))) == set()


# ── Conditions, queries, bumps, variables, tests ─────────────────────────────────────────────────────────────────────


def whens(condition: str) -> str:
    """A file with one rule; its condition begins at 6:11."""
    return f"version: 1\n{CACHES}\nrules:\n  - name: r\n    table: public.users\n    when: {condition}\n    bust: [a]\n"


def vias(*fields: str) -> str:
    """A file with one rule that busts `c` (x, y) by these fields; the first begins at 7:13."""
    return (
        "version: 1\ncaches: {c: {key: 'c:{x}:{y}'}}\nrules:\n"
        f"  - name: r\n    table: public.users\n    bust:\n      - c: {{{', '.join(fields)}}}\n"
    )


def with_test(entry: str) -> str:
    """The good file with one test, which begins at 32:5."""
    return f"{GOOD}tests:\n  - {{{entry}}}\n"


CEL = "`when` is no CEL expression"
CORRECT = "correct it: CEL writes `==`, `== null`, `&&`, `||`, `!`, and a backslash twice"
KNOWN = "`when` knows `op`, `old` and `new`"


def test_a_condition_is_kept_with_its_place() -> None:
    rule = parse(whens("\"op != 'update' || new.plan != old.plan\"")).rules[0]
    assert rule.when == "op != 'update' || new.plan != old.plan"
    assert str(rule.when_place) == "a.yaml:6:11"
    assert parse(GOOD).rules[0].when is None


def test_a_condition_may_use_macros_with_a_name_of_their_own() -> None:
    when = "['pro', 'team'].exists(plan, plan == new.plan)"
    assert parse(whens(f'"{when}"')).rules[0].when == when


@pytest.mark.parametrize(
    ("condition", "mistake"),
    [
        ("new.a == = old.a", f"6:20: {CEL} ("),
        ('"new.plan ===  old.plan"', f"6:23: {CEL} (token recognition error at: '= '); {CORRECT}"),
        ("new.a is null", f"6:17: {CEL} ("),
        ("\"new.a == 'App\\Post'\"", "6:11: `when` holds a sign that can't be seen (U+2029), which YAML may have made"),
        ("plan == 'x'", f"6:11: {KNOWN}, and no `plan`; write `new.plan` for a column"),
        ("new.id > limit", f"6:20: {KNOWN}, and no `limit`; write `new.limit` for a column"),
        ("\"nw.plan == 'x'\"", f"6:12: {KNOWN}, and no `nw`; write `new.nw` for a column"),
        ("''", "6:11: `when` must not be empty; give it a text or remove it"),
        ("", "6:5: `when` is empty; give it a value or remove it"),
        ("5", "6:11: `when` must be text; put it in quotes if it is one word, number or sign"),
        ("'" + "1" * 4097 + "'", "6:11: `when` is too long; write it shorter"),
    ],
)
def test_a_mistake_in_a_condition_is_told_where_it_is(condition: str, mistake: str) -> None:
    (told,) = mistakes(whens(condition))
    assert told.startswith(f"a.yaml:{mistake}")


def test_a_query_is_sql_with_columns_between() -> None:
    (bust,) = parse(vias('via: "SELECT x FROM t WHERE id = {id} AND n = {n} AND m = {id}"', "y: z")).rules[0].busts
    assert bust.query == Query(
        ("SELECT x FROM t WHERE id = ", Param("id"), " AND n = ", Param("n"), " AND m = ", Param("id")), ("id", "n")
    )
    assert bust.given == {"y": "z"}
    assert bust.template.parts == (Param("id"), b"\0", Param("n"), b"\0", Param("z"))
    assert bust.columns == {"id": "id", "n": "n", "z": "z"}


@pytest.mark.parametrize(
    ("written", "sql"),
    [
        ("SELECT x, y FROM t;", "SELECT x, y FROM t"),
        ("WITH q AS (SELECT 1) SELECT x, y FROM q", "WITH q AS (SELECT 1) SELECT x, y FROM q"),
        ("select x, y from t where a = ';'", "select x, y from t where a = ';'"),
        ("SELECT x, y FROM t WHERE a = '{{1}}'", "SELECT x, y FROM t WHERE a = '{1}'"),
        ("SELECT x, y FROM t WHERE a = 'it''s'", "SELECT x, y FROM t WHERE a = 'it''s'"),
    ],
)
def test_literal_braces_and_quoted_semicolons_stay_in_a_query(written: str, sql: str) -> None:
    query = parse(vias(f'via: "{written}"')).rules[0].busts[0].query
    assert query is not None
    assert "".join(map(str, query.parts)) == sql


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        ("SELECT x, y FROM t WHERE id = '{id}'", "7:50: `{{id}}` {}"),
        ('SELECT x, y FROM t WHERE id = \\"{id}\\"', "7:18: `{{id}}` {}"),
        ("SELECT x, j #> '{a,b}' FROM t", "7:35: `{{a,b}}` names no column; {}: `{{{{a,b}}}}`"),
        ("SELECT x, unnest('{}'::int[]) AS y", "7:37: `{{}}` names no column; {}: `{{{{}}}}`"),
        ("SELECT x, y FROM t; DROP TABLE t", "7:37: a query is one statement; remove the `;`"),
        ("UPDATE t SET x = 1", "7:18: a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`"),
        ("SELECTED x", "7:18: a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`"),
        ("SELECT x, y FROM {id", "7:36: `{{` names no column; {}: `{{{{`"),
        ("SELECT x, y FROM id}", "7:38: `}}` names no column; {}: `}}}}`"),
        ("", "7:18: `via` must not be empty; give it a text or remove it"),
    ],
)
def test_a_mistake_in_a_query_is_told_where_it_is(fields: str, mistake: str) -> None:
    quoted = (
        "in quotes would be text of the query, no column; take the quotes off, since values are bound, or write "
        "`{{id}}` for the braces themselves"
    )
    remedy = "write `{column}`, or double each brace for itself" if "names no column" in mistake else quoted
    assert mistakes(vias(f'via: "{fields}"')) == [f"a.yaml:{mistake.format(remedy)}"]


def test_a_query_must_have_a_parameter_to_give() -> None:
    assert mistakes(vias("via: SELECT x", "x: a", "y: b")) == [
        "a.yaml:7:13: all parameters of cache `c` are given, so its query has none to give; remove `via`"
    ]


def test_a_query_may_say_that_no_answer_means_nothing() -> None:
    query = 'via: "SELECT x, y FROM t WHERE id = {id}"'
    asked = parse(vias(query, "on_empty: ignore")).rules[0].busts[0].query
    assert asked is not None
    assert asked.ignores_empty
    assert changed(digests(vias(query)), digests(vias(query, "on_empty: ignore"))) == {"", "c"}


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        (
            ["on_empty: sweep", "via: SELECT x"],
            (
                "7:23: `sweep` is not allowed here; write `ignore` where a query that gives nothing for an old row "
                "means that nothing is stale, or remove `on_empty`"
            ),
        ),
        (
            ["on_empty: ignore", "x: a"],
            "7:13: `on_empty` is about the answer of a query; remove it, or add `via`",
        ),
    ],
)
def test_a_mistake_in_on_empty_is_told(fields: list[str], mistake: str) -> None:
    assert mistakes(vias(*fields)) == [f"a.yaml:{mistake}"]


def test_a_parameter_may_not_be_a_word_of_the_format() -> None:
    text = "version: 1\ncaches: {c: {key: 'c:{via}', ttl: 5m}}\n"
    assert mistakes(text) == [
        "a.yaml:2:19: a parameter may not be called `via`, a word of a rule's `bust`; give it another name"
    ]


def test_a_query_changes_the_digest_of_its_cache_and_what_is_not_used_changes_none() -> None:
    before = digests(vias('via: "SELECT x, y FROM t WHERE id = {id}"'))
    assert changed(before, digests(vias('via: "SELECT x, y FROM t WHERE id = {no}"'))) == {"", "c"}
    assert changed(digests(whens("new.b")), digests(whens("new.c"))) == {"", "a"}
    assert changed(digests(busting("a")), digests(busting("a", fields="debounce: 5s,"))) == set()


BUMPED = "key: 'c:{id}:v{version}', version: 'c:{team}:ver', bump_over: 10"


def test_a_cache_with_bump_over_is_busted_at_its_key_and_its_version() -> None:
    text = f"version: 1\ncaches: {{c: {{{BUMPED.replace('{id}', '{team}:{id}')}}}}}"
    cache = parse(text).caches["c"]
    assert cache.bump_over == 10
    busted = cache.bust_template.render({"team": "7", "id": "42"})
    assert busted is not None
    assert Pair.split(busted).version == b"c:7:ver"
    assert Pair.split(busted).key(b"5") == b"c:7:42:v5"


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        (BUMPED, "2:19: with `bump_over`, the key must hold all parameters of the version; put `{team}` into it"),
        (
            "key: 'c:{version|sha256}', version: 'c:ver', bump_over: 10",
            "2:19: with `bump_over`, the version stands in the key as it is; take the filter off `{version}`",
        ),
        (
            "key: 'c:v{version}', version: 'c:ver', bump_over: '5'",
            "2:64: `bump_over` must be a whole number, without quotes",
        ),
        ("key: 'c:v{version}', version: 'c:ver', bump_over: 0", "2:64: `bump_over` must be at least 1"),
    ],
)
def test_a_mistake_in_bump_over_is_told(fields: str, mistake: str) -> None:
    assert mistakes(f"version: 1\ncaches: {{c: {{{fields}}}}}") == [f"a.yaml:{mistake}"]


def test_a_rest_of_the_key_and_a_sweep_by_a_rule_change_the_digest() -> None:
    text = busting("a")
    assert changed(digests(text), digests(text.replace("a:{id}", "a:{id}*"))) == {"", "a"}
    assert changed(digests(text), digests(text.replace("a:{id}", "a:{id}**"))) == {"", "a"}
    assert changed(digests(text.replace("a:{id}", "a:{id}*")), digests(text.replace("a:{id}", "a:{id}**"))) == {"", "a"}
    assert changed(digests(text), digests(busting("a: {sweep: true}"))) == {"", "a"}


def test_bump_over_changes_the_digest() -> None:
    text = "version: 1\ncaches: {c: {key: 'c:v{version}', version: 'c:ver'}}"
    assert changed(digests(text), digests(text.replace("'c:ver'", "'c:ver', bump_over: 5"))) == {"", "c"}


def test_a_debounce_is_in_milliseconds() -> None:
    assert parse(busting("a", fields="debounce: 500ms,")).rules[0].debounce == 500


@pytest.mark.parametrize(
    ("debounce", "mistake"),
    [
        ("2m", "`debounce` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"),
        ("500", f"`500` is not a duration; {A_DURATION}"),
    ],
)
def test_a_mistake_in_a_debounce_is_told(debounce: str, mistake: str) -> None:
    assert mistakes(busting("a", fields=f"debounce: {debounce},")) == [f"a.yaml:3:50: {mistake}"]


def test_a_variable_goes_before_the_environment_and_may_name_it() -> None:
    text = GOOD.replace("version: 1\n", "version: 1\nvars: {prefix: 'shop:${APP_ENV:-dev}'}\n", 1)
    text = text.replace("shop:${APP_ENV:-prod}", "${prefix}")
    assert parse(text, prefix="x").caches["user"].key.prefix == b"shop:dev:user:"
    assert parse(text, APP_ENV="prod").caches["user"].digest == parse(GOOD).caches["user"].digest


@pytest.mark.parametrize(
    ("variables", "mistake"),
    [
        ("{p: 'x{b}'}", "2:11: a variable can't hold a parameter; write it into the keys"),
        ("{p: a b}", "2:12: the template holds white space or a control character (U+0020); remove it"),
        ("{p: 5}", "2:11: `p` must be text; put it in quotes if it is one word, number or sign"),
        ("{p-q: a}", "2:8: `p-q` is not a name; use 1 to 63 of A-Z a-z 0-9 _, and begin with no digit"),
        ("{p: '${q}', q: a}", "2:12: the environment variable `q` is not set; set it, or give a default: {}"),
        ("[a]", "2:7: `vars` must be a mapping; write `name: value`"),
    ],
)
def test_a_mistake_in_a_variable_is_told(variables: str, mistake: str) -> None:
    text = f"version: 1\nvars: {variables}"
    assert mistakes(text) == [f"a.yaml:{mistake.replace('{}', '`${q:-default}`')}"]


def test_a_variable_is_defined_in_one_file() -> None:
    assert mistakes("version: 1\nvars: {p: a}", "version: 1\nvars: {p: b}") == [
        "b.yaml:2:11: the variable `p` is defined twice, first at a.yaml:2:8; remove one"
    ]


def test_a_test_holds_values_as_postgresql_shows_them() -> None:
    row = "{id: 42, name: null, admin: true, share: 0.5, note: '7'}"
    entry = (
        f"name: a user, change: {{table: PUBLIC.users, op: insert, new: {row}}}, via: {{user: [{{id: 1}}]}}, busts: [x]"
    )
    (test,) = parse(with_test(entry)).tests
    assert test.table == Table("public", "users")
    assert (test.name, test.op, test.old, test.busts) == ("a user", "insert", None, ("x",))
    assert test.new == {"id": "42", "name": None, "admin": "t", "share": "0.5", "note": "7"}
    assert test.via == {"user": [{"id": "1"}]}
    assert str(test.place) == "a.yaml:32:5"


def test_tests_change_no_digest() -> None:
    entry = "name: n, change: {table: public.users, op: truncate}, busts: []"
    assert changed(digests(GOOD), digests(with_test(entry))) == set()


@pytest.mark.parametrize(
    ("entry", "mistake"),
    [
        ("name: n, busts: []", "32:5: an entry of `tests` lacks `change`; add it"),
        ("name: n, change: {table: users, op: truncate}, busts: []", "32:31: `users` lacks its schema; {}"),
        ("name: n, change: {table: public.usrs, op: truncate}, busts: []", "32:31: no rule names the table {}"),
        (
            "name: n, change: {table: public.users, op: insert}, busts: []",
            "32:15: an insert needs its `new` row; add it",
        ),
        (
            "name: n, change: {table: public.users, op: update, new: {id: 1}}, busts: []",
            "32:15: an update needs its `old` row; add it",
        ),
        (
            "name: n, change: {table: public.users, op: truncate, old: {id: 1}}, busts: []",
            "32:59: a truncate has no `old` row; remove it",
        ),
        (
            "name: n, change: {table: public.users, op: insert, new: {id: [1]}}, busts: []",
            "32:67: a column's value is text, a number, `true`, `false` or `null`; write one of these",
        ),
        (
            "name: n, change: {table: public.users, op: insert, new: {id: 1}, olld: 3}, busts: []",
            "32:71: `olld` is not a field of a change; did you mean `old`?",
        ),
        (
            "name: n, change: {table: public.users, op: truncate}, via: {usr: []}, busts: []",
            "32:66: there is no cache `usr`; did you mean `user`?",
        ),
        (
            "name: n, change: {table: public.users, op: truncate}, busts: x",
            "32:67: `busts` must be a list; write `[one, two]`, or one `- ` on each line",
        ),
        (
            "name: n, change: {table: public.users, op: truncate}, busts: [], bust: []",
            "32:71: `bust` is not a field of a test; did you mean `busts`?",
        ),
    ],
)
def test_a_mistake_in_a_test_is_told_with_its_place(entry: str, mistake: str) -> None:
    remedy = "write `public.users`" if "schema" in mistake else "public.usrs; did you mean `public.users`?"
    assert mistakes(with_test(entry)) == [f"a.yaml:{mistake.format(remedy)}"]
