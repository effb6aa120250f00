"""One trial: servers, a daemon and the application for one mode, and what the checker says of it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import psycopg
import redis
from consistency import application, shelves
from consistency.application import SLACK_SECONDS, SLOT, Journal, Setting, SyncReader, Tally
from consistency.checker import History, Stale, behind
from consistency.faults import Faults
from consistency.history import Read, Reads
from consistency.shelves import CACHES
from proxy import Proxy
from running import RunningDaemon, settled

from cdc_invalidator import reader
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.reader.local import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

RACES: Final = 8
LOCAL_SECONDS: Final = PATIENCE + 0.5
"""What is kept in the memory of a process may be so old, by its own watch and a slow machine's."""

REFILL_SECONDS: Final = 1.5
"""What readers are given to fill the cache again, which is longer than their breaker keeps them from it."""


class Mode(NamedTuple):
    """What is left out, and whether faults befall the rest."""

    name: str
    lease: bool = True
    daemon: bool = True
    faults: bool = False
    local: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is left out that the promise needs."""
        return self.lease and self.daemon


CONTRACT: Final = Mode("the contract, with faults", faults=True)
LOCAL: Final = Mode("the same, with local memory (2.5 s behind)", faults=True, local=True)
NO_LEASE: Final = Mode("without the lease", lease=False)
NO_DAEMON: Final = Mode("without the daemon", daemon=False)
MODES: Final = (CONTRACT, LOCAL, NO_LEASE, NO_DAEMON)


@dataclass
class Outcome:
    """What a trial has come to; counters are by the name of the cache.

    ``stale``: reads that were older than their watermark; ``left``: entries that were stale when all was quiet.
    """

    mode: Mode
    reads: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    dropped: int = 0
    commits: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    examples: list[Stale] = field(default_factory=list)


def run(mode: Mode, goal: int, postgres: Postgres, folder: Path, *, seed: int = 1) -> Outcome:
    """Let the application read so much in this mode, and judge what it saw.

    Args:
        mode: what is left out.
        goal: reads, roughly.
        postgres: where a database is made; it is removed afterwards.
        folder: an empty one, for the histories.
        seed: of the faults.
    """
    with contextlib.ExitStack() as stack:
        dsn = postgres.create_database(name := f"consistency_{folder.name}")
        stack.callback(postgres.drop_database, name)
        valkey = stack.enter_context(Valkey())
        return _Trial(mode, dsn, valkey, folder, stack).run(goal, seed)


class _Trial:
    def __init__(self, mode: Mode, dsn: str, valkey: Valkey, folder: Path, stack: contextlib.ExitStack) -> None:
        self._mode = mode
        self._dsn = dsn
        self._valkey = valkey
        self._folder = folder
        self._writes = shelves.create(dsn)
        rules = shelves.rules_file(folder)
        to_redis, from_daemon = (stack.enter_context(Proxy(valkey.port)) for _ in range(2))
        server = psycopg.conninfo.conninfo_to_dict(dsn)
        to_postgres = stack.enter_context(Proxy(int(server["port"] or 0)))
        self._ways = (to_redis, from_daemon, to_postgres)
        self._setting = Setting(dsn, _by_way_of(valkey.url, to_redis), rules, folder, mode.lease, mode.local)
        self._daemon: RunningDaemon | None = None
        if mode.daemon:
            daemon = RunningDaemon(
                dsn=psycopg.conninfo.make_conninfo(dsn, port=to_postgres.port),
                redis_url=_by_way_of(valkey.url, from_daemon),
                rules=rules,
                slot=SLOT,
            )
            self._daemon = stack.enter_context(daemon).ready()
            self._settle()

    def run(self, goal: int, seed: int) -> Outcome:
        outcome = Outcome(self._mode)
        began = time.monotonic()
        races = _started(application.race, self._setting, 1, RACES, self._mode.daemon)
        with _watched(races) as wait:
            wait(lambda: not races.is_alive())
        self._play(outcome, goal, seed)
        outcome.seconds = time.monotonic() - began
        self._judge(outcome, self._collect(outcome))
        return outcome

    def _play(self, outcome: Outcome, goal: int, seed: int) -> None:
        """Run the processes until the readers have read so much; readers end last, with a cache that is full again."""
        stop_writing, stop_reading = _APART.Event(), _APART.Event()
        goals = [_APART.Event(), _APART.Event()]
        readers = [
            _started(application.read_synchronously, self._setting, 100, goal // 2, goals[0], stop_reading),
            _started(application.read_asynchronously, self._setting, 200, goal // 2, goals[1], stop_reading),
        ]
        writer = _started(application.write, self._setting, application.FIRST_WRITER, stop_writing)
        with _watched(*readers, writer) as wait:
            with self._befallen(outcome, seed):
                wait(lambda: all(reached.is_set() for reached in goals))
            stop_writing.set()
            wait(lambda: not writer.is_alive())
            self._settle()
            time.sleep(REFILL_SECONDS)
            stop_reading.set()
            wait(lambda: not any(process.is_alive() for process in readers))

    @contextlib.contextmanager
    def _befallen(self, outcome: Outcome, seed: int) -> Iterator[None]:
        if not self._mode.faults:
            yield
            return
        assert self._daemon is not None
        with Faults(self._daemon, self._valkey, self._ways, seed) as faults:
            yield
        outcome.faults = faults.befell

    def _settle(self) -> None:
        """Wait until the daemon, if there is one, has busted all that was written."""
        if self._daemon is not None:
            self._daemon.ready()
            with redis.Redis.from_url(self._valkey.url) as client:
                settled(self._dsn, client, SLOT)

    # What it has come to.

    def _collect(self, outcome: Outcome) -> Reads:
        """Read what the processes have written down."""
        reads = Reads()
        for path in sorted(self._folder.glob("*.reads")):
            reads.load(path)
        for path in self._folder.glob("*.writes"):
            self._writes.load(path)
        for path in self._folder.glob("*.tally"):
            tally = Tally(*json.loads(path.read_text()))
            outcome.dropped += tally.dropped
            outcome.commits += tally.commits
        return reads

    def _judge(self, outcome: Outcome, reads: Reads) -> None:
        history = History(self._writes)
        judged: Iterable[Read] = reads
        if not self._mode.daemon:
            judged = history.without_watermark(reads, SLACK_SECONDS)
        elif self._mode.local:
            judged = behind(reads, LOCAL_SECONDS, application.FIRST_WRITER)
        for stale in history.stale(judged):
            outcome.stale[CACHES[stale.read.cache].name] += 1
            outcome.examples.append(stale)
        for read in reads:
            name = CACHES[read.cache].name
            outcome.reads[name] += 1
            outcome.cached[name] += read.cached
        look = [read for read in self._look() if read.cached]
        outcome.entries = len(look)
        for stale in history.stale(history.latest(look)):
            outcome.left[CACHES[stale.read.cache].name] += 1

    def _look(self) -> Reads:
        """Read everything once more, now that all is quiet."""
        journal = Journal.of(0)
        with (
            psycopg.connect(self._dsn, autocommit=True) as connection,
            redis.Redis.from_url(self._valkey.url) as client,
        ):
            caches = reader.Caches.from_rules(self._setting.rules, client, slot=SLOT)
            loop = SyncReader(caches, connection, client, journal)
            for kind in CACHES:
                for number in range(kind.size):
                    loop.get(kind, number)
        return journal.reads


# Processes that share no connection and no lock with this one, and don't import everything anew.
_APART: Final = multiprocessing.get_context("forkserver")
_APART.set_forkserver_preload([application.__name__])


def _started(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = _APART.Process(target=target, args=arguments)
    process.start()
    return process


@contextlib.contextmanager
def _watched(*processes: ForkServerProcess) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Give what waits for a condition; when one of these processes fails, and in the end, none of them is left."""

    def wait(condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(0.02)
            if failed := [process for process in processes if process.exitcode]:
                raise RuntimeError(f"processes of the application have failed: {failed}")

    try:
        yield wait
    finally:
        for process in processes:
            process.kill()
            process.join()


def _by_way_of(url: str, proxy: Proxy) -> str:
    return url.replace(f":{urlsplit(url).port}/", f":{proxy.port}/")
