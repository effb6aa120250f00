"""`CDC_VERIFY_SAMPLE`: readers without the contract, whose races are known, are found by what comes back."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis
from clusters import Cluster
from manifests import DEPLOY
from running import RunningDaemon, eventually, execute
from sentinels import Sentinels
from stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:{{{id}}}:thing", ttl: 5m}
  slow: {key: "t:{{{id}}}:slow", ttl: 5m, again_after: 1s}
  both: {key: "t:{{{id}}}:both:{version}", version: "t:{{{id}}}:version", ttl: 5m, bump_over: 9}
rules:
  - {name: thing-changed, table: public.things, bust: [thing, both]}
  - {name: slow-changed, table: public.slows, bust: [slow]}
"""
GRACE = 1.0
MEMBERS = [str(number) for number in range(40)]


def _shuffled(*more: str) -> list[str]:
    return random.sample([*MEMBERS, *more], len(MEMBERS) + len(more))


# Each stores the same content, the text, in another type; sets and hashes each time in another order.
KINDS: dict[bytes, Callable[[Any, str, str], Any]] = {
    b"string": lambda client, key, text: client.set(key, text, px=300_000),
    b"hash": lambda client, key, text: client.hset(key, mapping=dict.fromkeys(_shuffled(), text)),
    b"set": lambda client, key, text: client.sadd(key, *_shuffled(text)),
    b"list": lambda client, key, text: client.rpush(key, *MEMBERS, text),
    b"zset": lambda client, key, text: client.zadd(key, dict.fromkeys(_shuffled(text), 1)),
    b"stream": lambda client, key, text: client.xadd(key, {"text": text}, id="1-1"),
}


def _content(client: Any, key: str) -> Any:
    kind = client.type(key)
    if kind in {b"hash", b"set"}:
        return client.hgetall(key) if kind == b"hash" else client.smembers(key)
    return client.dump(key)


class Reader:
    """An application without the contract: a thread that fills what is missing, as its plan says for the key."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.plans: dict[str, tuple[bytes, Callable[[], str | None]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def plan(
        self, key: str, kind: bytes, first: str, early: str | None, late: str | None, seconds: float = GRACE / 2
    ) -> None:
        """Cache a key, and plan what is loaded: so many seconds from the first load on, and later."""
        KINDS[kind](self.client, key, first)
        loads: list[float] = []

        def load() -> str | None:
            loads.append(time.monotonic())
            return early if loads[-1] <= loads[0] + seconds else late

        self.plans[key] = (kind, load)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            for key, (kind, load) in list(self.plans.items()):
                if not self.client.exists(key) and (text := load()) is not None:
                    KINDS[kind](self.client, key, text)


class VerifyStage(Stage):
    """A daemon that samples all deletes, and a reader without the contract."""

    def __init__(self, daemon: RunningDaemon, client: Any) -> None:
        super().__init__(daemon, client)
        self.reader = Reader(client)

    @property
    def results(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = self.daemon.status()["verify"]["results"]
        return found

    def judged(self, cache: str, count: int) -> None:
        """Wait until so many samples are judged."""
        eventually(lambda: sum(self.results.get(cache, {}).values()) == count, "all samples are judged")


def _servers(kind: str, url: str, stack: contextlib.ExitStack) -> tuple[str, Any]:
    if kind == "single":
        return url, stack.enter_context(contextlib.closing(redis.Redis.from_url(url)))
    if kind == "sentinel":
        sentinels = stack.enter_context(Sentinels())
        client: Any = redis.Redis.from_url(sentinels.master.url)
        return sentinels.url, stack.enter_context(contextlib.closing(client))
    cluster = stack.enter_context(Cluster(replicas=False))
    return cluster.url, stack.enter_context(contextlib.closing(cluster.client()))


@pytest.fixture(params=["single", "sentinel", "cluster"])
def stage(
    request: pytest.FixtureRequest, database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> Iterator[VerifyStage]:
    execute(
        database,
        "CREATE TABLE things (id int PRIMARY KEY, n int)",
        "CREATE TABLE slows (id int PRIMARY KEY, n int)",
        "INSERT INTO things SELECT n, 0 FROM generate_series(1, 99) n",
        "INSERT INTO slows SELECT n, 0 FROM generate_series(1, 9) n",
    )
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    with contextlib.ExitStack() as stack:
        url, client = _servers(request.param, redis_url, stack)
        settings = {"verify_sample": "1", "observe_grace": str(GRACE)}
        yield stack.enter_context(VerifyStage.playing(database, url, path, slot_name, client=client, **settings))


def test_each_fill_that_a_bust_overtook_is_counted_told_and_mended_and_nothing_else_is(stage: VerifyStage) -> None:
    reader, kinds = stage.reader, list(KINDS)
    truth = {"overtaken": 12, "unaffected": 6, "refilled": 12, "empty": 6, "undecided": 6, "too_large": 1}
    plans: dict[str, tuple[str | None, str | None]] = {
        "overtaken": ("old", "new"),
        "unaffected": ("old", "old"),
        "refilled": ("new", "new"),
        "empty": (None, None),
        "undecided": ("old", None),
        "too_large": ("new", "new"),
    }
    kept: dict[str, tuple[bytes, str]] = {}
    for result, count in truth.items():
        for at in range(count):
            key = f"t:{{{1 + len(reader.plans)}}}:thing"
            kind = b"string" if result == "too_large" else kinds[at % len(kinds)]
            reader.plan(key, kind, "old" * 100_000 if result == "too_large" else "old", *plans[result])
            last = plans[result][-1]
            if last is not None:
                kept[key] = (kind, last)
    keys = list(reader.plans)
    with reader:
        execute(stage.dsn, *(f"UPDATE things SET n = 1 WHERE id = {number}" for number in range(1, len(keys) + 1)))
        stage.judged("thing", len(keys))
    assert stage.results == {"thing": truth}
    for result, count in truth.items():
        assert stage.daemon.metric("cdc_invalidator_verified_total", cache="thing", result=result) == count
    told = stage.daemon.named("overtaken")
    assert len(told) == truth["overtaken"]
    assert all(event["rule"] == "thing-changed" and event["key_prefix"] == "t:{" for event in told)
    assert "`again_after`" in told[0]["error"]
    assert sum(event["keys"] for event in stage.daemon.named("bust", reason="verify")) == 12 + 6 + 6
    assert not any(key in json.dumps(stage.daemon.events) for key in keys)
    # What was stale is not any more.
    for key, (kind, text) in kept.items():
        wanted = "{wanted}" + key
        KINDS[kind](stage.client, wanted, text)
        assert _content(stage.client, key) == _content(stage.client, wanted)


def test_a_key_that_is_busted_for_another_change_meanwhile_proves_nothing(stage: VerifyStage) -> None:
    # The value does not depend on the first change, but on the one that comes while the proof is awaited.
    stage.reader.plan("t:{1}:thing", b"string", "same", "same", "same")
    with stage.reader:
        execute(stage.dsn, "UPDATE things SET n = 1 WHERE id = 1")
        stage.daemon.seen("bust", reason="verify")
        eventually(lambda: stage.client.exists("t:{1}:thing"), "it is filled again")
        stage.reader.plans["t:{1}:thing"] = (b"string", lambda: "new")
        execute(stage.dsn, "UPDATE things SET n = 2 WHERE id = 1")
        stage.judged("thing", 2)
    assert stage.results == {"thing": {"superseded": 1, "refilled": 1}}


def test_what_the_second_bust_of_again_after_mends_is_not_counted(stage: VerifyStage) -> None:
    # Of one key, the first fill is old, and `again_after` takes it; of the other, later ones are old, too.
    stage.reader.plan("t:{1}:slow", b"string", "old", "old", "new", 0.5)
    stage.reader.plan("t:{2}:slow", b"string", "old", "old", "new", 1.5)
    with stage.reader:
        execute(stage.dsn, "UPDATE slows SET n = 1 WHERE id < 3")
        stage.judged("slow", 2)
    assert stage.results == {"slow": {"refilled": 1, "overtaken": 1}}
    assert "a longer `again_after`" in stage.daemon.seen("overtaken")["error"]


def test_a_key_with_bump_over_is_looked_at_under_the_version_that_it_was_busted_under(stage: VerifyStage) -> None:
    stage.client.set("t:{1}:version", 7)
    stage.reader.plan("t:{1}:both:7", b"string", "old", "old", "new")
    with stage.reader:
        execute(stage.dsn, "UPDATE things SET n = 1 WHERE id = 1")
        stage.judged("both", 1)
    assert stage.results == {"both": {"overtaken": 1}}
    assert len(stage.daemon.named("bust", cache="both", action="delete", reason="verify")) == 1
    assert stage.client.get("t:{1}:both:7") == b"new"


@pytest.mark.parametrize("granted", [False, True])
def test_the_rights_of_the_readme_are_enough_and_without_them_busts_go_on(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str, granted: bool
) -> None:
    readme = (DEPLOY / "README.md").read_text()
    (line,) = re.findall(r"^ACL SETUSER cdc on >secret (.+)$", readme, re.MULTILINE)
    words = line.replace("cdc_invalidator", slot_name).replace("~shop:*", "~t:*").split()
    optional = {"+type", "+memory|usage", "+smembers", "+dump"}
    assert optional < set(words)
    words = [word for word in words if granted or word not in optional]
    execute(database, "CREATE TABLE things (id int PRIMARY KEY, n int)", "CREATE TABLE slows (id int PRIMARY KEY)")
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    administrator: Any = redis_client
    administrator.execute_command("ACL", "SETUSER", slot_name, "on", ">secret", *words)
    url = redis_url.replace("://", f"://{slot_name}:secret@")
    settings = {"verify_sample": "1", "observe_grace": "0.1"}
    try:
        with VerifyStage.playing(database, url, path, slot_name, client=redis_client, **settings) as stage:
            numbers = range(1, 1 + len(KINDS))
            for number, kind in zip(numbers, KINDS, strict=True):
                stage.reader.plan(f"t:{{{number}}}:thing", kind, "old", "new", "new")
            execute(database, *(f"INSERT INTO things VALUES ({number}, 1)" for number in numbers))
            stage.settle()
            if granted:
                stage.judged("thing", len(KINDS))
                assert stage.results == {"thing": {"empty": len(KINDS)}}
                assert stage.daemon.status()["verify"]["error"] is None
            else:
                refused = stage.daemon.seen("verify_refused")["error"]
                assert "no permissions to run the 'type' command" in refused
                assert "grant the ACL user of CDC_REDIS_URL +type" in refused
                assert stage.daemon.status()["verify"]["error"] == refused
            assert not stage.cached(*stage.reader.plans)
            assert not stage.daemon.named("redis_unavailable")
            if not granted:
                # It is not told once more on another connection.
                connected = len(stage.daemon.named("redis_connected"))
                administrator.execute_command("CLIENT", "KILL", "USER", slot_name)
                eventually(lambda: len(stage.daemon.named("redis_connected")) > connected, "it is connected again")
                stage.cache("t:{1}:thing")
                execute(database, "UPDATE things SET n = 2")
                stage.settle()
                assert not stage.cached("t:{1}:thing")
                assert stage.daemon.status()["verify"]["error"] == refused
                assert len(stage.daemon.named("verify_refused")) == 1
    finally:
        administrator.execute_command("ACL", "DELUSER", slot_name)
