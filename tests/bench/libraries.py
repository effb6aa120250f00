"""What a hit costs beside a bare GET, and through other libraries: ``PYTHONPATH=tests python -m bench.libraries``.

Each has one key with the same value in one Valkey, over the same driver, with its defaults: its serializer too. They
are called in turns, some hundred calls each; the ratio is the median of those between turns of one round. Bare: the
driver's ``get``, with nothing decoded. What is not installed is left out.

The other libraries do less: none of them knows when a commit makes a value stale, nor keeps old ones from being stored.
"""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import redis
import redis.asyncio
from bench.reading import say_watermark

from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import AsyncCaches, Caches

RULES: Final = """
version: 1
caches:
  user: {key: "shop:prod:user:{id}", ttl: 1h}
rules: []
"""
USER: Final = {"id": 42, "name": "Ada Lovelace", "email": "ada@shop.example", "plan": "pro", "since": "2026-01-01"}
# A row, a page of 20 rows, and a list of 200.
VALUES: Final = tuple(
    USER if count == 1 else [{**USER, "id": number} for number in range(count)] for count in (1, 20, 200)
)
ROUNDS, CALLS, SECONDS = 60, 100, 3600
OURS, BARE, DECODED = "this library", "bare GET", "bare GET, value decoded by orjson"
Times = dict[int, dict[str, list[float]]]
Ways = dict[str, Callable[[], Any]]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def waiting(rules: Path, url: str, client: Any, value: Any) -> Ways:
    """Give the ways that wait; each returns the value."""
    caches = Caches.from_rules(rules, client)
    client.set("bare", orjson.dumps(value))

    def load(**_: Any) -> Any:
        return value

    ways: Ways = {
        BARE: lambda: client.get("bare"),
        DECODED: lambda: orjson.loads(client.get("bare")),
        OURS: lambda: caches.user.get(id=42, load=load),
    }
    if installed("dogpile"):
        from dogpile.cache import make_region

        region = make_region().configure("dogpile.cache.redis", expiration_time=SECONDS, arguments={"url": url})
        ways["dogpile.cache"] = lambda: region.get_or_create("dogpile:42", lambda: value)
    if installed("django"):
        from django.conf import settings
        from django.core.cache.backends.redis import RedisCache

        if not settings.configured:
            settings.configure(CACHES={"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url}})
        own = RedisCache(url, {})
        ways["Django's own backend"] = lambda: own.get_or_set("django:42", lambda: value, SECONDS)
    if installed("django_redis"):
        from django.core.cache import caches as of_django

        backend = of_django["default"]
        ways["django-redis"] = lambda: backend.get_or_set("django-redis:42", lambda: value, SECONDS)
    return ways


async def awaiting(rules: Path, url: str, client: Any, value: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Give the ways that await."""
    caches = AsyncCaches.from_rules(rules, client)
    await client.set("bare", orjson.dumps(value))

    def load(**_: Any) -> Any:
        return value

    async def decoded() -> Any:
        return orjson.loads(await client.get("bare"))

    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        BARE: lambda: client.get("bare"),
        DECODED: decoded,
        OURS: lambda: caches.user.get(id=42, load=load),
    }
    if installed("cashews"):
        from cashews import Cache

        cashews = Cache()
        cashews.setup(url)

        @cashews(ttl=SECONDS, key="cashews:{id}")  # type: ignore[untyped-decorator]
        async def by_cashews(id: int) -> Any:  # noqa: A002
            return value

        ways["cashews"] = lambda: by_cashews(42)
    if installed("aiocache"):
        import aiocache

        found = urlsplit(url)

        @aiocache.cached(  # type: ignore[untyped-decorator]
            ttl=SECONDS,
            cache=aiocache.RedisCache,
            key_builder=lambda _, id: f"aiocache:{id}",  # noqa: A006
            endpoint=found.hostname,
            port=found.port,
        )
        async def by_aiocache(id: int) -> Any:  # noqa: A002
            return value

        ways["aiocache"] = lambda: by_aiocache(42)
    return ways


def timed(ways: Ways) -> dict[str, list[float]]:
    """Give the seconds of a call in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                way()
            times[name].append((time.perf_counter() - started) / CALLS)
    return times


async def atimed(ways: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, list[float]]:
    """Give the same of ways that await."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                await way()
            times[name].append((time.perf_counter() - started) / CALLS)
    return times


def _awaited(rules: Path, url: str, value: Any) -> dict[str, list[float]]:
    async def measured() -> dict[str, list[float]]:
        async with redis.asyncio.Redis.from_url(url) as client:
            ways = await awaiting(rules, url, client, value)
            for name, way in ways.items():
                assert name == BARE or await way() == value, name
            return await atimed(ways)

    return asyncio.run(measured())


def _waited(rules: Path, url: str, value: Any) -> dict[str, list[float]]:
    with redis.Redis.from_url(url) as client:
        ways = waiting(rules, url, client, value)
        for name, way in ways.items():
            assert name == BARE or way() == value, name
        return timed(ways)


def table(title: str, runs: Mapping[int, Mapping[str, list[float]]]) -> str:
    """Put what was measured into a table: for each size, µs and times a bare GET."""
    head = [title, *(word for size in runs for word in (f"{size:,} bytes, µs", "times a GET"))]
    rows = []
    for name in next(iter(runs.values())):
        cells = [name]
        for times in runs.values():
            ratio = median(own / bare for own, bare in zip(times[name], times[BARE], strict=True))
            cells += [f"{median(times[name]) * 1e6:.0f}", f"{ratio:.2f}"]
        rows.append(cells)
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey:
        rules = Path(folder, "rules.yaml")
        rules.write_text(RULES)
        waited: Times = {}
        awaited: Times = {}
        with redis.Redis.from_url(valkey.url) as client:
            for measure, runs in ((_awaited, awaited), (_waited, waited)):
                for value in VALUES:
                    client.flushall()
                    say_watermark(client, rules)
                    runs[len(orjson.dumps(value))] = measure(rules, valkey.url, value)
        print(table("sync", waited), table("async", awaited), sep="\n\n")


if __name__ == "__main__":
    main()
