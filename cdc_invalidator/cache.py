"""The edge to Redis: what is written there, and the look at every reply. Nothing else imports the driver.

Every method either has had a good reply to each of its commands or raises `errors.RedisUnavailable`; after that the
connection is thrown away. An error inside a pipeline or a script is a failure, never a bust.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis_asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cdc_invalidator import errors
from cdc_invalidator.watermark import Watermark

LOCK_SUFFIX = b":lock"
# Keys a command: large enough that commands don't matter, small enough that no other client waits long.
KEYS_A_COMMAND = 1000
SCAN_COUNT = 1000

# KEYS: the locks of all keys, then the keys. ARGV: how many keys belong to each group, in order.
# The locks go first, so that a fill that was overtaken can't store after its key was deleted. Gives, for each group,
# how many of its keys were there. UNLINK is allowed when memory is full.
_DELETE = """
local half = #KEYS / 2
redis.call('UNLINK', unpack(KEYS, 1, half))
local existed = {}
local at = half
for group, count in ipairs(ARGV) do
  existed[group] = redis.call('UNLINK', unpack(KEYS, at + 1, at + count))
  at = at + count
end
return existed
"""

# KEYS: version counters. ARGV: for each, the milliseconds that it is kept.
# A version becomes the larger of current + 1 and Redis TIME in microseconds: it never repeats, not even after it was
# evicted and created anew. A missing one needs no bump: the next reader creates it before it loads. Where the write is
# refused (memory is full, or the key holds something else) the counter is deleted instead, which serves as well.
# Gives the new version, 0 for one that was missing, -1 for one that was deleted.
_BUMP = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local versions = {}
for at, key in ipairs(KEYS) do
  local current = redis.pcall('GET', key)
  if current == false then
    versions[at] = 0
  else
    local number = type(current) == 'string' and tonumber(current)
    local version = math.max((number or 0) + 1, now)
    local stored = number and redis.pcall('SET', key, string.format('%.0f', version), 'PX', ARGV[at])
    if stored and not stored.err then
      versions[at] = version
    else
      redis.call('UNLINK', key)
      versions[at] = -1
    end
  end
end
return versions
"""

BUMP_MISSING, BUMP_DELETED = 0, -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What Redis answered to one flush.

    ``existed``: for each group of deletes, how many of its keys were there; ``versions``: for each bumped counter its
    new version, `BUMP_MISSING` or `BUMP_DELETED`.
    """

    existed: list[int]
    versions: dict[bytes, int]


class CacheServer:
    """One connection to one Redis or Valkey.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        slot: name of the replication slot; it names the watermark.
        timeout: seconds until a server that does not answer counts as lost.

    Raises:
        errors.WrongSettings: the URL can't be used.
    """

    def __init__(self, url: str, slot: str, *, timeout: float = 5.0) -> None:
        self._connected = False
        self.watermark_key = f"cdc:{slot}:watermark"
        if url.partition("://")[0] not in {"redis", "rediss", "unix"}:
            raise errors.WrongSettings(
                "CDC_REDIS_URL has a scheme that is not supported; it must start with redis://, rediss:// or unix://."
            )
        try:
            self._redis = redis_asyncio.Redis.from_url(
                url,
                redis_connect_func=self._connect_once,
                # A failed command is retried by apply, with the whole batch: the driver must not do it behind our back.
                retry=Retry(NoBackoff(), 0),
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                client_name="cdc-invalidator",
                protocol=2,
                decode_responses=False,
            )
        except ValueError:
            # The driver's words may repeat a part of the password.
            raise errors.WrongSettings(
                "CDC_REDIS_URL can't be read; write redis://user:password@host:port/db, the password percent-encoded."
            ) from None
        self._delete = self._bump = ""

    async def _connect_once(self, connection: Any) -> None:
        # The driver's pool replaces a connection that has ended without a word. Behind it may be an older snapshot, or
        # another server, whose watermark nobody has looked at: one connection, and when it is gone, it is lost.
        if self._connected:
            raise exceptions.ConnectionError("the connection has ended")
        self._connected = True
        await connection.on_connect()

    async def connect(self) -> None:
        """Open the connection and load the scripts."""
        self._delete, self._bump = (
            _text(reply) for reply in await self._execute([("SCRIPT LOAD", _DELETE), ("SCRIPT LOAD", _BUMP)])
        )

    async def close(self) -> None:
        """Drop the connection; what was sent and not answered may or may not have been done."""
        try:
            await self._redis.aclose()
        except (exceptions.RedisError, OSError):
            # It is being thrown away: how it goes does not matter, and what was in flight is applied again.
            return

    async def bust(self, deletes: Sequence[Sequence[bytes]], bumps: Mapping[bytes, int]) -> Outcome:
        """Delete keys with their locks and bump versions.

        Args:
            deletes: groups of keys; each key is deleted with its lock.
            bumps: from a version counter's key to the milliseconds that it is kept.
        """
        commands: list[tuple[Any, ...]] = []
        groups: list[int] = []  # which group each count of each delete command belongs to
        spans: list[int] = []
        for keys, counts, numbers in _chunks(deletes):
            locks = [key + LOCK_SUFFIX for key in keys]
            commands.append(("EVALSHA", self._delete, 2 * len(keys), *locks, *keys, *counts))
            groups += numbers
            spans.append(len(counts))
        counters = list(bumps)
        for start in range(0, len(counters), KEYS_A_COMMAND):
            some = counters[start : start + KEYS_A_COMMAND]
            commands.append(("EVALSHA", self._bump, len(some), *some, *(bumps[key] for key in some)))
        replies = await self._execute(commands) if commands else []
        existed = [0] * len(deletes)
        counts_of = [count for reply in replies[: len(spans)] for count in reply]
        for group, count in zip(groups, counts_of, strict=True):
            existed[group] += count
        versions = [version for reply in replies[len(spans) :] for version in reply]
        return Outcome(existed, dict(zip(counters, versions, strict=True)))

    async def scan(self, cursor: int, pattern: bytes) -> tuple[int, list[bytes]]:
        """Take one step of a search for keys; it is over when the cursor that it gives is 0."""
        (reply,) = await self._execute([("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)])
        return int(reply[0]), list(reply[1])

    async def unlink(self, keys: Sequence[bytes]) -> int:
        """Delete keys as they are, without their locks, and give how many were there."""
        commands = [("UNLINK", *keys[start : start + KEYS_A_COMMAND]) for start in range(0, len(keys), KEYS_A_COMMAND)]
        return sum(await self._execute(commands)) if commands else 0

    async def read_watermark(self) -> Watermark | None:
        """Read what this Redis says it has had; ``None`` when it says nothing, or nothing that we wrote."""
        (fields,) = await self._execute([("HGETALL", self.watermark_key)])
        if isinstance(fields, list):
            fields = dict(zip(fields[::2], fields[1::2], strict=True))
        return Watermark.read(fields)

    async def write_watermark(self, watermark: Watermark) -> bool:
        """Write what this Redis has had.

        Returns:
            False when Redis is out of memory: deletes still work then, so the stream may go on without it. A restart
            finds the old watermark, and sweeps.
        """
        pairs = [part for item in watermark.fields().items() for part in item]
        try:
            await self._execute([("HSET", self.watermark_key, *pairs)])
        except errors.RedisUnavailable as error:
            if isinstance(error.__cause__, exceptions.OutOfMemoryError):
                return False
            raise
        return True

    async def info(self) -> dict[str, Any] | None:
        """Give the sections ``stats`` and ``memory`` of INFO, for the metrics; ``None`` where the ACL refuses it."""
        try:
            stats = await self._guard(self._redis.info("stats"))
            memory = await self._guard(self._redis.info("memory"))
        except errors.RedisUnavailable as error:
            if isinstance(error.__cause__, exceptions.NoPermissionError):
                return None
            raise
        return {**stats, **memory}

    async def _execute(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await self._guard(pipeline.execute(raise_on_error=False))
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, Exception):
                raise _unavailable(str(command[0]), reply) from reply
        return replies

    async def _guard(self, call: Any) -> Any:
        try:
            return await call
        except (exceptions.RedisError, OSError, asyncio.IncompleteReadError) as error:
            raise _unavailable("the connection", error) from error


def _chunks(groups: Sequence[Sequence[bytes]]) -> list[tuple[list[bytes], list[int], list[int]]]:
    """Cut groups into commands of at most KEYS_A_COMMAND keys: keys, counts a group, and the groups' numbers."""
    chunks: list[tuple[list[bytes], list[int], list[int]]] = []
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


def _unavailable(what: str, error: BaseException) -> errors.RedisUnavailable:
    if isinstance(error, exceptions.NoPermissionError):
        remedy = "grant the command to the ACL user that CDC_REDIS_URL names"
    elif isinstance(error, exceptions.AuthenticationError):
        remedy = "put the right user and password into CDC_REDIS_URL"
    else:
        remedy = "check CDC_REDIS_URL and the server"
    return errors.RedisUnavailable(f"Redis failed at {what} ({_without_keys(error)}); {remedy}.")


def _without_keys(error: BaseException) -> str:
    # Some replies repeat the arguments (unknown command, script errors): only the first words are safe to show.
    text = str(error).split("'", 1)[0].strip()
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _text(reply: Any) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)
