"""What a program decides about its reads; the rule file says the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import orjson

T = TypeVar("T")


class Serializer(Protocol[T]):
    """Turns values into bytes and back. What `loads` raises on bytes that it can't read counts as a miss."""

    def dumps(self, value: T, /) -> bytes:
        """Return the bytes of a value that is not ``None``: at least one byte."""
        ...

    def loads(self, data: bytes, /) -> T:
        """Return the value of bytes that `dumps` returned."""
        ...


class _Json:
    """JSON by orjson: a tuple comes back as a list, a date as text."""

    dumps = staticmethod(orjson.dumps)
    loads = staticmethod(orjson.loads)


JSON: Serializer[Any] = _Json()


@dataclass(frozen=True)  # with slots, `Options[User](…)` would fail
class Options(Generic[T]):
    """How a cache is read; times are in seconds.

    ``serializer``: how values are stored. ``schema``: raise it when stored values change their shape: entries with
    another number are misses. ``lease``: how long a process that dies keeps others from storing; while a load runs, its
    lease is renewed. A load that blocks the event loop for longer is not stored. ``longest_load``: for how long leases
    are renewed, and reads wait for a load of the same process; after that, a value is not stored. ``wait``: how long a
    read waits for a load of another process before it loads without storing.
    ``early``: refresh by chance before the `ttl` ends, the likelier the nearer the end and the longer a load takes; 1.0
    is a good value, 0 is off. ``max_staleness``: bypass the cache unless all commits older than this have been busted;
    the daemon's time is some seconds behind, so take 5 or more.
    """

    serializer: Serializer[T] = JSON
    schema: int = 1
    lease: float = 3.0
    longest_load: float = 60.0
    wait: float = 2.0
    early: float = 0.0
    max_staleness: float | None = None

    def __post_init__(self) -> None:
        if self.schema < 0:
            raise ValueError(f"`schema` is {self.schema}; count from 0")
        if self.lease <= 0:
            raise ValueError(f"`lease` is {self.lease} s; a load needs some time")
        for name in ("longest_load", "wait", "early", "max_staleness"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` is {value}; it can't be negative")
