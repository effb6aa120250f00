"""One run of one contender on one backlog: from the first change that is sent to it to the last key that is gone."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import contenders, keyspace, measure, source

from cdc_invalidator import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.contenders import Contender, Running

ATTEMPTS = 5
UP_SECONDS = 60.0
SECONDS = 900.0
"""A deadline for what should take seconds: a benchmark that hangs has failed."""

# What is left to do after the last key (an event, a watermark) belongs to the work as well.
TRAILING_SECONDS = 0.3


class Late(Exception):
    """The contender was not up when the walsender had passed the lead: its start would be measured."""


@dataclass
class Place:
    """Servers of their own for one workload, so that the WAL holds nothing else."""

    pg: source.Source
    keys: keyspace.Keyspace
    folder: Path


@contextmanager
def place(tables: Sequence[str]) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        with embedded.Postgres(settings=source.SETTINGS) as postgres, embedded.Valkey() as valkey:
            yield Place(source.Source(postgres, tables), keyspace.Keyspace(valkey), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
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
    """CPU seconds of all three who work, at one moment."""

    at: float
    contender: float
    walsender: float
    valkey: float

    @classmethod
    def read(cls, running: Running, walsender: int, where: Place) -> Clock:
        contender, valkey = measure.cpu_seconds(running.pid), measure.cpu_seconds(where.keys.pid)
        return cls(time.monotonic(), contender, measure.cpu_seconds(walsender), valkey)


@dataclass(frozen=True)
class Figures:
    """What one run gave. Times in seconds, CPU in µs a change."""

    changes: int
    seconds: float
    cpu: float
    walsender_cpu: float
    valkey_cpu: float
    memory_mb: float

    @property
    def rate(self) -> float:
        return self.changes / self.seconds


def drain(where: Place, contender: Contender, tables: Sequence[str], stale: Sequence[str], changes: int) -> Figures:
    """Let a contender consume the backlog.

    Args:
        where: the servers, with a backlog written.
        contender: who.
        tables: those whose keys are to be deleted.
        stale: the keys that the backlog makes stale, in its order.
        changes: how many changes the backlog has.
    """
    for _ in range(ATTEMPTS):
        try:
            return _drain(where, contender, tables, stale[: len(stale) // contender.part], changes // contender.part)
        except Late:
            continue
    raise Late


def _drain(where: Place, contender: Contender, tables: Sequence[str], stale: Sequence[str], changes: int) -> Figures:
    where.keys.fill(stale)
    with (
        keyspace.Watch(where.keys, stale[-1:]) as watch,
        consuming(where, contender, tables) as (running, slot),
    ):
        walsender = _lead_passed(where, contender, running, slot)
        start = Clock.read(running, walsender, where)
        done = _gone(watch, where, running, stale) if contender.busts else _read(contender, running)
        memory = measure.memory_mb(running.pid)
        time.sleep(TRAILING_SECONDS)
        end = Clock.read(running, walsender, where)
    each = 1e6 / changes
    return Figures(
        changes=changes,
        seconds=done - start.at,
        cpu=(end.contender - start.contender) * each,
        walsender_cpu=(end.walsender - start.walsender) * each,
        valkey_cpu=(end.valkey - start.valkey) * each,
        memory_mb=memory,
    )


def _lead_passed(where: Place, contender: Contender, running: Running, slot: str) -> int:
    """Wait until the backlog proper begins to be sent, and give the walsender's process id."""
    deadline = time.monotonic() + UP_SECONDS
    up = False
    while True:
        sender = where.pg.sender(slot, where.pg.lead_end)
        up = up or contender.up(running)
        if sender and sender.passed:
            if not up:
                raise Late
            return sender.pid
        if time.monotonic() > deadline:
            raise TimeoutError(f"{contender.name} does not stream: {running.said()[-2000:]}")
        time.sleep(0.001)


def _gone(watch: keyspace.Watch, where: Place, running: Running, stale: Sequence[str]) -> float:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            at, _ = watch.gone(1.0)
        except TimeoutError:
            running.must_live()
            if time.monotonic() > deadline:
                raise keyspace.Left(f"{stale[-1]} is still there") from None
        else:
            break
    # Who deletes in the stream's order has left none; who does not has its clock stopped when the last one is gone.
    return at if not where.keys.count(stale) else where.keys.await_gone(stale, SECONDS)


def _read(contender: Contender, running: Running) -> float:
    deadline = time.monotonic() + SECONDS
    while (done := contender.finished(running)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{contender.name} does not reach the end: {running.said()[-2000:]}")
        time.sleep(0.005)
    return done
