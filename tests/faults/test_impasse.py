"""A change that the server can't send: it is skipped and its caches are swept, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import psycopg
import pytest
import redis
from psycopg.conninfo import make_conninfo
from running import RunningDaemon, eventually, execute, settled
from writing import Writer, assert_all_is_well, create, rules_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres


_END = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}'"


@pytest.fixture
def legacy(postgres: Postgres) -> Iterator[str]:
    """A database whose encoding has bytes without a Unicode character; its DSN."""
    execute(postgres.dsn, "CREATE DATABASE legacy ENCODING 'WIN1252' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    dsn = make_conninfo(postgres.dsn, dbname="legacy")
    create(dsn)
    yield dsn
    postgres.drop_database("legacy")


def write_a_byte_without_a_character(dsn: str, row: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET client_encoding = 'WIN1252'")
        connection.execute(f"INSERT INTO things VALUES ({row}, convert_from('\\x9d', 'WIN1252'))".encode())


def gaps(daemon: RunningDaemon, reason: str, times: int) -> None:
    # Each try begins a session; on a busy machine that takes a while.
    eventually(lambda: len(daemon.named("gap", reason=reason)) == times, f"a gap: {reason}", 60)


def streams_again(daemon: RunningDaemon, times: int) -> None:
    eventually(lambda: len(daemon.named("streaming")) >= times, "it streams again")


class Impatient(RunningDaemon):
    """It skips after a second what can't be sent, not after five."""

    deadlines: ClassVar[Mapping[str, float]] = {"postgres.impasse.SECONDS": 1.0}


@pytest.mark.timeout(240)
def test_a_change_that_can_not_be_sent_is_skipped_and_the_caches_are_swept(
    legacy: str, tmp_path: Path, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    with Impatient(dsn=legacy, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
        daemon.ready()
        settled(legacy, redis_client, slot_name)
        with Writer(legacy, redis_url) as writer:
            writer.goes_on()
            for times in (1, 2):
                redis_client.set(f"t:thing:-{times}", "cached")
                write_a_byte_without_a_character(legacy, -times)
                writer.goes_on()
                gaps(daemon, "position_given_up", times)
                gaps(daemon, "missed_changes", times)
                writer.goes_on()
        for gap in daemon.named("gap", reason="position_given_up"):
            assert "0x9d" in gap["error"]
            assert gap["caches"] == ["thing"]
        # The same slot, moved on: a new one would wait for all transactions that run.
        assert [gap["reason"] for gap in daemon.named("gap") if gap["swept"]] == ["new_slot"] + ["missed_changes"] * 2
        assert_all_is_well(legacy, redis_client, daemon)
        assert daemon.status()["last_error"] is None


def test_a_stream_that_is_cut_again_and_again_at_one_position_skips_nothing(
    database: str, tmp_path: Path, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    create(database)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        for times in range(2, 10):
            execute(database, _END.format(slot=slot_name))
            streams_again(daemon, times)
        with Writer(database, redis_url) as writer:
            writer.goes_on()
        assert_all_is_well(database, redis_client, daemon)
        assert not daemon.named("gap", reason="position_given_up")
        assert not daemon.named("gap", reason="missed_changes")


@pytest.mark.parametrize("limit", ["transaction_timeout", "statement_timeout", "idle_session_timeout", "lock_timeout"])
def test_limits_of_the_role_are_not_the_walsenders(
    database: str,
    tmp_path: Path,
    redis_url: str,
    slot_name: str,
    limit: str,
) -> None:
    create(database)
    execute(database, f"ALTER DATABASE {database.rpartition('/')[2]} SET {limit} = '200ms'")
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
        daemon.ready()
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"SET {limit} = 0".encode())
            # Decoding it takes longer than the limit.
            connection.execute("INSERT INTO things SELECT n, 'x' FROM generate_series(1, 100000) n")
            connection.execute("SELECT pg_logical_emit_message(true, 'others', 'x')")
        eventually(lambda: daemon.status().get("lag_bytes") == 0, "all is busted")
        assert not daemon.named("session_lost"), daemon.named("session_lost")
        assert not daemon.named("gap", reason="position_given_up")
