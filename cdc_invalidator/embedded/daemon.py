"""``cdc-invalidator run`` as a child process beside embedded servers, for the demo and `test --live`.

Its log is read as events, in order.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Self

import psycopg
import redis

from cdc_invalidator import errors
from cdc_invalidator.embedded.process import HOST, ChildProcess, free_port, plain_environment, scratch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

WATERMARK: Final = "cdc:cdc_invalidator:watermark"
READY_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 30.0
STOP_SECONDS: Final = 15.0


class DaemonProcess:
    """A daemon in a child process; leave the ``with`` block to stop it.

    Args:
        dsn: The database.
        url: The Redis.
        rules: The rule file, or the directory of rule files.
        environment: Variables over our own environment, such as ``CDC_…`` settings.
    """

    def __init__(self, dsn: str, url: str, rules: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.events: list[dict[str, Any]] = []
        self._dsn = dsn
        self._url = url
        self._folder = TemporaryDirectory(prefix="daemon-", dir=scratch())
        log = Path(self._folder.name) / "daemon.log"
        log.touch()
        self._lines = log.open("rb")
        self._rest = b""
        self._child = ChildProcess(
            [sys.executable, "-m", "cdc_invalidator", "run"],
            log=log,
            orphaned="TERM",
            environment={**self._environment(rules), **environment},
        )

    def _environment(self, rules: Path) -> dict[str, str]:
        # The user's own CDC_… settings are for other servers.
        plain = {name: value for name, value in plain_environment().items() if not name.startswith("CDC_")}
        checkout = str(Path(__file__).parents[2])
        return plain | {
            "PYTHONPATH": os.pathsep.join(filter(None, [checkout, plain.get("PYTHONPATH")])),
            "CDC_POSTGRES_DSN": self._dsn,
            "CDC_REDIS_URL": self._url,
            # Absolute, because the daemon runs in another folder.
            "CDC_RULES": str(rules.absolute()),
            "CDC_HTTP_HOST": HOST,
            "CDC_HTTP_PORT": str(self.port),
            "CDC_LOG_FORMAT": "json",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        code = self._child.stop(signal.SIGTERM, STOP_SECONDS)
        said = self._child.said()
        self._lines.close()
        self._folder.cleanup()
        if code != 0 and kind is None:
            raise errors.InvalidatorError(f"The daemon ended with exit code {code}; its log ends with:\n{_tail(said)}")

    def wait_until_ready(self) -> None:
        """Wait until the daemon streams.

        Raises:
            errors.InvalidatorError: It ended, or is not ready in time; the message ends with its log's tail.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready():
            self.check()
            if time.monotonic() > deadline:
                raise self._failure(f"is not ready after {READY_SECONDS:g} s")
            time.sleep(0.02)

    def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until the watermark has passed all commits made so far, and read what was logged until then.

        Raises:
            errors.InvalidatorError: The daemon has ended, or the watermark does not get there in time.
        """
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'").fetchone()
        assert row
        deadline = time.monotonic() + seconds
        with redis.Redis.from_url(self._url) as client:
            while int(client.hget(WATERMARK, "lsn") or 0) < row[0]:
                self.check()
                if time.monotonic() > deadline:
                    raise self._failure(f"has not passed the last commit in {seconds:g} s")
                time.sleep(0.02)
        self.check()

    def check(self) -> None:
        """Append what the daemon has logged since the last call to `events`.

        Raises:
            errors.InvalidatorError: It has ended; the message ends with its log's tail.
        """
        *lines, self._rest = (self._rest + self._lines.read()).split(b"\n")
        self.events += [event for line in lines if (event := _event(line)) is not None]
        if not self._child.alive:
            raise self._failure("has ended")

    def status(self) -> dict[str, Any]:
        """Return what /status shows; empty while it does not answer."""
        page = self._page("/status")
        return dict(json.loads(page)) if page is not None else {}

    def _ready(self) -> bool:
        return self._page("/readyz") is not None

    def _page(self, path: str) -> bytes | None:
        """Return a page, ``None`` unless all is well."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.read() if answer.status == http.client.OK else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _failure(self, what: str) -> errors.InvalidatorError:
        return errors.InvalidatorError(f"The daemon {what}; its log ends with:\n{_tail(self._child.said())}")


def _tail(text: str, lines: int = 20) -> str:
    """Return the last lines that are not busts: the error is among them."""
    kept = [line for line in text.splitlines() if (_event(line.encode()) or {}).get("event") != "bust"]
    return "\n".join(kept[-lines:])


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a log line, or None."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
