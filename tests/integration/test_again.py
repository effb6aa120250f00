"""`again_after`: a second bust for readers that store whatever they have loaded."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import reading
import redis
from running import RunningDaemon, confirmed, eventually, execute, settled, wal_position, watermark

if TYPE_CHECKING:
    from pathlib import Path

RULES = """
version: 1
caches:
  count: {key: "t:{{{id}}}:count", ttl: 5m, again_after: 1s}
rules:
  - {name: counter-changed, table: public.counters, bust: [count]}
"""


def test_what_a_reader_stores_between_the_two_busts_goes_with_the_second(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path, RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        again = daemon.metric("cdc_invalidator_busted_again_total", reason="again_after")
        redis_client.set("t:{1}:count", 0)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        position = wal_position(database)
        eventually(lambda: not redis_client.exists("t:{1}:count"), "it is busted at once")
        began = time.monotonic()
        redis_client.set("t:{1}:count", 0)
        assert confirmed(database, slot_name) < position, "confirmed only after the second bust"
        eventually(lambda: not redis_client.exists("t:{1}:count"), "it is busted again")
        assert time.monotonic() - began > 0.5
        settled(database, redis_client, slot_name)
        assert daemon.metric("cdc_invalidator_busted_again_total", reason="again_after") == again + 1


def test_a_daemon_killed_between_the_two_busts_does_both_after_its_restart(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path, RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.set("t:{1}:count", 0)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
        eventually(lambda: not redis_client.exists("t:{1}:count"), "it is busted at once")
        daemon.kill()
        redis_client.set("t:{1}:count", 0)
        daemon.start().ready()
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("t:{1}:count")


def test_a_sweep_comes_twice_as_well(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path, RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        eventually(lambda: len(daemon.named("bust", action="sweep", reason="gap")) == 2, "two sweeps")
        settled(database, redis_client, slot_name)
        execute(database, "TRUNCATE counters")
        eventually(lambda: len(daemon.named("bust", action="sweep", reason="truncate")) == 2, "two sweeps")
        settled(database, redis_client, slot_name)


def test_a_daemon_killed_between_the_two_sweeps_of_a_gap_does_both_after_its_restart(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path, RULES.replace("again_after: 1s", "again_after: 5s"))
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.streams()
        daemon.seen("bust", action="sweep", reason="gap")
        # A bust that comes after the sweep comes after a watermark as well, if there were one already.
        redis_client.set("t:{2}:count", 0)
        execute(database, "UPDATE counters SET n = 1 WHERE id = 2")
        eventually(lambda: not redis_client.exists("t:{2}:count"), "it is busted at once")
        daemon.kill()
        claimed = json.loads(watermark(redis_client, slot_name).get(b"rules", b"{}"))
        assert "count" not in claimed, "the gap is not closed before the second sweep"
        redis_client.set("t:{1}:count", 0)
        daemon.events.clear()
        daemon.start().streams()
        daemon.seen("bust", action="sweep", reason="gap")
        assert not redis_client.exists("t:{1}:count")
        # A slow reader stores what it had loaded before.
        redis_client.set("t:{1}:count", 0)
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("t:{1}:count")


def test_readers_without_the_contract_leave_nothing_stale(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    reading.create(database)
    rules = reading.rules_file(tmp_path, RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        with reading.Application(
            database, lambda: redis.Redis.from_url(redis_url), writers=2, readers=4, lease=False
        ) as app:
            app.run(3)
        settled(database, redis_client, slot_name)
        counts = {key: pair for key, pair in reading.stale(database, redis_client).items() if ":count" in key}
        assert counts == {}
        assert app.hits > 0
