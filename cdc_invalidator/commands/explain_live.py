"""What `explain` learns from servers: the last busts of a key, and what a change busts on this database."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import aclosing

import structlog

from cdc_invalidator import errors
from cdc_invalidator.commands import catalog
from cdc_invalidator.commands.column_texts import Columns, certain
from cdc_invalidator.commands.event_stream import EventStreamReader
from cdc_invalidator.commands.explain import LastBusts
from cdc_invalidator.commands.simulate import Change, Verdict
from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.queries import columns
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.model import RuleSet


async def last_busts(
    rules: RuleSet, key: str, redis: EndpointSource, event_stream: str, hashed: Callable[[bytes], str] | None
) -> LastBusts:
    """Read a key's last busts from the event stream; if that fails, the result says why.

    Args:
        rules: the rules.
        key: the key.
        redis: the Redis that has the event stream.
        event_stream: the stream's key.
        hashed: gives the hash that events show of a key; ``None`` where the daemon's secret is not known.

    Raises:
        errors.WrongSettings: the URL of Redis can't be used.
    """
    last = LastBusts(rules, key, hashed)
    try:
        async with EventStreamReader.opened(redis, event_stream) as reader, aclosing(reader.backwards()) as entries:
            async for entry in entries:
                last.take(entry.event)
                if last.complete:
                    break
    except errors.WrongSettings:
        raise
    except errors.InvalidatorError as error:
        # The rest of the answer stands.
        last.fail(str(error))
    return last


async def parameter_values(dsn: DsnSource, rules: RuleSet) -> Columns:
    """Return what the types of the rules' columns say of the values in keys.

    Raises:
        errors.InvalidatorError: the database can't be asked.
    """
    async with await connect(dsn, "cdc-invalidator explain", {"default_transaction_read_only": "on"}) as connection:
        return certain(rules, await columns(connection, rules.tables))


async def verdicts(dsn: DsnSource, rules: RuleSet, change: Change) -> list[Verdict]:
    """Return what each rule makes of a change; empty if no rule is of its table.

    Raises:
        errors.InvalidatorError: see `catalog.ask`.
    """
    # Warnings about queries must not stand between the answer's lines.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    return [played.verdict() for played in await catalog.ask(dsn, rules, change)]
