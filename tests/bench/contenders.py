"""Who runs: each contender is a process of its own on a slot of its own, told by its environment where to work."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench import source
from psycopg import conninfo

from cdc_invalidator.embedded.process import HOST, free_port
from cdc_invalidator.embedded.servers import postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.keyspace import Keyspace
    from bench.source import Source

SCRIPTS = Path(__file__).parent
STOP_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where a contender works. ``tables``: those whose keys it deletes; ``folder``: for its files, emptied after it."""

    dsn: str
    redis_url: str
    slot: str
    tables: Sequence[str]
    end: str
    folder: Path


class Running:
    """A contender's process; its output goes into a file. Use it as a context manager, which stops it."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], folder: Path) -> None:
        self._output = folder / "output"
        self._errors = folder / "errors"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG"))}
        with self._output.open("wb") as output, self._errors.open("wb") as complaints:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env=inherited | dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=complaints,
                cwd=folder,
            )
        self.pid = self._process.pid

    def ended(self) -> bool:
        """Whether it has ended by itself; it is not reaped, so that its CPU time can still be read."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def must_live(self) -> None:
        if self.ended():
            raise RuntimeError(f"the contender ended: {self._errors.read_text()[-2000:]}{self.said()[-2000:]}")

    def must_have_succeeded(self) -> None:
        outcome = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if outcome is None or outcome.si_status != 0:
            self.must_live()

    def said(self) -> str:
        return self._output.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


class Contender(ABC):
    """One way to consume the stream.

    ``busts``: it deletes keys, else it only reads; ``part``: it is given one part of so many of the changes.
    """

    name: str
    busts = True
    part = 1

    def start(self, job: Job) -> Running:
        return Running(self.command(job), self.environment(job), job.folder)

    @abstractmethod
    def command(self, job: Job) -> list[str | Path]: ...

    def environment(self, job: Job) -> dict[str, str]:
        return {
            "BENCH_DSN": job.dsn,
            "BENCH_REDIS_URL": job.redis_url,
            "BENCH_SLOT": job.slot,
            "BENCH_PUBLICATION": source.PUBLICATION,
            "BENCH_TABLES": ",".join(job.tables),
            "BENCH_MARKER": source.MARKER,
        }

    def up(self, running: Running) -> bool:
        """Whether it is ready for the backlog, given that its walsender is there."""
        running.must_live()
        return True

    def believe(self, pg: Source, keyspace: Keyspace, slot: str) -> None:  # noqa: B027  scripts look for nothing
        """Leave in the cache what this contender has to find there."""

    def check(self, running: Running) -> None:
        """Make sure that it did the work that was meant."""
        running.must_live()

    def finished(self, running: Running) -> float | None:
        """Give the time at which a mere reader reached the end, once it has."""
        raise NotImplementedError


class RawReader(Contender):
    """The limit: of two naps the better one, because the best nap depends on how the walsender writes."""

    busts = False

    def __init__(self, nap_ms: float) -> None:
        self.name = f"raw reader, {nap_ms:g} ms nap"
        self._nap_ms = nap_ms

    @classmethod
    def both(cls) -> list[Contender]:
        return [cls(1), cls(0.2)]

    def command(self, job: Job) -> list[str | Path]:  # noqa: ARG002
        return [sys.executable, SCRIPTS / "raw_reader.py"]

    def environment(self, job: Job) -> dict[str, str]:
        return super().environment(job) | {"BENCH_NAP_MS": str(self._nap_ms)}

    def finished(self, running: Running) -> float | None:
        said = running.said()
        if said.endswith("\n"):
            return float(json.loads(said)["done"])
        running.must_live()
        return None


class PgRecvlogical(Contender):
    """PostgreSQL's own client, to /dev/null, with the daemon's options of the stream."""

    name = "pg_recvlogical"
    busts = False

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    @classmethod
    def found(cls) -> list[Contender]:
        """Find it beside one of the servers; an empty list where no package has it."""
        for folder in reversed(postgres_bin_dirs().values()):
            if (folder / cls.name).exists():
                return [cls(folder / cls.name)]
        return []

    def command(self, job: Job) -> list[str | Path]:
        options = {
            "proto_version": "2",
            "streaming": "on",
            "messages": "true",
            "publication_names": source.PUBLICATION,
        }
        return [
            self._binary,
            *("--start", "--no-loop", "--file=/dev/null", f"--slot={job.slot}", f"--endpos={job.end}"),
            f"--dbname={conninfo.conninfo_to_dict(job.dsn)['dbname']}",
            *(f"--option={name}={value}" for name, value in options.items()),
        ]

    def environment(self, job: Job) -> dict[str, str]:
        where = conninfo.conninfo_to_dict(job.dsn)
        names = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGPASSWORD": "password"}
        return {variable: str(where[name]) for variable, name in names.items()}

    def finished(self, running: Running) -> float | None:
        if not running.ended():
            return None
        now = time.monotonic()
        running.must_have_succeeded()
        return now


class Tuned(Contender):
    name = "tuned script"

    def command(self, job: Job) -> list[str | Path]:  # noqa: ARG002
        return [sys.executable, SCRIPTS / "tuned.py"]


class Tutorial(Contender):
    name = "tutorial's way"
    part = 10  # of all changes it would take minutes

    def command(self, job: Job) -> list[str | Path]:  # noqa: ARG002
        return [sys.executable, SCRIPTS / "tutorial.py"]


class Daemon(Contender):
    """The daemon as users run it: real rules, events to a file, metrics on, default settings."""

    name = "cdc-invalidator"

    def __init__(self, rules: str, name: str = name, *, may_sweep: bool = False) -> None:
        self.name = name
        self._rules = rules
        self._may_sweep = may_sweep
        self._recorded: Any = {}

    def command(self, job: Job) -> list[str | Path]:  # noqa: ARG002
        return [sys.executable, "-m", "cdc_invalidator", "run"]

    def environment(self, job: Job) -> dict[str, str]:
        rules = job.folder / "rules.yaml"
        rules.write_text(self._rules)
        return {
            "CDC_POSTGRES_DSN": job.dsn,
            "CDC_REDIS_URL": job.redis_url,
            "CDC_RULES": str(rules),
            "CDC_SLOT": job.slot,
            "CDC_PUBLICATION": source.PUBLICATION,
            "CDC_HTTP_HOST": HOST,
            "CDC_HTTP_PORT": str(free_port()),
        }

    def up(self, running: Running) -> bool:
        running.must_live()
        return '"streaming"' in running.said()

    def prime(self, pg: Source, keyspace: Keyspace, folder: Path) -> None:
        """Run once on the slot itself, and remember the watermark.

        Without it, each run would begin with a sweep of the caches, because nothing proves that they are up to date.
        """
        keyspace.client.flushall()
        job = Job(dsn=pg.dsn, redis_url=keyspace.url, slot=source.SLOT, tables=pg.tables, end="", folder=folder)
        deadline = time.monotonic() + 60
        with self.start(job) as running:
            # Until the sweep of its new slot is over.
            while not (found := keyspace.client.hgetall(_watermark(source.SLOT))) or b"gaps" in found:
                running.must_live()
                if time.monotonic() > deadline:
                    raise TimeoutError(running.said())
                time.sleep(0.02)
        # The last word is written while it stops.
        self._recorded = keyspace.client.hgetall(_watermark(source.SLOT)) or found

    def check(self, running: Running) -> None:
        # A sweep deletes all keys at once, and would pass for very fast.
        swept = '"action":"sweep"' in running.said()
        if swept and not self._may_sweep:
            raise RuntimeError("the daemon swept a cache: this run has measured something else")

    def believe(self, pg: Source, keyspace: Keyspace, slot: str) -> None:
        """Store the watermark that says: nothing before the slot's position is missing in this cache."""
        keyspace.client.hset(_watermark(slot), mapping={**self._recorded, b"lsn": pg.confirmed(slot)})


def _watermark(slot: str) -> str:
    return f"cdc:{slot}:watermark"
