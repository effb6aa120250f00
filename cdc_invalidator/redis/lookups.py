"""How many hits and misses the daemon's own commands add to what Redis counts, as their replies tell. Pure.

INFO has one count for all clients. A bump of a version that nobody has is a miss there, and each proof that the data
are ours is a hit: beside a busy daemon, INFO says little of the application's reads. Deletes and scans count as
nothing. A test holds the table against real servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha1
from typing import Any

from cdc_invalidator.redis.fingerprint import ABSENT, FINGERPRINT, LARGE
from cdc_invalidator.redis.node import Command
from cdc_invalidator.redis.scripts import BUMP, BUMP_MISSING, WRITE_WATERMARK

_Counted = tuple[int, int]
"""Hits and misses."""


def _one(found: bool) -> _Counted:
    return (1, 0) if found else (0, 1)


def _of_bump(_: Command, versions: list[int]) -> _Counted:
    missing = versions.count(BUMP_MISSING)
    return len(versions) - missing, missing


def _of_watermark(command: Command, answer: int) -> _Counted:
    # None was found before the first, or it would have an id.
    return _one(answer != 0 and command[4] != "")


def _of_fingerprint(_: Command, answer: bytes) -> _Counted:
    # TYPE, MEMORY USAGE (which counts as nothing) and what reads the content.
    return _one(found=False) if answer == ABSENT else (1 if answer == LARGE else 2, 0)


def _digest(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


# By command, or by the digest of its script.
_TABLE: Mapping[str, Callable[[Command, Any], _Counted]] = {
    "GET": lambda _, answer: _one(answer is not None),
    "HGETALL": lambda _, answer: _one(bool(answer)),
    "HMGET": lambda _, answer: _one(any(value is not None for value in answer)),
    _digest(BUMP): _of_bump,
    _digest(WRITE_WATERMARK): _of_watermark,
    _digest(FINGERPRINT): _of_fingerprint,
}


class Lookups:
    """Counts them until they are taken."""

    def __init__(self) -> None:
        self.hits = self.misses = 0

    def count(self, commands: Iterable[Command], answers: Iterable[Any]) -> None:
        """Count what commands have added, by their replies; an error has found nothing, and missed nothing."""
        for command, answer in zip(commands, answers, strict=True):
            name = command[0]
            of = _TABLE.get(command[1] if name in {"EVALSHA", "EVALSHA_RO"} else name)
            if of is not None and not isinstance(answer, Exception):
                hits, misses = of(command, answer)
                self.hits += hits
                self.misses += misses

    def take(self) -> tuple[int, int]:
        """Return the hits and misses since the last call."""
        taken = self.hits, self.misses
        self.hits = self.misses = 0
        return taken
