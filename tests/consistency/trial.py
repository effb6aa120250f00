"""One trial: servers, a daemon and the application for one mode, and what the checker says of it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from consistency import application, shelves
from consistency.application import (
    AGED,
    ASKING,
    MAX_STALENESS,
    SLACK_SECONDS,
    SLOT,
    Journal,
    Setting,
    SyncReader,
    Tally,
)
from consistency.checker import History, Impossible, Stale, behind
from consistency.faults import Faults
from consistency.history import Read, Reads
from consistency.shelves import CACHES
from consistency.stores import Clustered, Single, Store, Watched
from proxy import Proxy
from running import RunningDaemon, settled
from standby import Standby

from cdc_invalidator import reader
from cdc_invalidator.postgres import standbys
from cdc_invalidator.reader.local import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres

RACES: Final = 8
LOCAL_SECONDS: Final = PATIENCE + 0.5
"""What is kept in the memory of a process may be so old, by its own watch and a slow machine's."""

STALE_SECONDS: Final = shelves.STALE_SECONDS + 0.5
"""What a bust has left may be so old."""

REFILL_SECONDS: Final = 1.5
"""What readers are given to fill the cache again, which is longer than their breaker keeps them from it."""


class Mode(NamedTuple):
    """What is left out, what there is besides, and what befalls it.

    ``store``: makes the Redis. ``fails_over``: it may be replaced by one that lacks busts, and plain reads may meet
    either; what asks for a freshness may not. ``standby``: readers load from a standby, which lags. ``stale``: the
    rules have `stale_for`. ``allowed``: seconds that a plain read may be behind.
    """

    name: str
    lease: bool = True
    daemon: bool = True
    faults: bool = False
    local: bool = False
    store: Callable[[], Store] = Single
    fails_over: bool = False
    standby: bool = False
    stale: bool = False
    allowed: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing is left out that the promise needs."""
        return self.lease and self.daemon


CONTRACT: Final = Mode("the contract, with faults", faults=True)
LOCAL: Final = Mode("the same, with local memory (2.5 s behind)", faults=True, local=True, allowed=LOCAL_SECONDS)
STALE: Final = Mode("the same, with `stale_for: 2s` (2.5 s behind)", faults=True, stale=True, allowed=STALE_SECONDS)
STANDBY: Final = Mode("the same, loading from a standby that lags", faults=True, standby=True)
PLANNED: Final = Mode("Sentinel, planned failovers", faults=True, store=partial(Watched, planned=True), fails_over=True)
LOST: Final = Mode(
    "Sentinel, masters lost while the replica lags", faults=True, store=partial(Watched, planned=False), fails_over=True
)
CLUSTER: Final = Mode("a cluster, masters lost while the replica lags", faults=True, store=Clustered, fails_over=True)
NO_LEASE: Final = Mode("without the lease", lease=False)
NO_DAEMON: Final = Mode("without the daemon", daemon=False)
MODES: Final = {
    "contract": CONTRACT,
    "local": LOCAL,
    "stale": STALE,
    "standby": STANDBY,
    "planned": PLANNED,
    "lost": LOST,
    "cluster": CLUSTER,
    "no-lease": NO_LEASE,
    "no-daemon": NO_DAEMON,
}


@dataclass
class Outcome:
    """What a trial has come to; counters are by the name of the cache.

    ``stale``: plain reads that were older than their watermark; ``asking``: reads that asked for an LSN, and ``older``:
    those that were older than that; ``aged``: reads that asked for a `max_staleness`, and ``too_old``: those that were
    older; ``left``: entries that were stale when all was quiet. ``examples``: of what breaks a promise.
    """

    mode: Mode
    reads: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    asking: int = 0
    older: int = 0
    aged: int = 0
    too_old: int = 0
    entries: int = 0
    dropped: int = 0
    commits: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    examples: list[Stale] = field(default_factory=list)

    @property
    def as_promised(self) -> bool:
        """Whether nothing is wrong that the mode promises; of one that is not sound, whether that was seen."""
        wrong = self.left.total() + self.older + self.too_old
        if not self.mode.fails_over:
            wrong += self.stale.total()
        return (wrong == 0) == self.mode.sound


def run(mode: Mode, goal: int, postgres: Postgres, folder: Path, *, seed: int = 1, faults: int = 0) -> Outcome:
    """Let the application read so much in this mode, and judge what it saw.

    Args:
        mode: what is left out.
        goal: reads, roughly.
        postgres: where a database is made; it is removed afterwards.
        folder: an empty one, for the histories.
        seed: of the faults.
        faults: how many there are at least, where there are any.
    """
    with contextlib.ExitStack() as stack:
        dsn = postgres.create_database(name := f"consistency_{folder.name}")
        stack.callback(postgres.drop_database, name)
        store = stack.enter_context(mode.store())
        standby = stack.enter_context(Standby(postgres)) if mode.standby else None
        return _Trial(mode, dsn, store, standby, folder, stack).run(goal, seed, faults)


class _Trial:
    def __init__(
        self,
        mode: Mode,
        dsn: str,
        store: Store,
        standby: Standby | None,
        folder: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self._mode = mode
        self._dsn = dsn
        self._store = store
        self._standby = standby
        self._folder = folder
        self._writes = shelves.create(dsn)
        rules = shelves.rules_file(folder, stale=mode.stale)
        server = psycopg.conninfo.conninfo_to_dict(dsn)
        to_postgres = stack.enter_context(Proxy(int(server["port"] or 0)))
        self._ways = (*store.ways, to_postgres)
        self._setting = Setting(dsn, dsn, store.url, rules, folder, mode.lease, mode.local)
        self._daemon: RunningDaemon | None = None
        if mode.daemon:
            daemon = RunningDaemon(
                dsn=psycopg.conninfo.make_conninfo(dsn, port=to_postgres.port),
                redis_url=store.daemon_url,
                rules=rules,
                slot=SLOT,
                **self._with_standby(),
            )
            self._daemon = stack.enter_context(daemon).ready()
            self._settle()

    def _with_standby(self) -> dict[str, str]:
        """Give the daemon's settings for the standby; busts wait for it no longer than some of its lags last."""
        if self._standby is None:
            return {}
        self._standby.catch_up()
        loads = self._standby.dsn_for(str(psycopg.conninfo.conninfo_to_dict(self._dsn)["dbname"]))
        self._setting = self._setting._replace(loads=loads, standby=standbys.name(loads))
        return {"postgres_standbys": loads, "standby_limit": "2"}

    def run(self, goal: int, seed: int, faults: int) -> Outcome:
        outcome = Outcome(self._mode)
        began = time.monotonic()
        races = _started(application.race, self._setting, 1, RACES, self._mode.daemon)
        with _watched(races) as wait:
            wait(lambda: not races.is_alive())
        self._play(outcome, goal, seed, faults)
        outcome.seconds = time.monotonic() - began
        self._judge(outcome, self._collect(outcome))
        return outcome

    def _play(self, outcome: Outcome, goal: int, seed: int, faults: int) -> None:
        """Run the processes until the readers have read so much; readers end last, with a cache that is full again."""
        stop_writing, stop_reading = _APART.Event(), _APART.Event()
        goals = [_APART.Event(), _APART.Event()]
        readers = [
            _started(application.read_synchronously, self._setting, 100, goal // 2, goals[0], stop_reading),
            _started(application.read_asynchronously, self._setting, 200, goal // 2, goals[1], stop_reading),
        ]
        writer = _started(application.write, self._setting, application.FIRST_WRITER, stop_writing)
        with _watched(*readers, writer) as wait:
            with self._befallen(outcome, seed) as enough:
                wait(lambda: enough(faults) and all(reached.is_set() for reached in goals))
            stop_writing.set()
            wait(lambda: not writer.is_alive())
            self._settle()
            time.sleep(REFILL_SECONDS)
            stop_reading.set()
            wait(lambda: not any(process.is_alive() for process in readers))

    @contextlib.contextmanager
    def _befallen(self, outcome: Outcome, seed: int) -> Iterator[Callable[[int], bool]]:
        if not self._mode.faults:
            yield lambda _: True
            return
        assert self._daemon is not None
        with Faults(self._daemon, self._store, self._ways, self._standby, seed) as faults:
            yield faults.enough
        outcome.faults = faults.befell

    def _settle(self) -> None:
        """Wait until the daemon, if there is one, has busted all that was written."""
        if self._daemon is not None:
            self._daemon.ready()
            with contextlib.closing(self._store.directly()) as client:
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
        plain: Iterable[Read] = (read for read in reads if read.reader < ASKING)
        if self._mode.daemon and not any(read.watermark for read in plain):
            raise Impossible("No watermark was ever read, so nothing could be stale.")
        plain = (read for read in reads if read.reader < ASKING)
        if not self._mode.daemon:
            plain = history.without_watermark(plain, SLACK_SECONDS)
        elif self._mode.allowed:
            plain = behind(plain, self._mode.allowed, ASKING)
        for stale in history.stale(plain):
            outcome.stale[CACHES[stale.read.cache].name] += 1
            if not self._mode.fails_over:
                outcome.examples.append(stale)
        for read in reads:
            name = CACHES[read.cache].name
            outcome.reads[name] += 1
            outcome.cached[name] += read.cached
            outcome.asking += ASKING <= read.reader < AGED
            outcome.aged += read.reader >= AGED
        older = list(history.stale(read for read in reads if ASKING <= read.reader < AGED))
        aged = history.without_watermark((read for read in reads if read.reader >= AGED), MAX_STALENESS)
        too_old = list(history.stale(aged))
        outcome.older, outcome.too_old = len(older), len(too_old)
        outcome.examples += older + too_old
        look = [read for read in self._look() if read.cached]
        outcome.entries = len(look)
        for stale in history.stale(history.latest(look)):
            outcome.left[CACHES[stale.read.cache].name] += 1
            outcome.examples.append(stale)

    def _look(self) -> Reads:
        """Read everything once more, now that all is quiet."""
        journal = Journal.of(0)
        with (
            psycopg.connect(self._dsn, autocommit=True) as connection,
            contextlib.closing(self._store.directly()) as client,
        ):
            caches = reader.Caches.from_rules(self._setting.rules, client, slot=SLOT)
            loop = SyncReader(caches, connection, connection, client, journal)
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
