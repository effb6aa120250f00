"""An application that reads through its cache by the fill contract and writes, over whatever kind of Redis there is.

In the end no cached value may differ from its row's.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import psycopg
import redis
from running import eventually, execute

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RULES = """
version: 1
caches:
  count: {key: "t:{{{id}}}:count", ttl: 5m}
  page: {key: "t:{{{id}}}:page:{version}", version: "t:{{{id}}}:ver", ttl: 5m}
rules:
  - {name: counter-changed, table: public.counters, bust: [count, page]}
"""
ROWS = 60

# KEYS: lock, key. ARGV: token, value. The reader's half of the contract.
_FILL = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', 300000)
redis.call('DEL', KEYS[1])
return 1
"""


def rules_file(folder: Path, rules: str = RULES) -> Path:
    path = folder / "rules.yaml"
    path.write_text(rules)
    return path


def create(dsn: str) -> None:
    execute(
        dsn,
        "CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL)",
        f"INSERT INTO counters SELECT id, 0 FROM generate_series(1, {ROWS}) id",
    )


class Application:
    """Threads that write and read until they are stopped; use it as a context manager.

    Args:
        dsn: where it writes.
        client: makes a client of the cache; called again whenever one fails.
        read_dsn: where it loads from, if not where it writes.
        writers: how many of them write.
        readers: how many read.
        settle: waits until the daemon has busted all that was written.
        lease: whether readers keep the fill contract; without it they store whatever they have loaded.
    """

    def __init__(
        self,
        dsn: str,
        client: Callable[[], Any],
        *,
        read_dsn: str | None = None,
        writers: int = 1,
        readers: int = 3,
        lease: bool = True,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._dsn = dsn
        self._read_dsn = read_dsn or dsn
        self._client = client
        self._lease = lease
        self.settle = settle
        self._stop_writing, self._stop_reading = threading.Event(), threading.Event()
        self._writers = [
            threading.Thread(target=self._repeat, args=[self._write, self._stop_writing, n]) for n in range(writers)
        ]
        self._readers = [
            threading.Thread(target=self._repeat, args=[self._read, self._stop_reading, n]) for n in range(readers)
        ]
        self.failure: Exception | None = None
        self.written = self.reads = self.hits = self.fills = self.refused = 0

    def __enter__(self) -> Self:
        for thread in (*self._writers, *self._readers):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop_writing(self) -> None:
        self._stop_writing.set()
        for thread in self._writers:
            thread.join()

    def stop(self) -> None:
        """End writers, then readers, once all is busted and they have filled the cache again, wherever it is now."""
        self.stop_writing()
        if self._stop_reading.is_set():
            return
        if self.failure is None:
            self.settle()
        before = self.hits + self.fills
        with contextlib.suppress(AssertionError):  # whoever looks for entries then will not find any
            eventually(lambda: self.failure or self.hits + self.fills > before + 50, "readers read")
        self._stop_reading.set()
        for thread in self._readers:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def run(self, seconds: float) -> None:
        """Let it run on for a while."""
        time.sleep(seconds)
        if self.failure is not None:
            raise self.failure

    def _repeat(self, work: Callable[[random.Random, threading.Event], None], stop: threading.Event, n: int) -> None:
        dice = random.Random(n)
        try:
            while not stop.wait(0.01):
                # A fault may befall either server; the application goes on with new connections.
                try:
                    work(dice, stop)
                except (redis.RedisError, psycopg.OperationalError, OSError):
                    continue
                except AttributeError as error:
                    # redis-py trips over an ASK that points to a node which it does not know yet.
                    if "redis_connection" not in str(error):
                        raise
        except Exception as error:  # noqa: BLE001  raised again by the test's own thread
            self.failure = error

    def _write(self, dice: random.Random, stop: threading.Event) -> None:
        with psycopg.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
            while not stop.wait(0.003):
                low = dice.randrange(1, ROWS)
                connection.execute(
                    "UPDATE counters SET n = n + 1 WHERE id BETWEEN %s AND %s", [low, low + dice.choice([0, 0, 0, 5])]
                )
                self.written += 1

    def _read(self, dice: random.Random, stop: threading.Event) -> None:
        with (
            psycopg.connect(self._read_dsn, autocommit=True, connect_timeout=5) as connection,
            contextlib.closing(self._client()) as client,
        ):
            while not stop.wait(0.001):
                number = dice.randrange(1, ROWS + 1)
                self.reads += 1
                (self._read_count if dice.random() < 0.7 else self._read_page)(client, connection, number, dice)

    def _read_count(self, client: Any, connection: Any, number: int, dice: random.Random) -> None:
        key = f"t:{{{number}}}:count"
        lock = f"{key}\0lock"
        if client.get(key) is not None:
            self.hits += 1
            return
        if not self._lease:
            client.set(key, self._load(connection, number, dice), px=300_000)
            self.fills += 1
            return
        token = secrets.token_hex(8)
        if client.set(lock, token, nx=True, px=10_000):
            value = self._load(connection, number, dice)
            if client.eval(_FILL, 2, lock, key, token, value):
                self.fills += 1
            else:
                self.refused += 1

    def _read_page(self, client: Any, connection: Any, number: int, dice: random.Random) -> None:
        counter = f"t:{{{number}}}:ver"
        version = client.get(counter)
        if version is None:
            client.set(counter, time.time_ns() // 1000, nx=True, ex=3600)
            version = client.get(counter)
        if version is None:
            return
        key = f"t:{{{number}}}:page:{version.decode()}"
        if client.get(key) is not None:
            self.hits += 1
            return
        client.set(key, self._load(connection, number, dice), px=300_000)
        self.fills += 1

    def _load(self, connection: Any, number: int, dice: random.Random) -> int:
        row = connection.execute("SELECT n FROM counters WHERE id = %s", [number]).fetchone()
        if dice.random() < 0.1:
            time.sleep(dice.random() * 0.1)
        return int(row[0])


def stale(dsn: str, client: Any) -> dict[str, tuple[int, int]]:
    """Give the cached values that readers would get and that differ from their rows: cached and actual."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows: dict[int, int] = dict(connection.execute("SELECT id, n FROM counters").fetchall())
    found: dict[str, tuple[int, int]] = {}
    for number, actual in rows.items():
        keys = [f"t:{{{number}}}:count"]
        version = client.get(f"t:{{{number}}}:ver")
        if version is not None:
            keys.append(f"t:{{{number}}}:page:{version.decode()}")
        for key in keys:
            cached = client.get(key)
            if cached is not None and int(cached) != actual:
                found[key] = (int(cached), actual)
    return found


def entries(client: Any) -> int:
    """How many values are cached."""
    return sum(client.exists(f"t:{{{number}}}:count") for number in range(1, ROWS + 1))
