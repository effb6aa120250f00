"""A daemon as a real process, and what a test wants to know of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, ClassVar

import nursery
import psycopg

from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Self

    import redis
    from redis.cluster import RedisCluster

    AnyRedis = redis.Redis | RedisCluster

COMMAND_SECONDS = 60.0
# Which busts are sampled is chance, and a sample may bust once more: tests that count are not left to that. Those of
# the samples ask for all of them.
NO_CHANCE = {"CDC_VERIFY_SAMPLE": "0"}
WAL_PAGE = 8192
WAL_SEGMENT = 16 << 20
SECONDS = 60.0
"""A generous deadline: these machines are slow and shared, and no test fails for that."""


def eventually(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Wait until the condition holds, and give what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        outcome = condition()
        if outcome:
            return outcome
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


def command(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line with these settings and no others."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")}
    env |= NO_CHANCE | {f"CDC_{name.upper()}": str(value) for name, value in settings.items()}
    if nursery.can_fork(env):
        with nursery.Forked(words, env) as process:
            stdout, stderr = process.communicate(COMMAND_SECONDS)
            return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)
    return subprocess.run(
        [sys.executable, "-m", "cdc_invalidator", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


_RUN = [sys.executable, "-m", "cdc_invalidator", "run"]


class RunningDaemon:
    """``python -m cdc_invalidator run`` with its output collected; use it as a context manager.

    It is forked from the nursery, unless ``command`` is another. A subclass may have shorter ``deadlines`` than the
    daemon's, for tests that wait for them to pass; see `nursery.Forked`.
    """

    forked = True
    deadlines: ClassVar[Mapping[str, float]] = {}

    def __init__(self, *, dsn: str, redis_url: str, rules: Path, slot: str, **settings: str) -> None:
        self.command = _RUN
        self.dsn = dsn
        self.redis_url = redis_url
        self.rules = rules
        self.slot = slot
        self.port = int(settings.get("http_port", free_port()))
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")} | {
            "CDC_POSTGRES_DSN": dsn,
            "CDC_REDIS_URL": redis_url,
            "CDC_RULES": str(rules),
            "CDC_SLOT": slot,
            "CDC_PUBLICATION": slot,
            "CDC_HTTP_HOST": "127.0.0.1",
            "CDC_HTTP_PORT": str(self.port),
            **NO_CHANCE,
            **{f"CDC_{name.upper()}": value for name, value in settings.items()},
        }
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._process: nursery.Forked | subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []
        self._unfinished = ""

    def start(self) -> Self:
        """Start it, or start it again."""
        process = self._process = self._started()
        self._unfinished = ""
        self._threads = [
            threading.Thread(target=self._collect_events, args=[process.stdout]),
            threading.Thread(target=self._collect_errors, args=[process.stderr]),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def _started(self) -> nursery.Forked | subprocess.Popen[str]:
        if self.command == _RUN and self.forked and nursery.can_fork(self._env):
            return nursery.Forked(["run"], self._env, self.deadlines)
        assert not self.deadlines, "only a fork has others"
        return subprocess.Popen(self.command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _collect_events(self, lines: Any) -> None:
        for line in lines:
            if line.endswith("\n"):
                self.events.append(json.loads(line))
            else:
                self._unfinished = line
        lines.close()

    def _collect_errors(self, lines: Any) -> None:
        for line in lines:
            self.errors.append(line.rstrip("\n"))
        lines.close()

    @property
    def process(self) -> nursery.Forked | subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for its end and give its exit code."""
        code = self.process.wait(seconds)
        for thread in self._threads:
            thread.join()
        # A pipe takes a line in pieces, so one that is killed may leave a half.
        assert not self._unfinished or code == -signal.SIGKILL, self._unfinished
        return code

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """``kill -9``: nothing is flushed, nobody is told."""
        self.process.kill()
        self.wait()

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()

    def get(self, path: str) -> tuple[int, str]:
        """Ask one of its pages."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def status(self) -> dict[str, Any]:
        code, body = self.get("/status")
        return json.loads(body) if code == 200 else {}

    def ready(self) -> Self:
        """Wait until it stands by, or streams and has done all that it does on its own at the start.

        Until then, what a test caches may be gone by the sweep of the start, and not by a bust.
        """
        self.streams()
        eventually(lambda: self.alive() and self._begun(), "what it does at the start is over")
        return self

    def streams(self) -> Self:
        """Wait until it streams or stands by; the gaps of the start may be open."""
        eventually(lambda: self.alive() and self.get("/readyz")[0] == 200, "the daemon is ready")
        return self

    def _begun(self) -> bool:
        status = self.status()
        role = status.get("role")
        if role == "leader" and status["mode"] == "bust":
            # Gaps are found before the first watermark is written.
            return status["watermark_age_s"] is not None and self.metric("cdc_invalidator_gaps_open") == 0
        return role in {"leader", "standby"}

    def alive(self) -> bool:
        if self.process.poll() is not None:
            self.wait()
            raise AssertionError(f"the daemon ended with {self.process.returncode}: {self.errors} {self.events[-5:]}")
        return True

    def named(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Give the events of that name whose fields have these values."""
        return [
            line
            for line in list(self.events)
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
        ]

    def seen(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event and give the first."""
        first: dict[str, Any] = eventually(lambda: self.named(event, **fields), f"event {event} {fields}")[0]
        return first

    def metric(self, name: str, **labels: str) -> float:
        """Give the sum of a metric's samples with these labels; 0 if there is none."""
        # The metrics come from a thread of their own; what the bust loop has been told by now, it counts before it says
        # how it is.
        self.get("/status")
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            sample, _, value = line.rpartition(" ")
            metric, _, rest = sample.partition("{")
            if metric == name and all(f'{label}="{text}"' in rest for label, text in labels.items()):
                total += float(value)
        return total


class SpawnedDaemon(RunningDaemon):
    """A daemon in an interpreter of its own, for tests of how it starts and what it takes."""

    forked = False


def wal_position(dsn: str) -> int:
    """The LSN after everything that has been committed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone()
    assert row is not None
    position = int(row[0])
    # Where the last record ends with its page, this is the place behind the next page's header, which no position of a
    # walsender reaches before there is another record.
    header = 40 if position % WAL_SEGMENT < WAL_PAGE else 24
    return position - header if position % WAL_PAGE == header else position


def watermark(client: AnyRedis, slot: str) -> Mapping[bytes, bytes]:
    """The watermark hash."""
    found: Any = client.hgetall(f"cdc:{slot}:watermark")
    return found  # type: ignore[no-any-return]


def passed(dsn: str, client: AnyRedis, slot: str) -> None:
    """Wait until the watermark has passed all that has been committed."""
    position = wal_position(dsn)
    eventually(lambda: int(watermark(client, slot).get(b"lsn", 0)) >= position, "the watermark passes the last commit")


def settled(dsn: str, client: AnyRedis, slot: str, seconds: float = SECONDS) -> None:
    """Wait until the watermark has passed all that has been committed, and no gap is open."""
    position = wal_position(dsn)

    def is_settled() -> bool:
        found = watermark(client, slot)
        return int(found.get(b"lsn", 0)) >= position and b"gaps" not in found

    eventually(is_settled, "the watermark passes the last commit, and no gap is open", seconds)


def confirmed(dsn: str, slot: str) -> int:
    """What the slot has been confirmed to.

    Raises:
        LookupError: there is no such slot.
    """
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
    if row is None:
        raise LookupError(slot)
    return int(row[0])


def execute(dsn: str, *statements: Any) -> None:
    """Run statements, each in its own transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)
