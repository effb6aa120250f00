"""What types parameters of keys have, by the columns and the queries that rules take them from; and who is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import RunningDaemon, eventually, execute, settled, watermark

from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.parameters import Types, parameter_types
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.postgres.tables import Tables
from cdc_invalidator.rules.agreement import templates_digest
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from pathlib import Path

    import redis

COLUMNS = {
    "smallint": "smallint",
    "serial8": "bigint",
    "numeric": "numeric",
    "numeric(10,2)": "numeric(10,2)",
    "price": "numeric(12,3)",
    "dear": "numeric(12,3)",
    "mood": "enum",
    "happy": "enum",
    "varchar(20)": "character varying(20)",
    "char(5)": "character(5)",
    "bpchar": "bpchar",
    'text COLLATE "C"': "text",
    "timestamptz(3)": "timestamp(3) with time zone",
    "uuid[]": "uuid[]",
}
DDL = (
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
    "CREATE DOMAIN happy AS mood CHECK (VALUE = 'happy')",
    "CREATE DOMAIN price AS numeric(12,3)",
    "CREATE DOMAIN dear AS price CHECK (VALUE > 1000)",
    f"CREATE TABLE things (id int PRIMARY KEY, {', '.join(f'c{n} {kind}' for n, kind in enumerate(COLUMNS))})",
    "CREATE TABLE users (id bigint PRIMARY KEY, team int, name varchar(20))",
    "CREATE TABLE teams (id int PRIMARY KEY, code uuid, owner text)",
)


async def types(dsn: str, caches: str, *rules: str) -> Types:
    lines = "".join(f"  - {{name: r{number}, {rule}}}\n" for number, rule in enumerate(rules))
    rule_set = parse_rules([("rules.yaml", f"version: 1\ncaches: {{{caches}}}\nrules:\n{lines}")], {})
    async with await connect(DsnSource.fixed(dsn), "test") as connection:
        return await parameter_types(connection, rule_set)


def cache(name: str, *params: str, more: str = "") -> str:
    key = ":".join(f"{{{param}}}" for param in params)
    return f"{name}: {{key: 't:{name}:{key}', ttl: 1m{more}}}"


async def test_a_column_s_type_is_told_without_domains_and_with_its_modifier(database: str) -> None:
    execute(database, *DDL)
    params = [f"c{number}" for number in range(len(COLUMNS))]

    found = await types(database, cache("thing", *params), "table: public.things, old_row: sweep, bust: [thing]")

    assert found == {"thing": dict(zip(params, COLUMNS.values(), strict=True))}


async def test_text_that_compares_otherwise_than_it_prints_has_types_of_its_own(database: str) -> None:
    execute(
        database,
        # PostgreSQL makes one only where it was built with ICU.
        "CREATE COLLATION loose (locale = 'C')",
        "UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose'",
        "CREATE EXTENSION citext",
        "CREATE DOMAIN email AS citext",
        "CREATE TABLE people (id text COLLATE loose PRIMARY KEY, mail email NOT NULL, name varchar(9) COLLATE loose)",
        "ALTER TABLE people REPLICA IDENTITY FULL",
    )

    found = await types(
        database,
        ", ".join([cache("person", "id", "mail", "name"), cache("other", "id")]),
        "table: public.people, bust: [person, {other: {via: 'SELECT id FROM people WHERE id = {id}'}}]",
    )

    loose = "text, nondeterministic"
    assert found == {
        "person": {"id": loose, "mail": "citext", "name": "character varying, nondeterministic"},
        "other": {"id": loose},
    }


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("{user: {id: id}}", "integer"),
        ("{user: {via: 'SELECT id FROM users WHERE team = {id}'}}", "bigint"),
        ("{user: {via: 'SELECT code AS id FROM teams WHERE id = {id}'}}", "uuid"),
        ("{user: {via: 'SELECT ''7'' AS id'}}", "text"),
        ("{user: {id: owner}}", "text"),
        # What can't be planned is told where it is asked.
        ("{user: {via: 'SELECT id FROM nowhere WHERE id = {id}'}}", None),
    ],
)
async def test_a_query_tells_the_types_of_its_answer(database: str, rule: str, told: str | None) -> None:
    execute(database, *DDL, "ALTER TABLE teams REPLICA IDENTITY FULL")

    found = await types(database, cache("user", "id"), f"table: public.teams, bust: [{rule}]")

    assert found == {"user": {"id": told}}


async def test_a_bust_that_sweeps_takes_no_parameter_from_the_row(database: str) -> None:
    execute(database, *DDL)

    found = await types(database, cache("user", "id"), "table: public.teams, bust: [{user: {sweep: true}}]")

    assert found == {"user": {}}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("table: public.teams, bust: [{user: {id: id}}]", "bigint"),
        ("table: public.teams, bust: [{user: {id: owner}}]", None),
        ("table: public.teams, bust: [{user: {via: 'SELECT id FROM users WHERE team = {id}'}}]", "bigint"),
        ("table: public.teams, bust: [{user: {via: 'SELECT id::text FROM users WHERE team = {id}'}}]", None),
        ("table: public.nowhere, bust: [user]", None),
        ("table: public.teams, bust: [{user: {sweep: true}}]", "bigint"),
    ],
)
async def test_where_rules_disagree_no_type_is_told(database: str, other: str, told: str | None) -> None:
    execute(database, *DDL, "ALTER TABLE teams REPLICA IDENTITY FULL")

    found = await types(database, cache("user", "id"), "table: public.users, bust: [user]", other)

    assert found == {"user": {"id": told}}


async def test_texts_of_several_lengths_are_printed_alike(database: str) -> None:
    execute(database, *DDL, "ALTER TABLE teams REPLICA IDENTITY FULL", "ALTER TABLE users REPLICA IDENTITY FULL")

    found = await types(
        database,
        cache("user", "name"),
        "table: public.users, bust: [user]",
        "table: public.teams, bust: [{user: {name: owner}}]",
    )

    assert found == {"user": {"name": "text"}}


async def test_of_a_cache_with_a_version_only_what_names_the_version_has_a_type(database: str) -> None:
    execute(database, *DDL)
    pages = cache("page", "team", "query", "version", more=", version: 't:page:{team}:v'")

    found = await types(database, pages, "table: public.users, old_row: sweep, immutable: [], bust: [page]")

    assert found == {"page": {"team": "integer"}}


async def test_a_locked_table_keeps_nobody_waiting(database: str) -> None:
    execute(database, *DDL, "ALTER TABLE teams REPLICA IDENTITY FULL")
    with psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        found = await types(
            database,
            ", ".join([cache("user", "id"), cache("team", "id")]),
            "table: public.teams, bust: [team, {user: {via: 'SELECT id FROM users WHERE team = {id}'}}]",
        )

    assert found == {"user": {"id": None}, "team": {"id": "integer"}}


def test_readers_are_told_at_once_of_other_types_and_other_rules(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *DDL, f"ALTER DATABASE {database.rpartition('/')[2]} SET TimeZone = 'Asia/Tokyo'")
    text = "version: 1\ncaches: {user: {key: 't:user:{id}', ttl: 1m}, team: {key: 't:team:{id}', ttl: 1m}}\nrules:\n"
    text += "  - {name: u, table: public.users, bust: [user, {team: {id: team}}], old_row: sweep}\n"
    rules = tmp_path / "rules.yaml"
    rules.write_text(text, encoding="utf-8")

    def told(name: str) -> Any:
        return json.loads(watermark(redis_client, slot_name).get(name.encode(), b"null"))

    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        caches = parse_rules([("rules.yaml", text)], {}).caches
        assert told("templates") == {name: templates_digest(cache) for name, cache in caches.items()}
        assert told("types") == {"user": {"id": "bigint"}, "team": {"id": "integer"}}
        assert told("settings")["TimeZone"] == "Asia/Tokyo"

        execute(database, "ALTER TABLE users ALTER team TYPE text")
        # Nothing is written, so the stream does not tell.
        eventually(lambda: told("types")["team"] == {"id": "text"}, "the look at the tables finds the type")
        settled(database, redis_client, slot_name)

        rules.write_text(text.replace("'t:user:{id}'", "'t:person:{id}'"), encoding="utf-8")
        eventually(lambda: told("templates")["user"] != templates_digest(caches["user"]), "the reload is told")
        assert told("templates")["team"] == templates_digest(caches["team"])


async def test_a_query_whose_answer_has_another_type_is_found_and_its_cache_swept(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_invalidator.postgres.tables.TYPES_SECONDS", -1.0)
    execute(database, *DDL)
    text = f"version: 1\ncaches: {{{cache('user', 'id')}, {cache('team', 'id')}, {cache('none', 'id')}}}\nrules:\n"
    via = "{via: 'SELECT id FROM users WHERE team = {id}'}"
    text += f"  - {{name: r, table: public.teams, bust: [team, {{user: {via}}}]}}\n"
    text += "  - {name: s, table: public.nowhere, bust: [none]}\n"
    rules, source = parse_rules([("rules.yaml", text)], {}), DsnSource.fixed(database)

    async with await connect(source, "test") as connection:
        spelling = await Spelling.read(connection, source)
        tables = Tables(connection, Publication(connection, "p"), spelling, rules, strict=False)
        await tables.publish()
        told = tables.agreement
        assert (told.types, told.settings) == (
            {"user": {"id": "bigint"}, "team": {"id": "integer"}, "none": {"id": None}},
            spelling.values,
        )
        assert await tables.look(sweeping=set) == {}
        assert tables.agreement is told, "nothing is new"

        # No rule is of this table, so nobody else sees it.
        execute(database, "ALTER TABLE users ALTER id TYPE text")
        assert await tables.look(sweeping=set) == {"user": "table_changed"}
        assert tables.agreement.types["user"] == {"id": "text"}

        # Of a table that was not there, readers have made no keys by its type.
        execute(database, "CREATE TABLE nowhere (id uuid PRIMARY KEY)")
        assert await tables.look(sweeping=set) == {"none": "table_added"}
        assert tables.agreement.types["none"] == {"id": "uuid"}
