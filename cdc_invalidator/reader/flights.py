"""Loads that readers of this process share: one of them loads, and the others are given what it got. Pure.

The rule that holds here: who joins a flight is given its value only if its own load would be no newer.

- It joined before the load began, or before the look at Redis that found the value; or
- the lease was still held when the value was stored or the lease was given back. No bust came in between, and nobody
  joins after that command is on its way.

Else it reads again. A failure is shared as it is, but not a cancellation: then another reader loads.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from cdc_invalidator.reader.serializers import PLAIN

_ALONE = object()
# What is being loaded around here: a loader that reads its own key would wait for itself.
_LOADING: ContextVar[frozenset[Hashable]] = ContextVar("cdc_invalidator_loading", default=frozenset())


class Flight:
    """One load under way.

    ``landed``: an event, set when it is over. ``until``: a steady time; nobody waits for longer. ``looks``: how many
    looks and loads have begun; the last one got the value. ``fenced``: whether the lease was held to the end.
    ``error``: what the load failed with.
    """

    def __init__(self, landed: Any, until: float) -> None:
        self.landed = landed
        self.until = until
        self.looks = 0
        self.fenced = False
        self.over = False
        self.error: Exception | None = None
        self._copy: Callable[[], Any] | None = None

    def land(self, copied: Callable[[], Any] | None = None, *, fenced: bool = False) -> None:
        """End it, once: with a function that makes a copy of the value, if there is a value."""
        if not self.over:
            self._copy, self.fenced, self.over = copied, fenced, True
            self.landed.set()

    def fail(self, error: BaseException) -> None:
        """End it with what the loader raised."""
        if isinstance(error, Exception) and not self.over:
            self.error = error
        self.land()

    def value(self, *, joined: int, known: bool) -> tuple[str, Any]:
        """Return what a reader does that waited: a word of ``take`` (then the value), ``again`` or ``alone``.

        Args:
            joined: how many looks had begun when it joined.
            known: whether it knew the version, if there is one; else it can't tell whether the lease was of that.
        """
        if self._copy is None or not (joined < self.looks or (self.fenced and known)):
            return "again", None
        value = self._copy()
        return ("alone", None) if value is _ALONE else ("take", value)


@contextmanager
def loading(keys: Iterable[Hashable]) -> Iterator[None]:
    """Note, for this thread or task and those that it starts, that it loads these keys."""
    token = _LOADING.set(_LOADING.get().union(keys))
    try:
        yield
    finally:
        _LOADING.reset(token)


def is_loading(key: Hashable) -> bool:
    """Return whether it is a loader of this key that asks."""
    return key in _LOADING.get()


@dataclass(frozen=True, slots=True)
class Flights:
    """The loads under way in this process; may be used by several threads.

    Args:
        event: makes an event of the shell.
        loop: returns the event loop, or the process where there are none: only who is in the same one may wait for an
            event. What another thread was loading when a process was forked is loaded in the parent alone.
    """

    event: Callable[[], Any] = threading.Event
    loop: Callable[[], Hashable] = lambda: None
    _open: dict[tuple[Hashable, Hashable], Flight] = field(default_factory=dict)

    def board(self, key: Hashable, now: float, patience: float, *, replace: bool) -> tuple[Flight, bool]:
        """Return the flight of a key, and whether it is a new one, which is the caller's to end.

        Args:
            key: what is loaded, and how.
            now: a steady time in seconds.
            patience: for how long others may wait for a new one.
            replace: begin a new one in any case.
        """
        key = (self.loop(), key)
        new = Flight(self.event(), now + patience)
        found = new if replace else self._open.setdefault(key, new)
        if found is not new and now < found.until:
            return found, False
        self._open[key] = new
        return new, True

    def replaced(self, key: Hashable, flight: Flight) -> bool:
        """Return whether another flight of this key can be joined."""
        return self._open.get((self.loop(), key), flight) is not flight

    def close(self, key: Hashable, flight: Flight) -> None:
        """Let nobody join any more."""
        key = (self.loop(), key)
        if self._open.get(key) is flight:
            self._open.pop(key, None)

    def forget(self, loop: Hashable) -> None:
        """Drop the loads of an event loop that is closed: nobody ends them."""
        for key in list(self._open):
            if key[0] is loop:
                self._open.pop(key, None)


def copies(value: Any, payload: bytes | None, loads: Callable[[bytes], Any]) -> Callable[[], Any]:
    """Return a function that makes copies of a value for readers that share it.

    They are what a hit would be. What can't be written is copied if it is plain data; an object may be bound to the
    session that loaded it, so there is no copy, and each reader loads for itself.
    """
    if value is None:
        return lambda: None
    if payload is not None:
        return lambda: loads(payload)
    if _is_plain(value):
        own = copy.deepcopy(value)
        return lambda: copy.deepcopy(own)
    return lambda: _ALONE


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if kind in {list, tuple, set, frozenset}:
        return all(_is_plain(each) for each in value)
    return kind in PLAIN
