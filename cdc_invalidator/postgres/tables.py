"""Keeps the publication in step with the tables of the rules: publishes a table once it can, takes it out if it must.

DDL is not in the stream. So the catalogs are read every few seconds, and where rows may have come or gone without a
change in the stream, the caches to sweep are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication, run_statements
from cdc_invalidator.postgres.snapshot import Snapshots, all_over
from cdc_invalidator.postgres.survey import Survey
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

_log = structlog.get_logger()

# Daemons with other rules may be setting up at the same time.
ATTEMPTS = 3


class Tables:
    """The tables of one rule set in one database.

    Args:
        connection: an ordinary one.
        publication: the publication to keep in step.
        rules: the rule set.
        strict: refuse rules that this database can't keep; otherwise keep those that it can.
        unsettled: the tables whose changes may be only partly in the stream; kept across sessions.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        publication: Publication,
        rules: RuleSet,
        *,
        strict: bool,
        unsettled: set[Table],
    ) -> None:
        self._connection = connection
        self._publication = publication
        self._rules = rules
        self._strict = strict
        self._survey: Survey | None = None
        self._settling: dict[Table, str] = {}
        self._unsettled = unsettled
        self._digested: tuple[Survey, list[Table], dict[str, str]] | None = None

    @property
    def survey(self) -> Survey:
        """The last survey; call `publish` first."""
        assert self._survey is not None
        return self._survey

    @property
    def unseen(self) -> list[Table]:
        """Tables of rules whose changes are not in the stream: they don't exist, or can't be published."""
        return self._survey.unknown + self._survey.blind if self._survey else []

    def digests(self) -> dict[str, str]:
        """Return, for each cache that is kept, the digest of its rules and tables for the watermark."""
        survey, settling = self.survey, list(self._settling)
        if self._digested is None or self._digested[0] is not survey or self._digested[1] != settling:
            self._digested = survey, settling, survey.digests(self._rules, self._settling)
        return self._digested[2]

    def relent(self) -> None:
        """Refuse nothing from now on: rules that were good enough at the start stay in force."""
        self._strict = False

    async def publish(self) -> tuple[Survey, Survey]:
        """Bring the publication up to date, and return the surveys from before and after."""
        before = survey = await self._publication.survey(self._rules)
        problems = mistakes(survey, self._rules)
        if problems and self._strict:
            # Tables that break the application's writes are taken out at once, before the rules are corrected.
            self._strict = False
            await self._set_up_each(self._publication.removals(survey))
            raise errors.WrongRules(problems)
        if survey.unknown:
            _log.warning("tables_missing", tables=[str(table) for table in survey.unknown])
        for _ in range(ATTEMPTS):
            statements = self._publication.statements(survey)
            if not statements:
                break
            done = await (self.set_up(statements) if self._strict else self._set_up_each(statements))
            survey = await self._publication.survey(self._rules)
            if not done:
                break
        self._survey = survey
        return before, survey

    async def look(self, snapshots: Snapshots, *, sweeping: bool) -> dict[str, str]:
        """Bring the publication up to date, and find where rows may have come or gone unseen.

        Args:
            snapshots: to know which transactions began before a table was published.
            sweeping: whether a gap is being swept already.

        Returns:
            The caches to sweep, each with the reason; `digests` holds once they are swept.
        """
        before, now = self.survey, await self._publication.survey(self._rules)
        if now.harmful:
            wrong = "; ".join(map(str, mistakes(now, self._rules)))
            _log.error("table_taken_out", tables=[str(table) for table in now.harmful], error=wrong)
        if await self._set_up_each(self._publication.statements(now)):
            now = await self._publication.survey(self._rules)
        if now is before:
            broken = await self.settled((), snapshots)
        else:
            filled = await self._publication.filled(now.leaves_since(before))
            added = await self.settled(now.published_since(before), snapshots)
            broken = self.caches(now.changed_since(before, filled), "table_changed") | added
        # Changes of a table that can't be published are not seen, so its caches are swept again and again. The next
        # sweep waits until the watermark has been written; otherwise the slot would never move on.
        if not sweeping:
            broken |= self.caches(now.blind, "table_unpublished")
        self._survey = now
        return broken

    async def settled(self, added: Iterable[Table], snapshots: Snapshots) -> dict[str, str]:
        """Return the caches to sweep because tables were published: once now, and once the stream is complete.

        Writes from before the table was published are not in the stream, though their transaction may commit later.
        So there is a second sweep once all transactions of that time are over.
        """
        added = list(added)
        if not added and not self._settling:
            return {}
        now = await snapshots.take()
        over = [table for table, then in self._settling.items() if all_over(then, now)]
        for table in over:
            del self._settling[table]
        self._settling.update(dict.fromkeys(added, now))
        self._unsettled.difference_update(over)
        self._unsettled.update(added)
        return self.caches(added + over, "table_added")

    def caches(self, tables: Iterable[Table], why: str) -> dict[str, str]:
        """Return the caches that rules on these tables bust, each with the reason."""
        named = set(tables)
        return {bust.cache.name: why for rule in self._rules.rules if rule.table in named for bust in rule.busts}

    async def set_up(self, statements: list[str]) -> bool:
        """Run set-up statements; return False if they can't be run now and the stream can go on without."""
        _log.info("setting_up", statements=statements)
        try:
            await run_statements(self._connection, statements)
        except errors.Locked as error:
            _log.warning("not_set_up", error=str(error))
            return False
        except errors.ServerRefuses as error:
            # At the first start somebody is watching, so refuse. Later, go on with what works.
            if self._strict:
                raise
            _log.error("not_set_up", error=str(error))
            return False
        return True

    async def _set_up_each(self, statements: list[str]) -> bool:
        """Run each set-up statement, whether or not others fail; return whether any succeeded."""
        return any([await self.set_up([statement]) for statement in statements])
