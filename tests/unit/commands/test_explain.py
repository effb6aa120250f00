"""`explain`: a key's cache and what busts it, a change's busts; and that both ways agree, whatever the rules are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from example import DESIGN
from hypothesis import assume, given
from hypothesis import strategies as st

from cdc_invalidator import errors
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.explain import (
    LastBusts,
    change_lines,
    explain_change,
    explain_key,
    key_lines,
    no_rule,
    read_change,
    read_key,
)
from cdc_invalidator.commands.simulate import Change, simulate
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param, Template

FILE = """
version: 1
caches:
  user: {key: "shop:user:{id}"}
  dash: {key: "shop:dash:{id}:v{version}", version: "shop:dash:{id}:ver"}
  product: {key: "shop:product:{id}:v{version}", version: "shop:catalog:ver", bump_over: 10}
  mail: {key: "shop:mail:{email|lower}:v{version}", version: "shop:mail:{email|lower}:ver"}
  page: {key: "shop:page:{team}:{user}"}
  counts: {key: "shop:counts", ttl_only: true}
  alone: {key: "shop:alone", publish: "busts"}
rules:
  - name: user-changed
    table: public.users
    columns: [name]
    when: new.id > 0
    bust: [user, dash, mail]
  - name: order-changed
    table: public.orders
    on: [update, insert]
    bust:
      - dash: {id: user_id}
      - page: {user: user_id, via: "SELECT team FROM m WHERE id = {id}"}
  - {name: product-changed, table: public.products, bust: [product]}
"""
RULES = parse_rules([("rules.yaml", FILE)], {})


def parse(text: str) -> RuleSet:
    return parse_rules([("rules.yaml", text)], {})


# ── A key ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "cache", "what", "params"),
    [
        ("shop:user:42", "user", "key", {"id": "42"}),
        ("shop:user:42\0lock", "user", "lock", {"id": "42"}),
        ("shop:user:42\0stale", "user", "old_value", {"id": "42"}),
        ("shop:user:a:b", "user", "key", {"id": "a:b"}),
        ("shop:dash:42:v7", "dash", "key", {"id": "42", "version": "7"}),
        ("shop:dash:42:v7\0lock", "dash", "lock", {"id": "42", "version": "7"}),
        ("shop:dash:42:v7\0stale", "dash", "old_value", {"id": "42", "version": "7"}),
        ("shop:dash:a:v1:v7", "dash", "key", {"id": "a:v1", "version": "7"}),
        ("shop:dash:42:ver", "dash", "version", {"id": "42"}),
        ("shop:dash:42:ver\0stale", "dash", "old_version", {"id": "42"}),
        ("shop:product:42:v{version}", "product", "key", {"id": "42", "version": "{version}"}),
        ("shop:catalog:ver", "product", "version", {}),
        ("shop:alone", "alone", "key", {}),
        ("shop:page:7:42", "page", "key", {"team": "7", "user": "42"}),
    ],
)
def test_a_key_is_read_back(key: str, cache: str, what: str, params: dict[str, str]) -> None:
    (reading,) = read_key(RULES, key)
    assert (reading.cache.name, reading.what, reading.params) == (cache, what, params)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("shop:user:42\0lock", "the lock of a key of cache user"),
        ("shop:user:42\0stale", "the old value of a key of cache user"),
        ("shop:dash:42:ver", "a version of cache dash"),
        ("shop:dash:42:ver\0stale", "the old value of a version of cache dash"),
    ],
)
def test_what_stands_beside_a_key_is_told_in_words(key: str, told: str) -> None:
    written = key.replace("\0", r"\x00")
    for name in (key, written):
        assert next(iter(key_lines(explain_key(RULES, name)))).startswith(f"{written} is {told} (")


def test_a_key_that_two_caches_may_have_is_told_of_both_the_likeliest_first() -> None:
    text = 'version: 1\ncaches: {any: {key: "k:{rest}"}, user: {key: "k:user:{id}"}}'
    assert [reading.cache.name for reading in read_key(parse(text), "k:user:42")] == ["user", "any"]


TYPED = """version: 1
caches:
  user: {key: "k:user:{id}"}
  orders: {key: "k:user:{user_id}:orders"}
  other: {key: "k:{name}:{rest}"}
rules: [{name: r, table: public.users, bust: [user]}]"""


def test_a_key_that_the_types_of_columns_cannot_make_is_not_of_the_cache_and_that_is_said() -> None:
    types = Columns({"user": {"id": overlap.NUMBER}, "orders": {"user_id": overlap.NUMBER}})

    def caches(key: str) -> list[str]:
        return [told["cache"] for told in explain_key(parse(TYPED), key, columns=types)["caches"]]

    assert caches("k:user:7:orders") == ["orders", "other"]
    assert caches("k:user:7:orders\0lock") == ["orders", "other"]
    assert caches("k:user:-7") == ["user", "other"]
    lines = list(key_lines(explain_key(parse(TYPED), "k:user:7:orders", columns=types)))
    assert lines[-1] == "not of cache user: id is a whole number in the database"
    only = parse(TYPED.replace('  other: {key: "k:{name}:{rest}"}\n', ""))
    with pytest.raises(errors.InvalidatorError, match="but id is a whole number in the database"):
        explain_key(only, "k:user:ada", columns=types)
    # Not asked, or not known: any text.
    assert len(explain_key(parse(TYPED), "k:user:7:orders")["caches"]) == 3
    assert len(explain_key(parse(TYPED), "k:user:7:orders", columns=Columns())["caches"]) == 3


def test_the_condition_on_the_rows_that_bust_a_key_is_told() -> None:
    text = """version: 1
caches: {user: {key: "k:user:{id}"}}
rules: [{name: r, table: public.users, where: row.a == 1, bust: [user, user: {where: row.b == 2}]}]"""
    told = explain_key(parse(text), "k:user:42")
    assert [cause["where"] for cause in told["caches"][0]["busted_by"]] == [
        "row.a == 1",
        "(row.a == 1) && (row.b == 2)",
    ]
    assert "    for each row, old or new, where row.a == 1" in list(key_lines(told))


def test_a_key_with_a_hash_over_a_text_that_is_put_together_is_read_as_far_as_it_can_be() -> None:
    text = """version: 1
caches:
  c: {key: 'k:{team ":" name|sha1}:v{version}', version: 'k:{team ":" name|sha1}:ver'}
  d: {key: 'd:{team}:{name}:v{version}', version: 'd:{team ":" name|md5}:ver'}"""
    hashed = "adf14d23d3caa1297fd8df9a6f360b9d003ef4bc"
    (reading,) = read_key(parse(text), f"k:{hashed}:v7")
    assert reading.params == {'team ":" name': hashed, "version": "7"}
    assert reading.version_key == f"k:{hashed}:ver"
    assert f'  team ":" name = {hashed} (after its filters)' in list(
        key_lines(explain_key(parse(text), f"k:{hashed}:v7"))
    )
    (reading,) = read_key(parse(text), "d:7:Ada:v7")
    assert reading.version_key == "d:a27bf966064719dd9571823232dc7184:ver"
    assert read_key(parse(text), f"k:{hashed[1:]}:v7") == []


def test_it_is_told_which_rules_bust_a_key() -> None:
    told = explain_key(RULES, "shop:dash:42:v7")
    assert told["key"] == "shop:dash:42:v7"
    (cache,) = told["caches"]
    assert (cache["cache"], cache["is"], cache["version_key"]) == ("dash", "key", "shop:dash:42:ver")
    assert [cause["rule"] for cause in cache["busted_by"]] == ["user-changed", "order-changed"]
    assert cache["busted_by"][0] == {
        "rule": "user-changed",
        "defined_at": "rules.yaml:12",
        "table": "public.users",
        "on": ["insert", "update", "delete", "truncate"],
        "columns": ["name"],
        "when": "new.id > 0",
        "where": None,
        "params": {"id": "id"},
        "via": None,
        "certain": True,
        "action": "bump",
    }
    assert cache["busted_by"][1]["on"] == ["insert", "update"]
    assert json.loads(json.dumps(told)) == told


REST = """
version: 1
caches:
  meta: {key: "shop:meta:{project}:*"}
  other: {key: "shop:meta:{project}:{name}:x"}
rules:
  - {name: project-changed, table: public.projects, bust: [meta: {project: id}]}
  - {name: settings-changed, table: public.settings, bust: [meta: {sweep: true}]}
"""


def test_a_key_with_a_rest_is_told_what_searches_and_sweeps_it() -> None:
    told = explain_key(parse(REST), "shop:meta:7:name:de\\x00lock")
    (cache,) = told["caches"]
    assert cache["params"] == {"project": "7", "*": "name:de"}
    assert [cause["action"] for cause in cache["busted_by"]] == ["search", "sweep"]
    assert list(key_lines(told)) == [
        "shop:meta:7:name:de\\x00lock is the lock of a key of cache meta (rules.yaml:4)",
        "  project = 7",
        "  * = name:de",
        "  searched for by its prefix, and deleted, by rule project-changed (rules.yaml:7)",
        "    on insert, update, delete, truncate of public.projects",
        "    project is column id",
        "  swept with its whole cache by rule settings-changed (rules.yaml:8)",
        "    on insert, update, delete, truncate of public.settings",
    ]
    with pytest.raises(errors.InvalidatorError, match=re.escape("whose keys look like `shop:meta:{project}:*`")):
        explain_key(parse(REST), "shop:met")


@pytest.mark.parametrize(("prefixes", "named"), [(["shop:meta:7:"], True), (["shop:meta:77:", "shop:meta:"], True)])
@pytest.mark.parametrize("shown", ["raw_keys", "key_hashes"])
def test_a_search_names_the_keys_under_its_prefixes(prefixes: list[str], shown: str, *, named: bool) -> None:
    last = LastBusts(parse(REST), "shop:meta:7:x", lambda key: f"hash of {key!r}")
    keys = prefixes if shown == "raw_keys" else [f"hash of {prefix.encode()!r}" for prefix in prefixes]
    last.take({"event": "bust", "cache": "meta", "action": "search", shown: keys})
    last.take({"event": "bust", "cache": "meta", "action": "search", shown: ["shop:meta:77:"]})
    told: dict[str, Any] = {"caches": [{"cache": "meta"}]}
    last.tell(told)
    assert [bust["names_key"] for bust in told["caches"][0]["last_busts"]] == [named, False]


def test_a_key_in_text_says_the_same() -> None:
    assert list(key_lines(explain_key(RULES, "shop:page:7:42"))) == [
        "shop:page:7:42 is a key of cache page (rules.yaml:8)",
        "  team = 7",
        "  user = 42",
        "  may be deleted by rule order-changed (rules.yaml:17)",
        "    on insert, update of public.orders",
        "    user is column user_id",
        "    if its query gives this key: the other parameters are the rows of SELECT team FROM m WHERE id = {id}",
    ]
    assert "  nothing busts or sweeps it: it is `ttl_only`" in key_lines(explain_key(RULES, "shop:counts"))
    assert "  no rule busts it" in key_lines(explain_key(RULES, "shop:alone"))
    assert "  each bust is told on the channel busts" in key_lines(explain_key(RULES, "shop:alone"))


def test_a_filter_is_not_undone_and_not_applied_twice() -> None:
    (cache,) = explain_key(RULES, "shop:mail:ada@x:v3")["caches"]
    assert (cache["filtered"], cache["version_key"]) == (["email"], "shop:mail:ada@x:ver")
    text = 'version: 1\ncaches: {q: {key: "k:{q|sha256}:v{version}", version: "k:{q}:ver"}}'
    (cache,) = explain_key(parse(text), f"k:{'ab' * 32}:v3")["caches"]
    assert cache["version_key"] is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("shop:usr:42", "the nearest is cache user, whose keys look like `shop:user:{id}`."),
        ("shop:produce:42", "the nearest is cache product, whose keys look like `shop:product:{id}:v{version}`."),
    ],
)
def test_a_key_of_no_cache_is_told_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(errors.InvalidatorError, match=re.escape(nearest)) as caught:
        explain_key(RULES, key)
    assert caught.value.exit_code == 1


def test_a_key_is_of_no_cache_where_there_is_none() -> None:
    with pytest.raises(errors.InvalidatorError, match="the rule files define none"):
        explain_key(parse("version: 1"), "x")


# ── A change ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def explained(table: str, op: str, old: str | None = None, new: str | None = None) -> dict[str, Any]:
    change = read_change(table, op, old, new)
    return explain_change(change, simulate(RULES, change, {}), live=False)


def test_a_change_is_told_with_each_rule_and_all_busts() -> None:
    told = explained("public.users", "insert", new='{"id": 42, "email": "Ada@X"}')
    (rule,) = told["rules"]
    assert (rule["rule"], rule["fires"], rule["why_not"]) == ("user-changed", True, [])
    assert [bust["text"] for bust in told["busts"]] == [
        "shop:user:42",
        "bump shop:dash:42:ver",
        "bump shop:mail:ada@x:ver",
    ]
    assert told["busts"][1] == {
        "action": "bump",
        "cache": "dash",
        "key": "shop:dash:42:ver",
        "text": "bump shop:dash:42:ver",
    }
    assert json.loads(json.dumps(told)) == told


def test_a_change_in_text_says_the_same() -> None:
    row = '{"id": 1, "user_id": 5}'
    assert list(change_lines(explained("public.orders", "insert", new=row))) == [
        "insert of public.orders, by the rule files alone, without the database",
        "rule order-changed (rules.yaml:17) fires",
        "  bump shop:dash:5:ver   cache dash",
        "  not known: keys of cache page, which a query gives; set CDC_POSTGRES_DSN to ask it",
        "1 bust in all",
    ]
    assert list(change_lines(explained("public.orders", "delete", old=row)))[1:] == [
        "rule order-changed (rules.yaml:17) does not fire",
        "  its `on` has no delete",
        "0 busts in all",
    ]


@pytest.mark.parametrize(
    ("given", "mistake"),
    [
        (("users", "insert", None, "{}"), "--table: `users` lacks its schema; write `public.users`."),
        (("a.b", "insrt", None, "{}"), "--op: `insrt` is no kind of change; did you mean `insert`?"),
        (("a.b", "insert", None, None), "A change of kind insert needs --new; give its row as JSON."),
        (("a.b", "update", None, "{}"), "A change of kind update needs --old; give its row as JSON."),
        (("a.b", "delete", "{}", "{}"), "A change of kind delete has no --new; leave it out."),
        (("a.b", "truncate", "{}", None), "A change of kind truncate has no --old; leave it out."),
        (("a.b", "insert", None, "id=1"), "--new is not JSON"),
        (("a.b", "insert", None, "[1]"), "--new is no row"),
        (("a.b", "insert", None, '{"a": [1]}'), "--new is no row"),
        (("a.b", "insert", None, '{"a": "\\u0000"}'), "--new holds a character that PostgreSQL can't store"),
        (("a.b", "insert", None, '{"a": "\\ud800"}'), "--new holds a character that PostgreSQL can't store"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(given: tuple[str, str, str | None, str | None], mistake: str) -> None:
    with pytest.raises(errors.WrongSettings, match=re.escape(mistake)):
        read_change(*given)


def test_a_table_of_no_rule_is_told_the_nearest() -> None:
    assert str(no_rule(RULES, Table("public", "user"))) == (
        "No rule names the table public.user; did you mean `public.users`?"
    )


# ── Whatever the templates, rules and changes are ────────────────────────────────────────────────────────────────────

LITERALS = st.text("ab:{}-", min_size=1, max_size=3)
# None of the characters of literals: where a parameter begins and ends is then sure.
VALUES = st.text("xyzXYZ019é ", min_size=1, max_size=4)
FILTERED = st.lists(st.sampled_from(["lower", "upper"]), max_size=2).map(tuple)


@st.composite
def unambiguous(draw: st.DrawFn) -> Template:
    """Templates with literal text between any two parameters."""
    parts: list[bytes | Param] = [draw(LITERALS).encode()]
    for name in draw(st.lists(st.sampled_from("pqr"), max_size=4)):
        parts += [Param(name, draw(FILTERED)), draw(LITERALS).encode()]
    return Template.of(parts)


@given(unambiguous(), st.fixed_dictionaries({"p": VALUES, "q": VALUES, "r": VALUES}))
def test_a_key_gives_back_what_it_was_made_of(template: Template, values: dict[str, str]) -> None:
    key = template.render(values)
    assert key is not None
    found = template.match(key)
    assert found is not None
    assert found.keys() == set(template.params)
    for name, value in found.items():
        written = [part for part in occurrences(template) if part.name == name]
        # Unfiltered, if the template has it unfiltered anywhere.
        possible = [part for part in written if not part.filters] or written
        assert value in {part.change(values[name].encode()) for part in possible}


@given(unambiguous(), st.fixed_dictionaries({"p": st.text(), "q": st.text(), "r": st.text()}))
def test_what_is_read_from_any_key_makes_that_key_again(template: Template, values: dict[str, str]) -> None:
    assume(not any(part.filters for part in occurrences(template)))
    key = template.render(values)
    assert key is not None
    found = template.match(key)
    assert found is not None
    assert template.render(found) == key


def occurrences(template: Template) -> list[Param]:
    return [part for part in template.parts if isinstance(part, Param)]


COLUMNS = ("id", "team", "name")
CACHES = {
    "one": 'one: {key: "k:one:{id}"}',
    "two": 'two: {key: "k:two:{team}:{id|lower}"}',
    "fixed": "fixed: {key: 'k:fixed'}",
    "versioned": 'versioned: {key: "k:versioned:{id}:{team}:v{version}", version: "k:versioned:{id}:ver"}',
    "family": 'family: {key: "k:family:{id}:v{version}", version: "k:family:ver", bump_over: 5}',
    "derived": 'derived: {key: "k:derived:{member}:{id}"}',
}
BUSTS = {
    **{name: name for name in CACHES if name != "derived"},
    "mapped": "one: {id: team}",
    "derived": 'derived: {id: name, via: "SELECT member FROM m WHERE id = {id}"}',
}
CONDITIONS = ("new.id != old.id", "op == 'delete'", "new.team == 'x'", "op != 'update' || new.name != old.name")
SOME = st.text("x1:v{}", max_size=4) | st.none()


@st.composite
def rule_sets(draw: st.DrawFn) -> RuleSet:
    lines = ["version: 1", "caches:", *(f"  {cache}" for cache in CACHES.values()), "rules:"]
    for number in range(draw(st.integers(1, 3))):
        on = draw(st.lists(st.sampled_from(["insert", "update", "delete", "truncate"]), min_size=1, unique=True))
        columns = draw(st.lists(st.sampled_from(COLUMNS), unique=True))
        busts = draw(st.lists(st.sampled_from(sorted(BUSTS)), min_size=1, unique=True))
        lines += [f"  - name: r{number}", f"    table: public.{draw(st.sampled_from('tu'))}"]
        lines += [f"    on: [{', '.join(on)}]", f"    old_row: {draw(st.sampled_from(['require', 'sweep', 'ignore']))}"]
        lines += [f"    columns: [{', '.join(columns)}]"] if columns else []
        lines += [f'    when: "{draw(st.sampled_from(CONDITIONS))}"'] if draw(st.booleans()) else []
        lines += ["    bust:", *(f"      - {BUSTS[bust]}" for bust in busts)]
    return parse("\n".join(lines))


@st.composite
def changes(draw: st.DrawFn) -> Change:
    rows = st.dictionaries(st.sampled_from(COLUMNS), SOME)
    op = draw(st.sampled_from(["insert", "update", "delete", "truncate"]))
    old = draw(rows) if op in {"update", "delete"} else None
    new = draw(rows) if op in {"update", "insert"} else None
    return Change(Table("public", draw(st.sampled_from("tu"))), op, old, new)


@given(rule_sets(), changes(), st.lists(st.fixed_dictionaries({"member": SOME}), max_size=7))
def test_both_ways_of_explain_agree(rule_set: RuleSet, change: Change, members: list[dict[str, str | None]]) -> None:
    for verdict in simulate(rule_set, change, {"derived": members}):
        assert verdict.unanswered == ()
        assert verdict.fired or verdict.why_not
        assert verdict.fired or not verdict.busts
        for bust in verdict.busts:
            if bust.kind == "sweep":
                assert any(busted.cache.name == bust.cache for busted in verdict.rule.busts)
                continue
            causes = [
                (cache["cache"], cause["rule"], cause["table"], change.op in cause["on"])
                for cache in explain_key(rule_set, bust.key)["caches"]
                for cause in cache["busted_by"]
            ]
            assert (bust.cache, verdict.rule.name, str(change.table), True) in causes


def test_the_example_of_the_format_agrees_with_itself() -> None:
    rule_set = parse(DESIGN)
    for test in rule_set.tests:
        for bust in test.busts:
            assert explain_key(rule_set, bust.removeprefix("bump "))["caches"][0]["busted_by"]


# ── The last busts of a key ──────────────────────────────────────────────────────────────────────────────────────────


def bust(cache: str, action: str = "delete", **fields: Any) -> dict[str, Any]:
    return {"event": "bust", "cache": cache, "action": action, "ts": "2026-11-25T12:00:00Z", "rule": "r", **fields}


def hashed(key: bytes) -> str:
    return f"hash of {key.decode()}"


@pytest.mark.parametrize(
    ("key", "event", "names"),
    [
        ("shop:user:42", bust("user", key_hashes=["hash of shop:user:41", "hash of shop:user:42"]), True),
        ("shop:user:42", bust("user", key_hashes=["hash of shop:user:4"]), False),
        ("shop:user:42\0lock", bust("user", key_hashes=["hash of shop:user:42"]), True),
        ("shop:user:42\0stale", bust("user", key_hashes=["hash of shop:user:42"]), True),
        ("shop:user:42", bust("user", raw_keys=["shop:user:42"]), True),
        ("shop:user:42", bust("user", raw_keys=["shop:user:4"]), False),
        ("shop:user:42", bust("user"), None),
        ("shop:user:42", bust("user", "sweep"), True),
        # A key with a version is busted by bumping that.
        ("shop:dash:42:v7", bust("dash", "bump", key_hashes=["hash of shop:dash:42:ver"]), True),
        ("shop:dash:42:v7\0lock", bust("dash", "bump", raw_keys=["shop:dash:42:ver"]), True),
        ("shop:dash:42:ver", bust("dash", "bump", key_hashes=["hash of shop:dash:42:ver"]), True),
        ("shop:dash:42:ver\0stale", bust("dash", "bump", key_hashes=["hash of shop:dash:42:ver"]), True),
        ("shop:dash:42:ver\0stale", bust("dash", key_hashes=["hash of shop:dash:42:ver"]), False),
        ("shop:dash:42:v7", bust("dash", "bump", key_hashes=["hash of shop:dash:41:ver"]), False),
        ("shop:product:42:v7", bust("product", key_hashes=["hash of shop:product:42:v7"]), True),
        ("shop:product:42:v{version}", bust("product", key_hashes=["hash of shop:product:42:v7"]), None),
        ("shop:catalog:ver", bust("product", key_hashes=["hash of shop:product:42:v7"]), False),
        # What a hash was made of, nobody knows.
    ],
)
def test_whether_an_event_names_a_key_is_told_by_what_it_shows(
    key: str, event: dict[str, Any], names: bool | None
) -> None:
    last = LastBusts(RULES, key, hashed)
    last.take(event)
    told = explain_key(RULES, key)
    last.tell(told)
    (cache,) = told["caches"]
    assert [each["names_key"] for each in cache["last_busts"]] == [names]
    mark = {True: "*", False: " ", None: "?"}[names]
    assert [line for line in key_lines(told) if line.startswith(f"    {mark} 2026")]


def test_hashes_of_another_secret_tell_nothing() -> None:
    last = LastBusts(RULES, "shop:user:42", None)
    last.take(bust("user", key_hashes=["1234"]))
    told = explain_key(RULES, "shop:user:42")
    last.tell(told)
    assert told["caches"][0]["last_busts"][0]["names_key"] is None


def test_ten_busts_of_the_cache_are_told_and_the_newest_that_names_the_key_before_them() -> None:
    last = LastBusts(RULES, "shop:user:42", hashed)
    for number in range(20):
        last.take(bust("user", lsn=number, raw_keys=[f"shop:user:{number}"]))
        last.take(bust("dash", "bump"))
        last.take({"event": "gap", "caches": ["user"], "ts": "then"})
        assert not last.complete
    for number in range(20, 23):
        last.take(bust("user", lsn=number, raw_keys=["shop:user:42"]))
        assert last.complete
    told = explain_key(RULES, "shop:user:42")
    last.tell(told)
    assert [each["lsn"] for each in told["caches"][0]["last_busts"]] == [*range(10), 20]


def test_a_key_that_nothing_names_is_told_with_how_far_back_was_looked() -> None:
    last = LastBusts(RULES, "shop:user:42", hashed)
    told = explain_key(RULES, "shop:user:42")
    last.tell(told)
    assert list(key_lines(told))[-1] == "  no bust of it is in the event stream, which is empty"
    last.take(bust("dash", "bump"))
    last.tell(told)
    assert list(key_lines(told))[-1] == "  no bust of it is in the event stream, since 2026-11-25T12:00:00Z"
    last.take(bust("user", raw_keys=["shop:user:41\x1b[2J"], table="t\x1b[2J"))
    last.tell(told)
    assert list(key_lines(told))[-1] == "    none in the event stream names this key, since 2026-11-25T12:00:00Z"
    assert all(line.isprintable() for line in key_lines(told))


def test_the_hash_under_which_events_show_a_key_is_told() -> None:
    """Of what events name: the key that stands under a lock, or the version of a versioned key."""

    def hashed(key: bytes) -> str:
        return f"<{key.decode()}>"

    text = """
version: 1
caches:
  user: {key: "user:{id}"}
  list: {key: "list:{id}:v{version}", version: "list:{id}:ver"}
"""
    for key, named in {
        "user:7": "user:7",
        "user:7\0lock": "user:7",
        "list:7:v3": "list:7:ver",
        "list:7:ver": "list:7:ver",
    }.items():
        told = explain_key(parse(text), key, hashed)
        assert told["caches"][0]["hashes"] == {named: f"<{named}>"}, key
        assert f"  events show {named} as the hash <{named}>" in list(key_lines(told))
