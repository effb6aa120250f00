"""Messages on Redis channels, by which others learn what was busted (`publish` of a cache). Pure.

The rule that holds here: a message is sent after Redis has acknowledged what it tells, and before that counts as done.
So each bust is told at least once.

The parameters of a channel are read from the key. Where a key can be read in several ways, or where no single keys are
known (a sweep, a search), the message goes to the channel for everybody, which has ``*`` in place of each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from cdc_invalidator import lsn
from cdc_invalidator.pipeline.batch import BustEvent
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.template import Param, Template

# A message has at most so many keys, and so many bytes of them. What needs more messages than that is told as a sweep.
MOST_KEYS = 500
MOST_BYTES = 60_000
MOST_MESSAGES = 20


class Message(NamedTuple):
    """What is published where, for a cache."""

    cache: str
    channel: bytes
    payload: bytes


class Channel:
    """The channels of a cache.

    Args:
        cache: the cache, which has `publish`.
        publish: that template.
    """

    def __init__(self, cache: Cache, publish: Template) -> None:
        self._publish = publish
        self.everybody = b"".join(b"*" if isinstance(part, Param) else part for part in publish.parts)
        self._constant = not publish.params
        self._readers = {"delete": cache.key.reader(), "bump": cache.sweep_template.reader()}

    def of(self, action: str, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Iterable[bytes]]]:
        """Yield the keys of a delete or a bump by their channels."""
        if self._constant:
            yield self.everybody, keys
            return
        read = self._readers[action]
        found: dict[bytes, list[bytes]] = {}
        for key in keys:
            found.setdefault(self._named(read(key)), []).append(key)
        yield from found.items()

    def _named(self, params: dict[Param, bytes] | None) -> bytes:
        if params is None:
            return self.everybody
        return b"".join(params[part] if isinstance(part, Param) else part for part in self._publish.parts)


@dataclass(slots=True)
class _Told:
    """What one channel is told of a cache: keys or versions, and the newest of their transactions."""

    keys: dict[bytes, None] = field(default_factory=dict)
    commit_lsn: int = 0
    committed_at: int | None = None

    def add(self, keys: Iterable[bytes], event: BustEvent) -> None:
        self.keys.update(dict.fromkeys(keys))
        if event.commit_lsn >= self.commit_lsn:
            self.commit_lsn, self.committed_at = event.commit_lsn, event.committed_at


class Messages:
    """Makes the messages of the caches that have `publish`; it is false if there is none."""

    def __init__(self, caches: Iterable[Cache]) -> None:
        self._channels = {cache.name: Channel(cache, cache.publish) for cache in caches if cache.publish is not None}

    def __bool__(self) -> bool:
        return bool(self._channels)

    def of_events(self, events: Iterable[BustEvent]) -> list[Message]:
        """Return the messages of busts; those of one cache and channel are put together, whatever the transaction."""
        told: dict[tuple[str, bytes, str], _Told] = {}
        for event in events:
            channel = self._channels.get(event.target.cache.name)
            if channel is None:
                continue
            what = "keys" if event.action == "delete" else "versions"
            for name, keys in channel.of(event.action, event.keys):
                told.setdefault((event.target.cache.name, name, what), _Told()).add(keys, event)
        return [
            Message(cache, channel, payload)
            for (cache, channel, what), each in told.items()
            for payload in _payloads(cache, what, each)
        ]

    def of_pass(
        self, cache: Cache, prefixes: Iterable[bytes], commit_lsn: int, committed_at: int | None
    ) -> list[Message]:
        """Return the messages of a sweep of a cache, or of a search if there are prefixes."""
        channel = self._channels.get(cache.name)
        if channel is None:
            return []
        told = _Told(dict.fromkeys(prefixes), commit_lsn, committed_at)
        payloads = _payloads(cache.name, "prefixes", told) if told.keys else [_sweep(cache.name, told)]
        return [Message(cache.name, channel.everybody, payload) for payload in payloads]


def _payloads(cache: str, what: str, told: _Told) -> list[bytes]:
    try:
        lists = list(_cut([key.decode() for key in told.keys]))
    except UnicodeDecodeError:
        return [_sweep(cache, told)]  # JSON has no words for it
    if len(lists) > MOST_MESSAGES:
        return [_sweep(cache, told)]
    return [_payload(cache, told, **{what: some}) for some in lists]


def _cut(keys: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for key in keys:
        if len(some) == MOST_KEYS or (some and size + len(key) > MOST_BYTES):
            yield some
            some, size = [], 0
        some.append(key)
        size += len(key)
    if some:
        yield some


def _sweep(cache: str, told: _Told) -> bytes:
    return _payload(cache, told, sweep=True)


def _payload(cache: str, told: _Told, **what: Any) -> bytes:
    at = None if told.committed_at is None else lsn.unix_us(told.committed_at) // 1000
    return orjson.dumps({"cache": cache, **what, "lsn": told.commit_lsn, "committed_at": at})


def nothing(cache: str) -> bytes:
    """Return a message that tells of no key, with which the right to publish can be tried."""
    return orjson.dumps({"cache": cache, "keys": [], "lsn": 0, "committed_at": None})
