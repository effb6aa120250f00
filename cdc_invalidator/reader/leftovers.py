"""Old values that are still in Redis when a load fails: what has expired, and what busts have left. Does no I/O.

The rule that holds here: Redis is asked after the load has failed. What the read saw before does not count, since a
bust may have come meanwhile; what a bust took away without a `stale_for` is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from cdc_invalidator.reader.commands import Commands
from cdc_invalidator.reader.entry import MISS, Entry
from cdc_invalidator.reader.envelope import Envelope
from cdc_invalidator.reader.keys import NUL
from cdc_invalidator.reader.steps import Send, Steps, Unavailable

T = TypeVar("T")


class Aged(NamedTuple, Generic[T]):
    """A value, and how old it is.

    ``age``: seconds since its load began, by the clocks of who stored it and who reads it; 0 for what was loaded for
    this read. ``old``: it has expired or was busted, and was served because of `fail_safe` or `stale_for`.
    """

    value: T | None
    age: float
    old: bool


class Leftovers:
    """The old values of one cache.

    Args:
        commands: how the cache is asked for.
        envelope: what is stored.
        loads: makes a value of a payload.
        grace: for how many seconds after it has expired a value will do.
    """

    def __init__(self, commands: Commands, envelope: Envelope, loads: Callable[[bytes], Any], grace: float) -> None:
        self._commands = commands
        self._envelope = envelope
        self._loads = loads
        self._grace = grace

    def of(self, entries: Sequence[Entry]) -> Steps[list[tuple[Any, bytes]] | None]:
        """Return each entry's value and what that is stored as, the newest there is; ``None`` if one has none."""
        found: list[tuple[Any, bytes]] = []
        try:
            keys = [[entry.rest] for entry in entries]
            if entries[0].version_key:
                versions = yield from self._ask([self._commands.with_old(entry.version_key) for entry in entries])
                keys = [
                    [entry.rest.replace(NUL, version) for version in some]
                    for entry, some in zip(entries, versions, strict=True)
                ]
            stored = yield from self._ask(
                [[name for key in some for name in self._commands.with_old(key)] for some in keys]
            )
        except Unavailable:
            return None
        for some in stored:
            value = next(((value, each) for each in some if (value := self._value(each)) is not MISS), None)
            if value is None:
                return None
            found.append(value)
        return found

    def _ask(self, keys: Sequence[Sequence[bytes]]) -> Steps[list[list[bytes]]]:
        """Return for each group of keys what is there."""
        commands = [("GET", key) for some in keys for key in some]
        replies = iter((yield Send(commands)) if commands else ())
        return [[reply for _ in some if type(reply := next(replies)) is bytes] for some in keys]

    def _value(self, stored: bytes) -> Any:
        payload = self._envelope.old(stored, self._grace)
        try:
            return self._loads(payload) if payload else MISS
        except Exception:  # noqa: BLE001  whatever a serializer raises, it is of no use
            return MISS
