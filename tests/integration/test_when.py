"""Conditions on real tables: types are known as the catalogs have them, and what can't be compared is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
from psycopg import sql
from running import RunningDaemon, command, eventually, execute
from stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

    import redis

KINDS = [
    "CREATE DOMAIN d_level AS int CHECK (VALUE >= 0)",
    "CREATE DOMAIN d_level2 AS d_level",
    "CREATE DOMAIN d_flag AS boolean",
    "CREATE DOMAIN d_amount AS numeric",
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
]


class Case(NamedTuple):
    """A column's type, an update of it, and whether a condition lets it bust."""

    kind: str
    old: str
    new: str
    when: str
    busts: bool


CASES = [
    Case("d_level", "1", "5", "new.c == 5", True),
    Case("d_level", "1", "5", "new.c > 5", False),
    Case("d_level", "1", "5", "new.c in [4, 5]", True),
    Case("d_level2", "1", "5", "new.c == 5", True),
    Case("d_level2", "1", "5", "new.c == 4", False),
    Case("d_flag", "false", "true", "new.c", True),
    Case("d_flag", "true", "false", "new.c == true", False),
    Case("d_amount", "12345678901234567890.1", "12345678901234567890.2", "new.c != old.c", True),
    Case("d_amount", "5", "5.00", "new.c != old.c", False),
    Case("numeric", "0.2", "0.3", "new.c - old.c >= 0.1", True),
    Case("numeric", "0.2", "0.3", "new.c - old.c > 0.1", False),
    Case("numeric", "1", "NaN", "new.c > 100.0", True),
    Case("xid8", "1", "5", "new.c == 5", True),
    Case("xid8", "1", "6", "new.c == 5", False),
    Case("mood", "sad", "happy", "new.c == 'happy'", True),
    Case("mood", "happy", "sad", "new.c == 'happy'", False),
    Case("char(4)", "a", "b", "new.c == 'b'", True),
    Case("money", "1", "5", "new.c != old.c", True),
    Case("interval", "1 day", "2 days", "new.c != old.c", True),
    Case("int[]", "{1}", "{5}", "new.c != old.c", True),
    Case("timestamptz", "2020-01-01", "2030-01-01", "new.c > timestamp('2025-01-01T00:00:00Z')", True),
    Case("timestamptz", "2020-01-01", "2021-01-01", "new.c > timestamp('2025-01-01T00:00:00Z')", False),
    Case('text COLLATE "C"', "a", "B", "new.c > 'a'", False),
]


def rules_for(cases: list[Case]) -> str:
    caches = "".join(f"  c{n}: {{key: 't:{n}:{{id}}', ttl: 1m}}\n" for n in range(len(cases)))
    each = "".join(
        f'  - {{name: r{n}, table: public.t{n}, when: "{case.when}", bust: [c{n}]}}\n' for n, case in enumerate(cases)
    )
    return f"version: 1\ncaches:\n{caches}rules:\n{each}"


def tables(dsn: str, cases: list[Case]) -> None:
    execute(dsn, *KINDS)
    for n, case in enumerate(cases):
        execute(
            dsn, f"CREATE TABLE t{n} (id int PRIMARY KEY, c {case.kind})", f"ALTER TABLE t{n} REPLICA IDENTITY FULL"
        )
        execute(dsn, f"INSERT INTO t{n} VALUES (1, {sql.Literal(case.old).as_string(None)})")


def test_a_condition_compares_what_postgresql_compares(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    tables(database, CASES)
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_for(CASES))
    with Stage.playing(database, redis_url, rules, slot_name, client=redis_client) as stage:
        keys = [f"t:{n}:1" for n in range(len(CASES))]
        stage.cache(*keys)
        stage.run(*(f"UPDATE t{n} SET c = {sql.Literal(case.new).as_string(None)}" for n, case in enumerate(CASES)))
        kept = set(stage.cached(*keys))
    assert [case for n, case in enumerate(CASES) if (f"t:{n}:1" in kept) == case.busts] == []


REFUSED = [
    ("money", "new.c == 5", "column c, of type money, with `==`, but CEL can't compare it with a number"),
    ("int[]", "5 in new.c", "column c, of type integer[], with `in`, but CEL has no list of it"),
    ("d_level", "new.c == '5'", "column c, of type d_level, with `==`, but CEL can't compare it with text"),
    ("interval", "new.c > old.c", "column c, of type interval, with `>`, but CEL does not know its order"),
]


@pytest.mark.parametrize(("kind", "when", "part"), REFUSED)
def test_what_can_t_be_compared_is_refused_where_the_table_is_seen(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, kind: str, when: str, part: str
) -> None:
    tables(database, [Case(kind, "1", "1", when, True)] if kind != "int[]" else [Case(kind, "{1}", "{1}", when, True)])
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_for([Case(kind, "", "", when, True)]))
    servers = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
    told = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
    (found,) = [finding for finding in told["findings"] if finding["code"] == "not_comparable"]
    assert part in found["sentence"]
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        assert daemon.wait() == 2
    assert any(f"{rules}:" in line and part in line for line in daemon.errors)


WHERE = """version: 1
caches:
  own: {{key: "t:own:{{code}}", ttl: 1m}}
  other: {{key: "t:other:{{code}}@{{domain}}", ttl: 1m}}
  live: {{key: "t:live:{{code}}", ttl: 1m}}
  of-team: {{key: "t:team:{{team}}", ttl: 1m}}
rules:
  - name: emoji
    table: public.emojis
    {fields}
    where: "row.kind == 'emoji'"
    bust:
      - own: {{where: row.domain == null}}
      - other: {{where: row.domain != null}}
      - live: {{where: "row.gone_at == null || row.gone_at > timestamp('2020-01-01T00:00:00Z')"}}
      - of-team: {{via: "SELECT team FROM members WHERE member = {{code}}"}}
"""
EMOJIS = (
    "CREATE TYPE sort AS ENUM ('emoji', 'sticker')",
    "CREATE TABLE emojis (id int PRIMARY KEY, code text NOT NULL, domain text, kind sort, gone_at timestamptz)",
    "CREATE TABLE members (team int, member text)",
    "INSERT INTO members VALUES (1, 'a'), (2, 'b'), (3, 'c')",
    "INSERT INTO emojis VALUES (1, 'a', NULL, 'emoji', NULL), (2, 'b', 'x.org', 'emoji', '2019-01-01')",
    "INSERT INTO emojis VALUES (3, 'c', NULL, 'sticker', NULL)",
)
EMOJI_KEYS = [f"t:{key}" for code in "abc" for key in (f"own:{code}", f"other:{code}@x.org", f"live:{code}")]


def test_each_image_of_a_row_busts_only_what_it_counts_for(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *EMOJIS, "ALTER TABLE emojis REPLICA IDENTITY FULL")
    rules = tmp_path / "rules.yaml"
    rules.write_text(WHERE.format(fields=""))
    keys = [*EMOJI_KEYS, *(f"t:team:{team}" for team in (1, 2, 3))]
    with Stage.playing(database, redis_url, rules, slot_name, client=redis_client) as stage:

        def busted(*statements: str) -> set[str]:
            stage.cache(*keys)
            stage.run(*statements)
            return set(keys) - set(stage.cached(*keys))

        assert busted("UPDATE emojis SET code = code") == {
            "t:own:a",
            "t:live:a",
            "t:other:b@x.org",
            "t:team:1",
            "t:team:2",
        }
        assert busted("UPDATE emojis SET domain = 'x.org' WHERE id = 1") == {
            *("t:own:a", "t:other:a@x.org", "t:live:a", "t:team:1")
        }
        assert busted("UPDATE emojis SET kind = 'sticker' WHERE id = 2") == {"t:other:b@x.org", "t:team:2"}
        assert busted("UPDATE emojis SET gone_at = now() WHERE id = 2", "DELETE FROM emojis WHERE id = 2") == set()
        assert busted("UPDATE emojis SET kind = 'emoji' WHERE id = 3") == {"t:own:c", "t:live:c", "t:team:3"}
        assert busted("DELETE FROM emojis WHERE id = 3") == {"t:own:c", "t:live:c", "t:team:3"}


def test_what_the_old_row_does_not_tell_is_noted_and_counts_as_true(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *EMOJIS, "CREATE UNIQUE INDEX by_code ON emojis (id, code)")
    execute(database, "ALTER TABLE emojis REPLICA IDENTITY USING INDEX by_code")
    rules = tmp_path / "rules.yaml"
    rules.write_text(WHERE.format(fields="old_row: ignore"))
    servers = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
    told = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
    (found,) = [finding for finding in told["findings"] if finding["code"] == "old_row_not_asked"]
    assert found["severity"] == "note"
    assert "asks its `where` for domain, gone_at, kind of the old row" in found["sentence"]
    assert "counts at every DELETE and UPDATE" in found["sentence"]
    with Stage.playing(database, redis_url, rules, slot_name, client=redis_client) as stage:
        stage.cache(*EMOJI_KEYS)
        stage.run("UPDATE emojis SET kind = 'sticker' WHERE id = 1", "DELETE FROM emojis WHERE id = 3")
        assert {*EMOJI_KEYS} - {*stage.cached(*EMOJI_KEYS)} == {"t:own:a", "t:live:a", "t:own:c", "t:live:c"}


def test_a_condition_on_rows_that_the_table_can_t_answer_is_refused_at_its_place(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *EMOJIS, "ALTER TABLE emojis REPLICA IDENTITY FULL")
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        WHERE.format(fields="").replace("row.domain == null", "row.domian == null").replace("'emoji'", "5")
    )
    servers = {"postgres_dsn": database, "redis_url": redis_url, "slot": slot_name, "publication": slot_name}
    told = json.loads(command("check", "--format", "json", rules=str(rules), **servers).stdout)
    places = {finding["code"]: (finding["line"], finding["column"]) for finding in told["findings"]}
    assert places["unknown_column"] == (13, 22)
    assert places["not_comparable"] == (11, 12)


def test_a_domain_of_a_table_that_is_created_later_is_known_too(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    cases = [Case("d_level", "1", "5", "new.c == 5", True)]
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_for(cases))
    with Stage.playing(database, redis_url, rules, slot_name, client=redis_client) as stage:
        tables(database, cases)
        eventually(lambda: not stage.daemon.status()["unpublished_tables"], "the table is published")
        stage.run("INSERT INTO t0 VALUES (2, 1)")
        stage.cache("t:0:1", "t:0:2")
        stage.run("UPDATE t0 SET c = 5 WHERE id = 1", "UPDATE t0 SET c = 4 WHERE id = 2")
        assert stage.cached("t:0:1", "t:0:2") == ["t:0:2"]


def test_text_is_ordered_only_where_postgresql_orders_by_code_points(
    database: str, redis_url: str, tmp_path: Path
) -> None:
    try:
        execute(database, "CREATE COLLATION english (locale = 'en_US.utf8')")
    except psycopg.Error:
        pytest.skip("this PostgreSQL knows no collation of a language")
    when = "new.c > 'a'"
    tables(database, [Case("text COLLATE english", "1", "1", when, True), Case("text", "1", "1", when, True)])
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_for([Case("", "", "", when, True)] * 2))
    told = json.loads(
        command("check", "--format", "json", rules=str(rules), postgres_dsn=database, redis_url=redis_url).stdout
    )
    (found,) = [finding for finding in told["findings"] if finding["code"] == "not_comparable"]
    assert "orders by code points, and PostgreSQL by a collation" in found["sentence"]
