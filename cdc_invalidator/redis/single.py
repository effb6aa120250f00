"""One Redis or Valkey server at a time, at a URL or wherever Sentinel says that the master is: `Single`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.redis.available import require_commands
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.scripts import watermark_id, watermark_written
from cdc_invalidator.redis.server import (
    KEYS_A_COMMAND,
    NO_GRACES,
    SCAN_COUNT,
    BustReply,
    CacheServer,
    Cursor,
    read_info,
    read_size,
    read_watermark,
    reply_or_refusal,
    scan_command,
)
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX


class Single(CacheServer):
    """One server at a time: at a URL, or wherever Sentinel says that the master is.

    Args:
        watermark: name of the watermark.
        find: opens a connection to the server.
        why_lost: returns, without waiting, why this server is no longer the one to write to; ``None`` while it is.
        close: ends what finding the server needed.
    """

    def __init__(
        self,
        watermark: str,
        find: Callable[[], Awaitable[Node]],
        *,
        why_lost: Callable[[], str | None] = lambda: None,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(watermark)
        self._find = find
        self._why_lost = why_lost
        self._close = close
        self._node: Node | None = None
        self._last_watermark_id = ""

    async def connect(self) -> None:
        """See `CacheServer`."""
        self._node = await self._find()
        await require_commands(self._node)
        await self.scripts.load(self._node)

    async def close(self) -> None:
        """See `CacheServer`."""
        if self._close is not None:
            await self._close()
        if self._node is not None:
            await self._node.close()

    async def bust(
        self, deletes: Sequence[Sequence[bytes]], bumps: Mapping[bytes, int], graces: Mapping[bytes, int] = NO_GRACES
    ) -> BustReply:
        """See `CacheServer`."""
        commands: list[Command] = []
        counted: list[list[int]] = []  # for each command, the groups that its counts belong to
        plain = deletes
        if graces:
            kept = {number for number, group in enumerate(deletes) if group and group[0] in graces}
            plain = [() if number in kept else group for number, group in enumerate(deletes)]
            for number in sorted(kept):
                for start in range(0, len(deletes[number]), KEYS_A_COMMAND):
                    some = deletes[number][start : start + KEYS_A_COMMAND]
                    commands.append(("UNLINK", *(key + LOCK_SUFFIX for key in some)))
                    commands.append(self.scripts.to_keep(some, graces[some[0]]))
                    counted += [[], [number]]
        for keys, counts, numbers in _chunks(plain):
            if len(numbers) == 1:
                # Two commands cost half as much as the script. The first counts locks, which nobody asks for.
                commands += [("UNLINK", *(key + LOCK_SUFFIX for key in keys)), ("UNLINK", *keys)]
                counted += [[], numbers]
            else:
                commands.append(self.scripts.to_delete(keys, counts if len(counts) < len(keys) else ()))
                counted.append(numbers)
        deleting = len(commands)
        counters = list(bumps)
        for start in range(0, len(counters), KEYS_A_COMMAND):
            some = counters[start : start + KEYS_A_COMMAND]
            commands.append(self.scripts.to_bump(some, bumps, graces))
        answers = await self._ask(*commands) if commands else []
        existed = [0] * len(deletes)
        for numbers, answer in zip(counted, answers[:deleting], strict=True):
            found = answer if isinstance(answer, list) else [answer] * len(numbers)
            for group, count in zip(numbers, found, strict=True):
                existed[group] += count
        versions = [version for answer in answers[deleting:] for version in answer]
        return BustReply(existed, dict(zip(counters, versions, strict=True)))

    async def versions(self, counters: Sequence[bytes]) -> list[bytes | None]:
        """See `CacheServer`."""
        return await self._ask(*(("GET", counter) for counter in counters)) if counters else []

    async def unlink(self, keys: Sequence[bytes]) -> int:
        """See `CacheServer`."""
        commands = [("UNLINK", *keys[start : start + KEYS_A_COMMAND]) for start in range(0, len(keys), KEYS_A_COMMAND)]
        return sum(await self._ask(*commands)) if commands else 0

    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        """See `CacheServer`."""
        (answer,) = await self._ask(scan_command(cursor or 0, pattern, count))
        return int(answer[0]) or None, list(answer[1])

    async def size(self) -> int | None:
        """See `CacheServer`."""
        return await read_size(self._opened)

    async def read_watermarks(self) -> list[Watermark | None]:
        """See `CacheServer`."""
        (fields,) = await self._ask(("HGETALL", self.watermark_key))
        found = read_watermark(fields)
        self._last_watermark_id = watermark_id(found)
        return [found]

    async def write_watermark(self, watermark: Watermark) -> bool:
        """See `CacheServer`."""
        (answer,) = await self._ask(
            self.scripts.to_write_watermark(self.watermark_key, self._last_watermark_id, watermark)
        )
        stored = watermark_written(answer)
        if stored:
            self._last_watermark_id = watermark_id(watermark)
        return stored

    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:  # noqa: ARG002  there is one server
        """See `CacheServer`."""
        self._check()
        answers = await self._opened.send(commands)
        return [reply_or_refusal(command, answer) for command, answer in zip(commands, answers, strict=True)]

    async def info(self) -> dict[str, int] | None:
        """See `CacheServer`."""
        return await read_info(self._opened)

    @property
    def _opened(self) -> Node:
        assert self._node is not None
        return self._node

    def _check(self) -> None:
        reason = self._why_lost()
        if reason is not None:
            raise errors.RedisUnavailable(reason, code="MOVED_AWAY")

    async def _ask(self, *commands: Command) -> list[Any]:
        self._check()
        return await self._opened.ask(*commands)


def _chunks(groups: Sequence[Sequence[bytes]]) -> list[tuple[list[bytes], list[int], list[int]]]:
    """Cut groups into commands of at most KEYS_A_COMMAND keys: keys, counts a group, and the groups' numbers."""
    chunks: list[tuple[list[bytes], list[int], list[int]]] = []
    if len(groups) == sum(map(len, groups)) and all(groups):
        # One key each, as in small transactions.
        for start in range(0, len(groups), KEYS_A_COMMAND):
            alone = [group[0] for group in groups[start : start + KEYS_A_COMMAND]]
            chunks.append((alone, [1] * len(alone), list(range(start, start + len(alone)))))
        return chunks
    keys: list[bytes] = []
    counts: list[int] = []
    numbers: list[int] = []
    for number, group in enumerate(groups):
        start = 0
        while start < len(group):
            some = group[start : start + KEYS_A_COMMAND - len(keys)]
            keys += some
            counts.append(len(some))
            numbers.append(number)
            start += len(some)
            if len(keys) == KEYS_A_COMMAND:
                chunks.append((keys, counts, numbers))
                keys, counts, numbers = [], [], []
    if keys:
        chunks.append((keys, counts, numbers))
    return chunks
