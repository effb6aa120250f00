"""Rule files: what is right becomes a rule set, what is wrong is told with its place, all at once."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_invalidator.errors import WrongRules
from cdc_invalidator.rules import format as rulefile
from cdc_invalidator.rules.format import RuleFile, Table
from cdc_invalidator.rules.load import load_rules, parse_rules
from cdc_invalidator.rules.model import Pair, Query, RuleSet
from cdc_invalidator.rules.template import Param

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
version: 1

caches:
  user:
    key: "shop:${APP_ENV:-prod}:user:{id}"   # a comment
    ttl: 5m
    jitter: 30s
  dashboard:
    key: "shop:user:{id}:dash:v{version}"
    version: "shop:user:{id}:dash:ver"
    version_ttl: 10d
  counts:
    key: shop:counts
    ttl: 500ms
    ttl_only: true

rules:
  - name: user-changed
    table: public.users
    on: [insert, update]
    columns: [name, email]
    bust:
      - user
      - dashboard
  - name: order-changed
    table: Sales."Order"
    old_row: sweep
    immutable: [user_id]
    bust:
      - dashboard: {id: user_id}
"""

CACHES = "caches: {a: {key: 'a:{id}'}, v: {key: 'v:{id}:{version}', version: 'v:ver'}, t: {key: t, ttl_only: true}}"


def parse(*texts: str, **env: str) -> RuleSet:
    return parse_rules([(f"{'abc'[number]}.yaml", text) for number, text in enumerate(texts)], env)


def mistakes(*texts: str, **env: str) -> list[str]:
    with pytest.raises(WrongRules) as caught:
        parse(*texts, **env)
    return str(caught.value).splitlines()


def busting(*busts: str, fields: str = "") -> str:
    """A file with three caches and one rule; its busts begin at 5:11, its other fields at 3:41."""
    bust = ", ".join(busts)
    return f"version: 1\n{CACHES}\nrules: [{{name: r, table: public.users, {fields}\n  bust: [\n    {bust}]}}]\n"


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
    assert {each["title"] for each in objects} == {*("RuleFile", "CacheEntry", "RuleEntry", "TestEntry", "ChangeEntry")}
    assert all(field.get("description") for field in fields)
    assert json.dumps(schema)


# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def digests(text: str, **env: str) -> dict[str, str]:
    rule_set = parse(text, **env)
    return {"": rule_set.digest, **{name: cache.digest for name, cache in rule_set.caches.items()}}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_a_digest_is_short_and_the_same_in_every_process() -> None:
    assert digests("version: 1\ncaches: {a: {key: 'a:{id}'}}") == {"": "af1ff6e5c8019d16", "a": "03f2edf474d8725c"}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("   # a comment", "", set()),
        ("ttl: 5m", "ttl: 6m", set()),
        ("    jitter: 30s\n", "", set()),
        ("    jitter: 30s\n", "    jitter: 30s\n    again_after: 5s\n", set()),
        ("version_ttl: 10d", "version_ttl: 1d", set()),
        ("ttl_only: true", "ttl_only: false", set()),
        ("[insert, update]", "[update, insert]", set()),
        ("[name, email]", "[email, name]", set()),
        ("public.users", "PUBLIC.users", set()),
        ("      - user\n      - dashboard\n", "      - dashboard\n      - user\n", set()),
        ("      - user\n      - dashboard\n", "      - user: {id: id}\n      - dashboard\n", set()),
        ("user-changed", "person-changed", {""}),
        ("${APP_ENV:-prod}:user", "${APP_ENV:-prod}:person", {"", "user"}),
        ("${APP_ENV:-prod}", "${OTHER:-prod}", set()),
        ("{id}:dash:ver", "{id|lower}:dash:ver", {"", "dashboard"}),
        ("{id}:dash:v{version}", "{id}:board:v{version}", {"", "dashboard"}),
        ("[name, email]", "[name]", {"", "user", "dashboard"}),
        ("[insert, update]", "[insert]", {"", "user", "dashboard"}),
        ("public.users", "public.people", {"", "user", "dashboard"}),
        ("{id: user_id}", "{id: buyer_id}", {"", "dashboard"}),
        ("old_row: sweep", "old_row: ignore", {"", "dashboard"}),
        ("immutable: [user_id]", "immutable: []", {"", "dashboard"}),
        ("  counts:", "  totals:", {"", "counts", "totals"}),
    ],
)
def test_a_digest_changes_with_keys_and_rules_and_with_nothing_else(old: str, new: str, names: set[str]) -> None:
    assert old in GOOD
    assert changed(digests(GOOD), digests(GOOD.replace(old, new))) == names


def test_a_digest_changes_with_the_environment_and_only_where_it_is_used() -> None:
    assert changed(digests(GOOD), digests(GOOD, APP_ENV="dev")) == {"", "user"}
    assert changed(digests(GOOD), digests(GOOD, APP_ENV="prod")) == set()


def test_a_digest_does_not_know_the_order_of_files_and_rules() -> None:
    one = "version: 1\nrules: [{name: x, table: s.x, bust: [user]}]"
    two = "version: 1\nrules: [{name: y, table: s.y, bust: [user]}]"
    assert parse(GOOD, one, two).digest == parse(two, GOOD, one).digest
    assert parse(GOOD, one, two).caches["user"].digest == parse(two, one, GOOD).caches["user"].digest
    assert parse(GOOD, one).caches["user"].digest != parse(GOOD).caches["user"].digest


# ── What is wrong ────────────────────────────────────────────────────────────────────────────────────────────────────

A_DURATION = "write a whole number and a unit: 500ms, 30s, 5m, 1h or 30d"
A_NAME = "use 1 to 63 of A-Z a-z 0-9 _ . -, and begin with a letter or a digit"
A_TABLE = "write `schema.table`, names with capitals or signs in double quotes"
CHECK_YAML = "check quotes, brackets and indentation"
UNCLOSED = "did not find expected ',' or ']'"
NO_SUCH_FILE = "this file cannot be read (No such file or directory); check CDC_RULES and its permissions"
TOO_LONG_AFTER = "`again_after` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
CACHE_FIELDS = (
    "key, version, version_ttl, ttl, jitter, ttl_only, bump_over, again_after, negative_ttl, stale_for, max_keys_hint"
)


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        # The file
        ("version: 1\n", "", "2:1: the file lacks `version`; add it"),
        ("version: 1", "version: 2", "1:10: the format `2` is not known; write `version: 1`, without quotes"),
        ("version: 1", "version: '1'", "1:10: the format `1` is not known; write `version: 1`, without quotes"),
        ("version: 1", "version: 1.0", "1:10: the format `1.0` is not known; write `version: 1`, without quotes"),
        ("version: 1", "version: true", "1:10: the format `True` is not known; write `version: 1`, without quotes"),
        (
            "version: 1\n",
            "version: 1\nrulez: []\n",
            "2:1: `rulez` is not a field of a rule file; did you mean `rules`?",
        ),
        # Caches
        ("  counts:\n", "  us er:\n", f"12:3: `us er` is not a name; {A_NAME}"),
        ("  counts:\n", f"  {'u' * 64}:\n", f"12:3: `{'u' * 64}` is not a name; {A_NAME}"),
        ("ttl: 5m", "tll: 5m", "6:5: `tll` is not a field of a cache; did you mean `ttl`?"),
        ("ttl: 5m", "zzzzz: 5m", f"6:5: `zzzzz` is not a field of a cache; write one of {CACHE_FIELDS}"),
        ("    jitter: 30s", "    bump_over: 5", "7:5: `bump_over` needs a `version`; remove it, or add one"),
        ("    jitter: 30s", "    max_keys_hint: 0", "7:20: `max_keys_hint` must be at least 1"),
        ("    jitter: 30s", "    max_keys_hint: '5'", "7:20: `max_keys_hint` must be a whole number, without quotes"),
        ("    jitter: 30s", "    negative_ttl: 5", f"7:19: `5` is not a duration; {A_DURATION}"),
        ("    jitter: 30s", "    stale_for: 5", f"7:16: `5` is not a duration; {A_DURATION}"),
        (
            "    jitter: 30s",
            "    again_after: 2m",
            "7:18: `again_after` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it",
        ),
        ("ttl: 5m", "ttl: 5x", f"6:10: `5x` is not a duration; {A_DURATION}"),
        ("ttl: 5m", "ttl: 300", f"6:10: `300` is not a duration; {A_DURATION}"),
        ("ttl: 5m", "ttl: -5m", f"6:10: `-5m` is not a duration; {A_DURATION}"),
        ("ttl: 5m", "ttl: \u0665m", f"6:10: `\u0665m` is not a duration; {A_DURATION}"),
        ("ttl: 5m", "ttl: 0s", "6:10: `0s` is out of range; a duration is longer than 0 and at most 36500d"),
        ("ttl: 5m", "ttl: 36501d", "6:10: `36501d` is out of range; a duration is longer than 0 and at most 36500d"),
        ("ttl: 5m", "ttl:", "6:5: `ttl` is empty; give it a value or remove it"),
        ("ttl: 5m", "ttl: ~", "6:5: `ttl` is empty; give it a value or remove it"),
        ("    ttl: 5m\n", "", "6:5: `jitter` needs a `ttl`; remove it, or add one"),
        ("jitter: 30s", "again_after: 60001ms", f"7:18: {TOO_LONG_AFTER}"),
        ("jitter: 30s", "again_after: 2m", f"7:18: {TOO_LONG_AFTER}"),
        ("jitter: 30s", "again_after:   1h   # late", f"7:20: {TOO_LONG_AFTER}"),
        (
            "jitter: 30s",
            "again_after: 0s",
            "7:18: `0s` is out of range; a duration is longer than 0 and at most 36500d",
        ),
        ("jitter: 30s", "again_after: 5", f"7:18: `5` is not a duration; {A_DURATION}"),
        ("ttl_only: true", "ttl_only: yes", "15:15: `ttl_only` must be `true` or `false`"),
        ("key: shop:counts", "key: 5", "13:10: `key` must be text; put it in quotes if it is one word, number or sign"),
        ("    key: shop:counts\n", "", "12:3: `counts` lacks `key`; add it"),
        ("key: shop:counts", "key: ''", "13:11: the template is empty; write a key, such as `shop:user:{id}`"),
        (
            "key: shop:counts",
            "key: shop counts",
            "13:14: the template holds white space or a control character (U+0020); remove it",
        ),
        ("key: shop:counts", "key: 'shop:{id|uper}'", "13:20: there is no filter `uper`; did you mean `upper`?"),
        ("key: shop:counts", 'key: "\\x73hop:}"', "13:10: `}` closes no parameter; write `}}` for the brace itself"),
        (
            "${APP_ENV:-prod}",
            "${APP_ENV}",
            "5:16: the environment variable `APP_ENV` is not set; set it, or give a default: `${APP_ENV:-default}`",
        ),
        (
            "key: shop:counts",
            "key: '{a}{b}'",
            "13:10: without literal text, a sweep of this would empty all of Redis; begin it with a prefix",
        ),
        (
            "key: shop:counts",
            "key: shop:counts:v{version}",
            "13:10: the key has `{version}` but the cache has no `version`; add its template, or rename the parameter",
        ),
        (
            ":dash:v{version}",
            ":dash",
            "9:10: the cache has a `version` but its key lacks `{version}`; put it there, or remove `version`",
        ),
        (
            ":dash:ver",
            ":dash:{version}",
            "10:14: a `version` may not hold `{version}` itself; remove the parameter",
        ),
        ('"shop:user:{id}:dash:ver"', "''", "10:15: the template is empty; write a key, such as `shop:user:{id}`"),
        ("    ttl: 500ms", "    version_ttl: 1d", "14:5: `version_ttl` needs a `version`; remove it, or add one"),
        (
            "key: shop:counts",
            "key: 'shop:prod:user:{id}'",
            "13:10: cache `user` has the same key, at a.yaml:5:10; make one cache of the two",
        ),
        ("  counts:", "  user:", "12:3: `user` stands here twice, first at a.yaml:4:3; remove one of the two"),
        # Rules
        ("  - name: user-changed\n    table", "  - table", "18:5: an entry of `rules` lacks `name`; add it"),
        ("name: user-changed", "name: user changed", f"18:11: `user changed` is not a name; {A_NAME}"),
        (
            "name: order-changed",
            "name: user-changed",
            "25:11: rule `user-changed` is defined twice, first at a.yaml:18:11; rename or remove one",
        ),
        ("public.users", "users", "19:12: `users` lacks its schema; write `public.users`"),
        ("public.users", "a.b.c", f"19:12: `a.b.c` is not a table; {A_TABLE}"),
        ("public.users", "public.my-users", f"19:12: `public.my-users` is not a table; {A_TABLE}"),
        ("public.users", "5", f"19:12: `5` is not a table; {A_TABLE}"),
        (
            "public.users",
            f"public.{'u' * 64}",
            f"19:12: `public.{'u' * 64}` has a name of more than 63 bytes, which PostgreSQL cuts off; cut it as well",
        ),
        ("[insert, update]", "[insert, updat]", "20:18: `updat` is not allowed here; did you mean `update`?"),
        (
            "[insert, update]",
            "[insert, [x]]",
            "20:18: `['x']` is not allowed here; write one of insert, update, delete, truncate",
        ),
        ("[insert, update]", "insert", "20:9: `on` must be a list; write `[one, two]`, or one `- ` on each line"),
        ("[insert, update]", "[]", "20:9: `on` must not be empty; write at least one entry"),
        ("[insert, update]", "[update, update]", "20:18: `update` stands twice in `on`; remove one"),
        (
            "[insert, update]",
            "[insert]\n    on: yes",
            "21:5: `on` stands here twice, first at a.yaml:20:5; remove one of the two",
        ),
        ("[name, email]", "[]", "21:14: `columns` must not be empty; write at least one entry"),
        ("[name, email]", "[name, '']", "21:21: an entry of `columns` must not be empty; give it a name"),
        (
            "[name, email]",
            "[name, 5]",
            "21:21: an entry of `columns` must be text; put it in quotes if it is one word, number or sign",
        ),
        ("[name, email]", "[name, name]", "21:21: `name` stands twice in `columns`; remove one"),
        ("    columns:", "    colums:", "21:5: `colums` is not a field of a rule; did you mean `columns`?"),
        ("old_row: sweep", "old_row: requires", "27:14: `requires` is not allowed here; did you mean `require`?"),
        ("[user_id]", "[user_id, user_id]", "28:26: `user_id` stands twice in `immutable`; remove one"),
        # Busts
        ("      - user\n", "      - usr\n", "23:9: there is no cache `usr`; did you mean `user`?"),
        ("      - user\n", "      - zzz\n", "23:9: there is no cache `zzz`; define it under `caches`"),
        (
            "      - user\n",
            "      - counts\n",
            "23:9: cache `counts` is `ttl_only`, so no rule may bust it; remove it here, or `ttl_only` there",
        ),
        ("- dashboard: {id", "- dashbord: {id", "30:9: there is no cache `dashbord`; did you mean `dashboard`?"),
        (
            "- dashboard: {id",
            "- dashboard: {idd",
            "30:21: the `version` of cache `dashboard` has no parameter `idd`; did you mean `id`?",
        ),
        ("{id: user_id}", "{id: }", "30:21: `id` is empty; give it a value or remove it"),
        ("{id: user_id}", "user_id", "30:20: `dashboard` must be a mapping; write `name: value`"),
        (
            "- dashboard: {id: user_id}",
            "- {dashboard: {}, user: {}}",
            "30:9: an entry of `bust` may name one cache only; write a `- ` for each",
        ),
        (
            "- dashboard: {id: user_id}",
            "- [dashboard]",
            "30:9: an entry of `bust` must be the name of a cache, or `name: {parameter: column}`",
        ),
        (
            "      - user\n",
            "      - dashboard: {id: id}\n",
            "24:9: the rule busts `dashboard` twice from the same columns; remove one",
        ),
        # YAML
        ("ttl: 5m", "ttl: !!str 5m", "6:10: the tag `tag:yaml.org,2002:str` is not allowed in a rule file; remove it"),
        (
            "ttl: 5m",
            "ttl: !!python/name:os.system 5m",
            "6:10: the tag `tag:yaml.org,2002:python/name:os.system` is not allowed in a rule file; remove it",
        ),
        ("ttl: 5m", "ttl: 5m\n    <<: {}", "7:5: merge keys (`<<`) are not supported; write the fields out"),
        ("ttl: 5m", "ttl: 5m\n    ? [a]\n    : b", "7:7: a key must be text; write `name: value`"),
        ("ttl: 5m", "ttl: \x075m", "6:10: the character U+0007 may not stand in YAML; remove it"),
        (
            "ttl: 5m",
            "ttl: *five",
            "6:10: this is not YAML (found undefined alias); check quotes, brackets and indentation",
        ),
        (
            "ttl: 5m",
            "ttl: a: b",
            f"6:11: this is not YAML (mapping values are not allowed in this context); {CHECK_YAML}",
        ),
        ("\nrules:", "---\nrules:", "16:1: a second document begins here; put it in a file of its own"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_remedy(old: str, new: str, mistake: str) -> None:
    assert old in GOOD
    assert mistakes(GOOD.replace(old, new, 1)) == [f"a.yaml:{mistake}"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "1:1: the file is empty; begin it with `version: 1`"),
        ("# nothing\n", "1:1: the file is empty; begin it with `version: 1`"),
        ("~", "1:1: the file is empty; give it a value or remove it"),
        ("hello", "1:1: the file must be a mapping; write `name: value` on each line"),
        ("[" * 900 + "]" * 900, "1:41: this is nested deeper than 40 levels; rule files need few"),
        ("- " * 100_000 + "a", "1:81: this is nested deeper than 40 levels; rule files need few"),
        (
            "a: &a {b: *a}",
            "1:4: with its aliases followed, this holds itself or too much; write it out without them",
        ),
        ("#" * (1 << 20), "1:1: the file is larger than 1 MiB; split it"),
        ("a: \ud800", "1:4: the character U+D800 may not stand in YAML; remove it"),
    ],
)
def test_a_file_that_cannot_be_used_at_all_is_one_mistake(text: str, mistake: str) -> None:
    text = text + "#" if text.startswith("#" * 9) else text
    assert mistakes(text) == [f"a.yaml:{mistake}"]


def test_nesting_without_end_is_one_mistake_whichever_libyaml_reads_it() -> None:
    (mistake,) = mistakes("[" * 500_000 + "]" * 500_000)
    assert mistake.endswith(": this is nested deeper than 40 levels; rule files need few")


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (mistake,) = mistakes("\n".join(lines))
    assert mistake.endswith("with its aliases followed, this holds itself or too much; write it out without them")


def test_five_mistakes_are_told_in_one_run_in_their_order() -> None:
    text = """\
version: 1
caches:
  user: {key: "user:{id|lowr}", ttl: 5}
  team: {key: "team:{id}"}
rules:
  - name: a
    table: users
    onn: [insert]
    bust: [team, teem, team]
"""
    assert mistakes(text) == [
        "a.yaml:3:25: there is no filter `lowr`; did you mean `lower`?",
        f"a.yaml:3:38: `5` is not a duration; {A_DURATION}",
        "a.yaml:7:12: `users` lacks its schema; write `public.users`",
        "a.yaml:8:5: `onn` is not a field of a rule; did you mean `on`?",
        "a.yaml:9:18: there is no cache `teem`; did you mean `team`?",
        "a.yaml:9:24: the rule busts `team` twice from the same columns; remove one",
    ]


def test_mistakes_of_several_files_are_told_together() -> None:
    assert mistakes(
        "version: 1\ncaches: {a: {key: 'a:{id}'}, b: {key: b}}",
        "version: 1\ncaches: {a: {key: c}}\nrules: [{name: r, table: s.t, bust: [b]}]",
        "version: 1\nrules: [{name: r, table: s.t, bust: [c]}]",
    ) == [
        "b.yaml:2:10: cache `a` is defined twice, first at a.yaml:2:10; rename or remove one",
        "c.yaml:2:16: rule `r` is defined twice, first at b.yaml:3:16; rename or remove one",
        "c.yaml:2:38: there is no cache `c`; define it under `caches`",
    ]


def test_a_cache_that_is_itself_wrong_is_not_told_to_be_missing() -> None:
    text = "version: 1\ncaches: {a: {kee: a}}\nrules: [{name: r, table: s.t, bust: [a]}]"
    assert mistakes(text) == [
        "a.yaml:2:10: `a` lacks `key`; add it",
        "a.yaml:2:14: `kee` is not a field of a cache; did you mean `key`?",
    ]


def test_no_cache_is_told_to_be_missing_while_a_file_cannot_be_read() -> None:
    assert mistakes("version: 1\nrules: [{name: r, table: s.t, bust: [a]}]", "caches: [a") == [
        f"b.yaml:2:1: this is not YAML (while parsing a flow sequence at line 1, {UNCLOSED}); {CHECK_YAML}"
    ]


def test_a_mapping_to_a_cache_without_parameters_is_told_so() -> None:
    assert mistakes(busting("v: {id: x}")) == [
        "a.yaml:5:9: the `version` of cache `v` has no parameter `id`; it has none, so remove it"
    ]


def test_a_mistake_under_an_anchor_is_told_once() -> None:
    text = busting("a", fields="columns: &c [x, 5], immutable: *c,")
    assert len(mistakes(text)) == len(set(mistakes(text))) == 2


def test_no_value_of_the_environment_is_shown_in_a_mistake() -> None:
    text = "version: 1\ncaches: {a: {key: 'a:${SECRET}'}}"
    assert mistakes(text, SECRET="hunter 2") == [
        "a.yaml:2:22: the value of `${SECRET}` holds white space or a control character (U+0020); remove it"
    ]


def test_a_name_with_a_line_break_stays_on_one_line_of_the_report() -> None:
    assert mistakes('version: 1\n"a\\nb\\e": 1') == [
        "a.yaml:2:1: `a\\nb\\x1b` is not a field of a rule file; write one of version, vars, caches, rules, tests"
    ]


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
        ('"new.plan ===  old.plan"', f"6:23: {CEL} (token recognition error at: '= '); correct it"),
        ("plan == 'x'", f"6:11: {KNOWN}, and no `plan`; write `new.plan` for a column"),
        ("new.id > limit", f"6:20: {KNOWN}, and no `limit`; write `new.limit` for a column"),
        ("\"nw.plan == 'x'\"", f"6:12: {KNOWN}, and no `nw`; write `new.nw` for a column"),
        ("''", "6:11: `when` must not be empty; give it a name"),
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
        ("SELECT x, y FROM t WHERE id = '{id}'", "7:50: a column in quotes would be text of the query; {}"),
        ('SELECT x, y FROM t WHERE id = \\"{id}\\"', "7:18: a column in quotes would be text of the query; {}"),
        ("SELECT x, y FROM t; DROP TABLE t", "7:37: a query is one statement; remove the `;`"),
        ("UPDATE t SET x = 1", "7:18: a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`"),
        ("SELECTED x", "7:18: a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`"),
        ("SELECT x, y FROM {id", "7:36: `{{` names no column; write `{{column}}`, or `{{{{` for the brace itself"),
        ("SELECT x, y FROM id}", "7:38: `}}` names no column; write `{{column}}`, or `{{{{` for the brace itself"),
        ("", "7:18: `via` must not be empty; give it a name"),
    ],
)
def test_a_mistake_in_a_query_is_told_where_it_is(fields: str, mistake: str) -> None:
    remedy = "take the quotes off, values are bound"
    assert mistakes(vias(f'via: "{fields}"')) == [f"a.yaml:{mistake.format(remedy)}"]


def test_a_query_must_have_a_parameter_to_give() -> None:
    assert mistakes(vias("via: SELECT x", "x: a", "y: b")) == [
        "a.yaml:7:13: all parameters of cache `c` are given, so its query has none to give; remove `via`"
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


# ── Files and directories ────────────────────────────────────────────────────────────────────────────────────────────


def load_mistakes(path: Path) -> list[str]:
    with pytest.raises(WrongRules) as caught:
        load_rules(path, {})
    return str(caught.value).splitlines()


def test_a_file_is_loaded_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text(GOOD)
    rule_set = load_rules(tmp_path / "rules.txt", {})
    assert rule_set.rules[0].place.file == str(tmp_path / "rules.txt")
    assert rule_set == parse_rules([(str(tmp_path / "rules.txt"), GOOD)], {})


def test_a_directory_is_loaded_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    caches, rest = GOOD.split("rules:\n")
    (tmp_path / "b.yml").write_text(caches)
    (tmp_path / "a.yaml").write_text("version: 1\nrules:\n" + rest)
    for name in (".hidden.yaml", "..data.yaml", "notes.txt", "old.yaml.bak"):
        (tmp_path / name).write_text("not a rule file")
    (tmp_path / "deeper").mkdir()
    assert len(load_rules(tmp_path, {}).rules) == 2


def test_a_configmap_mount_is_loaded_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "..2024").mkdir()
    (tmp_path / "..2024" / "shop.yaml").write_text(GOOD)
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "shop.yaml").symlink_to("..data/shop.yaml")
    assert load_rules(tmp_path, {}).rules[0].place.file == str(tmp_path / "shop.yaml")


def test_a_path_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    assert load_mistakes(tmp_path / "none") == [f"{tmp_path}/none:1:1: {NO_SUCH_FILE}"]


def test_an_empty_directory_is_a_mistake(tmp_path: Path) -> None:
    assert load_mistakes(tmp_path) == [
        f"{tmp_path}:1:1: no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
    ]


def test_files_that_cannot_be_read_are_told_beside_the_mistakes_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 2")
    (tmp_path / "b.yaml").symlink_to("nowhere")
    (tmp_path / "c.yaml").write_bytes(b"version: 1 # \xff")
    (tmp_path / "d.yaml").mkdir()
    os.mkfifo(tmp_path / "e.yaml")
    (tmp_path / "f.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    not_a_file = "this is not a regular file; remove it, or rename it to end in something else"
    assert [line.removeprefix(f"{tmp_path}/") for line in load_mistakes(tmp_path)] == [
        "a.yaml:1:10: the format `2` is not known; write `version: 1`, without quotes",
        f"b.yaml:1:1: {NO_SUCH_FILE}",
        "c.yaml:1:1: byte 13 is not UTF-8; save the file as UTF-8",
        f"d.yaml:1:1: {not_a_file}",
        f"e.yaml:1:1: {not_a_file}",
        "f.yaml:1:1: the file is larger than 1 MiB; split it",
    ]


# ── Whatever a file holds ────────────────────────────────────────────────────────────────────────────────────────────

SNIPPETS = [
    *"{}[]:,-&*!|>'\"%@`#? \n\t~<$.0",
    "&a",
    "*a",
    "<<: ",
    "---\n",
    "null",
    "true",
    "1",
    "- ",
    "\x00",
    "é",
    "\x85",
]
WORDS = [*GOOD.split(), "\n", "\n  ", "\n    ", "{id}", "[]", "{}", ""]


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SNIPPETS + WORDS)), max_size=6)
)
@example([(0, 0, "&a ")])
def test_a_damaged_file_is_wrong_rules_or_still_right(edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for at, length, inserted in edits:
        text = text[:at] + inserted + text[at + length :]
    assert_told(text)


@given(st.text(max_size=40))
def test_any_text_is_wrong_rules_or_right(text: str) -> None:
    assert_told(text)
    assert_told("version: 1\ncaches: {a: {key: " + text + "}}")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "on", "", "a:{id}", "5m", "x.y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "user", "key", "bust"]), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*rulefile.CacheEntry.model_fields, "x"]), VALUES),
    st.dictionaries(st.sampled_from([*rulefile.RuleEntry.model_fields, "when"]), VALUES),
)
def test_any_value_in_any_field_is_wrong_rules_or_right(cache: dict[str, object], rule: dict[str, object]) -> None:
    assert_told(json.dumps({"version": 1, "caches": {"user": cache}, "rules": [rule]}))


def assert_told(text: str) -> None:
    """The text is right, or each of its mistakes stands on one line with a place and words of our own."""
    told = []
    try:
        parse(text)
    except WrongRules as wrong:
        told = [str(problem) for problem in wrong.problems] or [""]
    assert all("\n" not in line and re.match(r"a\.yaml:[1-9]\d*:[1-9]\d*: ", line) for line in told)
    assert not any("is wrong; look at the documentation" in line for line in told)
