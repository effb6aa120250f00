"""`setup` and `teardown`: the slot and the publication, made, brought up to date, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cdc_invalidator import errors
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.mistakes import mistakes
from cdc_invalidator.postgres.publication import Publication, run_statements
from cdc_invalidator.postgres.queries import Rights, read_rights
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import Slot
from cdc_invalidator.rules.model import RuleSet


async def set_up(
    dsn: DsnSource, slot_name: str, publication_name: str, rules: RuleSet, *, show: bool, say: Callable[[str], None]
) -> list[str]:
    """Make what the rules need, and return the statements that do.

    Args:
        dsn: the database.
        slot_name: the replication slot.
        publication_name: the publication.
        rules: the rules.
        show: only return the statements, with those that only an administrator may decide on, and comments between
            them; change nothing.
        say: is given a line for each table that does not exist yet.

    Raises:
        errors.WrongRules: there are rules that this database can't keep; with ``show``, only where no SQL helps.
        errors.InvalidatorError: the database can't be reached, or refuses.
    """
    connection = await connect(dsn, "cdc-invalidator setup")
    async with connection:
        slot, publication = Slot(connection, slot_name), Publication(connection, publication_name)
        server = await slot.server()
        survey = await publication.survey(rules)
        problems = mistakes(survey, rules)
        if problems and not show:
            raise errors.WrongRules(problems)
        for table in survey.unknown:
            say(f"-- {table} does not exist yet; run setup again, or let the daemon add it once it does.")
        statements = publication.statements(survey)
        of_slot = slot.statements(await slot.state(), server, new_publication=not survey.exists)
        statements += of_slot
        if show:
            return _printed(await read_rights(connection), problems, statements, say)
        if of_slot:
            await Replication.try_out(dsn)
        await run_statements(connection, statements)
        return statements


def _printed(
    rights: Rights, problems: Sequence[errors.Problem], statements: Sequence[str], say: Callable[[str], None]
) -> list[str]:
    """Return all that an administrator must run, in order: an identity comes before the table is published.

    Raises:
        errors.WrongRules: there are mistakes that no SQL mends; what can be run is said before.
    """
    lines = [] if rights.replicates else [remedies.replication_right(rights.role)]
    for problem in problems:
        lines += problem.sql
        if problem.or_sql:
            lines.append(f"-- or, for an index more and hardly more WAL: {' '.join(problem.or_sql)}")
    lines += statements
    lines += [
        "-- Then run setup again: it publishes the tables that have a usable identity by then."
        for problem in problems
        if problem.code == "no_replica_identity" and problem.sql
    ]
    lines = list(dict.fromkeys(lines))
    beyond = [problem for problem in problems if not problem.sql]
    if beyond:
        for line in lines:
            say(line)
        raise errors.WrongRules(beyond)
    return lines


async def tear_down(dsn: DsnSource, slot: str, publication: str) -> list[str]:
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
