"""The application under the check: processes whose threads or tasks read through the library, and some that write.

Each notes down what it saw, and the watermark that it had read before. It is the library that is under test; nothing
here knows how a key is cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import prometheus_client
import psycopg
import redis
from consistency.history import ABSENT, Read, Reads, Writes
from consistency.shelves import CACHES, Kind, Value, Writer
from running import settled

from cdc_invalidator import reader
from cdc_invalidator.reader import scripts

SLOT: Final = "consistency"
TIMEOUT_SECONDS: Final = 0.25
THREADS: Final = 3
TASKS: Final = 8
WRITERS: Final = 3
FIRST_WRITER: Final = 300
"""From this number on, readers are writers, whose reads ask for the LSN of their own commit."""

WRITE_PAUSE_SECONDS: Final = 0.006
WRITE_THROUGH: Final = 0.1  # of the writes
READ_BACK: Final = 0.2  # of the writes that their writer reads back
EARLY: Final = {"shelf": 10.0}  # by cache: entries are refreshed before the end of their time, by chance
LOCAL: Final = ("item", "shelf")  # caches that may be kept in the memory of a process
MANY: Final = 0.3  # of the reads that ask for several keys at once
SLOW: Final = 0.1  # of the loads that take their time between the query and the fill
SLOW_SECONDS: Final = 0.1
SLACK_SECONDS: Final = 1.0
"""Where no daemon writes a watermark, a read is held against what had been committed for so long."""

# FILL without its look at the lock: what an application does that stores whatever it has loaded.
_UNFENCED: Final = "redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) redis.call('UNLINK', KEYS[1]) return 1"


class Setting(NamedTuple):
    """What a process of the application is told."""

    dsn: str
    url: str
    rules: Path
    folder: Path
    lease: bool
    local: bool


@dataclass
class Journal:
    """What one thread or task has seen, and what it last knew of the watermark.

    ``lsn``: by cache, the highest watermark that has been read; a lost watermark takes nothing back.
    """

    reader: int
    reads: Reads
    lsn: dict[str, int]

    @classmethod
    def of(cls, number: int) -> Journal:
        return cls(number, Reads(), {kind.name: 0 for kind in CACHES})

    def watermark(self, found: Sequence[bytes | None]) -> None:
        """Take what HMGET of `lsn` and `rules` gave: it speaks for the caches that are named, and for no other."""
        lsn, rules = found
        if lsn is not None and rules is not None:
            for name in json.loads(rules).keys() & self.lsn.keys():
                self.lsn[name] = max(self.lsn[name], int(lsn))

    def note(
        self, kind: Kind, values: Mapping[int, Value], loaded: set[int], began: int, lsn: int | None = None
    ) -> None:
        ended = time.monotonic_ns()
        for number, value in values.items():
            self.reads.add(
                Read(
                    self.reader,
                    CACHES.index(kind),
                    kind.first + number,
                    began,
                    ended,
                    self.lsn[kind.name] if lsn is None else lsn,
                    ABSENT if value is None else value[0],
                    number not in loaded,
                )
            )


class Choice:
    """What is read next, and how long its load takes."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def next(self) -> tuple[Kind, list[int]]:
        kind = self._dice.choice(CACHES)
        most = kind.size // 4 if self._dice.random() < MANY else 1
        return kind, self._dice.sample(range(kind.size), self._dice.randint(1, most))

    def slowness(self) -> float:
        return self._dice.random() * SLOW_SECONDS if self._dice.random() < SLOW else 0.0


def made(setting: Setting, registry: prometheus_client.CollectorRegistry) -> dict[str, Any]:
    """Give the arguments that all caches are made with; without the lease the library's own fill has no fence."""
    if not setting.lease:
        scripts.FILL = _UNFENCED
    return {"slot": SLOT, "registry": registry}


def handles(caches: Any) -> dict[str, Any]:
    """Give the caches by name, each with its options."""
    return {kind.name: caches[kind.name].using(early=EARLY.get(kind.name, 0.0)) for kind in CACHES}


def client_of(setting: Setting) -> redis.Redis:
    return redis.Redis.from_url(setting.url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS)


def read_synchronously(setting: Setting, first: int, goal: int, reached: Any, stop: Any) -> None:
    """Be a process with threads that share a client.

    Args:
        setting: where.
        first: the number of its first reader.
        goal: how many reads it is to record.
        reached: an event that is set when it has.
        stop: an event that ends it.
    """
    registry = prometheus_client.CollectorRegistry()
    journals = [Journal.of(first + number) for number in range(THREADS)]
    with client_of(setting) as client:
        caches = reader.Caches.from_rules(setting.rules, client, **made(setting, registry))

        def work(journal: Journal) -> None:
            with psycopg.connect(setting.dsn, autocommit=True) as connection, client_of(setting) as own:
                loop = SyncReader(caches, connection, own, journal)
                while not stop.is_set():
                    loop.step()
                    if sum(len(each.reads) for each in journals) >= goal:
                        reached.set()

        with caches.local(*LOCAL) if setting.local else contextlib.nullcontext():
            _in_threads(work, journals)
    _save(setting, first, journals, registry)


class SyncReader:
    """One thread's reads."""

    def __init__(self, caches: Any, connection: psycopg.Connection[Any], client: redis.Redis, journal: Journal) -> None:
        self._caches = caches
        self._handles = handles(caches)
        self._connection = connection
        self._client = client
        self._journal = journal
        self._choice = Choice(journal.reader)

    def step(self) -> None:
        """Read the watermark, then something else."""
        self.look_at_the_watermark()
        kind, numbers = self._choice.next()
        if len(numbers) == 1:
            self.get(kind, numbers[0])
        else:
            self.get_many(kind, numbers)

    def look_at_the_watermark(self) -> None:
        with contextlib.suppress(redis.RedisError):  # a fault; what was known before still holds
            self._journal.watermark(self._client.hmget(f"cdc:{SLOT}:watermark", "lsn", "rules"))  # type: ignore[arg-type]

    def get(self, kind: Kind, number: int, lsn: int | None = None, meanwhile: Callable[[], None] | None = None) -> None:
        """Read one; under an LSN of one's own if it is given. ``meanwhile``: happens between its query and its fill."""
        loaded: set[int] = set()

        def load(**_: int) -> Value:
            value = kind.load(self._connection, [number])[number]
            loaded.add(number)
            if meanwhile is None:
                time.sleep(self._choice.slowness())
            else:
                meanwhile()
            return value

        cache = self._handles[kind.name] if lsn is None else self._caches.at_least(lsn)[kind.name]
        began = time.monotonic_ns()
        value = cache.get({kind.parameter: number}, load=load)
        self._journal.note(kind, {number: value}, loaded, began, lsn)

    def get_many(self, kind: Kind, numbers: list[int]) -> None:
        loaded: set[int] = set()

        def load(missing: Sequence[int]) -> dict[int, Value]:
            values = kind.load(self._connection, missing)
            loaded.update(missing)
            time.sleep(self._choice.slowness())
            return values

        began = time.monotonic_ns()
        values = self._handles[kind.name].get_many(numbers, load=load)
        self._journal.note(kind, dict(zip(numbers, values, strict=True)), loaded, began)


def read_asynchronously(setting: Setting, first: int, goal: int, reached: Any, stop: Any) -> None:
    """Be a process with tasks that share a client; see `read_synchronously`."""
    asyncio.run(_read_asynchronously(setting, first, goal, reached, stop))


async def _read_asynchronously(setting: Setting, first: int, goal: int, reached: Any, stop: Any) -> None:
    registry = prometheus_client.CollectorRegistry()
    journals = [Journal.of(first + number) for number in range(TASKS)]
    client = redis.asyncio.Redis.from_url(
        setting.url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
    )
    caches = reader.AsyncCaches.from_rules(setting.rules, client, **made(setting, registry))

    async def work(journal: Journal) -> None:
        async with await psycopg.AsyncConnection.connect(setting.dsn, autocommit=True) as connection:
            loop = _AsyncReader(caches, connection, client, journal)
            while not stop.is_set():
                await loop.step()
                if sum(len(each.reads) for each in journals) >= goal:
                    reached.set()

    try:
        async with caches.local(*LOCAL) if setting.local else contextlib.nullcontext(), asyncio.TaskGroup() as tasks:
            for journal in journals:
                tasks.create_task(work(journal))
    finally:
        await client.aclose()
    _save(setting, first, journals, registry)


class _AsyncReader:
    """One task's reads."""

    def __init__(
        self, caches: Any, connection: psycopg.AsyncConnection[Any], client: redis.asyncio.Redis, journal: Journal
    ) -> None:
        self._handles = handles(caches)
        self._connection = connection
        self._client = client
        self._journal = journal
        self._choice = Choice(journal.reader)

    async def step(self) -> None:
        with contextlib.suppress(redis.RedisError):  # a fault; what was known before still holds
            self._journal.watermark(await self._client.hmget(f"cdc:{SLOT}:watermark", "lsn", "rules"))  # type: ignore[arg-type]
        kind, numbers = self._choice.next()
        loaded: set[int] = set()

        async def load(missing: Sequence[int]) -> dict[int, Value]:
            cursor = await self._connection.execute(*kind.query(missing))
            values = kind.values(await cursor.fetchall())
            loaded.update(missing)
            await asyncio.sleep(self._choice.slowness())
            return values

        async def load_one(**_: int) -> Value:
            return (await load(numbers))[numbers[0]]

        began = time.monotonic_ns()
        cache = self._handles[kind.name]
        if len(numbers) == 1:
            values = [await cache.get({kind.parameter: numbers[0]}, load=load_one)]
        else:
            values = await cache.get_many(numbers, load=load)
        self._journal.note(kind, dict(zip(numbers, values, strict=True)), loaded, began)


def write(setting: Setting, first: int, stop: Any) -> None:
    """Be a process with threads that write, and read some of their own writes back, until ``stop`` is set."""
    registry = prometheus_client.CollectorRegistry()
    journals = [Journal.of(first + number) for number in range(WRITERS)]
    writes, commits = Writes(), 0
    lock = threading.Lock()
    with client_of(setting) as client:
        caches = reader.Caches.from_rules(setting.rules, client, **made(setting, registry))

        def work(journal: Journal) -> None:
            nonlocal commits
            dice = random.Random(journal.reader)
            with psycopg.connect(setting.dsn, autocommit=True) as connection, client_of(setting) as own:
                writer = Writer(connection, journal.reader)
                loop = SyncReader(caches, connection, own, journal)
                while not stop.is_set():
                    if dice.random() < WRITE_THROUGH:
                        item, lsn = _write_through(caches, writer, connection)
                    else:
                        item, lsn = writer.write()
                    if dice.random() < READ_BACK:
                        loop.get(CACHES[0], item, lsn)
                    time.sleep(dice.random() * 2 * WRITE_PAUSE_SECONDS)
            with lock:
                writes.extend(writer.writes)
                commits += writer.commits

        with caches.local(*LOCAL) if setting.local else contextlib.nullcontext():
            _in_threads(work, journals)
    writes.save(setting.folder / f"{first}.writes")
    _save(setting, first, journals, registry, commits)


def _write_through(caches: Any, writer: Writer, connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Update an item, and store what it is now; by then somebody else may have changed it again."""
    item = writer.choose()
    with caches[CACHES[0].name].writing(id=item) as write:
        writer.touch(item)
        write.set(CACHES[0].load(connection, [item])[item])
    return item, writer.lsn


def race(setting: Setting, first: int, races: int, wait: bool) -> None:
    """Be a process that lets a commit and its bust come between the query and the fill, for sure, and then reads again.

    Args:
        setting: where.
        first: its number.
        races: how many, each over an item of its own.
        wait: whether to wait for the bust, which takes a daemon.
    """
    registry = prometheus_client.CollectorRegistry()
    journal = Journal.of(first)
    with (
        client_of(setting) as client,
        psycopg.connect(setting.dsn, autocommit=True) as reading,
        psycopg.connect(setting.dsn, autocommit=True) as writing,
    ):
        caches = reader.Caches.from_rules(setting.rules, client, **made(setting, registry))
        loop = SyncReader(caches, reading, client, journal)
        writer = Writer(writing, first)

        def overtaken(item: int) -> None:
            writer.touch(item)
            if wait:
                settled(setting.dsn, client, SLOT)

        for item in range(races):
            loop.get(CACHES[0], item, meanwhile=partial(overtaken, item))
        if not wait:
            time.sleep(SLACK_SECONDS)
        for item in range(races):
            loop.look_at_the_watermark()
            loop.get(CACHES[0], item)
    writer.writes.save(setting.folder / f"{first}.writes")
    _save(setting, first, [journal], registry, writer.commits)


def _in_threads(work: Callable[[Journal], None], journals: Sequence[Journal]) -> None:
    """Run one thread for each; the first failure is raised when all have ended."""
    failures: list[BaseException] = []

    def guarded(journal: Journal) -> None:
        try:
            work(journal)
        except BaseException as failure:  # noqa: BLE001  raised again by the process's main thread
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=[journal]) for journal in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Tally(NamedTuple):
    """What a process counted beside its reads."""

    dropped: int
    commits: int


def _save(
    setting: Setting,
    first: int,
    journals: Sequence[Journal],
    registry: prometheus_client.CollectorRegistry,
    commits: int = 0,
) -> None:
    reads = Reads()
    for journal in journals:
        reads.extend(journal.reads)
    reads.save(setting.folder / f"{first}.reads")
    tally = Tally(int(sum(_samples(registry, "cdc_invalidator_reader_dropped_fills_total"))), commits)
    (setting.folder / f"{first}.tally").write_text(json.dumps(tally))


def _samples(registry: prometheus_client.CollectorRegistry, name: str) -> Iterator[float]:
    for metric in registry.collect():
        yield from (sample.value for sample in metric.samples if sample.name == name)
