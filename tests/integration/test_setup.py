"""setup, teardown and what run refuses: the catalogs of a real PostgreSQL, and the exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator.embedded.process import free_port
from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from pathlib import Path

    import redis


def rule_file(folder: Path, *rules: str, caches: str = "  thing: {key: 't:thing:{id}', ttl: 1m}\n") -> Path:
    path = folder / "rules.yaml"
    path.write_text(f"version: 1\ncaches:\n{caches}rules:\n" + "".join(f"  - {rule}\n" for rule in rules))
    return path


def rows(dsn: str, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query, parameters).fetchall()


THING = "{name: thing-changed, table: public.things, bust: [thing]}"


def test_setup_makes_slot_and_publication_once_and_teardown_drops_them(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, "CREATE TABLE things (id int PRIMARY KEY)", "CREATE TABLE others (id int PRIMARY KEY)")
    given = {"postgres_dsn": database, "rules": rule_file(tmp_path, THING), "slot": slot_name, "publication": "p"}
    printed = command("setup", "--print", **given)
    assert printed.returncode == 0
    assert printed.stdout.splitlines() == [
        'CREATE PUBLICATION "p" FOR TABLE ONLY "public"."things" WITH (publish_generated_columns = stored);',
        f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput', failover => true);",
    ]
    assert rows(database, "SELECT 1 FROM pg_publication") == []
    assert command("setup", **given).returncode == 0
    assert rows(database, "SELECT tablename FROM pg_publication_tables WHERE pubname = 'p'") == [("things",)]
    assert rows(database, "SELECT plugin FROM pg_replication_slots WHERE slot_name = %s", slot_name) == [("pgoutput",)]
    assert command("setup", **given).stdout == "-- nothing is missing\n"
    torn = command("teardown", postgres_dsn=database, slot=slot_name, publication="p")
    assert torn.returncode == 0
    assert len(torn.stdout.splitlines()) == 2
    assert rows(database, "SELECT 1 FROM pg_publication") == []
    assert rows(database, "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", slot_name) == []
    assert command("teardown", postgres_dsn=database, slot=slot_name, publication="p").stdout == "-- nothing to drop\n"


def test_setup_adds_what_a_new_rule_names(database: str, tmp_path: Path, slot_name: str) -> None:
    execute(database, "CREATE TABLE things (id int PRIMARY KEY)", 'CREATE TABLE "Größe" (id int PRIMARY KEY)')
    given = {"postgres_dsn": database, "slot": slot_name, "publication": slot_name}
    assert command("setup", rules=rule_file(tmp_path, THING), **given).returncode == 0
    both = rule_file(tmp_path, THING, """{name: size-changed, table: 'public."Größe"', bust: [thing]}""")
    assert command("setup", rules=both, **given).returncode == 0
    assert rows(database, "SELECT tablename FROM pg_publication_tables ORDER BY 1") == [("Größe",), ("things",)]


@pytest.mark.parametrize(
    ("definition", "sentence"),
    [
        ("CREATE TABLE things (id int)", "no usable replica identity"),
        ("CREATE TABLE things (id int PRIMARY KEY DEFERRABLE)", "no usable replica identity"),
        ("CREATE TABLE things (id int PRIMARY KEY); ALTER TABLE things REPLICA IDENTITY NOTHING", "no usable"),
        ("CREATE UNLOGGED TABLE things (id int PRIMARY KEY)", "an unlogged table"),
        ("CREATE VIEW things AS SELECT 1 AS id", "a view"),
        ("CREATE TABLE things (idd int PRIMARY KEY)", "did you mean idd?"),
        ("CREATE TABLE things (key int PRIMARY KEY, id int)", "REPLICA IDENTITY FULL, or set old_row"),
        (
            "CREATE TABLE things (key int PRIMARY KEY, id int GENERATED ALWAYS AS (key) VIRTUAL)",
            "a generated column",
        ),
    ],
)
def test_a_table_that_can_not_carry_a_rule_is_refused_with_the_place_and_never_published(
    database: str, tmp_path: Path, slot_name: str, definition: str, sentence: str
) -> None:
    execute(database, definition)
    rules = rule_file(tmp_path, THING)
    given = {"postgres_dsn": database, "rules": rules, "slot": slot_name, "publication": slot_name}
    for words in (["setup"], ["run", "--redis-url", "redis://127.0.0.1:1"]):
        refused = command(*words, **given, http_port=0)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert f"{rules}:5:" in refused.stderr
        assert sentence in refused.stderr
        assert "Traceback" not in refused.stderr
    assert rows(database, "SELECT 1 FROM pg_publication") == []
    if definition.startswith("CREATE TABLE"):
        execute(database, "DELETE FROM things")


@pytest.mark.parametrize(
    "fields",
    [
        "old_row: sweep",
        "old_row: ignore",
        "immutable: [id], on: [insert, update]",
        "on: [insert, truncate]",
    ],
)
def test_a_rule_that_says_what_to_do_without_the_old_row_is_accepted(
    database: str, tmp_path: Path, slot_name: str, fields: str
) -> None:
    execute(database, "CREATE TABLE things (key int PRIMARY KEY, id int)")
    rules = rule_file(tmp_path, f"{{name: thing-changed, table: public.things, {fields}, bust: [thing]}}")
    done = command("setup", "--print", postgres_dsn=database, rules=rules, slot=slot_name)
    assert done.returncode == 0, done.stderr


def test_a_role_without_privileges_is_told_what_an_administrator_must_run(
    database: str, postgres: Postgres, tmp_path: Path, slot_name: str
) -> None:
    name = database.rpartition("/")[2]
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY)",
        f"CREATE ROLE {slot_name} LOGIN REPLICATION PASSWORD 'pw'",
    )
    try:
        dsn = postgres.dsn_for(name, user=slot_name, password="pw")
        refused = command("setup", postgres_dsn=dsn, rules=rule_file(tmp_path, THING), slot=slot_name)
        assert refused.returncode == 3
        assert "have an administrator run, on the primary: CREATE PUBLICATION" in refused.stderr
        assert "pg_create_logical_replication_slot" in refused.stderr
        assert "pw@" not in refused.stderr
    finally:
        execute(database, f"DROP ROLE {slot_name}")


def test_a_slot_with_two_phase_is_refused_with_the_remedy_and_teardown_drops_it(
    database: str, tmp_path: Path, slot_name: str, redis_url: str
) -> None:
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY)",
        f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput', false, true)",
    )
    given = {"postgres_dsn": database, "rules": rule_file(tmp_path, THING), "slot": slot_name, "publication": slot_name}
    for words in (["setup"], ["setup", "--print"], ["run", "--redis-url", redis_url]):
        refused = command(*words, **given, http_port=0)
        assert refused.returncode == 3
        assert f"run SELECT pg_drop_replication_slot('{slot_name}');" in refused.stderr
    torn = command("teardown", postgres_dsn=database, slot=slot_name, publication=slot_name)
    assert torn.returncode == 0
    assert rows(database, "SELECT FROM pg_replication_slots WHERE slot_name = %s", slot_name) == []


def test_wal_level_too_low_ends_with_3_and_the_remedy(tmp_path: Path) -> None:
    with Postgres(settings={"wal_level": "replica"}) as server:
        refused = command("setup", postgres_dsn=server.dsn, rules=rule_file(tmp_path, THING))
    assert refused.returncode == 3
    assert "set wal_level = logical" in refused.stderr


def test_settings_that_are_missing_or_wrong_are_named_all_at_once_without_their_values(tmp_path: Path) -> None:
    refused = command("run", postgres_dsn="postgresql://u:topsecret@h/d", http_port="many", cwd=tmp_path)
    assert refused.returncode == 2
    assert "CDC_REDIS_URL is not set" in refused.stderr
    assert "CDC_RULES is not set" in refused.stderr
    assert "CDC_HTTP_PORT is wrong" in refused.stderr
    assert "topsecret" not in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_table_that_does_not_exist_yet_is_published_once_it_does(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = rule_file(tmp_path, THING)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        assert daemon.status()["unpublished_tables"] == ["public.things"]
        redis_client.set("t:thing:1", "cached before the table was published")
        execute(database, "CREATE TABLE things (id int PRIMARY KEY, n int)", "INSERT INTO things VALUES (1)")
        assert daemon.seen("tables_appeared")["tables"] == ["public.things"]
        daemon.seen("gap", reason="table_added")
        eventually(lambda: not redis_client.exists("t:thing:1"), "the sweep of the new table's cache")
        eventually(lambda: daemon.status()["unpublished_tables"] == [], "its status no longer lists it")
        settled(database, redis_client, slot_name)
        redis_client.set("t:thing:1", "cached again")
        execute(database, "UPDATE things SET n = 1")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("t:thing:1")


def test_a_table_of_a_tenant_that_comes_later_is_told(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, "CREATE TABLE things (id int PRIMARY KEY)", "CREATE SCHEMA tenant_a")
    execute(database, "CREATE TABLE tenant_a.things (id int PRIMARY KEY)")
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rule_file(tmp_path, THING), slot=slot_name) as daemon:
        daemon.ready()
        execute(database, "CREATE SCHEMA tenant_b", "CREATE TABLE tenant_b.things (id int PRIMARY KEY)")
        # What was there at the start is told by `check`.
        assert daemon.seen("tables_alike")["tables"] == ["tenant_b.things"]


@pytest.mark.parametrize(
    ("standbys", "remedy"),
    [
        ("host=db2 dbname=shop user=app password=topsecret", "postgresql://user:password@host:port/database"),
        ("postgresql://app:topsecret@db2/shop postgresql://app@db2:5432/", "leave one of the two out"),
    ],
    ids=["words", "one of them twice"],
)
def test_run_refuses_standbys_that_are_no_urls_or_are_named_twice(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, standbys: str, remedy: str
) -> None:
    given = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "postgres_standbys": standbys}
    refused = command("run", rules=rule_file(tmp_path, THING), http_port=free_port(), **given)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "CDC_POSTGRES_STANDBYS" in line
    assert remedy in line
    assert "topsecret" not in refused.stderr + refused.stdout
    assert [json.loads(each)["event"] for each in refused.stdout.splitlines()] == ["exit"]


def test_run_warns_of_the_old_name_of_a_setting_and_refuses_both_names_where_they_differ(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    given = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "postgres_replicas": "no URL"}
    refused = command("run", rules=rule_file(tmp_path, THING), http_port=free_port(), **given)
    assert refused.returncode == 2
    warning, last = map(json.loads, refused.stdout.splitlines())
    assert last["event"] == "exit"
    assert (warning["event"], warning["level"]) == ("setting_renamed", "warning")
    assert "use CDC_POSTGRES_STANDBYS" in warning["error"]
    given["postgres_standbys"] = "another"
    refused = command("run", rules=rule_file(tmp_path, THING), http_port=free_port(), **given)
    assert refused.returncode == 2
    assert "CDC_POSTGRES_REPLICAS" in refused.stderr
    assert [json.loads(each)["event"] for each in refused.stdout.splitlines()] == ["exit"]


def test_control_signs_in_a_name_reach_no_terminal_and_no_page(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    ugly = "th\x1b[31mi\\ng\x07\x9b"
    named = f'public."{ugly}"'
    path = rule_file(tmp_path, f"{{name: thing-changed, table: {json.dumps(named)}, bust: [thing]}}")
    given = {"postgres_dsn": database, "rules": path, "slot": slot_name, "publication": slot_name}
    said = []
    for statement in (
        "SELECT 1",  # it is not there
        f'CREATE TABLE "{ugly}" (id int NOT NULL)',  # it has no identity
        f'CREATE UNIQUE INDEX ON "{ugly}" (id)',
    ):
        execute(database, statement)
        for words in (["check"], ["setup", "--print"], ["explain", "--table", named, "--op", "truncate"]):
            ended = command(*words, **given, redis_url=redis_url)
            said += [ended.stdout, ended.stderr]
    execute(database, f'ALTER TABLE "{ugly}" REPLICA IDENTITY FULL')
    printed = command("setup", "--print", **given)
    said.append(printed.stdout)
    statements = printed.stdout.splitlines()
    assert statements[0].startswith(f'CREATE PUBLICATION "{slot_name}" FOR TABLE ONLY "public".U&"th\\+00001b[31mi')
    execute(database, statements[0])
    assert rows(database, "SELECT tablename FROM pg_publication_tables WHERE pubname = %s", slot_name) == [(ugly,)]
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=path, slot=slot_name, publication=slot_name) as daemon:
        daemon.ready()
        execute(database, f'INSERT INTO "{ugly}" VALUES (1)')
        settled(database, redis_client, slot_name)
        eventually(lambda: daemon.metric("cdc_invalidator_changes_total") == 1, "the change is counted")
        said += [daemon.get(page)[1] for page in ("/metrics", "/status", "/readyz")]
    assert [text for text in said if set(text) & set("\x1b\x07\x9b")] == []
    assert len([text for text in said if "x1b[31mi" in text]) > 5
