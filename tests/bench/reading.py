"""What hits cost beside a bare GET or MGET of the same client: ``PYTHONPATH=tests python -m bench.reading``.

All are measured in turns of some calls each, over and over; the ratio is the median of those between turns of one
round. The entry is a JSON object of some 100 bytes. Bare: the driver's ``get`` and ``mget``, with nothing decoded.
Cold: in a process that remembers no versions.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import redis
import redis.asyncio
from prometheus_client import CollectorRegistry

from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import AsyncCaches, Caches, Metrics
from cdc_invalidator.rules.agreement import Agreement, templates_digest
from cdc_invalidator.rules.load import load_rules

RULES = """
version: 1
caches:
  user: {key: "shop:prod:user:{id}", ttl: 1h, jitter: 1m}
  page: {key: "shop:prod:page:{id}:v{version}", version: "shop:prod:page:{id}:ver", ttl: 1h}
rules: []
"""
USER = {"id": 42, "name": "Ada Lovelace", "email": "ada@shop.example", "plan": "pro", "since": "2026-01-01"}
ROUNDS, CALLS = 100, 200
MANY = (10, 100, 1000)


def load(id: int) -> dict[str, Any]:  # noqa: A002  the parameter's name
    return USER | {"id": id}


def load_many(ids: list[int]) -> dict[int, Any]:
    return {id: load(id) for id in ids}  # noqa: A001


def say_watermark(client: Any, rules: Path) -> None:
    """Write a watermark as the daemon does; readers leave alone what it says other things of, or nothing."""
    caches = load_rules(rules, {}).caches
    said = Agreement(
        {name: templates_digest(cache) for name, cache in caches.items()},
        {name: {"id": "bigint"} for name in caches},
        {"DateStyle": "ISO, MDY", "TimeZone": "Etc/UTC", "bytea_output": "hex"},
    )
    now = int(time.time() * 1000)
    fields = {"lsn": 2, "at": now, "rules": orjson.dumps(dict.fromkeys(caches, "x")), "agreed": f"{now} {said.digest}"}
    client.hset("cdc:cdc_invalidator:watermark", mapping=fields | dict(said.fields))


def _turns(ways: Mapping[str, Any], rounds: int = ROUNDS) -> Iterator[tuple[str, Any, list[float]]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            yield name, way, times[name]
    base = times[next(iter(ways))]
    for name, found in times.items():
        ratio = median(own / bare for own, bare in zip(found, base, strict=True))
        print(f"  {name:<44} {median(found) * 1e6:7.1f} µs  {ratio:5.2f}")


def waiting(rules: Path, url: str, metrics: Metrics) -> None:
    with redis.Redis.from_url(url) as client:
        caches = Caches.from_rules(rules, client, registry=metrics)
        silent = Caches.from_rules(rules, client)
        ways: dict[str, Callable[[], Any]] = {
            "bare GET": lambda: client.get("shop:prod:user:42"),
            "hit": lambda: silent.user.get(id=42, load=load),
            "hit, with metrics": lambda: caches.user.get(id=42, load=load),
            "hit of a cache with a version": lambda: caches.page.get(id=42, load=load),
            "hit, at_least": lambda: caches.at_least(1).user.get(id=42, load=load),
            "bare GET of the version, then of the key": lambda: (client.get("a"), client.get("shop:prod:user:42")),
        }
        for _, way, times in _turns(ways):
            started = time.perf_counter()
            for _ in range(CALLS):
                way()
            times.append((time.perf_counter() - started) / CALLS)
        with caches.local("user"):
            time.sleep(0.5)
            caches.user.get(id=42, load=load)
            times = []
            for _ in range(20):
                started = time.perf_counter()
                for _ in range(CALLS):
                    caches.user.get(id=42, load=load)
                times.append((time.perf_counter() - started) / CALLS)
            print(f"  {'hit in the memory of the process':<44} {median(times) * 1e6:7.1f} µs")


def many(rules: Path, url: str, number: int) -> None:
    """Read many keys at once, of a server that has them all."""
    ids = range(number)
    users = [f"shop:prod:user:{each}" for each in ids]
    versions = [f"shop:prod:page:{each}:ver" for each in ids]
    rounds, calls = max(20, 1000 // number), max(1, 100 // number)
    with redis.Redis.from_url(url) as client:
        caches = Caches.from_rules(rules, client)
        caches.user.get_many(ids, load=load_many)
        caches.page.get_many(ids, load=load_many)
        pages = [
            f"shop:prod:page:{each}:v{client.get(version).decode()}"
            for each, version in zip(ids, versions, strict=True)
        ]
        cold = iter([caches.page.using() for _ in range(rounds * calls)])
        ways: dict[str, Callable[[], Any]] = {
            f"bare MGET of {number}": lambda: client.mget(users),
            "bare MGET, values decoded": lambda: [
                orjson.loads(entry[entry.index(b"\n") + 1 :]) for entry in client.mget(users)
            ],
            "bare MGET of the versions, then of the keys": lambda: (client.mget(versions), client.mget(pages)),
            "get_many": lambda: caches.user.get_many(ids, load=load_many),
            "get_many of a cache with a version": lambda: caches.page.get_many(ids, load=load_many),
            "the same, cold": lambda: next(cold).get_many(ids, load=load_many),
        }
        kept = Caches.from_rules(rules, client)
        with kept.local("user"):
            time.sleep(0.5)
            ways["get_many, all in the memory of the process"] = lambda: kept.user.get_many(ids, load=load_many)
            for _, way, times in _turns(ways, rounds):
                started = time.perf_counter()
                for _ in range(calls):
                    way()
                times.append((time.perf_counter() - started) / calls)


async def awaiting(rules: Path, url: str, metrics: Metrics) -> None:
    async with redis.asyncio.Redis.from_url(url) as client:
        caches = AsyncCaches.from_rules(rules, client, registry=metrics)
        silent = AsyncCaches.from_rules(rules, client)
        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            "bare GET": lambda: client.get("shop:prod:user:42"),
            "hit": lambda: silent.user.get(id=42, load=load),
            "hit, with metrics": lambda: caches.user.get(id=42, load=load),
            "hit of a cache with a version": lambda: caches.page.get(id=42, load=load),
        }
        for _, way, times in _turns(ways):
            started = time.perf_counter()
            for _ in range(CALLS):
                await way()
            times.append((time.perf_counter() - started) / CALLS)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Valkey() as valkey:
        rules = Path(folder, "rules.yaml")
        rules.write_text(RULES)
        metrics = Metrics(CollectorRegistry())
        with redis.Redis.from_url(valkey.url) as client:
            say_watermark(client, rules)
        print("sync")
        waiting(rules, valkey.url, metrics)
        print("async")
        asyncio.run(awaiting(rules, valkey.url, metrics))
        for number in MANY:
            print(f"sync, {number} at once")
            many(rules, valkey.url, number)


if __name__ == "__main__":
    main()
