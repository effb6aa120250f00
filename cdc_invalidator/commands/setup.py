"""`setup` and `teardown`: the slot and the publication, made, brought up to date, and dropped."""

from __future__ import annotations

from collections.abc import Callable

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication, run_statements
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import Slot
from cdc_invalidator.rules.model import RuleSet


async def set_up(
    dsn: str, slot_name: str, publication_name: str, rules: RuleSet, *, show: bool, say: Callable[[str], None]
) -> list[str]:
    """Make what the rules need, and return the statements that do.

    Args:
        dsn: the database.
        slot_name: the replication slot.
        publication_name: the publication.
        rules: the rules.
        show: only return the statements; change nothing.
        say: is given a line for each table that does not exist yet.

    Raises:
        errors.WrongRules: there are rules that this database can't keep.
        errors.InvalidatorError: the database can't be reached, or refuses.
    """
    connection = await connect(dsn, "cdc-invalidator setup")
    async with connection:
        slot, publication = Slot(connection, slot_name), Publication(connection, publication_name)
        server = await slot.server()
        survey = await publication.survey(rules)
        problems = mistakes(survey, rules)
        if problems:
            raise errors.WrongRules(problems)
        for table in survey.unknown:
            say(f"-- {table} does not exist yet; run setup again, or let the daemon add it once it does.")
        statements = publication.statements(survey)
        of_slot = slot.statements(await slot.state(), server, new_publication=not survey.exists)
        statements += of_slot
        if not show:
            if of_slot:
                await Replication.try_out(dsn)
            await run_statements(connection, statements)
        return statements


async def tear_down(dsn: str, slot: str, publication: str) -> list[str]:
    """Drop the slot and the publication, and return the statements that did.

    Raises:
        errors.InvalidatorError: a daemon streams from the slot, or the database can't be reached or refuses.
    """
    connection = await connect(dsn, "cdc-invalidator teardown")
    async with connection:
        try:
            dropped = await Slot(connection, slot).drop()
        except errors.SlotInUse as error:
            raise errors.ServerRefuses(
                f"Slot {slot} is in use; stop the daemons that stream from it, then run teardown again."
            ) from error
        return dropped + await Publication(connection, publication).drop()
