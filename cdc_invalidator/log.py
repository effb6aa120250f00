"""What the daemon writes: JSON lines or text on standard output.

A reader of the output who dawdles holds up nobody: lines are written by a thread of their own. Only the busts wait,
once much is unwritten, and only for seconds: then lines are dropped. The rule that holds here: whoever confirms a
position knows from `Output.written` whether its lines are with the kernel; a dropped line never is.

No raw key, row value, password or DSN secret is written unless `KeyDisplay` was told to show keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import orjson
import structlog

from cdc_invalidator import errors
from cdc_invalidator.trouble import Trouble

# Bytes that may wait to be written before the busts wait.
UNWRITTEN = 8 << 20
# So long they wait at a time; then they go on, and their lines are dropped until half of that is written.
MOST_WAIT_SECONDS = 3.0
# If more lines than these were dropped, they are lost: to bust all that again would hold up what is new.
MOST_UNTOLD = 200_000
# So long nobody must have taken anything before that is told.
STUCK_SECONDS = 10.0
BYTES_A_WRITE = 1 << 18
# What the journal keeps: events, and of busts the last lines of the last flushes, each as long as some lines with many
# keys are.
JOURNAL_EVENTS = 60
JOURNAL_FLUSHES = 10
JOURNAL_BYTES = 1 << 15
TURNING_POINTS = frozenset({"started", "role", "streaming", "reloaded", "reload_unchanged", "gap", "cache_granted"})
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
        self._emptied = threading.Event()
        self._emptied.set()
        # Two counters with one writer each: the event loop's and the thread's.
        self._bytes_taken = 0
        self._bytes_written = 0
        self._moved_at = time.monotonic()
        # How many lines were dropped, and what had been taken before the first of them.
        self.dropped = 0
        self._dropped_at: int | None = None
        # Dropped before, and not to be waited for. Marks go on behind them.
        self._forgotten = 0
        self.failure: OSError | None = None
        threading.Thread(target=self._run, name="output", daemon=True).start()

    @property
    def full(self) -> bool:
        """Whether so much is unwritten that whoever can wait should."""
        return self._bytes_taken - self._bytes_written > UNWRITTEN

    @property
    def has_room(self) -> bool:
        """Whether the half of what may be unwritten is free again."""
        return self._bytes_taken - self._bytes_written <= UNWRITTEN // 2

    @property
    def stuck(self) -> bool:
        """Whether something is unwritten, and nobody has taken anything for long."""
        return self.silent_for > STUCK_SECONDS

    @property
    def silent_for(self) -> float:
        """For how many seconds nobody has taken anything of what is unwritten; 0 if nothing is."""
        return time.monotonic() - self._moved_at if self._bytes_taken > self._bytes_written else 0.0

    @property
    def mark(self) -> int:
        """Where the lines end that are taken by now: `written` reaches it when all of them are with the kernel."""
        return self._bytes_taken + self._forgotten + self.dropped

    @property
    def written(self) -> int:
        """How far lines are with the kernel, without a gap; see `mark`."""
        written = self._bytes_written if self._dropped_at is None else min(self._bytes_written, self._dropped_at)
        return written + self._forgotten

    def write(self, line: bytes) -> int:
        """Take a line."""
        if self.failure is None:
            if self._bytes_taken == self._bytes_written:
                self._moved_at = time.monotonic()
            self._bytes_taken += len(line)
            self._lines.append(line)
            self._emptied.clear()
            self._filled.set()
        return len(line)

    def drop(self, lines: int) -> None:
        """Note that so many lines are not taken, because nobody reads."""
        if self._dropped_at is None:
            self._dropped_at = self._bytes_taken
        self.dropped += lines

    def forget_dropped(self) -> int:
        """Return how many lines were dropped, and count anew; nobody waits for them any more."""
        dropped, self.dropped, self._dropped_at = self.dropped, 0, None
        self._forgotten += dropped
        return dropped

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def close(self) -> None:
        """Return what is unwritten a last chance."""
        self._emptied.wait(LAST_WORDS_SECONDS)

    def _run(self) -> None:
        while True:
            self._filled.wait()
            self._filled.clear()
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            data = memoryview(b"".join(lines))
            try:
                while data:
                    # In pieces, to see that somebody reads. Not in small ones: after each, the event loop has its turn.
                    size = os.write(self._descriptor, data[:BYTES_A_WRITE])
                    data = data[size:]
                    self._moved_at = time.monotonic()
                    self._bytes_written += size
            except OSError as error:
                self.failure = error
                self._emptied.set()
                return
            if not self._lines:
                self._emptied.set()


class Journal:
    """The last lines, for those who look at the page: busts, and what else happened. Any thread may read it."""

    def __init__(self) -> None:
        self._busts: deque[bytes] = deque(maxlen=JOURNAL_FLUSHES)
        self._happened: deque[dict[str, Any]] = deque(maxlen=JOURNAL_EVENTS)

    def take(self, text: bytes, level: Level) -> None:
        """Keep what `EventLog` writes: lines of busts if their level is ``info``."""
        if level == "info":
            # Of many, as much as fits: it costs next to nothing, and nobody reads more.
            self._busts.append(text if len(text) <= JOURNAL_BYTES else text[-JOURNAL_BYTES:])
            return
        for line in text.splitlines():
            self.happened(orjson.loads(line))

    def happened(self, event: dict[str, Any]) -> None:
        """Keep an event, if it is of those that are asked for the morning after."""
        if event["level"] not in {"warning", "error", "critical"} and event["event"] not in TURNING_POINTS:
            return
        last: dict[str, Any] = self._happened[-1] if self._happened else {"event": None}
        if (event["event"], event.get("error")) == (last["event"], last.get("error")):
            # One that is told again and again must not drive the others out.
            times, since = last.get("times", 1) + 1, last.get("since", last["ts"])
            self._happened[-1] = event | {"times": times, "since": since}
        else:
            self._happened.append(event)

    def process(self, _logger: Any, _name: str, event: Any) -> Any:
        """Keep what structlog logs, as one of its processors."""
        if event["event"] in {"bust", "observed"}:
            self.take(_dumps(event) + b"\n", "info")
        else:
            self.happened(dict(event))
        return event

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, the newest last."""
        return list(self._happened)

    def busts(self, most: int) -> list[dict[str, Any]]:
        """Return the last busts as their events, the newest first."""
        found: list[dict[str, Any]] = []
        for text in reversed(list(self._busts)):
            # The first line may have been cut.
            whole = text if len(text) < JOURNAL_BYTES else text.partition(b"\n")[2]
            for line in reversed(whole.splitlines()):
                found.append(orjson.loads(line))
                if len(found) == most:
                    return found
        return found


def configure(form: Form, level: str, descriptor: int | None = None, journal: Journal | None = None) -> Output:
    """Set structlog up for the process: one line an event on a file descriptor; ``None``: on standard output.

    Args:
        form: how lines look.
        level: the lowest that is written.
        descriptor: where to.
        journal: what keeps the last lines, also of lower levels.

    Raises:
        errors.WrongSettings: there is no standard output.
    """
    if sys.stdout is None:
        raise errors.WrongSettings("Standard output is closed; start the daemon with its output going somewhere.")
    output = Output(sys.stdout.fileno() if descriptor is None else descriptor)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
    ]
    least = _number(level)
    if journal is not None:
        shared += [journal.process, partial(_drop_below, least)]
        least = min(least, logging.INFO)
    if form == "json":
        shared.append(structlog.processors.JSONRenderer(_dumps))
    else:
        shared += [_visible, console(), lambda _logger, _name, text: text.encode()]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.BytesLoggerFactory(output),  # type: ignore[arg-type]  # it writes and flushes
        cache_logger_on_first_use=True,
    )
    return output


def last_words(why: str, exit_code: int) -> None:
    """Write the last JSON line of a daemon that ends because of an error, unless nobody takes it.

    The thread that writes may not be there yet, or no longer.
    """
    if sys.stdout is None:
        return
    line = {"event": "exit", "level": "error", "ts": datetime.now(UTC), "error": why, "exit_code": exit_code}
    # Standard error has it, too: a reader who is gone or stuck is no reason to hang.
    with contextlib.suppress(OSError):
        descriptor = sys.stdout.fileno()
        if select.select([], [descriptor], [], LAST_WORDS_SECONDS)[1]:
            os.write(descriptor, orjson.dumps(line, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE))


def _drop_below(least: int, _logger: Any, _name: str, event: Any) -> Any:
    if _number(event["level"]) < least:
        raise structlog.DropEvent
    return event


def console() -> structlog.dev.ConsoleRenderer:
    """Return what makes text of an event, in colour on a terminal."""
    return structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), timestamp_key="ts")


def _visible(_logger: Any, _name: str, event: Any) -> Any:
    """Return an event, or a part of one, whose texts can do nothing to a terminal."""
    if isinstance(event, str):
        return errors.visible(event)
    if isinstance(event, dict):
        return {_visible(_logger, _name, name): _visible(_logger, _name, value) for name, value in event.items()}
    if isinstance(event, list):
        return [_visible(_logger, _name, value) for value in event]
    return event


def _dumps(value: Any, **_kwargs: Any) -> bytes:
    return errors.visible_json(orjson.dumps(value, default=str))


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class EventLog:
    """Where bust events go: the same output, in the same form, by the shortest way.

    Args:
        output: what `configure` gave.
        form: how lines look.
        level: nothing is written above ``info``.
        journal: what keeps the last lines, whatever the level is; ``None`` for nothing.
        dropped: is told how many lines are dropped each time.
    """

    def __init__(
        self,
        output: Output,
        form: Form,
        level: str,
        journal: Journal | None = None,
        *,
        dropped: Callable[[int], None] = lambda _lines: None,
    ) -> None:
        self._output = output
        self._journal = journal
        self._log = structlog.get_logger()
        self.direct = form == "json"
        self._least = _number(level)
        # Set while PostgreSQL keeps more WAL than it may: then no position waits for a reader.
        self.hurry = False
        self._dropped = dropped
        # Since when busts have waited in vain for room; `None` once there is some.
        self._late_since: float | None = None
        self._late = False
        self._lost = 0

    def write(self, events: Iterable[Event], event: str = "bust", level: Level = "info") -> None:
        """Write events of that name."""
        if self.direct and (self._journal is not None or _number(level) >= self._least):
            self.write_text(self.render(events, event, level), level)
            return
        if _number(level) < self._least:
            return
        for shared, own in events:
            if self._drops:
                self._drop(1)
                continue
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
        if not text:
            return
        if self._journal is not None:
            self._journal.take(text, level)
        if _number(level) < self._least:
            return
        if self._drops:
            # Not before: to count lines takes 0.1 µs for each, an eighth of what it takes to render it.
            self._drop(text.count(b"\n"))
        else:
            self._output.write(text)

    def _drop(self, lines: int) -> None:
        self._output.drop(lines)
        self._dropped(lines)

    @property
    def _drops(self) -> bool:
        """Whether lines are dropped now: once it has begun, also those that could be written again.

        What is received again is told in order.
        """
        output = self._output
        return bool(output.dropped) or self._late or (output.full and self.hurry)

    @property
    def mark(self) -> int:
        """Where the lines end that were written by now."""
        return self._output.mark

    def told(self, mark: int) -> bool:
        """Return whether all lines up to a mark are with the kernel, or nobody may wait for that any longer."""
        output = self._output
        return output.written >= mark or (self.hurry and (output.stuck or output.full))

    @property
    def trouble(self) -> Trouble | None:
        """What an operator should know of the output."""
        output = self._output
        if self._late and self._late_since is not None:
            return Trouble.now(
                f"Standard output is not read, or too slowly: busts go on, and {output.dropped + self._lost:,} lines "
                "were dropped. They are told when it is read again, unless they are too many; look at the log driver.",
                ago=time.monotonic() - self._late_since,
            )
        if output.stuck:
            return Trouble.now(
                "Nobody has read standard output for a while: busts go on, and are told when somebody reads again, "
                "unless the slot holds more than CDC_MAX_RETAINED_WAL; look at the log driver.",
                ago=output.silent_for,
            )
        return None

    async def room(self) -> None:
        """Wait while too much is unwritten, for seconds at most; not at all if the WAL does not allow it.

        Raises:
            errors.OutputLost: standard output was closed.
            errors.Untold: somebody reads again, and lines were dropped.
        """
        output = self._output
        began = time.monotonic()
        while output.full and not (self._late or self.hurry) and output.failure is None:
            await asyncio.sleep(0.05)
            if time.monotonic() - began > MOST_WAIT_SECONDS and output.full:
                self._late, self._late_since = True, began
        if output.failure is not None:
            raise errors.OutputLost
        if output.dropped and (self.hurry or output.dropped > MOST_UNTOLD):
            self._lost += output.forget_dropped()
        if output.stuck or not output.has_room:
            return
        self._late, self._late_since = False, None
        if output.dropped:
            raise errors.Untold
        if self._lost:
            lost, self._lost = self._lost, 0
            self._log.error(
                "events_lost",
                lines=lost,
                error="Nobody read standard output in time, so that so many events were not written; their busts are "
                "done.",
            )

    def begin_stream(self) -> None:
        """Note that a stream begins, which brings again what is not confirmed: what was dropped is told then."""
        self._output.forget_dropped()


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
