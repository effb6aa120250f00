"""The cache that contenders empty: filled before each run, watched for its last key, counted after it.

Nobody polls for keys: Valkey's client tracking pushes the news of a key that is gone, which costs the two cores
nothing and is as exact for the fast as for the slow.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Self

import hiredis
import redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cdc_invalidator.embedded.servers import Valkey

CHUNK = 1000
VALUE = b"v" * 200


class Left(AssertionError):
    """Keys of committed changes are still there: the contender has failed, and the benchmark with it."""


class Keyspace:
    """Database 0 of one Valkey."""

    def __init__(self, valkey: Valkey) -> None:
        self.url = valkey.url
        self.client = redis.Redis.from_url(self.url)
        info: Any = self.client.info("server")
        self.pid = int(info["process_id"])
        self.version = str(info.get("valkey_version") or info["redis_version"])

    def fill(self, keys: Sequence[str]) -> None:
        """Empty the cache and store all keys."""
        self.client.flushall()
        for chunk in _chunks(keys):
            self.client.mset(dict.fromkeys(chunk, VALUE))

    def count(self, keys: Sequence[str]) -> int:
        """How many of the keys are there."""
        return sum(int(self.client.exists(*chunk)) for chunk in _chunks(keys))

    def await_gone(self, keys: Sequence[str], seconds: float) -> float:
        """Wait until none of the keys is there, and give the time at which that was seen."""
        deadline = time.monotonic() + seconds
        while left := self.count(keys):
            if time.monotonic() > deadline:
                raise Left(f"{left} of {len(keys)} keys are still there")
            time.sleep(0.001)
        return time.monotonic()

    def close(self) -> None:
        self.client.close()


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


class Watch:
    """A connection on which Valkey tells of each of these keys once, when it goes; use it as a context manager.

    Args:
        keyspace: where the keys are, filled.
        keys: what to watch.
    """

    def __init__(self, keyspace: Keyspace, keys: Sequence[str]) -> None:
        arguments = keyspace.client.connection_pool.connection_kwargs
        self._socket = socket.create_connection((arguments["host"], arguments["port"]))
        self._reader = hiredis.Reader()
        self._ask("HELLO", "3")
        self._ask("CLIENT", "TRACKING", "ON")
        for chunk in _chunks(keys):
            values = self._ask("MGET", *chunk)
            assert None not in values, "all keys are there before the run"

    def _ask(self, *words: str) -> Any:
        self._socket.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub knows one word only
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 16))
        if isinstance(reply, Exception):
            raise reply
        return reply

    def gone(self, seconds: float) -> tuple[float, list[str]]:
        """Wait for keys to go; give when that was heard, and which they are.

        Raises:
            TimeoutError: none went in this time.
        """
        self._socket.settimeout(seconds)
        while (push := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 16))
        kind, keys = push
        assert kind == b"invalidate", push
        return time.monotonic(), [key.decode() for key in keys]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
