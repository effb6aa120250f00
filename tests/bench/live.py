"""Workloads that are written while a contender follows: how late is it, and what does it cost when nothing happens?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import psycopg
from bench import keyspace, measure, runs
from bench.contenders import SCRIPTS, Contender, Daemon, Running, Tuned, Tutorial
from bench.measure import median, quantile
from bench.workloads import Table, Workload, rounds_of, rules_for

COMMITS_A_SECOND = 200


class Live(Workload):
    """Rows with the ids from 1 on; each contender's slot begins where the WAL ends."""

    rows: int

    def contenders(self) -> list[Contender]:
        return [Tuned(), Daemon(rules_for(["items"]))]

    def run(self, rounds: int, tell: Callable[[str], None]) -> None:
        contenders = self.contenders()
        with runs.place(["items"]) as where:
            self.keep_versions(where)
            where.pg.fill("items", f"SELECT i FROM generate_series(1, {self.rows}) AS i")
            for contender in contenders:
                if isinstance(contender, Daemon):
                    contender.prime(where.pg, where.keys, where.folder)
            for contender in rounds_of(contenders, rounds):
                where.keys.fill(self.stale())
                where.pg.catch_up()
                with runs.consuming(where, contender, ["items"]) as (running, slot):
                    runs.caught_up(where, contender, running, slot)
                    said = self.follow(where, contender, running)
                tell(f"{self.name} {contender.name}: {said}")

    def follow(self, where: runs.Place, contender: Contender, running: Running) -> str:
        """Write while the contender follows, and keep its figures; give them in a few words."""
        raise NotImplementedError

    def stale(self) -> list[str]:
        return [f"bench:items:{number}" for number in range(1, self.rows + 1)]


class Latency(Live):
    name = "D"

    def __init__(self, scale: float) -> None:
        self.seconds = max(1.0, 20 * scale)
        self.rows = int(self.seconds * COMMITS_A_SECOND)
        self.delays: dict[str, list[list[float]]] = defaultdict(list)

    @property
    def title(self) -> str:
        return f"Commit returned → key gone, {COMMITS_A_SECOND} commits/s for {self.seconds:.0f} s"

    def contenders(self) -> list[Contender]:
        return [*super().contenders(), Tutorial()]

    def follow(self, where: runs.Place, contender: Contender, running: Running) -> str:
        gone: dict[str, float] = {}
        environment = {"BENCH_DSN": where.pg.dsn, "BENCH_ROWS": str(self.rows), "BENCH_RATE": str(COMMITS_A_SECOND)}
        with (
            keyspace.Watch(where.keys, self.stale()) as watch,
            subprocess.Popen(
                [sys.executable, SCRIPTS / "writer.py"], env=environment, stdout=subprocess.PIPE
            ) as writer,
        ):
            while len(gone) < self.rows:
                running.must_live()
                try:
                    at, keys = watch.gone(10.0)
                except TimeoutError:
                    writer.kill()
                    raise keyspace.Left(f"{self.rows - len(gone)} keys are still there") from None
                gone.update(dict.fromkeys(keys, at))
            assert writer.stdout is not None
            committed = json.loads(writer.stdout.read())
        assert where.keys.count(self.stale()) == 0
        delays = [1000 * (gone[key] - at) for key, at in zip(self.stale(), committed, strict=True)]
        self.delays[contender.name].append(delays)
        return f"p50 {quantile(delays, 0.5):.2f} ms, p99 {quantile(delays, 0.99):.2f} ms"

    def _quantile(self, name: str, share: float) -> float:
        return median([quantile(delays, share) for delays in self.delays[name]])

    def _ratio(self, name: str, share: float) -> str:
        return f"{self._quantile(name, share) / self._quantile(Tuned.name, share):.2f}"

    def summary(self) -> list[list[str]]:
        return [
            ["commit → gone, p50, times the tuned script's", self._ratio(Daemon.name, 0.5)],
            ["commit → gone, p99, times the tuned script's", self._ratio(Daemon.name, 0.99)],
        ]

    def table(self) -> Table:
        rows = [
            [
                name,
                self._ratio(name, 0.5),
                *(f"{self._quantile(name, share):.2f}" for share in (0.5, 0.95, 0.99)),
                f"{max(max(run) for run in delays):.2f}",
            ]
            for name, delays in self.delays.items()
        ]
        return Table(("", "p50, times the tuned script's", "p50, ms", "p95", "p99", "max"), rows)


class LastKey(Live):
    name = "E"

    def __init__(self, scale: float) -> None:
        self.rows = max(200, int(200_000 * scale))
        self.delays: dict[str, list[float]] = defaultdict(list)

    @property
    def title(self) -> str:
        return f"COMMIT of a transaction of {self.rows:,} rows returned → its last key gone"

    def follow(self, where: runs.Place, contender: Contender, running: Running) -> str:
        stale = self.stale()
        with keyspace.Watch(where.keys, stale[-1:]) as watch, psycopg.connect(where.pg.dsn) as writer:
            writer.execute("UPDATE items SET price = price + 1, changed_at = now()")
            writer.commit()
            committed = time.monotonic()
            delay = runs.gone(watch, where, running, stale) - committed
        self.delays[contender.name].append(delay)
        return f"{delay:.2f} s"

    def _ratio(self, name: str) -> str:
        pairs = zip(self.delays[name], self.delays[Tuned.name], strict=True)
        return f"{median([mine / its for mine, its in pairs]):.2f}"

    def summary(self) -> list[list[str]]:
        return [["commit → last key gone, times the tuned script's", self._ratio(Daemon.name)]]

    def table(self) -> Table:
        rows = [[name, self._ratio(name), f"{median(delays):.2f}"] for name, delays in self.delays.items()]
        return Table(("", "times the tuned script's", "s"), rows)


class Idle(Live):
    name = "F"
    rows = 100
    settle_seconds = 1.0

    def __init__(self, scale: float) -> None:
        self.seconds = max(1.0, 20 * scale)
        self.memory: dict[str, list[float]] = defaultdict(list)
        self.share: dict[str, list[float]] = defaultdict(list)

    @property
    def title(self) -> str:
        return f"Idle for {self.seconds:.0f} s"

    def follow(self, where: runs.Place, contender: Contender, running: Running) -> str:
        # A little work first: what is loaded only then belongs to what it holds.
        with keyspace.Watch(where.keys, self.stale()[-1:]) as watch:
            where.pg.execute("UPDATE items SET price = price + 1")
            runs.gone(watch, where, running, self.stale())
        time.sleep(self.settle_seconds)
        began, before = time.monotonic(), measure.cpu_seconds(running.pid)
        time.sleep(self.seconds)
        share = 100 * (measure.cpu_seconds(running.pid) - before) / (time.monotonic() - began)
        memory = measure.memory_mb(running.pid)
        self.share[contender.name].append(share)
        self.memory[contender.name].append(memory)
        return f"{memory:.0f} MB, {share:.2f} % of a core"

    def summary(self) -> list[list[str]]:
        memory = [mine / its for mine, its in zip(self.memory[Daemon.name], self.memory[Tuned.name], strict=True)]
        return [["resident memory when idle, times the tuned script's", f"{median(memory):.2f}"]]

    def table(self) -> Table:
        rows = [
            [name, f"{median(memory):.0f}", f"{median(self.share[name]):.2f}"] for name, memory in self.memory.items()
        ]
        return Table(("", "memory, MB", "% of a core"), rows)
