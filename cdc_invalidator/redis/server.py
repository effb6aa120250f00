"""What the daemon asks of Redis, whichever kind it is: `CacheServer`, which `Single` and `Cluster` implement.

Every method either has had a good reply to each of its commands or raises `errors.RedisUnavailable`, see `node.failed`.
After that the server is closed and another one is opened. An error inside a pipeline or a script is a failure, never a
bust.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.fingerprint import Look
from cdc_invalidator.redis.lookups import Lookups
from cdc_invalidator.redis.node import Command, Node, failed
from cdc_invalidator.redis.scripts import ScriptDigests
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.suffixes import BESIDE_AND_OLD, Beside

# Keys in a command: so many that the cost of a command does not count, so few that no other client waits long.
KEYS_A_COMMAND = 1000
SCAN_COUNT = 1000
# What `CacheServer.info` reads.
INFO = ("keyspace_hits", "keyspace_misses", "evicted_keys", "expired_keys", "used_memory")
NO_GRACES: Mapping[bytes, int] = {}

# Behind the watermark's key: where `CacheServer.probe` deletes what there never is.
PROBE_SUFFIX = b":probe"

Cursor = Any
"""Where a search for keys stands; ``None`` is its beginning and its end."""


@dataclass(frozen=True, slots=True)
class BustReply:
    """What Redis answered to one flush.

    ``existed``: for each group of deletes, how many of its keys were there; ``versions``: for each bumped counter its
    new version, `BUMP_MISSING` or `BUMP_DELETED`. ``denied``: why, for the number of each group and for each counter
    for which a right is missing; of these, any part may be done. ``looks``: the fingerprints that were asked for.
    """

    existed: list[int]
    versions: dict[bytes, int]
    denied: dict[int | bytes, errors.RedisUnavailable] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)


class CacheServer(ABC):
    """Where the caches live. Make it, `connect`, use it until it fails, `close` it, make another one.

    Args:
        watermark: name of the watermark, which is kept under ``cdc:NAME:watermark``.
    """

    # Whether the watermark is written, so that its figures say how fresh the caches are.
    watermarked = True

    # The names that are deleted beside a key.
    beside: Beside = BESIDE_AND_OLD

    def __init__(self, watermark: str) -> None:
        self.watermark_key = f"cdc:{watermark}:watermark".encode()
        self.scripts = ScriptDigests()
        # What our own commands add to the hits and misses of INFO.
        self.lookups = Lookups()

    @abstractmethod
    async def connect(self) -> None:
        """Find the servers and open a connection to each."""

    @property
    @abstractmethod
    def nodes(self) -> list[Node]:
        """The servers that hold keys now."""

    @abstractmethod
    async def close(self) -> None:
        """Drop the connections; what was sent and not answered may or may not have been done."""

    @abstractmethod
    async def probe(self) -> None:
        """Make sure that each server would take busts now, and change nothing.

        With scripts that only read, only that each answers.
        """

    @abstractmethod
    async def bust(
        self,
        deletes: Sequence[Sequence[bytes]],
        bumps: Mapping[bytes, int],
        graces: Mapping[bytes, int] = NO_GRACES,
        looks: Sequence[bytes] = (),
    ) -> BustReply:
        """Delete keys with their locks and bump versions.

        Args:
            deletes: groups of keys; each key is deleted with its lock, the lock no later than the key.
            bumps: from a version counter's key to the milliseconds that it is kept.
            graces: from a key or a counter to the milliseconds for which readers may still show the old value; either
                all keys of a group have one, or none.
            looks: keys whose fingerprints are wanted, as they are just before.

        Returns:
            The answer. A missing right is not raised: the others are busted all the same.
        """

    @abstractmethod
    async def versions(self, counters: Sequence[bytes]) -> list[bytes | errors.RedisUnavailable | None]:
        """Read version counters; ``None`` for one that is missing, an error for one that may not be read."""

    @abstractmethod
    async def fingerprints(self, keys: Sequence[bytes]) -> list[Look]:
        """Return what entries hold, see `redis.fingerprint`; what is refused is returned in its place."""

    @abstractmethod
    async def unlink(self, keys: Sequence[bytes]) -> int:
        """Delete keys without their locks, and return how many were there."""

    @abstractmethod
    async def publish(self, messages: Sequence[tuple[bytes, bytes]]) -> dict[bytes, errors.RedisUnavailable]:
        """Publish messages, each on its channel; return why, for the channels where a right is missing."""

    @abstractmethod
    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        """Look at about ``count`` keys more for those of a pattern.

        A search begins with the cursor ``None``, and is over when that comes back.
        """

    @abstractmethod
    async def size(self) -> int | None:
        """Return how many keys there are, including other applications' keys; ``None`` where the ACL refuses it."""

    @abstractmethod
    async def read_watermarks(self) -> list[Watermark | None]:
        """Read the watermark of each server; ``None`` for one that has none, or none that we wrote."""

    @abstractmethod
    async def write_watermark(self, watermark: Watermark) -> bool:
        """Write the watermark on all servers, over the one that was read or written last.

        Returns:
            False when Redis is out of memory: deletes still work then, so the stream may go on without it. The old
            watermark stays, but names no cache if this one would have named others. A restart finds it, and sweeps.
        """

    @abstractmethod
    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:
        """Send commands on one key in one go, and return their replies in order.

        For what no bust depends on: an error that another connection would not mend (a right or memory is missing) is
        not raised, but returned in its place as an `errors.RedisUnavailable`.
        """

    @abstractmethod
    async def info(self) -> dict[str, int] | None:
        """Return the figures that `INFO` names, summed up over the servers; ``None`` where the ACL refuses it."""


# What `Single` and `Cluster` do in the same way, on each of their servers.


def scan_command(cursor: int, pattern: bytes, count: int) -> Command:
    """Return the command for one step of a search."""
    return ("SCAN", cursor, "MATCH", pattern, "COUNT", count)


def read_watermark(fields: Any) -> Watermark | None:
    """Read a watermark's hash from the reply to HGETALL."""
    return Watermark.read(dict(zip(fields[::2], fields[1::2], strict=True)) if isinstance(fields, list) else fields)


def reply_or_refusal(command: Command, answer: Any) -> Any:
    """Return the reply to a command of `CacheServer.ask_about`, or why the server refuses it.

    Raises:
        errors.RedisUnavailable: another connection may do better.
    """
    if not isinstance(answer, Exception):
        return answer
    error = failed(str(command[0]), answer)
    if replies.of(error.code).does in {replies.Does.RETRY, replies.Does.REDIRECT}:
        raise error from answer
    return error


def reply_or_denial(command: Command, answer: Any) -> Any:
    """Return the reply to a command, or why it is denied where a right is missing.

    Raises:
        errors.RedisUnavailable: the reply is any other error.
    """
    if not isinstance(answer, Exception):
        return answer
    error = answer if isinstance(answer, errors.RedisUnavailable) else failed(str(command[0]), answer)
    if not replies.denies(error.code):
        raise error
    return error


def denied_channels(
    messages: Sequence[tuple[bytes, bytes]], answers: Sequence[Any]
) -> dict[bytes, errors.RedisUnavailable]:
    """Return the channels on which may not be published, and why."""
    return {
        channel: answer
        for (channel, _), answer in zip(messages, answers, strict=True)
        if isinstance(answer, errors.RedisUnavailable)
    }


async def read_size(node: Node) -> int | None:
    """Return how many keys one server has; ``None`` where the ACL refuses it."""
    answers = await node.ask_if_granted(("DBSIZE",))
    return int(answers[0]) if answers else None


async def read_info(node: Node) -> dict[str, int] | None:
    """Return the figures of one server's INFO that `INFO` names; ``None`` where the ACL refuses it."""
    sections = await node.ask_if_granted(("INFO", "stats"), ("INFO", "memory"))
    if not sections:
        return None
    lines = b"\n".join(sections).split()
    values = dict(line.split(b":", 1) for line in lines if b":" in line)
    return {name: int(values.get(name.encode(), 0)) for name in INFO}
