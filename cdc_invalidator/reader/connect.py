"""Clients of Redis by URL, with time-outs that bound how long a read waits for a server that does not answer."""

from __future__ import annotations

from typing import Any, Final

import redis
import redis.asyncio

from cdc_invalidator.reader.memory import AsyncMemory, Memory

MEMORY: Final = "memory:"
TIMEOUT_SECONDS: Final = 0.25


def client(given: Any) -> Any:
    """Return a client that waits: of a URL such as ``redis://cache:6379/0``, or what was given if it is a client.

    Of ``memory:`` it is the stand-in for tests, see `Caches.in_memory`.

    Raises:
        ValueError: the URL is none of a single server.
    """
    if not isinstance(given, str):
        return given
    if given == MEMORY:
        return Memory()
    return redis.Redis.from_url(_single(given), **_OPTIONS)


def async_client(given: Any) -> Any:
    """Return the same for a client that awaits."""
    if not isinstance(given, str):
        return given
    if given == MEMORY:
        return AsyncMemory()
    return redis.asyncio.Redis.from_url(_single(given), **_OPTIONS)


_OPTIONS: Final[dict[str, Any]] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}


def _single(url: str) -> str:
    scheme, found, _ = url.partition("://")
    if not found or "+" in scheme:
        raise ValueError(
            "give the URL of one Redis server, such as redis://cache:6379/0; for Sentinel or a cluster, give a client"
        )
    return url
