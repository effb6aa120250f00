"""The event stream: it has what the log has, its refusals hold nothing back, and `tail` and `explain` read it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis
from clusters import Cluster, slot_of
from running import SECONDS, RunningDaemon, command, eventually, execute, settled
from sentinels import Sentinels
from servers import redis_binaries
from stage import Stage

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parents[2] / "deploy" / "README.md"

RULES = """
version: 1
caches:
  user: {key: "t:{{{id}}}:user", ttl: 5m}
  dash: {key: "t:{{{id}}}:dash:v{version}", version: "t:{{{id}}}:ver", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user, dash]}
  - {name: note-changed, table: public.notes, bust: [user: {id: user_id}]}
"""
SCHEMA = (
    "CREATE TABLE users (id int PRIMARY KEY, name text)",
    "CREATE TABLE notes (user_id int PRIMARY KEY)",
    "INSERT INTO users SELECT n FROM generate_series(1, 2500) n",
)
MANUAL = 'SELECT pg_logical_emit_message(true, \'cdc_invalidator\', \'{"cache": "user", "params": {"id": 42}}\')'
REFUSED = "cdc_invalidator_event_stream_refused_total"


class StreamStage(Stage):
    """A daemon with an event stream, and what the stream has."""

    def __init__(self, daemon: RunningDaemon, given: dict[str, str], client: Any = None) -> None:
        super().__init__(daemon, client)
        self.stream = given["event_stream"]
        self.given = {"redis_url": self.redis_url, **given}

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the stream has, the oldest first."""
        return [json.loads(fields[b"event"]) for _, fields in self.client.xrange(self.stream)]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """What the log has of busts and gaps."""
        return [event for event in list(self.daemon.events) if event["event"] in {"bust", "gap"}]

    def assert_as_logged(self) -> None:
        """The stream has just the log's lines, as soon as the watermark has passed; the log's reader may be behind."""
        found = self.events
        eventually(lambda: self.logged == found, "the log has what the stream has")


@contextlib.contextmanager
def staged(dsn: str, client: Any, folder: Path, slot: str, url: str, **settings: str) -> Iterator[StreamStage]:
    execute(dsn, *SCHEMA)
    rules = folder / "rules.yaml"
    rules.write_text(RULES)
    given = {"event_stream": f"cdc:{slot}:events", **settings}
    with StreamStage.playing(dsn, url, rules, slot, given, client=client, **given) as stage:
        yield stage


@pytest.fixture
def stage(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> Iterator[StreamStage]:
    with staged(database, redis_client, tmp_path, slot_name, redis_url, log_hash_key="secret") as stage:
        yield stage


def administer(client: Any, *words: Any) -> Any:
    return client.execute_command(*words)


def granted(client: Any, slot: str, *more: str) -> str:
    """Make a user with the rights that deploy/README.md lists, and these; gives its name."""
    line = re.search(r"^ACL SETUSER cdc (.+)$", README.read_text(), re.MULTILINE)
    assert line
    words = line[1].replace("cdc:cdc_invalidator:", f"cdc:{slot}:").replace("~shop:*", "~t:*").split()
    name = f"stream_{secrets.token_hex(3)}"
    client.execute_command("ACL", "SETUSER", name, *words, *more)
    return name


# What the stream has


@pytest.mark.parametrize("name", sorted(redis_binaries()))
def test_the_stream_has_the_lines_of_the_log_in_its_order_with_the_rights_of_the_readme(
    database: str, tmp_path: Path, slot_name: str, name: str
) -> None:
    with Valkey(binary=redis_binaries()[name]) as server, redis.Redis.from_url(server.url) as client:
        user = granted(client, slot_name, "+xadd")
        url = server.url.replace("redis://", f"redis://{user}:secret@")
        with staged(database, client, tmp_path, slot_name, url) as stage:
            client.set("t:{3}:ver", 1)
            stage.run(
                "UPDATE users SET name = 'x' WHERE id = 3",
                "UPDATE users SET name = 'all'",
                "DELETE FROM users WHERE id = 4",
                "TRUNCATE notes",
                MANUAL,
                "INSERT INTO notes SELECT generate_series(1, 5)",
            )
            stage.assert_as_logged()
            told = [(event["event"], event.get("action"), event.get("reason")) for event in stage.events]
            # A new slot is a gap, whose sweeps are told like all busts.
            assert told[0] == ("gap", None, "new_slot")
            assert {("bust", "sweep", "gap"), ("bust", "sweep", "truncate"), ("bust", "delete", "manual")} <= set(told)
            assert sum(event["keys"] for event in stage.events if event.get("op") == "update") == 2 * (1 + 2500)
            assert stage.daemon.metric(REFUSED) == 0


def test_the_stream_keeps_about_as_many_events_as_is_set(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with staged(database, redis_client, tmp_path, slot_name, redis_url, event_stream_length="50") as stage:
        loop = "DO $$ BEGIN FOR i IN 1..600 LOOP UPDATE users SET name = 'y' WHERE id = i; COMMIT; END LOOP; END $$"
        stage.run(loop)
        kept = stage.events
        # What is trimmed is trimmed by whole nodes of the stream.
        assert 50 <= len(kept) < 200
        eventually(lambda: stage.logged[-50:] == kept[-50:], "the log has what the stream has")


def test_what_is_told_while_the_connection_is_lost_again_and_again_is_in_the_stream_in_order(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    stop = threading.Event()
    with (
        Valkey() as server,
        redis.Redis.from_url(server.url) as client,
        redis.Redis.from_url(server.url) as killer,
        staged(database, client, tmp_path, slot_name, server.url) as stage,
    ):

        def disturb() -> None:
            while not stop.wait(0.03):
                for each in administer(killer, "CLIENT LIST"):
                    if each["name"] == "cdc-invalidator":
                        administer(killer, "CLIENT", "KILL", "ID", each["id"])

        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        try:
            execute(database, *(f"UPDATE users SET name = 'z' WHERE id = {number}" for number in range(1, 300)))
            eventually(lambda: len(stage.daemon.named("redis_unavailable")) >= 3, "the connection is lost")
        finally:
            stop.set()
            disturbing.join()
        settled(database, client, slot_name)
        # What was under way may stand there twice.
        once = [json.loads(line) for line in dict.fromkeys(map(json.dumps, stage.events))]
        eventually(lambda: once == stage.logged, "the stream has all that the log has, in its order")


# Refusals


def gone(client: redis.Redis, key: str) -> bool:
    return not client.exists(key)


@pytest.mark.parametrize("code", ["WRONGTYPE", "NOPERM", "OOM"])
def test_a_stream_that_redis_refuses_holds_back_neither_busts_nor_the_watermark_and_is_tried_again(
    database: str, tmp_path: Path, slot_name: str, code: str
) -> None:
    with Valkey() as server, redis.Redis.from_url(server.url) as client:
        user = granted(client, slot_name, "+xadd")
        url = server.url.replace("redis://", f"redis://{user}:secret@")
        stream = f"cdc:{slot_name}:events"
        refuse, allow = {
            "WRONGTYPE": (["SET", stream, "x"], ["DEL", stream]),
            "NOPERM": (["ACL", "SETUSER", user, "-xadd"], ["ACL", "SETUSER", user, "+xadd"]),
            "OOM": (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        }[code]
        with staged(database, client, tmp_path, slot_name, url) as stage:
            client.delete(stream)
            client.mset({f"t:{{{number}}}:user": 1 for number in range(1, 4)})
            administer(client, *refuse)
            for number in range(1, 4):
                execute(database, f"UPDATE users SET name = 'x' WHERE id = {number}")
                eventually(functools.partial(gone, client, f"t:{{{number}}}:user"), "it is busted")
                if code != "OOM":
                    settled(database, client, slot_name)
            eventually(lambda: stage.daemon.metric(REFUSED) == 6, "the events are counted")
            warning = stage.daemon.seen("event_stream_refused")
            assert warning["level"] == "warning"
            assert f"({code})" in warning["error"]
            administer(client, *allow)
            stage.run("UPDATE users SET name = 'x' WHERE id = 9")
            eventually(lambda: stage.logged and stage.events == stage.logged[-2:], "the stream goes on")
            assert len(stage.daemon.named("event_stream_refused")) == 1
            assert stage.daemon.metric(REFUSED) == 6
            assert not stage.daemon.named("redis_unavailable")


# The setting


def test_a_key_that_is_taken_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    given = {"postgres_dsn": "host=/nowhere", "redis_url": "redis://127.0.0.1:1", "rules": str(tmp_path)}
    done = command("run", event_stream="t:{}:user", **given)
    assert done.returncode == 2
    assert "rules.yaml:4:3: the event stream `t:{}:user` is among the keys of cache user" in done.stderr
    done = command("run", event_stream="cdc:cdc_invalidator:watermark", **given)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_new_rules_whose_keys_include_the_stream_are_not_taken(
    database: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str, redis_url: str
) -> None:
    with staged(database, redis_client, tmp_path, slot_name, redis_url, event_stream="busts:user") as stage:
        stage.rules.write_text(RULES.replace("t:{{{id}}}:user", "busts:{id}"))
        stage.daemon.send(signal.SIGHUP)
        failure = stage.daemon.seen("reload_failed")
        assert "the event stream `busts:user` is among the keys of cache user" in failure["error"]


def test_check_tells_of_a_stream_that_can_not_be_written_or_read_and_changes_nothing(stage: StreamStage) -> None:
    def found(*words: str, **more: str) -> dict[str, dict[str, Any]]:
        given = {"postgres_dsn": stage.dsn, "rules": stage.rules, "slot": stage.daemon.slot, **stage.given, **more}
        done = command("check", "--format", "json", *words, **given)
        return {f["code"]: f for f in json.loads(done.stdout)["findings"] if f["code"].startswith("event_stream")}

    before = stage.client.xinfo_stream(stage.stream)
    name = granted(stage.client, stage.daemon.slot, "+xread", "+xrevrange")
    url = re.sub(r"//", f"//{name}:secret@", stage.given["redis_url"], count=1)
    try:
        refused = found(redis_url=url)["event_stream_refused"]
        assert refused["severity"] == "warning"
        assert f"grant it +xadd and ~{stage.stream}" in refused["sentence"]
        administer(stage.client, "ACL", "SETUSER", name, "+xadd")
        assert found(redis_url=url) == {}
        administer(stage.client, "ACL", "SETUSER", name, "-xread", "-xrevrange")
        assert found(redis_url=url)["event_stream_unreadable"]["severity"] == "note"
    finally:
        administer(stage.client, "ACL", "DELUSER", name)
    assert stage.client.xinfo_stream(stage.stream) == before
    assert found(event_stream="cdc:nowhere") == {}
    assert not stage.client.exists("cdc:nowhere")
    stage.client.set("cdc:text", "x")
    assert "holds something else" in found(event_stream="cdc:text")["event_stream_refused"]["sentence"]
    taken = found("--offline", event_stream="t:{}:user")["event_stream_is_a_key"]
    assert (taken["severity"], taken["line"]) == ("error", 4)


# tail


class Tail:
    """`tail` as a process, with its output collected; use it as a context manager."""

    def __init__(self, *words: str, **settings: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")}
        env |= {f"CDC_{name.upper()}": value for name, value in settings.items()}
        # A shell lets what it starts in the background ignore Ctrl-C, and whoever that starts in turn.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdc_invalidator", "tail", *words],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, inherited)
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._collect)

    def _collect(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._thread.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        self.process.wait()

    def seen(self, count: int) -> list[str]:
        eventually(lambda: len(self.lines) >= count, f"{count} lines")
        return self.lines

    def ended(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def test_tail_shows_those_that_are_there_and_those_that_come_until_it_is_told_to_stop(stage: StreamStage) -> None:
    stage.run("UPDATE users SET name = 'x' WHERE id = 3")
    stage.assert_as_logged()
    there = stage.events
    with (
        Tail("--since", "all", "--format", "json", **stage.given) as everything,
        Tail("--since", "10m", "--cache", "user", "--rule", "note-changed", **stage.given) as notes,
        Tail("--since", "1h", "--cache", "dash", "--format", "json", **stage.given) as dashes,
    ):
        assert [json.loads(line) for line in everything.seen(len(there))] == there
        # That of the start's gap, its sweep, and the bump.
        assert [json.loads(line).get("action") for line in dashes.seen(3)] == [None, "sweep", "bump"]
        stage.run("INSERT INTO notes VALUES (7)")
        (line,) = notes.seen(1)
        assert re.match(r"\S+Z \[info +\] bust +.*\baction=delete cache=user\b.*\brule=note-changed\b", line)
        eventually(lambda: [json.loads(line) for line in everything.lines] == stage.events, "it came live")
        assert everything.ended(signal.SIGINT) == 0
        assert notes.ended(signal.SIGTERM) == 0
        assert len(dashes.lines) == 3
        for each in (everything, notes):
            assert each.process.stderr is not None
            assert each.process.stderr.read() == ""


def test_tail_without_since_begins_now_and_outlives_redis(tmp_path: Path) -> None:
    given = {"event_stream": "cdc:events"}
    line = '{"event":"bust","level":"info","cache":"user","rule":"%s"}'
    with Valkey() as server, redis.Redis.from_url(server.url) as client:
        client.xadd("cdc:events", {"event": line % "before"})
        with Tail("--format", "json", redis_url=server.url, **given) as tail:
            reading = lambda: any("xread" in c["cmd"] for c in client.client_list())  # noqa: E731
            eventually(reading, "it reads")
            client.xadd("cdc:events", {"event": line % "first"})
            client.xadd("cdc:events", {"other": "entry"})
            client.xadd("cdc:events", {"event": "no JSON"})
            tail.seen(1)
            server.kill()
            server.start()
            client.xadd("cdc:events", {"event": line % "second"})
            assert [json.loads(line)["rule"] for line in tail.seen(2)] == ["first", "second"]
            assert tail.ended(signal.SIGINT) == 0
            assert tail.process.stderr is not None
            said = tail.process.stderr.read()
            assert said.startswith("Redis failed at the connection (CLOSED")
            assert said.count("\n") == 1


def test_tail_ends_when_nobody_reads_it_whether_events_come_or_not(valkey: Valkey) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cdc_invalidator", "tail", "--redis-url", valkey.url, "--event-stream", "cdc:idle"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_tail_says_in_one_sentence_what_it_lacks(valkey: Valkey, redis_client: redis.Redis) -> None:
    url = valkey.url
    without = command("tail", redis_url=url)
    assert without.returncode == 2
    assert without.stderr.startswith("CDC_EVENT_STREAM is not set; set it for the daemon and here")
    away = command("tail", redis_url="redis://:secret@127.0.0.1:1", event_stream="s")
    assert away.returncode == 1
    assert away.stderr.startswith("Redis failed at the connection")
    assert "secret" not in away.stderr
    assert command("tail", "--since", "soon", redis_url=url, event_stream="s").returncode == 2
    with redis.Redis.from_url(url) as client:
        key = f"text:{secrets.token_hex(3)}"
        client.set(key, "x", ex=60)
    other = command("tail", redis_url=url, event_stream=key)
    assert other.returncode == 1
    assert "(WRONGTYPE); the key holds something else" in other.stderr
    for done in (without, away, other):
        assert done.stderr.count("\n") == 1


# Other kinds of Redis


def test_in_a_cluster_the_stream_is_written_and_read_where_its_slot_is(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        Cluster(replicas=False) as cluster,
        contextlib.closing(cluster.client()) as client,
        staged(database, client, tmp_path, slot_name, cluster.url) as stage,
    ):
        stage.run("UPDATE users SET name = 'x' WHERE id <= 100")
        stage.assert_as_logged()
        owner = cluster.master_of(stage.stream)
        (target, *_) = (node for node in cluster.masters() if node is not owner)
        slot = slot_of(stage.stream)
        with Tail("--since", "all", "--format", "json", **stage.given) as tail:
            tail.seen(len(stage.events))
            cluster.move_slots(slot, slot, target)
            assert cluster.master_of(stage.stream) is target
            stage.run("UPDATE users SET name = 'y' WHERE id <= 100")
            stage.assert_as_logged()
            assert [json.loads(line) for line in tail.seen(len(stage.events))] == stage.events
        told = explained(stage, "t:{7}:user")
        assert len(told["caches"][0]["last_busts"]) > 2


def test_tail_asks_sentinel_for_the_master() -> None:
    with Sentinels() as sentinels, redis.Redis.from_url(sentinels.master.url) as client:
        client.xadd("cdc:events", {"event": '{"event":"bust","level":"info"}'})
        with Tail("--since", "all", redis_url=sentinels.url, event_stream="cdc:events") as tail:
            assert "bust" in tail.seen(1)[0]


# explain


def explained(stage: StreamStage, key: str, *words: str, **more: str) -> dict[str, Any]:
    done = command("explain", key, "--format", "json", *words, rules=stage.rules, **{**stage.given, **more})
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_explain_shows_the_last_busts_of_a_key_and_marks_those_that_name_it(stage: StreamStage) -> None:
    stage.run("UPDATE users SET name = 'x' WHERE id = 3", "INSERT INTO notes VALUES (3)")
    stage.run(*(f"UPDATE users SET name = 'x' WHERE id = {number}" for number in range(100, 112)))
    stage.assert_as_logged()
    (cache,) = explained(stage, "t:{3}:user")["caches"]
    busts = cache["last_busts"]
    # The last ten name others; and then the newest that does.
    assert [bust["names_key"] for bust in busts] == [False] * 10 + [True]
    assert (busts[-1]["rule"], busts[-1]["table"]) == ("note-changed", "public.notes")
    assert [bust["lsn"] for bust in busts] == sorted((bust["lsn"] for bust in busts), reverse=True)
    (cache,) = explained(stage, "t:{105}:dash:v7")["caches"]
    assert [bust["names_key"] for bust in cache["last_busts"]].count(True) == 1
    text = command("explain", "t:{105}:user", rules=stage.rules, **stage.given).stdout
    assert re.search(
        r"^    \* \S+Z delete by rule user-changed on update of public.users: 1 key, 0 there, LSN", text, re.MULTILINE
    )
    assert text.count("\n    * ") == 1
    unsure = {**stage.given}
    del unsure["log_hash_key"]
    text = command("explain", "t:{105}:user", rules=stage.rules, **unsure).stdout
    assert text.count("\n    ? ") == 11
    assert "a CDC_LOG_HASH_KEY that is set here as for the daemon" in text


def test_explain_without_the_settings_or_without_redis_tells_all_the_rest(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    plain = command("explain", "t:{3}:user", rules=tmp_path)
    assert plain.returncode == 0
    assert "event stream" not in plain.stdout
    for given in ({"event_stream": "s"}, {"redis_url": "redis://127.0.0.1:1"}):
        assert command("explain", "t:{3}:user", rules=tmp_path, **given).stdout == plain.stdout
    away = command("explain", "t:{3}:user", rules=tmp_path, event_stream="s", redis_url="redis://:secret@127.0.0.1:1")
    assert away.returncode == 0
    assert away.stdout.startswith(plain.stdout)
    said = away.stdout.removeprefix(plain.stdout)
    assert said.startswith("  its last busts can't be told: Redis failed at the connection")
    assert said.count("\n") == 1
    assert "secret" not in said
