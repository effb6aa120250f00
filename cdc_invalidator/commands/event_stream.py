"""Reads the event stream: its newest entries, and those that are still to come.

The rule that holds here: nothing is written. Entries that the daemon did not write are skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import orjson

from cdc_invalidator import errors
from cdc_invalidator.backoff import Backoff
from cdc_invalidator.pipeline.eventstream import FIELD, refusal
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server

ENTRIES_A_COMMAND = 1000
# How long Redis may keep us waiting for the next entry; well below what counts as no answer.
BLOCK_MILLISECONDS = 1000
FIRST = "0-0"
EVER = 2**53


class StreamEntry(NamedTuple):
    """An entry: its id in the stream, the log's JSON line, and what that says."""

    id: str
    line: bytes
    event: dict[str, Any]

    @property
    def milliseconds(self) -> int:
        """When it was written, since 1970."""
        return int(self.id.partition("-")[0])


class EventStreamReader:
    """An open connection; `opened` makes it. All its methods raise the same.

    Raises:
        errors.RedisUnavailable: the connection is lost.
        errors.InvalidatorError: Redis refuses to read the stream.
    """

    def __init__(self, source: EndpointSource, key: str) -> None:
        # No watermark is read here.
        self._server = cache_server(source, watermark="")
        self._key = key.encode()

    @classmethod
    @asynccontextmanager
    async def opened(cls, source: EndpointSource, key: str) -> AsyncIterator[EventStreamReader]:
        """Open a connection, and close it in the end.

        Args:
            source: the Redis that the daemon busts.
            key: its event stream.
        """
        reader = cls(source, key)
        try:
            await reader._server.connect()
            yield reader
        finally:
            await reader._server.close()

    async def backwards(self) -> AsyncGenerator[StreamEntry]:
        """Yield all entries, the newest first."""
        before = "+"
        while True:
            found = await self._ask("XREVRANGE", self._key, before, "-", "COUNT", ENTRIES_A_COMMAND)
            for entry in _entries(found):
                yield entry
            if len(found) < ENTRIES_A_COMMAND:
                return
            before = "(" + found[-1][0].decode()

    async def end(self) -> str:
        """Return the id of the newest entry."""
        found = await self._ask("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return str(found[0][0].decode()) if found else FIRST

    async def ago(self, milliseconds: int) -> str:
        """Return the id that those of the last milliseconds come after, by the clock of Redis."""
        seconds, us = await self._ask("TIME")
        return f"{max(0, int(seconds) * 1000 + int(us) // 1000 - milliseconds)}-0"

    async def after(self, last: str) -> tuple[str, list[StreamEntry]]:
        """Wait a little for entries after an id, and give the id to go on from, and what came."""
        wait = ("COUNT", ENTRIES_A_COMMAND, "BLOCK", BLOCK_MILLISECONDS)
        answer = await self._ask("XREAD", *wait, "STREAMS", self._key, last)
        found = answer[0][1] if answer else []
        return found[-1][0].decode() if found else last, list(_entries(found))

    async def _ask(self, *command: Any) -> Any:
        (answer,) = await self._server.ask_about(self._key, [command])
        if isinstance(answer, errors.RedisUnavailable):
            raise errors.InvalidatorError(refusal(answer, command[0]))
        return answer


def _entries(found: Any) -> list[StreamEntry]:
    entries = []
    for name, pairs in found:
        line = dict(zip(pairs[::2], pairs[1::2], strict=True)).get(FIELD.encode(), b"")
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event and _ours(event):
            entries.append(StreamEntry(name.decode(), line, event))
    return entries


def _ours(event: dict[str, Any]) -> bool:
    """Whether what readers of events look at is of the types that the daemon writes."""
    lists = (event.get(name, []) for name in ("caches", "key_hashes", "raw_keys"))
    return all(isinstance(event.get(name, ""), str | None) for name in ("cache", "rule")) and all(
        isinstance(text, str)
        for text in (event["event"], event.get("level", ""), *(each for some in lists for each in _each(some)))
    )


def _each(some: Any) -> list[Any]:
    return some if isinstance(some, list) else [None]


async def follow(
    source: EndpointSource, key: str, *, since: int, lost: Callable[[errors.RedisUnavailable], None]
) -> AsyncGenerator[list[StreamEntry]]:
    """Yield entries as they come, across lost connections; an empty list now and then, while none come.

    Args:
        source: the Redis that the daemon busts.
        key: its event stream.
        since: begin with those of the last so many milliseconds; `EVER` for all that are there.
        lost: is told why the connection is lost, once for each time.

    Raises:
        errors.InvalidatorError: Redis can't be reached at the first attempt, or refuses to read the stream.
    """
    last: str | None = None
    backoff = Backoff(most=1.0)
    while True:
        try:
            async with EventStreamReader.opened(source, key) as reader:
                if last is None:
                    last = await (reader.ago(since) if since else reader.end())
                while True:
                    last, entries = await reader.after(last)
                    backoff.reset()
                    yield entries
        except errors.RedisUnavailable as error:
            if last is None:
                raise
            if not backoff.attempts:
                lost(error)
            yield []
            await asyncio.sleep(backoff.next())
