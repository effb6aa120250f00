"""What `check` finds in rule files alone: of each finding, a file that has it and one that has not."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import command

from cdc_invalidator.commands.check_rules import offline
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, Severity, in_order, report, table
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.overlap import Language, Texts, common, readings
from cdc_invalidator.rules.template import Param, Template
from cdc_invalidator.rules.wording import Place

if TYPE_CHECKING:
    from pathlib import Path

GOOD = "  user: {key: 'app:env:user:{id}', ttl: 5m}\n"
RULE = "  - {name: user-changed, table: public.users, bust: [user]}\n"


def found(
    caches: str, *more_rules: str, columns: Columns | None = None, cluster: bool = False, rule: str = RULE
) -> list[Finding]:
    text = f"version: 1\ncaches:\n{caches}rules:\n{rule}" + "".join(f"  - {more}\n" for more in more_rules)
    return offline(parse_rules([("rules.yaml", text)], {}), columns or Columns(), cluster=cluster)


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def only(findings: list[Finding], code: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.code == code]
    return finding


def test_a_file_with_everything_in_order_has_no_findings() -> None:
    assert found(GOOD) == []


# Keys with a rest


def test_keys_with_a_rest_that_nothing_else_has_are_in_order() -> None:
    assert (
        found(GOOD + "  open: {key: 'app:env:open:{id}:*', ttl: 5m}\n", "{name: o, table: public.t, bust: [open]}")
        == []
    )


def test_a_time_for_old_values_that_no_search_leaves_is_told() -> None:
    caches = GOOD + "  open: {key: 'app:env:open:{id}:*', ttl: 5m, stale_for: 5s}\n"
    assert codes(found(caches, "{name: o, table: public.t, bust: [open]}")) == ["stale_for_unused"]


def test_keys_among_those_with_a_rest_are_noted_and_no_error() -> None:
    caches = GOOD + "  all: {key: 'app:env:{kind}:*', ttl: 5m}\n"
    findings = found(caches, "{name: o, table: public.t, bust: [all]}")
    assert codes(findings) == ["same_keys", "sweeps_others"]
    assert {finding.severity for finding in findings} == {Severity.NOTE}


# Rules


def test_a_rule_that_ignores_the_old_row_is_listed_at_its_line() -> None:
    finding = only(found(GOOD, "{name: two, table: public.t, old_row: ignore, bust: [user]}"), "old_row_ignored")
    assert (finding.severity, finding.place) == (Severity.NOTE, Place("rules.yaml", 6, 5))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ("on: [insert], when: \"op == 'update'\"", "never_fires"),
        ('on: [insert, update], where: "row.a == 1 && false"', "never_fires"),
        ('where: "row.a == 1 && false"', "never_fires_on"),
        ("columns: [a], immutable: [a, b], on: [update], where: row.b == 1", "never_fires"),
        ("on: [insert, delete], when: \"op == 'update' && old.a != new.a\"", "never_fires"),
        ("on: [delete], when: new != null", "never_fires"),
        ("on: [update], columns: [a, b], immutable: [a, b]", "never_fires"),
        ("when: \"op != 'truncate' && new.a > 1\"", "never_fires_on"),
        ("columns: [a], immutable: [a]", "never_fires_on"),
        ("on: [insert], columns: [a]", "columns_unused"),
        ("on: [update], when: old.a != new.a", None),
        ("on: [insert, delete], when: has(new.a)", None),
        ("on: [update], columns: [a, b], immutable: [a]", None),
        ("columns: [a]", None),
    ],
)
def test_a_rule_that_can_never_fire_is_told(fields: str, code: str | None) -> None:
    assert codes(found(GOOD, f"{{name: two, table: public.t, bust: [user], {fields}}}")) == ([code] if code else [])


@pytest.mark.parametrize(
    ("via", "lacks"),
    [
        ("{via: 'SELECT uid FROM public.members WHERE t = {id}'}", "gives no id, which cache user needs; did you mean"),
        ("{via: 'SELECT 1 AS n'}", "gives no id"),
        ("{via: 'SELECT t.id FROM public.t'}", None),
        ("{via: 'SELECT * FROM public.t'}", None),
    ],
)
def test_a_parameter_that_the_text_of_a_query_shows_not_to_come_is_an_error(via: str, lacks: str | None) -> None:
    findings = found(GOOD, f"{{name: two, table: public.t, bust: [user: {via}]}}")
    assert codes(findings) == (["query_lacks_parameter"] if lacks else [])
    if lacks:
        assert (findings[0].severity, findings[0].place) == (Severity.ERROR, Place("rules.yaml", 6, 5))
        assert lacks in findings[0].sentence


@pytest.mark.parametrize(
    ("column", "shown", "told"),
    [
        ("tenantId", "tenant_id", True),
        ("tenant_id", "tenant_id", False),
        ("owner", "tenant_id", False),
    ],
)
def test_a_column_that_tests_show_under_another_spelling_is_told(column: str, shown: str, told: bool) -> None:
    tests = f"tests:\n  - {{name: t, change: {{table: public.t, op: insert, new: {{{shown}: 1}}}}, busts: []}}\n"
    rule = f"{RULE}  - {{name: two, table: public.t, bust: [user: {{id: {column}}}]}}\n{tests}"
    findings = found(GOOD, rule=rule)
    assert codes(findings) == (["column_not_shown"] if told else [])
    assert not told or "did you mean tenant_id?" in findings[0].sentence


# Caches


@pytest.mark.parametrize(
    ("cache", "code"),
    [
        ("{key: 'app:env:other:{id}', ttl: 1m}", "never_busted"),
        ("{key: 'app:env:other:{id}', ttl: 1m, ttl_only: true}", None),
    ],
)
def test_a_cache_that_no_rule_busts_is_told_unless_it_is_ttl_only(cache: str, code: str | None) -> None:
    assert codes(found(f"{GOOD}  other: {cache}\n")) == ([code] if code else [])


@pytest.mark.parametrize(
    ("cache", "code"),
    [
        ("{key: 'app:env:user:{id}'}", "no_ttl"),
        ("{key: 'user:{id}', ttl: 1m}", "short_prefix"),
        ("{key: '{id}:user:app:env', ttl: 1m}", "short_prefix"),
        ("{key: 'app:env:u:{id}:v{version}', version: 'u:{id}', ttl: 1m}", "short_prefix"),
        ("{key: 'app:env:{id}', ttl: 1m}", None),
        ("{key: 'app:env:{{{id}}}:user', ttl: 1m}", None),
    ],
)
def test_a_cache_without_a_ttl_or_a_prefix_is_told_at_its_line(cache: str, code: str | None) -> None:
    findings = found(f"  user: {cache}\n")
    assert codes(findings) == ([code] if code else [])
    assert [finding.place for finding in findings] == [Place("rules.yaml", 3, 3)] * len(findings)


def test_in_a_cluster_a_key_needs_a_hash_tag_unless_it_has_a_version() -> None:
    assert codes(found(GOOD, cluster=True)) == ["no_hash_tag"]
    assert found("  user: {key: 'app:env:{{{id}}}:user', ttl: 5m}\n", cluster=True) == []
    versioned = "  user: {key: 'app:env:u:{id}:v{version}', version: 'app:env:u:{id}:ver', ttl: 5m}\n"
    assert found(versioned, cluster=True) == []


def test_in_a_cluster_a_key_that_is_deleted_below_bump_over_needs_a_hash_tag() -> None:
    both = "  user: {key: 'app:env:u:%s:v{version}', version: 'app:env:u:ver', bump_over: 10, ttl: 5m}\n"
    assert codes(found(both % "{id}", cluster=True)) == ["no_hash_tag"]
    assert found(both % "{{{id}}}", cluster=True) == []


# Keys that are two things


def pair(one: str, other: str, *, columns: Columns | None = None, fields: str = "") -> list[Finding]:
    findings = found(
        f"  user: {{key: '{one}', ttl: 1m}}\n  other: {{key: '{other}', ttl: 1m{fields}}}\n",
        "{name: other-changed, table: public.t, bust: [other]}",
        columns=columns,
    )
    return [finding for finding in findings if finding.code != "sweeps_others"]


def test_two_caches_that_can_have_the_same_key_are_told_with_an_example() -> None:
    finding = only(pair("app:env:page:{slug}", "app:env:page:home"), "same_keys")
    assert (finding.severity, finding.place) == (Severity.WARNING, Place("rules.yaml", 4, 3))
    assert "`app:env:page:home`" in finding.sentence
    assert "rules.yaml:3:3" in finding.sentence


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("app:env:user:{id}", "app:env:user:{id}:orders"),
        ("app:env:user:{id}", "app:env:team:{id}"),
        ("app:env:user:{id}", "app:env:user:v1:{id}"),
        ("app:env:page:{path|sha256}", "app:env:page:home"),
        ("app:env:page:{path|urlencode}", "app:env:page:a/b"),
        ("app:env:page:{path|lower}", "app:env:page:Home"),
        ("app:env:{id}-x", "app:env:{id}-y"),
        ("app:env:users/{id}", "app:env:users/{id}/orders"),
    ],
)
def test_caches_whose_keys_differ_whatever_the_parameters_are_not_told(one: str, other: str) -> None:
    assert pair(one, other) == []


def test_with_what_is_known_of_the_columns_a_clash_is_sure_or_none() -> None:
    numbers = Columns({"user": {"id": overlap.NUMBER}, "other": {"team": overlap.NUMBER}})
    assert pair("app:env:user:{id}", "app:env:user:me", columns=numbers) == []
    assert only(pair("app:env:{id}", "app:env:{team}", columns=numbers), "same_keys").severity is Severity.ERROR


def test_text_that_may_hold_the_separator_is_worth_a_note() -> None:
    texts = Columns({"user": {"mail": overlap.TEXT}, "other": {"id": overlap.NUMBER}})
    finding = only(pair("app:env:user:{mail}", "app:env:user:{id}:orders", columns=texts), "same_keys")
    assert finding.severity is Severity.NOTE
    assert "`app:env:user:1:orders`" in finding.sentence
    assert pair("app:env:user:{mail|urlencode}", "app:env:user:{id}:orders", columns=texts) == []


@pytest.mark.parametrize(
    ("key", "known", "severity"),
    [
        ("app:env:{a}{b}", {}, Severity.WARNING),
        ("app:env:{a}{b}", {"a": overlap.NUMBER, "b": overlap.NUMBER}, Severity.WARNING),
        ("app:env:{a}1{b}", {"a": overlap.NUMBER, "b": overlap.NUMBER}, Severity.WARNING),
        ("app:env:{a}-{b}", {"a": overlap.TEXT, "b": overlap.NUMBER}, Severity.WARNING),
        ("app:env:{a}:{b}", {"a": overlap.TEXT, "b": overlap.TEXT}, Severity.NOTE),
        ("app:env:{a}:{b}", {}, None),
        ("app:env:{a}-{b}", {}, None),
        ("app:env:{a}:{b}", {"a": overlap.NUMBER, "b": overlap.NUMBER}, None),
        ("app:env:{a}:{b}", {"a": overlap.NUMBER, "b": overlap.TEXT}, None),
        ("app:env:{a|urlencode}:{b|urlencode}", {"a": overlap.TEXT, "b": overlap.TEXT}, None),
        ("app:env:{a}{b|sha256}", {}, None),
        ("app:env:{a}{a}", {"a": overlap.NUMBER}, None),
    ],
)
def test_a_key_that_two_rows_can_share_is_told(key: str, known: dict[str, Texts], severity: Severity | None) -> None:
    findings = found(f"  user: {{key: '{key}', ttl: 1m}}\n", columns=Columns({"user": known}))
    assert [finding.severity for finding in findings] == ([severity] if severity else [])
    assert codes(findings) == ["ambiguous_key"] * len(findings)


def test_a_key_that_is_a_version_counter_is_told() -> None:
    version = ", version: 'app:env:{id}:v'"
    assert codes(pair("app:env:{id}:v", "app:env:{id}:x{version}", fields=version)) == ["key_is_ours"]
    own = "  user: {key: 'app:env:{id}:{version}', version: 'app:env:{id}:ver', ttl: 1m}\n"
    assert found(own) == []
    assert codes(found(own.replace(":ver'", ":0'"))) == ["key_is_ours"]


def test_no_key_is_a_lock_or_an_old_value() -> None:
    assert pair("app:env:{id}:lock", "app:env:{id}", fields=", stale_for: 5s") == []
    assert pair("app:env:{id}:stale", "app:env:{id}", fields=", stale_for: 5s") == []
    texts = Columns({"user": {"mail": overlap.TEXT}})
    assert found("  user: {key: 'app:env:user:{mail}', ttl: 1m, stale_for: 5s}\n", columns=texts) == []


def test_a_sweep_that_takes_more_than_its_cache_is_worth_a_note() -> None:
    caches = f"{GOOD}  orders: {{key: 'app:env:user:{{id}}:orders', ttl: 1m, ttl_only: true}}\n"
    finding = only(found(caches), "sweeps_others")
    assert finding.severity is Severity.NOTE
    assert "`app:env:user:*`" in finding.sentence
    assert found(caches.replace("user:{id}:orders", "orders:{id}")) == []
    apart = (
        "  user: {key: 'app:env:t:{id}:settings', ttl: 1m}\n  b: {key: 'app:env:t:{t}:{x}', ttl: 1m, ttl_only: true}\n"
    )
    assert only(found(apart), "sweeps_others").place == Place("rules.yaml", 4, 3)


@pytest.mark.parametrize(
    ("one", "other", "codes_"),
    [
        ("app:env:meta:{id}:*", "app:env:meta:{team}:title", ["same_keys"]),
        ("app:env:meta:{id}:*", "app:env:metas:{team}:title", []),
        ("app:env:meta:{id}:*", "app:env:meta:{team}:title:long", []),
    ],
)
def test_the_rest_of_a_key_that_no_bust_names_counts_as_text_without_a_separator(
    one: str, other: str, codes_: list[str]
) -> None:
    assert codes(pair(one, other)) == codes_


def test_a_rest_behind_a_parameter_makes_a_key_ambiguous() -> None:
    assert codes(found("  user: {key: 'app:env:{id}*', ttl: 1m}\n")) == ["ambiguous_key"]
    assert codes(found("  user: {key: 'app:env:{id}:*', ttl: 1m}\n")) == []


# Keys that are given


def test_no_finding_asks_for_other_keys_where_they_are_given() -> None:
    texts = Columns({"user": {"a": overlap.TEXT, "b": overlap.TEXT}, "other": {"id": overlap.NUMBER}})
    caches = "  user: {key: 'u{a}_{b}', ttl: 1m%s}\n  other: {key: 'u{id}_1', ttl: 1m%s}\n"
    rule = "{name: two, table: public.t, bust: [other]}"
    free = found(caches % ("", ""), rule, columns=texts, cluster=True)
    assert set(codes(free)) == {
        "short_prefix", "no_hash_tag", "ambiguous_key", "same_keys", "sweeps_others",
    }  # fmt: skip
    told = found(caches % (", given: true", ", given: true"), rule, columns=texts, cluster=True)
    assert sorted(codes(told)) == ["same_keys", "sweeps_others"]
    assert {finding.severity for finding in told} == {Severity.NOTE}


def test_keys_that_several_given_caches_share_are_one_note_whatever_their_number() -> None:
    numbers = Columns({name: {"id": overlap.NUMBER} for name in "abcde"})
    caches = "".join(
        f"  {name}: {{key: '{key}', ttl: 1m, given: true}}\n"
        for name, key in {"a": "x{id}", "b": "x{other}", "c": "x1{id}", "d": "y{id}", "e": "yy{id}"}.items()
    )
    rule = "  - {name: r, table: public.t, bust: [a, b, c, d, e]}\n"
    told = [finding for finding in found(caches, columns=numbers, rule=rule) if finding.code == "same_keys"]
    assert [finding.severity for finding in told] == [Severity.NOTE]
    assert "a, b and c (such as `x" in told[0].sentence
    assert "; d and e (such" not in told[0].sentence
    assert "nothing needs to be done" in told[0].sentence


def test_where_one_of_two_caches_is_given_the_other_is_told_to_change() -> None:
    caches = "  user: {key: 'app:env:{id}', ttl: 1m%s}\n  other: {key: 'app:env:{team}', ttl: 1m%s}\n"
    numbers = Columns({"user": {"id": overlap.NUMBER}, "other": {"team": overlap.NUMBER}})
    rule = "{name: two, table: public.t, bust: [other]}"
    for given_, name, line in ((", given: true", "other", 4), ("", "user", 3)):
        marks = (given_, "" if given_ else ", given: true")
        finding = only(found(caches % marks, rule, columns=numbers), "same_keys")
        assert (finding.severity, finding.place) == (Severity.ERROR, Place("rules.yaml", line, 3))
        assert f"give cache {name} another literal part" in finding.sentence


def test_a_given_key_that_a_bump_would_overwrite_is_told_with_a_remedy_that_leaves_it() -> None:
    caches = (
        "  user: {key: 'app:env:{id}:v', ttl: 1m, given: true}\n"
        "  other: {key: 'app:env:{id}:x{version}', version: 'app:env:{id}:v', ttl: 1m%s}\n"
    )
    rule = "{name: two, table: public.t, bust: [other]}"
    for given_ in ("", ", given: true"):
        finding = only(found(caches % given_, rule), "key_is_ours")
        assert (finding.severity, finding.place) == (Severity.WARNING, Place("rules.yaml", 4, 3))
        assert "give the version of other another literal part" in finding.sentence


# The languages themselves

PARTS = st.lists(
    st.one_of(st.sampled_from([b"a", b":", b"1", b"a:1"]), st.sampled_from([Param("x"), Param("y"), Param("z")])),
    min_size=1,
    max_size=5,
)
VALUES = st.fixed_dictionaries(dict.fromkeys("xyz", st.sampled_from([overlap.TEXT, overlap.PART, overlap.NUMBER])))


def pattern(template: Template, values: dict[str, Texts]) -> re.Pattern[bytes]:
    """The same language as a regular expression; a parameter that comes again must be the same."""
    of = {overlap.TEXT: rb"[ -~]+", overlap.PART: rb"[ -9;-~]+", overlap.NUMBER: rb"[-0-9][0-9]*"}
    seen: set[str] = set()
    text = b""
    for part in template.parts:
        if isinstance(part, bytes):
            text += re.escape(part)
        elif part.name in seen:
            text += b"(?P=%b)" % part.name.encode()
        else:
            seen.add(part.name)
            text += b"(?P<%b>%b)" % (part.name.encode(), of[values[part.name]])
    return re.compile(text)


@given(PARTS, PARTS, VALUES, VALUES, st.lists(st.sampled_from([b"a", b":", b"1", b"-"]), max_size=6))
def test_a_common_key_is_of_both_and_none_is_missed(
    mine: list[bytes | Param],
    theirs: list[bytes | Param],
    values: dict[str, Texts],
    others: dict[str, Texts],
    letters: list[bytes],
) -> None:
    one, other = Template.of(mine), Template.of(theirs)
    key = common(Language(one, values), Language(other, others))
    patterns = (pattern(one, values), pattern(other, others))
    if key is not None:
        assert all(regular.fullmatch(key.encode()) for regular in patterns)
    elif all(len(template.params) == sum(isinstance(p, Param) for p in template.parts) for template in (one, other)):
        assert not all(regular.fullmatch(b"".join(letters)) for regular in patterns)


@given(PARTS, VALUES)
def test_two_readings_of_a_key_differ(parts: list[bytes | Param], values: dict[str, Texts]) -> None:
    template = Template.of(parts)
    both = readings(Language(template, values))
    if both is not None:
        assert both.one != both.other
        for reading in (both.one, both.other):
            given_ = dict(item.split(" = ", 1) for item in reading.split(", "))
            assert template.render(given_) == both.key.encode()


# What is shown


def test_the_table_is_aligned_and_no_wider_than_it_may_be() -> None:
    findings = in_order(
        [
            Finding(Severity.NOTE, "b", "Redis", "a note; leave it."),
            Finding(Severity.ERROR, "a", Place("rules.yaml", 3, 4), "word " * 40),
            Finding(
                Severity.ERROR, "a", Place("a/very/long/path/to/a/folder/with/rules.yaml", 3, 4), "wrong; mend it."
            ),
        ]
    )
    lines = table(findings).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line[:1].strip()] == ["error", "error", "note", "2"]
    assert lines[-1] == "2 errors, 1 note"
    assert lines[0] == "error    a/very/long/path/to/a/folder/with/rules.yaml:3:4"
    assert lines[1].index("wrong") == lines[2].index("word") == lines[3].index("word")
    assert table([]) == "nothing found"


def test_json_has_the_places_apart_and_counts() -> None:
    findings = [
        Finding(Severity.ERROR, "a", Place("r.yaml", 3, 4), "x", ("SELECT 1;",), ("SELECT 2;", "SELECT 3;")),
        Finding(Severity.WARNING, "b", "Redis", "y"),
    ]
    told = report(findings)
    assert (told["errors"], told["warnings"]) == (1, 1)
    first, second = told["findings"]
    assert first == {
        "severity": "error",
        "code": "a",
        "place": "r.yaml:3:4",
        "file": "r.yaml",
        "line": 3,
        "column": 4,
        "sentence": "x",
        "sql": ["SELECT 1;"],
        "or_sql": ["SELECT 2;", "SELECT 3;"],
    }
    assert (second["place"], second["file"], second["sql"], second["or_sql"]) == ("Redis", None, [], [])


# The command


def test_check_offline_needs_no_server_and_tells_mistakes_of_the_files_in_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(f"version: 1\ncaches:\n{GOOD}rules:\n{RULE}")
    done = command("check", "--offline", rules=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing found\n", "")
    clustered = command("check", "--offline", "--format", "json", rules=path, redis_url="redis+cluster://nowhere:1")
    assert (clustered.returncode, json.loads(clustered.stdout)["warnings"]) == (0, 1)
    path.write_text(path.read_text() + "  - {name: x, table: public.t, old_row: never, bust: [uesr]}\n")
    wrong = command("check", "--offline", rules=path)
    assert (wrong.returncode, wrong.stderr) == (1, "")
    assert f"{path.name}:6:41" in wrong.stdout
    assert "did you mean `user`?" in wrong.stdout
    assert wrong.stdout.splitlines()[-1] == "2 errors"


def test_without_its_settings_check_says_which_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(f"version: 1\ncaches:\n{GOOD}rules:\n{RULE}")
    for words, given_, name in (
        (["--offline"], {}, "CDC_RULES"),
        ([], {"rules": path, "redis_url": "redis://127.0.0.1:1"}, "CDC_POSTGRES_DSN"),
        (["--offline"], {"rules": path, "redis_url": "http://x"}, "CDC_REDIS_URL"),
    ):
        refused = command("check", *words, **given_)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert len(refused.stderr.splitlines()) == 1
        assert name in refused.stderr


@st.composite
def any_template(draw: st.DrawFn) -> Template:
    """Parameters with literal text between them, or with none."""
    parts: list[bytes | Param] = [draw(st.text("ab:", max_size=2)).encode()]
    for name in draw(st.permutations("pqr"))[: draw(st.integers(1, 3))]:
        parts += [Param(name), draw(st.text("ab:", max_size=2)).encode()]
    return Template.of([part for part in parts if part])


@given(any_template(), st.fixed_dictionaries(dict.fromkeys("pqr", st.text("ab:1é", min_size=1, max_size=4))))
def test_a_key_parses_back_to_its_parameters_or_the_template_is_called_ambiguous(
    template: Template, values: dict[str, str]
) -> None:
    key = template.render(values)
    assert key is not None
    wanted = {name: values[name].encode() for name in template.params}
    if template.match(key) != wanted:
        assert readings(Language(template, dict.fromkeys("pqr", overlap.TEXT))) is not None


@pytest.mark.parametrize(("other", "clash"), [("{b|sha1}", None), ("{c ':' d|md5}", "same_keys"), ("{b}", "same_keys")])
def test_hashes_are_told_apart_by_their_length(other: str, clash: str | None) -> None:
    caches = "  one: {key: \"app:env:{a ':' b|md5}\", ttl: 1m}\n" + f'  two: {{key: "app:env:{other}", ttl: 1m}}\n'
    rule = "  - {name: r, table: public.t, bust: [one, two]}\n"
    told = [code for code in codes(found(caches, rule=rule)) if code != "sweeps_others"]
    assert told == ([clash] if clash else [])
