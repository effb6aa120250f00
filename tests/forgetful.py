"""An application that invalidates most of its writes by itself, and forgets the others; and what is stale in truth.

Its entries are of several types. Writers in threads change each row, most of them once, and then delete the entry or
overwrite it, at once or after a while; readers fill what is missing. Some changes leave the entry as it was, so that it
comes back with the same content. Readers hold a lock while they load, as a careful application does: so an entry is
stale because a writer forgot it, and for no other reason.

    python tests/forgetful.py --writes 20000 --at cluster

runs it for longer, with a daemon that observes, and compares that daemon's figures with the truth.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import psycopg
import redis
from clusters import Cluster
from running import RunningDaemon, eventually
from sentinels import Sentinels

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS: Final = ("string", "hash", "set", "list", "zset", "stream")
RULES: Final = "version: 1\ncaches:\n{}\nrules:\n{}\n".format(
    "\n".join(f'  {kind}: {{key: "f:{{id}}:{kind}", ttl: 1h, given: true}}' for kind in KINDS),
    "\n".join(f"  - {{name: {kind}-changed, table: public.{kind}s, bust: [{kind}]}}" for kind in KINDS),
)
# How a value is stored, by type: the command, and the words behind the key.
WORDS: Final[dict[str, tuple[str, ...]]] = {
    "string": ("SET", "{}"),
    "hash": ("HSET", "body", "{}", "more", "1"),
    "set": ("SADD", "{}", "more"),
    "list": ("RPUSH", "more", "{}"),
    "zset": ("ZADD", "1", "{}", "2", "more"),
    "stream": ("XADD", "1-1", "body", "{}"),
}
READ: Final[dict[str, tuple[str, ...]]] = {
    "string": ("GET",),
    "hash": ("HGETALL",),
    "set": ("SMEMBERS",),
    "list": ("LRANGE", "0", "-1"),
    "zset": ("ZRANGE", "0", "-1"),
    "stream": ("XRANGE", "-", "+"),
}
FILL: Final = """
redis.call('DEL', KEYS[1])
redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))
return redis.call('PEXPIRE', KEYS[1], 3600000)
"""
FORGOTTEN: Final = 0.1
# An entry that comes back the same counts as mended if that is soon: then it can't be confused with an old fill.
SOON: Final = 0.04
SAME: Final = "same again"
SAME_LATE: Final = "same again, late"
PATIENCE: Final = 300.0


class Item(NamedTuple):
    """One row, and its entry."""

    kind: str
    id: int

    @property
    def key(self) -> str:
        return f"f:{self.id}:{self.kind}"


def items(count: int) -> list[Item]:
    return [Item(KINDS[number % len(KINDS)], number) for number in range(count)]


class Forgetful:
    """The application, with its writers and readers; use it as a context manager.

    Args:
        dsn: an empty database, in which it makes its tables.
        client: connects to its Redis; called by each thread.
        count: how many rows, and entries.
        seed: of what writers do.
    """

    def __init__(self, dsn: str, client: Any, *, count: int, seed: int) -> None:
        self.items = items(count)
        # What was done last about each entry.
        self.done: dict[str, str] = {}
        self.dsn = dsn
        self._client = client
        self._seed = seed
        self._locks = [threading.Lock() for _ in range(1024)]
        self._todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._readers = [threading.Thread(target=self._guarded, args=[self._read, number]) for number in range(3)]
        with psycopg.connect(dsn, autocommit=True) as connection:
            for kind in KINDS:
                connection.execute(f"CREATE TABLE {kind}s (id int PRIMARY KEY, body text NOT NULL, seen int NOT NULL)")
            for kind in KINDS:
                with (
                    connection.cursor() as cursor,
                    cursor.copy(f"COPY {kind}s FROM STDIN") as copy,
                ):
                    for item in self.items:
                        if item.kind == kind:
                            copy.write_row((item.id, f"v0-{item.id}", 0))

    def fill(self) -> None:
        """Fill the whole cache."""
        with contextlib.closing(self._client()) as client, psycopg.connect(self.dsn, autocommit=True) as connection:
            bodies = _bodies(connection)
            for item in self.items:
                _store(client, item, bodies[item])

    def __enter__(self) -> Self:
        for thread in self._readers:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._readers:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def write(self, chosen: list[Item]) -> None:
        """Change these rows, with four writers."""
        for item in chosen:
            self._todo.put(item)
        writers = [threading.Thread(target=self._guarded, args=[self._write, number]) for number in range(4)]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()

    def _guarded(self, work: Any, number: int) -> None:
        try:
            with contextlib.closing(self._client()) as client, psycopg.connect(self.dsn, autocommit=True) as connection:
                work(client, connection, random.Random(100 * self._seed + number))
        except BaseException as error:  # noqa: BLE001  raised again by the test's own thread
            self._failures.append(error)

    def _lock(self, item: Item) -> threading.Lock:
        return self._locks[hash(item) % len(self._locks)]

    def _write(self, client: Any, connection: psycopg.Connection[Any], dice: random.Random) -> None:
        late: list[tuple[float, Item]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._todo.get_nowait()
                luck = dice.random()
                if luck < FORGOTTEN:
                    self._change(connection, item, dice)
                    self.done[item.key] = "forgotten"
                elif luck < 0.2:
                    # What is cached does not depend on it; the application deletes the entry all the same.
                    begun = time.monotonic()
                    connection.execute(f"UPDATE {item.kind}s SET seen = seen + 1 WHERE id = %s", [item.id])
                    self._delete(client, item)
                    self._get(client, connection, item)
                    self.done[item.key] = SAME if time.monotonic() - begun < SOON else SAME_LATE
                elif luck < 0.4:
                    with self._lock(item):
                        _store(client, item, self._change(connection, item, dice))
                    self.done[item.key] = "overwritten"
                elif luck < 0.6:
                    self._change(connection, item, dice)
                    late.append((time.monotonic() + 0.2 * dice.random(), item))
                    self.done[item.key] = "deleted late"
                else:
                    self._change(connection, item, dice)
                    self._delete(client, item)
                    if luck < 0.8:
                        self._get(client, connection, item)
                    self.done[item.key] = "deleted"
                while late and late[0][0] < time.monotonic():
                    self._delete(client, late.pop(0)[1])
        for _, item in late:
            self._delete(client, item)

    def _change(self, connection: psycopg.Connection[Any], item: Item, dice: random.Random) -> str:
        body = f"v{dice.getrandbits(60)}"
        connection.execute(f"UPDATE {item.kind}s SET body = %s WHERE id = %s", [body, item.id])
        return body

    def _delete(self, client: Any, item: Item) -> None:
        with self._lock(item):
            client.delete(item.key)

    def _get(self, client: Any, connection: psycopg.Connection[Any], item: Item) -> None:
        with self._lock(item):
            if not client.exists(item.key):
                row = connection.execute(f"SELECT body FROM {item.kind}s WHERE id = %s", [item.id]).fetchone()
                assert row is not None
                _store(client, item, row[0])

    def _read(self, client: Any, connection: psycopg.Connection[Any], dice: random.Random) -> None:
        while not self._stop.is_set():
            self._get(client, connection, dice.choice(self.items))

    def stale(self) -> set[str]:
        """Compare all entries with the database; return the keys of those that are stale."""
        with contextlib.closing(self._client()) as client, psycopg.connect(self.dsn, autocommit=True) as connection:
            bodies = _bodies(connection)
            return {item.key for item in self.items if not _holds(client, item, bodies[item])}


def _bodies(connection: psycopg.Connection[Any]) -> dict[Item, str]:
    return {
        Item(kind, number): body
        for kind in KINDS
        for number, body in connection.execute(f"SELECT id, body FROM {kind}s").fetchall()
    }


def _store(client: Any, item: Item, body: str) -> None:
    name, *words = WORDS[item.kind]
    client.eval(FILL, 1, item.key, name, *(word.format(body) for word in words))


def _holds(client: Any, item: Item, body: str) -> bool:
    """Return whether an entry is absent, or has this content."""
    name, *words = READ[item.kind]
    found = client.execute_command(name, item.key, *words)
    return not found or body.encode() in _flat(found)


def _flat(found: Any) -> Iterator[bytes]:
    if isinstance(found, bytes):
        yield found
    elif isinstance(found, dict):
        yield from _flat([*found, *found.values()])
    elif isinstance(found, (list, tuple, set)):
        for each in found:
            yield from _flat(each)


@contextlib.contextmanager
def place(name: str) -> Iterator[tuple[str, Any]]:
    """Start a Redis of a kind; give the daemon's URL, and what connects a client."""
    with contextlib.ExitStack() as stack:
        if name == "cluster":
            cluster = stack.enter_context(Cluster(replicas=False))
            yield cluster.url, cluster.client
        elif name == "sentinel":
            sentinels = stack.enter_context(Sentinels())
            yield sentinels.url, lambda: redis.Redis.from_url(sentinels.master.url)
        else:
            valkey = stack.enter_context(Valkey())
            yield valkey.url, lambda: redis.Redis.from_url(valkey.url)


def observer(application: Forgetful, url: str, folder: Path, slot: str, grace: float) -> RunningDaemon:
    """Return a daemon that observes this application; it can be judged what is written once it is `observing`."""
    rules = folder / "rules.yaml"
    rules.write_text(RULES)
    settings = {"mode": "observe", "log_keys": "raw", "observe_grace": str(grace)}
    return RunningDaemon(dsn=application.dsn, redis_url=url, rules=rules, slot=slot, **settings)


def figures(daemon: RunningDaemon) -> Counter[str]:
    """Sum up what a daemon has observed, over all caches."""
    total: Counter[str] = Counter()
    for each in daemon.status()["observed"]["caches"]:
        total.update({name: value for name, value in each.items() if isinstance(value, int)})
    return total


def judged(daemon: RunningDaemon, changes: int) -> bool:
    """Return whether all of so many changes are judged."""
    found = figures(daemon)
    results = sum(found[name] for name in ("absent", "mended", "stale", "too_large", "skipped"))
    return found["changes"] == changes == results


def stale_now(daemon: RunningDaemon) -> int:
    """Return how many entries are stale, as far as it is known: they are looked at ever more rarely."""
    now: int = daemon.status()["observed"]["stale_now"]
    return now


def _measure(writes: int, at: str, grace: float, seed: int) -> None:
    with (
        Postgres() as postgres,
        place(at) as (url, client),
        tempfile.TemporaryDirectory() as folder,
        Forgetful(postgres.create_database("forgetful"), client, count=writes, seed=seed) as application,
        observer(application, url, Path(folder), "forgetful", grace) as daemon,
    ):
        daemon.seen("redis_connected")
        application.fill()
        begun = time.monotonic()
        application.write(application.items)
        seconds = time.monotonic() - begun
        eventually(lambda: judged(daemon, writes), "all are judged", PATIENCE)
        truth = application.stale()
        told = {event["raw_keys"][0] for event in daemon.named("stale")}
        print(f"{at}: {writes} writes, {writes / seconds:.0f}/s: {dict(Counter(application.done.values()))}")
        print(f"  observed: {dict(figures(daemon))}")
        print(
            f"  stale in truth: {len(truth)}; falsely told: {_named(application, told - truth)}; missed: "
            f"{_named(application, truth - told)}"
        )
        application.write(random.Random(seed).choices(application.items, k=writes))
        eventually(lambda: judged(daemon, 2 * writes), "all are judged", PATIENCE)
        truth = application.stale()
        eventually(lambda: abs(stale_now(daemon) - len(truth)) <= 0.01 * len(truth), "the others too", PATIENCE)
        now = stale_now(daemon)
        print(f"  after as many again, some rows several times: stale in truth {len(truth)}, told {now}")


def _named(application: Forgetful, keys: set[str]) -> str:
    return f"{len(keys)} {[(key, application.done[key]) for key in sorted(keys)[:5]]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writes", type=int, default=20_000)
    parser.add_argument("--at", choices=("single", "sentinel", "cluster"), default="single")
    parser.add_argument("--grace", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(sys.argv[1:])
    _measure(given.writes, given.at, given.grace, given.seed)
