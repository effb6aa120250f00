"""One run of one contender on one backlog: from the first change that is sent to it to the last key that is gone."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench import contenders, keyspace, measure, source
from bench.contenders import Running

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.contenders import Contender

ATTEMPTS = 5
UP_SECONDS = 60.0
SETTLE_SECONDS = 0.5
SECONDS = 900.0
"""A deadline for what should take seconds: a benchmark that hangs has failed."""

# What is left to do after the last key (an event, a watermark) belongs to the work as well.
TRAILING_SECONDS = 0.3


class Late(Exception):
    """The contender was not up when the walsender had passed the lead: its start would be measured.

    Or it was through with a small backlog before the clock could be started. It runs again.
    """


@dataclass
class Place:
    """Servers of their own for one workload, so that the WAL holds nothing else."""

    pg: source.Source
    keys: keyspace.Keyspace
    folder: Path


@contextlib.contextmanager
def place(tables: Sequence[str]) -> Iterator[Place]:
    """Start the servers, with these tables in the database."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Postgres(settings=source.SETTINGS) as postgres,
        Valkey() as valkey,
        contextlib.closing(source.Source(postgres, tables)) as pg,
        contextlib.closing(keyspace.Keyspace(valkey)) as keys,
    ):
        yield Place(pg, keys, Path(folder))


@contextlib.contextmanager
def consuming(where: Place, contender: Contender, tables: Sequence[str]) -> Iterator[tuple[Running, str]]:
    """Run a contender on a copy of the slot; the cache has been filled."""
    slot = where.pg.copy_slot()
    contender.believe(where.pg, where.keys, slot)
    job = contenders.Job(
        dsn=where.pg.dsn,
        redis_url=where.keys.url,
        slot=slot,
        tables=tables,
        end=where.pg.end,
        folder=where.folder,
    )
    try:
        with contender.start(job) as running:
            yield running, slot
    finally:
        where.pg.drop_slot(slot)


@dataclass(frozen=True)
class Clock:
    """CPU seconds of all three who work, at one moment; a walsender that has ended left nothing to read."""

    at: float
    contender: float
    walsender: float | None
    valkey: float

    @classmethod
    def read(cls, running: Running, walsender: int, where: Place) -> Clock:
        contender, valkey = measure.cpu_seconds(running.pid), measure.cpu_seconds(where.keys.pid)
        try:
            sender = measure.cpu_seconds(walsender)
        except FileNotFoundError:
            sender = None
        return cls(time.monotonic(), contender, sender, valkey)


@dataclass(frozen=True)
class Work:
    """What a backlog asks for.

    Args:
        tables: those whose keys are to be deleted.
        stale: the keys that the backlog makes stale, in its order.
        kept: keys that are to stay.
        changes: how many changes the backlog has.
    """

    tables: Sequence[str]
    stale: Sequence[str]
    kept: Sequence[str]
    changes: int

    def part(self, parts: int) -> Work:
        """Give the first of so many parts."""
        return replace(self, stale=self.stale[: len(self.stale) // parts], changes=self.changes // parts)


@dataclass(frozen=True)
class Figures:
    """What one run gave. Times in seconds, CPU in µs a change; ``None`` for what ended before it could be read."""

    changes: int
    seconds: float
    cpu: float
    walsender_cpu: float | None
    valkey_cpu: float
    peak_mb: float | None

    @property
    def rate(self) -> float:
        return self.changes / self.seconds


def drain(where: Place, contender: Contender, work: Work) -> Figures:
    """Let a contender consume the backlog.

    Raises:
        keyspace.Left: it left keys that are stale, or deleted others.
    """
    for _ in range(ATTEMPTS):
        with contextlib.suppress(Late):
            return _drain(where, contender, work.part(contender.part))
    raise Late


def _drain(where: Place, contender: Contender, work: Work) -> Figures:
    where.keys.fill([*work.stale, *work.kept])
    with (
        keyspace.Watch(where.keys, work.stale[-1:]) as watch,
        consuming(where, contender, work.tables) as (running, slot),
    ):
        walsender = _lead_passed(where, contender, running, slot)
        start = Clock.read(running, walsender, where)
        if not where.keys.count(work.stale[-1:]):
            raise Late  # else a stream that holds more than the backlog would pass for a very fast one
        done = gone(watch, where, running, work.stale) if contender.busts else _read(contender, running)
        if done <= start.at:
            raise Late
        peak = None if running.ended() else measure.memory_mb(running.pid, "VmHWM")
        if contender.part == 1:
            time.sleep(TRAILING_SECONDS)
        end = Clock.read(running, walsender, where)
        if contender.busts:
            contender.check(running)
        if where.keys.count(work.kept) != len(work.kept):
            raise keyspace.Left(f"{contender.name} deleted keys that were not stale")
    each = 1e6 / work.changes
    return Figures(
        changes=work.changes,
        seconds=done - start.at,
        cpu=(end.contender - start.contender) * each,
        walsender_cpu=_difference(end.walsender, start.walsender, each),
        valkey_cpu=(end.valkey - start.valkey) * each,
        peak_mb=peak,
    )


def _difference(end: float | None, start: float | None, each: float) -> float | None:
    return None if end is None or start is None else (end - start) * each


def caught_up(where: Place, contender: Contender, running: Running, slot: str) -> None:
    """Wait until a contender follows and has nothing left to do."""
    _passed(where, contender, running, slot, where.pg.flushed())
    time.sleep(SETTLE_SECONDS)


def _lead_passed(where: Place, contender: Contender, running: Running, slot: str) -> int:
    """Wait until the backlog proper begins to be sent, and give the walsender's process id.

    Raises:
        Late: the contender was not up by then.
    """
    pid, ready = _passed(where, contender, running, slot, where.pg.lead_end)
    if not ready:
        raise Late
    return pid


def _passed(where: Place, contender: Contender, running: Running, slot: str, lsn: str) -> tuple[int, bool]:
    """Wait until the walsender has passed an LSN; give its process id, and whether the contender was up by then."""
    deadline = time.monotonic() + UP_SECONDS
    up = False
    while True:
        if running.ended():
            running.must_have_succeeded()
            raise Late  # it was through before we looked
        up = up or contender.up(running)
        sender = where.pg.sender(slot, lsn)
        if sender and sender.passed:
            return sender.pid, up
        if time.monotonic() > deadline:
            raise TimeoutError(f"{contender.name} does not stream: {running.said()[-2000:]}")
        time.sleep(0.001)


def gone(watch: keyspace.Watch, where: Place, running: Running, stale: Sequence[str]) -> float:
    """Wait until no key is left, and give the time at which the last one went; the last in ``stale`` is watched."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            at, _ = watch.gone(1.0)
            break
        except TimeoutError:
            running.must_live()
            if time.monotonic() > deadline:
                raise keyspace.Left(f"{stale[-1]} is still there") from None
    # Who deletes in the stream's order has left none; who does not has its clock stopped when the last one is gone.
    return at if not where.keys.count(stale) else where.keys.await_gone(stale, SECONDS)


def _read(contender: Contender, running: Running) -> float:
    deadline = time.monotonic() + SECONDS
    while (done := contender.finished(running)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{contender.name} does not reach the end: {running.said()[-2000:]}")
        time.sleep(0.002)
    return done
