"""One Redis or Valkey server at a time, at a URL or wherever Sentinel says that the master is: `Single`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.redis import fingerprint
from cdc_invalidator.redis.available import require_commands
from cdc_invalidator.redis.fingerprint import Look
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.scripts import Written, is_watermark, other_data, watermark_written
from cdc_invalidator.redis.server import (
    KEYS_A_COMMAND,
    NO_GRACES,
    PROBE_SUFFIX,
    SCAN_COUNT,
    BustReply,
    CacheServer,
    Cursor,
    denied_channels,
    read_info,
    read_size,
    read_watermark,
    reply_or_denial,
    reply_or_refusal,
    scan_command,
)
from cdc_invalidator.redis.watermark import Watermark


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
        self._written = Written()
        # The first goes before the commands, the others behind them.
        self._proof: Sequence[Command] = (
            ("WATCH", self.watermark_key),
            ("HMGET", self.watermark_key, "lsn", "at"),
            ("MULTI",),
            ("EXEC",),
        )

    async def connect(self) -> None:
        """See `CacheServer`."""
        self._node = await self._find()
        await require_commands(self._node)
        await self.scripts.load(self._node)
        self._node.answered = self.lookups.count

    @property
    def nodes(self) -> list[Node]:
        """See `CacheServer`."""
        return [self._opened]

    async def close(self) -> None:
        """See `CacheServer`."""
        if self._close is not None:
            await self._close()
        if self._node is not None:
            await self._node.close()

    async def probe(self) -> None:
        """See `CacheServer`."""
        if self.scripts.read_only:
            await self._ask(("PING",))
        else:
            # A server that is read-only, or can't save, refuses the first; one that holds something else, the second.
            await self._ask(("UNLINK", self.watermark_key + PROBE_SUFFIX), ("HMGET", self.watermark_key, "lsn", "at"))

    async def bust(
        self,
        deletes: Sequence[Sequence[bytes]],
        bumps: Mapping[bytes, int],
        graces: Mapping[bytes, int] = NO_GRACES,
        looks: Sequence[bytes] = (),
    ) -> BustReply:
        """See `CacheServer`."""
        reply = BustReply([0] * len(deletes), {})
        parts = self._parts(list(enumerate(deletes)), graces)
        counters = list(bumps)
        chunks = [counters[start : start + KEYS_A_COMMAND] for start in range(0, len(counters), KEYS_A_COMMAND)]
        looking = [self.scripts.to_fingerprint(key) for key in looks]
        while parts or chunks:
            bumping = [self.scripts.to_bump(chunk, bumps, graces) for chunk in chunks]
            answers = await self._ours(*looking, *(part.command for part in parts), *bumping)
            reply.looks.extend(map(fingerprint.read, answers[: len(looking)]))
            del answers[: len(looking)]
            looking.clear()
            # Where a command for several groups or counters is denied, only one of them may be to blame.
            apart = _read_deletes(parts, answers[: len(parts)], reply)
            alone = _read_bumps(chunks, answers[len(parts) :], reply)
            parts = [part for number in apart for part in self._parts([(number, deletes[number])], graces)]
            chunks = [[counter] for counter in alone]
        return reply

    def _parts(self, groups: Sequence[tuple[int, Sequence[bytes]]], graces: Mapping[bytes, int]) -> list[_Part]:
        """Return the commands that delete numbered groups of keys with their locks."""
        parts: list[_Part] = []
        plain = groups
        if graces:
            kept = [(number, group) for number, group in groups if group and group[0] in graces]
            plain = [(number, group) for number, group in groups if not (group and group[0] in graces)]
            for number, group in kept:
                for start in range(0, len(group), KEYS_A_COMMAND):
                    some = group[start : start + KEYS_A_COMMAND]
                    parts.append(_Part(("UNLINK", *self.beside.locks_of(some)), (number,), counts=False))
                    parts.append(_Part(self.scripts.to_keep(some, graces[some[0]]), (number,)))
        for keys, counts, places in _chunks([group for _, group in plain]):
            numbers = [plain[place][0] for place in places]
            locks = self.beside.locks_of(keys)
            if len(numbers) == 1:
                # Two commands cost half as much as the script. The first counts locks, which nobody asks for.
                parts += [_Part(("UNLINK", *locks), numbers, counts=False), _Part(("UNLINK", *keys), numbers)]
            else:
                command = self.scripts.to_delete(locks, keys, counts if len(counts) < len(keys) else ())
                parts.append(_Part(command, numbers))
        return parts

    async def versions(self, counters: Sequence[bytes]) -> list[bytes | errors.RedisUnavailable | None]:
        """See `CacheServer`."""
        return await self._ours(*(("GET", counter) for counter in counters)) if counters else []

    async def fingerprints(self, keys: Sequence[bytes]) -> list[Look]:
        """See `CacheServer`."""
        answers = await self._try(*map(self.scripts.to_fingerprint, keys)) if keys else []
        return [fingerprint.read(answer) for answer in answers]

    async def unlink(self, keys: Sequence[bytes]) -> int:
        """See `CacheServer`."""
        commands = [("UNLINK", *keys[start : start + KEYS_A_COMMAND]) for start in range(0, len(keys), KEYS_A_COMMAND)]
        return sum(_not_denied(await self._ours(*commands))) if commands else 0

    async def publish(self, messages: Sequence[tuple[bytes, bytes]]) -> dict[bytes, errors.RedisUnavailable]:
        """See `CacheServer`."""
        answers = await self._try(*(("PUBLISH", channel, payload) for channel, payload in messages)) if messages else []
        return denied_channels(messages, answers)

    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        """See `CacheServer`."""
        (answer,) = _not_denied(await self._ours(scan_command(cursor or 0, pattern, count)))
        return int(answer[0]) or None, list(answer[1])

    async def size(self) -> int | None:
        """See `CacheServer`."""
        return await read_size(self._opened)

    async def read_watermarks(self) -> list[Watermark | None]:
        """See `CacheServer`."""
        (fields,) = await self._ask(("HGETALL", self.watermark_key))
        found = read_watermark(fields)
        self._written = Written.of(found)
        return [found]

    async def write_watermark(self, watermark: Watermark) -> bool:
        """See `CacheServer`."""
        (answer,) = await self._ask(self.scripts.to_write_watermark(self.watermark_key, self._written, watermark))
        stored = watermark_written(answer)
        if stored:
            self._written = Written.of(watermark)
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

    async def _try(self, *commands: Command) -> list[Any]:
        """As `_ask`, but where a right is missing, why is returned in the reply's place."""
        self._check()
        answers = await self._opened.send(commands)
        return [reply_or_denial(command, answer) for command, answer in zip(commands, answers, strict=True)]

    async def _ours(self, *commands: Command) -> list[Any]:
        """Send commands that count only if the data are ours, and prove that they were, all the while.

        The watermark that was read or written last is there, and from the first command to the last nothing has touched
        it. EXEC also tells of a database that was swapped in (SWAPDB) and out again in between. No command is put into
        the transaction, where one that is denied would stop all, and where memory that is full would.

        Returns:
            The replies in order; where a right is missing, why.

        Raises:
            errors.RedisUnavailable: the data were others for a moment, or a reply is another error.
        """
        self._check()
        watch, *proof = self._proof
        answers = await self._opened.send((watch, *commands, *proof))
        replies = [reply_or_denial(command, answer) for command, answer in zip(commands, answers[1:-3], strict=True)]
        _, found, _, untouched = _not_denied(map(reply_or_denial, self._proof, (answers[0], *answers[-3:])))
        if untouched is None or not is_watermark(self._written.id, *found):
            raise other_data()
        return replies


class _Part(NamedTuple):
    """A command that deletes keys of some groups, or their locks; ``counts``: its reply says how many were there."""

    command: Command
    groups: Sequence[int]
    counts: bool = True


def _not_denied(answers: Iterable[Any]) -> list[Any]:
    """Return the answers; raise the first that is a denial."""
    found = list(answers)
    for answer in found:
        if isinstance(answer, errors.RedisUnavailable):
            raise answer
    return found


def _read_deletes(parts: Iterable[_Part], answers: Iterable[Any], reply: BustReply) -> list[int]:
    """Enter the answers into the reply; return the groups that have to be tried each by itself."""
    apart: dict[int, None] = {}
    for part, answer in zip(parts, answers, strict=True):
        if isinstance(answer, errors.RedisUnavailable):
            if len(part.groups) > 1:
                apart.update(dict.fromkeys(part.groups))
            else:
                reply.denied[part.groups[0]] = answer
        elif part.counts:
            found = answer if isinstance(answer, list) else [answer] * len(part.groups)
            for group, count in zip(part.groups, found, strict=True):
                reply.existed[group] += count
    return list(apart)


def _read_bumps(chunks: Iterable[list[bytes]], answers: Iterable[Any], reply: BustReply) -> list[bytes]:
    """Enter the answers into the reply; return the counters that have to be tried each by itself."""
    alone: list[bytes] = []
    for counters, answer in zip(chunks, answers, strict=True):
        if not isinstance(answer, errors.RedisUnavailable):
            reply.versions.update(zip(counters, answer, strict=True))
        elif len(counters) > 1:
            alone += counters
        else:
            reply.denied[counters[0]] = answer
    return alone


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
