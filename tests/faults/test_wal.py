"""The WAL that our slot holds: bounded while Redis is away, and moving on when there is nothing for us in it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Self

import psycopg
import pytest
import redis
from proxy import Proxy
from psycopg.conninfo import make_conninfo
from running import RunningDaemon, confirmed, eventually, execute, settled, wal_position, watermark
from writing import Writer, assert_all_is_well, create, left, rules_file

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Valkey

MB = 1 << 20
LIMIT = 32 * MB


@pytest.fixture
def rules(database: str, tmp_path: Path) -> Path:
    create(database)
    execute(database, "CREATE TABLE noise (n int, body text)")
    return rules_file(tmp_path)


@pytest.fixture
def proxy(valkey: Valkey) -> Iterator[Proxy]:
    """Before Valkey."""
    with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def daemon(
    rules: Path, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, proxy: Proxy
) -> Iterator[RunningDaemon]:
    """A daemon that reaches Valkey through the proxy, and holds at most 32 MiB of WAL for it."""
    number = redis_url.rpartition("/")[2]
    url = f"redis://127.0.0.1:{proxy.port}/{number}"
    limit = {"max_retained_wal": "32MiB"}
    with RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name, **limit) as running:
        running.ready()
        settled(database, redis_client, slot_name)
        yield running


class Watcher:
    """Looks all the time how much WAL the slot retains, and for how long that is over twice the limit."""

    def __init__(self, dsn: str, slot: str) -> None:
        self._dsn = dsn
        self._slot = slot
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most = 0
        self.seconds_over = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        since: float | None = None
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.wait(0.1):
                held = retained(connection, self._slot) or 0
                self.most = max(self.most, held)
                now = time.monotonic()
                since = (since or now) if held > 2 * LIMIT else None
                self.seconds_over = max(self.seconds_over, now - since if since else 0)


def retained(connection: psycopg.Connection[tuple[int]], slot: str) -> int | None:
    """Bytes of WAL that PostgreSQL keeps for the slot; ``None`` without one."""
    row = connection.execute(
        "SELECT (pg_current_wal_lsn() - restart_lsn)::bigint FROM pg_replication_slots WHERE slot_name = %s", [slot]
    ).fetchone()
    return row[0] if row else None


def write_wal(dsn: str, size: int) -> None:
    """Write so many bytes of WAL that no rule reads."""
    position = wal_position(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        while wal_position(dsn) < position + size:
            connection.execute("INSERT INTO noise SELECT n, repeat('x', 1000) FROM generate_series(1, 4000) n")


@pytest.mark.parametrize("how", ["refuse", "stall"])
def test_while_redis_is_away_the_slot_holds_little_and_the_caches_are_swept_later(
    daemon: RunningDaemon,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
    proxy: Proxy,
    how: str,
) -> None:
    redis_client.set("t:other:1", "not ours")
    with Watcher(database, slot_name) as watcher, Writer(database, redis_url) as writer:
        writer.goes_on()
        getattr(proxy, how)()
        # Ten times the limit, while the application caches and changes rows.
        write_wal(database, 10 * LIMIT)
        writer.goes_on()
        assert left(redis_client) > {"t:other:1"}
        daemon.seen("gap", reason="position_given_up")
        with psycopg.connect(database, autocommit=True) as connection:
            eventually(lambda: retained(connection, slot_name) is None, "nothing is retained for a Redis that is away")
            write_wal(database, LIMIT)
            assert retained(connection, slot_name) is None
        assert daemon.get("/livez")[0] == 200
        proxy.mend()
        eventually(lambda: len(daemon.named("gap", reason="new_slot")) == 2, "a new slot, and a sweep")
        writer.goes_on()
    print(f"at most {watcher.most / MB:.0f} MiB, {watcher.seconds_over:.1f} s over twice the limit")
    assert watcher.most > LIMIT
    assert watcher.seconds_over < 10
    redis_client.delete("t:other:1")
    assert_all_is_well(database, redis_client, daemon)
    assert len(daemon.named("gap", reason="position_given_up")) == 1


def test_a_backlog_over_the_limit_is_no_reason_to_give_up_while_redis_is_there(
    daemon: RunningDaemon, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    for _ in range(3):
        assert daemon.terminate() == 0
        with Writer(database, redis_url) as writer:
            writer.goes_on()
            write_wal(database, LIMIT + 16 * MB)
        assert left(redis_client)
        daemon.start().ready()
        settled(database, redis_client, slot_name)
        assert left(redis_client) == set()
    assert not daemon.named("gap", reason="position_given_up")
    assert_all_is_well(database, redis_client, daemon)


def test_redis_down_for_longer_than_wal_sender_timeout_costs_no_session(
    rules: Path, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, proxy: Proxy
) -> None:
    name = database.rpartition("/")[2]
    execute(database, f"ALTER DATABASE {name} SET wal_sender_timeout = '3s'")
    url = f"redis://127.0.0.1:{proxy.port}/{redis_url.rpartition('/')[2]}"
    with RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        with Writer(database, redis_url, rows=20) as writer:
            writer.goes_on()
            before = confirmed(database, slot_name)
            proxy.refuse()
            deadline = time.monotonic() + 10
            eventually(lambda: time.monotonic() > deadline, "ten seconds without Redis")
            # Nothing that it has not had was confirmed meanwhile.
            assert confirmed(database, slot_name) <= int(watermark(redis_client, slot_name)[b"lsn"])
            assert confirmed(database, slot_name) - before < MB
            proxy.mend()
            writer.goes_on()
        assert_all_is_well(database, redis_client, daemon)
        # At most one more, where Redis went away between a bust and its watermark.
        assert len(daemon.named("streaming")) <= 1 + len(daemon.named("session_lost"))
        assert all("Redis" in lost["error"] for lost in daemon.named("session_lost"))
        assert not [gap for gap in daemon.named("gap") if gap["reason"] != "new_slot"]


def test_the_slot_moves_on_in_a_database_where_nothing_happens(
    daemon: RunningDaemon,
    postgres: Postgres,
    database: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> None:
    # The server's other databases are busy.
    write_elsewhere = make_conninfo(postgres.dsn, dbname="postgres")
    execute(write_elsewhere, "CREATE TABLE IF NOT EXISTS noise (n int, body text)")
    write_wal(write_elsewhere, 48 * MB)
    position = wal_position(database)
    eventually(lambda: confirmed(database, slot_name) >= position, "confirmed past WAL of another database")
    with psycopg.connect(database, autocommit=True) as connection:
        eventually(
            # restart_lsn follows the next running-xacts record, which PostgreSQL writes now and then.
            lambda: connection.execute("CHECKPOINT") and (retained(connection, slot_name) or 0) < LIMIT,
            "PostgreSQL may remove that WAL",
        )
    assert_all_is_well(database, redis_client, daemon)


def test_a_large_transaction_that_no_rule_reads_does_not_end_the_session(
    rules: Path, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    name = database.rpartition("/")[2]
    execute(database, f"ALTER DATABASE {name} SET wal_sender_timeout = '1s'")
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        with Writer(database, redis_url) as writer:
            # Decoded at its commit, which takes the walsender much longer than its timeout.
            execute(database, "INSERT INTO noise SELECT n, 'x' FROM generate_series(1, 2000000) n")
            writer.goes_on()
        assert_all_is_well(database, redis_client, daemon)
        assert len(daemon.named("streaming")) == 1
        assert not daemon.named("session_lost")


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Postgres]:
    """A server of its own, with prepared transactions, whose commits wait for a standby that is not there."""
    with Postgres(settings={"max_wal_size": "128MB", "max_prepared_transactions": "4"}) as server:
        create(server.dsn)
        execute(server.dsn, "CREATE TABLE noise (n int, body text)")
        yield server


class Impatient(RunningDaemon):
    """It gives a position up after a sixth of the time."""

    deadlines: ClassVar[Mapping[str, float]] = {"watch.SHRINK_SECONDS": 10.0}


@pytest.fixture
def bounded(
    request: pytest.FixtureRequest,
    waiting: Postgres,
    tmp_path: Path,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> Iterator[RunningDaemon]:
    """A daemon whose slot may hold little; a parameter is another kind of it."""
    kind = getattr(request, "param", RunningDaemon)
    limit = {"max_retained_wal": "32MiB"}
    rules = rules_file(tmp_path)
    with kind(dsn=waiting.dsn, redis_url=redis_url, rules=rules, slot=slot_name, **limit) as running:
        running.ready()
        settled(waiting.dsn, redis_client, slot_name)
        yield running


@contextmanager
def commit_that_waits(server: Postgres, statement: str) -> Iterator[Callable[[], None]]:
    """A statement whose commit waits for a synchronous standby that is not there; what ends its wait."""
    waits = psycopg.connect(server.dsn, autocommit=True)
    local = make_conninfo(server.dsn, options="-c synchronous_commit=local")
    execute(local, "ALTER SYSTEM SET synchronous_standby_names = 'far'", "SELECT pg_reload_conf()")
    eventually(lambda: shown(local, "synchronous_standby_names") == "far", "the setting is in force")
    thread = threading.Thread(target=waits.execute, args=[statement.encode()])
    thread.start()

    def release() -> None:
        execute(local, "ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_reload_conf()")
        thread.join()

    try:
        yield release
    finally:
        release()
        waits.close()


def shown(dsn: str, name: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.timeout(180)
def test_a_commit_that_waits_for_a_synchronous_standby_holds_little_wal_and_its_cache_is_swept_when_it_is_seen(
    waiting: Postgres, bounded: RunningDaemon, redis_client: redis.Redis
) -> None:
    local = make_conninfo(waiting.dsn, options="-c synchronous_commit=local")
    execute(local, "INSERT INTO things VALUES (1)")
    with commit_that_waits(waiting, "UPDATE things SET body = 'new' WHERE id = 1") as release:
        with Watcher(local, bounded.slot) as watcher, psycopg.connect(local, autocommit=True) as connection:
            for _ in range(8):
                write_wal(local, LIMIT)
                connection.execute("CHECKPOINT")
                time.sleep(3)
            eventually(
                lambda: connection.execute("CHECKPOINT") and (retained(connection, bounded.slot) or 0) < LIMIT,
                "the slot holds little",
            )
        gap = bounded.seen("gap", reason="retained_wal")
        assert gap["caches"] == ["thing"]
        # A reader that comes now stores what it sees: the old row.
        redis_client.set("t:thing:1", "old")
        assert b"thing" not in watermark(redis_client, bounded.slot)[b"rules"]
        release()
        eventually(lambda: b"thing" in watermark(redis_client, bounded.slot)[b"rules"], "the watermark names it again")
    print(f"at most {watcher.most / MB:.0f} MiB, {watcher.seconds_over:.1f} s over twice the limit")
    assert not bounded.named("session_lost")
    assert_all_is_well(waiting.dsn, redis_client, bounded)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bounded", [Impatient], indirect=True)
def test_a_transaction_that_never_ends_holds_no_wal_for_ever(
    waiting: Postgres, bounded: RunningDaemon, redis_client: redis.Redis
) -> None:
    with psycopg.connect(waiting.dsn, autocommit=True) as connection:
        connection.execute("BEGIN; INSERT INTO things VALUES (1); PREPARE TRANSACTION 'forgotten'")
        write_wal(waiting.dsn, 3 * LIMIT)
        given_up = eventually(lambda: bounded.named("gap", reason="position_given_up"), "it is given up", 120)[0]
        assert "pg_prepared_xacts" in given_up["error"]
        eventually(lambda: bounded.named("postgres_waits"), "what the new slot waits for is told", 60)
        assert bounded.get("/readyz")[0] == 503
        write_wal(waiting.dsn, 2 * LIMIT)
        eventually(
            lambda: any("CDC_MAX_RETAINED_WAL" in lost["error"] for lost in bounded.named("session_lost")),
            "nor does the slot that is being made hold more",
            60,
        )
        connection.execute("COMMIT PREPARED 'forgotten'")
    eventually(lambda: bounded.get("/readyz")[0] == 200, "it leads again", 60)
    assert_all_is_well(waiting.dsn, redis_client, bounded)
