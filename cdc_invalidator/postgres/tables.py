"""The tables of the rules, kept in step: published as soon as they can be, taken out as soon as they must be.

What happens to tables rather than to rows is not in the stream. So they are looked at now and then, and where rows may
have come or gone without a change in the stream, the caches are named that must be swept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.publication import run as run_statements
from cdc_invalidator.postgres.snapshot import Snapshots, all_over
from cdc_invalidator.postgres.survey import Survey
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

_log = structlog.get_logger()

# Rivals with other rules may be setting up at the same time.
ATTEMPTS = 3


class Tables:
    """The tables of one rule set in one database.

    Args:
        connection: an ordinary one.
        publication: the one to keep.
        rules: the rule set.
        strict: refuse rules that this database can't keep; else keep those that it can.
        unsettled: remembers, across sessions, the tables that may be in the stream with only a part of their changes.
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
        """The tables as they were seen last; there is one once they have been published."""
        assert self._survey is not None
        return self._survey

    @property
    def unseen(self) -> list[Table]:
        """Tables of rules whose changes are not seen: they don't exist, or can't be published."""
        return self._survey.unknown + self._survey.blind if self._survey else []

    def digests(self) -> dict[str, str]:
        """Give, for each cache that is kept, what the watermark says of its rules and tables."""
        survey, settling = self.survey, list(self._settling)
        if self._digested is None or self._digested[0] is not survey or self._digested[1] != settling:
            self._digested = survey, settling, survey.digests(self._rules, self._settling)
        return self._digested[2]

    def relent(self) -> None:
        """Refuse nothing from now on: what was right enough to start with goes on, whatever becomes of it."""
        self._strict = False

    async def publish(self) -> tuple[Survey, Survey]:
        """Make the publication what it must be, and give how the tables were before and are now."""
        before = survey = await self._publication.survey(self._rules)
        problems = mistakes(survey, self._rules)
        if problems and self._strict:
            # What hurts the application does not wait until somebody has put the rules right.
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
        """Keep the publication in step with the tables, and tell where rows may have come or gone unseen.

        Args:
            snapshots: to know which transactions are older than a publishing.
            sweeping: whether a gap is being swept already.

        Returns:
            The caches to sweep and why; `digests` is what is true once they are swept.
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
        # What happens to a table that can't be published is not seen: its caches are kept empty until it can be.
        # One sweep after the other, with the watermark written in between: else the slot would never move on.
        if not sweeping:
            broken |= self.caches(now.blind, "table_unpublished")
        self._survey = now
        return broken

    async def settled(self, added: Iterable[Table], snapshots: Snapshots) -> dict[str, str]:
        """Give the caches to sweep because tables were published: at once, and when the stream has all of them.

        A transaction that wrote to the table before it was published is not in the stream with those writes, though
        it may commit later: so there is a second sweep once all transactions of that time are over.
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
        """Give the caches that rules on these tables bust, each with the reason."""
        named = set(tables)
        return {bust.cache.name: why for rule in self._rules.rules if rule.table in named for bust in rule.busts}

    async def set_up(self, statements: list[str]) -> bool:
        """Run set-up statements; False if they could not be run now and the stream can do without."""
        _log.info("setting_up", statements=statements)
        try:
            await run_statements(self._connection, statements)
        except errors.Locked as error:
            _log.warning("not_set_up", error=str(error))
            return False
        except errors.ServerRefuses as error:
            # At the first start somebody looks on. Later, what can be busted is busted.
            if self._strict:
                raise
            _log.error("not_set_up", error=str(error))
            return False
        return True

    async def _set_up_each(self, statements: list[str]) -> bool:
        """Run each set-up statement whatever becomes of the others; True if any could be run."""
        return any([await self.set_up([statement]) for statement in statements])
