"""What the caches of one program share: clocks, tokens, scripts, the watermark, loads under way. Does no I/O."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cdc_invalidator.reader.agreement import Agreement
from cdc_invalidator.reader.flights import Flights
from cdc_invalidator.reader.marks import Marks
from cdc_invalidator.reader.scripts import FillScripts
from cdc_invalidator.reader.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where time and chance come from; ``steady``: seconds from whenever; ``wall``: seconds since 1970."""

    steady: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random


class Tokens:
    """Tokens of leases, which never repeat, in this process or another."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._owner = (0, b"")

    def next(self) -> bytes:
        """Return a new token."""
        # A forked process must not continue its parent's tokens.
        process, prefix = self._owner
        if process != os.getpid():
            self._owner = process, prefix = os.getpid(), os.urandom(8).hex().encode()
        return b"%b-%d" % (prefix, next(self._numbers))


@dataclass(frozen=True, slots=True)
class World:
    """What the caches of one program share; ``disabled``: they are neither read nor filled.

    ``standby``: what values are loaded from, by its name in the watermark; empty for the primary.
    """

    marks: Marks
    agreement: Agreement = field(default_factory=lambda: Agreement("cdc_invalidator"))
    standby: str = ""
    scripts: FillScripts = field(default_factory=FillScripts)
    tokens: Tokens = field(default_factory=Tokens)
    clocks: Clocks = field(default_factory=Clocks)
    cluster: bool = False
    flights: Flights = field(default_factory=Flights)
    disabled: bool = False
    tracing: Tracing | None = None
    # The keys that are being refreshed in the background, and until when others leave that alone.
    refreshing: dict[bytes, float] = field(default_factory=dict)
