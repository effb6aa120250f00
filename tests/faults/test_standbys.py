"""Readers on standbys that lag: stale only until the standby has replayed; one that is lost holds up nobody."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
import reading
import redis
from running import RunningDaemon, confirmed, eventually, execute, wal_position, watermark
from stage import Stage
from standby import Standby
from writing import assert_nothing_confirmed_too_early

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Postgres, Valkey, postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def primary() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def dsn(primary: Postgres, slot_name: str) -> Iterator[str]:
    dsn = primary.create_database(slot_name)
    reading.create(dsn)
    yield dsn
    primary.drop_database(slot_name)


@pytest.fixture
def standby(primary: Postgres, dsn: str) -> Iterator[Standby]:
    with Standby(primary) as standby:
        standby.catch_up()
        yield standby


class StandbyStage(Stage):
    """A daemon whose watermark speaks for the readers of a standby as well."""

    def __init__(self, daemon: RunningDaemon, standby: Standby, client: Any = None) -> None:
        super().__init__(daemon, client)
        self.standby = standby
        self.read_dsn = standby.dsn_for(daemon.slot)
        self.name = f"{HOST}:{standby.port}"

    def end(self) -> None:
        """Judge nothing: tests do."""

    def application(self) -> reading.Application:
        return reading.Application(
            self.dsn, lambda: redis.Redis.from_url(self.redis_url), read_dsn=self.read_dsn, writers=2, readers=4
        )

    def lsn(self) -> int:
        return int(watermark(self.client, self.daemon.slot).get(b"lsn", 0))

    def dropped(self) -> list[str]:
        found = json.loads(watermark(self.client, self.daemon.slot).get(b"standbys", b"{}"))
        return [name for name, started in found.items() if started is None]

    def awaited(self) -> Self:
        """Wait until the watermark speaks for the standby's readers."""
        found = json.loads(watermark(self.client, self.daemon.slot).get(b"standbys", b"{}"))
        eventually(lambda: self.daemon.status()["dropped_standbys"] == self.dropped() == [], f"it is taken in: {found}")
        return self

    def fill_from_standby(self, number: int) -> int:
        """Cache what a reader of the standby sees."""
        with psycopg.connect(self.read_dsn, autocommit=True) as connection:
            row = connection.execute("SELECT n FROM counters WHERE id = %s", [number]).fetchone()
        assert row is not None
        self.client.set(f"t:{{{number}}}:count", row[0])
        return int(row[0])

    def assert_nothing_stale(self) -> None:
        self.settle()
        assert reading.stale(self.dsn, self.client) == {}
        assert_nothing_confirmed_too_early(self.dsn, self.client, self.daemon.slot)
        assert not self.daemon.errors


@contextlib.contextmanager
def staged(
    dsn: str, standby: Standby, redis_url: str, client: redis.Redis, folder: Path, slot: str, **settings: str
) -> Iterator[StandbyStage]:
    rules = reading.rules_file(folder)
    settings = {"postgres_standbys": standby.dsn_for(slot), **settings}
    with StandbyStage.playing(dsn, redis_url, rules, slot, standby, client=client, **settings) as stage:
        yield stage


@pytest.fixture
def stage(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> Iterator[StandbyStage]:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name) as stage:
        yield stage.awaited()


def test_what_a_lagging_standbys_readers_cache_is_stale_until_its_replay_goes_on(stage: StandbyStage) -> None:
    with stage.application() as app:
        app.run(0.5)
        stage.standby.pause_replay()
        before = stage.lsn()
        app.run(1.5)
        position = wal_position(stage.dsn)
        assert stage.lsn() < position, "the watermark waits for the standby"
        app.stop_writing()
        eventually(lambda: reading.stale(stage.dsn, stage.client), "readers of the standby cache old rows")
        assert confirmed(stage.dsn, stage.daemon.slot) <= stage.lsn()
        assert stage.lsn() >= before
        stage.standby.resume_replay()
        stage.assert_nothing_stale()
        app.run(0.5)
    stage.assert_nothing_stale()
    assert reading.entries(stage.client) > 0
    assert stage.daemon.metric("cdc_invalidator_busted_again_total", reason="standby") > 0


def test_without_being_named_a_lagging_standby_leaves_stale_entries(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    """What the others are about: this is what they would find, were the second bust not there."""
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, postgres_standbys="") as stage:
        standby.pause_replay()
        execute(dsn, "UPDATE counters SET n = n + 1 WHERE id = 1")
        stage.settle()
        assert stage.fill_from_standby(1) == 0
        standby.resume_replay()
        standby.catch_up()
        stage.settle()
        assert reading.stale(dsn, redis_client)


def test_busts_are_applied_at_once_and_again_after_the_replay(stage: StandbyStage) -> None:
    stage.standby.pause_replay()
    stage.client.set("t:{1}:count", 0)
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 1")
    eventually(lambda: not stage.client.exists("t:{1}:count"), "it is busted at once")
    assert stage.fill_from_standby(1) == 0
    stage.standby.resume_replay()
    eventually(lambda: not stage.client.exists("t:{1}:count"), "it is busted again")
    stage.assert_nothing_stale()


def test_a_sweep_is_repeated_after_the_replay(stage: StandbyStage) -> None:
    stage.standby.pause_replay()
    execute(stage.dsn, "TRUNCATE counters")
    stage.daemon.seen("bust", action="sweep", reason="truncate")
    assert stage.fill_from_standby(1) == 0
    stage.standby.resume_replay()
    eventually(lambda: not stage.client.exists("t:{1}:count"), "it is swept again")


def test_the_sweep_of_a_gap_is_repeated_after_the_replay(stage: StandbyStage) -> None:
    stage.daemon.terminate()
    execute(stage.dsn, f"SELECT pg_drop_replication_slot('{stage.daemon.slot}')")
    stage.standby.pause_replay()
    # Without a slot, this is missed: all that the gap's sweep can be for.
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 1")
    stage.daemon.events.clear()
    stage.daemon.start().streams()
    stage.daemon.seen("gap", reason="new_slot")
    for cache in ("count", "page"):
        stage.daemon.seen("bust", action="sweep", reason="gap", cache=cache)
    # The position waits for no gap: the watermark passes what was missed, and says nothing of the caches.
    stage.passed()
    assert stage.fill_from_standby(1) == 0
    assert stage.named() == set()
    stage.standby.resume_replay()
    stage.assert_nothing_stale()
    assert stage.named() == {"count", "page"}


def test_a_standby_that_lags_too_long_is_dropped_loudly_and_swept_for_when_it_is_back(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, standby_limit="1") as stage:
        stage.awaited()
        standby.pause_replay()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.settle()
        event = stage.daemon.seen("standby_dropped", standby=stage.name, level="error")
        assert "wait no longer" in event["error"]
        assert stage.daemon.metric("cdc_invalidator_standby_awaited", standby=stage.name) == 0
        assert stage.daemon.status()["dropped_standbys"] == [stage.name]
        assert stage.dropped() == [stage.name]
        # What is read from it meanwhile is stale, and stays so until it is back.
        assert stage.fill_from_standby(1) == 0
        standby.resume_replay()
        stage.daemon.seen("standby_returned", standby=stage.name)
        stage.daemon.seen("gap", reason="standby_returned")
        eventually(lambda: not stage.client.exists("t:{1}:count"), "what its readers cached is swept")
        eventually(lambda: stage.dropped() == [], "the watermark speaks for its readers again")
        stage.assert_nothing_stale()
        assert stage.daemon.metric("cdc_invalidator_standby_awaited", standby=stage.name) == 1
        # It is waited for again.
        standby.pause_replay()
        position = wal_position(dsn)
        execute(dsn, "UPDATE counters SET n = 2 WHERE id = 1")
        eventually(lambda: stage.lsn() >= position, "all before is in")
        standby.resume_replay()
        stage.assert_nothing_stale()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_standby_that_is_down_is_dropped_and_taken_back(
    dsn: str,
    standby: Standby,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
    slot_name: str,
    how: str,
) -> None:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, standby_limit="1") as stage:
        stage.awaited()
        standby.kill() if how == "killed" else standby.pause()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.settle()
        stage.daemon.seen("standby_dropped", standby=stage.name)
        standby.start() if how == "killed" else standby.resume()
        stage.daemon.seen("gap", reason="standby_returned")
        eventually(lambda: stage.dropped() == [], "the watermark speaks for its readers again")
        stage.assert_nothing_stale()


def test_a_standby_that_was_restarted_is_dropped_and_swept_for_when_it_has_caught_up(stage: StandbyStage) -> None:
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 1")
    stage.settle()
    stage.daemon.events.clear()
    # It counts from its next start on, and lets us decide when it catches up.
    execute(stage.standby.dsn, "ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
    stage.standby.kill()
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 2")
    stage.standby.start()
    event = stage.daemon.seen("standby_dropped", standby=stage.name, level="error")
    assert "restarted" in event["error"]
    stage.settle()
    assert stage.dropped() == [stage.name]
    assert stage.fill_from_standby(2) == 0
    # All busts of this one have been, and had been replayed: what is shown now is older.
    stage.client.set("t:{1}:count", 0)
    assert not stage.daemon.named("standby_returned")
    execute(stage.standby.dsn, "ALTER SYSTEM RESET recovery_min_apply_delay", "SELECT pg_reload_conf()")
    stage.daemon.seen("standby_returned", standby=stage.name)
    stage.daemon.seen("gap", reason="standby_returned")
    eventually(lambda: stage.dropped() == [], "the watermark speaks for its readers again")
    stage.assert_nothing_stale()


def test_a_redis_that_is_away_for_longer_than_the_limit_drops_no_standby(
    dsn: str, standby: Standby, tmp_path: Path, slot_name: str
) -> None:
    with (
        Valkey() as valkey,
        redis.Redis.from_url(valkey.url) as client,
        staged(dsn, standby, valkey.url, client, tmp_path, slot_name, standby_limit="4") as stage,
    ):
        stage.awaited()
        standby.pause_replay()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.daemon.seen("bust", cache="count", op="update")
        # While this waits for the standby, Redis goes.
        valkey.kill()
        standby.resume_replay()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 2")
        standby.catch_up()
        eventually(
            lambda: sum(event["retry_in_s"] for event in stage.daemon.named("redis_unavailable")) > 6,
            "Redis has been away for longer than the limit",
        )
        valkey.start()
        stage.settle()
        assert not stage.daemon.named("standby_dropped")
        assert stage.daemon.status()["dropped_standbys"] == stage.dropped() == []
        stage.assert_nothing_stale()


def test_a_standby_is_asked_about_once_a_second_while_nothing_waits_for_it(stage: StandbyStage) -> None:
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 1")
    stage.settle()
    asked: list[dt.datetime] = []
    query = "SELECT query_start FROM pg_stat_activity WHERE application_name = 'cdc-invalidator standby'"
    with psycopg.connect(stage.standby.dsn, autocommit=True) as connection:

        def rests() -> bool:
            asked.extend(at for (at,) in connection.execute(query) if at not in asked[-1:])
            return all(later - earlier > dt.timedelta(seconds=0.5) for earlier, later in pairwise(asked[-4:]))

        eventually(lambda: rests() and len(asked) >= 4, "it is left alone")
    assert asked[-1] - asked[-4] < dt.timedelta(seconds=10)


def test_a_daemon_that_starts_later_knows_which_standby_was_dropped(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, standby_limit="1") as stage:
        stage.awaited()
        standby.pause_replay()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.settle()
        eventually(lambda: stage.dropped() == [stage.name], "the watermark says so")
        stage.daemon.kill()
        assert stage.fill_from_standby(1) == 0
        standby.resume_replay()
        standby.catch_up()
        stage.daemon.events.clear()
        stage.daemon.start().ready()
        stage.daemon.seen("gap", reason="standby_returned")
        eventually(lambda: not stage.client.exists("t:{1}:count"), "what its readers cached is swept")
        stage.assert_nothing_stale()


def test_a_dropped_standby_that_is_not_named_any_more_is_swept_for_at_once(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, standby_limit="1") as stage:
        stage.awaited()
        standby.pause_replay()
        execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.settle()
        eventually(lambda: stage.dropped() == [stage.name], "the watermark says so")
        assert stage.fill_from_standby(1) == 0
        stage.daemon.kill()
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, postgres_standbys="") as stage:
        stage.daemon.seen("gap", reason="standby_removed")
        eventually(lambda: stage.dropped() == [], "the watermark speaks for its readers again")
        stage.assert_nothing_stale()


def test_what_waits_for_a_standby_is_bounded_by_widening(stage: StandbyStage) -> None:
    stage.standby.pause_replay()
    execute(stage.dsn, "INSERT INTO counters SELECT id, 0 FROM generate_series(1000, 250000) id")
    execute(stage.dsn, "UPDATE counters SET n = n + 1 WHERE id = 1")
    eventually(
        lambda: stage.daemon.metric("cdc_invalidator_busted_keys_total", cache="count") > 240_000, "it is busted"
    )
    stage.fill_from_standby(1)
    stage.standby.resume_replay()
    stage.settle()
    assert not stage.client.exists("t:{1}:count")
    assert stage.daemon.named("bust", action="sweep", reason="change")


def test_a_server_that_is_no_standby_of_the_database_is_told_and_dropped(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    # Servers of one version are copies of one data directory here: another version has another identifier.
    *others, _ = postgres_bin_dirs().values()
    if not others:
        pytest.skip("only one version of PostgreSQL is here")
    with Postgres(bin_dir=others[-1]) as stranger:
        settings = {"postgres_standbys": stranger.dsn, "standby_limit": "1"}
        with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, **settings) as stage:
            execute(dsn, "UPDATE counters SET n = 1 WHERE id = 1")
            assert "CDC_POSTGRES_STANDBYS" in stage.daemon.seen("standby_unavailable", level="error")["error"]
            assert stage.daemon.status()["dropped_standbys"] == [f"{HOST}:{stranger.port}"]
            stage.settle()


def test_a_standby_that_is_promoted_holds_up_nobody(
    dsn: str, standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(dsn, standby, redis_url, redis_client, tmp_path, slot_name, standby_limit="1") as stage:
        stage.awaited()
        standby.promote()
        for number in range(1, 6):
            execute(dsn, f"UPDATE counters SET n = n + 1 WHERE id = {number}")
        stage.settle()
        stage.daemon.seen("standby_dropped", standby=stage.name)


def test_a_daemon_killed_while_a_standby_lags_busts_again_after_its_restart(stage: StandbyStage) -> None:
    stage.standby.pause_replay()
    execute(stage.dsn, "UPDATE counters SET n = 1 WHERE id = 1")
    eventually(lambda: stage.daemon.named("bust", cache="count", op="update"), "it is busted at once")
    stage.daemon.kill()
    assert stage.fill_from_standby(1) == 0
    stage.daemon.start().ready()
    stage.fill_from_standby(1)
    stage.standby.resume_replay()
    stage.assert_nothing_stale()
