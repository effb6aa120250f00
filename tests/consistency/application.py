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
from consistency.stores import async_client, client
from running import settled

from cdc_invalidator import reader
from cdc_invalidator.reader import scripts
from cdc_invalidator.reader.commit import acommit_lsn, commit_lsn

SLOT: Final = "consistency"
WATERMARK: Final = f"cdc:{SLOT}:watermark"
FIELDS: Final = ("lsn", "rules", "standbys")
THREADS: Final = 3
TASKS: Final = 8
WRITERS: Final = 3
FIRST_WRITER: Final = 300
ASKING: Final = 300
"""From this number on, reads asked for an LSN: those of writers, and those of a reader whose number is so much less."""
AGED: Final = 600
"""From this number on, reads asked for a `max_staleness` of `MAX_STALENESS` seconds."""

MAX_STALENESS: Final = 5.0

WRITE_PAUSE_SECONDS: Final = 0.006
WRITE_THROUGH: Final = 0.1  # of the writes
READ_BACK: Final = 0.2  # of the writes that their writer reads back
EARLY: Final = {"shelf": 10.0}  # by cache: entries are refreshed before the end of their time, by chance
LOCAL: Final = ("item", "shelf")  # caches that may be kept in the memory of a process
MANY: Final = 0.3  # of the reads that ask for several keys at once
ASKS: Final = {"lsn": 0.25, "age": 0.1}  # of the reads: those that ask for an LSN, and for an age
SLOW: Final = 0.1  # of the loads that take their time between the query and the fill
SLOW_SECONDS: Final = 0.1
SLACK_SECONDS: Final = 1.0
"""Where no daemon writes a watermark, a read is held against what had been committed for so long."""

# The driver of a cluster that awaits may also fail over a connection that it has closed meanwhile.
_NO_ANSWER: Final = (redis.RedisError, OSError, AttributeError)

# FILL without its look at the lock: what an application does that stores whatever it has loaded.
_UNFENCED: Final = "redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) redis.call('UNLINK', KEYS[1]) return 1"


class Setting(NamedTuple):
    """What a process of the application is told."""

    dsn: str
    loads: str  # the DSN that readers load from, which may be a standby's
    url: str
    rules: Path
    folder: Path
    lease: bool
    local: bool
    standby: str = ""


class Asked(NamedTuple):
    """How fresh a read is to be: all commits up to an LSN, or all that are so many seconds old."""

    lsn: int | None = None
    age: float | None = None

    def of(self, caches: Any, handles: Mapping[str, Any], name: str) -> Any:
        """Give the cache whose reads are so fresh."""
        return handles[name] if self.lsn is None else caches.at_least(self.lsn)[name]

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.age is None else {"max_staleness": self.age}


NOTHING: Final = Asked()


@dataclass
class Journal:
    """What one thread or task has seen, and what it last knew of the watermark.

    ``lsn``: by cache, the highest watermark that has been read; a lost watermark takes nothing back.
    """

    reader: int
    reads: Reads
    lsn: dict[str, int]
    standby: str = ""

    @classmethod
    def of(cls, number: int, standby: str = "") -> Journal:
        return cls(number, Reads(), {kind.name: 0 for kind in CACHES}, standby)

    def watermark(self, found: Sequence[bytes | None]) -> None:
        """Take what HMGET of `FIELDS` gave: it speaks for the caches and standbys that are named, and for no other."""
        lsn, rules, standbys = found
        if self.standby and json.loads(standbys or b"{}").get(self.standby) is None:
            return
        if lsn is not None and rules is not None:
            for name in json.loads(rules).keys() & self.lsn.keys():
                self.lsn[name] = max(self.lsn[name], int(lsn))

    def note(self, kind: Kind, values: Mapping[int, Value], loaded: set[int], began: int, asked: Asked) -> None:
        ended = time.monotonic_ns()
        lsn = self.lsn[kind.name] if asked.lsn is None else asked.lsn
        reader = self.reader
        if asked.lsn is not None and reader < ASKING:
            reader += ASKING
        elif asked.age is not None:
            reader += AGED
        for number, value in values.items():
            self.reads.add(
                Read(
                    reader,
                    CACHES.index(kind),
                    kind.first + number,
                    began,
                    ended,
                    lsn,
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

    def asks(self, lsn: int) -> Asked:
        """Give what the next read asks for; ``lsn``: one that is known to be in the database."""
        (what,) = self._dice.choices([*ASKS, ""], [*ASKS.values(), 1 - sum(ASKS.values())])
        return {"lsn": Asked(lsn=lsn), "age": Asked(age=MAX_STALENESS)}.get(what, NOTHING)

    def slowness(self) -> float:
        return self._dice.random() * SLOW_SECONDS if self._dice.random() < SLOW else 0.0


def made(setting: Setting, registry: prometheus_client.CollectorRegistry) -> dict[str, Any]:
    """Give the arguments that all caches are made with; without the lease the library's own fill has no fence."""
    if not setting.lease:
        scripts.FILL = _UNFENCED
    return {"slot": SLOT, "registry": registry, "standby": setting.standby}


def handles(caches: Any) -> dict[str, Any]:
    """Give the caches by name, each with its options."""
    return {kind.name: caches[kind.name].using(early=EARLY.get(kind.name, 0.0)) for kind in CACHES}


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
    journals = [Journal.of(first + number, setting.standby) for number in range(THREADS)]
    with contextlib.closing(client(setting.url)) as shared:
        caches = reader.Caches.from_rules(setting.rules, shared, **made(setting, registry))

        def work(journal: Journal) -> None:
            with (
                psycopg.connect(setting.loads, autocommit=True) as loading,
                psycopg.connect(setting.dsn, autocommit=True) as primary,
                contextlib.closing(client(setting.url)) as own,
            ):
                loop = SyncReader(caches, loading, primary, own, journal)
                while not stop.is_set():
                    loop.step()
                    if sum(len(each.reads) for each in journals) >= goal:
                        reached.set()

        with caches.local(*LOCAL) if setting.local else contextlib.nullcontext():
            _in_threads(work, journals)
    _save(setting, first, journals, registry)


class SyncReader:
    """One thread's reads.

    Args:
        caches: what is read through.
        loading: the connection that loads.
        primary: the primary's, by which a read with a demand loads where the first is a standby's.
        client: of Redis, for the watermark.
        journal: where reads are noted.
    """

    def __init__(
        self,
        caches: Any,
        loading: psycopg.Connection[Any],
        primary: psycopg.Connection[Any],
        client: Any,
        journal: Journal,
    ) -> None:
        self._caches = caches
        self._handles = handles(caches)
        self._loading = loading
        self._primary = primary
        self._client = client
        self._journal = journal
        self._choice = Choice(journal.reader)
        self._lsn = 0

    def step(self) -> None:
        """Read the watermark, then something else."""
        self.look_at_the_watermark()
        kind, numbers = self._choice.next()
        asked = self._choice.asks(self._lsn)
        if asked.lsn is not None:
            # By the next time, busts may have come so far.
            self._lsn = commit_lsn(self._primary)
        if len(numbers) == 1:
            self.get(kind, numbers[0], asked)
        else:
            self.get_many(kind, numbers, asked)

    def look_at_the_watermark(self) -> None:
        with contextlib.suppress(*_NO_ANSWER):  # a fault; what was known before still holds
            self._journal.watermark(self._client.hmget(WATERMARK, *FIELDS))

    def get(self, kind: Kind, number: int, asked: Asked = NOTHING, meanwhile: Callable[[], None] | None = None) -> None:
        """Read one. ``meanwhile``: happens between its query and its fill."""
        loaded: set[int] = set()

        def load(connection: psycopg.Connection[Any], **_: int) -> Value:
            value = kind.load(connection, [number])[number]
            loaded.add(number)
            if meanwhile is None:
                time.sleep(self._choice.slowness())
            else:
                meanwhile()
            return value

        cache = asked.of(self._caches, self._handles, kind.name)
        began = time.monotonic_ns()
        value = cache.get({kind.parameter: number}, **self._loads(load), **asked.options)
        self._journal.note(kind, {number: value}, loaded, began, asked)

    def get_many(self, kind: Kind, numbers: list[int], asked: Asked) -> None:
        loaded: set[int] = set()

        def load(connection: psycopg.Connection[Any], missing: Sequence[int]) -> dict[int, Value]:
            values = kind.load(connection, missing)
            loaded.update(missing)
            time.sleep(self._choice.slowness())
            return values

        cache = asked.of(self._caches, self._handles, kind.name)
        began = time.monotonic_ns()
        values = cache.get_many(numbers, **self._loads(load), **asked.options)
        self._journal.note(kind, dict(zip(numbers, values, strict=True)), loaded, began, asked)

    def _loads(self, load: Callable[..., Any]) -> dict[str, Any]:
        """Give the loader, and beside one of a standby that of the primary."""
        loads = {"load": partial(load, self._loading)}
        return loads | {"primary": partial(load, self._primary)} if self._journal.standby else loads


def read_asynchronously(setting: Setting, first: int, goal: int, reached: Any, stop: Any) -> None:
    """Be a process with tasks that share a client; see `read_synchronously`."""
    asyncio.run(_read_asynchronously(setting, first, goal, reached, stop))


async def _read_asynchronously(setting: Setting, first: int, goal: int, reached: Any, stop: Any) -> None:
    registry = prometheus_client.CollectorRegistry()
    journals = [Journal.of(first + number, setting.standby) for number in range(TASKS)]
    shared = async_client(setting.url)
    caches = reader.AsyncCaches.from_rules(setting.rules, shared, **made(setting, registry))

    async def work(journal: Journal) -> None:
        async with (
            await psycopg.AsyncConnection.connect(setting.loads, autocommit=True) as loading,
            await psycopg.AsyncConnection.connect(setting.dsn, autocommit=True) as primary,
        ):
            loop = _AsyncReader(caches, loading, primary, shared, journal)
            while not stop.is_set():
                await loop.step()
                if sum(len(each.reads) for each in journals) >= goal:
                    reached.set()

    try:
        async with caches.local(*LOCAL) if setting.local else contextlib.nullcontext(), asyncio.TaskGroup() as tasks:
            for journal in journals:
                tasks.create_task(work(journal))
    finally:
        await shared.aclose()
    _save(setting, first, journals, registry)


class _AsyncReader:
    """One task's reads; see `SyncReader`."""

    def __init__(
        self,
        caches: Any,
        loading: psycopg.AsyncConnection[Any],
        primary: psycopg.AsyncConnection[Any],
        client: Any,
        journal: Journal,
    ) -> None:
        self._caches = caches
        self._handles = handles(caches)
        self._loading = loading
        self._primary = primary
        self._client = client
        self._journal = journal
        self._choice = Choice(journal.reader)
        self._lsn = 0

    async def step(self) -> None:
        with contextlib.suppress(*_NO_ANSWER):  # a fault; what was known before still holds
            self._journal.watermark(await self._client.hmget(WATERMARK, *FIELDS))
        kind, numbers = self._choice.next()
        asked = self._choice.asks(self._lsn)
        if asked.lsn is not None:
            self._lsn = await acommit_lsn(self._primary)
        loaded: set[int] = set()

        async def load(connection: psycopg.AsyncConnection[Any], missing: Sequence[int]) -> dict[int, Value]:
            cursor = await connection.execute(*kind.query(missing))
            values = kind.values(await cursor.fetchall())
            loaded.update(missing)
            await asyncio.sleep(self._choice.slowness())
            return values

        async def load_one(connection: psycopg.AsyncConnection[Any], **_: int) -> Value:
            return (await load(connection, numbers))[numbers[0]]

        of_one = len(numbers) == 1
        loads: dict[str, Any] = {"load": partial(load_one if of_one else load, self._loading)}
        if self._journal.standby:
            loads["primary"] = partial(load_one if of_one else load, self._primary)
        began = time.monotonic_ns()
        cache = asked.of(self._caches, self._handles, kind.name)
        if of_one:
            values = [await cache.get({kind.parameter: numbers[0]}, **loads, **asked.options)]
        else:
            values = await cache.get_many(numbers, **loads, **asked.options)
        self._journal.note(kind, dict(zip(numbers, values, strict=True)), loaded, began, asked)


def write(setting: Setting, first: int, stop: Any) -> None:
    """Be a process with threads that write, and read some of their own writes back, until ``stop`` is set."""
    registry = prometheus_client.CollectorRegistry()
    journals = [Journal.of(first + number, setting.standby) for number in range(WRITERS)]
    writes, commits = Writes(), 0
    lock = threading.Lock()
    with contextlib.closing(client(setting.url)) as shared:
        caches = reader.Caches.from_rules(setting.rules, shared, **made(setting, registry))

        def work(journal: Journal) -> None:
            nonlocal commits
            dice = random.Random(journal.reader)
            with (
                psycopg.connect(setting.dsn, autocommit=True) as connection,
                contextlib.closing(client(setting.url)) as own,
            ):
                writer = Writer(connection, journal.reader)
                loop = SyncReader(caches, connection, connection, own, journal)
                while not stop.is_set():
                    if dice.random() < WRITE_THROUGH:
                        item, lsn = _write_through(caches, writer, connection)
                    else:
                        item, lsn = writer.write()
                    if dice.random() < READ_BACK:
                        loop.get(CACHES[0], item, Asked(lsn=lsn))
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
    journal = Journal.of(first, setting.standby)
    with (
        contextlib.closing(client(setting.url)) as shared,
        psycopg.connect(setting.dsn, autocommit=True) as reading,
        psycopg.connect(setting.dsn, autocommit=True) as writing,
    ):
        caches = reader.Caches.from_rules(setting.rules, shared, **made(setting, registry))
        loop = SyncReader(caches, reading, reading, shared, journal)
        writer = Writer(writing, first)

        def overtaken(item: int) -> None:
            writer.touch(item)
            if wait:
                settled(setting.dsn, shared, SLOT)

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
