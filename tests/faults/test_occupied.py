"""Two deployments on one Redis under one name: one works, the other refuses, and says which setting parts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
import reading
import redis
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def other_server(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """Another PostgreSQL; where the parameter is False, with the same system identifier."""
    with Postgres(own_identity=getattr(request, "param", True)) as server:
        yield server


@pytest.fixture
def other(other_server: Postgres, slot_name: str) -> Iterator[str]:
    """A database of that name on another server."""
    yield other_server.create_database(slot_name)
    other_server.drop_database(slot_name)


def slots(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
        ).fetchone()
    assert row is not None
    return int(row[0])


def rules_for(folder: Path, prefix: str) -> Path:
    rules = folder / f"{prefix}.yaml"
    rules.write_text(
        f'version: 1\ncaches:\n  thing: {{key: "{prefix}:thing:{{id}}", ttl: 5m}}\n'
        "rules:\n  - {name: thing-changed, table: public.counters, bust: [thing]}\n"
    )
    return rules


@pytest.fixture
def daemons(
    database: str, other: str, redis_url: str, tmp_path: Path, slot_name: str
) -> Iterator[tuple[RunningDaemon, RunningDaemon]]:
    """The first leads; the second, with another database and other keys, is not started."""
    for dsn in (database, other):
        reading.create(dsn)
    first = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules_for(tmp_path, "a"), slot=slot_name)
    second = RunningDaemon(dsn=other, redis_url=redis_url, rules=rules_for(tmp_path, "b"), slot=slot_name)
    with first:
        first.ready()
        yield first, second


@pytest.mark.parametrize(
    ("other_server", "slot_is_there"),
    [(True, False), (True, True), (False, False)],
    indirect=["other_server"],
    ids=["another system", "another system with a slot", "a copy of the system"],
)
def test_a_second_deployment_refuses_to_lead_and_holds_no_wal(
    daemons: tuple[RunningDaemon, RunningDaemon],
    redis_client: redis.Redis,
    other: str,
    slot_name: str,
    slot_is_there: bool,
) -> None:
    first, second = daemons
    settled(first.dsn, redis_client, slot_name)
    if slot_is_there:
        execute(other, f"CREATE PUBLICATION {slot_name} FOR TABLE counters")
        execute(other, f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput')")
    redis_client.set("a:thing:99", "good")
    first.events.clear()
    with second:
        said = second.seen("watermark_taken")
        assert "CDC_WATERMARK" in said["error"]
        assert f"cdc:{slot_name}:watermark" in said["error"]
        eventually(lambda: second.status().get("last_error") == said["error"], "/status says so")
        assert second.get("/readyz")[0] == 503
        eventually(lambda: len(second.named("watermark_taken")) > 1, "it tries again")
        assert slots(other) == 0
        # The first is not disturbed.
        execute(first.dsn, "UPDATE counters SET n = n + 1 WHERE id = 1")
        settled(first.dsn, redis_client, slot_name)
        assert redis_client.exists("a:thing:99")
        assert not first.named("gap")
        assert not first.named("redis_unavailable")
        # Once the first has gone for good, the second leads.
        assert first.terminate() == 0
        second.ready()
        assert second.status()["last_error"] is None
        settled(second.dsn, redis_client, slot_name)


@pytest.mark.parametrize("other_server", [False], indirect=True, ids=["a copy of the system"])
def test_of_two_copies_that_both_have_a_slot_one_refuses(
    daemons: tuple[RunningDaemon, RunningDaemon], redis_client: redis.Redis, other: str, slot_name: str
) -> None:
    first, second = daemons
    settled(first.dsn, redis_client, slot_name)
    execute(other, f"CREATE PUBLICATION {slot_name} FOR TABLE counters")
    execute(other, f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput')")
    with second:

        def refuses() -> RunningDaemon | None:
            roles = [daemon.status().get("role") for daemon in daemons]
            told = [daemon for daemon in daemons if len(daemon.named("watermark_taken")) > 1]
            return told[0] if sorted(map(str, roles)) == ["connecting", "leader"] and told else None

        loser: RunningDaemon = eventually(refuses, "one leads, the other says why not")
        assert "another slot or copy of this PostgreSQL" in loser.named("watermark_taken")[0]["error"]
        winner = first if loser is second else second
        assert slots(loser.dsn) == 0
        winner.events.clear()
        redis_client.mset({"a:thing:99": "good", "b:thing:99": "good"})
        tried = len(loser.named("watermark_taken"))
        eventually(lambda: len(loser.named("watermark_taken")) > tried + 1, "it goes on refusing")
        assert redis_client.exists("a:thing:99", "b:thing:99") == 2
        assert not winner.named("gap")


def test_two_deployments_with_two_watermarks_get_along(
    daemons: tuple[RunningDaemon, RunningDaemon], other: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    first, without = daemons
    with RunningDaemon(
        dsn=other, redis_url=redis_url, rules=without.rules, slot=slot_name, watermark="orders-db"
    ) as second:
        second.ready()
        settled(first.dsn, redis_client, slot_name)
        settled(other, redis_client, "orders-db")
        redis_client.mset({"a:thing:1": "old", "a:thing:2": "good", "b:thing:1": "old", "b:thing:2": "good"})
        for dsn, name in ((first.dsn, slot_name), (other, "orders-db")):
            execute(dsn, "UPDATE counters SET n = n + 1 WHERE id = 1")
            settled(dsn, redis_client, name)
        assert redis_client.mget("a:thing:1", "a:thing:2", "b:thing:1", "b:thing:2") == [None, b"good"] * 2
        for daemon in (first, second):
            assert len(daemon.named("gap")) == 1  # of its new slot
            assert not daemon.errors


def test_check_says_beforehand_that_the_watermark_is_taken(
    daemons: tuple[RunningDaemon, RunningDaemon], other: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    first, second = daemons
    settled(first.dsn, redis_client, slot_name)
    given = {"postgres_dsn": other, "redis_url": redis_url, "rules": second.rules, "slot": slot_name}
    taken = command("check", **given)
    assert taken.returncode == 1
    assert "CDC_WATERMARK" in taken.stdout
    assert command("check", **given, watermark="orders-db").returncode == 0
    assert command("check", **given | {"postgres_dsn": first.dsn, "rules": first.rules}).returncode == 0
    assert first.terminate() == 0
    left = command("check", **given)
    assert left.returncode == 0
    assert "of another PostgreSQL, whose daemon does not run now" in " ".join(left.stdout.split())


def test_the_slot_of_another_database_is_refused_before_anything_is_made(
    database: str, postgres: Postgres, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput')")
    second = f"{slot_name}_second"
    dsn = postgres.create_database(second)
    try:
        reading.create(dsn)
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules_for(tmp_path, "a"), slot=slot_name) as daemon:
            assert daemon.wait() == errors.ServerRefuses.exit_code
            assert "belongs to another database" in daemon.errors[-1]
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT count(*) FROM pg_publication").fetchone() == (0,)
    finally:
        postgres.drop_database(second)


def test_two_slots_of_one_server_do_not_share_a_watermark(
    daemons: tuple[RunningDaemon, RunningDaemon],
    postgres: Postgres,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> None:
    first, second = daemons
    settled(first.dsn, redis_client, slot_name)
    name = f"{slot_name}_second"
    dsn = postgres.create_database(name)
    try:
        reading.create(dsn)
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=second.rules, slot=name, watermark=slot_name) as daemon:
            assert "another slot or copy of this PostgreSQL" in daemon.seen("watermark_taken")["error"]
            assert daemon.get("/readyz")[0] == 503
            assert slots(dsn) == 0
        assert [gap["reason"] for gap in first.named("gap")] == ["new_slot"]
    finally:
        postgres.drop_database(name)
