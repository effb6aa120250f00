"""The SQL that `check` and `setup` print, run as it is printed, on each PostgreSQL, while the application writes."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
from running import RunningDaemon, command, eventually, execute, settled

from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

_numbers = itertools.count()
ALL = (15, 16, 17, 18)


@dataclass(frozen=True)
class Case:
    """A mistake, the code of its finding, and how many statements the remedy has.

    ``setup``: what makes it, in which SETUP is the command; ``on``: the versions that it is about; ``fields``,
    ``bust``: of the rule; ``harmed``: the application's writes fail until the remedy has run; ``limited``: the daemon's
    role owns nothing, so that an administrator must run what it would run itself; ``other``: what is run is the other
    remedy, by which old rows carry the key's column by an index; where there is one only, that is it.
    """

    code: str
    setup: tuple[str, ...]
    statements: int = 1
    on: tuple[int, ...] = ALL
    fields: str = ""
    harmed: bool = False
    limited: bool = False
    bust: str = "thing"
    other: bool = False


THINGS = "CREATE TABLE things (key int PRIMARY KEY, id int, n int)"
NOT_NULL = "CREATE TABLE things (key int PRIMARY KEY, id int NOT NULL, n int)"
STORED = "CREATE TABLE things (key int PRIMARY KEY, id int, n int, g int GENERATED ALWAYS AS (id * 2) STORED)"
VIRTUAL = "CREATE TABLE things (key int PRIMARY KEY, id int, n int, g int GENERATED ALWAYS AS (id * 2) VIRTUAL)"
KEYLESS = "CREATE TABLE others (key int, id int, n int)"
FULL = "ALTER TABLE things REPLICA IDENTITY FULL"
CHANGES = (
    "UPDATE {} SET n = n + 1",
    "DELETE FROM {} WHERE key = 7",
    "INSERT INTO {} (key, id, n) VALUES (7, 7, 0)",
)
QUERY = "thing: {via: 'SELECT id FROM public.members WHERE thing = {n}'}"
SWEEP = "old_row: sweep, "
CASES = {
    "old row, refused": Case("old_row_unknown", (THINGS,)),
    "old row, refused, by an index": Case("old_row_unknown", (NOT_NULL,), statements=2, other=True),
    "old row, swept, by an index": Case("old_row_sweeps", (NOT_NULL, "SETUP"), statements=2, fields=SWEEP, other=True),
    "old row, compared, by an index": Case(
        "old_row_not_carried",
        (
            NOT_NULL.replace("n int", "n int NOT NULL, s varchar(300) NOT NULL DEFAULT ''"),
            "SETUP",
        ),
        statements=2,
        fields="columns: [n, s], immutable: [id], on: [update], ",
        other=True,
    ),
    "old row, another index already": Case(
        "old_row_unknown",
        (
            "CREATE TABLE things (key int NOT NULL, id int NOT NULL, n int)",
            "CREATE UNIQUE INDEX by_key ON things (key) INCLUDE (id)",
            "ALTER TABLE things REPLICA IDENTITY USING INDEX by_key",
        ),
        statements=2,
        other=True,
    ),
    "old row, a text of any length": Case(
        "old_row_unknown",
        ("CREATE TABLE things (key int PRIMARY KEY, id text NOT NULL, n int)",),
        statements=0,
        other=True,
    ),
    "old row, may be NULL": Case("old_row_unknown", (THINGS,), statements=0, other=True),
    "old row, somebody else's row filter": Case(
        "old_row_unknown",
        (NOT_NULL, "CREATE PUBLICATION {p}_other FOR TABLE things WHERE (key > 0)"),
        statements=2,
        other=True,
    ),
    "old row, a partition": Case(
        "old_row_unknown",
        (
            "CREATE TABLE things (key int PRIMARY KEY, id int NOT NULL, n int) PARTITION BY RANGE (key)",
            "CREATE TABLE things_all PARTITION OF things DEFAULT",
        ),
        statements=2,
        other=True,
    ),
    "virtual column, by an index": Case(
        "old_row_unknown",
        (VIRTUAL.replace("id int", "id int NOT NULL"),),
        statements=2,
        on=(18,),
        other=True,
    ),
    "stored column, by an index": Case(
        "old_row_unknown",
        (STORED.replace("id int", "id int NOT NULL"), "CREATE PUBLICATION {p} FOR TABLE ONLY things"),
        statements=2,
        other=True,
    ),
    "old row, swept": Case("old_row_sweeps", (THINGS, "SETUP"), fields=SWEEP),
    "old row, compared": Case(
        "old_row_not_carried", (THINGS, "SETUP"), fields="columns: [n], immutable: [id], on: [update], "
    ),
    "old row, never told": Case("never_fires", (THINGS, "SETUP"), fields="old_row: ignore, on: [delete], "),
    "stored column, our publication": Case("old_row_sweeps", (STORED, "SETUP"), fields=SWEEP),
    "stored column, no publication": Case("old_row_unknown", (STORED,)),
    "stored column, older publication": Case(
        "old_row_sweeps", (STORED, "CREATE PUBLICATION {p} FOR TABLE ONLY things"), statements=2, on=(18,), fields=SWEEP
    ),
    "stored column, publication before 18": Case(
        "old_row_sweeps", (STORED, "CREATE PUBLICATION {p} FOR TABLE ONLY things"), on=(15, 16, 17), fields=SWEEP
    ),
    "stored column, somebody else's publication": Case(
        "old_row_sweeps",
        (STORED, "CREATE PUBLICATION {p}_other FOR ALL TABLES", "SETUP"),
        statements=0,
        on=(18,),
        fields=SWEEP,
    ),
    "stored column in the identity, not published": Case(
        "generated_columns_not_published", (STORED, FULL, "CREATE PUBLICATION {p}"), on=(18,)
    ),
    "stored column in the identity, published": Case(
        "generated_columns_not_published",
        (STORED, "CREATE PUBLICATION {p} FOR TABLE things", FULL),
        on=(18,),
        harmed=True,
    ),
    "virtual column": Case("old_row_sweeps", (VIRTUAL, "SETUP"), statements=0, on=(18,), fields=SWEEP),
    "virtual column in the identity": Case("no_replica_identity", (VIRTUAL, FULL), on=(18,), fields=SWEEP),
    "somebody else's column list": Case(
        "old_row_sweeps",
        (THINGS, "CREATE PUBLICATION {p}_other FOR TABLE things (key, n)", "SETUP"),
        statements=0,
        fields=SWEEP,
    ),
    "no identity": Case("no_replica_identity", ("CREATE TABLE things (key int, id int, n int)",)),
    "no identity but a key": Case(
        "no_replica_identity", (THINGS, "ALTER TABLE things REPLICA IDENTITY NOTHING"), fields=SWEEP
    ),
    "no publication": Case("no_publication", (THINGS, FULL), limited=True),
    "no table in the publication": Case("table_not_published", (THINGS, FULL, "CREATE PUBLICATION {p}"), limited=True),
    "no update in the publication": Case(
        "operation_not_published",
        (THINGS, FULL, "CREATE PUBLICATION {p} FOR TABLE things WITH (publish = 'insert')"),
        limited=True,
    ),
    "through the root": Case(
        "published_via_root",
        (THINGS, FULL, "CREATE PUBLICATION {p} FOR TABLE things WITH (publish_via_partition_root)"),
        limited=True,
    ),
    "a table of nobody": Case(
        "no_replica_identity",
        (THINGS, FULL, KEYLESS, "CREATE PUBLICATION {p} FOR TABLE things, others"),
        harmed=True,
    ),
    "all tables": Case(
        "no_replica_identity", (THINGS, FULL, KEYLESS, "CREATE PUBLICATION {p} FOR ALL TABLES"), harmed=True
    ),
    "tables in a schema": Case(
        "no_replica_identity",
        (THINGS, FULL, KEYLESS, "CREATE PUBLICATION {p} FOR TABLES IN SCHEMA public"),
        harmed=True,
    ),
    "right to stream": Case("no_replication_right", (THINGS, FULL), limited=True),
    "WAL without bound": Case("wal_unbounded", (THINGS, FULL), statements=2),
    "slot with two_phase": Case(
        "unusable_slot",
        (THINGS, FULL, "SELECT pg_create_logical_replication_slot('{p}', 'pgoutput', false, true)"),
    ),
    "rows hidden from a query": Case(
        "query_hides_rows",
        (
            THINGS,
            FULL,
            "CREATE TABLE members (thing int, id int)",
            "INSERT INTO members SELECT n, n FROM generate_series(0, 5000) n",
            "ALTER TABLE members ENABLE ROW LEVEL SECURITY",
            "GRANT SELECT ON things, members TO {p}_daemon",
            "CREATE PUBLICATION {p} FOR TABLE things",
        ),
        limited=True,
        bust=QUERY,
    ),
    "scan by a query": Case(
        "query_scans_table",
        (
            THINGS,
            FULL,
            "CREATE TABLE members (thing int, id int, filler text)",
            "INSERT INTO members SELECT n, n, repeat('x', 1000) FROM generate_series(1, 2000) n",
        ),
        bust=QUERY,
    ),
}


@pytest.fixture(params=postgres_bin_dirs().items(), ids=lambda found: f"postgresql {found[0]}", scope="module")
def versioned(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    with Postgres(bin_dir=request.param[1]) as server:
        yield server


class Writers:
    """The application: it updates, deletes and inserts rows of these tables, and nothing may fail."""

    def __init__(self, dsn: str, *tables: str) -> None:
        self._dsn, self._tables, self._stop = dsn, tables, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failures: list[str] = []
        self.rounds = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self) -> None:
        """Wait until it has written some more."""
        enough = self.rounds + 3
        eventually(lambda: self.rounds > enough, "the application writes")

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.wait(0.002):
                for table, change in itertools.product(self._tables, CHANGES):
                    try:
                        connection.execute(change.format(table).encode())
                    except psycopg.Error as error:
                        self.failures.append(f"{change}: {error}")
                self.rounds += 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_check_advises_never_makes_a_write_fail_and_is_a_remedy(
    case: Case, versioned: Postgres, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    if versioned.version not in case.on:
        pytest.skip("not of this version")
    name = f"remedy_{next(_numbers)}"
    dsn = versioned.create_database(name)
    role = f"{name}_daemon"
    given: dict[str, Any] = {"postgres_dsn": dsn, "redis_url": redis_url, "slot": name, "publication": name}
    given["rules"] = tmp_path / "rules.yaml"
    given["rules"].write_text(
        f"version: 1\ncaches:\n  thing: {{key: 'a:b:{{id}}', ttl: 1m}}\nrules:\n"
        f"  - {{name: r, table: public.things, {case.fields}bust: [{case.bust}]}}\n"
    )
    execute(dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        for statement in case.setup:
            if statement == "SETUP":
                assert command("setup", **{k: v for k, v in given.items() if k != "redis_url"}).returncode == 0
            else:
                execute(dsn, statement.format(p=name))
        if case.limited:
            given["postgres_dsn"] = versioned.dsn_for(name, user=role, password="pw")
            if case.code != "no_replication_right":
                execute(dsn, f"ALTER ROLE {role} REPLICATION")
        execute(dsn, "INSERT INTO things (key, id, n) VALUES (1, 1, 0)")
        told = found(case.code, given)
        assert told is not None
        statements = told["or_sql"] if case.other and told["or_sql"] else told["sql"]
        if case.other and case.statements == 0:
            assert told["or_sql"] == []
            return
        assert len(statements) == case.statements, told
        # The sentence says the same.
        assert all(statement.removesuffix(";") in told["sentence"] for statement in statements)
        tables = ["things", *(["others"] if KEYLESS in case.setup else [])]
        if case.harmed:
            with Writers(dsn, *tables) as application:
                application.more()
            assert application.failures
            run(dsn, statements)
            statements = []
        with Writers(dsn, *tables) as application:
            application.more()
            for statement in statements:
                run(dsn, [statement])
                application.more()
            if case.statements:
                assert found(case.code, given) is None
            # What the daemon makes of it must not hurt either.
            with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=given["rules"], slot=name) as daemon:
                daemon.ready()
                eventually(lambda: daemon.named("bust", reason="change"), "it busts what the application writes")
                application.more()
                if case.other and case.code != "old_row_not_carried":
                    redis_client.set("a:b:1", "under the former value")
                    execute(dsn, "UPDATE things SET id = 5 WHERE key = 1")
                    settled(dsn, redis_client, name)
                    assert not redis_client.exists("a:b:1")
                    assert not [event for event in daemon.named("sweep") if event["reason"] == "change"]
                # Not killed, so that its last line is whole.
                assert daemon.terminate() == 0
        assert application.failures == []
    finally:
        versioned.drop_database(name)
        with psycopg.connect(versioned.dsn, autocommit=True) as connection:
            connection.execute(f"DROP ROLE {role}".encode())
            connection.execute("ALTER SYSTEM RESET ALL")
            connection.execute("SELECT pg_reload_conf()")


def found(code: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """Run `check`, and return a finding; ``None`` if there is none."""
    done = command("check", "--format", "json", **given)
    assert done.returncode in {0, 1}, done.stderr
    findings: list[dict[str, Any]] = [each for each in json.loads(done.stdout)["findings"] if each["code"] == code]
    assert len(findings) < 2
    return findings[0] if findings else None


def run(dsn: str, statements: list[str]) -> None:
    for statement in statements:
        execute(dsn, statement)
        time.sleep(0.02)


def test_what_setup_prints_for_an_administrator_never_makes_a_write_fail(versioned: Postgres, tmp_path: Path) -> None:
    name = f"remedy_{next(_numbers)}"
    dsn = versioned.create_database(name)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: 1\ncaches:\n  thing: {key: 'a:b:{id}', ttl: 1m}\nrules:\n"
        "  - {name: r, table: public.things, old_row: sweep, bust: [thing]}\n"
    )
    given = {"postgres_dsn": dsn, "rules": rules, "slot": name, "publication": name}
    try:
        execute(dsn, STORED, KEYLESS, "INSERT INTO things (key, id, n) VALUES (1, 1, 0)")
        with Writers(dsn, "things", "others") as application:
            for before in (
                (),
                (f"ALTER PUBLICATION {name} DROP TABLE things",),
                (f"ALTER PUBLICATION {name} SET (publish = 'insert')", f"ALTER PUBLICATION {name} ADD TABLE others"),
                (f"DROP PUBLICATION {name}",),
            ):
                execute(dsn, *before)
                printed = command("setup", "--print", **given).stdout.splitlines()
                assert all(line.endswith(";") for line in printed)
                run(dsn, printed)
                application.more()
                assert application.failures == []
                # A second look may find more: what a first statement was needed for.
                run(dsn, [line for line in command("setup", "--print", **given).stdout.splitlines() if line[0] != "-"])
                assert command("setup", "--print", **given).stdout == "-- nothing is missing\n"
            execute(dsn, FULL)
            application.more()
        assert application.failures == []
    finally:
        versioned.drop_database(name)


def test_what_setup_prints_contains_the_identities_and_ends_with_nothing_missing(
    versioned: Postgres, tmp_path: Path
) -> None:
    name = f"remedy_{next(_numbers)}"
    dsn = versioned.create_database(name)
    rules = tmp_path / "rules.yaml"
    text = (
        "version: 1\ncaches:\n  thing: {key: 'a:b:{id}', ttl: 1m}\nrules:\n"
        "  - {name: r, table: public.things, bust: [thing]}\n"
        "  - {name: s, table: public.things, on: [delete], bust: [thing: {id: n}]}\n"
        "  - {name: o, table: public.others, bust: [thing]}\n"
        # An index can't have this column; it is only compared.
        "  - {name: c, table: public.things, columns: [maybe], immutable: [id], on: [update], bust: [thing]}\n"
    )
    rules.write_text(text)
    given = {"postgres_dsn": dsn, "rules": rules, "slot": name, "publication": name}
    try:
        execute(dsn, NOT_NULL.replace("n int", "n int NOT NULL, maybe text"), KEYLESS)
        execute(dsn, "INSERT INTO things (key, id, n) VALUES (1, 1, 0)", "INSERT INTO others VALUES (1, 1, 0)")
        with Writers(dsn, "things", "others") as application:
            for rounds in range(3):
                done = command("setup", "--print", **given)
                assert done.returncode == 0, done.stderr
                printed = done.stdout.splitlines()
                if rounds == 0:
                    assert printed[0] == 'ALTER TABLE "public"."things" REPLICA IDENTITY FULL;'
                    # The index carries what all rules on the table need.
                    assert "-- or, for an index more" in printed[1]
                    assert '("key", "id", "n")' in printed[1]
                    assert printed[2] == 'ALTER TABLE "public"."others" REPLICA IDENTITY FULL;'
                    assert printed[3].startswith("CREATE PUBLICATION")
                    assert "others" not in printed[3]
                    assert "-- Then run setup again" in printed[-1]
                run(dsn, [line for line in printed if line[0] != "-"])
                application.more()
            assert printed == ["-- nothing is missing"]
        assert application.failures == []
        # What no SQL mends is an error, after what can be run.
        rules.write_text(text.replace("{id: n}", "{id: nn}").replace("public.others", "public.keyless"))
        execute(dsn, "CREATE TABLE keyless (key int, id int, n int)")
        done = command("setup", "--print", **given)
        assert done.returncode == 2
        assert "did you mean n?" in done.stderr
        assert "no usable replica identity" not in done.stderr
        assert 'ALTER TABLE "public"."keyless" REPLICA IDENTITY FULL;' in done.stdout
    finally:
        versioned.drop_database(name)
