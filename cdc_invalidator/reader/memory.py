"""A stand-in for Redis in the memory of a process, for an application's tests: the reader's commands and scripts. Pure.

The rule that holds here: each script of `scripts` has a twin that does the same, step by step. A test plays the same
commands on both sides and compares all replies and what is left, so that they can't drift apart.

`Memory` is a client that waits, `AsyncMemory` one that is awaited; each belongs to no event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cdc_invalidator.reader.scripts import FillScripts

Reply = Any


def _text(value: Any) -> bytes:
    """Return what a client sends for a value."""
    return value if isinstance(value, bytes) else str(value).encode()


class Store:
    """Keys and values, which expire; may be used by several threads.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._data: dict[bytes, tuple[bytes, float]] = {}
        self._hashes: dict[bytes, dict[bytes, bytes]] = {}
        self._number = 0
        scripts = FillScripts()
        self.scripts: dict[bytes, Callable[[list[bytes], list[bytes]], Reply]] = {
            scripts.take: self._take,
            scripts.versioned: self._versioned,
            scripts.version: self._make_version,
            scripts.seize: self._seize,
            scripts.fill: self._fill,
            scripts.renew: self._renew,
            scripts.release: self._release,
            **dict.fromkeys(scripts.proven.values(), self._unproven),
        }

    def ask(self, *command: Any) -> Reply:
        """Return the reply to a command.

        Raises:
            ValueError: no reader sends it.
        """
        name, *words = (_text(word) for word in command)
        with self._lock:
            # Redis takes the microseconds of its clock, which stands still in a script.
            self._number = max(self._number + 1, int(self.clock() * 1_000_000))
            match name:
                case b"GET":
                    return self._get(words[0])
                case b"MGET":
                    return [self._get(key) for key in words]
                case b"HMGET":
                    fields = self._hashes.get(words[0], {})
                    return [fields.get(field) for field in words[1:]]
                case b"UNLINK":
                    return self._unlink(*words)
                case b"EVALSHA" if words[0] in self.scripts:
                    count = 2 + int(words[1])
                    return self.scripts[words[0]](words[2:count], words[count:])
        raise ValueError(f"the stand-in for Redis knows no {name.decode()}; no reader sends it")

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._data.clear()
            self._hashes.clear()

    def keys(self) -> list[bytes]:
        """Return the keys that are there, in order."""
        with self._lock:
            return sorted(key for key in list(self._data) if self._get(key) is not None)

    # ── What the daemon does ─────────────────────────────────────────────────────────────────────────────────────────

    def bust(self, lock: bytes, key: bytes, stale: bytes, stale_for: int | None) -> None:
        """Delete a key as a bust does; its old value is kept for ``stale_for`` ms."""
        with self._lock:
            self._unlink(lock)
            value = self._get(key)
            self._unlink(key)
            if value is not None and stale_for:
                self._set(stale, value, stale_for)

    def bump(self, version: bytes, lasts: int, stale: bytes, stale_for: int | None) -> None:
        """Replace a version, if there is one, as a bust does; the old one is kept for ``stale_for`` ms."""
        with self._lock:
            before = self._get(version)
            if before is None:
                return
            self._number += 1
            self._set(version, b"%d" % max(int(before) + 1, self._number), lasts)
            if stale_for:
                self._set(stale, before, stale_for)

    # ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _get(self, key: bytes) -> bytes | None:
        value, until = self._data.get(key, (None, 0.0))
        if value is not None and self.clock() >= until:
            del self._data[key]
            return None
        return value

    def _set(self, key: bytes, value: bytes, milliseconds: Any) -> None:
        self._data[key] = (value, self.clock() + int(milliseconds) / 1000)

    def _unlink(self, *keys: bytes) -> int:
        there = [key for key in dict.fromkeys(keys) if self._get(key) is not None]
        for key in there:
            del self._data[key]
        return len(there)

    # ── Scripts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, keys: list[bytes], args: list[bytes]) -> Reply:
        value = self._get(keys[1])
        if value is not None and value.startswith(args[2]):
            return value
        held = self._get(keys[0])
        if held is None:
            return self._seize(keys, args)
        if held.startswith(args[0] + b":"):
            return int(held.removeprefix(args[0] + b":"))
        if len(keys) > 2:
            return [self._get(keys[2])]
        return -1 if held == b"-" else 0

    def _versioned(self, keys: list[bytes], args: list[bytes]) -> Reply:
        token, lease, header, lasts, locks, stales, *rests = args
        versions = [self._make_version([name], [lasts], place) for place, name in enumerate(keys)]
        under = [rest.replace(b"\0", version) for rest, version in zip(rests, versions, strict=True)]
        found: list[Reply] = []
        for name, version, rest, key in zip(keys, versions, rests, under, strict=True):
            value = self._get(key)
            found.append(version)
            if value is not None and value.startswith(header):
                found.append(value)
            elif not token:
                found.append(None)
            else:
                state = self._take([key + locks, key, *([key + stales] if stales else [])], [token, lease, b"\0"])
                if state == [None] and (before := self._get(name + stales)) is not None:
                    state = [self._get(rest.replace(b"\0", before))]
                found.append(state)
        # None of these versions is made again, by a bump either.
        self._number += len(keys)
        return found

    def _make_version(self, keys: list[bytes], args: list[bytes], place: int = 0) -> bytes:
        version = self._get(keys[0])
        if version is None:
            version = b"%d" % (self._number + place)
            self._set(keys[0], version, args[0])
        return version

    def _seize(self, keys: list[bytes], args: list[bytes]) -> int:
        self._set(keys[0], b"%b:%d" % (args[0], self._number), args[1])
        return self._number

    def _fill(self, keys: list[bytes], args: list[bytes]) -> int:
        if self._get(keys[0]) != args[0]:
            return 0
        self._set(keys[1], args[1], args[2])
        self._unlink(keys[0])
        return 1

    def _renew(self, keys: list[bytes], args: list[bytes]) -> int:
        if self._get(keys[0]) != args[0]:
            return 0
        self._set(keys[0], args[0], args[1])
        return 1

    def _release(self, keys: list[bytes], args: list[bytes]) -> int:
        held = self._get(keys[0])
        if held is None or not held.startswith(args[0]):
            return 0
        if len(args) > 1:
            self._set(keys[0], b"-", args[1])
        else:
            self._unlink(keys[0])
        return 1

    def _unproven(self, _keys: list[bytes], _args: list[bytes]) -> Reply:
        # There is no daemon, so there never is a watermark.
        return [b"no_watermark"]


class Memory:
    """What `Caches` use instead of a client.

    ``store``: what is in it.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.store = Store(clock)

    def send(self, commands: Sequence[Sequence[Any]]) -> list[Reply]:
        """Return the replies to commands."""
        return [self.store.ask(*command) for command in commands]

    def close(self) -> None:
        """Do nothing: it has no connections."""


class AsyncMemory:
    """What `AsyncCaches` use instead of a client.

    ``store``: what is in it.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.store = Store(clock)

    async def send(self, commands: Sequence[Sequence[Any]]) -> list[Reply]:
        """Return the replies to commands."""
        return [self.store.ask(*command) for command in commands]

    async def close(self) -> None:
        """Do nothing: it has no connections."""
