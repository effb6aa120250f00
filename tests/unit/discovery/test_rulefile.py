"""The file that is written: what is sure is a rule, what is not is a comment, and all of it loads."""

from __future__ import annotations

import re

import pytest

from cdc_invalidator.discovery.families import Family as KeyFamily
from cdc_invalidator.discovery.families import Kind, Parameter, Sample, group
from cdc_invalidator.discovery.matching import Match, Sure
from cdc_invalidator.discovery.rulefile import Verdict, entries, probe, write
from cdc_invalidator.discovery.words import Vocabulary
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

USERS = Table("public", "users")
ODD = Table("Sales", "Order Lines")


def family(*parts: str | Parameter, keys: int = 50) -> KeyFamily:
    return KeyFamily(tuple(parts), keys, (("string", keys),), (30.0, 3600.0))


def number() -> Parameter:
    return Parameter(Kind.NUMBER, ("1", "2"))


def sure(of: KeyFamily, column: str = "id", table: Table = USERS) -> Match:
    return Match(of, table, ({0: column},), Sure.CERTAIN, ("the name user",))


def written(*found: Match, verdict: Verdict = Verdict(), single: int = 0) -> tuple[str, RuleSet]:  # noqa: B008  it is frozen
    text = write(entries(found), verdict, [], ["Begun here."], single)
    assert all(len(line) <= 120 for line in text.splitlines() if "key:" not in line)
    return text, parse_rules([("rules.yaml", text)], {})


def test_what_is_sure_is_a_rule_and_what_is_not_a_comment_that_is_ready_to_be_one() -> None:
    guess = Match(family("app:group:", number()), Table("public", "groups"), ({0: "id"},), Sure.GUESS, ("the name",))
    text, rules = written(sure(family("app:user:", number())), guess, Match(family("app:x:", number())), single=3)
    assert [rule.name for rule in rules.rules] == ["users-changed"]
    assert list(rules.caches) == ["user"]
    assert rules.caches["user"].given
    assert rules.caches["user"].again_after == 1000
    assert rules.caches["user"].ttl == 3_600_000
    assert "3 keys in no family" in text
    _, rest = text.split("# ── What no rule busts yet")
    # Without its signs, the comment about the guess is a cache and a rule.
    lines = [line[2:] for line in rest.splitlines() if line.startswith("#   ")]
    cache, *rule = [line for line in lines if re.match(r"  (group: |- name: |  )", line)]
    more = parse_rules([("more.yaml", "\n".join(["version: 1", "caches:", cache, "rules:", *rule]))], {})
    assert str(more.rules[0].table) == "public.groups"


def test_signs_of_the_format_in_keys_are_written_as_themselves() -> None:
    _, rules = written(sure(family("a*b?[c]{", number(), "}:user")))
    (cache,) = rules.caches.values()
    assert cache.key.render({"id": "7"}) == b"a*b?[c]{7}:user"


@pytest.mark.parametrize("column", ["via", "where", "sweep", "on_empty", "version", "Order Id", "null", "größe", "a%b"])
def test_columns_with_names_that_no_parameter_can_have_are_mapped(column: str) -> None:
    _, rules = written(sure(family("user:", number()), column, ODD))
    (rule,) = rules.rules
    assert rule.table == ODD
    assert list(rule.busts[0].columns.values()) == [column]


def test_caches_with_the_same_words_have_names_of_their_own() -> None:
    one, other = family("user:", number()), family("user/", number())
    third = family("1:", number(), keys=7)
    _, rules = written(sure(one), sure(other), sure(third))
    assert len(rules.caches) == 3


def test_a_literal_that_no_template_may_hold_makes_no_rule() -> None:
    text, rules = written(sure(family("user of\n", number())))
    assert not rules.caches
    assert "user of" not in text


def test_keys_without_any_literal_make_no_template_which_would_be_that_of_all_keys() -> None:
    text, rules = written(sure(family(number())), Match(family(number())))
    assert not rules.caches
    assert "key:" not in text


def test_a_version_without_a_counter_is_searched_for_and_with_one_bumped() -> None:
    version = Parameter(Kind.VERSION, ("1", "2"))
    alone, counter = family("user:", number(), ":v", version), family("user:", number(), ":ver")
    _, rules = written(sure(alone))
    (cache,) = rules.caches.values()
    assert cache.key.text == "user:{id}:v*"
    with_counter = Match(alone, USERS, ({0: "id"},), Sure.CERTAIN, (), counter)
    _, rules = written(with_counter)
    (cache,) = rules.caches.values()
    assert cache.version is not None
    assert (cache.key.text, cache.version.text) == ("user:{id}:v{version}", "user:{id}:ver")


def test_what_the_database_refuses_is_a_comment_with_its_reason_and_what_it_can_not_tell_sweeps() -> None:
    both = [sure(family("user:", number())), sure(family("mail:", number()), "email")]
    text, rules = written(*both, verdict=Verdict({0: "it can't be published."}, {1: "Better: run this."}))
    (rule,) = rules.rules
    assert (rule.old_row, [bust.cache.name for bust in rule.busts]) == ("sweep", ["mail"])
    assert "  # Better: run this." in text
    assert "but it can't be published." in text


def test_the_probe_has_a_rule_for_each_entry_called_by_its_number() -> None:
    found = entries(
        [sure(family("user:", number())), Match(family("x:", number())), sure(family("mail:", number()), "email")]
    )
    rules = parse_rules([("rules.yaml", probe(found, sweeps={2}, refused={0}))], {})
    assert [(rule.name, rule.old_row) for rule in rules.rules] == [("r2", "sweep")]


def test_nothing_at_all_is_a_file_too() -> None:
    assert group([], Vocabulary()).families == ()
    text, rules = written()
    assert not rules.caches
    assert text.startswith("# Begun here.\n\nversion: 1\n")
    assert group([Sample(b"")], Vocabulary()).seen == 1
