"""What the daemon writes: JSON lines or text on standard output.

A reader of the output who dawdles holds up nobody: lines are written by a thread of their own. Only the busts wait,
and only once much is unwritten, so that none of them goes untold.

No raw key, row value, password or DSN secret is written unless `KeyDisplay` was told to show keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
import structlog

from cdc_invalidator import errors

# Bytes that may wait to be written before the busts wait.
UNWRITTEN = 8 << 20
LAST_WORDS_SECONDS = 1.0

Form = Literal["json", "console"]
Level = Literal["debug", "info", "warning", "error"]
Event = tuple[dict[str, Any], dict[str, Any]]
"""The fields that an event shares with many others (one object for all of them), and its own."""
KeyForm = Literal["prefix", "hash", "raw"]


class Output:
    """A file descriptor that is written to by a thread; takes whole lines as bytes, and never blocks.

    Args:
        descriptor: where to write, usually standard output.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._filled = threading.Event()
        self._written = threading.Event()
        self._written.set()
        # Two counters with one writer each: the event loop's and the thread's.
        self._bytes_taken = 0
        self._bytes_written = 0
        self.failure: OSError | None = None
        threading.Thread(target=self._run, name="output", daemon=True).start()

    @property
    def full(self) -> bool:
        """Whether so much is unwritten that whoever can wait should."""
        return self._bytes_taken - self._bytes_written > UNWRITTEN

    def write(self, line: bytes) -> int:
        """Take a line."""
        if self.failure is None:
            self._bytes_taken += len(line)
            self._lines.append(line)
            self._written.clear()
            self._filled.set()
        return len(line)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def close(self) -> None:
        """Return what is unwritten a last chance."""
        self._written.wait(LAST_WORDS_SECONDS)

    def _run(self) -> None:
        while True:
            self._filled.wait()
            self._filled.clear()
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            data = memoryview(b"".join(lines))
            size = len(data)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                self.failure = error
                self._written.set()
                return
            self._bytes_written += size
            if not self._lines:
                self._written.set()


def configure(form: Form, level: str) -> Output:
    """Set structlog up for the process: one line an event on standard output.

    Raises:
        errors.WrongSettings: there is no standard output.
    """
    if sys.stdout is None:
        raise errors.WrongSettings("Standard output is closed; start the daemon with its output going somewhere.")
    output = Output(sys.stdout.fileno())
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
    ]
    if form == "json":
        shared.append(structlog.processors.JSONRenderer(_dumps))
    else:
        shared += [console(), lambda _logger, _name, text: text.encode()]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=structlog.BytesLoggerFactory(output),  # type: ignore[arg-type]  # it writes and flushes
        cache_logger_on_first_use=True,
    )
    return output


def console() -> structlog.dev.ConsoleRenderer:
    """Return what makes text of an event, in colour on a terminal."""
    return structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), timestamp_key="ts")


def _dumps(value: Any, **_kwargs: Any) -> bytes:
    return orjson.dumps(value, default=str)


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class EventLog:
    """Where bust events go: the same output, in the same form, by the shortest way.

    Args:
        output: what `configure` gave.
        form: how lines look.
        level: nothing is written above ``info``.
    """

    def __init__(self, output: Output, form: Form, level: str) -> None:
        self._output = output
        self._log = structlog.get_logger()
        self.direct = form == "json"
        self._least = _number(level)

    def write(self, events: Iterable[Event], event: str = "bust", level: Level = "info") -> None:
        """Write events of that name."""
        if _number(level) < self._least:
            return
        if self.direct:
            self.write_text(self.render(events, event, level), level)
            return
        for shared, own in events:
            self._log.log(_number(level), event, **shared, **own)

    def render(self, events: Iterable[Event], event: str = "bust", level: Level = "info") -> bytes:
        """Return events as JSON lines."""
        rendered: dict[int, bytes] = {}
        lines = []
        for shared, own in events:
            start = rendered.get(id(shared)) or rendered.setdefault(id(shared), self.begin(shared, event, level))
            lines.append(start + orjson.dumps(own)[1:] + b"\n")
        return b"".join(lines)

    def begin(self, shared: dict[str, Any], event: str = "bust", level: Level = "info") -> bytes:
        """Return what all lines of an event begin with that share these fields; the time is now."""
        head = orjson.dumps({"event": event, "level": level, "ts": datetime.now(UTC)}, option=orjson.OPT_UTC_Z)
        return head[:-1] + b"," + orjson.dumps(shared)[1:-1] + b","

    def write_text(self, text: bytes, level: Level = "info") -> None:
        """Write events that are rendered as JSON lines already."""
        if text and _number(level) >= self._least:
            self._output.write(text)

    async def room(self) -> None:
        """Wait while too much is unwritten.

        Raises:
            errors.OutputLost: nobody reads any more.
        """
        while self._output.full and self._output.failure is None:  # noqa: ASYNC110  a thread empties it
            await asyncio.sleep(0.05)
        if self._output.failure is not None:
            raise errors.OutputLost


class KeyDisplay:
    """How bust events show keys: ``prefix`` alone, with a keyed ``hash`` of each key, or the keys ``raw``.

    Args:
        form: how much to show.
        secret: key of the hashes; without it each process has its own, and hashes compare within one run only.
    """

    def __init__(self, form: KeyForm, secret: bytes | None = None) -> None:
        self.form = form
        key = hashlib.sha256(secret).digest() if secret is not None else secrets.token_bytes(32)
        # To be copied for each key.
        self.keyed = hashlib.blake2b(key=key, digest_size=8)

    def hash(self, key: bytes) -> str:
        """Return 16 hexadecimal digits that stand for the key."""
        keyed = self.keyed.copy()
        keyed.update(key)
        return keyed.hexdigest()

    def fields(self, keys: Sequence[bytes]) -> dict[str, Any]:
        """Return the fields of an event that show these keys."""
        if self.form == "prefix":
            return {}
        if self.form == "raw":
            return {"raw_keys": [key.decode(errors="backslashreplace") for key in keys]}
        return {"key_hashes": [self.hash(key) for key in keys]}
