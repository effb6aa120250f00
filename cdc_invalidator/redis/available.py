"""Which commands a server lacks: hosters rename some away, and proxies don't know all.

The rule that holds here: a command is named without arguments. A server that has it says that these are missing, or
answers; nothing is changed, and no ACL is asked. Any other error reply is a failure, here as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cdc_invalidator import errors
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.node import Node, code, failed

# What busts, sweeps and the watermark need, sent by us or by our scripts.
NEEDED = (
    "UNLINK",
    "SCAN",
    "SCRIPT",
    "EVALSHA",
    "GET",
    "SET",
    "TIME",
    "HGETALL",
    "HMGET",
    "HSET",
    "HDEL",
    "WATCH",
    "MULTI",
    "EXEC",
)
# What the daemon can do without, and what is missing then.
COSMETIC = {
    "CLIENT": "the daemon's name in CLIENT LIST",
    "INFO": "the metrics of hits, misses and memory",
    "DBSIZE": "the progress of sweeps",
}

_UNKNOWN = re.compile(
    r"unknown( redis)? command|unsupported command|command\b.*\bnot (support(ed)?|allowed|available)\b", re.IGNORECASE
)


async def require_commands(node: Node) -> None:
    """Make sure that a server has all commands that are needed.

    Raises:
        errors.RedisUnavailable: it lacks some; the message names them. Or it fails.
    """
    missing = await lacking(node, NEEDED)
    if missing:
        raise not_there(missing)


async def lacking(node: Node, names: Iterable[str]) -> list[str]:
    """Return those of the commands that a server does not have.

    Raises:
        errors.RedisUnavailable: it fails.
    """
    asked = list(names)
    # Alone, MULTI would begin a transaction.
    answers = await node.send([(name, "") if name == "MULTI" else (name,) for name in asked])
    for name, answer in zip(asked, answers, strict=True):
        # Of a command that needs no argument, an ACL may refuse the use: that is told when it is used.
        if isinstance(answer, Exception) and code(answer) not in {"ERR", "NOPERM"}:
            raise failed(name, answer) from answer
    return [name for name, answer in zip(asked, answers, strict=True) if unknown(answer)]


def unknown(answer: object) -> bool:
    """Return whether a reply says that the server does not have the command."""
    return isinstance(answer, Exception) and code(answer) == "ERR" and bool(_UNKNOWN.search(str(answer)))


def not_there(names: Sequence[str]) -> errors.RedisUnavailable:
    """Return the error for commands that are needed and missing."""
    named = ", ".join(names)
    return errors.RedisUnavailable(
        f"Redis does not have {named}, without which nothing can be busted; {replies.TABLE['NO_COMMAND'].remedy}.",
        code="NO_COMMAND",
        report=True,
    )
