"""Sweeps of a large Redis: paced, telling how far they are, with live busts in between."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import reading
import redis
from running import RunningDaemon, eventually, execute, settled

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from pathlib import Path


def test_a_paced_sweep_tells_its_progress_and_live_busts_go_on_meanwhile(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    with (
        Valkey(settings={"enable-debug-command": "yes"}) as valkey,
        redis.Redis.from_url(valkey.url) as client,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name, sweep_rate="10000") as daemon,
    ):
        daemon.ready()
        settled(database, client, slot_name)
        client.execute_command("DEBUG", "POPULATE", 60_000, "stranger", 1)
        client.set("t:{9}:count", 0)
        before = daemon.metric("cdc_invalidator_sweep_scanned_keys_total")
        began = time.monotonic()
        execute(database, "TRUNCATE counters")
        eventually(lambda: daemon.metric("cdc_invalidator_sweeps_running"), "the sweeps have begun")
        while daemon.metric("cdc_invalidator_sweeps_running") and time.monotonic() - began < 60:
            client.set("t:{5}:count", 0)
            execute(database, "INSERT INTO counters VALUES (5, 0) ON CONFLICT (id) DO UPDATE SET n = counters.n + 1")
            eventually(lambda: not client.exists("t:{5}:count"), "a live bust", 5)
            time.sleep(0.2)
        progress = daemon.seen("sweep_progress")
        assert progress["scanned"] < progress["all_keys"] * 2
        assert progress["cache"] in {"count", "page"}
        settled(database, client, slot_name)
        assert not client.exists("t:{9}:count")
        # Two caches, one of them in two passes: 180,000 keys at 10,000 a second.
        scanned = daemon.metric("cdc_invalidator_sweep_scanned_keys_total") - before
        assert scanned > 150_000
        assert time.monotonic() - began > scanned / 10_000 - 2


def test_a_redis_without_info_and_dbsize_is_swept_all_the_same(database: str, tmp_path: Path, slot_name: str) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    renamed = {"rename-command": ['INFO ""', 'DBSIZE ""'], "enable-debug-command": "yes"}
    with (
        Valkey(settings=renamed) as valkey,
        redis.Redis.from_url(valkey.url) as client,
    ):
        client.execute_command("DEBUG", "POPULATE", 3000, "stranger", 1)
        client.set("t:{9}:count", 0)
        # The sweep of the first gap takes some nine seconds, so that it tells how far it is.
        with RunningDaemon(
            dsn=database, redis_url=valkey.url, rules=rules, slot=slot_name, sweep_rate="1000"
        ) as daemon:
            daemon.ready()
            settled(database, client, slot_name)
            assert not client.exists("t:{9}:count")
            assert daemon.seen("sweep_progress")["all_keys"] is None
            assert len(daemon.named("info_refused", level="warning")) == 1
            assert len(daemon.named("redis_connected")) == 1
            assert not daemon.named("redis_unavailable")
            assert not daemon.errors


def test_the_pace_is_left_while_postgresql_keeps_too_much_wal_for_it(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path)
    for number in range(10):
        redis_client.mset({f"stranger:{number}:{n}": 1 for n in range(2000)})
    slow = {"sweep_rate": "100", "max_retained_wal": "4000000"}
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name, **slow) as daemon:
        daemon.streams()
        # At this pace the sweeps would take ten minutes.
        eventually(lambda: daemon.metric("cdc_invalidator_sweeps_running") == 2, "the sweeps have begun")
        assert not daemon.named("sweeps_hurry")
        message = "SELECT pg_logical_emit_message(true, 'junk', repeat(md5(random()::text), 30000))"
        execute(database, f"{message} FROM generate_series(1, 10)")
        assert daemon.seen("sweeps_hurry", level="warning")["error"]
        settled(database, redis_client, slot_name)
        assert len(daemon.named("sweeps_hurry")) == 1
        assert not daemon.errors


def test_a_pattern_finds_only_the_keys_of_its_cache_whatever_signs_they_hold(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    template = "a[[b]]**c??\\\\d:{id}:x^y"
    rules = reading.rules_file(
        tmp_path,
        f'version: 1\ncaches: {{odd: {{key: "{template}", ttl: 5m}}}}\n'
        "rules: [{name: r, table: public.counters, bust: [odd]}]\n",
    )
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        mine = ["a[b]*c?\\d:1:x^y", "a[b]*c?\\d:a*:x^y"]
        others = ["abXc1\\d:1:x^y", "a[b]*c?d:1:x^y", "a[b]*c?\\d:1:x^z", "a[b]*cX\\d:1:x^y", "b", "ab*c?\\d:1:x^y"]
        for key in (*mine, *others):
            redis_client.set(key, 1)
            redis_client.set(f"{key}\0lock", 1)
        execute(database, "TRUNCATE counters")
        settled(database, redis_client, slot_name)
        assert [key for key in mine if redis_client.exists(key, f"{key}\0lock")] == []
        assert [key for key in others if redis_client.exists(key, f"{key}\0lock") != 2] == []
