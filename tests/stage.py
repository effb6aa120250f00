"""What most tests of a daemon play on: a database, a Redis, rules, and the daemon between them.

A module's own kind of stage adds its tables and keys, and how it judges them.
"""

from __future__ import annotations

import functools
import json
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import redis
from running import SECONDS, RunningDaemon, execute, passed, settled, watermark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self


class Stage:
    """A daemon with its database and its Redis.

    Args:
        daemon: The daemon, started or not.
        client: A client of its Redis; one of its own, unless given.
    """

    kind: ClassVar[type[RunningDaemon]] = RunningDaemon

    def __init__(self, daemon: RunningDaemon, client: Any = None) -> None:
        self.daemon = daemon
        self.dsn = daemon.dsn
        self.redis_url = daemon.redis_url
        self.rules = daemon.rules
        self.slot = daemon.slot
        self._own_client = client is None
        if client is not None:
            self.client = client

    @functools.cached_property
    def client(self) -> Any:
        """The client of its Redis, or one that is made now."""
        return redis.Redis.from_url(self.redis_url)

    def connect(self) -> AbstractContextManager[Any]:
        """Return a client for a ``with`` block: `client`, or a new one where that may not reach its Redis any more."""
        return nullcontext(self.client)

    def settle(self, seconds: float = SECONDS) -> None:
        """Wait until the watermark has passed all that has been committed, and no gap is open."""
        with self.connect() as client:
            settled(self.dsn, client, self.slot, seconds)

    def passed(self) -> None:
        """Wait until the watermark has passed all that has been committed, whatever gaps are open."""
        passed(self.dsn, self.client, self.slot)

    def named(self) -> set[str]:
        """Return the caches that the watermark holds for."""
        return set(json.loads(watermark(self.client, self.slot).get(b"rules", b"{}")))

    def run(self, *statements: str) -> None:
        """Run statements, each in its own transaction, and wait until all is busted."""
        execute(self.dsn, *statements)
        self.settle()

    def cache(self, *keys: str) -> None:
        for key in keys:
            self.client.set(key, 1)  # a version counter is a number

    def cached(self, *keys: str) -> list[str]:
        """Return those of the keys that exist."""
        return [key for key in keys if self.client.exists(key)]

    def begin(self) -> None:
        """Wait until the daemon has done all that it does on its own at the start."""
        self.daemon.ready()
        self.settle()

    def end(self) -> None:
        """Judge the daemon after the test, while it runs."""
        assert not self.daemon.errors

    def close(self) -> None:
        """Close the client that it has made itself."""
        if self._own_client and "client" in vars(self):
            self.client.close()

    @classmethod
    @contextmanager
    def playing(
        cls, dsn: str, redis_url: str, rules: Path, slot: str, *more: Any, client: Any = None, **settings: str
    ) -> Iterator[Self]:
        """Start a daemon, and stop it in the end.

        Args:
            dsn: The database, with the tables of the rules.
            redis_url: The Redis.
            rules: The rule file, or the directory.
            slot: The name of slot and publication.
            more: Further arguments of this kind of stage.
            client: As of the class.
            settings: The daemon's further settings.
        """
        with cls.kind(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot, **settings) as daemon:
            made: Any = cls
            stage: Self = made(daemon, *more, client=client)
            try:
                stage.begin()
                yield stage
                stage.end()
            finally:
                stage.close()
                for event in [event for event in daemon.events if event["event"] != "bust"][-20:]:
                    print("   ", event)
