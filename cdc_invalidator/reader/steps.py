"""What the fill contract asks its shells to do, and how it is told that Redis gives no answer. Pure.

A generator of `contract` yields one of

- `Send`: commands for Redis, in one round trip. It is sent the replies; an error reply is an exception in its place,
  and so is `Unavailable` where one server of several gives no answer. It is thrown in when there is no answer at all.
- `Load`: the values of some entries, from the database, while their leases are renewed. It is sent the values in order.
  An exception of the program's loader is thrown in, and raised again once the leases are given back.
- `Wait`: for what another reader of this process loads, some seconds at most.
- `Sleep`: seconds to wait.
- `Later`: steps that may be done in the background. Where they may not, they are done at once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from cdc_invalidator.reader.entry import Entry

T = TypeVar("T")
Command: TypeAlias = tuple[Any, ...]

# The first word of an error reply, where the driver has a class for it instead.
_WORDS = {
    "AskError": "ASK",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoScriptError": "NOSCRIPT",
    "ReadOnlyError": "READONLY",
}


class Unavailable(Exception):
    """Redis gives no answer; ``reason``: redis_down, or breaker_open where it was not even asked."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Send(NamedTuple):
    """Commands for Redis, in one round trip."""

    commands: Sequence[Command]


class Renewal(NamedTuple):
    """Commands that renew leases: each so many seconds, and for so many seconds at most."""

    commands: Sequence[Command]
    every: float
    limit: float


class Load(NamedTuple):
    """Entries whose values are to be loaded, and how their leases are renewed meanwhile, if they are held.

    ``beside``: nothing is stored, since the cache may not be used: then nothing is proven of a standby either.
    """

    entries: Sequence[Entry]
    renewal: Renewal | None = None
    beside: bool = False

    @property
    def flights(self) -> list[Any]:
        """What others of this process may wait for meanwhile."""
        return [entry.flight_key for entry in self.entries if entry.flight is not None]


class Wait(NamedTuple):
    """An event that another reader of this process sets, and how many seconds to wait for it."""

    event: Any
    seconds: float


class Sleep(NamedTuple):
    """Seconds to wait."""

    seconds: float


class Later(NamedTuple):
    """Steps that nobody waits for; the loader is the same."""

    steps: Generator[Any, Any, None]


Effect: TypeAlias = Send | Load | Wait | Sleep | Later
Steps: TypeAlias = Generator[Effect, Any, T]


def word(error: BaseException) -> str:
    """Return what may be shown of an error reply: its first word, which holds no key."""
    first = str(error).split(" ", 1)[0]
    return first if first.isupper() and first.isalpha() else _WORDS.get(type(error).__name__, type(error).__name__)
