"""The commands `explain` and `schema`, without a server and with the database's own tables and answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from running import command, execute

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}"}
  team: {key: "t:team:{team_id}"}
  day: {key: "t:day:{day}"}
rules:
  - name: user-changed
    table: public.users
    columns: [name, score]
    when: "op != 'update' || new.score > 1.0"
    bust: [user, team: {via: "SELECT team_id FROM public.members WHERE user_id = {id}"}]
  - {name: event-changed, table: public.events, old_row: sweep, bust: [day]}
"""


@pytest.fixture
def tables(database: str) -> str:
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text, score float8)",
        "ALTER TABLE users REPLICA IDENTITY FULL",
        "CREATE TABLE members (team_id int, user_id int)",
        "INSERT INTO members VALUES (7, 42), (9, 42), (9, 43)",
        "CREATE TABLE events (id int, day date, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)",
        "CREATE TABLE events_2024 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
    )
    return database


def explain(rules: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return command("explain", *words, rules=rules, **settings)


def told(rules: Path, *words: str, **settings: str) -> dict[str, Any]:
    ended = explain(rules, *words, "--format", "json", **settings)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def busts(answer: dict[str, Any]) -> list[str]:
    return [bust["text"] for bust in answer["busts"]]


INSERT = ("--table", "public.users", "--op", "insert", "--new", '{"id": 42, "score": 5}')


def test_a_change_is_explained_without_a_server(rules: Path) -> None:
    answer = told(rules, *INSERT)
    assert busts(answer) == ["t:user:42"]
    assert answer["rules"][0]["unanswered"] == ["team"]
    lines = explain(rules, *INSERT).stdout.splitlines()
    assert lines[0] == "insert of public.users, by the rule files alone, without the database"
    assert lines[-1] == "1 bust in all"


def test_the_database_knows_which_keys_its_columns_can_make(rules: Path, tables: str) -> None:
    typed = told(rules, "t:user:42", postgres_dsn=tables)
    assert [cache["cache"] for cache in typed["caches"]] == ["user"]
    assert typed["database"] is True
    refused = explain(rules, "t:user:ada", postgres_dsn=tables)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "it looks like one of cache user, but id is a whole number in the database." in refused.stderr
    # What a query gives is not known.
    assert [cache["cache"] for cache in told(rules, "t:team:ada", postgres_dsn=tables)["caches"]] == ["team"]
    # Without the database, the rest of the answer stands.
    away = explain(rules, "t:user:ada", postgres_dsn="host=127.0.0.1 port=1 dbname=none")
    assert away.returncode == 0
    assert away.stdout.splitlines()[-1].startswith("the types of the columns can't be told: ")


def test_the_database_answers_the_queries_and_knows_the_types(rules: Path, tables: str) -> None:
    answer = told(rules, *INSERT, postgres_dsn=tables)
    assert busts(answer) == ["t:user:42", "t:team:7", "t:team:9"]
    assert answer["database"] is True
    assert answer["rules"][0]["unanswered"] == []
    rows = ("--old", '{"id": 42, "name": "a", "score": 1}', "--new", '{"id": 42, "name": "b", "score": 1}')
    (rule,) = told(rules, "--table", "public.users", "--op", "update", *rows, postgres_dsn=tables)["rules"]
    assert rule["why_not"] == ["its `when` is false: op != 'update' || new.score > 1.0"]


def test_values_are_shown_as_postgresql_shows_them(rules: Path, tables: str) -> None:
    words = ("--table", "public.events_2024", "--op", "insert", "--new", '{"id": "1", "day": "1 May 2024"}')
    assert busts(told(rules, *words, postgres_dsn=tables)) == ["t:day:2024-05-01"]


def test_the_replica_identity_of_the_table_decides_what_is_known(rules: Path, tables: str) -> None:
    words = ("--table", "public.events", "--op", "delete", "--old", '{"id": 1, "day": "2024-05-01"}')
    assert busts(told(rules, *words, postgres_dsn=tables)) == ["t:day:2024-05-01"]
    execute(tables, "ALTER TABLE events REPLICA IDENTITY NOTHING")
    answer = told(rules, *words, postgres_dsn=tables)
    assert busts(answer) == ["sweep day"]
    assert answer["rules"][0]["notes"] == ["the old row does not tell day, so cache day is swept"]


def test_a_query_that_fails_sweeps_as_it_does_in_the_daemon_and_spoils_no_json(rules: Path, tables: str) -> None:
    execute(tables, "DROP TABLE members")
    assert busts(told(rules, *INSERT, postgres_dsn=tables)) == ["t:user:42", "sweep team"]


def test_nothing_is_written_by_a_query(rules: Path, tables: str) -> None:
    execute(
        tables,
        "CREATE FUNCTION evil(int) RETURNS int LANGUAGE sql AS $$ INSERT INTO members VALUES ($1, 1) RETURNING 1 $$",
    )
    rules.write_text(
        RULES.replace("SELECT team_id FROM public.members WHERE user_id = {id}", "SELECT evil({id}) AS team_id")
    )
    ended = explain(rules, *INSERT, postgres_dsn=tables)
    assert "sweep team" in ended.stdout
    assert "read-only transaction" in ended.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--table", "public.user", "--op", "truncate"), 1, "No rule names the table public.user; did you mean"),
        (("--table", "public.users", "--op", "trunc"), 2, "did you mean `truncate`?"),
        (("--table", "public.users"), 2, "Give explain either a KEY, or a change with --table and --op."),
        (("k", "--table", "public.users", "--op", "truncate"), 2, "Give explain either a KEY"),
        ((), 2, "Give explain either a KEY"),
        (
            ("t:usr:1",),
            1,
            "No cache has the key `t:usr:1`; the nearest is cache user, whose keys look like `t:user:{id}`.",
        ),
    ],
)
def test_what_can_not_be_explained_is_told(rules: Path, words: tuple[str, ...], code: int, sentence: str) -> None:
    ended = explain(rules, *words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert sentence in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--table", "public.users", "--op", "insert", "--new", '{"idd": 1}'), "no column `idd`; did you mean `id`?"),
        (("--table", "public.users", "--op", "insert", "--new", '{"id": "x"}'), "A value is none of its column's type"),
        (("--table", "public.userss", "--op", "truncate"), "The database has no table public.userss"),
    ],
)
def test_what_the_database_does_not_know_is_told(
    rules: Path, tables: str, words: tuple[str, ...], sentence: str
) -> None:
    ended = explain(rules, *words, postgres_dsn=tables)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert sentence in ended.stderr


def test_a_key_is_explained(rules: Path) -> None:
    answer = told(rules, "t:team:7\\x00lock")
    (cache,) = answer["caches"]
    assert (cache["cache"], cache["is"], cache["params"]) == ("team", "lock", {"team_id": "7"})
    assert explain(rules, "t:team:7").stdout.splitlines()[1] == "  team_id = 7"


def test_the_schema_is_printed_and_needs_no_setting() -> None:
    ended = command("schema")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
