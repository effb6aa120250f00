"""Texts of rule files, right ones and almost right ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cdc_invalidator.errors import WrongRules
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet

if TYPE_CHECKING:
    pass


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
A_DURATION = "write a whole number and a unit: 500ms, 30s, 5m, 1h or 30d"
NO_SUCH_FILE = "this file cannot be read (No such file or directory); check CDC_RULES and its permissions"


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


def digests(text: str, **env: str) -> dict[str, str]:
    rule_set = parse(text, **env)
    return {"": rule_set.digest, **{name: cache.digest for name, cache in rule_set.caches.items()}}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
