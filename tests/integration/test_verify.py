"""`CDC_VERIFY_SAMPLE`: readers without the contract, whose races are known, are found by what comes back."""

from __future__ import annotations

import contextlib
import json
import random
import re
from typing import TYPE_CHECKING, Any

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
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: slow-changed, table: public.slows, bust: [slow]}
"""
GRACE = "0.5"
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
    """An application without the contract: when an entry is missing, it stores what its plan has next.

    The plan of a key is what its loads return, one after the other; the last one also all later times. Without more,
    nobody reads it again.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.plans: dict[str, tuple[bytes, list[str]]] = {}

    def plan(self, key: str, kind: bytes, first: str, *loads: str) -> None:
        KINDS[kind](self.client, key, first)
        self.plans[key] = (kind, list(loads))

    def read(self) -> None:
        for key, (kind, loads) in self.plans.items():
            if loads and not self.client.exists(key):
                KINDS[kind](self.client, key, loads[0])
                del loads[: -1 if len(loads) == 1 else 1]
            if loads == ["-"]:
                loads.clear()


class VerifyStage(Stage):
    """A daemon that samples all deletes, and a reader without the contract."""

    def __init__(self, daemon: RunningDaemon, client: Any) -> None:
        super().__init__(daemon, client)
        self.reader = Reader(client)

    @property
    def results(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = self.daemon.status()["verify"]["results"]
        return found

    def read_until(self, condition: Callable[[], Any], what: str) -> None:
        def read() -> Any:
            self.reader.read()
            return condition()

        eventually(read, what)


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
        settings = {"verify_sample": "1", "observe_grace": GRACE, "log_keys": "prefix"}
        yield stack.enter_context(VerifyStage.playing(database, url, path, slot_name, client=client, **settings))


def test_each_fill_that_a_bust_overtook_is_counted_told_and_mended_and_nothing_else_is(stage: VerifyStage) -> None:
    reader, kinds = stage.reader, list(KINDS)
    numbers = iter(range(1, 99))
    truth = {"overtaken": 12, "unaffected": 6, "refilled": 12, "empty": 6, "undecided": 6, "too_large": 1}
    plans = {
        "overtaken": ("old", "old", "new"),
        "unaffected": ("same", "same"),
        "refilled": ("old", "new"),
        "empty": ("old",),
        "undecided": ("old", "old", "-"),
        "too_large": ("old" * 100_000, "new"),
    }
    kept: dict[str, str] = {}
    keys = []
    for result, count in truth.items():
        for at in range(count):
            key = f"t:{{{next(numbers)}}}:thing"
            kind = b"string" if result == "too_large" else kinds[at % len(kinds)]
            reader.plan(key, kind, *plans[result])
            keys.append(key)
            if result in {"overtaken", "unaffected", "refilled"}:
                kept[key] = plans[result][-1]
    # Nobody reads while the writes are under way: each key is busted once.
    plans_of_all, reader.plans = reader.plans, {}
    execute(stage.dsn, *(f"UPDATE things SET n = 1 WHERE id = {number}" for number in range(1, len(keys) + 1)))
    stage.settle()
    assert not stage.cached(*keys)
    reader.plans = plans_of_all
    stage.read_until(lambda: sum(stage.results.get("thing", {}).values()) == len(keys), "all samples are judged")
    assert stage.results == {"thing": truth}
    for result, count in truth.items():
        assert stage.daemon.metric("cdc_invalidator_verified_total", cache="thing", result=result) == count
    told = stage.daemon.named("overtaken")
    assert len(told) == truth["overtaken"]
    assert all(event["rule"] == "thing-changed" and event["key_prefix"] == "t:{" for event in told)
    assert "`again_after`" in told[0]["error"]
    assert len(stage.daemon.named("bust", reason="verify")) == 12 + 6 + 6
    assert not any(key in json.dumps(stage.daemon.events) for key in keys)
    # What was stale is not any more.
    for key, text in kept.items():
        wanted = "{wanted}" + key
        KINDS[plans_of_all[key][0]](stage.client, wanted, text)
        assert _content(stage.client, key) == _content(stage.client, wanted)


def test_a_key_that_is_busted_for_another_change_meanwhile_proves_nothing(stage: VerifyStage) -> None:
    # The value does not depend on the first change, but on the one that comes while the proof is awaited.
    stage.reader.plan("t:{1}:thing", b"string", "same", "same", "same", "new")
    execute(stage.dsn, "UPDATE things SET n = 1 WHERE id = 1")
    stage.read_until(lambda: stage.daemon.named("bust", reason="verify"), "it is busted once more")
    stage.reader.read()
    execute(stage.dsn, "UPDATE things SET n = 2 WHERE id = 1")
    stage.read_until(lambda: sum(stage.results.get("thing", {}).values()) == 2, "both are judged")
    assert stage.results == {"thing": {"superseded": 1, "refilled": 1}}


def test_what_the_second_bust_of_again_after_mends_is_not_counted(stage: VerifyStage) -> None:
    # The first fill is old, and `again_after` takes it; the one after that is too late for it.
    stage.reader.plan("t:{1}:slow", b"string", "old", "old", "new")
    stage.reader.plan("t:{2}:slow", b"string", "old", "old", "old", "new")
    execute(stage.dsn, "UPDATE slows SET n = 1 WHERE id < 3")
    stage.read_until(lambda: sum(stage.results.get("slow", {}).values()) == 2, "both are judged")
    assert stage.results == {"slow": {"refilled": 1, "overtaken": 1}}
    assert "a longer `again_after`" in stage.daemon.seen("overtaken")["error"]


@pytest.mark.parametrize("granted", [False, True])
def test_the_rights_of_the_readme_are_enough_and_without_them_busts_go_on(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str, granted: bool
) -> None:
    readme = (DEPLOY / "README.md").read_text()
    (line,) = re.findall(r"^ACL SETUSER cdc on >secret (.+)$", readme, re.MULTILINE)
    (more,) = re.findall(r"^\| `CDC_VERIFY_SAMPLE` \| `(\+[^`]+)`", readme, re.MULTILINE)
    words = line.replace("cdc_invalidator", slot_name).replace("~shop:*", "~t:*").split()
    execute(database, "CREATE TABLE things (id int PRIMARY KEY, n int)", "CREATE TABLE slows (id int PRIMARY KEY)")
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    administrator: Any = redis_client
    administrator.execute_command("ACL", "SETUSER", slot_name, "on", ">secret", *words)
    if granted:
        administrator.execute_command("ACL", "SETUSER", slot_name, *more.replace("\\", "").split())
    url = redis_url.replace("://", f"://{slot_name}:secret@")
    settings = {"verify_sample": "1", "observe_grace": "0.1"}
    try:
        with VerifyStage.playing(database, url, path, slot_name, client=redis_client, **settings) as stage:
            numbers = range(1, 1 + len(KINDS))
            for number, kind in zip(numbers, KINDS, strict=True):
                stage.reader.plan(f"t:{{{number}}}:thing", kind, "old", "new")
            execute(database, *(f"INSERT INTO things VALUES ({number}, 1)" for number in numbers))
            stage.settle()
            if granted:
                stage.read_until(lambda: sum(stage.results.get("thing", {}).values()) == len(KINDS), "all judged")
                assert stage.results["thing"].keys() <= {"refilled", "empty"}
                assert stage.daemon.status()["verify"]["error"] is None
            else:
                refused = stage.daemon.seen("verify_refused")["error"]
                assert "no permissions to run the 'type' command" in refused
                assert "grant the ACL user of CDC_REDIS_URL +type" in refused
                assert stage.daemon.status()["verify"]["error"] == refused
                assert len(stage.daemon.named("verify_refused")) == 1
            assert not stage.cached(*stage.reader.plans) or granted
            assert not stage.daemon.named("redis_unavailable")
    finally:
        administrator.execute_command("ACL", "DELUSER", slot_name)
