"""`bust`: a manual bust, written to PostgreSQL's WAL as a logical message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import orjson

from cdc_invalidator import errors
from cdc_invalidator.pipeline.manual import MESSAGE_PREFIX, ManualBusts
from cdc_invalidator.postgres.connection import connect_through_anything, translated
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.rules.model import RuleSet

BUST_SECONDS = 30.0


def message(rules: RuleSet, cache: str, parameters: Sequence[str]) -> bytes:
    """Return the message's content.

    Args:
        rules: the rules, which must know the cache and its parameters.
        cache: the cache's name.
        parameters: ``name=value`` for each parameter of its key; none for the whole cache.

    Raises:
        errors.WrongSettings: the daemon would refuse it.
    """
    fields: dict[str, Any] = {"cache": cache}
    if parameters:
        if not all("=" in word for word in parameters):
            raise errors.WrongSettings("A parameter lacks its value; write name=value.")
        fields["params"] = dict(word.split("=", 1) for word in parameters)
    content = orjson.dumps(fields)
    try:
        ManualBusts(rules).read(content)
    except errors.WrongMessage as error:
        raise errors.WrongSettings(str(error)) from error
    return content


async def emit(dsn: DsnSource, content: bytes) -> str:
    """Write the message, and return the LSN where it stands.

    Raises:
        errors.InvalidatorError: the database can't be reached, or refuses.
    """
    # Whatever encoding the session has.
    ascii_only = json.dumps(orjson.loads(content))
    # One statement, which a pooler passes on like any of the application's.
    connection = await connect_through_anything(dsn)
    async with connection:
        try:
            async with asyncio.timeout(BUST_SECONDS):
                with translated():
                    cursor = await connection.execute(
                        "SELECT pg_logical_emit_message(true, %s, %s)::text AS lsn", [MESSAGE_PREFIX, ascii_only]
                    )
                    return str((await cursor.fetchall())[0].lsn)
        except TimeoutError as error:
            raise errors.PostgresUnavailable(
                f"PostgreSQL has not answered for {BUST_SECONDS:.0f} s, and the message may be written or not; look at "
                "the server, and bust again."
            ) from error
