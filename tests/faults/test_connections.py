"""PostgreSQL goes, comes back, moves or refuses: a retry with backoff, or an end with the remedy in one sentence."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from proxy import Proxy
from psycopg.conninfo import make_conninfo
from running import RunningDaemon, eventually, execute, settled, wal_position, watermark
from writing import Writer, assert_all_is_well, assert_nothing_confirmed_too_early, create, left, rules_file

from cdc_invalidator.embedded.process import HOST, give_to_nobody
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_numbers = itertools.count()


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    """A server that may be crashed, stopped and frozen; each test leaves it running."""
    with Postgres() as server:
        yield server


@pytest.fixture
def dsn(own: Postgres) -> Iterator[str]:
    """A database there, with the table of the rules."""
    name = f"faulty_{next(_numbers)}"
    dsn = own.create_database(name)
    create(dsn)
    yield dsn
    own.drop_database(name)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return rules_file(tmp_path)


@pytest.fixture
def daemon_of(redis_url: str, rules: Path, slot_name: str) -> Callable[..., RunningDaemon]:
    """Make a daemon for a DSN."""
    return lambda dsn, **settings: RunningDaemon(
        **{"dsn": dsn, "redis_url": redis_url, "rules": rules, "slot": slot_name, **settings}
    )


@pytest.fixture
def daemon(dsn: str, daemon_of: Callable[..., RunningDaemon], redis_client: redis.Redis) -> Iterator[RunningDaemon]:
    """A daemon that streams."""
    with daemon_of(dsn) as running:
        running.ready()
        settled(dsn, redis_client, running.slot)
        yield running


def streams_again(daemon: RunningDaemon, times: int) -> None:
    eventually(lambda: daemon.alive() and len(daemon.named("streaming")) >= times, "it streams again")


def only_gaps(daemon: RunningDaemon, *reasons: str) -> bool:
    return [gap["reason"] for gap in daemon.named("gap")] == list(reasons)


# The server goes and comes back.


def test_a_crash_of_postgres_costs_no_bust(
    daemon: RunningDaemon, own: Postgres, dsn: str, redis_url: str, redis_client: redis.Redis
) -> None:
    with Writer(dsn, redis_url) as writer:
        for times in (2, 3):
            writer.goes_on()
            own.kill()
            own.start()
            streams_again(daemon, times)
        writer.goes_on()
    assert_all_is_well(dsn, redis_client, daemon)
    assert only_gaps(daemon, "new_slot", "server_crashed", "server_crashed")


@pytest.mark.parametrize("redis_away", [False, True], ids=["redis is there", "redis is away"])
def test_a_fast_shutdown_of_postgres_is_not_held_up(
    own: Postgres,
    valkey: Valkey,
    dsn: str,
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
    *,
    redis_away: bool,
) -> None:
    with Proxy(valkey.port) as proxy:
        through = f"redis://127.0.0.1:{proxy.port}/{redis_url.rpartition('/')[2]}"
        with daemon_of(dsn, redis_url=through) as daemon, Writer(dsn, redis_url) as writer:
            daemon.ready()
            writer.goes_on()
            if redis_away:
                proxy.refuse()
                daemon.seen("redis_unavailable")
                # Changes that can't be confirmed: the walsender would wait for that, and the server for it.
                eventually(lambda: daemon.status().get("backlog_keys"), "changes wait for Redis")
            began = time.monotonic()
            own.stop()
            seconds = time.monotonic() - began
            print(f"shut down in {seconds:.2f} s")
            # Ours is not killed: the server ended by itself.
            assert "database system is shut down" in own.log.read_text().splitlines()[-1]
            assert seconds < 8
            own.start()
            proxy.mend()
            writer.goes_on()
            streams_again(daemon, 2)
    with daemon_of(dsn) as daemon:
        assert_all_is_well(dsn, redis_client, daemon.ready())


def test_a_server_that_stays_away_is_not_asked_all_the_time(
    own: Postgres, dsn: str, daemon_of: Callable[..., RunningDaemon], redis_url: str, redis_client: redis.Redis
) -> None:
    with Proxy(own.port) as proxy, daemon_of(make_conninfo(dsn, port=proxy.port)) as daemon:
        daemon.ready()
        settled(dsn, redis_client, daemon.slot)
        with Writer(dsn, redis_url) as writer:
            writer.goes_on()
            before = proxy.accepted
            proxy.refuse()
            deadline = time.monotonic() + 5
            eventually(lambda: time.monotonic() > deadline, "five seconds without PostgreSQL")
            attempts = proxy.accepted - before
            assert daemon.get("/readyz")[0] == 503
            assert daemon.get("/livez")[0] == 200
            status = daemon.status()
            assert "CDC_POSTGRES_DSN" in status["last_error"]
            # Since the first failure, not the last.
            began = datetime.fromisoformat(daemon.seen("session_lost")["ts"])
            since = datetime.fromisoformat(status["last_error_since"])
            assert abs((since - began).total_seconds()) < 0.1
            assert status["last_error_since"] in daemon.get("/readyz")[1]
            proxy.mend()
            streams_again(daemon, 2)
            assert daemon.status()["last_error"] is daemon.status()["last_error_since"] is None
        print(f"{attempts} attempts")
        assert 1 < attempts < 20
        assert_all_is_well(dsn, redis_client, daemon)
        assert only_gaps(daemon, "new_slot")


def test_connections_that_are_cut_in_the_middle_of_a_message_lose_nothing(
    own: Postgres, dsn: str, daemon_of: Callable[..., RunningDaemon], redis_url: str, redis_client: redis.Redis
) -> None:
    dice = random.Random(20)
    with Proxy(own.port) as proxy, daemon_of(make_conninfo(dsn, port=proxy.port)) as daemon:
        daemon.ready()
        settled(dsn, redis_client, daemon.slot)
        with Writer(dsn, redis_url, rows=50) as writer:
            for times in range(2, 10):
                writer.goes_on()
                proxy.cut_after(dice.randrange(20_000))
                streams_again(daemon, times)
        assert_all_is_well(dsn, redis_client, daemon)
        assert only_gaps(daemon, "new_slot")
        assert len(daemon.named("session_lost")) < 20


@pytest.mark.parametrize("frozen", ["postgres", "redis"])
def test_sigterm_ends_the_daemon_while_a_server_is_frozen(
    own: Postgres,
    valkey: Valkey,
    dsn: str,
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
    frozen: str,
) -> None:
    with Proxy(own.port) as before_postgres, Proxy(valkey.port) as before_redis:
        through = f"redis://127.0.0.1:{before_redis.port}/{redis_url.rpartition('/')[2]}"
        with daemon_of(make_conninfo(dsn, port=before_postgres.port), redis_url=through) as daemon:
            daemon.ready()
            settled(dsn, redis_client, daemon.slot)
            with Writer(dsn, redis_url) as writer:
                writer.goes_on()
                {"postgres": before_postgres, "redis": before_redis}[frozen].stall()
                writer.goes_on()
                began = time.monotonic()
                assert daemon.terminate() == 0
                seconds = time.monotonic() - began
                print(f"ended after {seconds:.2f} s")
                assert seconds < 6
                before_postgres.mend()
                before_redis.mend()
                daemon.start().ready()
                writer.goes_on()
            assert_all_is_well(dsn, redis_client, daemon)
            assert only_gaps(daemon, "new_slot")


# The server refuses.


def refused(daemon: RunningDaemon, code: int, *words: str) -> None:
    """It ends with this code, and with one sentence that has these words."""
    with daemon:
        assert daemon.wait() == code, daemon.events
    assert len(daemon.errors) == 1, daemon.errors
    for word in words:
        assert word in daemon.errors[0]
    assert "opsecret" not in f"{daemon.errors} {daemon.events}"
    assert len(daemon.named("session_lost")) == 0


@pytest.mark.parametrize(
    "broken",
    [
        "postgresq://app:topsecret@127.0.0.1/db",
        "postgresql://app:top%secret@127.0.0.1/db",
        "postgresql://app:topsecret@127.0.0.1:port/db?nothing=1",
        "host=127.0.0.1 password=topsecret nothing",
        "host=127.0.0.1 password='topsecret",
        "topsecret",
        "",
    ],
)
def test_a_dsn_that_can_not_be_read_is_refused_without_a_word_of_it(
    daemon_of: Callable[..., RunningDaemon], broken: str
) -> None:
    refused(daemon_of(broken), 2, "CDC_POSTGRES_DSN")


def test_a_port_that_is_no_number_is_refused_without_the_password(daemon_of: Callable[..., RunningDaemon]) -> None:
    daemon = daemon_of("postgresql://app:topsecret@127.0.0.1:port/db")
    with daemon:
        eventually(lambda: daemon.process.poll() is not None or daemon.named("session_lost"), "it says so")
    assert "opsecret" not in f"{daemon.errors} {daemon.events}"


def test_a_wrong_password_ends_with_3(own: Postgres, dsn: str, daemon_of: Callable[..., Any]) -> None:
    refused(daemon_of(make_conninfo(dsn, password="topsecret")), 3, "the right user and password")


def test_a_missing_database_ends_with_3(own: Postgres, daemon_of: Callable[..., Any]) -> None:
    refused(daemon_of(own.dsn_for("nowhere")), 3, "nowhere", "existing database")


@contextmanager
def role(dsn: str, attributes: str) -> Iterator[str]:
    """A role that may set up everything but for what its attributes lack; its DSN."""
    name = f"role_{next(_numbers)}"
    database = dsn.rpartition("/")[2]
    execute(
        dsn,
        f"CREATE ROLE {name} {attributes} PASSWORD 'topsecret'",
        f"GRANT CREATE ON DATABASE {database} TO {name}",
        f"ALTER TABLE things OWNER TO {name}",
    )
    try:
        yield make_conninfo(dsn, user=name, password="topsecret")
    finally:
        execute(dsn, "ALTER TABLE things OWNER TO postgres", f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def test_a_role_that_may_not_replicate_ends_with_3(dsn: str, daemon_of: Callable[..., Any]) -> None:
    with role(dsn, "LOGIN") as its_dsn:
        daemon = daemon_of(its_dsn)
        refused(daemon, 3, "permission denied", "ALTER ROLE … REPLICATION")
        execute(dsn, f"SELECT pg_create_logical_replication_slot('{daemon.slot}', 'pgoutput')")
        refused(daemon_of(its_dsn), 3, "permission denied", "ALTER ROLE … REPLICATION")


def test_a_role_that_may_not_log_in_ends_with_3(dsn: str, daemon_of: Callable[..., Any]) -> None:
    with role(dsn, "NOLOGIN REPLICATION") as its_dsn:
        refused(daemon_of(its_dsn), 3, "LOGIN")


def test_a_role_that_is_not_there_ends_with_3_and_says_to_make_it(
    own: Postgres, dsn: str, daemon_of: Callable[..., Any]
) -> None:
    hba = own.data / "pg_hba.conf"
    before = hba.read_text()
    # With a password, PostgreSQL does not tell that there is no such role.
    hba.write_text("host all nobody 127.0.0.1/32 trust\n" + before)
    try:
        its_dsn = make_conninfo(dsn, user="nobody")
        execute(dsn, "SELECT pg_reload_conf()")
        eventually(lambda: 'role "nobody" does not exist' in rejection(its_dsn), "the new pg_hba.conf is in force")
        refused(daemon_of(its_dsn), 3, 'role "nobody" does not exist', "make the role")
    finally:
        hba.write_text(before)
        execute(dsn, "SELECT pg_reload_conf()")


def test_a_role_that_may_replicate_and_owns_the_tables_needs_no_more(
    dsn: str, daemon_of: Callable[..., RunningDaemon], redis_url: str, redis_client: redis.Redis
) -> None:
    with role(dsn, "LOGIN REPLICATION") as its_dsn:
        with daemon_of(its_dsn) as daemon:
            daemon.ready()
            with Writer(dsn, redis_url) as writer:
                writer.goes_on()
            assert_all_is_well(dsn, redis_client, daemon)
        eventually(lambda: drops(dsn, daemon.slot), "its slot is dropped")


def drops(dsn: str, slot: str) -> bool:
    try:
        execute(dsn, f"SELECT pg_drop_replication_slot('{slot}')")
    except psycopg.errors.ObjectInUse:
        return False
    return True


def test_a_client_without_a_pg_hba_entry_ends_with_3(own: Postgres, dsn: str, daemon_of: Callable[..., Any]) -> None:
    hba = own.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("local all all scram-sha-256\nhost all postgres 127.0.0.1/32 scram-sha-256\n")
    try:
        with role(dsn, "LOGIN REPLICATION") as its_dsn:
            execute(dsn, "SELECT pg_reload_conf()")
            eventually(lambda: "no pg_hba.conf entry" in rejection(its_dsn), "the new pg_hba.conf is in force")
            refused(daemon_of(its_dsn), 3, "pg_hba.conf")
    finally:
        hba.write_text(before)
        execute(dsn, "SELECT pg_reload_conf()")


def rejection(dsn: str) -> str:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError as error:
        return str(error)
    return ""


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Callable[..., Postgres]]:
    """A server with settings of its own and the table of the rules."""
    started: list[Postgres] = []

    def make(**settings: str) -> Postgres:
        server = Postgres(settings=settings)
        started.append(server)
        server.start()
        create(server.dsn)
        return server

    yield make
    for server in started:
        server.close()


def test_a_wal_level_that_is_too_low_ends_with_3(tight: Callable[..., Postgres], daemon_of: Callable[..., Any]) -> None:
    refused(daemon_of(tight(wal_level="replica").dsn), 3, "wal_level = logical")


def test_a_server_without_a_free_slot_ends_with_3(
    tight: Callable[..., Postgres], daemon_of: Callable[..., Any]
) -> None:
    server = tight(max_replication_slots="1")
    execute(server.dsn, "SELECT pg_create_logical_replication_slot('taken', 'pgoutput')")
    refused(daemon_of(server.dsn), 3, "max_replication_slots")


def test_a_server_without_a_free_walsender_is_asked_again_until_there_is_one(
    tight: Callable[..., Postgres],
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
) -> None:
    server = tight(max_wal_senders="1")
    taken = psycopg.connect(server.dsn, replication="database", autocommit=True)
    with daemon_of(server.dsn) as daemon:
        lost = daemon.seen("session_lost")
        assert "max_wal_senders" in lost["error"]
        deadline = time.monotonic() + 5
        eventually(lambda: time.monotonic() > deadline, "five seconds without a walsender")
        assert 1 < len(daemon.named("session_lost")) < 20
        taken.close()
        daemon.ready()
        with Writer(server.dsn, redis_url) as writer:
            writer.goes_on()
        assert_all_is_well(server.dsn, redis_client, daemon)


def test_a_server_without_a_free_connection_is_asked_again_until_there_is_one(
    tight: Callable[..., Postgres],
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
) -> None:
    server = tight(max_connections="8", superuser_reserved_connections="0")
    taken = [psycopg.connect(server.dsn, autocommit=True) for _ in range(8)]
    with daemon_of(server.dsn) as daemon:
        assert "too many clients" in daemon.seen("session_lost")["error"]
        for connection in taken:
            connection.close()
        daemon.ready()
        with Writer(server.dsn, redis_url) as writer:
            writer.goes_on()
        assert_all_is_well(server.dsn, redis_client, daemon)


# Standbys.


@contextmanager
def standby_of(primary: Postgres) -> Iterator[Postgres]:
    """A hot standby that streams from the primary; the primary is restarted for it."""
    primary.stop()
    standby = Postgres(
        bin_dir=primary.bin_dir,
        settings={
            "primary_conninfo": make_conninfo(primary.dsn, application_name="standby"),
            "primary_slot_name": "standby",
            "hot_standby_feedback": "on",
        },
    )
    shutil.copytree(primary.data, standby.data, ignore=shutil.ignore_patterns("postmaster.pid"))
    (standby.data / "standby.signal").touch()
    give_to_nobody(standby.folder)
    primary.start()
    execute(primary.dsn, "SELECT pg_create_physical_replication_slot('standby', true)")
    with standby:
        eventually(
            lambda: rows(primary.dsn, "SELECT 1 FROM pg_stat_replication WHERE application_name = 'standby'"),
            "the standby streams",
        )
        yield standby


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


def sync_slots(primary: Postgres, standby: Postgres) -> None:
    """Copy the primary's failover slots to the standby, as its worker does with sync_replication_slots = on."""
    with psycopg.connect(standby.dsn, autocommit=True) as connection:

        def done() -> bool:
            # The standby keeps a copy once the original has moved past it, which takes the primary's word on what runs.
            execute(primary.dsn, "SELECT pg_log_standby_snapshot()")
            connection.execute("SELECT pg_sync_replication_slots()")
            return bool(rows(standby.dsn, "SELECT 1 FROM pg_replication_slots WHERE synced AND NOT temporary"))

        eventually(done, "the slot is synced to the standby")


def both(primary: Postgres, standby: Postgres) -> str:
    """A DSN with two hosts: whichever of them takes writes."""
    hosts, ports = f"{HOST},{HOST}", f"{primary.port},{standby.port}"
    return make_conninfo(primary.dsn, host=hosts, port=ports, target_session_attrs="read-write")


@pytest.mark.parametrize("synced", [False, True], ids=["without the slot", "with a synced slot"])
def test_a_promoted_standby_is_followed(
    tight: Callable[..., Postgres],
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
    *,
    synced: bool,
) -> None:
    primary = tight()
    with standby_of(primary) as standby:
        dsn = both(primary, standby)
        with daemon_of(dsn) as daemon:
            daemon.ready()
            settled(dsn, redis_client, daemon.slot)
            if synced:
                # While nothing is written, or the copy is never old enough for the original to have moved past it.
                sync_slots(primary, standby)
            with Writer(dsn, redis_url) as writer:
                writer.goes_on()
                primary.kill()
                execute(standby.dsn, "SELECT pg_promote()")
                streams_again(daemon, 2)
                writer.goes_on()
            # What was committed on the old primary only is gone; that caches may have had it is why they are swept.
            assert_all_is_well(standby.dsn, redis_client, daemon)
            assert only_gaps(daemon, "new_slot", "other_timeline" if synced else "new_slot")


def test_a_standby_can_be_decoded_on(
    tight: Callable[..., Postgres],
    daemon_of: Callable[..., RunningDaemon],
    redis_url: str,
    redis_client: redis.Redis,
) -> None:
    primary = tight()
    with standby_of(primary) as standby:
        daemon = daemon_of(standby.dsn, postgres_readers=primary.dsn)
        refused(daemon, 3, "on the primary: CREATE PUBLICATION")
        daemon.errors.clear()
        execute(primary.dsn, f"CREATE PUBLICATION {daemon.slot} FOR TABLE ONLY things")
        with daemon, Writer(primary.dsn, redis_url) as writer:
            # Making a slot there waits for the primary's next word on its transactions.
            eventually(
                lambda: daemon.alive() and rows(primary.dsn, "SELECT pg_log_standby_snapshot()") and leads(daemon),
                "it streams from the standby",
            )
            writer.goes_on()
            writer.stop()
            position = wal_position(primary.dsn)
            eventually(
                lambda: int(watermark(redis_client, daemon.slot).get(b"lsn", 0)) >= position,
                "the watermark passes the last commit",
            )
            assert left(redis_client) == set()
            assert_nothing_confirmed_too_early(standby.dsn, redis_client, daemon.slot)
            assert not daemon.errors
            assert daemon.terminate() == 0


def leads(daemon: RunningDaemon) -> bool:
    return daemon.status().get("role") == "leader"
