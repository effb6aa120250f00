"""Both shells of the reader under one face, so that each test of them is written once: as code that waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Self

import redis
import redis.asyncio
import redis.asyncio.cluster

from cdc_invalidator.reader import AsyncCaches, Caches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{{{id}}}", ttl: 5m, jitter: 30s}
  known: {key: "t:known:{{{id}}}", ttl: 5m, negative_ttl: 1m}
  page: {key: "t:page:{{{id}}}:{version}", version: "t:page:{{{id}}}:ver", ttl: 5m}
  far: {key: "t:far:{id}:{version}", version: "t:far:ver", ttl: 5m}
  both: {key: "t:both:{{{id}}}:{version}", version: "t:both:{{{id}}}:ver", bump_over: 100, ttl: 5m}
  rate: {key: "t:rate:{{{id}}}", ttl: 5m, ttl_only: true}
  few: {key: "t:few:{{{id}}}", ttl: 5m, max_keys_hint: 10}
  team-members: {key: "t:team:{{{id}}}:{{{kind}}}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, when: "op != 'none'", bust: [user, known, page, far, both, few]}
  - {name: team-changed, table: public.teams, bust: [team-members]}
"""
# Time-outs that no slow machine runs into.
PATIENT: dict[str, Any] = {"socket_timeout": 20, "socket_connect_timeout": 20}


USER_RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""


class Rows:
    """What loads, and how often."""

    def __init__(self) -> None:
        self.loads = 0

    def __call__(self, **_: int) -> int:
        self.loads += 1
        return self.loads


def rules_file(folder: Path, rules: str = RULES) -> Path:
    path = folder / "rules.yaml"
    path.write_text(rules)
    return path


class Reads:
    """`Caches` that wait, whichever shell they are; use it as a context manager."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._stack = contextlib.ExitStack()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.wait(self._loop.shutdown_asyncgens())  # as asyncio.Runner does
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait(self, outcome: Any) -> Any:
        """Give the outcome, of a coroutine too."""
        if asyncio.iscoroutine(outcome):
            return asyncio.run_coroutine_threadsafe(outcome, self._loop).result(120)
        return outcome

    def caches(self, rules: Path, url: str, *, client: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Make them, over a client of their own."""
        options = PATIENT | (client or {})
        cluster = url.startswith("redis+cluster")
        if self.kind == "sync":
            made: Any
            if cluster:
                made = redis.RedisCluster.from_url(_first_node(url), **options)
            else:
                made = redis.Redis.from_url(url, **options)
            self._stack.callback(made.close)
            return Face(self, Caches.from_rules(rules, made, **settings))

        async def make() -> Any:
            if cluster:
                return redis.asyncio.cluster.RedisCluster.from_url(_first_node(url), **options)
            return redis.asyncio.Redis.from_url(url, **options)

        made = self.wait(make())
        self._stack.callback(lambda: self.wait(made.aclose()))
        return Face(self, AsyncCaches.from_rules(rules, made, **settings))


class Face:
    """An object whose coroutines are waited for."""

    def __init__(self, reads: Reads, of: Any) -> None:
        self._reads = reads
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return self._faced(getattr(self._of, name))

    def __getitem__(self, name: str) -> Any:
        return Face(self._reads, self._of[name])

    def _faced(self, found: Any) -> Any:
        if not callable(found):
            return Face(self._reads, found)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._reads.kind == "async" and "load" in kwargs:
                kwargs["load"] = _in_a_thread(kwargs["load"])
            outcome = self._reads.wait(found(*args, **kwargs))
            if hasattr(outcome, "__aenter__") or hasattr(outcome, "__enter__"):
                return self._entered(outcome)
            module = type(outcome).__module__
            wrapped = module.startswith("cdc_invalidator") and not isinstance(outcome, tuple)
            return Face(self._reads, outcome) if wrapped else outcome

        return call

    @contextlib.contextmanager
    def _entered(self, manager: Any) -> Iterator[Any]:
        if hasattr(manager, "__enter__"):
            with manager as inside:
                yield Face(self._reads, inside)
            return
        inside = self._reads.wait(manager.__aenter__())
        try:
            yield Face(self._reads, inside)
        finally:
            self._reads.wait(manager.__aexit__(None, None, None))


def _in_a_thread(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader that waits, for a shell that may not."""

    async def loading(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(load, *args, **kwargs)

    return loading


class Loader:
    """Loads from a dictionary, and remembers what it was asked."""

    def __init__(self, rows: dict[Any, Any] | None = None, before: Callable[[], None] = lambda: None) -> None:
        self.rows = rows if rows is not None else {}
        self.before = before
        self.asked: list[Any] = []

    def __call__(self, id: Any) -> Any:  # noqa: A002  the parameter's name
        self.asked.append(id)
        row = self.rows.get(id)
        self.before()
        return row

    def many(self, ids: list[Any]) -> dict[Any, Any]:
        self.asked.append(ids)
        found = {each: self.rows[each] for each in ids if each in self.rows}
        self.before()
        return found


def left(client: redis.Redis, pattern: str = "*") -> list[Any]:
    """Return the keys that are there; a lock that only tells that nothing was stored is no lease, and soon gone."""
    return [key for key in client.keys(pattern) if client.get(key) not in {b"-", "-"}]


def _first_node(url: str) -> str:
    return url.replace("redis+cluster", "redis").split(",", maxsplit=1)[0]
