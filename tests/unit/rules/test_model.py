"""The digests of a rule set, and what a cluster needs of a cache."""

from __future__ import annotations

import pytest
from rule_texts import GOOD, changed, digests, parse

from cdc_invalidator.rules.model import Cache

# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_digest_is_short_and_the_same_in_every_process() -> None:
    assert digests("version: 1\ncaches: {a: {key: 'a:{id}'}}") == {"": "2f8c9720c6fbc759", "a": "58dc2229cfc8c1b5"}


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


# ── Hash tags ────────────────────────────────────────────────────────────────────────────────────────────────────────


def cache_of(fields: str) -> Cache:
    return parse(f"version: 1\ncaches:\n  one: {fields}\n").caches["one"]


@pytest.mark.parametrize(
    ("fields", "lacks"),
    [
        ("{key: 't:{id}'}", True),
        ("{key: 't:{{{id}}}'}", False),
        ("{key: 't:{id}', ttl_only: true}", True),
        ("{key: 't:{id}:{version}', version: 't:{id}:ver'}", False),
        ("{key: 't:{id}:{version}', version: 't:{id}:ver', bump_over: 10}", True),
        ("{key: 't:{{{id}}}:{version}', version: 't:{id}:ver', bump_over: 10}", False),
    ],
)
def test_a_key_needs_a_hash_tag_unless_busts_only_bump_its_version(fields: str, lacks: bool) -> None:
    assert cache_of(fields).lacks_hash_tag is lacks


@pytest.mark.parametrize(
    ("key", "version", "same"),
    [
        ("t:{{{id}}}:{version}", "t:{{{id}}}:ver", True),
        ("t:{{a{id}}}:{version}", "t:{{a{id}}}:ver", True),
        ("t:{{a{id}}}:{version}", "t:{{{id}}}:ver", False),
        ("t:{{all}}:{id}:{version}", "t:{{all}}:ver", True),
        ("t:{id}:{version}", "t:{id}:ver", False),
        ("t:{{}}{id}:{version}", "t:{{}}{id}:ver", False),
    ],
)
def test_whether_a_version_lies_beside_its_keys_is_read_off_the_templates(key: str, version: str, same: bool) -> None:
    assert cache_of(f"{{key: '{key}', version: '{version}'}}").one_hash_slot is same
