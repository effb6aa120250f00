"""The reload: watches the rule files, and hands the daemon other rules once they are known to be good.

The rule that holds here: whatever happens to the files, busting goes on with the rules in force. New ones are read
whole, and held against the database, before anything is changed; with a mistake in them, nothing is.

What is watched is the directory, also for a single file: a ConfigMap's volume never writes to a file, it swaps the
link `..data` beside it. And since no kernel tells everything (a network's file system, the target of a link, a
directory that was moved away), the files' texts are compared now and then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import aclosing
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
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication, rehearse
from cdc_invalidator.rules.load import fingerprint, load_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.waiting import within

if TYPE_CHECKING:
    from watchfiles import Change

_log = structlog.get_logger()

# An editor and `kubectl apply` write more than once: files are read when nothing has come for so long, but not later
# than after the second one. The first is also how often the watching thread wakes up.
QUIET_MS = 200
LATEST_MS = 2000
# How often texts are compared whether anything was seen or not, and rules tried again that the database can't keep.
LOOK_SECONDS = 30.0
# A server that can't be asked about new rules is asked again, at most so far apart.
MOST_SECONDS = 10.0

Result = Literal["ok", "failed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one reading; ``at`` is in UTC, ``error`` holds all sentences about what was wrong."""

    result: Result
    at: datetime
    error: str | None = None

    def shown(self) -> dict[str, str | None]:
        """Give what /status shows of it."""
        return {"result": self.result, "at": self.at.isoformat(timespec="milliseconds"), "error": self.error}


class Reload:
    """Keeps the rules in force in step with their files.

    Args:
        path: the rule file, or the directory of rule files.
        environment: what keys may name, as `load_rules` takes it.
        running: the rules in force.
        dsn: the database that new rules are held against.
        publication: its publication.
        event_stream: the Redis stream that new rules must leave alone; empty for none.
        metrics: what to count.
        switch: is told new rules, which are in force from then on.
    """

    def __init__(
        self,
        path: Path,
        environment: Mapping[str, str],
        running: RuleSet,
        *,
        dsn: str,
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
        """Read the files now, whether they seem to have changed or not."""
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
            except (OSError, RuntimeError, ExceptionGroup) as error:
                # There is no such directory for now, or the kernel watches no more of them for this user.
                if not self._unwatched:
                    _log.warning("rules_not_watched", error=f"{error}; texts are compared every {LOOK_SECONDS:.0f} s.")
                self._unwatched = True
                await asyncio.sleep(LOOK_SECONDS)
                self._look()

    async def _watch_folder(self, folder: Path) -> None:
        """Watch one directory until another stands in its place."""
        # Not before the daemon runs: no other command needs it.
        from watchfiles import awatch  # noqa: PLC0415

        identity = _identity(folder)
        changes = awatch(
            folder,
            watch_filter=self._concerns,
            debounce=LATEST_MS,
            step=QUIET_MS,
            rust_timeout=int(LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            recursive=False,
        )
        # What was changed since the rules were read, and before the watch began, is seen by looking.
        looking = asyncio.get_running_loop().call_later(QUIET_MS / 1000, self._look)
        try:
            async with aclosing(changes):
                async for _ in changes:
                    self._unwatched = False
                    self._look()
                    if self._folder != folder or _identity(folder) != identity:
                        return
        finally:
            looking.cancel()

    def _concerns(self, _change: Change, path: str) -> bool:
        name = os.path.basename(path)  # noqa: PTH119  a Path for each file of a busy directory is too much
        if name.startswith("..") or self._path.name == name:
            return True
        return not name.startswith(".") and name.endswith((".yaml", ".yml"))

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        """Compare the texts with those that were read last."""
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
            # Else, what could not be found out is tried once more.
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
                # A table is put right, a privilege is given: the files need not be touched for that.
                failure, again = str(error), LOOK_SECONDS
            else:
                self._take(found)
                continue
            if asked or self.last is None or self.last.error != failure:
                self._failed(failure)

    async def _read(self) -> RuleSet | None:
        """Read the files; None if they hold the rules in force.

        Raises:
            errors.WrongRules: they have mistakes.
        """
        self._looked_at = self._text()
        # In a thread, since a large set takes a while, and busts go on.
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
        """Make sure that the database can keep the rules, before anything is changed.

        Raises:
            errors.WrongRules: there are rules that it can't keep.
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
            # Nothing is published yet: the session does that, which then knows since when it has seen a table.
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
    """Tell one directory from another that was put in its place."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _difference(before: RuleSet, now: RuleSet) -> dict[str, Any]:
    """Give the caches that are new, busted otherwise, or gone."""
    was = {name: cache.digest for name, cache in before.caches.items()}
    will = {name: cache.digest for name, cache in now.caches.items()}
    return {
        "added": sorted(will.keys() - was.keys()),
        "changed": sorted(name for name in will.keys() & was.keys() if will[name] != was[name]),
        "removed": sorted(was.keys() - will.keys()),
    }
