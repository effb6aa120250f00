"""The rule files that people start from: their own tests pass, and so they do on real servers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
from running import RunningDaemon, command, execute, settled

from cdc_invalidator.commands import trial
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    import redis

RULES = Path(__file__).parents[2] / "rules"
SCHEMAS = Path(__file__).parent / "rule_files"
NAMES = ["django", "laravel", "node", "rails", "saas", "shop", "spring"]
LARAVEL = "laravel-database-laravel-cache-"
LARAVEL_FRONT = f"{LARAVEL}819fe4067cc0dbe3d9c7800bff291e6eb35dfdbc:front"


class Step(NamedTuple):
    """What an application writes, and of the keys that are cached at that time, those that it must bust.

    ``stay``: others, which must be there afterwards as they were.
    """

    sql: str
    busted: tuple[str, ...]
    stay: tuple[str, ...] = ()


STEPS: dict[str, list[Step]] = {
    "shop": [
        Step(
            "UPDATE users SET name = 'Grace' WHERE id = 42",
            ("shop:prod:user:42", "shop:prod:user:42:dash:ver"),
            ("shop:prod:user:41", "shop:prod:history:42:ver", "shop:prod:counts"),
        ),
        Step("UPDATE users SET last_seen = now() WHERE id = 42", (), ("shop:prod:user:42",)),
        Step(
            "UPDATE products SET price_cents = 5 WHERE id = 3",
            (
                "shop:prod:product:3",
                "shop:prod:page:3:v1",
                "shop:prod:catalog:ver",
                "shop:prod:stats:3:ver",
                "shop:prod:history:7:ver",
                "shop:prod:history:9:ver",
            ),
            ("shop:prod:page:4:v1", "shop:prod:history:8:ver", "shop:prod:pages:ver"),
        ),
        Step(
            "UPDATE orders SET user_id = 10 WHERE user_id = 8",
            (
                "shop:prod:user:8:orders",
                "shop:prod:user:10:orders",
                "shop:prod:history:8:ver",
                "shop:prod:history:10:ver",
                "shop:prod:stats:4:ver",
            ),
            ("shop:prod:user:8", "shop:prod:user:9:orders"),
        ),
        Step(
            "UPDATE reviews SET stars = 2 WHERE product_id = 3",
            ("shop:prod:product:3:reviews", "shop:prod:stats:3:ver"),
            ("shop:prod:product:4:reviews", "shop:prod:product:3"),
        ),
        Step(
            "WITH p AS (DELETE FROM products WHERE id = 4) DELETE FROM orders WHERE product_id = 4",
            (
                "shop:prod:product:4",
                "shop:prod:page:4:v1",
                "shop:prod:catalog:ver",
                "shop:prod:stats:4:ver",
                "shop:prod:user:10:orders",
                "shop:prod:user:10:dash:ver",
                "shop:prod:history:10:ver",
            ),
            ("shop:prod:history:7:ver", "shop:prod:page:5:v1"),
        ),
        Step("UPDATE products SET price_cents = price_cents + 1", ("shop:prod:pages:ver",)),
    ],
    "saas": [
        Step(
            "UPDATE projects SET team_id = 9 WHERE id = 5",
            (
                "saas:prod:tenant:1:project:5",
                "saas:prod:tenant:1:team:7:projects:ver",
                "saas:prod:tenant:1:team:9:projects:ver",
            ),
            ("saas:prod:tenant:1:project:6", "saas:prod:tenant:2:project:5"),
        ),
        Step(
            "UPDATE projects SET tenant_id = 2, team_id = 8 WHERE id = 5",
            (
                "saas:prod:tenant:1:project:5",
                "saas:prod:tenant:2:project:5",
                "saas:prod:tenant:1:team:9:projects:ver",
                "saas:prod:tenant:2:team:8:projects:ver",
            ),
            ("saas:prod:tenant:1:team:7:projects:ver",),
        ),
        Step(
            "UPDATE tenants SET plan = 'pro' WHERE id = 1",
            ("saas:prod:tenant:1:settings", "saas:prod:tenant:1:features"),
            ("saas:prod:tenant:2:features",),
        ),
        Step(
            "UPDATE tenants SET name = 'A' WHERE id = 1",
            ("saas:prod:tenant:1:settings",),
            ("saas:prod:tenant:1:features",),
        ),
        Step(
            "UPDATE teams SET name = 'Blue' WHERE id = 7",
            ("saas:prod:user:42:teams", "saas:prod:user:43:teams"),
            ("saas:prod:user:44:teams",),
        ),
        Step("DELETE FROM memberships WHERE user_id = 44", ("saas:prod:user:44:teams",), ("saas:prod:user:42:teams",)),
        Step(
            "WITH t AS (DELETE FROM teams WHERE id = 7) DELETE FROM memberships WHERE team_id = 7",
            ("saas:prod:user:42:teams", "saas:prod:user:43:teams"),
            ("saas:prod:user:44:teams",),
        ),
        Step(
            "INSERT INTO usage SELECT 1, n, 1 FROM generate_series(1, 100) n",
            ("saas:prod:tenant:1:bill:ver",),
            ("saas:prod:tenant:2:bill:ver",),
        ),
    ],
    "django": [
        Step(
            "UPDATE blog_article SET title = 'New' WHERE id = 42",
            (":1:article:42", ":1:author:7:articles", ":1:tag:python:articles", ":1:tag:redis:articles"),
            (":1:article:43", ":1:author:8:articles", ":1:front-page"),
        ),
        Step(
            "DELETE FROM blog_article_tags WHERE tag_id = 3",
            (":1:article:42", ":1:tag:python:articles"),
            (":1:tag:redis:articles",),
        ),
        Step(
            "UPDATE blog_author SET name = 'Grace' WHERE id = 7",
            (":1:author:7:articles", ":1:article:42", ":1:article:43"),
            (":1:article:44",),
        ),
        Step(
            "DELETE FROM blog_author WHERE id = 7",
            (":1:author:7:articles", ":1:article:42", ":1:article:43", ":1:tag:redis:articles"),
            (":1:article:44", ":1:author:8:articles", ":1:tag:python:articles"),
        ),
        Step(
            "UPDATE blog_tag SET slug = 'postgres' WHERE id = 5",
            (":1:tag:sql:articles", ":1:tag:postgres:articles", ":1:article:44"),
            (":1:tag:redis:articles", ":1:author:8:articles"),
        ),
        Step(
            "DELETE FROM blog_tag WHERE id = 5",
            (":1:tag:postgres:articles", ":1:article:44"),
            (":1:tag:redis:articles",),
        ),
    ],
    "rails": [
        Step("UPDATE users SET name = 'Grace' WHERE id = 42", ("shop:users/42",), ("shop:users/43",)),
        Step("UPDATE users SET updated_at = now() WHERE id = 42", (), ("shop:users/42",)),
        Step("UPDATE orders SET user_id = 43", ("shop:users/42/orders", "shop:users/43/orders"), ("shop:users/42",)),
        Step(
            "UPDATE posts SET slug = 'hello' WHERE id = 1",
            (
                "shop:posts/helo",
                "shop:posts/hello",
                "shop:posts/helo/comments/version",
                "shop:posts/hello/comments/version",
            ),
            ("shop:posts/other",),
        ),
        Step(
            "DELETE FROM comments WHERE id = 1",
            ("shop:posts/hello/comments/version",),
            ("shop:posts/hello", "shop:posts/other/comments/version"),
        ),
        Step(
            "WITH p AS (DELETE FROM posts WHERE id = 2) DELETE FROM comments WHERE post_id = 2",
            ("shop:posts/other", "shop:posts/other/comments/version"),
            ("shop:posts/hello/comments/version",),
        ),
    ],
    "spring": [
        Step("UPDATE app_user SET name = 'Grace' WHERE id = 42", ("users::42",), ("users::43",)),
        Step("INSERT INTO app_user VALUES (43, 'Ada')", ("users::43",), ("users::42",)),
        Step("UPDATE customer_order SET status = 'paid' WHERE id = 5", ("orders::42",), ("orders::43",)),
        Step("INSERT INTO order_line VALUES (2, 5, 2)", ("orders::42",), ("orders::43",)),
        Step("DELETE FROM customer_order WHERE id = 5", ("orders::42", "orders::43"), ("users::42",)),
        Step(
            "UPDATE price SET region = 'us' WHERE sku = 'TEA-1'",
            ("prices::eu:tea-1", "prices::us:tea-1", "catalog::all"),
            ("prices::eu:tea-2",),
        ),
    ],
    "laravel": [
        Step(
            "UPDATE users SET email = 'ada@example.com' WHERE id = 42",
            (
                f"{LARAVEL}user:42",
                f"{LARAVEL}avatar:5bfcf2d8e394674550332640d72db509",
                f"{LARAVEL}avatar:3e3417d7ef77d5932a6734b916515ed5",
            ),
            (f"{LARAVEL}user:43", f"{LARAVEL}avatar:f94c86a9fde7987e98bbcc5c0a4caa59"),
        ),
        Step("UPDATE users SET updated_at = now() WHERE id = 42", (), (f"{LARAVEL}user:42",)),
        Step(
            "UPDATE posts SET deleted_at = now() WHERE id = 2",
            (f"{LARAVEL}post:bye", f"{LARAVEL}posts:42:page:1", f"{LARAVEL}posts:42:page:2", LARAVEL_FRONT),
            (f"{LARAVEL}post:hello", f"{LARAVEL}posts:43:page:1"),
        ),
        Step("DELETE FROM posts WHERE id = 2", (), (f"{LARAVEL}post:bye", f"{LARAVEL}posts:42:page:1")),
        Step(
            "DELETE FROM users WHERE id = 42",
            (
                f"{LARAVEL}user:42",
                f"{LARAVEL}avatar:3e3417d7ef77d5932a6734b916515ed5",
                f"{LARAVEL}post:hello",
                f"{LARAVEL}posts:42:page:1",
                LARAVEL_FRONT,
            ),
            (f"{LARAVEL}post:other", f"{LARAVEL}user:43"),
        ),
        Step(
            "UPDATE comments SET commentable_id = 2 WHERE id = 2",
            (f"{LARAVEL}video:1:comments", f"{LARAVEL}video:2:comments"),
            (f"{LARAVEL}post:1:comments", f"{LARAVEL}post:2:comments"),
        ),
        Step("DELETE FROM settings WHERE id = 1", (f"{LARAVEL}setting.theme",), (f"{LARAVEL}setting.title",)),
        Step(
            "INSERT INTO role_has_permissions VALUES (1, 1)",
            (f"{LARAVEL}spatie.permission.cache",),
            (f"{LARAVEL}setting.title",),
        ),
    ],
    "node": [
        Step(
            """UPDATE "User" SET email = 'ada@example.com' WHERE id = 42""",
            (
                "app:user:42",
                "app:user:email:ada@example.org",
                "app:user:email:ada@example.com",
                "app:post:1",
                "app:post:2",
            ),
            ("app:user:43", "app:post:3", "app:feed:42:0"),
        ),
        Step("""UPDATE "User" SET "lastSeen" = now()""", (), ("app:user:42", "app:user:43")),
        Step(
            """UPDATE "Post" SET "authorId" = 43 WHERE id = 1""",
            ("app:post:1", "app:feed:42:0", "app:feed:42:1", "app:feed:43:0", "app:tag:drinks:posts"),
            ("app:post:2", "app:feed:4:0", "app:tag:food:posts"),
        ),
        Step(
            """UPDATE "Tag" SET slug = 'rain' WHERE id = 5""",
            ("app:tag:weather:posts", "app:tag:rain:posts", "app:post:3"),
            ("app:tag:food:posts", "app:post:1"),
        ),
        Step(
            """DELETE FROM "Tag" WHERE id = 5""",
            ("app:tag:rain:posts", "app:post:3"),
            ("app:tag:food:posts", "app:tag:drinks:posts"),
        ),
        Step(
            """DELETE FROM "User" WHERE id = 42""",
            ("app:user:42", "app:user:email:ada@example.com", "app:post:2", "app:feed:42:0", "app:tag:food:posts"),
            ("app:user:43", "app:post:1", "app:feed:43:0", "app:tag:drinks:posts"),
        ),
    ],
}


def test_every_rule_file_is_among_these() -> None:
    assert sorted(path.stem for path in RULES.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_file_has_a_schema_for_editors_and_tests_that_busts_are_named_in(name: str) -> None:
    path = RULES / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    found = load_rules(path, {})
    tested = {test.table for test in found.tests}
    assert tested == set(found.tables), "each table of its rules has a test"
    outcomes = list(trial.run(found))
    assert [outcome for outcome in outcomes if not outcome.passed] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_command_runs_the_tests_of_a_rule_file(name: str) -> None:
    done = command("test", rules=RULES / f"{name}.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "0 failed" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_on_real_servers_each_write_busts_what_the_file_says_and_nothing_else(
    name: str, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    with psycopg.connect(database) as connection:
        connection.execute((SCHEMAS / f"{name}.sql").read_bytes())
    # Second busts come at once, so that nobody waits for them.
    rules = tmp_path / f"{name}.yaml"
    rules.write_text((RULES / f"{name}.yaml").read_text().replace("again_after: 1s", "again_after: 1ms"))
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name, log_keys="raw") as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        for step in STEPS[name]:
            for key in (*step.busted, *step.stay):
                redis_client.set(key, 1)
            execute(database, step.sql)
            settled(database, redis_client, slot_name)
            # A deleted key is gone, and a version has grown.
            busted = {key for key in (*step.busted, *step.stay) if redis_client.get(key) != b"1"}
            assert busted == set(step.busted), step.sql
        assert not daemon.errors
        assert not daemon.named("rule_broken")
        assert not daemon.named("query_failed")


@pytest.mark.parametrize("name", NAMES)
def test_its_queries_read_nothing_that_no_rule_watches(
    name: str, database: str, redis_url: str, slot_name: str
) -> None:
    with psycopg.connect(database) as connection:
        connection.execute((SCHEMAS / f"{name}.sql").read_bytes())
    settings = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
    told = json.loads(command("check", "--format", "json", rules=RULES / f"{name}.yaml", **settings).stdout)
    assert told["errors"] == 0
    codes = {finding["code"] for finding in told["findings"]}
    assert not codes & {"query_fails", "query_reads_unwatched", "queries_ask_each_other"}


def test_the_environment_names_the_application_and_its_stage() -> None:
    django = load_rules(RULES / "django.yaml", {"DJANGO_KEY_PREFIX": "blog", "DJANGO_CACHE_VERSION": "2"})
    assert django.caches["article"].key.prefix == b"blog:2:article:"
    spring = load_rules(RULES / "spring.yaml", {"SPRING_CACHE_PREFIX": "shop:"})
    assert spring.caches["user"].key.prefix == b"shop:users::"
    rails = load_rules(RULES / "rails.yaml", {"RAILS_CACHE_NAMESPACE": "blog-production"})
    assert rails.caches["user"].key.prefix == b"blog-production:users/"
    laravel = load_rules(RULES / "laravel.yaml", {"REDIS_PREFIX": "shop-", "CACHE_PREFIX": "cache-"})
    assert laravel.caches["user"].key.prefix == b"shop-cache-user:"
    node = load_rules(RULES / "node.yaml", {"APP_KEY_PREFIX": "shop:"})
    assert node.caches["post"].key.prefix == b"shop:post:"
    shop = load_rules(RULES / "shop.yaml", {"APP_ENV": "staging"})
    assert shop.caches["user"].key.prefix == b"shop:staging:user:"
    assert "APP_ENV" not in os.environ, "the files' tests are written for prod"
