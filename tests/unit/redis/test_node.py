"""What an error of the driver is to us: its row of the table, where it points, and the sentence that tells it."""

from __future__ import annotations

import socket
import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis import exceptions
from redis._parsers.base import BaseParser

from cdc_invalidator import errors
from cdc_invalidator.redis import node, replies
from cdc_invalidator.redis.node import Redirection

NO_REPLY = {"TIMEOUT", "CLOSED", "GARBLED"}
OURS = {"SETTING", "MOVED_AWAY", "OTHER_DATA", "NO_COMMAND"}


def answered(reply: str) -> Exception:
    """The exception that the driver makes of an error reply."""
    error = BaseParser.parse_error(reply)  # type: ignore[no-untyped-call]  # of redis-py
    assert isinstance(error, Exception)
    return error


# What servers say, from Redis 6.2 to Valkey 9; by the row that it belongs to.
REPLIES = [
    ("MOVED", "MOVED 3999 127.0.0.1:6381"),
    ("ASK", "ASK 3999 127.0.0.1:6381"),
    ("TRYAGAIN", "TRYAGAIN Multiple keys request during rehashing of slot"),
    ("CROSSSLOT", "CROSSSLOT Keys in request don't hash to the same slot"),
    ("READONLY", "READONLY You can't write against a read only replica."),
    ("LOADING", "LOADING Redis is loading the dataset in memory"),
    ("BUSY", "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."),
    ("MASTERDOWN", "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
    ("CLUSTERDOWN", "CLUSTERDOWN Hash slot not served"),
    ("NOREPLICAS", "NOREPLICAS Not enough good replicas to write."),
    ("MISCONF", "MISCONF Errors writing to the AOF file: No space left on device"),
    ("NOSCRIPT", "NOSCRIPT No matching script. Please use EVAL."),
    ("UNBLOCKED", "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"),
    ("OOM", "OOM command not allowed when used memory > 'maxmemory'."),
    ("OOM", "OOM command not allowed when used memory > 'maxmemory'. script: 4f8b, on @user_script:3."),
    (
        "OOM",
        (
            "ERR Error running script (call to f_4f8b): @user_script:3: -OOM command not allowed when used memory > "
            "'maxmemory'."
        ),
    ),
    (
        "WRONGTYPE",
        (
            "ERR Error running script (call to f_4f8b): @user_script: 3: WRONGTYPE Operation against a key holding the "
            "wrong kind of value"
        ),
    ),
    ("NOPERM", "NOPERM this user has no permissions to run the 'unlink' command or its subcommand"),
    ("NOPERM", "NOPERM User cdc has no permissions to run the 'unlink' command"),
    ("NOPERM", "NOPERM No permissions to access a key"),
    ("NOPERM", "ERR ACL failure in script: No permissions to access a key"),
    ("NOPERM", "ERR ACL failure in script: User cdc has no permissions to run the 'unlink' command"),
    ("NOPERM", "ERR The user executing the script can't run this command or subcommand"),
    ("NOPERM", "EXECABORT Transaction discarded because of: NOPERM No permissions to run the 'exec' command"),
    (
        "NOPERM",
        (
            "ERR Error running script (call to f_4f8b): @user_script:2: ERR The user executing the script can't access "
            "at least one of the keys mentioned in the command arguments"
        ),
    ),
    ("NOAUTH", "NOAUTH Authentication required."),
    ("WRONGPASS", "WRONGPASS invalid username-password pair or user is disabled."),
    ("WRONGPASS", "ERR invalid password"),
    ("WRONGTYPE", "WRONGTYPE Operation against a key holding the wrong kind of value"),
    ("NOPROTO", "NOPROTO unsupported protocol version"),
    ("CLOSED", "ERR max number of clients reached"),
    ("ERR", "ERR syntax error"),
    ("ERR", "BUSYGROUP Consumer Group name already exists"),
    ("ERR", "ERR Error running script (call to f_4f8b): @user_script:3: NONE Of the table"),
    ("ERR", "ERR"),
    ("ERR", ""),
]


@pytest.mark.parametrize(("code", "reply"), REPLIES)
def test_an_error_reply_belongs_to_a_row_whichever_class_the_driver_makes_of_it(code: str, reply: str) -> None:
    assert node.code(answered(reply)) == code


def test_each_reply_of_the_table_is_one_that_was_seen() -> None:
    assert {code for code, _ in REPLIES} - {"ERR", "CLOSED"} == replies.TABLE.keys() - NO_REPLY - OURS


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("TIMEOUT", exceptions.TimeoutError("Timeout reading from cache:6379")),
        ("TIMEOUT", TimeoutError()),
        ("CLOSED", exceptions.ConnectionError("Connection closed by server.")),
        ("CLOSED", ConnectionResetError(104, "Connection reset by peer")),
        ("CLOSED", socket.gaierror(-2, "Name or service not known")),
        ("CLOSED", ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")),
        ("GARBLED", exceptions.InvalidResponse("Protocol Error: b'HTTP/1.1 400 Bad Request'")),
    ],
)
def test_what_is_no_reply_has_a_row_as_well(code: str, error: Exception) -> None:
    assert node.code(error) == code
    assert code in NO_REPLY


def test_each_row_has_a_remedy_that_ends_a_sentence() -> None:
    for row in (*replies.TABLE.values(), replies.UNKNOWN):
        assert row.remedy.strip(" .;") == row.remedy != ""


def test_an_error_of_no_row_is_reported() -> None:
    assert replies.of("ERR") == replies.of("NEWCODE") == replies.UNKNOWN
    assert replies.of("OOM") is replies.TABLE["OOM"]


# ── Where a reply points ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "redirection"),
    [
        ("MOVED 3999 127.0.0.1:6381", Redirection("MOVED", "127.0.0.1", 6381)),
        ("ASK 3999 node-3.cache.svc:6381", Redirection("ASK", "node-3.cache.svc", 6381)),
        ("MOVED 0 2001:db8::3:6379", Redirection("MOVED", "2001:db8::3", 6379)),
        ("MOVED 16383 :6381", Redirection("MOVED", "", 6381)),
        ("ASK 16383 :6381", Redirection("ASK", "", 6381)),
        ("TRYAGAIN Multiple keys request during rehashing of slot", None),
        ("CLUSTERDOWN Hash slot not served", None),
        ("ERR MOVED 3999 127.0.0.1:6381", None),
    ],
)
def test_a_reply_of_a_cluster_may_point_elsewhere(reply: str, redirection: Redirection | None) -> None:
    assert node.redirection(answered(reply)) == redirection


def test_a_lost_connection_points_nowhere() -> None:
    assert node.redirection(exceptions.ConnectionError("MOVED 3999 127.0.0.1:6381")) is None
    assert node.redirection(TimeoutError()) is None


# ── How it is told ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            "OOM command not allowed when used memory > 'maxmemory'.",
            (
                "Redis failed at EVALSHA (OOM: command not allowed when used memory >); "
                "raise maxmemory, or set a policy that evicts."
            ),
        ),
        (
            "LOADING Redis is loading the dataset in memory",
            (
                "Redis failed at EVALSHA (LOADING: Redis is loading the dataset in memory); "
                "it is tried again until the server is ready."
            ),
        ),
        (
            "NOPERM User cdc has no permissions to run the 'unlink' command",
            (
                "Redis failed at EVALSHA (NOPERM: User cdc has no permissions to run the 'unlink' command); "
                "grant the ACL user of CDC_REDIS_URL what the README lists."
            ),
        ),
        (
            "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
            (
                "Redis failed at EVALSHA (BUSY: Redis is busy running a script. You can only call SCRIPT KILL or "
                "SHUTDOWN NOSAVE); a script of somebody else runs for too long; it is tried again until that ends."
            ),
        ),
        ("", "Redis failed at EVALSHA (ERR); look at the server's log; it is tried again."),
    ],
)
def test_a_failure_is_one_sentence_with_the_place_and_the_remedy(reply: str, sentence: str) -> None:
    assert str(node.failed("EVALSHA", answered(reply))) == sentence


def test_a_name_that_is_not_known_is_told_without_numbers() -> None:
    assert str(node.failed("the connection", socket.gaierror(-2, "Name or service not known"))) == (
        "Redis failed at the connection (CLOSED: Name or service not known); check CDC_REDIS_URL and the server."
    )


def test_a_reply_that_repeats_its_arguments_is_told_without_them() -> None:
    reply = "ERR unknown command 'UNLINK', with args beginning with: 'shop:user:ada@example.org' "

    assert "ada" not in str(node.failed("UNLINK", answered(reply)))


@pytest.mark.parametrize("code", [*replies.TABLE, "ERR"])
def test_an_operator_is_told_of_what_does_not_get_better_by_itself(code: str) -> None:
    failures = {
        "TIMEOUT": exceptions.TimeoutError(),
        "CLOSED": exceptions.ConnectionError(),
        "GARBLED": exceptions.InvalidResponse(),
    }
    pointing = {"MOVED": "MOVED 1 a:2", "ASK": "ASK 1 a:2", "NOAUTH": "NOAUTH Authentication required."}
    failure = node.failed("EVALSHA", failures.get(code) or answered(pointing.get(code, f"{code} of some kind")))

    does = replies.of(code).does
    assert failure.code == code
    # Nobody has followed it, or it would not have failed.
    assert failure.report is (
        does in {replies.Does.REPORT, replies.Does.LOGIN, replies.Does.REDIRECT, replies.Does.DENY}
    )


WORDS = st.sampled_from([*replies.TABLE, "ERR", "EXECABORT", "@user_script:1:", "-OOM", "'", "no such key", ".", "«»"])
SECRET = "ada@example.org"


@given(st.lists(WORDS, max_size=6).map(" ".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@example("OOM", "x" * 200)
@example("GARBLED TIMEOUT", "")
def test_any_reply_becomes_one_failure_that_quotes_no_argument(words: str, more: str) -> None:
    reply = f"{words} {more} '{SECRET}'"
    if words.startswith(("MOVED", "ASK")):
        reply = f"{words.split(maxsplit=1)[0]} 1 {SECRET}:1".replace("MOVED_AWAY", "MOVED")

    failure = node.failed("UNLINK", answered(reply))

    row = replies.of(failure.code)
    sentence = str(failure)
    assert isinstance(failure, errors.Retryable)
    assert failure.code == "ERR" or failure.code in replies.TABLE
    assert sentence.startswith(f"Redis failed at UNLINK ({failure.code}")
    assert sentence.endswith(f"); {row.remedy}.")
    assert len(sentence) < 200 + len(row.remedy)
    # A redirection names a server, and NOPERM the command that is to be granted.
    assert SECRET not in sentence or failure.code in {"MOVED", "ASK", "NOPERM"}
