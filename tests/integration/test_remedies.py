"""The SQL that `check` and `setup` print, run as it is printed, on each PostgreSQL, while the application writes."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
from running import RunningDaemon, command, eventually, execute

from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATEMENT = re.compile(
    r"(?:ALTER (?:TABLE|PUBLICATION|ROLE|SYSTEM)|CREATE (?:PUBLICATION|INDEX)|SELECT pg_\w+).*?"
    r"(?=;|, or |, which |\.$|\. |$)"
)
_numbers = itertools.count()
ALL = (15, 16, 17, 18)


@dataclass(frozen=True)
class Case:
    """A mistake, the code of its finding, and how many statements the remedy has.

    ``setup``: what makes it, in which SETUP is the command; ``on``: the versions that it is about; ``fields``,
    ``bust``: of the rule; ``harmed``: the application's writes fail until the remedy has run; ``limited``: the daemon's
    role owns nothing, so that an administrator must run what it would run itself.
    """

    code: str
    setup: tuple[str, ...]
    statements: int = 1
    on: tuple[int, ...] = ALL
    fields: str = ""
    harmed: bool = False
    limited: bool = False
    bust: str = "thing"


THINGS = "CREATE TABLE things (key int PRIMARY KEY, id int, n int)"
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
    case: Case, versioned: Postgres, redis_url: str, tmp_path: Path
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
        sentence = found(case.code, given)
        statements = STATEMENT.findall(sentence)
        assert len(statements) == case.statements, sentence
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
                assert found(case.code, given) == ""
            # What the daemon makes of it must not hurt either.
            with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=given["rules"], slot=name) as daemon:
                daemon.ready()
                eventually(lambda: daemon.named("bust", reason="change"), "it busts what the application writes")
                application.more()
                # Not killed, so that its last line is whole.
                assert daemon.terminate() == 0
        assert application.failures == []
    finally:
        versioned.drop_database(name)
        with psycopg.connect(versioned.dsn, autocommit=True) as connection:
            connection.execute(f"DROP ROLE {role}".encode())
            connection.execute("ALTER SYSTEM RESET ALL")
            connection.execute("SELECT pg_reload_conf()")


def found(code: str, given: dict[str, Any]) -> str:
    """Run `check`, and return the sentence of a finding; empty if there is none."""
    done = command("check", "--format", "json", **given)
    assert done.returncode in {0, 1}, done.stderr
    sentences = [finding["sentence"] for finding in json.loads(done.stdout)["findings"] if finding["code"] == code]
    assert len(sentences) < 2
    return sentences[0] if sentences else ""


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
