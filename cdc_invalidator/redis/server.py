"""What is written to the cache, whichever kind of Redis it is: the commands, the scripts, and `Single`, one server.

Every method either has had a good reply to each of its commands or raises `errors.RedisUnavailable`; after that the
server is closed and another one is opened. An error inside a pipeline or a script is a failure, never a bust.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.node import Command, Node, failed
from cdc_invalidator.redis.scripts import ScriptDigests
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

# Keys a command: large enough that commands don't matter, small enough that no other client waits long.
KEYS_A_COMMAND = 1000
SCAN_COUNT = 1000


NO_GRACES: Mapping[bytes, int] = {}
BUMP_MISSING, BUMP_DELETED = 0, -1
_MARKED, _OTHER_MARK = 1, 0

Cursor = Any
"""Where a search for keys stands; ``None`` is its beginning and its end."""


@dataclass(frozen=True, slots=True)
class BustReply:
    """What Redis answered to one flush.

    ``existed``: for each group of deletes, how many of its keys were there; ``versions``: for each bumped counter its
    new version, `BUMP_MISSING` or `BUMP_DELETED`.
    """

    existed: list[int]
    versions: dict[bytes, int]


class CacheServer(ABC):
    """Where the caches live. Make it, `connect`, use it until it fails, `close` it, make another one.

    Args:
        slot: name of the replication slot; it names the watermark.
    """

    def __init__(self, slot: str) -> None:
        self.watermark_key = f"cdc:{slot}:watermark".encode()
        self.scripts = ScriptDigests()

    @abstractmethod
    async def connect(self) -> None:
        """Find the servers and open a connection to each."""

    @abstractmethod
    async def close(self) -> None:
        """Drop the connections; what was sent and not answered may or may not have been done."""

    @abstractmethod
    async def bust(
        self, deletes: Sequence[Sequence[bytes]], bumps: Mapping[bytes, int], graces: Mapping[bytes, int] = NO_GRACES
    ) -> BustReply:
        """Delete keys with their locks and bump versions.

        Args:
            deletes: groups of keys; each key is deleted with its lock, the lock no later than the key.
            bumps: from a version counter's key to the milliseconds that it is kept.
            graces: from a key or a counter to the milliseconds for which readers may still show what it had; for none,
                or all, of a group.
        """

    @abstractmethod
    async def versions(self, counters: Sequence[bytes]) -> list[bytes | None]:
        """Read version counters; ``None`` for one that is missing."""

    @abstractmethod
    async def unlink(self, keys: Sequence[bytes]) -> int:
        """Delete keys as they are, without their locks, and give how many were there."""

    @abstractmethod
    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        """Look at about ``count`` keys more for those of a pattern.

        A search begins with the cursor ``None``, and is over when that comes back.
        """

    @abstractmethod
    async def size(self) -> int | None:
        """Give how many keys there are, of everybody's; ``None`` where the ACL refuses it."""

    @abstractmethod
    async def read_watermarks(self) -> list[Watermark | None]:
        """Read what each server says it has had; ``None`` when it says nothing, or nothing that we wrote."""

    @abstractmethod
    async def write_watermark(self, watermark: Watermark) -> bool:
        """Write what all servers have had, over the one that was read or written last.

        Returns:
            False when Redis is out of memory: deletes still work then, so the stream may go on without it. A restart
            finds the old watermark, and sweeps.
        """

    @abstractmethod
    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:
        """Send commands that have this key in one go, and give their replies in order.

        For what no bust depends on: a reply of the server that is not about the connection (it lacks a right, or
        memory) is not raised, but stands among the others as an `errors.RedisUnavailable`.
        """

    @abstractmethod
    async def info(self) -> dict[str, int] | None:
        """Give what INFO says under `INFO`, summed up over the servers; ``None`` where the ACL refuses it."""


INFO = ("keyspace_hits", "keyspace_misses", "evicted_keys", "expired_keys", "used_memory")


class Single(CacheServer):
    """One server at a time: at a URL, or wherever Sentinel says that the master is.

    Args:
        slot: name of the replication slot.
        find: opens a connection to the server.
        left: tells, at once, why this server is not the one to write to any more; ``None`` while it is.
        close: ends what finding the server needed.
    """

    def __init__(
        self,
        slot: str,
        find: Callable[[], Awaitable[Node]],
        *,
        left: Callable[[], str | None] = lambda: None,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(slot)
        self._find = find
        self._left = left
        self._close = close
        self._node: Node | None = None
        self._sealed = ""

    async def connect(self) -> None:
        """See `CacheServer`."""
        self._node = await self._find()
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
                    commands.append(("EVALSHA", self.scripts.keep, len(some), *some, graces[some[0]], STALE_SUFFIX))
                    counted += [[], [number]]
        for keys, counts, numbers in _chunks(plain):
            locks = [key + LOCK_SUFFIX for key in keys]
            if len(numbers) == 1:
                # Without a script, at half the cost; nothing but locks is counted by the first.
                commands += [("UNLINK", *locks), ("UNLINK", *keys)]
                counted += [[], numbers]
            else:
                told = counts if len(counts) < len(keys) else ()
                commands.append(("EVALSHA", self.scripts.delete, 2 * len(keys), *locks, *keys, *told))
                counted.append(numbers)
        deleting = len(commands)
        counters = list(bumps)
        for start in range(0, len(counters), KEYS_A_COMMAND):
            some = counters[start : start + KEYS_A_COMMAND]
            commands.append(bumping(self.scripts, some, bumps, graces))
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
        (answer,) = await self._ask(scanning(cursor or 0, pattern, count))
        return int(answer[0]) or None, list(answer[1])

    async def size(self) -> int | None:
        """See `CacheServer`."""
        return await read_size(self._opened)

    async def read_watermarks(self) -> list[Watermark | None]:
        """See `CacheServer`."""
        (fields,) = await self._ask(("HGETALL", self.watermark_key))
        found = read_mark(fields)
        self._sealed = seal(found)
        return [found]

    async def write_watermark(self, watermark: Watermark) -> bool:
        """See `CacheServer`."""
        (answer,) = await self._ask(marking(self.scripts, self.watermark_key, self._sealed, watermark))
        stored = marked(answer)
        if stored:
            self._sealed = seal(watermark)
        return stored

    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:  # noqa: ARG002  there is one server
        """See `CacheServer`."""
        self._check()
        answers = await self._opened.send(commands)
        return [refusable(command, answer) for command, answer in zip(commands, answers, strict=True)]

    async def info(self) -> dict[str, int] | None:
        """See `CacheServer`."""
        return await read_info(self._opened)

    @property
    def _opened(self) -> Node:
        assert self._node is not None
        return self._node

    def _check(self) -> None:
        left = self._left()
        if left is not None:
            raise errors.RedisUnavailable(left, code="MOVED_AWAY")

    async def _ask(self, *commands: Command) -> list[Any]:
        self._check()
        return await self._opened.ask(*commands)


# What a cluster does on each of its servers as well.


def bumping(
    scripts: ScriptDigests, counters: Sequence[bytes], bumps: Mapping[bytes, int], graces: Mapping[bytes, int]
) -> Command:
    """Give the command that bumps some counters."""
    kept = [graces.get(key, 0) for key in counters]
    times = [bumps[key] for key in counters]
    return ("EVALSHA", scripts.bump, len(counters), *counters, *times, *kept, STALE_SUFFIX)


def scanning(cursor: int, pattern: bytes, count: int) -> Command:
    """Give the command that takes one step of a search."""
    return ("SCAN", cursor, "MATCH", pattern, "COUNT", count)


def read_mark(fields: Any) -> Watermark | None:
    """Read a watermark's hash as HGETALL gives it."""
    return Watermark.read(dict(zip(fields[::2], fields[1::2], strict=True)) if isinstance(fields, list) else fields)


def seal(watermark: Watermark | None) -> str:
    """Give what a watermark is known by when the next one is written over it; empty for none."""
    return f"{watermark.lsn}:{watermark.at}" if watermark else ""


def marking(scripts: ScriptDigests, key: bytes, sealed: str, watermark: Watermark) -> Command:
    """Give the command that writes a watermark over the one with that `seal`; if that is empty, over any."""
    pairs = [part for item in watermark.fields().items() for part in item]
    return ("EVALSHA", scripts.mark, 1, key, sealed, "" if watermark.standbys else "standbys", *pairs)


def marked(answer: int) -> bool:
    """Read the answer to `marking`: False when memory is full.

    Raises:
        errors.RedisUnavailable: somebody else's watermark is there.
    """
    if answer == _OTHER_MARK:
        raise errors.RedisUnavailable(
            "Redis holds another watermark than the one written last, so its data are others; they are compared anew.",
            code="OTHER_DATA",
        )
    return answer == _MARKED


def refusable(command: Command, answer: Any) -> Any:
    """Give the reply to a command of `CacheServer.ask_about`, or why the server refuses it.

    Raises:
        errors.RedisUnavailable: another connection may do better.
    """
    if not isinstance(answer, Exception):
        return answer
    error = failed(str(command[0]), answer)
    if replies.of(error.code).does in {replies.Does.RETRY, replies.Does.REDIRECT}:
        raise error from answer
    return error


async def read_size(node: Node) -> int | None:
    """Give how many keys one server has; ``None`` where the ACL refuses it."""
    answers = await _if_granted(node, ("DBSIZE",))
    return int(answers[0]) if answers else None


async def read_info(node: Node) -> dict[str, int] | None:
    """Give what INFO of one server says under `INFO`; ``None`` where the ACL refuses it."""
    sections = await _if_granted(node, ("INFO", "stats"), ("INFO", "memory"))
    if not sections:
        return None
    lines = b"\n".join(sections).split()
    values = dict(line.split(b":", 1) for line in lines if b":" in line)
    return {name: int(values.get(name.encode(), 0)) for name in INFO}


async def _if_granted(node: Node, *commands: Command) -> list[Any]:
    """Ask what is good to know and not needed; nothing where the ACL refuses it, or the command was renamed."""
    try:
        return await node.ask(*commands)
    except errors.RedisUnavailable as error:
        if error.code in {"NOPERM", "ERR"}:
            return []
        raise


def _chunks(groups: Sequence[Sequence[bytes]]) -> list[tuple[list[bytes], list[int], list[int]]]:
    """Cut groups into commands of at most KEYS_A_COMMAND keys: keys, counts a group, and the groups' numbers."""
    chunks: list[tuple[list[bytes], list[int], list[int]]] = []
    if len(groups) == sum(map(len, groups)) and all(groups):
        # One key each, as small transactions give them.
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
