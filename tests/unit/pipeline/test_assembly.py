"""From decoded messages to batches: what belongs to which transaction, and when it leaves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from changes import (
    BEGIN,
    COMMIT,
    ORDERS,
    USERS,
    Stream,
    all_told,
    delete,
    insert,
    relation,
    row,
    rule_set,
    told,
    truncate,
    update,
    users,
)
from hypothesis import given
from hypothesis import strategies as st
from paths import PGOUTPUT_MESSAGES

from cdc_invalidator import errors
from cdc_invalidator.pipeline import assembly
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import Insert
from cdc_invalidator.rules.load import parse_rules

# ── Transactions and batches ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_transaction_without_busts_is_a_batch_without_busts() -> None:
    stream = users("user")

    [batch] = stream.batches()

    assert batch.busts == {}
    assert batch.end_lsn == 1048


def test_a_large_transaction_leaves_in_batches_and_only_the_last_has_its_end() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=3)

    batches = stream.batches(*(insert(str(number), "7", "Ada", None) for number in range(8)))

    assert [list(told(batch)) for batch in batches] == [
        ["user:0", "user:1", "user:2"],
        ["user:3", "user:4", "user:5"],
        ["user:6", "user:7"],
    ]
    assert [batch.end_lsn for batch in batches] == [None, None, 1048]
    assert {(batch.commit_lsn, batch.committed_at, batch.xid) for batch in batches} == {(1000, 77, 730)}


def test_a_transaction_that_fills_its_last_batch_ends_with_an_empty_one() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=2)

    batches = stream.batches(insert("1", "7", "Ada", None), insert("2", "7", "Ada", None))

    assert [(len(batch.busts), batch.end_lsn) for batch in batches] == [(1, None), (0, 1048)]


def test_rows_that_bust_the_same_key_make_no_batch_of_their_own() -> None:
    stream = Stream(rule_set("table: public.users, bust: [counts]"), relation(), chunk=2)

    assert len(stream.batches(*(insert(str(number), "7", "Ada", None) for number in range(100)))) == 1


def test_a_batch_stays_within_its_chunk_and_one_row() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user, team, member]"), relation(identity="f"), chunk=10)

    batches = stream.batches(
        *(update(row(f"{n}", f"{n}", None, None), old=row(f"-{n}", f"-{n}", None, None)) for n in range(100))
    )

    assert len(all_told(batches)) == 600
    assert all(batch.weight < 10 + 6 for batch in batches)
    assert all(batch.weight == sum(len(busts.keys) for busts in batch.busts.values()) for batch in batches)


def states(stream: Stream, *messages: pgoutput.AnyMessage) -> list[bool]:
    """Whether it is in a transaction, at first and after each message."""
    found = [stream.assembly.in_transaction]
    for message in messages:
        stream.feed(message)
        found.append(stream.assembly.in_transaction)
    return found


def test_it_is_in_a_transaction_from_begin_to_commit_also_between_batches() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=1)

    assert states(stream, BEGIN, insert("1", "7", "Ada", None), insert("2", "7", "Ada", None), COMMIT) == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_transactions_do_not_mix() -> None:
    stream = users("user")

    assert stream.busts(insert("1", "7", "Ada", None)) == {"user:1"}
    assert stream.busts(insert("2", "7", "Ada", None)) == {"user:2"}


def test_messages_that_are_no_change_bust_nothing_in_and_between_transactions() -> None:
    stream = users("user")
    others: list[pgoutput.AnyMessage] = [
        pgoutput.Origin(1, "upstream"),
        pgoutput.Type(None, 16500, "public", "mood"),
        pgoutput.Message(None, transactional=True, lsn=1, prefix="app", content=b"x"),
    ]

    assert stream.feed(*others) == []
    assert stream.busts(*others) == set()


# ── Transactions that are streamed while they run ────────────────────────────────────────────────────────────────────

STOP = pgoutput.StreamStop()


def start(xid: int, *, first: bool = True) -> pgoutput.StreamStart:
    return pgoutput.StreamStart(xid, first)


def stream_commit(xid: int) -> pgoutput.StreamCommit:
    return pgoutput.StreamCommit(xid, lsn=2000, end_lsn=2048, committed_at=88)


def abort(xid: int, subxid: int | None = None) -> pgoutput.StreamAbort:
    return pgoutput.StreamAbort(xid, xid if subxid is None else subxid)


def added(xid: int, *ids: str) -> list[pgoutput.AnyMessage]:
    """Rows that a (sub)transaction inserts into public.users."""
    return [insert(each, "7", "Ada", None)._replace(xid=xid) for each in ids]


def test_what_is_streamed_is_busted_at_its_commit_and_not_before() -> None:
    stream = users("user", "dash")

    assert stream.feed(start(1), *added(1, "1"), STOP, start(1, first=False), *added(1, "2"), STOP) == []
    assert stream.assembly.held == 4
    [batch] = stream.feed(stream_commit(1))

    assert all_told([batch]) == {"user:1", "user:2", "dash:1:ver", "dash:2:ver"}
    assert (batch.commit_lsn, batch.end_lsn, batch.committed_at, batch.xid) == (2000, 2048, 88, 1)
    assert [list(busts.ops) for busts in batch.busts.values()] == [["insert"]] * 2
    assert stream.assembly.held == 0


def test_every_kind_of_change_is_streamed() -> None:
    stream = users("user", "team", identity="f")
    moved = update(row("1", "9", "Ada", None), old=row("1", "7", "Ada", None))._replace(xid=1)
    deleted = delete(old=row("2", "8", "Ada", None))._replace(xid=2)

    [batch] = stream.feed(start(1), moved, deleted, STOP, stream_commit(1))
    assert all_told([batch]) == {"user:1", "team:9", "team:7", "user:2", "team:8"}

    [batch] = stream.feed(start(3), truncate(USERS)._replace(xid=4), STOP, stream_commit(3))
    assert all_told([batch]) == {"sweep user", "sweep team"}
    assert {busts.reason for busts in batch.busts.values()} == {"truncate"}


def test_what_is_rolled_back_busts_nothing() -> None:
    stream = users("user")

    assert stream.feed(start(1), *added(1, "1"), *added(2, "2"), STOP, abort(1)) == []

    assert stream.assembly.held == 0
    assert stream.busts(*added_plainly("3")) == {"user:3"}


def added_plainly(*ids: str) -> list[Insert]:
    return [insert(each, "7", "Ada", None) for each in ids]


def test_what_a_savepoint_did_is_forgotten_when_it_is_rolled_back_and_only_that() -> None:
    stream = users("user")

    stream.feed(start(1), *added(1, "1"), *added(2, "2"), *added(3, "3"), STOP)
    stream.feed(abort(1, 2), start(1, first=False), *added(4, "4"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"user:1", "user:3", "user:4"}


def test_a_key_that_a_rolled_back_savepoint_shares_with_the_rest_is_busted() -> None:
    stream = users("user")

    stream.feed(start(1), *added(2, "1"), *added(1, "1"), STOP, abort(1, 2))

    assert all_told(stream.feed(stream_commit(1))) == {"user:1"}


def test_a_savepoint_that_busted_nothing_may_be_rolled_back() -> None:
    stream = users("user")

    assert stream.feed(start(1), STOP, abort(1, 5), stream_commit(1))[0].busts == {}


def test_transactions_stand_between_the_blocks_of_others() -> None:
    stream = users("user")

    stream.feed(start(1), *added(1, "1"), STOP)
    assert stream.busts(*added_plainly("2")) == {"user:2"}
    stream.feed(start(3), *added(3, "3"), STOP, start(1, first=False), *added(1, "4"), STOP)

    assert all_told(stream.feed(stream_commit(3))) == {"user:3"}
    assert all_told(stream.feed(stream_commit(1))) == {"user:1", "user:4"}


def test_a_large_streamed_transaction_leaves_in_batches_at_its_commit() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=3)
    ids = [str(number) for number in range(8)]
    stream.feed(start(1), *added(1, *ids[:5]), *added(2, *ids[5:]), STOP)

    batches = stream.feed(stream_commit(1))

    assert [len(list(told(batch))) for batch in batches] == [3, 3, 2]
    assert all_told(batches) == {f"user:{each}" for each in ids}
    assert [batch.end_lsn for batch in batches] == [None, None, 2048]
    assert {(batch.commit_lsn, batch.xid) for batch in batches} == {(2000, 1)}


def test_past_its_bound_the_target_with_most_keys_becomes_a_sweep() -> None:
    stream = Stream(rule_set("table: public.users, bust: [team, user]"), relation(identity="f"), held=10)
    ids = [str(number) for number in range(30)]

    stream.feed(start(1), *added(1, *ids), STOP)
    assert stream.assembly.held == 1
    assert stream.assembly.widened == 1
    stream.feed(start(1, first=False), *added(1, "77"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"sweep user", "team:7"}


def test_what_a_sweep_covers_is_rolled_back_with_its_savepoint() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=3)

    stream.feed(start(1), *added(1, "1"), *added(2, *"23456"), STOP, abort(1, 2))

    # The keys of both parts were traded for one sweep each.
    assert all_told(stream.feed(stream_commit(1))) == {"sweep user"}


@pytest.mark.timeout(10)
def test_widening_ends_also_with_more_savepoints_than_keys_may_be_held() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=10)

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(30)), STOP)

    assert stream.assembly.held <= 10
    assert all_told(stream.feed(stream_commit(1))) == {"sweep user"}


@pytest.mark.timeout(10)
def test_widening_leaves_caches_of_a_single_key_alone() -> None:
    stream = Stream(rule_set("table: public.users, bust: [counts]"), relation(), held=0)

    stream.feed(start(1), *added(1, "1"), *added(2, "2"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"counts"}


def test_the_bound_holds_inside_a_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "UNCHECKED", 5)
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=10)

    held = []
    for message in (start(1), *added(1, *(str(n) for n in range(40)))):
        stream.feed(message)
        held.append(stream.assembly.held)

    assert max(held) <= 10 + 5
    assert all_told(stream.feed(STOP, stream_commit(1))) == {"sweep user"}


def test_too_many_savepoints_become_one_part_that_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "PARTS", 3)
    stream = Stream(rule_set("table: public.users, bust: [user, counts]"), relation())

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(5)), STOP)
    assert stream.assembly.widened == 1
    # What they did cannot be told apart any more: rolled back or not, it is swept.
    stream.feed(*(abort(1, 2 + n) for n in range(5)), start(1, first=False), *added(9, "9"), STOP, abort(1, 9))

    assert all_told(stream.feed(stream_commit(1))) == {"sweep user", "counts"}


def test_a_transaction_of_too_many_savepoints_that_is_rolled_back_busts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "PARTS", 3)
    stream = users("user")

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(5)), STOP, abort(1))

    assert stream.assembly.held == 0
    assert stream.busts(*added_plainly("3")) == {"user:3"}


def test_a_block_and_no_more_is_a_transaction_to_wait_for() -> None:
    assert states(users("user"), start(1), *added(1, "1"), STOP, stream_commit(1)) == [False, True, True, False, False]


def test_the_shape_that_a_transaction_in_progress_gave_a_table_is_its_own_until_it_commits() -> None:
    stream = users("user")
    reshaped = relation(columns=("name", "id"))

    stream.feed(start(1), reshaped, insert("Ada", "1")._replace(xid=1), STOP)
    assert stream.busts(*added_plainly("2")) == {"user:2"}
    assert all_told(stream.feed(stream_commit(1))) == {"user:1"}

    assert stream.busts(insert("Ada", "3")) == {"user:3"}


def test_the_shape_that_a_rolled_back_transaction_gave_a_table_is_forgotten() -> None:
    stream = users("user")

    stream.feed(start(1), relation(columns=("name", "id")), insert("Ada", "1")._replace(xid=1), STOP, abort(1))

    assert stream.busts(*added_plainly("2")) == {"user:2"}


class Doing(NamedTuple):
    """One event in the life of one of several transactions in progress; 0 is a transaction's own part."""

    what: str
    xid: int
    part: int
    key: str


doings = st.builds(
    Doing,
    what=st.sampled_from(["rows", "rows", "rows", "plain", "savepoint rolled back", "commit", "rollback"]),
    xid=st.integers(1, 3),
    part=st.integers(0, 3),
    key=st.sampled_from("abcdef"),
)


@given(st.lists(doings, max_size=40), st.sampled_from([2, 1000]))
def test_whatever_the_course_of_transactions_each_commit_busts_what_it_kept(course: list[Doing], chunk: int) -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=chunk)
    kept: dict[int, dict[int, set[str]]] = {}
    for what, xid, part, key in course:
        fed: list[Batch] = []
        expected: set[str] = set()
        if what == "plain":
            fed = stream.batches(*added_plainly(key))
            expected = {f"user:{key}"}
        elif what == "rows":
            first = xid not in kept
            kept.setdefault(xid, {}).setdefault(part, set()).add(f"user:{key}")
            fed = stream.feed(start(xid, first=first), *added(10 * part + xid, key), STOP)
        elif xid not in kept:
            continue
        elif what == "savepoint rolled back" and part:
            kept[xid].pop(part, None)
            fed = stream.feed(abort(xid, 10 * part + xid))
        elif what == "commit":
            expected = set().union(*kept.pop(xid).values())
            fed = stream.feed(stream_commit(xid))
        elif what == "rollback":
            del kept[xid]
            fed = stream.feed(abort(xid))
        assert all_told(fed) == expected
        assert [batch.end_lsn is None for batch in fed] == [True] * (len(fed) - 1) + [False] * bool(fed)
        assert stream.assembly.held == sum(len(keys) for parts in kept.values() for keys in parts.values())


# ── What real servers sent: see record_pgoutput.py ───────────────────────────────────────────────────────────────────

KEYS = {
    "by_key": "id",
    "by_index": "code",
    "whole": "id",
    "toasted": "id",
    "toasted_whole": "id",
    "measured_2023": "day",
    "measured_2024": "day",
    "alone": "id",
    "parent": "id",
    "child": "id",
    "replicated": "id",
    "words": "id",
}
BUSTS: dict[str, list[str]] = {
    "identities": ["by_key:1 by_key:2", "by_index:a by_index:b", "whole:7 whole:8"],
    "toast": ["toasted:1 toasted:2", "toasted_whole:1"],
    "truncate": ["sweep:alone", "sweep:parent sweep:alone sweep:child", "sweep:alone", "sweep:parent sweep:child"],
    "origin": ["replicated:1", "replicated:2"],
    "partitioned": ["measured_2023:2023-12-31 measured_2024:2024-01-01 sweep:measured_2023 sweep:measured_2024"],
    "streamed": ["sweep:by_key sweep:whole"],
    "interleaved": ["words:2", "words:1", "words:3"],
    "rolled_back": ["words:1 words:3", "words:5"],
    "reshaped_in_vain": ["words:1", "words:1", "words:3", "words:5", "words:6", "words:7"],
}


def recordings() -> Iterator[tuple[str, str, list[bytes]]]:
    lines = [json.loads(line) for line in PGOUTPUT_MESSAGES.read_text().splitlines()]
    for (server, protocol, scenario), of_one in itertools.groupby(lines, lambda line: [*line.values()][:3]):
        if scenario in BUSTS:
            yield f"{server}-v{protocol}", scenario, [bytes.fromhex(line["hex"]) for line in of_one]


@pytest.mark.parametrize(
    ("scenario", "payloads"),
    [pytest.param(scenario, payloads, id=f"{server}-{scenario}") for server, scenario, payloads in recordings()],
)
def test_a_recorded_scenario_busts_what_its_script_changed(scenario: str, payloads: list[bytes]) -> None:
    caches = "".join(f'  {table}: {{key: "{table}:{{{column}}}"}}\n' for table, column in KEYS.items())
    entries = "".join(f"  - {{name: {table}, table: public.{table}, bust: [{table}]}}\n" for table in KEYS)
    stream = Stream(parse_rules([("rules.yaml", f"version: 1\ncaches:\n{caches}rules:\n{entries}")], {}))
    decoder = pgoutput.Decoder()

    batches = [batch for payload in payloads for batch in stream.feed(decoder.decode(payload))]

    expected = [{part.replace("sweep:", "sweep ") for part in line.split()} for line in BUSTS[scenario]]
    assert [set(told(batch)) for batch in batches] == expected
    assert all(batch.end_lsn is not None for batch in batches)
    assert stream.assembly.held == 0
    assert stream.complaints == []


# ── Sequences that PostgreSQL does not send ──────────────────────────────────────────────────────────────────────────

INSERT = insert("1", "7", "Ada", None)
NARROW, WIDE = row("1", "7", "Ada"), row("1", "7", "Ada", None, None)
RIGHT = row("1", "7", "Ada", None)


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param([BEGIN, BEGIN], id="begin_in_begin"),
        pytest.param([COMMIT], id="commit_without_begin"),
        pytest.param([BEGIN, COMMIT, COMMIT], id="commit_after_commit"),
        pytest.param([INSERT], id="insert_without_begin"),
        pytest.param([update(RIGHT)], id="update_without_begin"),
        pytest.param([delete(old=RIGHT)], id="delete_without_begin"),
        pytest.param([truncate(USERS)], id="truncate_without_begin"),
        pytest.param([BEGIN, COMMIT, INSERT], id="insert_after_commit"),
        pytest.param([BEGIN, insert("1", oid=ORDERS)], id="insert_before_relation"),
        pytest.param([BEGIN, update(row("1"), oid=ORDERS)], id="update_before_relation"),
        pytest.param([BEGIN, delete(key=row("1"), oid=ORDERS)], id="delete_before_relation"),
        pytest.param([BEGIN, truncate(USERS, ORDERS)], id="truncate_before_relation"),
        pytest.param([BEGIN, insert(*NARROW)], id="narrow_insert"),
        pytest.param([BEGIN, insert(*WIDE)], id="wide_insert"),
        pytest.param([BEGIN, update(NARROW)], id="narrow_update"),
        pytest.param([BEGIN, update(WIDE, old=RIGHT)], id="wide_update"),
        pytest.param([BEGIN, update(RIGHT, old=NARROW)], id="narrow_old_row"),
        pytest.param([BEGIN, update(RIGHT, key=WIDE)], id="wide_old_key"),
        pytest.param([BEGIN, delete(key=NARROW)], id="narrow_delete"),
        pytest.param([BEGIN, delete(old=WIDE)], id="wide_delete"),
        pytest.param([BEGIN, start(1)], id="block_in_begin"),
        pytest.param([start(1), start(1)], id="block_in_block"),
        pytest.param([start(1), BEGIN], id="begin_in_block"),
        pytest.param([start(1), COMMIT], id="commit_in_block"),
        pytest.param([start(1), INSERT], id="row_in_block_of_no_transaction"),
        pytest.param([start(1), stream_commit(1)], id="stream_commit_in_block"),
        pytest.param([start(1), STOP, BEGIN, stream_commit(1)], id="stream_commit_in_begin"),
        pytest.param([start(1), STOP, stream_commit(1), stream_commit(1)], id="stream_commit_twice"),
        pytest.param([start(1), STOP, INSERT], id="insert_after_block"),
        pytest.param([stream_commit(1)], id="stream_commit_of_nothing"),
        pytest.param([BEGIN, abort(1)], id="stream_abort_of_nothing"),
        pytest.param([start(1), abort(1)], id="stream_abort_in_block"),
        pytest.param([start(1), insert("1", oid=ORDERS)._replace(xid=1)], id="streamed_insert_before_relation"),
        pytest.param([start(1), insert(*NARROW)._replace(xid=1)], id="narrow_streamed_insert"),
    ],
)
def test_a_sequence_that_cannot_be_is_malformed(sequence: list[pgoutput.AnyMessage]) -> None:
    stream = users("user")
    stream.feed(*sequence[:-1])

    with pytest.raises(errors.MalformedMessage):
        stream.feed(sequence[-1])
