"""The process's own memory before Redis: a bounded cache of entries, kept right by Redis's invalidation messages. Pure.

`tracking` receives the messages. The rules that hold here:

- An entry is kept only if no message for its key came between asking Redis for it and keeping it. Reply and message
  travel on different connections, so either may come first; a later message removes the entry again.
- What this process itself has changed in Redis is dropped as soon as Redis has answered, as by a message: else its next
  read could be of the value before, until the message is there.
- Nothing is served unless the connection of the messages has answered a ping that was sent less than ``patience``
  seconds ago: by then all earlier messages have arrived. So no value is older than Redis's by more than that.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from cdc_invalidator.rules.model import Cache

PATIENCE = 2.0
_NOTHING = (None, 0.0)


class Local:
    """Entries by key; may be used by several threads.

    Args:
        caches: whose entries may be kept.
        size: how many entries, at most; the least used go first.
        patience: seconds that the connection of the messages may be silent.

    Raises:
        ValueError: a cache has a version, which must be asked for anyway.
    """

    def __init__(self, caches: Iterable[Cache], size: int, patience: float = PATIENCE) -> None:
        caches = list(caches)
        for cache in caches:
            if cache.version is not None:
                raise ValueError(f"cache {cache.name} has a version, which each read asks Redis for; leave it out")
        self.names = frozenset(cache.name for cache in caches)
        self.prefixes = _apart({cache.key.prefix for cache in caches})
        self._size = size
        self._patience = patience
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._asked: dict[bytes, object] = {}
        self._proven_at = float("-inf")

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> bytes | None:
        """Return the entry kept under a key; ``now``: a monotonic time in seconds."""
        return self.get_many([key], now)[0]

    def get_many(self, keys: Sequence[bytes], now: float) -> list[bytes | None]:
        """Return the entries kept under some keys; ``now``: a monotonic time in seconds."""
        if now - self._proven_at > self._patience:
            return [None] * len(keys)
        found: list[bytes | None] = []
        with self._lock:
            entries = self._entries
            for key in keys:
                entry, until = entries.get(key, _NOTHING)
                if entry is not None:
                    if now >= until:
                        entry = None
                        del entries[key]
                    else:
                        entries.move_to_end(key)
                found.append(entry)
        return found

    def ask(self, *keys: bytes) -> object:
        """Note that Redis is about to be asked for keys, and return the token for `keep`."""
        token = object()
        with self._lock:
            self._asked.update(dict.fromkeys(keys, token))
            # Who was cancelled, or had no answer, keeps nothing.
            for old in list(islice(self._asked, max(0, len(self._asked) - max(self._size, len(keys))))):
                del self._asked[old]
        return token

    def keep(self, key: bytes, token: object, entry: bytes | None, until: float) -> None:
        """Keep an entry from Redis until a monotonic time; not if it is ``None`` or may be out of date."""
        with self._lock:
            if self._asked.get(key) is not token:
                return
            del self._asked[key]
            if entry is None or self._proven_at == float("-inf"):
                return
            self._entries[key] = (entry, until)
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def invalidate(self, keys: Sequence[bytes] | None) -> None:
        """Take a message: these keys have changed, or all have (``None``)."""
        with self._lock:
            if keys is None:
                self._entries.clear()
                self._asked.clear()
                return
            for key in keys:
                self._entries.pop(key, None)
                self._asked.pop(key, None)

    def proven(self, at: float) -> None:
        """Note that all messages sent before that time have arrived."""
        self._proven_at = at

    def lost(self) -> None:
        """Forget all: the connection of the messages is gone."""
        self._proven_at = float("-inf")
        self.invalidate(None)

    def forked(self) -> None:
        """Forget all in a forked process: nobody follows there, and a thread of the parent may have had the lock."""
        self._lock = threading.Lock()
        self.lost()

    @property
    def command(self) -> tuple[bytes | str, ...]:
        """The command that asks for the messages."""
        prefixes = [part for prefix in self.prefixes for part in ("PREFIX", prefix)]
        return ("CLIENT", "TRACKING", "ON", "BCAST", *prefixes)


class Locals:
    """The memories that are entered now. Of several that keep the same cache, the last entered serves it.

    ``of``: by cache, the one that serves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered: tuple[Local, ...] = ()
        self.of: Mapping[str, Local] = {}

    def enter(self, local: Local) -> None:
        """Serve from this one, too."""
        with self._lock:
            self._enter((*self._entered, local))

    def leave(self, local: Local) -> None:
        """Serve from this one no more."""
        with self._lock:
            self._enter(tuple(each for each in self._entered if each is not local))

    def _enter(self, entered: tuple[Local, ...]) -> None:
        self._entered = entered
        self.of = {name: local for local in entered for name in local.names}

    def lost(self) -> None:
        """Forget all: another server is master."""
        for local in self._entered:
            local.lost()

    def forget(self, key: bytes) -> None:
        """Drop what the process has changed in Redis just now."""
        for local in self._entered:
            local.invalidate([key])


def _apart(prefixes: Iterable[bytes]) -> list[bytes]:
    """Leave out prefixes that begin with another, since Redis refuses overlaps; no prefix stands for all keys."""
    kept: list[bytes] = []
    for prefix in sorted(prefixes):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return [] if b"" in kept else kept


class Pulse:
    """When to send a ping, and when to give up on the connection; times are monotonic, in seconds.

    Args:
        local: whose messages the connection carries.
        beat: seconds between pings.
        patience: seconds that a ping may go unanswered.
    """

    def __init__(self, local: Local, beat: float = PATIENCE / 4, patience: float = PATIENCE) -> None:
        self.beat = beat
        self._local = local
        self._patience = patience
        self._sent: float | None = None
        self._next_at = 0.0

    def due(self, now: float) -> bool:
        """Return whether to send a ping now.

        Raises:
            TimeoutError: the last one was not answered.
        """
        if self._sent is not None:
            if now - self._sent > self._patience:
                raise TimeoutError("a ping was not answered")
            return False
        if now < self._next_at:
            return False
        self._sent = now
        self._next_at = now + self.beat
        return True

    def answered(self) -> None:
        """Note the answer."""
        if self._sent is not None:
            self._local.proven(self._sent)
            self._sent = None
