"""`CDC_MODE=observe`: nothing is busted, and what is stale is told as a comparison with the database tells it."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from clusters import Cluster
from manifests import DEPLOY
from running import RunningDaemon, command, eventually, execute
from sentinels import Sentinels
from servers import redis_binaries

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.redis.node import Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:{{{id}}}:thing", ttl: 5m, given: true}
  page: {key: "t:{{{id}}}:page:{version}", version: "t:{{{id}}}:ver", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: page-changed, table: public.pages, bust: [page]}
"""
ROWS = 200
# What Redis before 7 takes in place of the rights in the README.
OLDER = [("%R~", "~"), ("+evalsha_ro", "+evalsha")]


@pytest.fixture(params=["single", "sentinel", "cluster"])
def place(request: pytest.FixtureRequest, redis_url: str) -> Iterator[tuple[str, Any]]:
    with contextlib.ExitStack() as stack:
        client: Any
        if request.param == "single":
            url, client = redis_url, redis.Redis.from_url(redis_url)
        elif request.param == "sentinel":
            sentinels = stack.enter_context(Sentinels())
            url, client = sentinels.url, redis.Redis.from_url(sentinels.master.url)
        else:
            cluster = stack.enter_context(Cluster(replicas=False))
            url, client = cluster.url, cluster.client()
        yield url, stack.enter_context(contextlib.closing(client))


class Reporting(RunningDaemon):
    """`observe`, whose report is its standard output."""

    forked = False

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.command = [sys.executable, "-m", "cdc_invalidator", "observe", "--for", "1h", "--format", "json"]
        self.report: dict[str, Any] = {}

    def _collect_events(self, lines: Any) -> None:
        self.report = json.loads(lines.read())
        lines.close()


def rules_of(folder: Path) -> Path:
    path = folder / "rules.yaml"
    path.write_text(RULES)
    return path


def create(dsn: str) -> None:
    execute(
        dsn,
        "CREATE TABLE things (id int PRIMARY KEY, n int NOT NULL)",
        "CREATE TABLE pages (id int PRIMARY KEY, n int NOT NULL)",
        f"INSERT INTO things SELECT n, 0 FROM generate_series(1, {ROWS}) n",
        "INSERT INTO pages SELECT n, 0 FROM generate_series(1, 9) n",
    )


def observing(daemon: RunningDaemon) -> None:
    """Wait until it is told what is written; before that, nothing can be judged."""
    daemon.seen("redis_connected")


def figures(daemon: RunningDaemon, cache: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = daemon.status()["observed"]["caches"]
    return next((each for each in found if each["cache"] == cache), {})


def test_an_application_that_forgets_some_of_its_writes_is_told_exactly_those(
    database: str, place: tuple[str, Any], tmp_path: Path, slot_name: str
) -> None:
    url, client = place
    create(database)
    settings = {"mode": "observe", "observe_grace": "1", "log_keys": "raw"}
    with RunningDaemon(dsn=database, redis_url=url, rules=rules_of(tmp_path), slot=slot_name, **settings) as daemon:
        observing(daemon)
        for number in range(1, ROWS + 1):
            client.set(f"t:{{{number}}}:thing", 0, px=200_000)
        with psycopg.connect(database, autocommit=True) as connection:
            for number in range(1, ROWS + 1):
                connection.execute("UPDATE things SET n = 1 WHERE id = %s", [number])
                # One in ten is forgotten; every other one is read again at once, before anybody could look.
                if number % 10:
                    client.delete(f"t:{{{number}}}:thing")
                if number % 10 and number % 2:
                    client.set(f"t:{{{number}}}:thing", 1, px=300_000)
        eventually(lambda: figures(daemon, "thing").get("stale"), "it is judged")
        eventually(
            lambda: sum(figures(daemon, "thing").get(name, 0) for name in ("absent", "mended", "stale")) == ROWS,
            "all are judged",
        )
        stale = {f"t:{{{number}}}:thing" for number in range(10, ROWS + 1, 10)}
        really = {f"t:{{{n}}}:thing" for n in range(1, ROWS + 1) if client.get(f"t:{{{n}}}:thing") not in {None, b"1"}}
        assert really == stale
        assert {event["raw_keys"][0] for event in daemon.named("stale")} == stale
        assert figures(daemon, "thing")["changes"] == ROWS
        assert figures(daemon, "thing")["stale"] == ROWS // 10
        # Nothing was changed, and nothing claims to be fresh.
        assert not client.exists(f"cdc:{slot_name}:watermark")
        assert not daemon.named("bust")
        assert daemon.metric("cdc_invalidator_busts_total") == 0
        eventually(lambda: daemon.metric("cdc_invalidator_confirmed_lsn") > 0, "the position moves on")
        for name in ("watermark_lsn", "watermark_timestamp_seconds", "watermark_as_of_timestamp_seconds"):
            assert daemon.metric(f"cdc_invalidator_{name}") == 0, name
        status = daemon.status()
        assert status["mode"] == "observe"
        assert (status["watermark_lsn"], status["watermark_age_s"]) == (None, None)
        assert status["lag_bytes"] is not None
        # When the application mends one after all, it is known for how long it was stale.
        client.delete("t:{10}:thing")
        eventually(lambda: figures(daemon, "thing")["stale_s"] > 0, "it is over")


def test_a_version_that_is_not_bumped_is_stale(
    database: str, place: tuple[str, Any], tmp_path: Path, slot_name: str
) -> None:
    url, client = place
    create(database)
    settings = {"mode": "observe", "observe_grace": "0.3"}
    with RunningDaemon(dsn=database, redis_url=url, rules=rules_of(tmp_path), slot=slot_name, **settings) as daemon:
        observing(daemon)
        client.set("t:{1}:ver", 7)
        client.set("t:{2}:ver", 7)
        execute(database, "UPDATE pages SET n = 1 WHERE id < 4")
        client.incr("t:{2}:ver")
        told = daemon.seen("stale", cache="page")
        assert len(told["key_hashes"]) == 1
        assert figures(daemon, "page")["absent"] == 1
        assert figures(daemon, "page")["stale"] == 1
        assert client.get("t:{1}:ver") == b"7"
        # Sweeps are told, and not done.
        execute(database, "TRUNCATE pages")
        daemon.seen("observed", cache="page", action="sweep")
        assert client.get("t:{1}:ver") == b"7"


def test_a_daemon_that_busts_afterwards_sweeps_as_for_a_new_slot(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    rules = rules_of(tmp_path)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name, mode="observe") as daemon:
        daemon.ready()
        redis_client.set("t:{1}:thing", 0)
        execute(database, "UPDATE things SET n = 1 WHERE id = 1")
        daemon.seen("observed", cache="thing", action="delete")
        assert daemon.terminate() == 0
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        eventually(lambda: not redis_client.exists("t:{1}:thing"), "it is swept")
        assert re.fullmatch("no_watermark|missed_changes", daemon.seen("gap")["reason"])


def rights(server: str = "valkey") -> list[str]:
    """Return the rights of the README, as that server takes them."""
    readme = (DEPLOY / "README.md").read_text()
    (line,) = re.findall(r"^ACL SETUSER cdc-observe on >secret (.+)$", readme, re.MULTILINE)
    for newer, older in OLDER if server == "redis-6.2" else ():
        assert newer in line
        line = line.replace(newer, older)
    return ["on", ">secret", *line.replace("shop:", "t:").split()]


@pytest.fixture
def limited_url(redis_url: str, redis_client: redis.Redis, slot_name: str) -> Iterator[str]:
    """The URL of a user with the rights of the README; its name is the slot's."""
    administrator: Any = redis_client
    administrator.execute_command("ACL", "SETUSER", slot_name, *rights())
    yield redis_url.replace("://", f"://{slot_name}:secret@")
    administrator.execute_command("ACL", "DELUSER", slot_name)


@pytest.fixture(params=redis_binaries().items(), ids=lambda found: str(found[0]))
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Give each Redis with its name, and a URL."""
    name, binary = request.param
    with Valkey(binary=binary) as started:
        yield name, started.url


def test_the_rights_of_the_readme_to_read_are_enough(
    database: str, server: tuple[str, str], tmp_path: Path, slot_name: str
) -> None:
    name, own = server
    create(database)
    url = own.replace("://", f"://{slot_name}:secret@")
    settings = {"mode": "observe", "observe_grace": "0.3"}
    with redis.Redis.from_url(own) as client:
        administrator: Any = client
        administrator.execute_command("ACL", "SETUSER", slot_name, *rights(name))
        with redis.Redis.from_url(url) as limited, pytest.raises(redis.exceptions.NoPermissionError):
            limited.delete("t:{1}:thing")
        # Whoever is told of this write late could not tell it from one behind the commit.
        client.set("t:{1}:thing", 0)
        given: dict[str, Any] = {"redis_url": url, "rules": rules_of(tmp_path), "slot": slot_name, **settings}
        checked = command("check", postgres_dsn=database, publication=slot_name, **given)
        assert " error " not in checked.stdout, checked.stdout
        with RunningDaemon(dsn=database, **given) as daemon:
            observing(daemon)
            execute(database, "UPDATE things SET n = 1 WHERE id = 1", "TRUNCATE pages")
            daemon.seen("stale", cache="thing")
            daemon.seen("observed", cache="page", action="sweep")
            assert daemon.status()["observed"]["error"] is None
            assert not daemon.named("redis_unavailable")
            assert daemon.terminate() == 0
        assert set(client.scan_iter()) == {b"t:{1}:thing"}


def test_a_redis_that_does_not_tell_of_writes_is_refused(database: str, tmp_path: Path, slot_name: str) -> None:
    create(database)
    with (
        Valkey(settings={"rename-command": "HELLO hidden"}) as limited,
        RunningDaemon(
            dsn=database, redis_url=limited.url, rules=rules_of(tmp_path), slot=slot_name, mode="observe"
        ) as daemon,
    ):
        told = daemon.seen("slot_waits_for_redis")
        assert "CDC_MODE=observe needs CLIENT TRACKING and HELLO 3 of Redis 6.2 or later" in told["error"]
        assert daemon.get("/readyz")[0] != 200


def test_what_is_stale_is_not_forgotten_with_a_connection_or_a_session(
    database: str, limited_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    client: Any = redis_client
    rules, settings = rules_of(tmp_path), {"mode": "observe", "observe_grace": "0.3"}
    for number in (1, 2, 3):
        client.set(f"t:{{{number}}}:thing", 0)
    with RunningDaemon(dsn=database, redis_url=limited_url, rules=rules, slot=slot_name, **settings) as daemon:

        def connected(times: int) -> None:
            eventually(lambda: len(daemon.named("redis_connected")) == times, f"it is connected {times} times")
            eventually(lambda: daemon.status()["role"] == "leader", "it streams")

        def stale_now(count: int) -> None:
            eventually(lambda: daemon.status()["observed"]["stale_now"] == count, f"{count} are stale")

        connected(1)
        execute(database, "UPDATE things SET n = 1 WHERE id < 3")
        stale_now(2)
        # The connection that asks, and the one that tells what is written.
        assert client.execute_command("CLIENT", "KILL", "USER", slot_name) == 2
        client.delete("t:{1}:thing")
        connected(2)
        stale_now(1)
        over = figures(daemon, "thing")["stale_s"]
        assert over > 0
        execute(
            database,
            f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot_name}'",
        )
        daemon.seen("session_lost")
        connected(3)
        assert daemon.status()["observed"]["stale_now"] == 1
        client.delete("t:{2}:thing")
        stale_now(0)
        found = figures(daemon, "thing")
        assert (found["changes"], found["stale"]) == (2, 2)
        assert found["stale_s"] > over
        assert len(daemon.named("stale")) == 2
        # And it goes on.
        execute(database, "UPDATE things SET n = 1 WHERE id = 3")
        stale_now(1)


def test_a_while_of_observing_ends_with_a_report(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    daemon = Reporting(
        dsn=database,
        redis_url=redis_url,
        rules=rules_of(tmp_path),
        slot=slot_name,
        observe_grace="0.3",
        log_hash_key="secret",
    )
    for number in (1, 2):
        redis_client.set(f"t:{{{number}}}:thing", 0)
    with daemon:
        eventually(lambda: (daemon.status().get("observed") or {}).get("observed_s"), "it observes")
        execute(database, "UPDATE things SET n = 1 WHERE id <= 3")
        redis_client.delete("t:{2}:thing")
        eventually(lambda: figures(daemon, "thing").get("stale"), "it is judged")
        assert daemon.terminate() == 0
    report = daemon.report
    (thing,) = report["caches"]
    assert (thing["rule"], thing["changes"], thing["stale"]) == ("thing-changed", 3, 1)
    assert thing["there"] == thing["stale"] + thing.get("mended", 0)
    assert thing["stale_share"] == 1 / thing["there"]
    assert 0.3 <= thing["stale_median_s"] == thing["stale_max_s"]
    assert report["would_mend"] == [{"rule": "thing-changed", "cache": "thing", "stale": 1}]
    assert [each["cache"] for each in report["worst"]] == ["thing"]
    assert len(report["worst"][0]["key_hashes"]) == 1
    assert set(redis_client.scan_iter()) == {b"t:{1}:thing"}


def test_who_had_no_time_to_observe_does_not_report_that_nothing_is_stale(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    given = {"postgres_dsn": database, "redis_url": redis_url, "rules": rules_of(tmp_path), "slot": slot_name}
    given |= {"publication": slot_name, "http_port": 0, "http_host": "127.0.0.1"}
    done = command("observe", "--for", "1ms", **given)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("the time was over before PostgreSQL and Redis had answered, give --for more.\n")
    assert command("observe", "--for", "soon", **given).returncode == 2


async def test_who_has_caught_up_knows_all_writes_that_came_before(redis_url: str, redis_client: redis.Redis) -> None:
    node = Node(redis_url)
    noted: list[Any] = []
    await node.connect()
    following = await node.follow(("CLIENT TRACKING", "ON", "BCAST"), noted.append)
    try:
        # Nothing of the daemon runs meanwhile, as when it is busy for long.
        for number in range(100):
            redis_client.set(f"t:{number}", 0)
        await node.catch_up()
        assert {key for keys in noted for key in keys} == {b"t:%d" % number for number in range(100)}
        clients: Any = redis_client.client_list()
        (mine,) = (each for each in clients if each["resp"] == "3" and "t" in each["flags"])
        redis_client.client_kill_filter(_id=mine["id"])
        with pytest.raises(errors.RedisUnavailable):
            await node.catch_up()
    finally:
        await node.close()
        with pytest.raises(errors.RedisUnavailable):
            await following
