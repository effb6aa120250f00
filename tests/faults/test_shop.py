"""Random faults under writers and contract-keeping readers: nothing is stale, no write fails, no position is ahead.

A run prints its seed and its faults; ``FAULT_SEEDS=17,18 pytest tests/faults`` runs others, and ``FAULT_SECONDS=600``
makes runs longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
import tools
import warehouse
from alterations import Alterations
from poolers import pgbouncer
from proxy import Proxy
from running import RunningDaemon, command, confirmed, eventually, execute, settled, watermark

from cdc_invalidator.embedded import shop, shoppers
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

SEEDS = [int(seed) for seed in os.environ.get("FAULT_SEEDS", "1,2,3" if os.environ.get("CI") else "1").split(",")]
SECONDS_OF_FAULTS = float(os.environ.get("FAULT_SECONDS", "10"))
SLOT = "faults"
# Before all entries are looked at: one that has all caches swept hides what the others have left.
MOST_FAULTS = 3


class Scene:
    """Two servers of its own, a daemon that reaches them through proxies, and the faults that can befall them all.

    Writers go through PgBouncer in transaction mode, where it is installed.
    """

    queries = (*shop.QUERIES, *warehouse.QUERIES)

    def __init__(self, postgres: Postgres, valkey: Valkey, folder: Path, stack: contextlib.ExitStack) -> None:
        self.postgres = stack.enter_context(postgres)
        self.valkey = stack.enter_context(valkey)
        shop.create(postgres.dsn)
        warehouse.create(postgres.dsn)
        shutil.copy(shop.rules_file(), folder)
        warehouse.rules_file(folder)
        self.rules = folder
        self.caches = {bust.cache.name for rule in load_rules(folder, {}).rules for bust in rule.busts}
        self.pooler: str | None = None
        if tools.find("pgbouncer"):
            self.pooler = stack.enter_context(pgbouncer(postgres.dsn, "transaction"))
        self.to_postgres = stack.enter_context(Proxy(postgres.port))
        self.to_valkey = stack.enter_context(Proxy(valkey.port))
        daemon = RunningDaemon(
            dsn=postgres.dsn.replace(f":{postgres.port}/", f":{self.to_postgres.port}/"),
            redis_url=valkey.url.replace(f":{valkey.port}/", f":{self.to_valkey.port}/"),
            rules=folder,
            slot=SLOT,
        )
        self.daemon = stack.enter_context(daemon).ready()
        self.dice = random.Random()
        self.alterations = Alterations(postgres.dsn, SLOT, self.dice, self.daemon.ready)
        self.waiting: list[Callable[[], None]] = []
        self.went_back = False
        self.slots_seen = 0

    def workload(self, *, seed: int) -> shoppers.Workload:
        return shoppers.Workload(
            self.postgres.dsn,
            self.valkey.url,
            seed=seed,
            writers=3,
            survive=True,
            writers_dsn=self.pooler,
            rules=self.rules,
            queries=self.queries,
            further=warehouse.CHANGES,
        )

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

    def swap_databases(self) -> None:
        """What comes is empty, or what was there before the last time."""
        self.went_back = True
        with redis.Redis.from_url(self.valkey.url) as client:
            client.swapdb(0, 1)

    def come_through_the_pooler(self) -> None:
        assert self.pooler is not None
        word = self.dice.choice(["check", "run", "setup"])
        came = command(word, postgres_dsn=self.pooler, redis_url=self.valkey.url, rules=self.rules, slot=SLOT)
        assert came.returncode == 2, came
        assert "pooler" in came.stdout + came.stderr

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
            self.swap_databases,
            *([self.come_through_the_pooler] if self.pooler else []),
            *self.alterations.faults,
        ]

    def befall(self, count: int) -> None:
        """Let so many faults happen, of all kinds in a random order before any of them comes again."""
        for _ in range(count):
            if not self.waiting:
                self.waiting = self.faults
                self.dice.shuffle(self.waiting)
            fault = self.waiting.pop()
            print(f"  {fault.__name__}")
            fault()
            time.sleep(self.dice.random())
            self.assert_nothing_confirmed_too_early()

    def recover(self) -> None:
        """Wait until the watermark speaks for all caches.

        What happened to tables and publication is noticed within some seconds, and only then the watermark is asked;
        what happens to rows is not given that time.
        """
        self.daemon.ready()
        watched = self.daemon.metric("cdc_invalidator_watches_total")
        eventually(lambda: self.daemon.metric("cdc_invalidator_watches_total") > watched + 1, "a look at the tables")
        eventually(self.trusted, "the watermark speaks for all caches")

    def audit(self) -> shop.Audit:
        """Compare all entries with the database, once all that was written is busted."""
        with redis.Redis.from_url(self.valkey.url) as client:
            settled(self.postgres.dsn, client, SLOT)
        self.assert_nothing_confirmed_too_early()
        return shop.audit(self.postgres.dsn, self.valkey.url, rules=self.rules, queries=self.queries)

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
        """Whether the watermark speaks for all caches that rules bust, none of which waits to be swept."""
        return self.caches <= set(json.loads(self.watermark().get(b"rules", b"{}")))


@pytest.fixture(params=["", "60 1 1 1"], ids=["valkey in memory", "valkey with snapshots"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """The scene; with snapshots, a restarted Valkey comes back with what it had, or with something older."""
    with contextlib.ExitStack() as stack:
        stage = Scene(Postgres(), Valkey(settings={"save": request.param}), tmp_path, stack)
        yield stage
        for event in [event for event in stage.daemon.events if event["event"] != "bust"][-30:]:
            print("   ", event)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_leave_no_stale_entry(scene: Scene, seed: int) -> None:
    print(f"seed {seed}")
    scene.dice.seed(seed)
    deadline = time.monotonic() + SECONDS_OF_FAULTS
    rounds = 0
    while not rounds or time.monotonic() < deadline:
        rounds += 1
        with scene.workload(seed=100 * seed + rounds) as workload:
            scene.befall(scene.dice.randint(1, MOST_FAULTS))
            scene.recover()
            workload.stop_writers()
            workload.stop()
        seen = scene.audit()
        print(f"  {seen.entries} entries, {workload.counts}")
        assert seen.stale == []
        assert workload.refused == []
        assert seen.entries > 0
        assert scene.daemon.alive()
        assert not scene.daemon.errors
