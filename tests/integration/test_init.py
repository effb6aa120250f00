"""`init`: what it makes of the shop's and of real applications' keys, and what it must not do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from applications import MASTODON, OUTLINE, THINGSBOARD, Application, Space, make
from running import command

from cdc_invalidator.embedded import shop
from cdc_invalidator.reader.keys import NUL, Keys
from cdc_invalidator.rules.load import load_rules, parse_rules
from cdc_invalidator.rules.model import Bust, RuleSet
from cdc_invalidator.rules.template import Template


def shop_keys() -> list[bytes]:
    """The keys that the shop's readers store, its versions, and a reader's locks."""
    keys: list[bytes] = [b"shop:prod:user:7:lock", b"shop:prod:user:8:stale", b"cdc:app:watermark"]
    caches = load_rules(shop.rules_file(), {}).caches
    for query in shop.QUERIES:
        of_cache = Keys(caches[query.cache])
        for number in query.numbers():
            key, version = of_cache.of(query.params(number))
            keys.append(key.replace(NUL, b"%d" % (1764000000000 + 977 * number)))
            keys += [version] if version else []
    return list(dict.fromkeys(keys))


def filled(client: redis.Redis, keys: list[bytes]) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.set(key, b"a value that nobody reads", ex=300)
        pipeline.execute()


class Made:
    """The file that a run of `init` has written."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert (done.returncode, done.stderr) == (0, "")
        self.text = done.stdout
        self.rules: RuleSet = parse_rules([("rules.yaml", self.text)], {})

    def every_template(self) -> list[Template]:
        """The templates of all families, also of those that no rule busts."""
        of_rest = re.findall(r'^#   .*\{key: ("(?:[^"\\]|\\.)*")', self.text, re.MULTILINE)
        told = [Template.parse(json.loads(text), {}) for text in of_rest]
        return [*told, *(cache.key for cache in self.rules.caches.values())]

    def busts(self) -> set[tuple[str, str, tuple[tuple[str, str], ...]]]:
        """Table, key, and the columns of each bust."""
        return {
            (str(rule.table), bust.cache.key.text, tuple(sorted(bust.columns.items())))
            for rule in self.rules.rules
            for bust in rule.busts
        }


@pytest.fixture
def shop_database(database: str) -> str:
    shop.create(database)
    return database


def test_the_shop_gets_its_own_caches(
    shop_database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    filled(redis_client, shop_keys())
    made = Made(command("init", postgres_dsn=shop_database, redis_url=redis_url, publication=slot_name))
    own = load_rules(shop.rules_file(), {})

    def bare(template: Template) -> bytes:
        return b"".join(part if isinstance(part, bytes) else b"{}" for part in template.parts)

    # All caches are found, and no others.
    assert {bare(template) for template in made.every_template()} == {bare(cache.key) for cache in own.caches.values()}
    assert made.busts() == {
        ("public.users", "shop:prod:user:{id}", (("id", "id"),)),
        ("public.users", "shop:prod:user:{id}:dash:v{version}", (("id", "id"),)),
        ("public.orders", "shop:prod:user:{user_id}:orders", (("user_id", "user_id"),)),
        ("public.products", "shop:prod:product:{id}", (("id", "id"),)),
        ("public.reviews", "shop:prod:product:{product_id}:reviews", (("product_id", "product_id"),)),
    }
    dash = made.rules.caches["user-dash"]
    assert dash.version is not None
    assert dash.version.text == "shop:prod:user:{id}:dash:ver"
    assert all(cache.given for cache in made.rules.caches.values())


def test_check_finds_no_error_in_what_was_written_nor_does_anything_change(
    shop_database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    filled(redis_client, shop_keys())
    before = sorted(redis_client.keys())
    path = tmp_path / "rules.yaml"
    given = {"postgres_dsn": shop_database, "redis_url": redis_url, "publication": slot_name}
    done = command("init", "-o", str(path), **given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    checked = command("check", "--format", "json", rules=str(path), slot=slot_name, **given)
    found = json.loads(checked.stdout)["findings"]
    assert [each for each in found if each["severity"] != "note"] == []
    assert sorted(redis_client.keys()) == before
    with psycopg.connect(shop_database) as connection:
        assert connection.execute("SELECT 1 FROM pg_publication").fetchall() == []


class Judged:
    """What was made of an application's keys: which of its families were found, and what the rules would bust."""

    def __init__(self, application: Application, space: Space, made: Made) -> None:
        self._name = application.name
        self._templates = made.every_template()
        self.every = {key for keys in space.keys for key in keys}
        of_key = {key: self._template_of(key) for key in self.every}
        self.found: list[str] = []
        self.lost: list[str] = []
        self.matched: list[str] = []
        self.wrong: list[str] = []
        for family, keys in zip(application.families, space.keys, strict=True):
            of_family = {of_key[key] for key in keys}
            # Keys of one table that look alike are one family for anybody who sees only them.
            own = {key for other, some in zip(application.families, space.keys, strict=True)
                   if other.tables & family.tables for key in some} | set(keys)  # fmt: skip
            whole = "" not in of_family and all(key in own for key in self.every if of_key[key] in of_family)
            (self.found if whole else self.lost).append(family.key)
            busts = [(rule.table.name, bust) for rule in made.rules.rules for bust in rule.busts
                     if bust.cache.key.text in of_family]  # fmt: skip
            if busts and {table for table, _ in busts} <= family.tables:
                self.matched.append(family.key)
            self.wrong += [f"{table}: {bust.cache.key.text}" for table, bust in busts if table not in family.tables]
        self.wrong += [
            f"{rule.table}: {bust.cache.key.text} busts nothing"
            for rule in made.rules.rules
            for bust in rule.busts
            if not self._busts(bust, space.rows[rule.table.name])
        ]

    def _template_of(self, key: str) -> str:
        """Return the most exact of the templates that a key fits."""
        fitting = [each for each in self._templates if each.match(key.encode()) is not None]
        literals = {each.text: sum(len(part) for part in each.parts if isinstance(part, bytes)) for each in fitting}
        return max(literals, key=literals.__getitem__, default="")

    def _busts(self, bust: Bust, rows: list[dict[str, Any]]) -> bool:
        """Whether at least a tenth of the rows names a key that is there."""
        hits = 0
        for row in rows:
            key = bust.cache.key.render({name: str(row[column]) for name, column in bust.columns.items()})
            assert key is not None
            text = key.decode()
            hits += any(other.startswith(text) for other in self.every) if bust.cache.key.rest else text in self.every
        return hits >= 0.1 * len(rows)

    def figures(self) -> str:
        return (
            f"{self._name}: {len(self.found)} of {len(self.found) + len(self.lost)} families found, "
            f"{len(self.matched)} with a rule on the right table, {len(self.wrong)} wrong rules"
        )


@pytest.mark.parametrize(
    ("application", "found", "matched"),
    [(THINGSBOARD, 37, 32), (MASTODON, 16, 7), (OUTLINE, 8, 0)],
    ids=lambda each: getattr(each, "name", ""),
)
def test_of_a_real_application_most_families_are_found_and_no_rule_is_wrong(
    application: Application,
    found: int,
    matched: int,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> None:
    space = make(application, database)
    filled(redis_client, [key.encode() for keys in space.keys for key in keys])
    made = Made(command("init", postgres_dsn=database, redis_url=redis_url, publication=slot_name))
    judged = Judged(application, space, made)
    print(judged.figures(), "\nnot found:", *judged.lost, "\nno rule:", *(set(judged.found) - set(judged.matched)))
    assert judged.wrong == []
    assert len(judged.found) >= found
    assert len(judged.matched) >= matched
