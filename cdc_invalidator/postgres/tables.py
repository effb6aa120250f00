"""Keeps the publication in step with the tables of the rules: publishes a table once it can, takes it out if it must.

DDL is not in the stream. So the catalogs are read every few seconds, and where rows may have come or gone without a
change in the stream, the caches to sweep are named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import Any

import psycopg
import structlog

from cdc_invalidator import errors
from cdc_invalidator.errors import Problem
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.parameters import Types, parameter_types
from cdc_invalidator.postgres.publication import Publication, run_statements
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.postgres.survey import Survey
from cdc_invalidator.rules.agreement import Agreement, templates_digest
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.trouble import Trouble

_log = structlog.get_logger()

_ALIKE = (
    "A table has come that is called like one of a rule, in another schema, and no rule names it; if caches show its "
    "rows too, as with a schema for each tenant, write a rule for it."
)

# How often the types of what `via` queries answer are looked at.
TYPES_SECONDS = 30.0

# Daemons with other rules may be setting up at the same time.
ATTEMPTS = 3


class Tables:
    """The tables of one rule set in one database.

    Args:
        connection: an ordinary one.
        publication: the publication to keep in step.
        spelling: how values are printed; a cache's keys depend on it.
        rules: the rule set.
        strict: refuse rules that this database can't keep; otherwise keep those that it can.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        publication: Publication,
        spelling: Spelling,
        rules: RuleSet,
        *,
        strict: bool,
    ) -> None:
        self._connection = connection
        self._publication = publication
        self._spelling = spelling
        self._rules = rules
        self._strict = strict
        self._survey: Survey | None = None
        self._remedies: tuple[Survey, list[Problem]] | None = None
        self._digested: tuple[Survey, dict[str, str]] | None = None
        self._types: tuple[Survey | None, float, Types] = (None, 0.0, {})
        self._agreement = Agreement()
        # The set-up statements that can't be run, each with the reason.
        self._undone: dict[str, Trouble] = {}

    @property
    def survey(self) -> Survey:
        """The last survey; call `publish` first."""
        assert self._survey is not None
        return self._survey

    @property
    def unseen(self) -> list[Table]:
        """Tables of rules whose changes are not in the stream: they don't exist, or can't be published."""
        return self._survey.unknown + self._survey.blind if self._survey else []

    @property
    def trouble(self) -> Trouble | None:
        """Why the publication is not as it should be."""
        if not self._undone:
            return None
        texts = dict.fromkeys(each.text for each in self._undone.values())
        return Trouble(" ".join(texts), min(each.since for each in self._undone.values()))

    def remedies(self) -> list[Problem]:
        """Return what an administrator can do so that all tables of rules are published; the same until one changes."""
        survey = self.survey
        if self._remedies is None or self._remedies[0] is not survey:
            found = mistakes(survey, self._rules)
            statements = self._publication.statements(survey)
            if statements:
                sentence = "The daemon's role can't do this; run it as the owner of the tables and the publication."
                found.append(Problem("", 0, 0, sentence, sql=tuple(statements)))
            self._remedies = survey, found
        return self._remedies[1]

    def digests(self) -> dict[str, str]:
        """Return, for each cache that is kept, the digest of its rules and tables for the watermark."""
        survey = self.survey
        if self._digested is None or self._digested[0] is not survey:
            self._digested = survey, self._spelling.mark(survey.digests(self._rules))
        return self._digested[1]

    @property
    def agreement(self) -> Agreement:
        """What readers are told; the same until it changes."""
        return self._agreement

    async def _agree(self, survey: Survey) -> list[str]:
        """Look at the types of parameters, if they may be others, and return the caches of which one has changed."""
        of_survey, looked_at, before = self._types
        now = time.monotonic()
        # The tables that a query joins may be of no rule, and one that was locked could not be asked.
        if survey is of_survey and not (self._rules.asks and now - looked_at > TYPES_SECONDS):
            return []
        types = await parameter_types(self._connection, self._rules)
        self._types = survey, now, types
        if types != before:
            templates = {name: templates_digest(cache) for name, cache in self._rules.caches.items()}
            self._agreement = Agreement(templates, types, self._spelling.values)
        # Of a type that was not known, readers have made no keys.
        return [
            name
            for name, known in before.items()
            if any(told is not None and types[name].get(parameter) != told for parameter, told in known.items())
        ]

    def relent(self) -> None:
        """Refuse nothing from now on: rules that were good enough at the start stay in force."""
        self._strict = False

    async def publish(self) -> bool:
        """Bring the publication up to date, and return whether there was one."""
        await self._spelling.check()
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
                self._undone.clear()
                break
            done = await (self.set_up(statements) if self._strict else self._set_up_each(statements))
            survey = await self._publication.survey(self._rules)
            if not done:
                break
        await self._agree(survey)
        self._survey = survey
        return before.exists

    async def look(self, *, sweeping: Callable[[], Container[str]]) -> dict[str, str]:
        """Bring the publication up to date, and find where rows may have come or gone unseen.

        Args:
            sweeping: gives the caches that are being swept for a gap already.

        Returns:
            The caches to sweep, each with the reason; `digests` holds once they are swept.
        """
        await self._spelling.check()
        before, now = self.survey, await self._publication.survey(self._rules)
        if now.harmful:
            wrong = "; ".join(map(str, mistakes(now, self._rules)))
            _log.error("table_taken_out", tables=[str(table) for table in now.harmful], error=wrong)
        if await self._set_up_each(self._publication.statements(now)):
            now = await self._publication.survey(self._rules)
        broken = {}
        if alike := [str(table) for table in now.alike if table not in before.alike]:
            _log.warning("tables_alike", tables=alike, error=_ALIKE)
        if appeared := [str(table) for table in before.unknown if table not in now.unknown]:
            _log.info("tables_appeared", tables=appeared)
        if now is not before:
            filled = await self._publication.filled(now.leaves_since(before))
            broken = self.caches(now.changed_since(before, filled), "table_changed")
            broken |= self.caches(now.published_since(before), "table_added")
        # Changes of a table that can't be published are not seen, so its caches are swept again and again.
        busy = sweeping()
        blind = self.caches(now.blind, "table_unpublished")
        broken |= {cache: reason for cache, reason in blind.items() if cache not in busy}
        # Readers may have made other keys than those that busts have named.
        broken = dict.fromkeys(await self._agree(now), "table_changed") | broken
        self._survey = now
        return broken

    def caches(self, tables: Iterable[Table], why: str) -> dict[str, str]:
        """Return the caches that rules on these tables bust, each with the reason."""
        named = set(tables)
        return {bust.cache.name: why for rule in self._rules.rules if rule.table in named for bust in rule.busts}

    async def set_up(self, statements: list[str]) -> bool:
        """Run set-up statements; return False if they can't be run now and the stream can go on without."""
        name = "; ".join(statements)
        before = self._undone.get(name)
        if before is None:
            _log.info("setting_up", statements=statements)
        try:
            await run_statements(self._connection, statements)
        except (errors.Locked, errors.ServerRefuses) as error:
            refused = isinstance(error, errors.ServerRefuses)
            # At the first start somebody is watching, so refuse. Later, go on with what works.
            if refused and self._strict:
                raise
            if before is None or before.text != str(error):
                (_log.error if refused else _log.warning)("not_set_up", error=str(error))
            self._undone[name] = Trouble.now(str(error), before)
            return False
        self._undone.pop(name, None)
        return True

    async def _set_up_each(self, statements: list[str]) -> bool:
        """Run each set-up statement, whether or not others fail; return whether any succeeded."""
        # What is no longer to be done is no trouble any more.
        self._undone = {statement: self._undone[statement] for statement in statements if statement in self._undone}
        return any([await self.set_up([statement]) for statement in statements])
