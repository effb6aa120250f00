"""Tables come, go and change while the daemon streams: no key is missed, and no statement of the application fails.

What the stream can't tell (rows that come and go with a table or a partition) is swept as soon as the daemon has looked
at the catalogs, which it does every few seconds; those assertions wait. All others hold once the watermark has passed.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
import redis
from running import RunningDaemon, eventually, execute, settled
from stage import Stage
from writing import assert_nothing_confirmed_too_early

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres

    Start = Callable[..., "TableStage"]

THINGS = "CREATE TABLE things (id int PRIMARY KEY, n int)"
OTHERS = "CREATE TABLE others (id int PRIMARY KEY, n int)"
THING = ("thing", "public.things")
OTHER = ("other", "public.others")
ROWS = "INSERT INTO {} SELECT n, 0 FROM generate_series(1, 99) n"
# Longer than the daemon waits for a lock.
LONG_SECONDS = 5.0


def rule_file(folder: Path, *rules: tuple[str, ...]) -> Path:
    """A rule for each (cache, table), or (cache, table, column that is the key)."""
    caches, lines = "", ""
    for cache, table, *column in rules:
        parameter = json.dumps({"id": column[0] if column else "id"}, ensure_ascii=False)
        caches += f"  {cache}: {{key: 't:{cache}:{{id}}', ttl: 1m}}\n"
        name = json.dumps(table, ensure_ascii=False)
        lines += f"  - {{name: {cache}-changed, table: {name}, bust: [{cache}: {parameter}]}}\n"
    path = folder / "rules.yaml"
    path.write_text(f"version: 1\ncaches:\n{caches}rules:\n{lines}")
    return path


class TableStage(Stage):
    """A database whose tables change, a cache and the daemon between them."""

    def busts(self, keys: list[str], *statements: str) -> None:
        """Cache the keys, run the statements: the keys are gone once the watermark has passed."""
        self.cache(*keys)
        execute(self.dsn, *statements)
        self.settle()
        assert self.cached(*keys) == []

    def sweeps(self, keys: list[str], *statements: str) -> None:
        """Cache the keys, run the statements: the keys go within seconds."""
        self.cache(*keys)
        execute(self.dsn, *statements)
        eventually(lambda: not self.cached(*keys), f"{keys} are swept")

    def published(self) -> list[str]:
        query = "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = %s ORDER BY 1"
        return [row[0] for row in rows(self.dsn, query, self.slot)]

    def publishes(self, *tables: str) -> None:
        """Wait until the publication has these tables and no others."""
        eventually(lambda: self.published() == sorted(tables), f"{tables} are published")

    def calm(self) -> None:
        """Wait until the daemon keeps all tables without sweeping again and again."""

        def quiet() -> bool:
            before = len(self.daemon.named("gap"))
            looks = self.looks()
            eventually(lambda: self.looks() > looks + 1, "the daemon looks at the tables twice")
            self.settle()
            return len(self.daemon.named("gap")) == before

        eventually(quiet, "there are no more sweeps")

    def looks(self) -> float:
        """How often the daemon has looked at the catalogs."""
        return self.daemon.metric("cdc_invalidator_watches_total")

    def gap(self, reason: str) -> None:
        self.daemon.seen("gap", reason=reason)
        assert self.daemon.metric("cdc_invalidator_gaps_total", reason=reason) >= 1

    def assert_well(self) -> None:
        """The stream goes on as it was, in one session, and nothing was confirmed too early."""
        self.settle()
        assert_nothing_confirmed_too_early(self.dsn, self.client, self.slot)
        assert self.daemon.alive()
        assert not self.daemon.named("session_lost")
        assert not self.daemon.errors


def rows(dsn: str, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode(), parameters).fetchall()


class Application:
    """Goes on writing, and never waits long for a lock: no statement of it may fail."""

    def __init__(self, dsn: str, *statements: str) -> None:
        self._dsn = dsn
        self._statements = statements
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failures: list[str] = []
        self.slowest = 0.0
        self.rounds = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '500ms'")
            while not self._stop.wait(0.01):
                for statement in self._statements:
                    began = time.monotonic()
                    try:
                        connection.execute(statement.encode())
                    except psycopg.Error as error:
                        self.failures.append(str(error))
                    self.slowest = max(self.slowest, time.monotonic() - began)
                self.rounds += 1


@pytest.fixture
def start(database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str) -> Iterator[Start]:
    """Run the statements, then start a daemon for the rules and wait until it streams and has swept."""
    daemons: list[RunningDaemon] = []

    def start(*statements: str, rules: tuple[tuple[str, ...], ...] = (THING,), dsn: str = database) -> TableStage:
        execute(dsn, *statements)
        path = rule_file(tmp_path, *rules)
        daemon = RunningDaemon(dsn=dsn, redis_url=redis_url, rules=path, slot=slot_name)
        daemons.append(daemon)
        daemon.start().ready()
        settled(dsn, redis_client, slot_name)
        daemon.events.clear()
        return TableStage(daemon, redis_client)

    yield start
    for daemon in daemons:
        daemon.__exit__()


# The replica identity.


def test_an_identity_made_full_and_back_fails_no_statement_and_loses_no_key(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    with Application(stage.dsn, "UPDATE things SET n = n + 1 WHERE id = 99", "DELETE FROM things WHERE id > 99") as app:
        stage.busts(["t:thing:1"], "ALTER TABLE things REPLICA IDENTITY FULL", "UPDATE things SET n = 1 WHERE id = 1")
        stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")
        stage.busts(["t:thing:3"], "ALTER TABLE things REPLICA IDENTITY DEFAULT", "DELETE FROM things WHERE id = 3")
        stage.busts(["t:thing:4", "t:thing:400"], "UPDATE things SET id = 400 WHERE id = 4")
    assert app.failures == []
    stage.assert_well()


def test_a_table_that_loses_its_identity_is_taken_out_and_swept_until_it_has_one_again(start: Start) -> None:
    stage = start(THINGS, OTHERS, ROWS.format("things"), ROWS.format("others"), rules=(THING, OTHER))
    execute(stage.dsn, "ALTER TABLE things REPLICA IDENTITY NOTHING")

    def writable() -> bool:
        try:
            execute(stage.dsn, "UPDATE things SET n = n + 1", "DELETE FROM things WHERE id = 99")
        except psycopg.errors.ObjectNotInPrerequisiteState:
            return False
        return True

    eventually(writable, "the application may write again", 6)
    stage.gap("table_unpublished")
    stage.daemon.seen("table_taken_out")
    for number in (1, 2):
        stage.sweeps([f"t:thing:{number}"], f"UPDATE things SET n = -1 WHERE id = {number}")
    stage.busts(["t:other:1"], "UPDATE others SET n = 1 WHERE id = 1")
    stage.cache("t:thing:3")
    execute(stage.dsn, "ALTER TABLE things REPLICA IDENTITY DEFAULT", "UPDATE things SET n = 2 WHERE id = 3")
    stage.gap("table_added")
    eventually(lambda: not stage.cached("t:thing:3"), "what happened unseen is swept")
    stage.publishes("public.others", "public.things")
    stage.busts(["t:thing:4"], "UPDATE things SET n = 3 WHERE id = 4")
    stage.assert_well()


def test_an_identity_by_index_that_does_not_carry_the_key_sweeps_and_its_drop_takes_the_table_out(
    start: Start,
) -> None:
    stage = start(
        "CREATE TABLE things (id int PRIMARY KEY, n int NOT NULL)", "CREATE UNIQUE INDEX by_n ON things (n)",
        "INSERT INTO things SELECT n, n FROM generate_series(1, 99) n",
    )  # fmt: skip
    update = "UPDATE things SET id = id + 1000 WHERE id = {}"
    stage.busts(["t:thing:1"], "ALTER TABLE things REPLICA IDENTITY USING INDEX by_n", update.format(1))
    stage.daemon.seen("rule_broken")
    stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")
    execute(stage.dsn, "DROP INDEX by_n")
    stage.publishes()
    execute(stage.dsn, update.format(3))
    stage.sweeps(["t:thing:4"], update.format(4))
    stage.assert_well()


def test_a_table_that_lost_its_identity_while_the_daemon_was_away_is_taken_out_before_the_start_is_refused(
    start: Start,
) -> None:
    stage = start(THINGS, OTHERS, ROWS.format("things"), rules=(THING, OTHER))
    assert stage.daemon.terminate() == 0
    execute(stage.dsn, "ALTER TABLE things REPLICA IDENTITY NOTHING")
    stage.daemon.start()
    assert stage.daemon.wait() == 2
    assert "no usable replica identity" in "\n".join(stage.daemon.errors)
    execute(stage.dsn, "UPDATE things SET n = 1")
    assert stage.published() == ["public.others"]


def test_a_table_renamed_away_that_loses_its_identity_is_taken_out(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    execute(stage.dsn, "ALTER TABLE things RENAME TO former", THINGS)
    stage.publishes("public.former", "public.things")
    execute(stage.dsn, "ALTER TABLE former REPLICA IDENTITY NOTHING")
    stage.publishes("public.things")
    execute(stage.dsn, "UPDATE former SET n = 1")
    stage.assert_well()


# Names.


@pytest.mark.parametrize("in_one_transaction", [False, True], ids=["step by step", "in one transaction"])
def test_a_table_dropped_and_made_anew_is_swept_and_published(start: Start, in_one_transaction: bool) -> None:
    stage = start(THINGS, ROWS.format("things"))
    steps = ["DROP TABLE things", THINGS, "INSERT INTO things VALUES (1, 1)"]
    stage.sweeps(["t:thing:1", "t:thing:2"], *(["; ".join(steps)] if in_one_transaction else steps))
    stage.publishes("public.things")
    stage.calm()
    stage.cache("t:thing:50")
    stage.busts(["t:thing:1"], "UPDATE things SET n = 2")
    assert stage.cached("t:thing:50")
    stage.gap("table_changed")
    stage.assert_well()


def test_a_table_renamed_and_renamed_back_loses_no_key(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    stage.sweeps(["t:thing:1"], "ALTER TABLE things RENAME TO former", "UPDATE former SET n = 1 WHERE id = 1")
    stage.sweeps(["t:thing:2"], "DELETE FROM former WHERE id = 2", "ALTER TABLE former RENAME TO things")
    stage.publishes("public.things")
    stage.busts(["t:thing:3"], "UPDATE things SET n = 3 WHERE id = 3")
    stage.assert_well()


def test_a_table_renamed_and_back_in_one_transaction_loses_no_key(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    stage.busts(
        ["t:thing:1"],
        "ALTER TABLE things RENAME TO briefly; UPDATE briefly SET n = 1 WHERE id = 1;"
        "ALTER TABLE briefly RENAME TO things",
    )
    stage.busts(["t:thing:2"], "UPDATE things SET n = 2 WHERE id = 2")
    stage.assert_well()


def test_tables_that_swap_their_names_in_one_transaction_are_swept_and_the_new_one_is_published(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    execute(stage.dsn, "CREATE TABLE fresh (LIKE things INCLUDING ALL)", "INSERT INTO fresh VALUES (1, 1), (2, 2)")
    stage.sweeps(["t:thing:1", "t:thing:3"], "ALTER TABLE things RENAME TO former; ALTER TABLE fresh RENAME TO things")
    stage.publishes("public.former", "public.things")
    stage.busts(["t:thing:1"], "UPDATE things SET n = 2 WHERE id = 1")
    execute(stage.dsn, "UPDATE former SET n = 3", "DELETE FROM former WHERE id = 3", "DROP TABLE former")
    stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")
    stage.assert_well()


def test_a_table_moved_to_another_schema_and_back_loses_no_key(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"), "CREATE SCHEMA elsewhere")
    stage.sweeps(["t:thing:1"], "ALTER TABLE things SET SCHEMA elsewhere", "UPDATE elsewhere.things SET n = 1")
    stage.sweeps(["t:thing:2"], "UPDATE elsewhere.things SET n = 2", "ALTER TABLE elsewhere.things SET SCHEMA public")
    stage.publishes("public.things")
    stage.busts(["t:thing:3"], "UPDATE things SET n = 3 WHERE id = 3")
    stage.assert_well()


def test_quoted_reserved_and_other_names_are_taken_as_they_are(start: Start) -> None:
    stage = start(
        'CREATE TABLE "order" (id int PRIMARY KEY, "select" text)',
        'CREATE SCHEMA "Größe.x"',
        'CREATE TABLE "Größe.x"."Ta""bel le" ("Schlüssel ""x""" text PRIMARY KEY, n int)',
        'CREATE TABLE "it\'s" (id int PRIMARY KEY, n int)',
        rules=(
            ("order", 'public."order"'),
            ("size", '"Größe.x"."Ta""bel le"', 'Schlüssel "x"'),
            ("its", 'public."it\'s"'),
        ),
    )
    stage.busts(["t:order:1"], 'INSERT INTO "order" VALUES (1)', 'UPDATE "order" SET "select" = 1')
    stage.busts(["t:size:ä b"], """INSERT INTO "Größe.x"."Ta""bel le" VALUES ('ä b', 1)""")
    stage.busts(["t:size:ä b"], """DELETE FROM "Größe.x"."Ta""bel le" """)
    stage.busts(["t:its:1"], 'INSERT INTO "it\'s" VALUES (1, 1)')
    stage.assert_well()


def test_a_latin1_database_gives_the_same_keys(start: Start, postgres: Postgres, slot_name: str) -> None:
    name = f"latin_{slot_name}"
    execute(postgres.dsn, f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        stage = start(
            'CREATE TABLE "Größe" ("Schlüssel" text PRIMARY KEY, n int)',
            dsn=postgres.dsn_for(name),
            rules=(("thing", 'public."Größe"', "Schlüssel"),),
        )
        stage.busts(["t:thing:süß"], """INSERT INTO "Größe" VALUES ('süß', 1)""")
        stage.busts(["t:thing:süß"], """UPDATE "Größe" SET n = 2""")
        stage.assert_well()
    finally:
        postgres.drop_database(name)


# Columns.


ALL_KINDS = (
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
    "CREATE DOMAIN moods AS mood[]",
    "CREATE TYPE pair AS (one int, two int)",
    """CREATE TABLE things (id int PRIMARY KEY, n int, m mood, ms moods, p pair, note text, base int DEFAULT 4,
       double int GENERATED ALWAYS AS (base * 2) STORED)""",
    "INSERT INTO things (id, n, m) SELECT n, 0, 'sad' FROM generate_series(1, 99) n",
)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE things ALTER n TYPE int USING n + 1",
        "ALTER TABLE things ALTER n TYPE bigint",
        "ALTER TABLE things ALTER note TYPE varchar(3) USING upper(note)",
        "ALTER TABLE things ALTER double SET EXPRESSION AS (base * 3)",
        "ALTER TABLE things ADD COLUMN more int NOT NULL DEFAULT 5",
        "ALTER TABLE things ADD COLUMN more float DEFAULT random()",
        "ALTER TABLE things ADD COLUMN more int GENERATED ALWAYS AS (n * 4)",
        "ALTER TABLE things DROP COLUMN note",
        "ALTER TABLE things RENAME COLUMN note TO remark",
        "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
        "ALTER TYPE pair RENAME ATTRIBUTE one TO uno CASCADE",
        "ALTER TYPE pair ADD ATTRIBUTE three int CASCADE",
    ],
)
def test_what_changes_the_values_or_the_shape_of_rows_sweeps_that_tables_caches(start: Start, statement: str) -> None:
    stage = start(*ALL_KINDS, OTHERS, rules=(THING, OTHER))
    stage.cache("t:other:1")
    stage.sweeps(["t:thing:1"], statement)
    stage.gap("table_changed")
    stage.settle()
    assert stage.cached("t:other:1")
    stage.assert_well()


def test_what_keeps_all_values_sweeps_nothing(start: Start) -> None:
    stage = start(*ALL_KINDS)
    stage.cache("t:thing:1")
    for statement in (
        "VACUUM FULL things", "CLUSTER things USING things_pkey", "VACUUM FREEZE things", "ANALYZE things",
        "REINDEX TABLE things", "CREATE INDEX ON things (n)", "GRANT SELECT ON things TO PUBLIC",
        "COMMENT ON TABLE things IS 'things'", "VACUUM FULL pg_attribute", "VACUUM FULL pg_publication",
    ):  # fmt: skip
        execute(stage.dsn, statement)
    looks = stage.looks()
    eventually(lambda: stage.looks() > looks + 1, "the daemon looks at the tables")
    stage.settle()
    assert stage.cached("t:thing:1")
    assert not stage.daemon.named("gap")
    stage.assert_well()


def test_a_table_that_was_altered_is_swept_with_its_next_change_before_the_watermark_passes_that(start: Start) -> None:
    stage = start(THINGS, OTHERS, ROWS.format("things"), rules=(THING, OTHER))
    stage.cache("t:thing:50", "t:other:50")
    with Application(stage.dsn, "UPDATE things SET id = id WHERE id = 99") as app:
        stage.busts(
            ["t:thing:1", "t:thing:50"],
            "ALTER TABLE things ADD COLUMN more int DEFAULT 1",
            "UPDATE things SET more = 2 WHERE id = 1",
        )
        stage.calm()
        sweeps = stage.daemon.named("bust", action="sweep", cache="thing", reason="change")
        # It is known now, and no change of it sweeps.
        stage.cache("t:thing:50")
        stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")
    assert app.failures == []
    assert stage.cached("t:thing:50", "t:other:50") == ["t:thing:50", "t:other:50"]
    # Those that came before the tables were looked at may have asked for a second one.
    assert {event["op"].split(",")[0] for event in sweeps} == {"alter"}
    assert stage.daemon.named("bust", action="sweep", cache="thing", reason="change") == sweeps
    stage.assert_well()


def test_a_keys_column_of_another_type_gives_the_new_text(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    stage.busts(["t:thing:1"], "ALTER TABLE things ALTER id TYPE bigint", "UPDATE things SET n = 1 WHERE id = 1")
    stage.busts(["t:thing:2.00"], "ALTER TABLE things ALTER id TYPE numeric(9, 2)", "DELETE FROM things WHERE id = 2")
    stage.assert_well()


def test_a_keys_column_that_is_renamed_or_dropped_sweeps_at_each_change_until_it_is_back(start: Start) -> None:
    stage = start(
        "CREATE TABLE things (nr int PRIMARY KEY, id int, n int)", "ALTER TABLE things REPLICA IDENTITY FULL",
        "INSERT INTO things SELECT n, n, 0 FROM generate_series(1, 99) n",
    )  # fmt: skip
    update = "UPDATE things SET n = n + 1 WHERE nr = {}"
    stage.busts(["t:thing:1"], "ALTER TABLE things RENAME id TO number", update.format(1))
    stage.daemon.seen("rule_broken", rule="thing-changed")
    stage.busts(["t:thing:2"], update.format(2))
    stage.busts(["t:thing:3"], "ALTER TABLE things RENAME number TO id", update.format(3))
    stage.cache("t:thing:50")
    stage.busts(["t:thing:4"], update.format(4))
    assert stage.cached("t:thing:50")
    stage.busts(["t:thing:5"], "ALTER TABLE things DROP COLUMN id", update.format(5))
    stage.busts(["t:thing:6"], "INSERT INTO things VALUES (1000, 1)")
    stage.assert_well()


# Partitions.

EVENTS = (
    "CREATE TABLE events (id int, day int, n int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)",
    "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (100)",
    "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (100) TO (200) PARTITION BY RANGE (id)",
    "CREATE TABLE events_2a PARTITION OF events_2 FOR VALUES FROM (0) TO (100)",
    "INSERT INTO events SELECT n, 50, 0 FROM generate_series(1, 20) n",
    "INSERT INTO events SELECT n, 150, 0 FROM generate_series(21, 40) n",
)
EVENT = ("event", "public.events")


def test_changes_and_truncates_of_partitions_at_every_level_bust_by_the_roots_rule(start: Start) -> None:
    stage = start(*EVENTS, rules=(EVENT,))
    stage.cache("t:event:50")
    stage.busts(["t:event:1", "t:event:21"], "UPDATE events SET n = 1 WHERE id IN (1, 21)")
    stage.busts(["t:event:2"], "UPDATE events SET day = 150 WHERE id = 2")
    stage.busts(["t:event:22"], "DELETE FROM events_2a WHERE id = 22")
    assert stage.cached("t:event:50")
    stage.busts(["t:event:23"], "TRUNCATE events_2a")
    stage.busts(["t:event:3"], "TRUNCATE events_1")
    execute(stage.dsn, *EVENTS[-2:])
    stage.busts(["t:event:21"], "TRUNCATE events_2")
    stage.busts(["t:event:1"], "TRUNCATE events")
    stage.assert_well()


def test_partitions_that_come_empty_carry_on_and_those_that_bring_or_take_rows_sweep(start: Start) -> None:
    stage = start(*EVENTS, rules=(EVENT,))
    with Application(stage.dsn, "UPDATE events SET n = n + 1 WHERE id = 20", "DELETE FROM events WHERE id = -1") as app:
        stage.cache("t:event:60")
        stage.busts(
            ["t:event:50"],
            "CREATE TABLE events_3 PARTITION OF events FOR VALUES FROM (200) TO (300)",
            "INSERT INTO events VALUES (50, 250, 1)",
        )
        like = "CREATE TABLE {} (LIKE events_1 INCLUDING ALL)"
        attach = "ALTER TABLE events ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})"
        execute(stage.dsn, like.format("empty"), attach.format("empty", 300, 400))
        stage.busts(["t:event:51"], "INSERT INTO events VALUES (51, 350, 1)", "UPDATE empty SET n = 2")
        looks = stage.looks()
        eventually(lambda: stage.looks() > looks + 1, "the daemon looks at the tables")
        execute(stage.dsn, like.format("filled"), "INSERT INTO filled VALUES (52, 450, 1)")
        stage.sweeps(["t:event:52"], attach.format("filled", 400, 500))
        stage.busts(["t:event:52"], "UPDATE events SET n = 2 WHERE id = 52")
        stage.sweeps(["t:event:52"], "ALTER TABLE events DETACH PARTITION filled")
        execute(stage.dsn, "UPDATE filled SET n = 3", "DELETE FROM filled")
        stage.sweeps(["t:event:50"], "DROP TABLE events_3")
        stage.busts(["t:event:51"], "DELETE FROM events WHERE id = 51")
    assert app.failures == []
    stage.gap("table_changed")
    stage.assert_well()


def test_a_partition_attached_or_detached_while_the_daemon_was_away_sweeps(start: Start) -> None:
    stage = start(*EVENTS, OTHERS, rules=(EVENT, OTHER))
    assert stage.daemon.terminate() == 0
    stage.cache("t:event:1", "t:other:1")
    execute(stage.dsn, "ALTER TABLE events DETACH PARTITION events_1")
    stage.daemon.start().ready()
    stage.gap("rules_changed")
    stage.settle()
    assert stage.cached("t:event:1", "t:other:1") == ["t:other:1"]
    stage.busts(["t:event:21"], "UPDATE events SET n = 1 WHERE id = 21")
    stage.assert_well()


DETACH = "ALTER TABLE events DETACH PARTITION events_1"
ATTACH = "ALTER TABLE events ATTACH PARTITION events_1 FOR VALUES FROM (0) TO (100)"
CHANGE = "UPDATE events_1 SET n = 5 WHERE id = 1"


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
@pytest.mark.parametrize(
    "statements",
    [
        (f"{DETACH}; {CHANGE}; {ATTACH}",),
        (DETACH, CHANGE, ATTACH),
        (
            "ALTER TABLE events DETACH PARTITION events_2",
            "UPDATE events_2 SET n = 5 WHERE id = 21",
            "ALTER TABLE events ATTACH PARTITION events_2 FOR VALUES FROM (100) TO (200)",
        ),
        ("ALTER TABLE events_1 SET UNLOGGED", CHANGE, "ALTER TABLE events_1 SET LOGGED"),
    ],
    ids=["in one transaction", "step by step", "with partitions of its own", "unlogged"],
)
def test_a_partition_that_was_not_published_between_two_looks_is_swept_for(
    start: Start, statements: tuple[str, ...], away: bool
) -> None:
    stage = start(*EVENTS, OTHERS, rules=(EVENT, OTHER))
    stage.cache("t:event:1", "t:event:21", "t:other:1")
    if away:
        assert stage.daemon.terminate() == 0
    execute(stage.dsn, *statements)
    if away:
        stage.daemon.start().ready()
    eventually(lambda: not stage.cached("t:event:1", "t:event:21"), "they are swept")
    stage.settle()
    assert stage.cached("t:other:1")
    stage.assert_well()


@pytest.mark.parametrize("end", ["DROP TABLE events_9", "ALTER TABLE events DETACH PARTITION events_9"])
def test_a_partition_that_is_gone_before_its_changes_are_read_is_swept_for_in_their_order(
    start: Start, end: str
) -> None:
    stage = start(*EVENTS, OTHERS, rules=(EVENT, OTHER))
    stage.cache("t:other:1")
    assert stage.daemon.terminate() == 0
    execute(
        stage.dsn,
        "CREATE TABLE events_9 PARTITION OF events FOR VALUES FROM (900) TO (1000)",
        "INSERT INTO events VALUES (9, 950, 1)",
        end,
    )
    # A reader had it before.
    stage.cache("t:event:9")
    stage.daemon.start().ready()
    stage.settle()
    assert stage.cached("t:event:9", "t:other:1") == ["t:other:1"]
    stage.daemon.seen("unknown_table")
    stage.daemon.errors.clear()
    stage.assert_well()


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
@pytest.mark.parametrize(
    "end", ["DROP TABLE events_9", "ALTER TABLE events DETACH PARTITION events_9"], ids=["dropped", "detached"]
)
def test_a_partition_that_is_made_written_and_gone_between_two_looks_is_swept_for(
    start: Start, end: str, away: bool
) -> None:
    stage = start(*EVENTS, OTHERS, rules=(EVENT, OTHER))
    stage.cache("t:other:1")
    looks = stage.looks()
    eventually(lambda: stage.looks() > looks, "the daemon looks at the tables")
    stage.busts(
        ["t:event:9"],
        "CREATE TABLE events_9 PARTITION OF events FOR VALUES FROM (900) TO (1000)",
        "INSERT INTO events VALUES (9, 950, 1)",
    )
    # A reader has it now.
    stage.cache("t:event:9")
    if away:
        assert stage.daemon.terminate() == 0
    execute(stage.dsn, end)
    if away:
        stage.daemon.start().ready()
    eventually(lambda: not stage.cached("t:event:9"), "it is swept")
    stage.settle()
    assert stage.cached("t:other:1")
    assert_nothing_confirmed_too_early(stage.dsn, stage.client, stage.slot)


# The publication.

PUBLISH = "ALTER PUBLICATION {slot} SET (publish = '%s')"


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PUBLISH % "insert, update", ""),
        (PUBLISH % "insert, update", PUBLISH % "insert, update, delete, truncate"),
        ("ALTER PUBLICATION {slot} RENAME TO {slot}_2", "ALTER PUBLICATION {slot}_2 RENAME TO {slot}"),
        ("ALTER PUBLICATION {slot} DROP TABLE things", "ALTER PUBLICATION {slot} ADD TABLE things"),
        ("ALTER PUBLICATION {slot} SET TABLE things WHERE (id > 5)", "ALTER PUBLICATION {slot} SET TABLE things"),
    ],
    ids=["narrowed", "narrowed and widened", "renamed and back", "taken out and put back", "filtered and not"],
)
def test_a_publication_that_hid_changes_between_two_looks_is_swept_for(
    start: Start, before: str, after: str, away: bool
) -> None:
    stage = start(THINGS, ROWS.format("things"))
    stage.cache("t:thing:1")
    if away:
        assert stage.daemon.terminate() == 0
    statements = [each.format(slot=stage.slot) for each in (before, "DELETE FROM things WHERE id = 1", after) if each]
    execute(stage.dsn, *statements)
    if away:
        stage.daemon.start().ready()
    eventually(lambda: not stage.cached("t:thing:1"), "it is swept")
    stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")


@pytest.mark.parametrize(
    ("carried", "statements"),
    [
        ("ALL TABLES", "ALTER TABLE things SET UNLOGGED; UPDATE things SET n = 1; ALTER TABLE things SET LOGGED"),
        (
            "TABLES IN SCHEMA public",
            "ALTER TABLE things SET UNLOGGED; UPDATE things SET n = 1; ALTER TABLE things SET LOGGED",
        ),
        (
            "TABLES IN SCHEMA public",
            """ALTER TABLE things SET SCHEMA elsewhere; UPDATE elsewhere.things SET n = 1;
               ALTER TABLE elsewhere.things SET SCHEMA public""",
        ),
    ],
    ids=["unlogged of all", "unlogged in a schema", "moved out of a schema"],
)
def test_a_table_that_the_publication_does_not_list_and_that_it_did_not_carry_for_a_while_is_swept_for(
    start: Start, slot_name: str, carried: str, statements: str
) -> None:
    stage = start(
        THINGS, "CREATE SCHEMA elsewhere", ROWS.format("things"), f"CREATE PUBLICATION {slot_name} FOR {carried}"
    )
    stage.sweeps(["t:thing:1"], *statements.split(";"))
    stage.busts(["t:thing:2"], "DELETE FROM things WHERE id = 2")
    stage.assert_well()


def test_a_partition_without_identity_takes_the_whole_table_out_until_it_has_one(start: Start) -> None:
    stage = start(*EVENTS, rules=(EVENT,))
    execute(stage.dsn, "ALTER TABLE events_2a REPLICA IDENTITY NOTHING")
    stage.publishes()
    execute(stage.dsn, "UPDATE events SET n = 2")
    stage.sweeps(["t:event:1"], "UPDATE events SET n = 3 WHERE id = 1")
    execute(stage.dsn, "ALTER TABLE events_2a REPLICA IDENTITY FULL")
    stage.publishes("public.events_1", "public.events_2a")
    stage.busts(["t:event:1", "t:event:21"], "UPDATE events SET n = 4 WHERE id IN (1, 21)")
    stage.assert_well()


def test_rules_on_a_root_and_on_its_partition_both_bust(start: Start) -> None:
    stage = start(*EVENTS, rules=(EVENT, ("leaf", "public.events_1"), ("middle", "public.events_2")))
    stage.cache("t:leaf:21", "t:middle:1")
    stage.busts(["t:event:1", "t:leaf:1"], "UPDATE events SET n = 1 WHERE id = 1")
    stage.busts(["t:event:21", "t:middle:21"], "UPDATE events SET n = 1 WHERE id = 21")
    assert stage.cached("t:leaf:21", "t:middle:1") == ["t:leaf:21", "t:middle:1"]
    stage.busts(["t:event:2", "t:leaf:2"], "TRUNCATE events_1")
    stage.assert_well()


# What must not be published.


@pytest.mark.parametrize(
    ("statements", "sentence"),
    [
        (("CREATE TABLE things (id int PRIMARY KEY)", "CREATE TABLE children () INHERITS (things)"), "inherit from it"),
        (("CREATE TABLE things (id int) PARTITION BY RANGE (id)",), "partitioned without a primary key"),
        ((THINGS, "CREATE PUBLICATION {} FOR TABLE things WHERE (id > 10)"), "row filter or a column list"),
        ((THINGS, "CREATE PUBLICATION {} FOR TABLE things (id)"), "row filter or a column list"),
        (
            (
                "CREATE TABLE things (id int PRIMARY KEY, double int GENERATED ALWAYS AS (id * 2) VIRTUAL)",
                "ALTER TABLE things REPLICA IDENTITY FULL",
            ),
            "virtual generated column",
        ),
        (
            (THINGS, "CREATE TABLE bare (id int)", "CREATE PUBLICATION {} FOR ALL TABLES WITH (publish = 'insert')"),
            "tables without replica identity (public.bare)",
        ),
        (
            (
                THINGS,
                "CREATE TABLE bare (id int)",
                "CREATE PUBLICATION {} FOR TABLES IN SCHEMA public WITH (publish = 'insert')",
            ),
            "tables without replica identity (public.bare)",
        ),
    ],
    ids=[
        "inheritance",
        "partitioned without a primary key",
        "row filter",
        "column list",
        "virtual column",
        "all tables",
        "tables in a schema",
    ],
)
def test_a_table_that_would_hurt_or_hide_is_refused_at_the_start(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, statements: tuple[str, ...], sentence: str
) -> None:
    execute(database, *(statement.format(slot_name) for statement in statements))
    rules = rule_file(tmp_path, THING)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        assert daemon.wait() == 2
    assert sentence in "\n".join(daemon.errors)
    execute(database, "UPDATE things SET id = id", "DELETE FROM things")
    if "bare" in str(statements):
        execute(database, "UPDATE bare SET id = id", "DELETE FROM bare")


def test_a_table_without_identity_is_taken_out_before_updates_are_published(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(
        database,
        THINGS,
        "CREATE TABLE bare (id int)",
        f"CREATE PUBLICATION {slot_name} FOR TABLE things, bare WITH (publish = 'insert')",
    )
    rules = rule_file(tmp_path, THING)
    daemon = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name)
    with Application(database, "UPDATE bare SET id = id", "DELETE FROM bare") as app, daemon:
        daemon.ready()
        execute(database, "INSERT INTO things VALUES (1)", "UPDATE things SET id = 2")
        daemon.seen("bust", op="update")
    assert app.failures == []


def test_an_identity_that_comes_to_contain_a_stored_column_never_makes_a_write_fail(start: Start) -> None:
    stage = start(
        "CREATE TABLE things (id int PRIMARY KEY, n int, double int GENERATED ALWAYS AS (n * 2) STORED)",
        ROWS.format("things"),
    )
    with Application(stage.dsn, "UPDATE things SET n = n + 1 WHERE id = 99", "DELETE FROM things WHERE id = 98") as app:
        execute(stage.dsn, "ALTER TABLE things REPLICA IDENTITY FULL")
        stage.busts(["t:thing:1"], "UPDATE things SET n = 3 WHERE id = 1")
    assert app.failures == []
    stage.assert_well()


def test_a_publication_of_an_older_release_comes_to_carry_stored_columns(start: Start) -> None:
    stage = start(
        "CREATE TABLE things (id int PRIMARY KEY, n int, double int GENERATED ALWAYS AS (n * 2) STORED)",
        ROWS.format("things"),
    )
    execute(
        stage.dsn,
        f"ALTER PUBLICATION {stage.slot} SET (publish_generated_columns = none)",
        "ALTER TABLE things REPLICA IDENTITY FULL",
    )
    eventually(lambda: _takes(stage.dsn, "UPDATE things SET n = 2 WHERE id = 1"), "the application can write again")
    stage.publishes("public.things")
    stage.busts(["t:thing:2"], "UPDATE things SET n = 3 WHERE id = 2")
    stage.assert_well()


def _takes(dsn: str, statement: str) -> bool:
    try:
        execute(dsn, statement)
    except psycopg.Error:
        return False
    return True


def test_a_table_that_others_come_to_inherit_from_is_taken_out_and_kept_swept(start: Start) -> None:
    stage = start(THINGS, ROWS.format("things"))
    execute(stage.dsn, "CREATE TABLE children () INHERITS (things)", "INSERT INTO children VALUES (1000, 1)")
    with Application(stage.dsn, "UPDATE things SET n = 1 WHERE id >= 99", "UPDATE children SET n = 2") as app:
        stage.gap("table_unpublished")
        stage.sweeps(["t:thing:1000"], "UPDATE children SET n = 3", "DELETE FROM children")
        stage.sweeps(["t:thing:1"], "UPDATE things SET n = 3")
    assert app.failures == []
    execute(stage.dsn, "DROP TABLE children")
    stage.publishes("public.things")
    stage.busts(["t:thing:2"], "UPDATE things SET n = 4 WHERE id = 2")
    stage.assert_well()


@pytest.mark.parametrize("limit", ["WHERE (id > 10)", "(id)"], ids=["row filter", "column list"])
def test_a_table_whose_changes_somebody_comes_to_filter_is_kept_swept(start: Start, limit: str) -> None:
    stage = start(THINGS, OTHERS, ROWS.format("things"), ROWS.format("others"), rules=(THING, OTHER))
    execute(stage.dsn, f"ALTER PUBLICATION {stage.slot} SET TABLE others, things {limit}")
    stage.sweeps(["t:thing:1"], "UPDATE things SET n = 1 WHERE id = 1")
    stage.gap("table_unpublished")
    stage.busts(["t:other:1"], "UPDATE others SET n = 1 WHERE id = 1")
    stage.cache("t:thing:2")
    execute(
        stage.dsn,
        "UPDATE things SET n = 2 WHERE id = 2",
        f"ALTER PUBLICATION {stage.slot} SET TABLE others, things",
    )
    eventually(lambda: not stage.cached("t:thing:2"), "what was filtered is swept")
    stage.busts(["t:thing:3"], "UPDATE things SET n = 3 WHERE id = 3")
    stage.assert_well()


# New tables.


def swept_once_more_after(stage: TableStage, older: psycopg.Connection[Any]) -> None:
    """See the gap of `thing` swept, and once more when an older transaction commits; only then it is claimed."""
    stage.daemon.seen("bust", reason="gap", cache="thing")
    stage.passed()
    # What a reader loads now is what was committed before.
    stage.cache("t:thing:1", "t:other:1")
    assert stage.named() == {"other"}
    older.commit()
    eventually(lambda: not stage.cached("t:thing:1"), "it is swept once more")
    eventually(lambda: stage.named() == {"thing", "other"}, "the watermark names both caches")
    assert stage.cached("t:other:1")
    stage.assert_well()


def test_a_transaction_older_than_the_publishing_of_its_table_is_swept_for_when_it_commits(start: Start) -> None:
    stage = start(OTHERS, rules=(THING, OTHER))
    with psycopg.connect(stage.dsn) as older:
        execute(stage.dsn, THINGS, ROWS.format("things"))
        older.execute("UPDATE things SET n = 1 WHERE id = 1")
        stage.gap("table_added")
        swept_once_more_after(stage, older)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            (
                "CREATE TABLE fresh (LIKE things INCLUDING ALL); INSERT INTO fresh SELECT * FROM things;"
                "ALTER TABLE things RENAME TO former; ALTER TABLE fresh RENAME TO things"
            ),
            "SELECT 1",
        ),
        (f"DROP TABLE things; {THINGS}; {ROWS.format('things')}", "SELECT 1"),
        ("ALTER PUBLICATION {slot} DROP TABLE things", "ALTER PUBLICATION {slot} ADD TABLE things"),
    ],
    ids=["swapped", "made anew", "published anew"],
)
def test_a_transaction_that_wrote_to_a_table_before_it_was_published_anew_is_swept_for_when_it_commits(
    start: Start, before: str, after: str
) -> None:
    stage = start(THINGS, OTHERS, ROWS.format("things"), rules=(THING, OTHER))
    with psycopg.connect(stage.dsn) as older:
        execute(stage.dsn, before.format(slot=stage.slot))
        older.execute("UPDATE things SET n = 1 WHERE id = 1")
        execute(stage.dsn, after.format(slot=stage.slot))
        stage.daemon.seen("gap", caches=["thing"])
        swept_once_more_after(stage, older)


def test_a_table_that_somebody_else_publishes_first_is_swept_all_the_same(start: Start) -> None:
    stage = start(OTHERS, rules=(THING, OTHER))
    stage.sweeps(
        ["t:thing:1"],
        f"{THINGS}; INSERT INTO things VALUES (1, 1)",
        f"UPDATE things SET n = 2; ALTER PUBLICATION {stage.slot} ADD TABLE things",
    )
    stage.gap("table_added")
    stage.publishes("public.others", "public.things")
    stage.busts(["t:thing:1"], "UPDATE things SET n = 3")
    stage.assert_well()


def test_a_table_of_somebody_else_does_not_end_the_daemon_and_keeps_no_other_out(
    start: Start, database: str, postgres: Postgres, slot_name: str
) -> None:
    name = database.rpartition("/")[2]
    execute(
        database,
        f"CREATE ROLE {slot_name} LOGIN REPLICATION PASSWORD 'pw'",
        f"ALTER DATABASE {name} OWNER TO {slot_name}",
        OTHERS,
        ROWS.format("others"),
        f"ALTER TABLE others OWNER TO {slot_name}",
    )
    try:
        dsn = postgres.dsn_for(name, user=slot_name, password="pw")
        stage = start(rules=(THING, OTHER, ("mine", "public.zz_mine")), dsn=dsn)
        execute(
            database, "CREATE TABLE zz_mine (id int PRIMARY KEY)", f"ALTER TABLE zz_mine OWNER TO {slot_name}", THINGS
        )
        told = stage.daemon.seen("not_set_up", level="error")["error"]
        status = stage.daemon.status()
        assert status["last_error"] == told
        stage.busts(["t:other:1"], "UPDATE others SET n = 1 WHERE id = 1")
        eventually(
            lambda: stage.published() == ["public.others", "public.zz_mine"], "the table that may be is published"
        )
        stage.cache("t:thing:1")
        execute(database, "INSERT INTO things VALUES (1, 1)")
        eventually(lambda: not stage.cached("t:thing:1"), "it is kept swept")
        stage.gap("table_unpublished")
        # It has been tried again, and is told once.
        looks = stage.daemon.metric("cdc_invalidator_watches_total")
        eventually(lambda: stage.daemon.metric("cdc_invalidator_watches_total") > looks, "another look")
        assert len(stage.daemon.named("not_set_up")) == 1
        assert stage.daemon.status()["last_error_since"] == status["last_error_since"]
        execute(database, f"ALTER TABLE things OWNER TO {slot_name}")
        stage.publishes("public.others", "public.things", "public.zz_mine")
        eventually(lambda: stage.daemon.status()["last_error"] is None, "that is over")
        stage.busts(["t:thing:1"], "UPDATE things SET n = 2")
        stage.assert_well()
        stage.daemon.kill()
    finally:
        execute(database, f"REASSIGN OWNED BY {slot_name} TO postgres", f"DROP OWNED BY {slot_name}")
        eventually(lambda: _dropped(database, slot_name), "the role is dropped")


def _dropped(dsn: str, role: str) -> bool:
    try:
        execute(dsn, f"DROP ROLE {role}")
    except psycopg.errors.DependentObjectsStillExist:
        return False
    return True


# Locks: ours never wait long, hold up nobody, and others' hold up only their own table.


def test_a_lock_on_a_new_table_holds_up_no_other_table(start: Start) -> None:
    stage = start(OTHERS, ROWS.format("others"), rules=(THING, OTHER, ("last", "public.zz_last")))
    with psycopg.connect(stage.dsn) as locker, Application(stage.dsn, "UPDATE others SET n = 1 WHERE id = 99") as app:
        locker.execute(f"{THINGS}; CREATE TABLE zz_last (id int PRIMARY KEY)")
        locker.commit()
        locker.execute("LOCK TABLE things IN SHARE UPDATE EXCLUSIVE MODE")
        stage.daemon.seen("not_set_up", level="warning")
        eventually(lambda: "public.zz_last" in stage.published(), "the next new table is published")
        stage.busts(["t:other:1"], "UPDATE others SET n = 1 WHERE id = 1")
        # What it holds up is swept.
        stage.sweeps(["t:thing:1"], "INSERT INTO things VALUES (1, 1)")
        locker.rollback()
    assert app.failures == []
    stage.publishes("public.others", "public.things", "public.zz_last")
    stage.busts(["t:thing:1"], "UPDATE things SET n = 1")
    stage.assert_well()


@pytest.mark.parametrize("running", [True, False], ids=["running", "at the start"])
def test_an_exclusive_lock_on_a_table_holds_up_no_other_table(start: Start, running: bool) -> None:
    tables = (THINGS, OTHERS, ROWS.format("things"), ROWS.format("others"), *EVENTS)
    stage = start(*tables, rules=(THING, OTHER, EVENT))
    if not running:
        assert stage.daemon.terminate() == 0
    with psycopg.connect(stage.dsn) as locker:
        locker.execute("LOCK TABLE things, events IN ACCESS EXCLUSIVE MODE")
        until = time.monotonic() + LONG_SECONDS
        if not running:
            stage.daemon.start().ready()
            stage.settle()
        eventually(lambda: time.monotonic() > until or _busted(stage), "others are busted all the while", 60)
        stage.settle()
        assert not stage.daemon.named("session_lost")
    stage.busts(["t:thing:1", "t:event:1"], "UPDATE things SET n = 1", "UPDATE events SET n = 1")
    stage.assert_well()


def _busted(stage: TableStage) -> bool:
    stage.cache("t:other:1")
    execute(stage.dsn, "UPDATE others SET n = n + 1 WHERE id = 1")
    eventually(lambda: not stage.cached("t:other:1"), "the bust", 1.5)
    return False


def test_a_start_beside_a_long_transaction_waits_for_it_and_blocks_no_writer(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    execute(database, THINGS, OTHERS, ROWS.format("things"), ROWS.format("others"))
    rules = rule_file(tmp_path, THING, OTHER)
    daemon = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name)
    with (
        psycopg.connect(database) as older,
        older.cursor().execute("UPDATE things SET n = 1 WHERE id = 1"),
        daemon,
        Application(database, "UPDATE things SET n = n + 1 WHERE id = 99", "INSERT INTO others VALUES (500, 1)",
                    "DELETE FROM others WHERE id = 500", "DELETE FROM things WHERE id = -1") as app,
    ):  # fmt: skip
        daemon.seen("setting_up")
        until = time.monotonic() + LONG_SECONDS
        eventually(
            lambda: daemon.alive() and time.monotonic() > until, "time passes, longer than any lock is waited for"
        )
        assert not daemon.named("session_lost")
        assert not daemon.named("streaming")
        redis_client.set("t:thing:1", "cached before the commit")
        older.commit()
        daemon.ready()
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("t:thing:1")
        rounds = app.rounds
        eventually(lambda: app.rounds > rounds, "the application goes on")
        older.execute("UPDATE things SET n = 2 WHERE id = 2")
    assert app.failures == []
    assert app.slowest < 0.5


def test_a_start_that_waits_for_a_long_transaction_can_be_stopped(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, THINGS)
    rules = rule_file(tmp_path, THING)
    with (
        psycopg.connect(database) as older,
        older.cursor().execute("INSERT INTO things VALUES (1, 1)"),
        RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon,
    ):
        eventually(lambda: len(daemon.named("setting_up")) == 2, "the slot is being made")
        daemon.send(signal.SIGTERM)
        assert daemon.wait(5) == 0
    eventually(
        lambda: not rows(database, "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", slot_name),
        "nobody holds the slot",
    )
