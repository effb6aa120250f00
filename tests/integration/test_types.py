"""Keys equal what a client prints: every type as a column of a key, against the text form that a SELECT gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql
from running import RunningDaemon, execute, settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

TEXTS = [
    "",
    " ",
    "plain",
    "Größe, naïve, 日本語, 🦊",
    'it\'s "quoted"',
    "back\\slash \\n \\\\",
    "line\nbreak\tand tab\r\n",
    "100% {braces} [x] *?",
    "NULL",
    "a:b:c",
]
# Each type with literals of values that are hard to print.
TYPES: dict[str, list[str]] = {
    "smallint": ["-32768", "0", "32767"],
    "integer": ["-2147483648", "0", "7"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "numeric": ["NaN", "Infinity", "1.10", "0.000", "-0.0", "1e30", "12345678901234567890.123456789"],
    "numeric(10,2)": ["1", "1.005", "-99999999.99"],
    "real": ["0.1", "1e-30", "3.4e38", "NaN", "-Infinity", "-0"],
    "double precision": ["0.1", "0.30000000000000004", "1e300", "NaN", "-Infinity", "1e15", "123456789012345678"],
    "money": ["-1234.5"],
    "boolean": ["t", "f"],
    "text": TEXTS,
    "varchar(40)": TEXTS,
    "char(12)": ["abc", "", "äöü"],
    '"char"': ["x"],
    "name": ["a name"],
    "uuid": ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "date": ["2024-02-29", "0044-03-15 BC", "infinity", "99999-01-01"],
    "time": ["23:59:59.999999", "04:05"],
    "timetz": ["04:05:06.7+02", "04:05:06-08:30"],
    "timestamp": ["2024-02-29 12:00:00", "2024-02-29 12:00:00.1", "-infinity", "0001-01-01 00:00:00 BC"],
    "timestamptz": ["2024-07-01 12:00:00.123456+00", "2024-01-01 00:00:00-08", "1883-11-18 12:00:00+00", "infinity"],
    "interval": ["1 year 2 mons -3 days 04:05:06.7", "-1 mons", "0", "1000 hours"],
    "bytea": ["\\x00ff5c27", "\\x"],
    "bit(4)": ["1010"],
    "varbit": ["", "10101"],
    "json": ['{"b": 1,  "a": [1.0, null, "ä"]}'],
    "jsonb": ['{"b": 1,  "a": [1.0, null, "ä"]}', '"text"', "null"],
    "inet": ["192.168.0.1", "192.168.0.1/24", "::1/128", "2001:db8::/32"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08-00-2b-01-02-03"],
    "point": ["(1.5,-2)"],
    "box": ["((1,2),(0,0))"],
    "pg_lsn": ["16/B374D848"],
    "regclass": ["pg_class", "things"],
    "tsvector": ["'fat':2 'cat''s':3"],
    "integer[]": ["{}", "{1,NULL,3}", "{{1,2},{3,4}}", "[0:1]={1,2}"],
    "text[]": ['{"", "NULL", NULL, "a,b", "q\\"q", "b\\\\s", "{}", " "}'],
    "timestamptz[]": ['{"2024-07-01 12:00:00+00"}'],
    "int4range": ["[1,5]", "empty", "(,3)"],
    "tstzrange": ["[2024-07-01 12:00:00+00,2024-07-02 12:00:00+00)"],
    "int4multirange": ["{[1,3),[5,8)}"],
    "mood": ["happy", "très sad", "it's"],
    "pair": ['(1,"a b")', '(,"")', '(2,"q""q")'],
    "mood[]": ['{happy,"très sad"}'],
    "positive": ["42"],
    "email": ["Ada@Example.org"],
}
KINDS = [
    "CREATE TYPE mood AS ENUM ('happy', 'très sad', 'it''s')",
    "CREATE TYPE pair AS (n int, t text)",
    "CREATE DOMAIN positive AS numeric(8,2) CHECK (VALUE > 0)",
    "CREATE DOMAIN email AS text",
]


def printed(dsn: str, query: str) -> list[str]:
    """What a client of that database prints."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return [row[0] for row in connection.execute(query.encode()).fetchall()]


def keys(client: redis.Redis) -> set[str]:
    return {key.decode() for key in client.keys("t:*")}  # type: ignore[union-attr]


@pytest.fixture
def stream(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> Iterator[Callable[[str], RunningDaemon]]:
    """Start a daemon with these caches and rules, and wait until it has had all."""
    with ExitStack() as stack:

        def start(text: str) -> RunningDaemon:
            rules = tmp_path / "rules.yaml"
            rules.write_text(f"version: 1\n{text}", encoding="utf-8")
            daemon = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name)
            stack.enter_context(daemon).ready()
            settled(database, redis_client, slot_name)
            return daemon

        yield start


Stream = Callable[[str], RunningDaemon]


def one_cache(key: str, rule: str = "") -> str:
    return (
        f"caches:\n  thing: {{key: '{key}', ttl: 1m}}\n"
        f"rules:\n  - {{name: r, table: public.things, bust: [thing]{rule}}}\n"
    )


def test_keys_of_every_type_are_what_a_client_prints(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    columns = {f"c{number}": kind for number, kind in enumerate(TYPES)}
    definitions = ", ".join(f"{column} {kind}" for column, kind in columns.items())
    execute(
        database,
        *KINDS,
        f"CREATE TABLE things (id int PRIMARY KEY, {definitions})",
        "ALTER TABLE things REPLICA IDENTITY FULL",
    )
    caches = "".join(f"  {column}: {{key: 't:{column}:{{{column}}}', ttl: 1m}}\n" for column in columns)
    stream(f"caches:\n{caches}rules:\n  - {{name: r, table: public.things, bust: [{', '.join(columns)}]}}\n")
    with psycopg.connect(database, autocommit=True) as connection:
        for row in range(max(map(len, TYPES.values()))):
            values = [kind[row] if row < len(kind) else None for kind in TYPES.values()]
            literals = sql.SQL(", ").join(map(sql.Literal, values))
            connection.execute(sql.SQL("INSERT INTO things VALUES ({}, {})").format(row, literals))
    # format() calls the type's output function, as sending the value to a client does. A cast of char(n) to text would
    # drop its padding, which a client does get.
    wanted = {
        f"t:{column}:{text}": kind
        for column, kind in columns.items()
        for text in printed(database, f"SELECT format('%s', {column}) FROM things WHERE {column} IS NOT NULL")
    }
    assert len(wanted) > 100
    # NULL gives no key, not that of an empty string.
    others = {key for column in columns if (key := f"t:{column}:") not in wanted}
    for operation in ("UPDATE things SET id = id + 1000", "DELETE FROM things"):
        settled(database, redis_client, slot_name)
        redis_client.mset(dict.fromkeys([*wanted, *others], "cached"))
        execute(database, operation)
        settled(database, redis_client, slot_name)
        missed = keys(redis_client) - others
        assert {f"{wanted[key]}: {key}" for key in missed} == set()
        assert keys(redis_client) == others


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_values_are_printed_with_what_the_database_sets_for_its_clients(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str, zone: str
) -> None:
    name = database.rpartition("/")[2]
    settings = {
        "timezone": zone,
        "datestyle": "SQL, DMY",
        "intervalstyle": "iso_8601",
        "bytea_output": "escape",
        "extra_float_digits": "0",
    }
    execute(
        database,
        *(f"ALTER DATABASE {name} SET {setting} = '{value}'" for setting, value in settings.items()),
        "CREATE TABLE things (k timestamptz PRIMARY KEY, d date, i interval, b bytea, f float8)",
        "ALTER TABLE things REPLICA IDENTITY FULL",
    )
    execute(
        database,
        "INSERT INTO things"
        " VALUES ('2024-07-01 12:00+00', '28.02.2024', '1 day 2 h', decode('615c00', 'hex'), 0.1 + 0.2)",
    )
    stream(one_cache("t:{k}|{d}|{i}|{b}|{f}"))
    (wanted,) = printed(database, "SELECT format('t:%s|%s|%s|%s|%s', k, d, i, b, f) FROM things")
    assert wanted.endswith("|28/02/2024|P1DT2H|a\\\\\\000|0.3")
    redis_client.set(wanted, "cached")
    execute(database, "DELETE FROM things")
    settled(database, redis_client, slot_name)
    assert keys(redis_client) == set()


def test_keys_of_several_columns_with_quoted_and_foreign_names(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    table, odd = '"Größen"."Die Dinge"', '"a ""b"" "'
    execute(
        database,
        'CREATE SCHEMA "Größen"',
        f'CREATE TABLE {table} ("Nr." int, "größe" text, {odd} text, PRIMARY KEY ("größe", "Nr."))',
        f"ALTER TABLE {table} REPLICA IDENTITY FULL",
        f"INSERT INTO {table} VALUES (1, 'groß', 'x'), (2, 'groß', NULL)",
    )
    stream(
        "caches:\n  thing: {key: 't:{nr}:{size}:{other}', ttl: 1m}\n  size: {key: 't:{größe}', ttl: 1m}\n"
        'rules:\n  - name: r\n    table: \'"Größen"."Die Dinge"\'\n'
        "    bust:\n      - thing: {nr: 'Nr.', size: größe, other: 'a \"b\" '}\n      - size\n"
    )
    cached = ["t:1:groß:x", "t:1:groß:y", "t:2:groß:", "t:2:groß:x", "t:groß", "t:klein"]
    redis_client.mset(dict.fromkeys(cached, "cached"))
    execute(database, f"UPDATE {table} SET {odd} = 'y'")
    settled(database, redis_client, slot_name)
    # The second row had no key before, since a part of it was NULL.
    assert keys(redis_client) == {"t:2:groß:", "t:2:groß:x", "t:klein"}


def test_citext_keeps_the_case_in_which_it_was_written(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    try:
        execute(database, "CREATE EXTENSION citext")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this PostgreSQL comes without citext")
    execute(database, "CREATE TABLE things (id int PRIMARY KEY, k citext)", "ALTER TABLE things REPLICA IDENTITY FULL")
    execute(database, "INSERT INTO things VALUES (1, 'Ada@Example.org')")
    stream(
        "caches:\n  as-is: {key: 't:{k}', ttl: 1m}\n  folded: {key: 't:lower:{k|lower}', ttl: 1m}\n"
        "rules:\n  - {name: r, table: public.things, bust: [as-is, folded]}\n"
    )
    redis_client.mset(dict.fromkeys(["t:Ada@Example.org", "t:ada@example.org", "t:lower:ada@example.org"], "cached"))
    execute(database, "UPDATE things SET k = 'ADA@example.org' WHERE k = 'ada@EXAMPLE.org'")
    settled(database, redis_client, slot_name)
    assert keys(redis_client) == {"t:ada@example.org"}


LARGE = "string_agg(md5(n::text), '')"


def test_an_unchanged_toast_value_in_a_key_comes_from_the_old_row_with_identity_full(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY, n int, k text)",
        "ALTER TABLE things ALTER k SET STORAGE EXTERNAL",
        "ALTER TABLE things REPLICA IDENTITY FULL",
        f"INSERT INTO things SELECT 1, 0, {LARGE} FROM generate_series(1, 500) n",
    )
    stream(one_cache("t:{k}"))
    (large,) = printed(database, "SELECT k FROM things")
    redis_client.mset({f"t:{large}": "cached", "t:other": "cached"})
    execute(database, "UPDATE things SET n = 1")
    settled(database, redis_client, slot_name)
    assert keys(redis_client) == {"t:other"}


def test_an_unchanged_toast_value_in_a_key_sweeps_where_the_old_row_lacks_it(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY, n int, k text)",
        "ALTER TABLE things ALTER k SET STORAGE EXTERNAL",
        f"INSERT INTO things SELECT 1, 0, {LARGE} FROM generate_series(1, 500) n",
    )
    stream(one_cache("t:{k}", ", immutable: [k], on: [insert, update]"))
    (large,) = printed(database, "SELECT k FROM things")
    redis_client.mset({f"t:{large}": "cached", "t:other": "cached"})
    execute(database, "UPDATE things SET n = 1")
    settled(database, redis_client, slot_name)
    assert keys(redis_client) == set()


def test_a_stored_generated_column_gives_a_key_where_postgresql_publishes_it(
    database: str, redis_client: redis.Redis, stream: Stream, slot_name: str
) -> None:
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY, n int, k int GENERATED ALWAYS AS (n * 2) STORED)",
        "ALTER TABLE things REPLICA IDENTITY FULL",
        "INSERT INTO things VALUES (1, 2)",
    )
    stream(one_cache("t:{k}"))
    redis_client.mset({"t:4": "cached", "t:6": "cached", "t:8": "cached"})
    execute(database, "UPDATE things SET n = 3")
    settled(database, redis_client, slot_name)
    assert keys(redis_client) == {"t:8"}


def test_a_virtual_column_in_a_key_is_refused(database: str, redis_url: str, tmp_path: Path, slot_name: str) -> None:
    execute(database, "CREATE TABLE things (id int PRIMARY KEY, k int GENERATED ALWAYS AS (id * 2) VIRTUAL)")
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"version: 1\n{one_cache('t:{k}')}")
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        assert daemon.wait() == 2
    assert any(f"{rules}:5:" in line and "a generated column" in line for line in daemon.errors)
