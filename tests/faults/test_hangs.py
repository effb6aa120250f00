"""One process hangs, and neither answers nor goes away: the daemon gives up waiting, and says for whom."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
import pytest
import redis
from running import RunningDaemon, eventually, execute, settled
from writing import Writer, assert_all_is_well, create, left, rules_file

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Longer than any deadline of the daemon.
LONG = 100.0


class Impatient(RunningDaemon):
    """The daemon's own deadlines are three to five times as long."""

    deadlines: ClassVar[Mapping[str, float]] = {
        "postgres.connection.ANSWER_SECONDS": 8.0,
        "postgres.snapshot.AT_ONCE_SECONDS": 4.0,
        "postgres.replication.SILENCE_SECONDS": 8.0,
        "watch.HUSH_SECONDS": 4.0,
        "session.OUTLIVE_SECONDS": 4.0,
        "pipeline.ask.QUERY_SECONDS": 3.0,
        "pipeline.derive.PAUSE_SECONDS": 15.0,
    }


QUERY = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  asked: {key: "t:asked:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - name: asks
    table: public.questions
    bust:
      - asked: {via: "%s"}
"""


# It does not care that it is cancelled.
STUBBORN = """
CREATE FUNCTION endless(id int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  LOOP
    BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END;
  END LOOP;
END $$
"""
ENDLESS = "SELECT endless({id}) AS id"


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    """A server whose backends may be frozen; each test thaws what it has frozen."""
    with Postgres() as server:
        yield server


@pytest.fixture
def dsn(own: Postgres, slot_name: str) -> Iterator[str]:
    dsn = own.create_database(slot_name)
    create(dsn)
    execute(dsn, "CREATE TABLE questions (id int PRIMARY KEY)")
    execute(dsn, STUBBORN)
    yield dsn
    own.drop_database(slot_name)


@pytest.fixture
def daemon(
    dsn: str, tmp_path: Path, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> Iterator[RunningDaemon]:
    with Impatient(dsn=dsn, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name) as running:
        running.ready()
        settled(dsn, redis_client, slot_name)
        yield running


def backend(dsn: str, application: str) -> int:
    """The process id of the daemon's session of that name."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
            [application],
        ).fetchall()
    ((pid,),) = found
    return int(pid)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("session", ["snapshots", "catalogs"])
def test_a_session_that_hangs_is_named_and_replaced(
    daemon: RunningDaemon, dsn: str, redis_url: str, redis_client: redis.Redis, session: str
) -> None:
    pid = backend(dsn, f"cdc-invalidator {session}")
    with Writer(dsn, redis_url) as writer:
        writer.goes_on()
        with frozen(pid):
            lost = eventually(lambda: daemon.named("session_lost"), "the session is lost", LONG)[0]
            assert session in lost["error"]
            assert str(pid) in lost["error"]
            eventually(lambda: len(daemon.named("streaming")) >= 2, "it streams again", LONG)
            writer.goes_on()
            writer.stop()
            # While that backend still hangs.
            assert_all_is_well(dsn, redis_client, daemon)
    assert [gap["reason"] for gap in daemon.named("gap")] == ["new_slot"]


@pytest.mark.timeout(240)
def test_a_walsender_that_hangs_is_told_and_the_stream_goes_on_once_it_ends(
    daemon: RunningDaemon, dsn: str, redis_url: str, redis_client: redis.Redis
) -> None:
    execute(dsn, f"ALTER DATABASE {dsn.rpartition('/')[2]} SET wal_sender_timeout = '4s'")
    execute(dsn, f"SELECT pg_terminate_backend({backend(dsn, 'cdc-invalidator')})")
    eventually(lambda: len(daemon.named("streaming")) >= 2, "it streams with that limit")
    pid = backend(dsn, "cdc-invalidator")
    with Writer(dsn, redis_url) as writer:
        writer.goes_on()
        with frozen(pid):
            eventually(lambda: daemon.get("/readyz")[0] == 503, "it is not ready", LONG)
            assert str(pid) in daemon.status()["last_error"]
            eventually(lambda: len(daemon.named("session_lost")) >= 2, "the session is lost", LONG)
            # The process holds the slot until it is gone: nobody can lead, and this daemon does not look ready.
            eventually(lambda: len(daemon.named("session_lost")) >= 3, "that is told again", LONG)
            assert f"pid {pid}" in daemon.named("session_lost")[-1]["error"]
            assert daemon.get("/readyz")[0] == 503
        eventually(lambda: daemon.get("/readyz")[0] == 200, "it leads again", LONG)
        writer.goes_on()
    assert_all_is_well(dsn, redis_client, daemon)
    assert [gap["reason"] for gap in daemon.named("gap")] == ["new_slot"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "query",
    ["SELECT {id} AS id", ENDLESS],
    ids=["hangs", "never ends"],
)
def test_a_query_that_never_ends_sweeps_its_cache_and_holds_up_the_others_only_for_so_long(
    own: Postgres,
    dsn: str,
    tmp_path: Path,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
    query: str,
) -> None:
    (tmp_path / "rules.yaml").write_text(QUERY % query)
    with Impatient(dsn=dsn, redis_url=redis_url, rules=tmp_path, slot=slot_name) as daemon:
        daemon.ready()
        settled(dsn, redis_client, slot_name)
        execute(dsn, "INSERT INTO questions VALUES (1)")
        settled(dsn, redis_client, slot_name)
        stopped: Any = frozen(backend(dsn, "cdc-invalidator queries")) if query != ENDLESS else None
        redis_client.mset({"t:asked:9": "cached", "t:thing:9": "cached"})
        try:
            if stopped:
                stopped.__enter__()
            execute(dsn, "UPDATE questions SET id = id", "INSERT INTO things VALUES (9)")
            failed = eventually(lambda: daemon.named("query_failed"), "the query fails", LONG)[0]
            assert failed["rule"] == "asks"
            eventually(lambda: left(redis_client) == set(), "both caches are busted", LONG)
            settled(dsn, redis_client, slot_name)
        finally:
            if stopped:
                stopped.__exit__(None, None, None)
        eventually(lambda: not sleeping(dsn), "nothing of it runs on the server any more")
        assert not daemon.named("session_lost")
        assert_all_is_well(dsn, redis_client, daemon)


SLOW = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  slow: {key: "t:slow:{id}", ttl: 5m}
  quick: {key: "t:quick:{id}", ttl: 5m}
rules:
  - name: slow
    table: public.questions
    bust: [slow: {via: "SELECT sluggish({id}) AS id"}, quick: {via: "SELECT {id} AS id"}, thing]
  - {name: thing-changed, table: public.things, bust: [thing]}
"""
# As slow as the table says.
SLUGGISH = """
CREATE TABLE pace (seconds float);
INSERT INTO pace VALUES (0);
CREATE FUNCTION sluggish(id int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_sleep((SELECT seconds FROM pace)); RETURN id; END $$
"""


def test_a_slow_query_holds_up_no_other_cache_and_rests_when_it_is_always_slow(
    dsn: str, tmp_path: Path, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    (tmp_path / "rules.yaml").write_text(SLOW)
    execute(dsn, SLUGGISH)
    with Impatient(dsn=dsn, redis_url=redis_url, rules=tmp_path, slot=slot_name) as daemon:
        daemon.ready()
        execute(dsn, "INSERT INTO questions VALUES (1)")
        settled(dsn, redis_client, slot_name)
        # It sleeps for less than its time: what it names goes late, and nothing else does.
        execute(dsn, "UPDATE pace SET seconds = 2.5")
        redis_client.mset({f"t:{cache}:{number}": "old" for cache in ("slow", "quick", "thing") for number in (1, 2)})
        execute(dsn, "UPDATE questions SET id = id", "INSERT INTO questions VALUES (2)")
        eventually(lambda: left(redis_client) <= {"t:slow:1", "t:slow:2"}, "the other caches are busted")
        assert left(redis_client) == {"t:slow:1", "t:slow:2"}
        eventually(lambda: left(redis_client) == set(), "what it names is busted when it answers", LONG)
        settled(dsn, redis_client, slot_name)
        assert not daemon.named("query_failed")
        # It never answers in time: after some times it is not asked any more.
        execute(dsn, "UPDATE pace SET seconds = 600")
        for times in (1, 2, 3):
            redis_client.mset({"t:slow:1": "old", "t:quick:1": "old"})
            execute(dsn, "UPDATE questions SET id = id WHERE id = 1")
            eventually(lambda: left(redis_client) == set(), "both are busted", LONG)
            settled(dsn, redis_client, slot_name)
            assert len(daemon.named("query_failed")) == times
        assert daemon.named("query_rests", rule="slow", cache="slow")
        assert "rule slow for cache slow" in daemon.status()["last_error"]
        before = daemon.metric("cdc_invalidator_rule_errors_total", rule="slow")
        redis_client.set("t:slow:1", "old")
        execute(dsn, "UPDATE questions SET id = id WHERE id = 1", "UPDATE pace SET seconds = 0")
        eventually(lambda: left(redis_client) == set(), "it is busted without the query", LONG)
        assert len(daemon.named("query_failed")) == 3
        assert daemon.metric("cdc_invalidator_rule_errors_total", rule="slow") == before + 1

        def asked_again() -> bool:
            execute(dsn, "UPDATE questions SET id = id WHERE id = 1")
            settled(dsn, redis_client, slot_name)
            return daemon.status()["last_error"] is None

        eventually(asked_again, "it is asked again, and answers", LONG)
        assert_all_is_well(dsn, redis_client, daemon)


def sleeping(dsn: str) -> list[Any]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'").fetchall()


@contextmanager
def deaf() -> Iterator[int]:
    """The port of a server that takes connections, and never says a word."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:

        def accept() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in taken:
        each.close()


@pytest.mark.parametrize("kind", ["redis", "redis+cluster", "redis+sentinel"])
def test_a_redis_that_takes_connections_and_never_answers_is_told(
    dsn: str, tmp_path: Path, slot_name: str, kind: str
) -> None:
    with deaf() as port:
        url = f"{kind}://:secret@127.0.0.1:{port}" + ("/service/0" if kind == "redis+sentinel" else "")
        with RunningDaemon(dsn=dsn, redis_url=url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
            waits = daemon.seen("slot_waits_for_redis")
            assert "TIMEOUT" in waits["error"]
            assert daemon.status()["last_error"]
            assert daemon.get("/readyz")[0] == 503
            assert daemon.terminate() == 0


def test_a_postgres_that_takes_connections_and_never_answers_is_told(
    tmp_path: Path, redis_url: str, slot_name: str
) -> None:
    with deaf() as port:
        dsn = f"postgresql://app:secret@127.0.0.1:{port}/shop"
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
            lost = daemon.seen("session_lost")
            assert "timeout" in lost["error"]
            assert daemon.status()["last_error"]
            assert daemon.get("/readyz")[0] == 503


@pytest.mark.timeout(120)
def test_what_making_the_slot_waits_for_is_told_and_bounded(
    dsn: str, tmp_path: Path, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    execute(dsn, "CREATE TABLE noise (body text)")
    limit = {"max_retained_wal": "16MiB"}
    with (
        psycopg.connect(dsn) as application,
        RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name, **limit) as daemon,
    ):
        row = application.execute("INSERT INTO things VALUES (1) RETURNING pg_current_xact_id()::text").fetchone()
        assert row is not None
        daemon.seen("setting_up")
        waits = daemon.seen("postgres_waits")
        assert f"xid {row[0]} " in waits["error"]
        assert daemon.status()["last_error"]
        execute(dsn, "INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 40000)")
        lost = daemon.seen("session_lost")
        assert "CDC_MAX_RETAINED_WAL" in lost["error"]
        application.commit()
        daemon.ready()
        assert_all_is_well(dsn, redis_client, daemon)
