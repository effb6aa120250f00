"""An application that writes while faults happen, and the two assertions that every fault test ends with."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import psycopg
import redis
from running import RunningDaemon, confirmed, eventually, execute, settled, watermark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from running import AnyRedis

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
"""


def rules_file(folder: Path) -> Path:
    """Rules for `create`'s table: each row has a key."""
    path = folder / "rules.yaml"
    path.write_text(RULES)
    return path


def create(dsn: str) -> None:
    execute(dsn, "CREATE TABLE things (id int PRIMARY KEY, body text)")


class Writer:
    """Caches a row and changes it, one row after the other, whatever happens to the servers.

    A key is cached before its row's one change is committed, so in the end none may be left. Of several writers, each
    has rows of its own from ``first`` on.
    """

    def __init__(self, dsn: str, redis_url: str, *, rows: int = 1, pause: float = 0.005, first: int = 0) -> None:
        self._dsn = dsn
        self._redis_url = redis_url
        self._rows = rows
        self._first = first
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: Exception | None = None
        self.committed = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End with the transaction that it is in."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def goes_on(self) -> None:
        """Wait until ten more transactions have committed."""
        before = self.committed
        eventually(lambda: self._failure or self.committed >= before + 10, "the application's writes go on")

    def _run(self) -> None:
        try:
            with redis.Redis.from_url(self._redis_url) as client:
                while not self._stop.is_set():
                    with contextlib.suppress(psycopg.OperationalError):
                        self._connected(client)
                    self._stop.wait(0.05)
        except Exception as error:  # noqa: BLE001  raised again by the test's own thread
            self._failure = error

    def _connected(self, client: redis.Redis) -> None:
        with psycopg.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
            while not self._stop.wait(self._pause):
                first = self._first + self.committed * self._rows
                last = first + self._rows - 1
                with contextlib.suppress(redis.RedisError):
                    client.mset({f"t:thing:{n}": "cached" for n in range(first, last + 1)})
                # After an error nobody knows whether it committed: the next attempt changes the same rows.
                connection.execute(_WRITE, [first, last])
                self.committed += 1


_WRITE = """
INSERT INTO things SELECT n, 'new' FROM generate_series(%s::int, %s::int) n
ON CONFLICT (id) DO UPDATE SET body = 'changed'
"""


def left(client: redis.Redis) -> set[str]:
    return {key.decode() for key in client.keys("t:*")}  # type: ignore[union-attr]


def assert_nothing_confirmed_too_early(dsn: str, client: AnyRedis, slot: str) -> None:
    """What PostgreSQL may forget, Redis says it has had; asked in this order, since both only grow."""
    sent = confirmed(dsn, slot)
    assert int(watermark(client, slot).get(b"lsn", 0)) >= sent


def assert_all_is_well(dsn: str, client: redis.Redis, *daemons: RunningDaemon) -> None:
    """Every committed change's key is gone, nothing was confirmed unacknowledged, and nobody fell over."""
    slot = daemons[0].slot
    settled(dsn, client, slot)
    assert left(client) == set()
    assert_nothing_confirmed_too_early(dsn, client, slot)
    for daemon in daemons:
        assert not daemon.errors


def walsenders(dsn: str, slot: str) -> int:
    """How many sessions stream from the slot; never more than one."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s AND active", [slot])
        found = row.fetchone()
    assert found is not None
    return int(found[0])


def _shown(dsn: str, setting: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT current_setting(%s)", [setting]).fetchone()
    assert row is not None
    return str(row[0])


@contextlib.contextmanager
def invisible_commits(dsn: str) -> Iterator[None]:
    """Let commits wait for a standby that there is not: flushed and decoded, and invisible."""
    execute(dsn, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    eventually(lambda: _shown(dsn, "synchronous_standby_names") == "nobody", "the setting is read")
    yield
    execute(
        dsn,
        "SET synchronous_commit = local",
        "ALTER SYSTEM RESET synchronous_standby_names",
        "SELECT pg_reload_conf()",
    )
