"""What a program decides about its reads, beside what the rule file says of each cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import orjson

T = TypeVar("T")


class Serializer(Protocol[T]):
    """Turns values into bytes and back. What `loads` raises on bytes that it can't read counts as a miss."""

    def dumps(self, value: T, /) -> bytes:
        """Give the bytes of a value, which is never ``None``; at least one."""
        ...

    def loads(self, data: bytes, /) -> T:
        """Give the value of the bytes that `dumps` gave."""
        ...


class _Json:
    """JSON by orjson: a value comes back as what JSON knows, so a tuple as a list, a date as text."""

    dumps = staticmethod(orjson.dumps)
    loads = staticmethod(orjson.loads)


JSON: Serializer[Any] = _Json()


@dataclass(frozen=True)  # with slots, `Options[User](…)` would fail
class Options(Generic[T]):
    """How a cache is read; times are in seconds.

    ``serializer``: what is stored of a value. ``schema``: raise it when what is stored changes its shape: entries of
    other numbers are misses. ``lease``: how long a loader may take before its value is not stored any more and somebody
    else may load. ``wait``: how long a read waits for somebody else's load before it loads by itself, without storing.
    ``early``: refresh before the end of the `ttl`, by chance, the likelier the nearer it is and the longer a load
    takes; 1.0 is a good value, 0 is off. ``max_staleness``: reads go to the database unless all of what was
    committed so long ago is busted; the daemon's time is some seconds behind, so take 5 or more.
    """

    serializer: Serializer[T] = JSON
    schema: int = 1
    lease: float = 10.0
    wait: float = 2.0
    early: float = 0.0
    max_staleness: float | None = None

    def __post_init__(self) -> None:
        if self.schema < 0:
            raise ValueError(f"`schema` is {self.schema}; count from 0")
        if self.lease <= 0:
            raise ValueError(f"`lease` is {self.lease} s; a load needs some time")
        for name in ("wait", "early", "max_staleness"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` is {value}; it can't be negative")
