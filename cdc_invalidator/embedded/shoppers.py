"""The users of the shop: writers, and readers that read through `cdc_invalidator.reader`.

Writers never touch Redis; readers do so only through the library.
"""

# ruff: noqa: S608 - the parts of these statements are constants; values are bound

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import psycopg
from prometheus_client import CollectorRegistry

from cdc_invalidator.embedded.shop import (
    ENVIRONMENT,
    FILL_ORDERS,
    FILL_PRODUCTS,
    FILL_REVIEWS,
    FILL_USERS,
    PRODUCTS,
    QUERIES,
    USERS,
    CachedQuery,
    connect_redis,
    rules_file,
)
from cdc_invalidator.reader.sync import Caches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


RECONNECT_SECONDS: Final = 0.1

Change: TypeAlias = "Callable[[psycopg.Connection[tuple[object, ...]], random.Random], object]"
"""One statement or more of a writer, who passes its own dice."""


@dataclass(slots=True)
class WorkCounts:
    """What the workers have done so far.

    ``refused`` fills were not stored, because a bust came during the load; ``aborted`` transactions were rolled back, a
    few of them on purpose; ``lost`` counts database connections that broke and were replaced.
    """

    commits: int = 0
    aborted: int = 0
    reads: int = 0
    hits: int = 0
    fills: int = 0
    refused: int = 0
    lost: int = 0

    def __add__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class Writer:
    """Changes the shop's rows and knows nothing of the cache.

    Each `step` is one transaction: mostly one change, sometimes several, sometimes rolled back. The seed determines the
    statements; their effect also depends on the other writers.

    ``refused`` holds the errors that are neither the writers' own conflicts nor the loss of a connection: without
    somebody else's doing, there are none.

    Args:
        dsn: The shop's database.
        seed: Determines the statements.
        further: Changes of other tables, each with its weight beside the shop's, which are 137 in all.
    """

    def __init__(self, dsn: str, *, seed: int, further: Sequence[tuple[int, Change]] = ()) -> None:
        self.counts = WorkCounts()
        self.refused: list[str] = []
        self._dsn = dsn
        self._dice = random.Random(seed)  # noqa: S311
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        changes = (
            (20, self._change_user),
            (10, self._see_user),
            (4, self._add_user),
            (3, self._remove_user),
            (3, self._renumber_user),
            (15, self._add_order),
            (20, self._change_order),
            (10, self._move_order),
            (12, self._remove_order),
            (12, self._change_product),
            (2, self._add_product),
            (1, self._remove_product),
            (2, self._renumber_product),
            (6, self._add_review),
            (6, self._change_review),
            (1, self._remove_review),
            *((weight, partial(self._further, change)) for weight, change in further),
        )
        self._weights, self._changes = zip(*changes, strict=True)

    def step(self) -> None:
        """Run one transaction.

        Raises:
            psycopg.OperationalError: The connection is lost; the next step makes a new one.
        """
        connection = self._connected()
        try:
            if self._dice.random() < 0.002:
                self._empty_a_table(connection)
            else:
                self._transaction(connection)
        except psycopg.Error as error:
            # Writers conflict (deadlocks, a number that is taken), and the database rolls one back.
            self.counts.aborted += 1
            if not isinstance(error, _CONFLICTS) and (error.sqlstate or _LOST[0]) not in _LOST:
                self.refused.append(f"{error.sqlstate}: {error}")
            if connection.closed:
                raise

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection:
            self._connection.close()

    def _connected(self) -> psycopg.Connection[tuple[object, ...]]:
        if self._connection is None or self._connection.closed:
            # Nothing is prepared: a pooler may pass the next statement to another session.
            self._connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=5, prepare_threshold=None)
        return self._connection

    def _further(self, change: Change, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        change(connection, self._dice)

    def _transaction(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        count = self._dice.randint(2, 6) if self._dice.random() < 0.15 else 1
        changes = self._dice.choices(self._changes, self._weights, k=count)
        undone = self._dice.random() < 0.05
        with connection.transaction(force_rollback=undone):
            for change in changes:
                change(connection)
        if undone:
            self.counts.aborted += 1
        else:
            self.counts.commits += 1

    def _empty_a_table(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """TRUNCATE a table, then fill it again in a second transaction."""
        truncate, *refill = self._dice.choice(
            (
                ("TRUNCATE users CASCADE", FILL_USERS, FILL_ORDERS),
                ("TRUNCATE orders", FILL_ORDERS),
                ("TRUNCATE products", FILL_PRODUCTS),
                ("TRUNCATE reviews", FILL_REVIEWS),
            ),
        )
        connection.execute(truncate)
        with connection.transaction():
            for statement in refill:
                connection.execute(statement)
        self.counts.commits += 2

    # Each change is one statement; if its row does not exist, it changes nothing.

    def _user(self) -> int:
        return _hot(self._dice, USERS)

    def _product(self) -> int:
        return _hot(self._dice, PRODUCTS)

    def _word(self) -> str:
        return f"{self._dice.getrandbits(48):x}"

    def _change_user(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        column = self._dice.choice(("name", "email", "plan"))
        connection.execute(f"UPDATE users SET {column} = %s WHERE id = %s", [self._word(), self._user()])

    def _see_user(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """Change the one column that is in no cache."""
        connection.execute("UPDATE users SET last_seen = clock_timestamp() WHERE id = %s", [self._user()])

    def _add_user(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "INSERT INTO users (id, name, email, plan) VALUES (%s, %s, 'new@shop.example', 'free')"
            " ON CONFLICT DO NOTHING",
            [self._user(), self._word()],
        )

    def _remove_user(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """Delete a user and, by ON DELETE CASCADE, the orders."""
        connection.execute("DELETE FROM users WHERE id = %s", [self._user()])

    def _renumber_user(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """Change a primary key and, by ON UPDATE CASCADE, the owner of the orders."""
        connection.execute(
            "UPDATE users SET id = %(new)s WHERE id = %(old)s AND NOT EXISTS (SELECT FROM users WHERE id = %(new)s)",
            {"old": self._user(), "new": self._user()},
        )

    def _add_order(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "INSERT INTO orders (user_id, product_id, quantity, status)"
            " SELECT id, %s, %s, 'new' FROM users WHERE id = %s",
            [self._product(), self._dice.randint(1, 9), self._user()],
        )

    def _change_order(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        status = self._dice.choice(("new", "paid", "sent", "returned"))
        self._on_an_order(connection, "UPDATE orders SET status = %(value)s, quantity = quantity + 1", status)

    def _move_order(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """Move an order to another user; if there is no such user, the foreign key refuses it."""
        self._on_an_order(connection, "UPDATE orders SET user_id = %(value)s", self._user())

    def _remove_order(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        self._on_an_order(connection, "DELETE FROM orders", None)

    def _on_an_order(
        self,
        connection: psycopg.Connection[tuple[object, ...]],
        statement: str,
        value: object,
    ) -> None:
        connection.execute(
            f"{statement} WHERE id = (SELECT max(id) FROM orders WHERE user_id = %(user)s)",
            {"value": value, "user": self._user()},
        )

    def _change_product(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "UPDATE products SET price_cents = %s WHERE id = %s",
            [self._dice.randint(100, 99_999), self._product()],
        )

    def _add_product(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "INSERT INTO products (id, name, price_cents) VALUES (%s, %s, 500) ON CONFLICT DO NOTHING",
            [self._product(), self._word()],
        )

    def _remove_product(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute("DELETE FROM products WHERE id = %s", [self._product()])

    def _renumber_product(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "UPDATE products SET id = %(new)s"
            " WHERE id = %(old)s AND NOT EXISTS (SELECT FROM products WHERE id = %(new)s)",
            {"old": self._product(), "new": self._product()},
        )

    def _add_review(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute(
            "INSERT INTO reviews (product_id, stars, body) VALUES (%s, %s, %s)",
            [self._product(), self._dice.randint(1, 5), self._word()],
        )

    def _change_review(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        self._on_a_review(connection, "UPDATE reviews SET body = %(value)s", self._word())

    def _remove_review(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        self._on_a_review(connection, "DELETE FROM reviews", None)

    def _on_a_review(
        self,
        connection: psycopg.Connection[tuple[object, ...]],
        statement: str,
        value: object,
    ) -> None:
        connection.execute(
            f"{statement} WHERE id = (SELECT max(id) FROM reviews WHERE product_id = %(product)s)",
            {"value": value, "product": self._product()},
        )


# Two transactions that change the same rows; a server that stops, has crashed or starts; a connection that is gone.
_CONFLICTS: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.IntegrityError)
_LOST: Final = ("08006", "08000", "08001", "08003", "08004", "08P01", "57P01", "57P02", "57P03")


def _hot(dice: random.Random, count: int) -> int:
    """Draw an id from 1 to count; a quarter of the draws is in the first sixteenth."""
    return 1 + int(count * dice.random() ** 2)


class Reader:
    """Reads the shop through its cache.

    Some loads are slow (up to 0.3 s between query and fill), so that busts come before their fills.
    """

    def __init__(self, dsn: str, caches: Caches, *, seed: int, queries: Sequence[CachedQuery] = QUERIES) -> None:
        self.counts = WorkCounts()
        self._queries = queries
        self._dsn = dsn
        self._caches = caches
        self._dice = random.Random(seed)  # noqa: S311
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None

    def step(self) -> None:
        """Read a random entry.

        Raises:
            psycopg.OperationalError: The connection is lost; the next step makes a new one.
        """
        query = self._dice.choice(self._queries)
        try:
            self.read(query, _hot(self._dice, query.ids) if query.param else 0)
        except psycopg.Error:
            self.counts.aborted += 1
            if self._connection is None or self._connection.closed:
                raise

    def read(self, query: CachedQuery, number: int) -> Any:
        """Return one value, from the cache or the database; None if there is no such row."""
        self.counts.reads += 1
        return self._caches[query.cache].get(query.params(number), load=lambda **_: self._load(query, number))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection:
            self._connection.close()

    def _load(self, query: CachedQuery, number: int) -> Any:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=5)
        row = self._connection.execute(f"SELECT ({query.select.format(id='%(id)s')})", {"id": number}).fetchone()
        assert row
        luck = self._dice.random()
        if luck < 0.1:
            time.sleep(0.3 if luck < 0.005 else luck / 2)
        return row[0]


class Workload:
    """Writers and readers in threads, until `stop`.

    Args:
        dsn: The shop's database; see `create`.
        url: Its Redis.
        environment: The ``${APP_ENV}`` of the keys.
        seed: Determines what the workers do, but not when.
        writers: The number of writing threads.
        readers: The number of reading threads.
        commits_per_second: The rate of all writers together, roughly; 0 for as fast as possible.
        reads_per_second: The rate of all readers together, roughly; 0 for as fast as possible.
        survive: Whether workers reconnect when PostgreSQL goes away; else they end, and `check` raises the error.
        writers_dsn: Where writers connect instead, such as a pooler.
        rules: The rule file or directory; by default, the shop's.
        queries: What readers read.
        further: What writers change beside the shop; see `Writer`.
    """

    def __init__(
        self,
        dsn: str,
        url: str,
        *,
        environment: str = ENVIRONMENT,
        seed: int = 1,
        writers: int = 2,
        readers: int = 4,
        commits_per_second: float = 150,
        reads_per_second: float = 600,
        survive: bool = False,
        writers_dsn: str | None = None,
        rules: Path | None = None,
        queries: Sequence[CachedQuery] = QUERIES,
        further: Sequence[tuple[int, Change]] = (),
    ) -> None:
        self._survive = survive
        self._registry = CollectorRegistry()
        self._redis = connect_redis(url)
        caches = Caches.from_rules(
            rules or rules_file(),
            self._redis,
            env={"APP_ENV": environment},
            registry=self._registry,
        )
        self._failures: list[Exception] = []
        self._writers = _WorkerThreads(
            [Writer(writers_dsn or dsn, seed=seed + n, further=further) for n in range(writers)],
            commits_per_second,
            self._run,
        )
        self._readers = _WorkerThreads(
            [Reader(dsn, caches, seed=seed + 1000 + n, queries=queries) for n in range(readers)],
            reads_per_second,
            self._run,
        )

    @property
    def counts(self) -> WorkCounts:
        """What all workers have done so far, together."""
        counts = (worker.counts for threads in (self._writers, self._readers) for worker in threads.workers)
        return sum(counts, _reader_counts(self._registry))

    @property
    def refused(self) -> list[str]:
        """The errors that writers have met and that are no conflicts of theirs; see `Writer`."""
        return [error for worker in self._writers.workers if isinstance(worker, Writer) for error in worker.refused]

    def start(self) -> None:
        """Start all workers."""
        self._readers.start()
        self._writers.start()

    def stop_writers(self) -> None:
        """Stop the writers, and wait until their last transactions have ended.

        Raises:
            psycopg.Error: A worker failed with it.
        """
        self._writers.stop()
        self.check()

    def stop(self) -> None:
        """Stop all workers, writers first, and wait until the last fills are stored or dropped.

        Raises:
            psycopg.Error: A worker failed with it.
        """
        self._stop()
        self.check()

    def check(self) -> None:
        """Raise the error of a worker that failed, if one did."""
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop()
        if kind is None:
            self.check()

    def _stop(self) -> None:
        self._writers.stop()
        self._readers.stop()
        self._redis.close()

    def _run(self, worker: Writer | Reader, stopped: threading.Event, pause: float) -> None:
        dice = random.Random()  # noqa: S311
        with contextlib.closing(worker):
            while not stopped.wait(dice.expovariate(1 / pause) if pause else 0):
                try:
                    worker.step()
                except psycopg.Error as lost:
                    if not self._survive:
                        self._failures.append(lost)
                        return
                    worker.counts.lost += 1
                    stopped.wait(RECONNECT_SECONDS)


def _reader_counts(registry: CollectorRegistry) -> WorkCounts:
    """Return hits, fills and refused fills of all caches, from the reader's metrics."""
    sums: Counter[str] = Counter()
    for metric in registry.collect():
        sums[metric.name.removeprefix("cdc_invalidator_reader_")] += sum(
            int(sample.value) for sample in metric.samples if sample.name.endswith("_total")
        )
    hits = sums["hits"] + sums["negative_hits"]
    return WorkCounts(hits=hits, fills=sums["fills"], refused=sums["dropped_fills"])


@dataclass(slots=True)
class _WorkerThreads:
    """Workers of one kind, and their threads."""

    workers: list[Writer] | list[Reader]
    steps_per_second: float
    run: Callable[[Writer | Reader, threading.Event, float], None]
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        pause = len(self.workers) / self.steps_per_second if self.steps_per_second else 0.0
        for worker in self.workers:
            thread = threading.Thread(target=self.run, args=(worker, self._stopped, pause), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
