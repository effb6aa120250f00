"""A `via` query from which a policy hides rows fails, is swept and told; `check` names the tables and what helps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from running import RunningDaemon, command, eventually, execute, settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

    from cdc_invalidator.embedded.servers import Postgres

RULES = """
version: 1
caches: {{members: {{key: "t:team:{{team_id}}:members", ttl: 5m}}}}
rules:
  - name: user-in-teams
    table: public.users
    bust: [members: {{via: "SELECT team_id FROM public.{source} WHERE user_id = {{id}}"}}]
  - {{name: membership, table: public.members, bust: [members]}}
"""


@pytest.fixture
def role(database: str, postgres: Postgres, slot_name: str) -> Iterator[str]:
    """A role that may stream and read; the members have a policy for others, and a view."""
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        "CREATE TABLE members (team_id int, user_id int, PRIMARY KEY (user_id, team_id))",
        "CREATE VIEW seen AS SELECT * FROM members",
        "CREATE VIEW asked WITH (security_invoker) AS SELECT * FROM members",
        "INSERT INTO users VALUES (1, 'Ada')",
        "INSERT INTO members VALUES (7, 1), (9, 1)",
        "ALTER TABLE members ENABLE ROW LEVEL SECURITY",
        f"CREATE ROLE {slot_name} LOGIN REPLICATION PASSWORD 'pw'",
        "GRANT SELECT ON members, seen, asked TO PUBLIC",
        "CREATE POLICY own ON members USING (user_id = 5)",
        f"CREATE PUBLICATION {slot_name} FOR TABLE users, members",
    )
    yield postgres.dsn_for(database.rpartition("/")[2], user=slot_name, password="pw")
    execute(database, f"DROP OWNED BY {slot_name}", f"DROP ROLE {slot_name}")


def checked(dsn: str, redis_url: str, rules: Path, slot: str) -> list[str]:
    servers = {"postgres_dsn": dsn, "redis_url": redis_url, "slot": slot, "publication": slot}
    told = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
    return [each["sentence"] for each in told["findings"] if each["code"].startswith("query_")]


@pytest.mark.parametrize("source", ["members", "asked"])
def test_where_a_policy_hides_rows_the_cache_is_swept_and_check_says_what_helps(
    database: str, role: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str, source: str
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.format(source=source))
    (finding,) = checked(role, redis_url, rules, slot_name)
    remedy = f'ALTER ROLE "{slot_name}" BYPASSRLS'
    assert f"reads public.members, where row-level security hides rows from the role {slot_name}" in finding
    assert remedy in finding
    keys = ["t:team:7:members", "t:team:9:members", "t:team:8:members"]
    with RunningDaemon(dsn=role, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.mset(dict.fromkeys(keys, "cached"))
        execute(database, "UPDATE users SET name = 'Eva'")
        settled(database, redis_client, slot_name)
        assert redis_client.exists(*keys) == 0
        failed = daemon.seen("query_failed", rule="user-in-teams")
        assert 'row-level security policy for table "members"' in failed["error"]
        assert "BYPASSRLS" in failed["error"]
        assert daemon.metric("cdc_invalidator_rule_errors_total", rule="user-in-teams") == 1
        execute(database, remedy)
        assert checked(role, redis_url, rules, slot_name) == []
        redis_client.mset(dict.fromkeys(keys, "cached"))
        execute(database, "UPDATE users SET name = 'Ada'")
        settled(database, redis_client, slot_name)
        eventually(lambda: redis_client.exists(*keys) == 1, "only the teams of the user are busted")
        assert redis_client.exists(keys[2])


def test_a_view_of_the_owner_shows_all_rows(
    database: str, role: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.format(source="seen"))
    assert checked(role, redis_url, rules, slot_name) == []
    with RunningDaemon(dsn=role, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.mset(dict.fromkeys(("t:team:7:members", "t:team:8:members"), "cached"))
        execute(database, "UPDATE users SET name = 'Eva'")
        settled(database, redis_client, slot_name)
        assert redis_client.keys("t:team:*") == [b"t:team:8:members"]
        assert not daemon.named("query_failed")
