"""The digest of a cache's templates changes with whatever its keys depend on, and with nothing else."""

from __future__ import annotations

import pytest
from rule_texts import parse

from cdc_invalidator.rules.agreement import templates_digest

TEXT = """
version: 1
caches:
  c: {key: "${APP_ENV}:c:{id|lower}:v{version}", version: "v:c:{team}", ttl: 1m}
rules:
  - {name: r, table: public.t, bust: [c], old_row: sweep}
"""


def digest(text: str = TEXT, env: str = "prod") -> str:
    return templates_digest(parse(text, APP_ENV=env).caches["c"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (":c:{id", ":d:{id"),
        ("{id|lower}", "{id}"),
        ("{id|lower}", "{no|lower}"),
        ("v:c:{team}", "w:c:{team}"),
        ("ttl: 1m", "ttl: 1m, ttl_only: true"),
    ],
)
def test_it_changes_with_what_keys_are_made_of(old: str, new: str) -> None:
    text = TEXT.replace(old, new)
    if "ttl_only" in new:
        text = text.partition("rules:")[0]
    assert digest(text) != digest()


def test_it_changes_with_the_environment() -> None:
    assert digest(env="staging") != digest()
    assert digest(TEXT.replace("${APP_ENV}", "prod")) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [("ttl: 1m", "ttl: 2m"), ("public.t", "public.u"), ("name: r", "name: s")],
)
def test_it_does_not_change_with_times_and_rules(old: str, new: str) -> None:
    assert digest(TEXT.replace(old, new)) == digest()


def test_it_changes_where_busts_name_keys_beside_versions() -> None:
    text = TEXT.replace("v:c:{team}", "v:c:{id}").replace("{id|lower}", "{id}")
    assert digest(text.replace("ttl: 1m", "ttl: 1m, bump_over: 10")) != digest(text)
