"""Random faults under writers and contract-keeping readers: no stale entry, and nothing confirmed too early.

A run prints its seed and its faults; ``FAULT_SEEDS=17,18 pytest tests/faults`` runs others, and ``FAULT_SECONDS=600``
makes runs longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from proxy import Proxy
from running import RunningDaemon, confirmed, eventually, execute, settled, watermark

from cdc_invalidator.embedded import shop, shoppers
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SEEDS = [int(seed) for seed in os.environ.get("FAULT_SEEDS", "1,2,3" if os.environ.get("CI") else "1").split(",")]
SECONDS_OF_FAULTS = float(os.environ.get("FAULT_SECONDS", "10"))
SLOT = "faults"


class Scene:
    """Two servers of its own, a daemon that reaches them through proxies, and the faults that can befall them all."""

    def __init__(self, postgres: Postgres, valkey: Valkey, stack: contextlib.ExitStack) -> None:
        self.postgres = stack.enter_context(postgres)
        self.valkey = stack.enter_context(valkey)
        shop.create(postgres.dsn)
        self.to_postgres = stack.enter_context(Proxy(postgres.port))
        self.to_valkey = stack.enter_context(Proxy(valkey.port))
        daemon = RunningDaemon(
            dsn=postgres.dsn.replace(f":{postgres.port}/", f":{self.to_postgres.port}/"),
            redis_url=valkey.url.replace(f":{valkey.port}/", f":{self.to_valkey.port}/"),
            rules=shop.rules_file(),
            slot=SLOT,
        )
        self.daemon = stack.enter_context(daemon).ready()
        self.dice = random.Random()
        self.went_back = False
        self.slots_seen = 0

    def kill_daemon(self) -> None:
        self.daemon.kill()
        time.sleep(self.dice.random())
        self.daemon.start()

    def freeze_daemon(self) -> None:
        self.daemon.send(signal.SIGSTOP)
        time.sleep(2)
        self.daemon.send(signal.SIGCONT)

    def stop_daemon(self) -> None:
        eventually(lambda: self.daemon.get("/livez")[0] == 200, "the daemon is live")
        assert self.daemon.terminate() == 0
        self.daemon.start()

    def truncate(self) -> None:
        execute(self.postgres.dsn, f"TRUNCATE {self.dice.choice(['orders', 'reviews', 'products', 'users, orders'])}")

    def crash_postgres(self) -> None:
        self.postgres.kill()
        self.postgres.start()

    def restart_postgres(self) -> None:
        self.postgres.restart()

    def kill_valkey(self) -> None:
        self.went_back = True
        self.valkey.kill()
        time.sleep(self.dice.random())
        self.valkey.start()

    def restart_valkey(self) -> None:
        self.valkey.restart()

    def freeze_valkey(self) -> None:
        self.valkey.pause()
        time.sleep(self.dice.random() * 2)
        self.valkey.resume()

    def flush_valkey(self) -> None:
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()

    def cut_network(self) -> None:
        proxy = self.dice.choice([self.to_postgres, self.to_valkey])
        if self.dice.random() < 0.5:
            proxy.cut()
        else:
            proxy.cut_after(self.dice.randrange(20_000))

    def lose_network(self) -> None:
        proxy = self.dice.choice([self.to_postgres, self.to_valkey])
        self.dice.choice([proxy.refuse, proxy.stall, proxy.go_deaf])()
        time.sleep(self.dice.random() * 2)
        proxy.mend()

    def drop_slot_while_away(self) -> None:
        self.daemon.kill()
        with psycopg.connect(self.postgres.dsn, autocommit=True) as connection:
            eventually(lambda: self._drop_slot(connection), "the slot is dropped")
        time.sleep(self.dice.random())
        self.daemon.start()

    def _drop_slot(self, connection: psycopg.Connection[tuple[object, ...]]) -> bool:
        try:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [SLOT]
            )
        except psycopg.errors.ObjectInUse:
            return False
        return True

    def drop_publication(self) -> None:
        execute(self.postgres.dsn, f"DROP PUBLICATION IF EXISTS {SLOT}")

    def alter_tables(self) -> None:
        number = self.dice.randrange(10**9)
        execute(
            self.postgres.dsn,
            *self.dice.choice(
                [
                    [f"ALTER TABLE users ADD COLUMN extra_{number} int DEFAULT 1"],
                    [f"ALTER TABLE products ADD COLUMN gone_{number} text", f"ALTER TABLE products DROP gone_{number}"],
                    # Not left so: a daemon that starts then refuses the rule.
                    ["ALTER TABLE orders REPLICA IDENTITY DEFAULT", "ALTER TABLE orders REPLICA IDENTITY FULL"],
                    ["ALTER TABLE reviews REPLICA IDENTITY FULL"],
                    ["ALTER TABLE reviews ALTER COLUMN stars TYPE bigint"],
                ]
            ),
        )

    @property
    def faults(self) -> list[Callable[[], None]]:
        return [
            self.kill_daemon,
            self.freeze_daemon,
            self.stop_daemon,
            self.truncate,
            self.crash_postgres,
            self.restart_postgres,
            self.kill_valkey,
            self.restart_valkey,
            self.freeze_valkey,
            self.flush_valkey,
            self.cut_network,
            self.lose_network,
            self.drop_slot_while_away,
            self.drop_publication,
            self.alter_tables,
        ]

    def assert_nothing_confirmed_too_early(self) -> None:
        """What PostgreSQL may forget, Redis says it has had; asked in this order, since both only grow."""
        with contextlib.suppress(LookupError):
            sent = confirmed(self.postgres.dsn, SLOT)
            recorded = int(self.watermark()[b"lsn"])
            # A Redis that was killed comes back with an older snapshot, and so with an older watermark; a new slot
            # begins where nothing has been recorded yet. Those are gaps, and no lies.
            if recorded < sent:
                assert self.went_back or self.slots_made() > self.slots_seen
            else:
                self.went_back, self.slots_seen = False, self.slots_made()

    def slots_made(self) -> int:
        making = self.daemon.named("setting_up")
        return sum("pg_create_logical_replication_slot" in str(event["statements"]) for event in making)

    def watermark(self) -> Mapping[bytes, bytes]:
        with redis.Redis.from_url(self.valkey.url) as client:
            return watermark(client, SLOT)

    def trusted(self) -> bool:
        """Whether the watermark speaks for all caches, none of which waits to be swept."""
        caches = {query.cache for query in shop.QUERIES}
        return caches <= set(json.loads(self.watermark().get(b"rules", b"{}")))


@pytest.fixture(params=["", "60 1 1 1"], ids=["valkey in memory", "valkey with snapshots"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The scene; with snapshots, a restarted Valkey comes back with what it had, or with something older."""
    with contextlib.ExitStack() as stack:
        stage = Scene(Postgres(), Valkey(settings={"save": request.param}), stack)
        yield stage
        for event in [event for event in stage.daemon.events if event["event"] != "bust"][-30:]:
            print("   ", event)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_leave_no_stale_entry(scene: Scene, seed: int) -> None:
    print(f"seed {seed}")
    scene.dice.seed(seed)
    dsn, url = scene.postgres.dsn, scene.valkey.url
    workload = shoppers.Workload(dsn, url, seed=seed, writers=3, survive=True)
    with workload:
        deadline = time.monotonic() + SECONDS_OF_FAULTS
        while time.monotonic() < deadline:
            fault = scene.dice.choice(scene.faults)
            print(f"  {fault.__name__}")
            fault()
            time.sleep(scene.dice.random())
            scene.assert_nothing_confirmed_too_early()
        scene.daemon.ready()
        # What happened to tables and publication is noticed within some seconds, and only then the watermark is
        # asked; what happens to rows is not given that time.
        watched = scene.daemon.metric("cdc_invalidator_watches_total")
        eventually(lambda: scene.daemon.metric("cdc_invalidator_watches_total") > watched + 1, "a look at the tables")
        eventually(scene.trusted, "the watermark speaks for all caches")
        workload.stop_writers()
        workload.stop()
    with redis.Redis.from_url(url) as client:
        settled(dsn, client, SLOT)
    scene.assert_nothing_confirmed_too_early()
    seen = shop.audit(dsn, url)
    print(f"  {seen.entries} entries, {workload.counts}")
    assert seen.stale == []
    assert seen.entries > 0
    assert scene.daemon.alive()
    assert not scene.daemon.errors
