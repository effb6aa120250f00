"""A Django project whose cache calls nobody adapted, and the rules of rules/django.yaml: whatever writes, it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running import RunningDaemon, settled

from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

RULES = Path(__file__).parents[2] / "rules" / "django.yaml"
BACKENDS = {
    "django-redis": "django_redis.cache.RedisCache",
    "its own backend": "django.core.cache.backends.redis.RedisCache",
}


class Project:
    """The project's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def does(self, word: str) -> Any:
        """Let it do one thing, and give its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the project fell over; its traceback is on standard error"
        return json.loads(answer)


@contextmanager
def project(dsn: str, redis_url: str, backend: str, prefix: str = "", version: int = 1) -> Iterator[Project]:
    script = Path(__file__).parents[1] / "django_blog.py"
    words = [sys.executable, str(script), dsn, redis_url, backend, prefix, str(version)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Project(process)
        finally:
            process.kill()


@contextmanager
def playing(
    dsn: str, redis_url: str, slot: str, backend: str, prefix: str = "", version: int = 1
) -> Iterator[tuple[Project, RunningDaemon]]:
    """A project with articles, and the daemon that busts its caches."""
    with project(dsn, redis_url, backend, prefix, version) as blog:
        blog.does("create")
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=RULES, slot=slot) as daemon:
            yield blog, daemon.ready()


WRITES = ["save", "update", "give_away", "tag", "rename_author", "sql", "rename_tag", "cascade", "drop_article"]
WRITES += ["cascade_of_tag", "drop_tag"]


def test_four_rules_are_all_that_the_project_needs() -> None:
    assert len(load_rules(RULES, {}).rules) == 4


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_writes_by_the_orm_by_sql_and_by_a_cascade_show_at_once(
    backend: str, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with playing(database, redis_url, slot_name, backend) as (blog, daemon):
        shown = blog.does("read")
        assert shown == blog.does("truth")
        assert redis_client.exists(":1:article:1", ":1:author:1:articles", ":1:tag:python:articles") == 3
        for write in WRITES:
            before = shown
            blog.does(write)
            truth = blog.does("truth")
            assert truth != before, "the write changes what is shown"
            settled(database, redis_client, slot_name)
            shown = blog.does("read")
            assert shown == truth, write
        assert not daemon.errors
        assert not daemon.named("query_failed")
        assert not daemon.named("bust", action="sweep", reason="change"), "single keys, and no whole caches"
        assert not daemon.named("bust", action="sweep", reason="unanswered")


def test_writes_while_the_daemon_is_away_show_when_it_is_back(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with playing(database, redis_url, slot_name, BACKENDS["django-redis"]) as (blog, daemon):
        before = blog.does("read")
        daemon.kill()
        for write in WRITES:
            blog.does(write)
        daemon.start().ready()
        settled(database, redis_client, slot_name)
        truth = blog.does("truth")
        assert sum(truth[key] != before[key] for key in truth) > 8
        assert blog.does("read") == truth
        assert not daemon.named("bust", action="sweep", reason="change"), "single keys, and no whole caches"
        assert not daemon.named("bust", action="sweep", reason="unanswered")


def test_a_transaction_that_is_rolled_back_busts_nothing(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with playing(database, redis_url, slot_name, BACKENDS["django-redis"]) as (blog, _):
        blog.does("read")
        cached = sorted(redis_client.keys(":1:*"))
        blog.does("undo")
        settled(database, redis_client, slot_name)
        assert sorted(redis_client.keys(":1:*")) == cached


def test_key_prefix_and_version_are_the_environments(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_KEY_PREFIX", "blog")
    monkeypatch.setenv("DJANGO_CACHE_VERSION", "3")
    with playing(database, redis_url, slot_name, BACKENDS["django-redis"], "blog", 3) as (blog, _):
        blog.does("read")
        assert redis_client.exists("blog:3:article:1")
        blog.does("save")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("blog:3:article:1")
        assert redis_client.exists("blog:3:article:2")
        assert blog.does("read") == blog.does("truth")
