"""Watches the rule files, and hands new rules to the daemon once they are known to be good.

The rule that holds here: whatever happens to the files, busting goes on with the rules in force. New rules are read
whole and checked against the database before anything changes; if there is a mistake in them, nothing changes.

We watch the directory, even for a single file: a ConfigMap volume never writes to a file, but swaps the link `..data`
beside it. The kernel does not report everything (network file systems, the target of a link, a directory that was moved
away), so the files' texts are also compared now and then.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog

from cdc_invalidator import errors
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import eventstream
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication, rehearse
from cdc_invalidator.rules.load import fingerprint, load_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.waiting import within

if TYPE_CHECKING:
    from watchfiles import Change

_log = structlog.get_logger()

# Editors and `kubectl apply` write more than once: files are read after a quiet time of QUIET_MS, but at the latest
# LATEST_MS after the first change. The watching thread wakes up every QUIET_MS.
QUIET_MS = 200
LATEST_MS = 2000
# How often texts are compared even if no change was reported, and rules that the database can't keep are tried again.
LOOK_SECONDS = 30.0
# The longest pause between two attempts to check new rules on a server that is away.
MOST_SECONDS = 10.0

Result = Literal["ok", "failed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of one reload; ``at`` is in UTC, ``error`` holds a sentence for each mistake."""

    result: Result
    at: datetime
    error: str | None = None

    def shown(self) -> dict[str, str | None]:
        """Return what /status shows of it."""
        return {"result": self.result, "at": self.at.isoformat(timespec="milliseconds"), "error": self.error}


class Reload:
    """Keeps the rules in force in step with their files.

    Args:
        path: the rule file, or the directory of rule files.
        environment: the variables that keys may use, as in `load_rules`.
        running: the rules in force.
        dsn: the database that new rules are checked against.
        publication: its publication.
        event_stream: the key of the event stream, which no new rule may touch; empty for none.
        metrics: what to count.
        switch: is called with new rules, which are in force from then on.
    """

    def __init__(
        self,
        path: Path,
        environment: Mapping[str, str],
        running: RuleSet,
        *,
        dsn: DsnSource,
        publication: str,
        event_stream: str,
        metrics: Metrics,
        switch: Callable[[RuleSet], None],
    ) -> None:
        self._path = path
        self._environment = environment
        self._running = running
        self._dsn = dsn
        self._publication = publication
        self._event_stream = event_stream
        self._metrics = metrics
        self._switch = switch
        self._asked = asyncio.Event()
        self._looked_at = running.fingerprint
        self._unwatched = False
        self.last: Attempt | None = None
        metrics.rules(running.digest, (rule.name for rule in running.rules))
        self._in_step()

    def ask(self) -> None:
        """Read the files now, even if they seem unchanged."""
        self._asked.set()

    async def run(self) -> None:
        """Watch and reload until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(), name="rules watch")
            tasks.create_task(self._look_on(), name="rules look")
            tasks.create_task(self._follow(), name="rules reload")

    # Watching: when to read.

    @property
    def _folder(self) -> Path:
        # Not resolved: the links on the way are what is swapped.
        return self._path if self._path.is_dir() else self._path.parent

    async def _watch(self) -> None:
        while True:
            try:
                await self._watch_folder(self._folder)
            except (OSError, RuntimeError) as error:
                # The directory does not exist now, or this user has too many watches.
                if not self._unwatched:
                    _log.warning("rules_not_watched", error=f"{error}; texts are compared every {LOOK_SECONDS:.0f} s.")
                self._unwatched = True
                await asyncio.sleep(LOOK_SECONDS)
                self._look()

    async def _watch_folder(self, folder: Path) -> None:
        """Watch a directory until another one takes its place."""
        # Imported late: only the running daemon needs it.
        from watchfiles import watch  # noqa: PLC0415

        identity = _identity(folder)
        over = threading.Event()
        changes = watch(
            folder,
            watch_filter=self._concerns,
            debounce=LATEST_MS,
            step=QUIET_MS,
            rust_timeout=int(LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            recursive=False,
            stop_event=over,
        )
        # A change between reading the rules and this watch is found by comparing the texts.
        looking = asyncio.get_running_loop().call_later(QUIET_MS / 1000, self._look)
        try:
            # As `awatch` would, but without anyio, whose import costs 15 ms of each start.
            while await asyncio.to_thread(next, changes, None) is not None:
                self._unwatched = False
                self._look()
                if self._folder != folder or _identity(folder) != identity:
                    return
        finally:
            looking.cancel()
            # The thread ends within `QUIET_MS`, and with it the watch.
            over.set()

    def _concerns(self, _change: Change, path: str) -> bool:
        name = os.path.basename(path)  # noqa: PTH119  a Path for each file of a busy directory costs too much
        if name.startswith("..") or self._path.name == name:
            return True
        return not name.startswith(".") and name.endswith((".yaml", ".yml"))

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        """Ask for a reload if the texts differ from those that were read last."""
        if self._text() != self._looked_at:
            self._asked.set()

    def _text(self) -> str:
        try:
            return fingerprint(self._path)
        except errors.WrongRules as wrong:
            return str(wrong)

    # Reading: whether they are good.

    async def _follow(self) -> None:
        backoff = Backoff(first=1.0, most=MOST_SECONDS)
        again: float | None = None
        while True:
            # If nobody asked, the last attempt is repeated.
            asked = await within(again, self._asked)
            if asked:
                backoff.reset()
            self._asked.clear()
            again = None
            try:
                found = await self._read()
                if found is None:
                    continue
            except errors.WrongRules as wrong:
                self._failed(str(wrong))
                continue
            try:
                await self._hold_against_database(found)
            except errors.Retryable as error:
                failure = f"The new rules can't be held against the database, and the old ones stay: {error}"
                again = backoff.next()
            except errors.InvalidatorError as error:
                # Somebody may correct a table or grant a privilege without touching the files: try again.
                failure, again = str(error), LOOK_SECONDS
            else:
                self._take(found)
                continue
            if asked or self.last is None or self.last.error != failure:
                self._failed(failure)

    async def _read(self) -> RuleSet | None:
        """Read the files; return ``None`` if they hold the rules in force.

        Raises:
            errors.WrongRules: the files have mistakes.
        """
        self._looked_at = self._text()
        # In a thread: a large set takes a while, and busts must go on.
        found = await asyncio.to_thread(load_rules, self._path, self._environment)
        running = self._running
        if (found.fingerprint, found.digest) != (running.fingerprint, running.digest):
            eventstream.check_rules(self._event_stream, found)
            return found
        self._done("unchanged")
        _log.info("reload_unchanged", rules=running.digest)
        return None

    def _take(self, found: RuleSet) -> None:
        running, self._running = self._running, found
        self._metrics.rules(found.digest, (rule.name for rule in found.rules))
        self._done("ok")
        _log.info("reloaded", rules=found.digest, **_difference(running, found))
        self._switch(found)

    async def _hold_against_database(self, found: RuleSet) -> None:
        """Check that the database can keep the rules, before anything is changed.

        Raises:
            errors.WrongRules: it can't keep some of them.
            errors.ServerRefuses: the role may not set up what they need.
            errors.Retryable: it can't be asked now.
        """
        connection = await connect(self._dsn, "cdc-invalidator reload")
        try:
            publication = Publication(connection, self._publication)
            survey = await publication.survey(found)
            problems = mistakes(survey, found)
            if problems:
                raise errors.WrongRules(problems)
            # Nothing is published yet. The session does that, so that it knows since when it has seen a table.
            await rehearse(connection, publication.statements(survey))
        finally:
            connection.pgconn.finish()

    # What came of it.

    def _done(self, result: Result) -> None:
        self.last = Attempt(result, datetime.now(UTC))
        self._metrics.reloads.labels(result).inc()
        self._in_step()

    def _in_step(self) -> None:
        self._metrics.reload_successful.set(1)
        self._metrics.reloaded_at.set_to_current_time()

    def _failed(self, error: str) -> None:
        self.last = Attempt("failed", datetime.now(UTC), error)
        self._metrics.reloads.labels("failed").inc()
        self._metrics.reload_successful.set(0)
        _log.error("reload_failed", rules=self._running.digest, error=error)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a directory from another one in its place."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _difference(before: RuleSet, now: RuleSet) -> dict[str, Any]:
    """Return the caches that are new, busted by other rules, or gone."""
    was = {name: cache.digest for name, cache in before.caches.items()}
    will = {name: cache.digest for name, cache in now.caches.items()}
    return {
        "added": sorted(will.keys() - was.keys()),
        "changed": sorted(name for name in will.keys() & was.keys() if will[name] != was[name]),
        "removed": sorted(was.keys() - will.keys()),
    }
