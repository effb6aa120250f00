"""What a program decides about its reads; the rule file says the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypedDict, TypeVar

from cdc_invalidator.reader.envelope import knows
from cdc_invalidator.reader.serializers import JSON, Serializer
from cdc_invalidator.rules.wording import nearest

T = TypeVar("T")

STRICT = "CDC_READER_STRICT"
"""The variable that says what becomes of a value that can't be stored: `1` for an error, `0` for a log line."""


def is_strict() -> bool:
    """Return whether a value that can't be stored is an error, unless a program says so itself.

    `STRICT` decides. Where it is not set, it is an error in Python's development mode (``python -X dev``) and under
    pytest.

    Raises:
        ValueError: the variable is set to something else.
    """
    given = os.environ.get(STRICT, "")
    if given not in {"", "0", "1"}:
        raise ValueError(f"{STRICT} is {given!r}; write 1 where a value that can't be stored is an error, else 0")
    return given == "1" or (not given and (sys.flags.dev_mode or "PYTEST_VERSION" in os.environ))


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
    ``strict``: raise `Unstorable` for a loaded value that can't be stored so that it comes back as it is; else the read
    gives it, and nothing is stored. By default as `is_strict` says.
    ``background``: what is refreshed early is loaded in the background, while the read returns; not where a read names
    its connection. ``fail_safe``: when a load fails with one of ``fail_safe_on``, serve the old value for so long after
    it has expired, and of a cache with `stale_for` for so long after a bust; Redis keeps entries for longer then. Reads
    that ask for a freshness get the failure. ``compress_from``: compress what takes so many bytes and more, by
    ``compression``: zlib, or zstd where zstandard is installed. Readers without these options read such entries, too.
    """

    serializer: Serializer[T] = JSON
    schema: int = 1
    lease: float = 3.0
    longest_load: float = 60.0
    wait: float = 2.0
    early: float = 0.0
    max_staleness: float | None = None
    strict: bool = field(default_factory=is_strict)
    background: bool = False
    fail_safe: float = 0.0
    fail_safe_on: tuple[type[Exception], ...] = (Exception,)
    compress_from: int | None = None
    compression: str = "zlib"

    def __post_init__(self) -> None:
        if self.schema < 0:
            raise ValueError(f"`schema` is {self.schema}; count from 0")
        if self.lease <= 0:
            raise ValueError(f"`lease` is {self.lease} s; a load needs some time")
        if not knows(self.compression):
            raise ValueError(f"`compression` is {self.compression!r}; write zlib, or zstd and install zstandard")
        for name in ("longest_load", "wait", "early", "max_staleness", "fail_safe", "compress_from"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` is {value}; it can't be negative")


def as_options(given: Options[Any] | Mapping[str, Any] | None) -> Options[Any]:
    """Return options that are given as such or as a dictionary; what it lacks is as by default.

    Raises:
        TypeError: it is something else, or there is no such option; the message is a sentence.
        ValueError: a value can't be.
    """
    if given is None or isinstance(given, Options):
        return given or Options()
    if not isinstance(given, Mapping):
        raise TypeError(f"options are given as Options(…) or as a dictionary of them, not as {type(given).__name__}")
    known = [each.name for each in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(f"there is no option {name}; {nearest(str(name), known)}")
    return Options(**given)


class Changes(TypedDict, total=False):
    """Some of the `Options`, for type checkers: all but the serializer."""

    schema: int
    lease: float
    longest_load: float
    wait: float
    early: float
    max_staleness: float | None
    strict: bool
    background: bool
    fail_safe: float
    fail_safe_on: tuple[type[Exception], ...]
    compress_from: int | None
    compression: str
