"""The digests of a rule set."""

from __future__ import annotations

import pytest
from rule_texts import GOOD, changed, digests, parse

# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
