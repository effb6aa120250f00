"""Redis comes back without busts that it had acknowledged: what it lacks is busted anew, and nothing stale is left."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import reading
import redis
from prometheus_client import CollectorRegistry
from running import SECONDS, RunningDaemon, eventually, execute, settled, wal_position, watermark
from sentinels import Sentinels
from stage import Stage
from writing import assert_nothing_confirmed_too_early

from cdc_invalidator import log
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.apply import Apply
from cdc_invalidator.pipeline.backlog import Backlog
from cdc_invalidator.pipeline.checkpoint import Checkpoint
from cdc_invalidator.pipeline.continuity import Kept
from cdc_invalidator.pipeline.derive import Queries
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.followup import PostgresView
from cdc_invalidator.pipeline.recent import Recent
from cdc_invalidator.pipeline.sweep import SweepOptions
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.snapshot import Horizon
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis import sentinel
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.single import Single
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.watermark import Position
from cdc_invalidator.rules.model import RuleSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from cdc_invalidator.redis.node import Node


class FailoverStage(Stage):
    """A database, a daemon and an application; its cache is wherever ``where`` says."""

    def __init__(self, daemon: RunningDaemon, where: Callable[[], str], client: Any = None) -> None:
        super().__init__(daemon, client)
        self._where = where
        self.app = reading.Application(self.dsn, self.connect, writers=2, readers=4, settle=self.settle)

    def end(self) -> None:
        """Judge nothing: tests do."""

    def connect(self) -> redis.Redis:
        return redis.Redis.from_url(self._where(), socket_timeout=2)

    def assert_nothing_stale(self) -> None:
        self.app.stop()
        self.settle()
        with self.connect() as client:
            assert reading.stale(self.dsn, client) == {}
            assert reading.entries(client) > 0
            assert_nothing_confirmed_too_early(self.dsn, client, self.daemon.slot)
        assert self.app.hits > 0
        assert not self.daemon.errors

    def sweeps(self) -> int:
        return len(self.daemon.named("bust", action="sweep"))


@contextlib.contextmanager
def staged(
    dsn: str, url: str, folder: Path, slot: str, where: Callable[[], str], **settings: str
) -> Iterator[FailoverStage]:
    reading.create(dsn)
    rules = reading.rules_file(folder)
    with FailoverStage.playing(dsn, url, rules, slot, where, **settings) as stage:
        yield stage


# Sentinel.


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    with Sentinels() as sentinels:
        yield sentinels


def test_a_replica_that_lagged_is_promoted_and_is_given_the_busts_that_it_lacks(
    database: str, sentinels: Sentinels, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, sentinels.url, tmp_path, slot_name, sentinels.current_url) as stage:
        with stage.app:
            stage.app.run(1)
            sentinels.hold_back()
            swept = stage.sweeps()
            stage.app.run(2)
            sentinels.lose_master()
            sentinels.promoted()
            stage.app.run(1)
        stage.assert_nothing_stale()
        stage.daemon.seen("gap", reason="redis_behind", swept=False)
        assert stage.daemon.metric("cdc_invalidator_redis_behind_transactions_total") > 0
        assert stage.sweeps() == swept, "what it lacked was known key by key"


def test_without_a_memory_of_the_busts_a_promoted_replica_is_swept(
    database: str, sentinels: Sentinels, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, sentinels.url, tmp_path, slot_name, sentinels.current_url) as stage:
        with stage.app:
            stage.app.run(1)
            sentinels.hold_back()
            stage.app.run(1)
            stage.app.stop()
            stage.settle()
            # The next daemon knows nothing of what this one has busted.
            stage.daemon.kill()
            sentinels.lose_master()
            sentinels.promoted()
            with stage.connect() as client:
                assert reading.stale(database, client), "the replica has old values"
            stage.daemon.start()
            stage.daemon.ready()
        stage.daemon.seen("gap", reason="missed_changes")
        stage.settle()
        with stage.connect() as client:
            assert reading.stale(database, client) == {}


def test_an_old_master_that_goes_on_alone_is_left_for_the_one_that_sentinel_names(
    database: str, sentinels: Sentinels, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, sentinels.url, tmp_path, slot_name, sentinels.current_url) as stage:
        with stage.app:
            stage.app.run(0.5)
            # To the Sentinels it seems dead; to us it answers as before once it wakes up.
            sentinels.master.pause()
            sentinels.promoted()
            sentinels.master.resume()
            stage.app.run(3)
            with redis.Redis.from_url(sentinels.replica.url) as client:
                eventually(lambda: reading.entries(client), "readers have found the new master")
        stage.assert_nothing_stale()
        with redis.Redis.from_url(sentinels.replica.url) as client:
            assert watermark(client, slot_name)


def test_sentinels_that_are_all_away_stop_nothing_while_the_master_is_there(
    database: str, sentinels: Sentinels, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, sentinels.url, tmp_path, slot_name, lambda: sentinels.master.url) as stage:
        for sentinel in sentinels.sentinels:
            sentinel.kill()
        with stage.app:
            stage.app.run(2)
        stage.assert_nothing_stale()
        assert not stage.daemon.named("redis_unavailable")


def test_looking_for_the_master_ends_when_connecting_to_it_is_cancelled(sentinels: Sentinels) -> None:
    asyncio.run(_cancelled_while_connecting(sentinels))


async def _cancelled_while_connecting(sentinels: Sentinels) -> None:
    found = asyncio.Event()

    def open_server() -> CacheServer:
        looking = sentinel.Sentinels(EndpointSource.fixed(sentinels.url), timeout=30)

        async def find() -> Node:
            node = await looking.open_master()
            # It was there, and falls silent in the middle.
            sentinels.master.pause()
            found.set()
            return node

        return Single("s", find, why_lost=looking.why_lost, close=looking.close)

    applying = asyncio.create_task(_apply(open_server).run())
    try:
        async with asyncio.timeout(SECONDS):
            await found.wait()
            assert _connections(sentinels) == 3
            while not applying.done():
                # As a session does it: an older asyncio swallows some of these.
                applying.cancel()
                await asyncio.wait({applying}, timeout=0.1)
    finally:
        sentinels.master.resume()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    eventually(lambda: _connections(sentinels) == 0, "the Sentinels are left alone")


def _connections(sentinels: Sentinels) -> int:
    return sum(
        client["name"] == "cdc-invalidator"
        for one in sentinels.sentinels
        for client in sentinels.ask(one, "CLIENT LIST")
    )


def _apply(open_server: Callable[[], CacheServer]) -> Apply:
    async def hidden(_: Iterable[int]) -> set[int]:
        return set()

    async def horizon() -> Horizon:
        return Horizon(3, 3)

    async def reached() -> int:
        return 100

    metrics = Metrics(CollectorRegistry())
    events = Events(metrics, log.KeyDisplay("prefix"), log.EventLog(log.Output(1), "json", "info"))
    return Apply(
        open_server,
        PostgresView(
            hidden, Queries(DsnSource.fixed("host=nowhere")), Standbys(str, limit=1, metrics=metrics), horizon, reached
        ),
        Kept(RuleSet({}, (), ""), {}, Position("1", 1, 100, 100), Recent()),
        backlog=Backlog(),
        checkpoint=Checkpoint(100),
        suspicious=False,
        sweeps=SweepOptions(),
        metrics=metrics,
        events=events,
        inspection=Verify(0, 0, metrics=metrics, events=events),
    )


# One server.


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A Valkey of the test's own, that saves when it is told to."""
    with Valkey(settings={"save": "3600 100000000", "enable-debug-command": "yes"}) as valkey:
        yield valkey


def test_a_restored_snapshot_is_given_the_busts_that_it_lacks(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url) as stage:
        with stage.app:
            stage.app.run(1)
            with stage.connect() as client:
                client.save()
            stage.app.run(1.5)
            valkey.kill()
            valkey.start()
            stage.app.run(1)
        stage.assert_nothing_stale()
        stage.daemon.seen("gap", reason="redis_behind")


def test_a_snapshot_older_than_the_memory_is_swept(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url) as stage:
        execute(database, "CREATE TABLE IF NOT EXISTS junk (n int)")
        with stage.connect() as client:
            client.set("t:{1}:count", 0)
            client.save()
            execute(
                database,
                "UPDATE counters SET n = 1 WHERE id = 1",
                # More keys than are remembered, which pushes the one before out.
                "INSERT INTO counters SELECT id, 0 FROM generate_series(1000, 120000) id",
            )
            settled(database, client, slot_name)
            valkey.kill()
            valkey.start()
            assert client.get("t:{1}:count")
            stage.daemon.seen("gap", reason="missed_changes")
            settled(database, client, slot_name)
            assert not client.exists("t:{1}:count")


@pytest.mark.parametrize("running", [True, False], ids=["running", "away"])
def test_a_flushed_redis_is_no_harm(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str, running: bool
) -> None:
    with staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url) as stage:
        with stage.app:
            stage.app.run(0.5)
            if not running:
                stage.daemon.kill()
            with stage.connect() as client:
                client.flushall()
            stage.app.run(0.5)
            if not running:
                stage.daemon.start().ready()
                stage.daemon.seen("gap", reason="no_watermark")
            stage.app.run(0.5)
        stage.assert_nothing_stale()


def test_another_instance_under_the_same_address_is_noticed(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url) as stage:
        with Valkey(settings={"save": "3600 100000000"}) as other:
            with redis.Redis.from_url(other.url) as client:
                client.mset({f"t:{{{number}}}:count": -1 for number in range(1, 61)})
                client.save()
            snapshot = (other.folder / "dump.rdb").read_bytes()
        with stage.app:
            stage.app.run(0.5)
            valkey.kill()
            (valkey.folder / "dump.rdb").write_bytes(snapshot)
            valkey.start()
            stage.app.run(1)
        stage.assert_nothing_stale()
        stage.daemon.seen("gap", reason="no_watermark")


def test_another_data_set_under_a_connection_that_stands_is_noticed(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url) as stage, stage.connect() as client:
        client.set("t:{1}:count", 0)
        client.save()
        shutil.copy(valkey.folder / "dump.rdb", tmp_path / "older.rdb")
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        settled(database, client, slot_name)
        assert not client.exists("t:{1}:count")
        shutil.copy(tmp_path / "older.rdb", valkey.folder / "dump.rdb")
        # It loads the file and drops nobody's connection.
        client.execute_command("DEBUG", "RELOAD", "NOSAVE")
        assert client.exists("t:{1}:count")
        stage.daemon.seen("redis_unavailable", code="OTHER_DATA")
        stage.daemon.seen("gap", reason="redis_behind")
        end = wal_position(database)
        eventually(lambda: int(watermark(client, slot_name).get(b"lsn", 0)) >= end, "the watermark goes on")
        assert not client.exists("t:{1}:count")


AGAIN = """
version: 1
caches:
  count: {key: "t:{{{id}}}:count", ttl: 5m, again_after: 8s}
  other: {key: "o:{id}", ttl: 5m}
rules:
  - {name: counter-changed, table: public.counters, bust: [count]}
  - {name: other-changed, table: public.others, bust: [other]}
"""


def test_an_older_data_set_with_the_same_position_is_noticed(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    execute(database, "CREATE TABLE others (id int PRIMARY KEY, n int)", "INSERT INTO others VALUES (1, 0)")
    rules = reading.rules_file(tmp_path, AGAIN)
    with (
        redis.Redis.from_url(valkey.url) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):

        def written_anew() -> Mapping[bytes, bytes]:
            before = watermark(client, slot_name)
            eventually(lambda: watermark(client, slot_name)[b"at"] != before[b"at"], "the watermark is written anew")
            return watermark(client, slot_name)

        daemon.ready()
        settled(database, client, slot_name)
        client.set("o:1", 0)
        # Until its second bust, the position stands.
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        daemon.seen("bust", cache="count", op="update")
        held = written_anew()
        client.save()
        shutil.copy(valkey.folder / "dump.rdb", tmp_path / "older.rdb")
        execute(database, "UPDATE others SET n = 1 WHERE id = 1")
        eventually(lambda: not client.exists("o:1"), "it is busted")
        assert written_anew()[b"lsn"] == held[b"lsn"]
        shutil.copy(tmp_path / "older.rdb", valkey.folder / "dump.rdb")
        client.execute_command("DEBUG", "RELOAD", "NOSAVE")
        assert client.exists("o:1")
        daemon.seen("redis_unavailable", code="OTHER_DATA")
        eventually(lambda: not client.exists("o:1"), "it is busted anew")
        assert daemon.metric("cdc_invalidator_redis_behind_transactions_total") >= 1
        settled(database, client, slot_name)
        assert not daemon.errors


def test_where_gaps_are_only_reported_what_is_remembered_is_applied_anew(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.mset({"t:{1}:count": 0, "t:{2}:count": 0})
        client.save()
    with (
        staged(database, valkey.url, tmp_path, slot_name, lambda: valkey.url, on_gap="warn") as stage,
        stage.connect() as client,
    ):
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        stage.settle()
        assert not client.exists("t:{1}:count")
        valkey.kill()
        valkey.start()
        # What it has now is from before our first watermark.
        stage.daemon.seen("gap", reason="no_watermark", swept=False)
        eventually(lambda: not client.exists("t:{1}:count"), "it is busted anew")
        stage.settle()
        assert client.exists("t:{2}:count"), "nothing is swept"
        assert stage.sweeps() == 0
        assert reading.stale(database, client) == {}
        assert not stage.daemon.errors
