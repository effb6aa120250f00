"""Where continuity can't be proven: what was missed is swept before the watermark goes on, and it is said.

In each of these the application caches rows and changes them while something else happens to the slot, to the database
or to Redis.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pair
import psycopg
import pytest
import redis
from running import RunningDaemon, confirmed, eventually, execute, wal_position, watermark
from stage import Stage
from writing import assert_nothing_confirmed_too_early

from cdc_invalidator.embedded.process import HOST, as_nobody, give_to_nobody, plain_environment, scratch
from cdc_invalidator.embedded.servers import Postgres, Valkey, postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCHEMA = (*pair.SCHEMA, "CREATE TABLE junk (n int)")
# A sweep over so many strangers takes a second or two.
STRANGERS = 1_000_000


class GapStage(Stage):
    """An application with a cache, and its daemon; it remembers which entries its changes have made stale."""

    def __init__(self, daemon: RunningDaemon, client: Any = None) -> None:
        super().__init__(daemon, client)
        self._stale: set[str] = set()
        self._next = 1

    def begin(self) -> None:
        self.daemon.ready()
        self.gap("new_slot")
        self.settle()
        self.forget()

    def end(self) -> None:
        """Judge nothing: not every gap ends well."""

    def crowd(self) -> None:
        """Let strangers in, so that a sweep takes long."""
        for group in range(10):
            words = ("DEBUG", "POPULATE", STRANGERS // 10, f"stranger-{group}", 1)
            self.client.execute_command(*words)

    def change(self, dsn: str | None = None) -> str:
        """Cache a thing, change its row, and give the key, which must go now."""
        number, self._next = self._next, self._next + 1
        key = f"t:thing:{number}"
        self.cache(key)
        execute(dsn or self.dsn, f"UPDATE things SET n = n + 1 WHERE id = {number}")
        self._stale.add(key)
        return key

    def forget(self) -> None:
        """Let go of what the daemon has said so far."""
        self.daemon.events.clear()

    def start(self) -> None:
        self.forget()
        self.daemon.start()

    def stop(self) -> None:
        self.settle()
        assert self.daemon.terminate() == 0

    def gap(self, reason: str, *caches: str) -> None:
        """Wait for a gap of that reason, and for the end of the sweeps of its caches."""
        event = self.daemon.seen("gap", reason=reason)
        assert event["caches"] == sorted(caches or ("thing", "other"))
        for cache in event["caches"]:
            self.daemon.seen("bust", reason="gap", action="sweep", cache=cache)
        assert self.daemon.metric("cdc_invalidator_gaps_total", reason=reason) >= 1

    def assert_all_gone(self) -> None:
        """The key of every committed change is gone, and the stream goes on: the next one goes as well."""
        self.settle()
        assert {key for key in self._stale if self.cached(key)} == set()
        key = self.change()
        self.settle()
        assert not self.cached(key)
        assert_nothing_confirmed_too_early(self.dsn, self.client, self.slot)
        assert not self.daemon.errors


@contextmanager
def staged(dsn: str, redis_url: str, folder: Path, slot: str, **settings: str) -> Iterator[GapStage]:
    execute(dsn, *SCHEMA)
    rules = folder / "rules.yaml"
    rules.write_text(pair.RULES)
    with GapStage.playing(dsn, redis_url, rules, slot, **settings) as stage:
        yield stage


@pytest.fixture
def stage(database: str, redis_url: str, tmp_path: Path, slot_name: str) -> Iterator[GapStage]:
    with staged(database, redis_url, tmp_path, slot_name) as stage:
        yield stage


def value(dsn: str, query: str, *parameters: Any) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query.encode(), parameters).fetchone()
    return row[0] if row else None


# The slot.


def test_a_slot_dropped_while_the_daemon_was_away_is_made_anew_and_everything_is_swept(stage: GapStage) -> None:
    stage.stop()
    stage.change()
    execute(stage.dsn, f"SELECT pg_drop_replication_slot('{stage.slot}')")
    stage.change()
    stage.start()
    stage.gap("new_slot")
    stage.assert_all_gone()


def test_a_slot_made_anew_under_the_same_name_while_the_daemon_was_away_is_noticed(stage: GapStage) -> None:
    stage.stop()
    stage.change()
    execute(
        stage.dsn,
        f"SELECT pg_drop_replication_slot('{stage.slot}')",
        f"SELECT pg_create_logical_replication_slot('{stage.slot}', 'pgoutput')",
    )
    stage.change()
    stage.start()
    stage.gap("missed_changes")
    stage.assert_all_gone()


def test_a_slot_that_somebody_advanced_while_the_daemon_was_away_is_noticed(stage: GapStage) -> None:
    stage.stop()
    stage.change()
    execute(stage.dsn, f"SELECT pg_replication_slot_advance('{stage.slot}', pg_current_wal_lsn())")
    stage.start()
    stage.gap("missed_changes")
    stage.assert_all_gone()


def test_nothing_is_swept_when_the_daemon_was_away_and_nothing_else_happened(stage: GapStage) -> None:
    stage.stop()
    stage.change()
    stage.cache("t:thing:99", "t:other:99")
    stage.start()
    stage.assert_all_gone()
    assert stage.cached("t:thing:99")
    assert stage.cached("t:other:99")
    assert not stage.daemon.named("gap")


def test_a_slot_dropped_under_a_frozen_daemon_is_made_anew_and_everything_is_swept(stage: GapStage) -> None:
    stage.daemon.send(signal.SIGSTOP)
    stage.change()
    with psycopg.connect(stage.dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE slot_name = %s",
            [stage.slot],
        )
        connection.execute("SELECT pg_drop_replication_slot(%s)", [stage.slot])
    stage.change()
    stage.daemon.send(signal.SIGCONT)
    stage.gap("new_slot")
    stage.assert_all_gone()


@pytest.mark.parametrize("frozen", [False, True], ids=["away", "frozen"])
def test_a_slot_that_postgresql_gave_up_is_made_anew_and_everything_is_swept(
    redis_url: str, tmp_path: Path, slot_name: str, frozen: bool
) -> None:
    small = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    with (
        Postgres(settings=small) as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):
        if frozen:
            stage.daemon.send(signal.SIGSTOP)
        else:
            stage.stop()
        stage.change()

        def lost() -> bool:
            for _ in range(3):
                execute(stage.dsn, "INSERT INTO junk VALUES (1)", "SELECT pg_switch_wal()")
            execute(stage.dsn, "CHECKPOINT")
            status = value(stage.dsn, "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", slot_name)
            return bool(status == "lost")

        eventually(lost, "the slot is lost")
        stage.change()
        if frozen:
            stage.forget()
            stage.daemon.send(signal.SIGCONT)
        else:
            stage.start()
        stage.gap("new_slot")
        stage.assert_all_gone()


# Another database, or another history of the same one.


@pytest.mark.parametrize("prepared", [False, True], ids=["without a slot", "with a slot"])
def test_another_server_behind_the_same_address_is_noticed(
    redis_url: str, tmp_path: Path, slot_name: str, prepared: bool
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Postgres())
        stage = stack.enter_context(staged(first.dsn, redis_url, tmp_path, slot_name))
        second = Postgres(own_identity=True)
        stack.callback(second.close)
        stage.stop()
        stage.cache("t:thing:50")
        first.stop()
        second._port = first.port
        second.start()
        execute(second.dsn, *SCHEMA, "UPDATE things SET n = 50 WHERE id = 50")
        if prepared:
            execute(
                second.dsn,
                f"CREATE PUBLICATION {slot_name} FOR TABLE things, others",
                f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput')",
            )
        stage.change()
        stage.start()
        stage.gap("other_system" if prepared else "new_slot")
        assert not stage.cached("t:thing:50")
        stage.assert_all_gone()


@pytest.mark.parametrize("running", [False, True], ids=["away", "running"])
def test_a_database_restored_from_an_older_copy_is_noticed(
    redis_url: str, tmp_path: Path, slot_name: str, running: bool
) -> None:
    with (
        Postgres() as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):
        stage.stop()
        server.stop()
        copy = server.folder / "copy"
        shutil.copytree(server.data, copy)
        server.start()
        stage.start()
        execute(stage.dsn, *("INSERT INTO junk SELECT generate_series(1, 10000)",) * 3)
        stage.change()
        stage.settle()
        # What readers have loaded since then, nobody has written any more.
        stage.cache("t:thing:1", "t:thing:2")
        stage.forget()
        if not running:
            stage.stop()
        server.stop()
        shutil.rmtree(server.data)
        copy.rename(server.data)
        give_to_nobody(server.data)
        server.start()
        if not running:
            stage.start()
        stage.gap("database_went_back")
        assert not stage.cached("t:thing:2")
        stage.assert_all_gone()


@pytest.mark.parametrize("running", [False, True], ids=["away", "running"])
def test_a_copy_that_has_written_more_than_was_lost_is_noticed_by_the_last_commit(
    redis_url: str, tmp_path: Path, slot_name: str, running: bool
) -> None:
    with (
        Postgres() as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):
        stage.change()
        stage.stop()
        server.stop()
        copy = server.folder / "copy"
        shutil.copytree(server.data, copy)
        server.start()
        stage.start()
        stage.change()
        stage.settle()
        stage.cache("t:thing:2", "t:thing:50")
        lost = wal_position(stage.dsn)
        if running:
            stage.daemon.send(signal.SIGSTOP)
        else:
            stage.stop()
        server.stop()
        shutil.rmtree(server.data)
        copy.rename(server.data)
        give_to_nobody(server.data)
        server.start()
        execute(stage.dsn, *("INSERT INTO junk SELECT generate_series(1, 10000)",) * 3)
        stage.change()
        assert wal_position(stage.dsn) > lost
        stage.forget()
        if running:
            stage.daemon.send(signal.SIGCONT)
        else:
            stage.start()
        stage.gap("other_history")
        assert not stage.cached("t:thing:2", "t:thing:50")
        stage.assert_all_gone()
        # From here on it is the history.
        stage.daemon.kill()
        stage.cache("t:thing:50")
        stage.start()
        stage.assert_all_gone()
        assert stage.cached("t:thing:50")
        assert not stage.daemon.named("gap")


# Commits stay in memory for long, unless they are flushed.
LAZY = {"wal_writer_delay": "10s", "bgwriter_delay": "10s", "autovacuum": "off"}


@pytest.mark.parametrize("running", [False, True], ids=["away", "running"])
@pytest.mark.parametrize("version", sorted(postgres_bin_dirs()), ids=lambda version: f"PostgreSQL {version}")
def test_commits_that_a_crash_takes_back_are_swept_and_a_restart_sweeps_nothing(
    redis_url: str, tmp_path: Path, slot_name: str, version: int, running: bool
) -> None:
    with (
        Postgres(bin_dir=postgres_bin_dirs()[version], settings=LAZY) as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):

        def again(end: Callable[[], None]) -> None:
            stage.settle()
            if not running:
                stage.stop()
            stage.forget()
            end()
            server.start()
            if running:
                stage.daemon.seen("streaming")
            else:
                stage.start()
            stage.settle()

        stage.cache("t:thing:1")
        again(server.stop)
        assert stage.cached("t:thing:1")
        assert not stage.daemon.named("gap")

        def crash() -> None:
            for _ in range(20):
                with psycopg.connect(stage.dsn, autocommit=True) as connection:
                    connection.execute("SET synchronous_commit = off")
                    connection.execute("UPDATE things SET n = 99 WHERE id = 2")
                    # A reader has seen it.
                    stage.cache("t:thing:2")
                    server.kill()
                server.start()
                if value(stage.dsn, "SELECT n FROM things WHERE id = 2") != 99:
                    break
                execute(stage.dsn, "UPDATE things SET n = 0 WHERE id = 2")
            else:
                raise AssertionError("no commit was taken back")
            server.stop()

        again(crash)
        stage.gap("server_crashed")
        assert not stage.cached("t:thing:2")
        stage.assert_all_gone()


def test_a_promoted_standby_that_has_the_slot_is_noticed_by_its_timeline(
    redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        Postgres() as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):
        stage.stop()
        server.stop()
        (server.data / "standby.signal").touch()
        server.start()
        execute(server.dsn, "SELECT pg_promote()")
        stage.change()
        stage.start()
        stage.gap("other_timeline")
        stage.assert_all_gone()


def test_a_promoted_standby_without_the_slot_is_taken_on_and_everything_is_swept(
    redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    with ExitStack() as stack:
        primary = stack.enter_context(Postgres())
        standby = stack.enter_context(_standby(primary))
        both = f"{HOST}:{primary.port},{HOST}:{standby.port}"
        dsn = primary.dsn.replace(f"{HOST}:{primary.port}", both) + "?target_session_attrs=read-write"
        stage = stack.enter_context(staged(dsn, redis_url, tmp_path, slot_name))
        stage.change()
        stage.settle()
        end = value(primary.dsn, "SELECT pg_current_wal_lsn()::text")
        eventually(lambda: value(standby.dsn, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", end), "it is replayed")
        # The standby never receives the last change: on it, the reader's entry is stale.
        standby.pause()
        stage.change()
        stage.settle()
        stage.cache("t:thing:2")
        stage.forget()
        primary.kill()
        standby.resume()
        execute(standby.dsn, "SELECT pg_promote()")
        stage.gap("new_slot")
        assert not stage.cached("t:thing:2")
        stage.assert_all_gone()


@contextmanager
def _standby(primary: Postgres) -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="standby-", dir=scratch()))
    give_to_nobody(folder)
    try:
        subprocess.run(  # type: ignore[call-overload]
            [primary.bin_dir / "pg_basebackup", "-d", primary.dsn, "-D", folder / "data", "-R", "-c", "fast"],
            **as_nobody(),
            cwd=folder,
            env=plain_environment(),
            check=True,
            capture_output=True,
        )
        with Postgres(folder) as standby:
            yield standby
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Redis.


@pytest.mark.parametrize("everything", [False, True], ids=["its key deleted", "FLUSHDB"])
def test_a_watermark_that_vanished_while_the_daemon_was_away_sweeps_everything(
    stage: GapStage, everything: bool
) -> None:
    stage.stop()
    if everything:
        stage.client.flushdb()
    else:
        stage.client.delete(f"cdc:{stage.slot}:watermark")
    stage.change()
    stage.start()
    stage.gap("no_watermark")
    stage.assert_all_gone()


@pytest.mark.parametrize("everything", [False, True], ids=["its key deleted", "FLUSHDB"])
def test_a_watermark_that_vanishes_while_the_daemon_streams_is_written_anew(stage: GapStage, everything: bool) -> None:
    stage.change()
    if everything:
        stage.client.flushdb()
    else:
        stage.client.delete(f"cdc:{stage.slot}:watermark")
    stage.change()
    stage.gap("no_watermark")
    eventually(lambda: watermark(stage.client, stage.slot), "there is a watermark again")
    stage.assert_all_gone()


@pytest.mark.parametrize("known", [False, True], ids=["never had a bust", "had busts once"])
def test_a_database_that_is_swapped_in_under_the_connection_is_swept(
    database: str, tmp_path: Path, slot_name: str, known: bool
) -> None:
    with (
        Valkey() as valkey,
        redis.Redis.from_url(valkey.url_for(1)) as other,
        staged(database, valkey.url_for(0), tmp_path, slot_name) as stage,
    ):
        if known:
            stage.client.copy(f"cdc:{slot_name}:watermark", f"cdc:{slot_name}:watermark", destination_db=1)
        other.set("t:thing:50", "old")
        other.set("t:thing:51", "never changed")
        execute(database, "UPDATE things SET n = 50 WHERE id = 50")
        stage.settle()
        assert other.exists("t:thing:50")
        stage.client.swapdb(0, 1)
        eventually(lambda: not stage.cached("t:thing:50"), "the other data are swept, or get what they lack")
        assert bool(stage.cached("t:thing:51")) == known
        stage.daemon.seen("gap", reason="redis_behind" if known else "no_watermark")
        stage.assert_all_gone()


@pytest.fixture
def valkey_with_snapshots() -> Iterator[Valkey]:
    """It saves when told to, and not when it is killed."""
    with Valkey(settings={"save": "3600 100000000", "enable-debug-command": "yes"}) as valkey:
        yield valkey


@pytest.mark.parametrize("running", [False, True], ids=["away", "running"])
def test_a_redis_that_comes_back_with_an_older_snapshot_is_noticed(
    database: str, valkey_with_snapshots: Valkey, tmp_path: Path, slot_name: str, running: bool
) -> None:
    valkey = valkey_with_snapshots
    with staged(database, valkey.url, tmp_path, slot_name) as stage:
        stage.cache("t:thing:50", "t:thing:1")
        stage.client.save()
        execute(database, "UPDATE things SET n = 50 WHERE id = 50")
        stage.change()
        stage.settle()
        assert not stage.cached("t:thing:50")
        # What is not confirmed yet would be received again: no gap.
        end = wal_position(database)
        eventually(lambda: confirmed(database, slot_name) >= end, "PostgreSQL will not send it again")
        if not running:
            stage.stop()
        valkey.kill()
        valkey.start()
        if running:
            # What it has lost is remembered: only that is busted anew.
            stage.daemon.seen("gap", reason="redis_behind", swept=False)
            stage.daemon.seen("bust", reason="replay", cache="thing")
            assert not stage.daemon.named("bust", action="sweep")
        else:
            assert stage.cached("t:thing:50")
            stage.start()
            stage.gap("missed_changes")
        assert not stage.cached("t:thing:50")
        stage.assert_all_gone()


def test_busts_acknowledged_while_a_long_sweep_holds_the_watermark_back_survive_an_older_snapshot(
    database: str, valkey_with_snapshots: Valkey, tmp_path: Path, slot_name: str
) -> None:
    valkey = valkey_with_snapshots
    with staged(database, valkey.url, tmp_path, slot_name) as stage:
        stage.crowd()
        stage.cache("t:thing:1")
        execute(database, "TRUNCATE others")
        eventually(lambda: stage.daemon.metric("cdc_invalidator_sweeps_running"), "the sweep has begun")
        stage.client.save()
        key = stage.change()
        eventually(lambda: not stage.cached(key), "the bust is acknowledged")
        assert stage.daemon.metric("cdc_invalidator_sweeps_running"), "more strangers, please"
        valkey.kill()
        valkey.start()
        stage.assert_all_gone()


# Rules.


def test_only_caches_whose_rules_are_new_or_changed_are_swept(stage: GapStage) -> None:
    stage.stop()
    stage.cache("t:thing:98", "t:thing:99", "t:other:99", "t:both:99")
    rules = pair.RULES.replace("  other:", '  both: {key: "t:both:{id}", ttl: 5m}\n  other:')
    stage.rules.write_text(rules.replace("bust: [thing]", "old_row: sweep, bust: [thing, both]"))
    stage.start()
    stage.gap("rules_changed", "both", "thing")
    assert not stage.cached("t:thing:98")
    assert not stage.cached("t:both:99")
    assert stage.cached("t:other:99")
    stage.assert_all_gone()
    stage.stop()
    stage.cache("t:thing:97", "t:both:97")
    stage.start()
    stage.assert_all_gone()
    assert stage.cached("t:thing:97")
    assert stage.cached("t:both:97")
    assert not stage.daemon.named("gap")


# What is done about a gap.


def test_with_on_gap_warn_a_gap_is_reported_once_and_nothing_is_swept(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *SCHEMA)
    rules = tmp_path / "rules.yaml"
    rules.write_text(pair.RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name, on_gap="warn") as daemon:
        stage = GapStage(daemon)
        daemon.ready()
        stage.stop()
        stage.cache("t:thing:99")
        execute(
            database,
            f"SELECT pg_drop_replication_slot('{slot_name}')",
            "UPDATE things SET n = 1 WHERE id = 99",
        )
        stage.start()
        assert daemon.seen("gap", reason="new_slot")["swept"] is False
        stage.settle()
        assert daemon.metric("cdc_invalidator_gaps_total", reason="new_slot") == 1
        assert stage.cached("t:thing:99"), "that is what warn means"
        assert not daemon.named("bust", reason="gap")
        stage.assert_all_gone()
        stage.stop()
        stage.start()
        stage.assert_all_gone()
        assert not daemon.named("gap")


def test_a_daemon_killed_in_the_middle_of_a_gaps_sweep_sweeps_again(
    database: str, valkey_with_snapshots: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey_with_snapshots.url, tmp_path, slot_name) as stage:
        stage.stop()
        stage.crowd()
        execute(database, f"SELECT pg_drop_replication_slot('{slot_name}')")
        for _ in range(10):
            stage.change()
        stage.start()
        stage.daemon.seen("gap", reason="new_slot")
        stage.daemon.kill()
        assert not stage.daemon.named("bust", reason="gap")
        stage.start()
        stage.gap("new_slot")
        stage.assert_all_gone()


# What the watermark says meanwhile.


def test_while_a_gap_is_swept_the_watermark_goes_on_without_its_caches(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, redis_url, tmp_path, slot_name, sweep_rate="2000") as stage:
        for number in range(4000):
            stage.client.set(f"stranger:{number}", 1)
        stage.cache("t:thing:1")
        assert stage.named() == {"thing", "other"}
        execute(database, "DROP TABLE things", SCHEMA[0], "INSERT INTO things VALUES (1, 2)")
        stage.daemon.seen("gap", reason="table_changed")
        assert stage.named() == {"other"}
        for number in (1, 2):
            stage.cache(f"t:other:{number}")
            execute(database, f"UPDATE others SET n = 1 WHERE id = {number}")
            stage.passed()
            assert not stage.cached(f"t:other:{number}")
        end = wal_position(database)
        eventually(lambda: confirmed(database, slot_name) >= end, "no WAL is held back")
        assert stage.daemon.metric("cdc_invalidator_gaps_open") == 1, "more strangers, please"
        assert stage.named() == {"other"}
        stage.settle()
        assert stage.named() == {"thing", "other"}
        assert not stage.cached("t:thing:1")
        stage.assert_all_gone()


def test_a_redis_without_memory_for_the_watermark_has_the_claim_taken_out_all_the_same(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        Valkey(settings={"maxmemory-policy": "noeviction"}) as valkey,
        staged(database, valkey.url, tmp_path, slot_name) as stage,
        psycopg.connect(database) as older,
    ):
        older.execute("INSERT INTO junk VALUES (1)")
        stage.cache("t:thing:1", "t:thing:2")
        stage.client.config_set("maxmemory", 1)
        stage.daemon.seen("watermark_stalled")
        assert stage.named() == {"thing", "other"}, "it stands still, and what it says is true"
        execute(
            database,
            f"ALTER PUBLICATION {slot_name} DROP TABLE things",
            "UPDATE things SET n = 1 WHERE id = 1",
            f"ALTER PUBLICATION {slot_name} ADD TABLE things",
        )
        stage.daemon.seen("gap", reason="table_changed")
        # What to say of the other caches is refused, too.
        assert stage.named() == set()
        eventually(lambda: not stage.cached("t:thing:1"), "it is swept")
        older.commit()
        eventually(lambda: stage.daemon.metric("cdc_invalidator_gaps_open") == 0, "it is swept once more")
        assert stage.named() == set()
        stage.client.config_set("maxmemory", 0)
        stage.settle()
        assert stage.named() == {"thing", "other"}
        stage.assert_all_gone()


@pytest.mark.parametrize("taken_over", [False, True], ids=["killed", "taken over"])
def test_what_was_settling_when_a_daemon_was_killed_is_swept_by_the_next(stage: GapStage, taken_over: bool) -> None:
    with psycopg.connect(stage.dsn) as older:
        older.execute("INSERT INTO junk VALUES (1)")
        with psycopg.connect(stage.dsn) as writer:
            execute(stage.dsn, f"ALTER PUBLICATION {stage.slot} DROP TABLE things")
            writer.execute("UPDATE things SET n = 1 WHERE id = 1")
            execute(stage.dsn, f"ALTER PUBLICATION {stage.slot} ADD TABLE things")
            stage.gap("table_changed", "thing")
            with ExitStack() as stack:
                if taken_over:
                    second = stack.enter_context(
                        RunningDaemon(dsn=stage.dsn, redis_url=stage.redis_url, rules=stage.rules, slot=stage.slot)
                    )
                    second.ready()
                    stage.daemon.kill()
                    assert second.seen("gap", caches=["thing"])["reason"] == "table_changed"
                    second.seen("bust", reason="gap", cache="thing")
                else:
                    stage.daemon.kill()
                    stage.start()
                    stage.gap("table_changed", "thing")
                # What a reader loads now is what was committed before.
                stage.cache("t:thing:1")
                stage.passed()
                assert stage.named() == {"other"}
                writer.commit()
                stage.passed()
                assert stage.named() == {"other"}, "another transaction of that time is not over"
                older.commit()
                eventually(lambda: not stage.cached("t:thing:1"), "it is swept once more")
                eventually(lambda: stage.named() == {"thing", "other"}, "the watermark names both caches")


def test_a_commit_that_waits_for_its_standby_while_the_slot_is_made_is_swept_for(
    redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    with Postgres(settings={"synchronous_standby_names": "nobody", "synchronous_commit": "local"}) as server:
        execute(server.dsn, *SCHEMA)
        rules = tmp_path / "rules.yaml"
        rules.write_text(pair.RULES)
        with (
            RunningDaemon(dsn=server.dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon,
            psycopg.connect(server.dsn) as first,
            psycopg.connect(server.dsn) as second,
            _hidden_update(server.dsn) as show,
        ):
            stage = GapStage(daemon)
            first.execute("INSERT INTO junk VALUES (1)")
            _waited_for(first)
            second.execute("INSERT INTO junk VALUES (2)")
            first.commit()
            _waited_for(second)
            next(show)
            second.commit()
            daemon.streams()
            stage.gap("new_slot")
            # What a reader loads now is what was committed before.
            assert value(server.dsn, "SELECT n FROM things WHERE id = 1") == 0
            stage.cache("t:thing:1")
            stage.passed()
            assert stage.named() == set()
            next(show)
            assert value(server.dsn, "SELECT n FROM things WHERE id = 1") == 1
            eventually(lambda: not stage.cached("t:thing:1"), "it is swept once more")
            eventually(lambda: stage.named() == {"thing", "other"}, "the watermark names both caches")
            stage.close()


def _waited_for(connection: psycopg.Connection[Any]) -> None:
    """Wait until somebody waits for the end of a transaction."""
    query = "SELECT 1 FROM pg_locks WHERE NOT granted AND transactionid::text = %s"
    row = connection.execute("SELECT pg_current_xact_id()::text").fetchone()
    assert row
    eventually(lambda: connection.execute(query, row).fetchone(), "it is waited for")


@contextmanager
def _hidden_update(dsn: str) -> Iterator[Iterator[None]]:
    """Give the steps of an update of thing 1: its commit waits for a standby; readers see it."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = on")
        statement = ["UPDATE things SET n = n + 1 WHERE id = 1"]
        committing = threading.Thread(target=connection.execute, args=statement, daemon=True)

        def steps() -> Iterator[None]:
            committing.start()
            waits = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'"
            eventually(lambda: value(dsn, waits, connection.info.backend_pid), "the commit waits")
            yield
            value(dsn, "SELECT pg_cancel_backend(%s)", connection.info.backend_pid)
            committing.join()
            yield

        try:
            yield steps()
        finally:
            value(dsn, "SELECT pg_cancel_backend(%s)", connection.info.backend_pid)
            committing.join()


def test_a_prepared_transaction_keeps_a_gap_open_and_holds_up_nothing_else(
    redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        Postgres(settings={"max_prepared_transactions": "2"}) as server,
        staged(server.dsn, redis_url, tmp_path, slot_name) as stage,
    ):
        execute(stage.dsn, f"ALTER PUBLICATION {slot_name} DROP TABLE things")
        execute(stage.dsn, "BEGIN; UPDATE things SET n = 1 WHERE id = 1; PREPARE TRANSACTION 'forgotten'")
        execute(stage.dsn, f"ALTER PUBLICATION {slot_name} ADD TABLE things")
        stage.gap("table_changed", "thing")
        stage.cache("t:thing:1", "t:other:1")
        execute(stage.dsn, "UPDATE others SET n = 1 WHERE id = 1")
        stage.passed()
        assert stage.cached("t:thing:1", "t:other:1") == ["t:thing:1"]
        assert stage.named() == {"other"}
        end = wal_position(stage.dsn)
        eventually(lambda: confirmed(stage.dsn, slot_name) >= end, "no WAL is held back")
        waits = stage.daemon.seen("gap_waits")
        assert waits["caches"] == ["thing"]
        found = value(stage.dsn, "SELECT transaction::text FROM pg_prepared_xacts")
        assert str(waits["xid"]) == found
        execute(stage.dsn, "COMMIT PREPARED 'forgotten'")
        eventually(lambda: not stage.cached("t:thing:1"), "it is swept once more")
        stage.settle()
        assert stage.named() == {"thing", "other"}


# The publication, which PostgreSQL before 18 can't decode without.


@pytest.fixture(params=sorted(postgres_bin_dirs(), reverse=True), ids=lambda version: f"PostgreSQL {version}")
def any_stage(
    request: pytest.FixtureRequest, servers: Callable[[int], Postgres], redis_url: str, tmp_path: Path
) -> Iterator[GapStage]:
    slot = f"{request.node.originalname[:40]}_{request.param}"
    server = servers(request.param)
    dsn = server.create_database(slot)
    with staged(dsn, redis_url, tmp_path, slot) as stage:
        yield stage
    server.drop_database(slot)


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[int], Postgres]]:
    with ExitStack() as stack:
        started: dict[int, Postgres] = {}

        def of(version: int) -> Postgres:
            if version not in started:
                started[version] = stack.enter_context(Postgres(bin_dir=postgres_bin_dirs()[version]))
            return started[version]

        yield of


def test_a_publication_dropped_while_the_daemon_streams_is_made_anew(any_stage: GapStage) -> None:
    stage = any_stage
    execute(stage.dsn, f"DROP PUBLICATION {stage.slot}")
    key = stage.change()
    eventually(lambda: not stage.cached(key), "what was changed meanwhile is swept")
    stage.daemon.seen("gap")
    eventually(lambda: _published(stage) == 2, "both tables are published again")
    stage.assert_all_gone()
    stage.assert_all_gone()


def test_a_publication_dropped_while_the_daemon_was_away_is_made_anew(any_stage: GapStage) -> None:
    stage = any_stage
    stage.stop()
    stage.change()
    execute(stage.dsn, f"DROP PUBLICATION {stage.slot}")
    stage.change()
    stage.start()
    stage.gap("new_slot")
    stage.assert_all_gone()


@pytest.mark.parametrize("tables", ["TABLE things, others", "ALL TABLES"])
def test_a_publication_made_anew_by_somebody_while_the_daemon_was_away_is_noticed(
    any_stage: GapStage, tables: str
) -> None:
    stage = any_stage
    stage.stop()
    execute(stage.dsn, f"DROP PUBLICATION {stage.slot}", f"CREATE PUBLICATION {stage.slot} FOR {tables}")
    stage.start()
    stage.assert_all_gone()
    stage.stop()
    execute(stage.dsn, f"DROP PUBLICATION {stage.slot}")
    stage.change()
    execute(stage.dsn, f"CREATE PUBLICATION {stage.slot} FOR {tables}")
    stage.start()
    stage.daemon.seen("gap")
    stage.assert_all_gone()


def _published(stage: GapStage) -> int:
    return int(value(stage.dsn, "SELECT count(*) FROM pg_publication_tables WHERE pubname = %s", stage.slot))
