"""What is wrong in rule files is reported with its place, all at once."""

from __future__ import annotations

import pytest
from rule_texts import A_DURATION, GOOD, busting, mistakes, parse

from cdc_invalidator.rules.format import CacheEntry

# ── What is wrong ────────────────────────────────────────────────────────────────────────────────────────────────────

A_NAME = "use 1 to 63 of A-Z a-z 0-9 _ . -, and begin with a letter or a digit"
A_WORD = "a parameter may not be called `{}`, a word of a rule's `bust`; give it another name"
OUT_OF_HASH = "`{version}` may not stand in a hash; write it outside"
AS_TEXT = "write text, as PostgreSQL prints the value"
CORRECT = "correct it: CEL writes `==`, `== null`, `&&`, `||`, `!`, and a backslash twice"
CEL_ENDS = (
    "extraneous input '*' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, "
    "NUM_UINT, STRING, BYTES, IDENTIFIER}"
)
A_TABLE = "write `schema.table`, names with capitals or signs in double quotes"
CHECK_YAML = "check quotes (texts with braces or commas need them), brackets and indentation"
UNCLOSED = "did not find expected ',' or ']'"
TOO_LONG_AFTER = "`again_after` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
OURS = (
    "this can be a key of the daemon's own, such as `cdc:cdc_invalidator:watermark`, which a row, a read or a sweep "
    "would then replace or delete; begin it with a prefix"
)
A_STAR = "a `*` stands for the rest of a key, at its end only; write `**` for the sign itself, or a parameter"
CACHE_FIELDS = ", ".join(CacheEntry.model_fields)


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
        # Defaults; `user` has a jitter
        (
            "caches:\n",
            "defaults: 5m\ncaches:\n",
            "3:11: `defaults` must be a mapping; write `name: value` on each line",
        ),
        ("caches:\n", "defaults:\ncaches:\n", "3:1: `defaults` is empty; give it a value or remove it"),
        (
            "caches:\n",
            "defaults: {tll: 5m}\ncaches:\n",
            "3:12: `tll` is not a field of `defaults`; did you mean `ttl`?",
        ),
        ("caches:\n", "defaults: {again_after: 2m}\ncaches:\n", f"3:25: {TOO_LONG_AFTER}"),
        ("caches:\n", "defaults: {negative_ttl: 5}\ncaches:\n", f"3:26: `5` is not a duration; {A_DURATION}"),
        (
            "caches:\n",
            "defaults: {old_row: no}\ncaches:\n",
            "3:21: `no` is not allowed here; write one of require, sweep, ignore",
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
        (
            "key: shop:counts",
            "key: shop:*:counts",
            f"13:15: {A_STAR}",
        ),
        (
            "key: shop:counts",
            "key: shop:counts?",
            "13:21: a key is no pattern, so `?` matches nothing; write `??` for the sign itself, or a parameter",
        ),
        (
            "key: shop:counts",
            "key: '*'",
            "13:10: without literal text, a sweep of this would empty all of Redis; begin it with a prefix",
        ),
        (
            '"shop:user:{id}:dash:ver"',
            '"shop:user:{id}:dash:ver*"',
            "10:38: a `*` stands for the rest of a `key` only; write `**` for the sign itself, or remove it",
        ),
        (
            "dash:v{version}",
            "dash:v{version}*",
            "9:41: a bust of a cache with a `version` names the version alone; take the `*` off, or remove `version`",
        ),
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
        ("key: shop:counts", "key: '{a}:{b}'", f"13:10: {OURS}"),
        ("key: shop:counts", "key: 'cdc:{a}:watermark'", f"13:10: {OURS}"),
        ("key: shop:counts", "key: 'cdc:cdc_invalidator:{a}'", f"13:10: {OURS}"),
        ("key: shop:counts", "key: 'cdc:cdc_invalidator:off'", f"13:10: {OURS}"),
        ("key: shop:counts", "key: 'c*'", f"13:10: {OURS}"),
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
        ("[name, email]", "[name, '']", "21:21: an entry of `columns` must not be empty; give it a text or remove it"),
        (
            "[name, email]",
            "[name, 5]",
            "21:21: an entry of `columns` must be text; put it in quotes if it is one word, number or sign",
        ),
        ("[name, email]", "[name, name]", "21:21: `name` stands twice in `columns`; remove one"),
        ("    columns:", "    colums:", "21:5: `colums` is not a field of a rule; did you mean `columns`?"),
        ("old_row: sweep", "old_row: requires", "27:14: `requires` is not allowed here; did you mean `require`?"),
        ("[user_id]", "[user_id, user_id]", "28:26: `user_id` stands twice in `immutable`; remove one"),
        ("old_row: sweep", "where: row.a +* 1", f"27:19: `where` is no CEL expression ({CEL_ENDS}); {CORRECT}"),
        ("old_row: sweep", "where: a == 1", "27:12: `where` knows `row`, and no `a`; write `row.a` for a column"),
        (
            "old_row: sweep",
            "where: new.a == 1",
            "27:12: `where` knows `row`, and no `new`; it is asked for the old row and for the new one, each as `row`",
        ),
        (
            "old_row: sweep",
            "where: op == 'x'",
            "27:12: `where` knows `row`, and no `op`; list the kinds of change under `on`, or write a `when`",
        ),
        ("old_row: sweep", "where: row.a == b'x'", f"27:21: `where` sees no column as bytes; {AS_TEXT}"),
        ("old_row: sweep", "where:", "27:5: `where` is empty; give it a value or remove it"),
        (
            "{id: user_id}",
            "{id: user_id, where: b == 1}",
            "30:41: `where` knows `row`, and no `b`; write `row.b` for a column",
        ),
        (
            "{id: user_id}",
            f"{{id: user_id, where: {'1' * 4097}}}",
            "30:41: `where` must be text; put it in quotes if it is one word, number or sign",
        ),
        ("{id: user_id}", f"{{id: user_id, where: row.{'a' * 4097}}}", "30:41: `where` is too long; write it shorter"),
        ("dash:v{version}", "dash:v{version}:{id version|md5}", f"9:10: {OUT_OF_HASH}"),
        ("key: shop:counts", "key: 'shop:{where}'", f"13:10: {A_WORD.format('where')}"),
        ("key: shop:counts", "key: 'shop:{via}'", f"13:10: {A_WORD.format('via')}"),
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
        (
            "{id: user_id}",
            "{id: 'user_id|lower'}",
            (
                "30:25: `user_id|lower` is not a column; write `user_id`, and the filter in the cache's template: "
                "`{id|lower}`"
            ),
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
            f"6:10: this is not YAML (found undefined alias); {CHECK_YAML}",
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


def test_a_jitter_is_not_told_to_lack_a_ttl_whose_default_is_wrong() -> None:
    text = GOOD.replace("    ttl: 5m\n", "").replace("caches:\n", "defaults: {ttl: 5}\ncaches:\n")
    assert mistakes(text) == [f"a.yaml:3:17: `5` is not a duration; {A_DURATION}"]
    assert mistakes(text.replace("ttl: 5}", "jitter: 5s}")) == [
        "a.yaml:7:5: `jitter` needs a `ttl`; remove it, or add one"
    ]


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


def test_a_variable_holds_no_rest_of_a_key() -> None:
    assert mistakes("version: 1\nvars: {app: 'a:*'}\ncaches: {a: {key: '${app}{id}'}}") == [
        "a.yaml:2:16: a `*` stands for the rest of a `key` only; write `**` for the sign itself, or remove it",
        "a.yaml:3:20: the environment variable `app` is not set; set it, or give a default: `${app:-default}`",
    ]


def test_the_whole_cache_is_asked_for_with_true_and_nothing_else() -> None:
    assert mistakes(busting("a: {sweep: yes}")) == [
        "a.yaml:5:8: `sweep` stands for the whole cache; write `sweep: true`, or remove it"
    ]
    assert mistakes(busting("a: {sweep: true, id: x}")) == [
        "a.yaml:5:22: `sweep: true` busts the whole cache `a`, whatever the row; remove `id`"
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
    fields = "version, vars, defaults, caches, rules, tests"
    assert mistakes('version: 1\n"a\\nb\\e": 1') == [
        f"a.yaml:2:1: `a\\nb\\x1b` is not a field of a rule file; write one of {fields}"
    ]


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("name|lower", "write `lower({name})`"),
        ("name|md5", "write `md5({name})`"),
        ("name|sha1", "write `encode(digest({name}, 'sha1'), 'hex')`, of the extension pgcrypto"),
        ("name|sha256", "write `encode(sha256(convert_to({name}, 'UTF8')), 'hex')`"),
        ("name|urlencode", "put the filter into the key, or write it in SQL"),
    ],
)
def test_a_filter_in_a_query_is_refused_with_what_it_is_in_sql(written: str, remedy: str) -> None:
    (told,) = mistakes(busting(f'a: {{via: "SELECT {{{written}}} AS id"}}'))
    assert told == f"a.yaml:5:22: a query takes no filter `|{written.partition('|')[2]}`; {remedy}"


@pytest.mark.parametrize("key", ["cdc:user:{id}", "{tenant}:user:{id}", "cdc-cache:{id}"])
def test_a_key_that_is_not_one_of_the_daemons_may_begin_as_those_do(key: str) -> None:
    assert parse(f"version: 1\ncaches: {{one: {{key: '{key}'}}}}").caches["one"].key.text == key
