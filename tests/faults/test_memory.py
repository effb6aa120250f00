"""A Redis without memory to spare: deletes go through, versions and the watermark do no harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import reading
import redis
from running import RunningDaemon, command, eventually, execute, settled, wal_position, watermark

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from pathlib import Path


def test_with_noeviction_busts_go_through_and_the_watermark_stalls_and_says_so(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        Valkey(settings={"maxmemory-policy": "noeviction"}) as valkey,
        redis.Redis.from_url(valkey.url) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        client.mset({"t:{1}:count": 0, "t:{1}:count\0lock": "token", "t:{1}:ver": 1, "t:{1}:page:1": 0})
        client.config_set("maxmemory", 1)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        eventually(lambda: not client.exists("t:{1}:count", "t:{1}:count\0lock", "t:{1}:ver"), "all is busted")
        assert daemon.seen("watermark_stalled")["level"] == "warning"
        stalled = watermark(client, slot_name)
        assert daemon.metric("cdc_invalidator_watermark_stalled") == 1
        assert int(stalled[b"lsn"]) < wal_position(database)
        execute(database, "UPDATE counters SET n = 2 WHERE id = 1")
        # PostgreSQL is not made to keep the WAL for it, and memory comes back one day.
        client.config_set("maxmemory", 0)
        settled(database, client, slot_name)
        eventually(lambda: daemon.metric("cdc_invalidator_watermark_stalled") == 0, "it says that as well")
        assert not daemon.errors


def test_a_daemon_that_restarts_while_the_watermark_is_stalled_sweeps(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        Valkey(settings={"maxmemory-policy": "noeviction"}) as valkey,
        redis.Redis.from_url(valkey.url) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        client.set("t:{2}:count", 0)
        client.config_set("maxmemory", 1)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        daemon.seen("watermark_stalled")
        assert daemon.terminate() == 0
        daemon.start()
        daemon.seen("gap", reason="missed_changes")
        eventually(lambda: not client.exists("t:{2}:count"), "it is swept")
        client.config_set("maxmemory", 0)
        settled(database, client, slot_name)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_evicted_versions_and_an_evicted_watermark_do_no_harm(
    database: str, tmp_path: Path, slot_name: str, policy: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        Valkey(settings={"maxmemory-policy": policy}) as valkey,
        redis.Redis.from_url(valkey.url) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name) as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", used + 3_000_000)
        with reading.Application(database, lambda: redis.Redis.from_url(valkey.url), writers=2, readers=4) as app:
            for number in range(4000):
                # Others fill the memory up, so that Redis evicts whatever it likes.
                client.set(f"filler:{number}", "x" * 4000)
                if number % 500 == 0:
                    client.delete(f"cdc:{slot_name}:watermark")
        assert app.hits > 0
        assert int(client.info("stats")["evicted_keys"]) > 1000
        given = {"postgres_dsn": database, "redis_url": valkey.url, "rules": rules, "slot": slot_name}
        checked = command("check", **given, publication=slot_name)
        assert ("allkeys-random" in checked.stdout) == (policy == "allkeys-random")
        # Nothing proves that it was evicted, and not that the data are others.
        daemon.seen("gap", reason="no_watermark", swept=True)
        settled(database, client, slot_name)
        assert reading.stale(database, client) == {}
        assert not daemon.errors
