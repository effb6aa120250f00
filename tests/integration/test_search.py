"""Searches: keys whose ends no row can name, busted under the prefix that a row gives."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
import redis
from clusters import Cluster
from prometheus_client import CollectorRegistry
from running import RunningDaemon, command, eventually, execute
from stage import Stage

from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.pipeline.messages import Messages
from cdc_invalidator.pipeline.sweep import Cause, Request, Sweeps
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  metadata: {key: "app:metadata:{project_id}:*", ttl: 5m}
  report: {key: "app:report:{project_id}:{id}:*", ttl: 5m}
  tail: {key: "app:tail{id}*", ttl: 5m}
  late: {key: "app:late:{project_id}:*", ttl: 5m, again_after: 1s}
  calm: {key: "app:calm:{project_id}:*", ttl: 5m}
rules:
  - {name: project, table: public.projects, bust: [metadata: {project_id: id}, late: {project_id: id}]}
  - {name: report, table: public.reports, bust: [report, tail]}
  - {name: calm, table: public.reports, debounce: 1s, bust: [calm]}
"""
TABLES = (
    "CREATE TABLE projects (id text PRIMARY KEY, n int NOT NULL DEFAULT 0)",
    "CREATE TABLE reports (project_id text, id int, n int NOT NULL DEFAULT 0, PRIMARY KEY (project_id, id))",
)


def rules_file(folder: Path, rules: str = RULES) -> Path:
    path = folder / "rules.yaml"
    path.write_text(rules)
    return path


@pytest.fixture
def stage(database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str) -> Iterator[Stage]:
    execute(database, *TABLES)
    with Stage.playing(database, redis_url, rules_file(tmp_path), slot_name, client=redis_client) as playing:
        yield playing


def test_a_bust_takes_all_keys_under_the_prefix_with_their_locks_and_no_others(stage: Stage) -> None:
    mine = ["app:metadata:7:a", "app:metadata:7:a:b", "app:metadata:7:", "app:metadata:7:a\0stale"]
    others = ["app:metadata:77:a", "app:metadata:a:7:a", "app:metadata:7*:a", "other:app:metadata:7:a"]
    left = [f"{key}{suffix}" for key in others for suffix in ("", "\0lock", ":lock")]
    gone = [f"{key}{suffix}" for key in mine for suffix in ("", "\0lock", ":lock")]
    stage.cache(*gone, *left)
    stage.run("INSERT INTO projects VALUES ('7')")
    assert stage.cached(*gone) == []
    assert stage.cached(*left) == left


@pytest.mark.parametrize("value", ["*", "?", "[a-z]", "a\\", "^", "{b}", "ä"])
def test_signs_of_patterns_in_a_value_stand_for_themselves(stage: Stage, value: str) -> None:
    mine, others = [f"app:metadata:{value}:x"], ["app:metadata:a:x", "app:metadata:ab:x", "app:metadata:^a:x"]
    stage.cache(*mine, *others)
    execute(stage.dsn, f"INSERT INTO projects VALUES ('{value}')")
    stage.settle()
    assert stage.cached(*mine, *others) == others


def test_one_pass_looks_for_prefixes_of_several_caches_and_lengths(stage: Stage) -> None:
    mine = ["app:report:1:2:x", "app:report:100:2:x", "app:tail2:x", "app:tail2", "app:tail22", "app:metadata:1:x"]
    others = ["app:report:1:20:x", "app:report:10:2:x", "app:tail3:x", "app:metadata:100:x"]
    stage.cache(*mine, *others)
    before = stage.daemon.metric("cdc_invalidator_search_passes_total")
    stage.run("WITH r AS (INSERT INTO reports VALUES ('1', 2), ('100', 2)) INSERT INTO projects VALUES ('1')")
    assert stage.cached(*mine, *others) == others
    # One of the transaction, one each for `again_after` and `debounce`.
    assert stage.daemon.metric("cdc_invalidator_search_passes_total") - before <= 3
    event = stage.daemon.named("bust", action="search", cache="report")[-1]
    assert (event["op"], event["table"], event["prefixes"], event["keys"], event["existed"]) == (
        "insert",
        "public.reports",
        2,
        2,
        2,
    )
    assert event["scanned"] >= 1000
    assert event["key_prefix"] == "app:report:"
    labels = {"rule": "report", "cache": "report", "action": "search"}
    assert stage.daemon.metric("cdc_invalidator_busted_keys_existed_total", **labels) == 2


def test_thousands_of_prefixes_share_passes(stage: Stage) -> None:
    projects = 3000
    stage.client.mset({f"app:metadata:{number}:x": 1 for number in range(projects)})
    before = stage.daemon.metric("cdc_invalidator_search_passes_total")
    scans = stage.client.info("commandstats")["cmdstat_scan"]["calls"]
    with psycopg.connect(stage.dsn, autocommit=True) as connection:
        connection.execute(
            f"DO $$ BEGIN FOR id IN 1 .. {projects - 1} LOOP INSERT INTO projects VALUES (id::text); COMMIT; END LOOP;"
            " END $$"
        )
    stage.settle()
    assert list(stage.client.scan_iter("app:metadata:*")) == [b"app:metadata:0:x"]
    events = stage.daemon.named("bust", action="search", cache="metadata")
    assert sum(event["transactions"] for event in events) == projects - 1
    assert sum(event["prefixes"] for event in events) == projects - 1
    passes = stage.daemon.metric("cdc_invalidator_search_passes_total") - before
    assert passes < projects / 10
    # At most 3,000 keys in steps of 1,000, once for the locks and once for the keys.
    assert stage.client.info("commandstats")["cmdstat_scan"]["calls"] - scans <= passes * 2 * 4


def test_a_fill_that_a_search_overtakes_is_dropped(stage: Stage) -> None:
    stage.client.set("app:metadata:7:x\0lock", "token")
    stage.run("INSERT INTO projects VALUES ('7', 1)")
    fill = stage.client.register_script(_FILL)
    assert fill(["app:metadata:7:x\0lock", "app:metadata:7:x"], ["token", 0]) == 0


# KEYS: lock, key. ARGV: token, value. The reader's half of the contract.
_FILL = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[1])
return 1
"""


class _Readers:
    """Threads that read the counters of projects through keys with ends of their own, by the fill contract."""

    def __init__(self, stage: Stage, projects: int) -> None:
        self._stage = stage
        self._projects = projects
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=[number]) for number in range(3)]
        self.fills = 0
        self._errors: list[BaseException] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self._errors

    def _read(self, number: int) -> None:
        try:
            with (
                redis.Redis.from_url(self._stage.redis_url) as client,
                psycopg.connect(self._stage.dsn, autocommit=True) as connection,
            ):
                fill = client.register_script(_FILL)
                while not self._over.is_set():
                    for project in range(self._projects):
                        self._get(client, connection, fill, f"{project}", f"app:metadata:{project}:r{number}")
        except BaseException as error:  # noqa: BLE001  told when the threads are over
            self._errors.append(error)

    def _get(self, client: Any, connection: psycopg.Connection[Any], fill: Any, project: str, key: str) -> None:
        if client.get(key) is not None or not client.set(f"{key}\0lock", key, nx=True, px=5000):
            return
        row = connection.execute("SELECT n FROM projects WHERE id = %s", [project]).fetchone()
        assert row is not None
        self.fills += fill([f"{key}\0lock", key], [key, row[0]])


def test_readers_with_the_lock_leave_nothing_stale_while_searches_run(stage: Stage) -> None:
    projects = 5
    stage.run(f"INSERT INTO projects SELECT id::text, 0 FROM generate_series(0, {projects - 1}) id")
    with _Readers(stage, projects) as readers, psycopg.connect(stage.dsn, autocommit=True) as connection:
        until = time.monotonic() + 3
        number = 0
        while time.monotonic() < until:
            number += 1
            connection.execute("UPDATE projects SET n = %s WHERE id = %s", [number, str(number % projects)])
    stage.settle()
    assert readers.fills > 50
    with psycopg.connect(stage.dsn) as connection:
        rows = {project: str(n).encode() for project, n in connection.execute("SELECT id, n FROM projects").fetchall()}
    cached = {key: stage.client.get(key) for key in stage.client.scan_iter("app:metadata:*") if b"lock" not in key}
    stale = {key: value for key, value in cached.items() if value != rows[key.split(b":")[2].decode()]}
    assert stale == {}


def test_again_after_and_debounce_hold_for_searches(stage: Stage) -> None:
    stage.cache("app:late:7:x")
    execute(stage.dsn, "INSERT INTO projects VALUES ('7')")
    eventually(lambda: not stage.client.exists("app:late:7:x"), "it is searched for at once")
    stage.cache("app:late:7:x")
    stage.settle()
    assert not stage.client.exists("app:late:7:x"), "and a second time"
    stage.cache("app:calm:7:x")
    execute(stage.dsn, "INSERT INTO reports VALUES ('7', 1)")
    eventually(lambda: not stage.client.exists("app:calm:7:x"), "it is searched for at once")
    execute(stage.dsn, *(f"UPDATE reports SET n = {n}" for n in range(20)))
    stage.cache("app:calm:7:x")
    stage.settle()
    assert not stage.client.exists("app:calm:7:x")
    assert len(stage.daemon.named("bust", action="search", cache="calm")) < 10, "of 21 changes"


def test_a_truncate_and_a_manual_bust_of_all_sweep_and_one_with_parameters_searches(stage: Stage) -> None:
    stage.cache("app:metadata:7:x", "app:metadata:8:x")
    shown = command("bust", "metadata", "project_id=7", rules=stage.rules, postgres_dsn=stage.dsn)
    assert shown.returncode == 0, shown.stderr
    stage.settle()
    assert stage.cached("app:metadata:7:x", "app:metadata:8:x") == ["app:metadata:8:x"]
    assert stage.daemon.named("bust", action="search", reason="manual")
    stage.run("TRUNCATE projects")
    assert stage.cached("app:metadata:8:x") == []
    assert stage.daemon.named("bust", action="sweep", reason="truncate")
    stage.cache("app:metadata:9:x")
    assert command("bust", "metadata", rules=stage.rules, postgres_dsn=stage.dsn).returncode == 0
    stage.settle()
    assert stage.cached("app:metadata:9:x") == []


def test_a_cluster_is_searched_on_all_masters(database: str, tmp_path: Path, slot_name: str) -> None:
    execute(database, *TABLES)
    with (
        Cluster(replicas=False) as cluster,
        contextlib.closing(cluster.client()) as client,
        RunningDaemon(dsn=database, redis_url=cluster.url, rules=rules_file(tmp_path), slot=slot_name) as daemon,
    ):
        playing = Stage(daemon, client)
        playing.begin()
        mine = [f"app:metadata:7:{number}" for number in range(50)]
        others = [f"app:metadata:77:{number}" for number in range(50)]
        for key in (*mine, *others):
            playing.cache(key, f"{key}\0lock")
        playing.run("INSERT INTO projects VALUES ('7')")
        assert playing.cached(*mine, *(f"{key}\0lock" for key in mine)) == []
        assert len(playing.cached(*others, *(f"{key}\0lock" for key in others))) == 100
        playing.end()


def test_a_long_search_says_that_it_begins_how_far_it_is_and_that_it_is_over(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    execute(database, *TABLES)
    with (
        Valkey(settings={"enable-debug-command": "yes"}) as valkey,
        Stage.playing(database, valkey.url, rules_file(tmp_path), slot_name, sweep_rate="1000") as playing,
    ):
        playing.client.execute_command("DEBUG", "POPULATE", 3500, "stranger", 1)
        playing.cache("app:metadata:7:x")
        execute(database, "INSERT INTO projects VALUES ('7')")
        started = playing.daemon.seen("search_started")
        assert (started["caches"], started["prefixes"]) == (["late", "metadata"], 2)
        shown = playing.daemon.status()["searches"]
        assert shown["prefixes"] >= 2
        assert shown["caches"] == ["late", "metadata"]
        progress = playing.daemon.seen("search_progress")
        assert progress["all_keys"] >= 3500
        assert progress["scanned"] <= 2 * progress["all_keys"]
        over = playing.daemon.seen("search_over")
        assert (over["keys"], over["existed"]) == (1, 1)
        assert over["scanned"] >= 7000


# Without a daemon: what asks for searches besides keys that end in `*`.

_TEXT = """
version: 1
caches:
  open: {key: "a:{id}:*"}
  whole: {key: "w:{id}:user:{user}"}
  versioned: {key: "p:{id}:{user}:{version}", version: "v:{id}:{user}"}
"""
CACHES = parse_rules([("rules.yaml", _TEXT)], {}).caches


async def _run(url: str, most: int, *wanted: tuple[str, bytes]) -> tuple[list[Ticket], list[str]]:
    """Run what is asked for: caches with prefixes; return the tickets that were resolved on the way, and what ran."""
    resolved: list[Ticket] = []
    sweeps = Sweeps(Metrics(CollectorRegistry()), resolved.append, Messages([]), most=most)
    for number, (name, prefix) in enumerate(wanted):
        request = Request(number, None, None, prefixes={prefix: None})
        sweeps.request(CACHES[name], Cause("r", "public.t", "insert", "change"), request, [Ticket(number)])
    server = cache_server(EndpointSource.fixed(url), "slot", timeout=5.0)
    await server.connect()
    ran = []
    try:
        while sweeps:
            done, _ = await sweeps.step(server)
            for over in done:
                ran.append(over.action)
                resolved += [ticket for asked in over.asked.values() for ticket in asked.tickets]
    finally:
        await server.close()
    return resolved, ran


async def test_of_whole_keys_those_under_the_prefix_are_deleted_and_versions_bumped(
    redis_url: str, redis_client: redis.Redis
) -> None:
    for key in ("w:7:user:1", "w:7:other", "w:7:user:1\0lock", "w:7:user:1:lock", "w:77:user:1", "w:7:other\0lock"):
        redis_client.set(key, 1)
    for key in ("v:7:1", "v:7:1\0stale", "p:7:1:5", "v:77:1"):
        redis_client.set(key, 5)
    _, ran = await _run(redis_url, 1000, ("whole", b"w:7:"), ("versioned", b"v:7:"))
    assert ran == ["search"]
    assert {key.decode(): value for key in redis_client.scan_iter() if (value := redis_client.get(key)) == b"1"} == {
        "w:7:other": b"1",
        "w:77:user:1": b"1",
        "w:7:other\0lock": b"1",
    }
    assert redis_client.get("v:77:1") == b"5" == redis_client.get("p:7:1:5")
    assert int(redis_client.get("v:7:1") or 0) > 5
    assert not redis_client.exists("v:7:1\0stale")


@pytest.mark.parametrize(("most", "ran"), [(10_000, ["search"]), (3000, ["sweep", "search"])])
async def test_past_the_bound_the_cache_with_the_most_prefixes_is_swept(
    redis_url: str, redis_client: redis.Redis, most: int, ran: list[str]
) -> None:
    redis_client.mset(
        {f"a:{number}:x": 1 for number in range(100)} | {f"w:{number}:user:1": 1 for number in range(100)}
    )
    prefixes = [("open", f"a:{number}:".encode()) for number in range(40)]
    resolved, done = await _run(redis_url, most, *prefixes, ("whole", b"w:7:"))
    assert sorted(done) == sorted(ran)
    left = set(redis_client.scan_iter("a:*"))
    assert left == (set() if "sweep" in ran else {f"a:{number}:x".encode() for number in range(40, 100)})
    assert redis_client.exists("w:8:user:1")
    assert not redis_client.exists("w:7:user:1")
    assert sorted(ticket.below for ticket in resolved) == list(range(41)), "each one once"
