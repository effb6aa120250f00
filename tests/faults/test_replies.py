"""Every way in which Redis answers with an error, or does not answer: no bust is lost, and each shows in metrics."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import resp
from running import RunningDaemon, eventually, execute, settled
from stage import Stage
from writing import Writer, assert_all_is_well, create, rules_file

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.redis import replies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

WORDS = {
    "MOVED": "1 127.0.0.1:1",
    "ASK": "1 127.0.0.1:1",
    "TRYAGAIN": "Multiple keys request during rehashing of slot",
    "CROSSSLOT": "Keys in request don't hash to the same slot",
    "READONLY": "You can't write against a read only replica.",
    "LOADING": "Redis is loading the dataset in memory",
    "BUSY": "Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "MASTERDOWN": "Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN": "The cluster is down",
    "NOREPLICAS": "Not enough good replicas to write.",
    "MISCONF": "Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "NOSCRIPT": "No matching script. Please use EVAL.",
    "UNBLOCKED": "force unblock from blocking operation",
    "OOM": "command not allowed when used memory > 'maxmemory'.",
    "NOPERM": "this user has no permissions to run the 'evalsha' command",
    "NOAUTH": "Authentication required.",
    "WRONGPASS": "invalid username-password pair or user is disabled.",
    "WRONGTYPE": "Operation against a key holding the wrong kind of value",
    "NOPROTO": "unsupported protocol version",
    "ERR": "unknown command 'evalsha', with args beginning with: 't:thing:42'",
}
NOT_A_REPLY = {"SETTING", "TIMEOUT", "CLOSED", "GARBLED", "MOVED_AWAY", "OTHER_DATA", "NO_COMMAND"}


def test_the_table_has_a_test_for_each_of_its_rows() -> None:
    assert WORDS.keys() | NOT_A_REPLY == replies.TABLE.keys() | {"ERR"}


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


class InquisitiveDaemon(RunningDaemon):
    """It asks for INFO each second."""

    deadlines: ClassVar[Mapping[str, float]] = {"redis.info.INFO_SECONDS": 1.0}


class ReplyStage(Stage):
    """A daemon and a Redis, and between them a proxy that puts its own words into replies."""

    kind = InquisitiveDaemon

    def __init__(self, daemon: RunningDaemon, valkey: Valkey, proxy: resp.RespProxy, client: Any = None) -> None:
        super().__init__(daemon, client)
        self.valkey = valkey
        self.proxy = proxy

    def end(self) -> None:
        """Judge nothing: tests do."""


@pytest.fixture
def stage(database: str, valkey: Valkey, tmp_path: Path, slot_name: str) -> Iterator[ReplyStage]:
    create(database)
    rules = rules_file(tmp_path)
    with (
        resp.RespProxy(valkey.port, seed=1) as proxy,
        redis.Redis.from_url(valkey.url) as client,
        ReplyStage.playing(database, proxy.url, rules, slot_name, valkey, proxy, client=client) as stage,
    ):
        yield stage


def errors_of(daemon: RunningDaemon, code: str) -> float:
    return daemon.metric("cdc_invalidator_redis_errors_total", error=code)


@pytest.mark.parametrize("code", [code for code in WORDS if not replies.denies(code)])
def test_an_error_reply_at_any_place_of_a_pipeline_loses_no_bust(stage: ReplyStage, code: str) -> None:
    reply = f"-{code} {WORDS[code]}\r\n".encode()
    with redis.Redis.from_url(stage.valkey.url) as client:
        with Writer(stage.dsn, stage.valkey.url, rows=1500) as writer:
            writer.goes_on()
            for _ in range(3):
                stage.proxy.fail_next(20, reply, resp.named("EVALSHA", "UNLINK"))
                eventually(lambda: not stage.proxy.armed, "the error is injected")
                writer.goes_on()
        assert_all_is_well(stage.dsn, client, stage.daemon)
        assert stage.proxy.injected == 3
        assert errors_of(stage.daemon, code) == 3
        row = replies.of(code)
        events = stage.daemon.named("redis_unavailable", code=code)
        reported = row.does in {replies.Does.REPORT, replies.Does.REDIRECT}
        # A login that is refused once is not told.
        levels = set() if row.does is replies.Does.LOGIN else {"error" if reported else "warning"}
        assert {event["level"] for event in events} == levels
        assert all(row.remedy in event["error"] for event in events)
        assert not any("t:thing:" in str(event) for event in events)


# At a connection the daemon first names each command alone, to learn whether the server has it.
ALONE = ["SCRIPT", "HGETALL", "TIME", "UNLINK"]
AT_CONNECTION = ["CLIENT SETNAME", "SCRIPT LOAD", "HGETALL cdc"]


def beginning(words: str) -> Callable[[Sequence[bytes]], bool]:
    """Which commands match: a name alone only the command without arguments."""
    wanted = words.encode()
    return lambda command: command == [wanted] or (b" " in wanted and b" ".join(command).startswith(wanted))


@pytest.mark.parametrize("words", [*ALONE, *AT_CONNECTION])
def test_an_error_reply_at_the_connection_loses_no_bust_and_is_counted(stage: ReplyStage, words: str) -> None:
    reply = f"-LOADING {WORDS['LOADING']}\r\n".encode()
    with redis.Redis.from_url(stage.valkey.url) as client:
        with Writer(stage.dsn, stage.valkey.url) as writer:
            writer.goes_on()
            stage.proxy.fail_next(1, reply, beginning(words))
            stage.proxy.cut()
            stage.daemon.seen("redis_unavailable", code="LOADING")
            writer.goes_on()
        assert_all_is_well(stage.dsn, client, stage.daemon)
        assert errors_of(stage.daemon, "LOADING") == stage.proxy.injected == 1


@pytest.mark.parametrize("words", ["HGETALL", "SCRIPT LOAD"])
def test_an_error_reply_before_there_is_a_slot_is_counted(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str, words: str
) -> None:
    create(database)
    with resp.RespProxy(valkey.port, seed=1) as proxy:
        proxy.fail_next(1, resp.LOADING, beginning(words))
        with RunningDaemon(dsn=database, redis_url=proxy.url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
            daemon.ready()
            assert "LOADING" in daemon.seen("slot_waits_for_redis")["error"]
            assert errors_of(daemon, "LOADING") == 1


def test_a_denial_at_any_place_of_a_pipeline_loses_no_bust(stage: ReplyStage) -> None:
    reply = f"-NOPERM {WORDS['NOPERM']}\r\n".encode()
    with redis.Redis.from_url(stage.valkey.url) as client:
        with Writer(stage.dsn, stage.valkey.url, rows=1500) as writer:
            writer.goes_on()
            for n in (1, 2, 20):
                stage.proxy.fail_next(n, reply, resp.named("EVALSHA", "UNLINK"))
                eventually(lambda: not stage.proxy.armed, "the error is injected")
                writer.goes_on()
        assert_all_is_well(stage.dsn, client, stage.daemon)
        assert stage.proxy.injected == 3
        told = [*stage.daemon.named("caches_denied"), *stage.daemon.named("redis_unavailable", code="NOPERM")]
        assert all(event["level"] == "error" and replies.TABLE["NOPERM"].remedy in event["error"] for event in told)
        assert not any("t:thing:" in str(event) for event in told)


@pytest.mark.parametrize("command", ["SCRIPT", "HGETALL", "INFO", "SCAN", "UNLINK"])
def test_an_error_reply_to_any_other_command_loses_no_bust(stage: ReplyStage, command: str) -> None:
    reply = f"-READONLY {WORDS['READONLY']}\r\n".encode()
    with redis.Redis.from_url(stage.valkey.url) as client:
        client.mset({f"t:thing:{number}": "cached" for number in range(1_000_000, 1_003_000)})
        client.mset({f"t:thing:{number}\0lock": "token" for number in range(1_000_000, 1_001_000)})
        with Writer(stage.dsn, stage.valkey.url) as writer:
            writer.goes_on()
            stage.proxy.fail_next(1, reply, resp.named(command))
            if command in {"SCRIPT", "HGETALL"}:
                stage.proxy.cut()
            if command in {"SCAN", "UNLINK"}:
                execute(stage.dsn, "TRUNCATE things")
            eventually(lambda: not stage.proxy.armed, "the error is injected", 60)
            writer.goes_on()
            execute(stage.dsn, "TRUNCATE things")
        assert_all_is_well(stage.dsn, client, stage.daemon)
        assert errors_of(stage.daemon, "READONLY") >= 1


def test_a_reply_that_ends_in_its_middle_loses_no_bust(stage: ReplyStage) -> None:
    with redis.Redis.from_url(stage.valkey.url) as client:
        with Writer(stage.dsn, stage.valkey.url, rows=1500) as writer:
            writer.goes_on()
            for n in range(1, 6):
                stage.proxy.half(n, resp.named("EVALSHA", "UNLINK"))
                eventually(lambda: not stage.proxy.armed, "the reply is cut")
                writer.goes_on()
        assert_all_is_well(stage.dsn, client, stage.daemon)
        assert stage.proxy.halved == 5
        assert errors_of(stage.daemon, "CLOSED") == 5


@pytest.mark.parametrize("executing", [False, True])
def test_a_server_that_accepts_and_never_answers_loses_no_bust(stage: ReplyStage, executing: bool) -> None:
    with redis.Redis.from_url(stage.valkey.url) as client:
        with Writer(stage.dsn, stage.valkey.url) as writer:
            writer.goes_on()
            stage.proxy.silent(executing=executing)
            eventually(lambda: errors_of(stage.daemon, "TIMEOUT"), "the silence is noticed")
            stage.proxy.mend()
            writer.goes_on()
        assert_all_is_well(stage.dsn, client, stage.daemon)


def test_a_server_that_speaks_another_protocol_is_told_to_the_operator(
    database: str, postgres: Postgres, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    url = f"redis://127.0.0.1:{postgres.port}"
    with RunningDaemon(dsn=database, redis_url=url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
        assert "check CDC_REDIS_URL" in daemon.seen("slot_waits_for_redis")["error"]


def test_a_password_that_becomes_wrong_and_right_again_loses_no_bust(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        _grant(client, "first")
        url = valkey.url.replace("redis://", "redis://app:first@")
        with RunningDaemon(dsn=database, redis_url=url, rules=rules_file(tmp_path), slot=slot_name) as daemon:
            daemon.ready()
            settled(database, client, slot_name)
            _grant(client, "second")
            client.client_kill_filter(user="app")
            with Writer(database, valkey.url) as writer:
                writer.goes_on()
                event = daemon.seen("redis_unavailable", code="WRONGPASS", level="error")
                assert "CDC_REDIS_URL" in event["error"]
                assert "first" not in str(daemon.events)
                _grant(client, "first")
                writer.goes_on()
            assert_all_is_well(database, client, daemon)


def _grant(client: redis.Redis, password: str) -> None:
    client.acl_setuser("app", enabled=True, reset=True, passwords=[f"+{password}"], keys=["*"], categories=["+@all"])


def test_busts_wait_while_a_script_of_somebody_else_blocks_the_server(
    database: str, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    with (
        Valkey(settings={"busy-reply-threshold": "100"}) as valkey,
        RunningDaemon(dsn=database, redis_url=valkey.url, rules=rules_file(tmp_path), slot=slot_name) as daemon,
        redis.Redis.from_url(valkey.url) as client,
        socket.create_connection((HOST, valkey.port)) as blocker,
    ):
        daemon.ready()
        execute(database, "INSERT INTO things VALUES (1, 'new')")
        settled(database, client, slot_name)
        client.set("t:thing:1", "cached")
        blocker.sendall(b"EVAL 'while true do end' 0\r\n")
        execute(database, "UPDATE things SET body = 'changed' WHERE id = 1")
        daemon.seen("redis_unavailable", code="BUSY")
        client.script_kill()
        assert_all_is_well(database, client, daemon)
