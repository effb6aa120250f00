"""For tests of applications: an application's own caches in memory, and what the daemon does to them. See TESTING.md.

All of it serves `Caches` and `AsyncCaches` alike, and nothing here is awaited.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

from cdc_invalidator.reader.aio import AsyncCaches
from cdc_invalidator.reader.keys import NUL
from cdc_invalidator.reader.memory import AsyncMemory, Memory, Store
from cdc_invalidator.reader.spelling import NoKey
from cdc_invalidator.reader.sync import Caches
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

C = TypeVar("C", bound=Caches | AsyncCaches)
P = ParamSpec("P")


class Entries(Protocol[P]):
    """A cache: `Cache`, `AsyncCache`, or one of the module that `handles` writes, whose parameters are known."""

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Delete an entry."""
        ...


@contextmanager
def in_memory(caches: C) -> Iterator[C]:
    """Let caches that exist already, with the functions that they decorate, work in memory as long as this is entered.

    They begin empty. Their client is not used; a memory that they have already is set aside, and its clock stays.
    """
    caches._book.begin_anew()
    there = caches._link.memory
    clock = time.time if there is None else there.store.clock
    memory: Any = (AsyncMemory if isinstance(caches, AsyncCaches) else Memory)(clock)
    try:
        with caches._link.over(memory):
            yield caches
    finally:
        caches._book.begin_anew()


def bust(cache: Entries[P], /, *params: P.args, **named: P.kwargs) -> None:
    """Do to one entry what the daemon does after a commit that made it stale.

    Args:
        cache: one of caches in memory.
        params: the parameters, if not by name.
        named: the parameters.

    Raises:
        TypeError: the caches are not in memory, or the parameters are not those of the cache.
    """
    of: Any = cache
    positional: tuple[Any, ...] = params
    contract, store = of._contract, _store(of._link.memory)
    given = _given(*positional, **named)
    try:
        entry = contract.entry(given, given)
    except NoKey:
        return
    rules = contract.cache
    key = entry.key
    if entry.version_key and rules.bump_over is None:
        store.bump(entry.version_key, rules.version_ttl, entry.version_key + STALE_SUFFIX, rules.stale_for)
        return
    if entry.version_key:
        version = store.ask("GET", entry.version_key)
        if version is None:
            return
        key = entry.rest.replace(NUL, version)
    store.bust(key + LOCK_SUFFIX, key, key + STALE_SUFFIX, rules.stale_for)


def _given(params: Mapping[str, Any] | None = None, /, **named: Any) -> Mapping[str, Any]:
    return named if params is None else params


def clear(caches: Caches | AsyncCaches) -> None:
    """Delete all entries of caches in memory.

    Raises:
        TypeError: the caches are not in memory.
    """
    _store(caches._link.memory).clear()
    caches._book.begin_anew()


def keys(caches: Caches | AsyncCaches) -> list[bytes]:
    """Return the keys that are there, leases, versions and old values too, in order.

    Raises:
        TypeError: the caches are not in memory.
    """
    return _store(caches._link.memory).keys()


def _store(memory: Memory | AsyncMemory | None) -> Store:
    if memory is None:
        raise TypeError("these caches are in Redis; make them with `in_memory`, or use the fixture `cdc_caches`")
    return memory.store
