"""Searches: keys whose ends no row can name, busted under the prefix that a row gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis
from running import execute
from stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  metadata: {key: "app:metadata:{project_id}:*", ttl: 5m}
  report: {key: "app:report:{project_id}:{id}:*", ttl: 5m}
  tail: {key: "app:tail{id}*", ttl: 5m}
rules:
  - {name: project, table: public.projects, bust: [metadata: {project_id: id}]}
  - {name: report, table: public.reports, bust: [report, tail]}
"""
TABLES = (
    "CREATE TABLE projects (id text PRIMARY KEY, n int NOT NULL DEFAULT 0)",
    "CREATE TABLE reports (project_id text, id int, n int NOT NULL DEFAULT 0, PRIMARY KEY (project_id, id))",
)


def rules_file(folder: Path, rules: str = RULES) -> Path:
    path = folder / "rules.yaml"
    path.write_text(rules)
    return path


@pytest.fixture
def stage(database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str) -> Iterator[Stage]:
    execute(database, *TABLES)
    with Stage.playing(database, redis_url, rules_file(tmp_path), slot_name, client=redis_client) as playing:
        yield playing


def test_a_bust_takes_all_keys_under_the_prefix_with_their_locks_and_no_others(stage: Stage) -> None:
    mine = ["app:metadata:7:a", "app:metadata:7:a:b", "app:metadata:7:", "app:metadata:7:a:stale"]
    others = ["app:metadata:77:a", "app:metadata:a:7:a", "app:metadata:7*:a", "other:app:metadata:7:a"]
    for key in (*mine, *others):
        stage.cache(key, f"{key}:lock")
    stage.run("INSERT INTO projects VALUES ('7')")
    assert stage.cached(*mine, *(f"{key}:lock" for key in mine)) == []
    assert stage.cached(*others, *(f"{key}:lock" for key in others)) == [*others, *(f"{key}:lock" for key in others)]


@pytest.mark.parametrize("value", ["*", "?", "[a-z]", "a\\", "^", "{b}", "ä"])
def test_signs_of_patterns_in_a_value_stand_for_themselves(stage: Stage, value: str) -> None:
    mine, others = [f"app:metadata:{value}:x"], ["app:metadata:a:x", "app:metadata:ab:x", "app:metadata:^a:x"]
    stage.cache(*mine, *others)
    execute(stage.dsn, f"INSERT INTO projects VALUES ('{value}')")
    stage.settle()
    assert stage.cached(*mine, *others) == others
