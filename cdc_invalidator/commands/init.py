"""`init`: a rule file to begin with, from the catalogs of a database and the names of the keys in Redis.

The rule that holds here: nothing is changed, no value of Redis is read, and what is printed has been loaded as a rule
file and judged by this database, as `run` judges it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.discovery import catalog, dumpfile, enumerations, families, keyfile, matching, rulefile, sampling
from cdc_invalidator.discovery.words import Vocabulary
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.mistakes import NAMED, mistakes, read_of_old, unknown_old
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.survey import Survey
from cdc_invalidator.redis.masters import open_masters
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table

# The daemon's own: the watermark, in a cluster one for each master, and the event stream under its usual name.
_OURS = re.compile(rb"cdc:[A-Za-z0-9_.-]+:(watermark.*|events)", re.DOTALL)
# Of the table alone, or of one rule.
_OF_A_RULE = frozenset({"unknown_column", "generated_column", "old_row_unknown"})

Tell = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the names of keys are from: a Redis, a file of names (``-`` is standard input), or a dump of a Redis.

    ``most``: how many keys are looked at, 0 for all; ``rate``: at most so many a second; ``database``: which one of a
    dump.
    """

    redis: EndpointSource | None
    keys: str | None
    dump: str | None
    most: int
    rate: int
    database: int = 0
    event_stream: str = ""


async def draft(dsn: DsnSource, publication: str, source: Source) -> str:
    """Return the text of a rule file.

    Raises:
        errors.InvalidatorError: a server can't be reached, or refuses; the file of keys or the dump can't be read.
    """
    sampled = await _sampled(source)
    async with await connect(dsn, "cdc-invalidator init", catalog.LIMITS) as connection:
        tables = await catalog.read_tables(connection)
        names = [name for info in tables for name in (info.table.name, *(column.name for column in info.columns))]
        event_stream = source.event_stream.encode()
        found = families.group(
            sampled.samples, Vocabulary(names), lambda key: bool(_OURS.fullmatch(key)) or key == event_stream
        )
        found = replace(found, families=enumerations.fold(found.families, tables))
        asked = matching.questions(found.families, tables)
        with _progress("looking up values") as tell:
            done = iter(range(1, len(asked) + 1))
            shares = await catalog.look_up(
                connection, found.families, tables, asked, lambda: tell(next(done), len(asked))
            )
    entries = rulefile.entries(matching.match(found.families, tables, shares))
    # On a connection with the usual limits, as `run` and `check` look at tables.
    async with await connect(dsn, "cdc-invalidator init", {"default_transaction_read_only": "on"}) as connection:
        verdict = await _judged(connection, publication, entries)
    text = rulefile.write(entries, verdict, tables, _head(source, sampled, found, len(tables)), found.single)
    _load(text)
    return text


def save(text: str, path: Path, *, force: bool) -> None:
    """Write the file.

    Raises:
        errors.WrongSettings: it is there already, or can't be written.
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise errors.WrongSettings(f"{path} is there already; give another --output, or --force.") from None
    except OSError as error:
        raise errors.WrongSettings(f"{path} can't be written ({error.strerror}); give another --output.") from error


async def _sampled(source: Source) -> sampling.Sampled:
    if source.keys is not None:
        samples = _read(source.keys, source.most)
        return sampling.Sampled(samples)
    with _progress("looking at keys") as show:

        def tell(seen: int, of: int | None) -> None:
            show(seen, _least(of, source))

        if source.dump is not None:
            with _opened(source.dump, "--from-redis-dump") as file:
                return dumpfile.sample(file, source.dump, source.database, source.most, tell)
        assert source.redis is not None
        async with open_masters(source.redis) as nodes:
            return await sampling.sample(nodes, source.most, source.rate, tell)


def _least(all_keys: int | None, source: Source) -> int | None:
    return min(filter(None, (all_keys, source.most)), default=None)


def _read(name: str, most: int) -> list[families.Sample]:
    if name == "-":
        return list(keyfile.read_keys(sys.stdin.buffer, "standard input", most))
    with _opened(name, "--keys") as file:
        return list(keyfile.read_keys(file, name, most))


@contextmanager
def _opened(name: str, option: str) -> Iterator[BinaryIO]:
    try:
        with Path(name).open("rb") as file:
            yield file
    except OSError as error:
        raise errors.WrongSettings(f"{name} can't be read ({error.strerror}); give another {option}.") from error


async def _judged(
    connection: psycopg.AsyncConnection[Any], publication: str, entries: Sequence[rulefile.Entry]
) -> rulefile.Verdict:
    """Ask the database which of the rules it can keep, until it can keep all."""
    sweeps: dict[int, str] = {}
    refused: dict[int, str] = {}
    publications = Publication(connection, publication)
    while True:
        rules = _load(rulefile.probe(entries, sweeps, refused))
        survey = await publications.survey(rules)
        problems = mistakes(survey, rules)
        if not problems:
            return rulefile.Verdict(refused, sweeps)
        at = {rule.place.line: rule for rule in rules.rules}
        for problem in problems:
            # A condition has a place of its own, but there is none here.
            rule = at[problem.line]
            number = int(rule.name.removeprefix("r"))
            if problem.code == "old_row_unknown":
                sweeps[number] = _remedy(survey, rules, rule.table)
            elif problem.code in _OF_A_RULE:
                refused[number] = problem.sentence.replace(f"rule {rule.name}", "the rule")
            else:
                refused |= {
                    int(other.name.removeprefix("r")): problem.sentence
                    for other in rules.rules
                    if other.table == rule.table or problem.code == "operation_not_published"
                }


def _remedy(survey: Survey, rules: RuleSet, table: Table) -> str:
    state = survey.tables[table]
    assert state is not None
    of_table = [rule for rule in rules.rules if rule.table == table]
    lacking = [leaf for leaf in state.leaves if any(unknown_old(rule, leaf) for rule in of_table)]
    columns = sorted({column for leaf in lacking for rule in of_table for column in unknown_old(rule, leaf)})
    advice = "; ".join(
        remedies.carrying(leaf, survey.publication, *read_of_old(of_table, leaf)).text for leaf in lacking[:NAMED]
    )
    more = f" (and so for {len(lacking) - NAMED} more partitions)" if len(lacking) > NAMED else ""
    return (
        f"UPDATE and DELETE of {table} don't carry the old {', '.join(columns)}, so each of them sweeps what this rule "
        f"busts. Better: {advice}{more}. Then remove `old_row`."
    )


def _load(text: str) -> RuleSet:
    return parse_rules([("rules.yaml", text)], {})


def _head(source: Source, sampled: sampling.Sampled, found: families.Found, tables: int) -> Iterator[str]:
    of_all = f" of about {sampled.all_keys:,}" if sampled.all_keys is not None and not sampled.complete else ""
    origin = "of a file" if source.keys is not None else "of Redis"
    if source.dump is not None:
        origin = f"of database {source.database} in a dump of Redis"
    beside = f", {found.beside:,} of them the reader library's and the daemon's," if found.beside else ""
    yield (
        f"Begun by `cdc-invalidator init`, from the names of {found.seen:,} keys{of_all} {origin}{beside} and the "
        f"catalogs of {tables:,} tables. Words that few keys have are taken for data and not shown."
    )
    if of_all:
        yield "Families with few keys may be missing: a larger --sample finds them."
    if sampled.long:
        yield f"{sampled.long:,} keys with names of more than {sampling.LONGEST_NAME} bytes are left out."
    yield (
        "Read it and correct it: only the application's code says for certain what a value is made of. Then run "
        "`cdc-invalidator check`."
    )


@contextmanager
def _progress(what: str) -> Iterator[Tell]:
    """Show on a terminal how far it is; on standard error, since standard output may be the file."""
    try:
        from rich.console import Console  # noqa: PLC0415  an optional dependency
        from rich.progress import Progress  # noqa: PLC0415  an optional dependency
    except ImportError:
        yield lambda _seen, _of: None
        return
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda seen, of: progress.update(task, completed=seen, total=of)
