"""The compiled pass and the reference agree: the same stream, however it is cut, busts the same either way."""

from __future__ import annotations

import functools
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from walsender import (
    COLUMNS,
    EXTRA,
    KEEPALIVE,
    ORDERS,
    OTHER,
    PART,
    TABLES,
    USERS,
    Collecting,
    Content,
    Payloads,
    Reader,
    Server,
    Unit,
    World,
    copied,
    delete,
    insert,
    message,
    relation,
    truncate,
    update,
)

from cdc_invalidator import errors
from cdc_invalidator.pipeline import receive, scan
from cdc_invalidator.pipeline.assembly import Assembly
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.manual import MESSAGE_PREFIX
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.replication import COPY, PAYLOAD, Keepalive
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.packed import Pair
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import UNCHANGED

if not scan.COMPILED:
    assert not os.environ.get("CI"), "the compiled part is not there"
    pytest.skip("the compiled part is not there", allow_module_level=True)

CACHES = """
version: 1
caches:
  user: {key: "user:{id}"}
  team: {key: "team:{team}"}
  member: {key: "m{team}:{id}"}
  twice: {key: "twice:{id}:{team}:{id}"}
  all-four: {key: "4{id}{team}{name}{bio}"}
  bio: {key: "bio:{bio}"}
  hashed: {key: "hashed:{name|sha256}"}
  dash: {key: "dash:{id}:v{version}", version: "dash:{id}:ver"}
  every: {key: "every:v{version}", version: "every:ver"}
  counts: {key: "counts"}
  again: {key: "again:{id}", again_after: 1s}
  pairs: {key: "pairs:{team}:v{version}:{id}", version: "pairs:{team}:ver", bump_over: 2}
rules:
"""
ENTRIES = (
    "bust: [user]",
    "bust: [user], columns: [name]",
    "bust: [team, user], columns: [team]",
    "bust: [team], old_row: ignore",
    "bust: [team], old_row: ignore, columns: [name, bio]",
    "bust: [team], old_row: ignore, columns: [id]",
    "bust: [team], old_row: sweep",
    "bust: [team, member], immutable: [team]",
    "bust: [member, twice], immutable: [team], columns: [bio]",
    "bust: [all-four], old_row: ignore",
    "bust: [bio], old_row: ignore, columns: [bio]",
    "bust: [user: {id: team}, user], old_row: ignore",
    "bust: [user], on: [insert, truncate]",
    "bust: [user, dash], on: [update]",
    "bust: [user], on: [delete]",
    "bust: [dash]",
    "bust: [every]",
    "bust: [counts]",
    "bust: [counts, user, every], columns: [name]",
    # What is not plain.
    "bust: [hashed], old_row: ignore",
    "bust: [again]",
    "bust: [user], debounce: 5s",
    "bust: [pairs], immutable: [team]",
    "bust: [user], where: \"row.name == '1'\"",
    "bust: [user, every: {where: \"row.team == '1'\"}], columns: [name]",
    "bust: [user], when: \"op != 'update' || new.name != '1'\"",
)
NOT_PLAIN = ENTRIES[19:]
WIDE = "bust: [user, team, member, twice, all-four, dash, every, counts, bio], old_row: ignore"


@functools.lru_cache(maxsize=500)
def rule_set(users: tuple[str, ...], orders: tuple[str, ...], gone: bool) -> RuleSet:
    entries = [("users", entry) for entry in users] + [("orders", entry) for entry in orders]
    entries += [("gone", "bust: [user, counts]")] if gone else []
    lines = [f"  - {{name: r{at}, table: public.{table}, {entry}}}\n" for at, (table, entry) in enumerate(entries)]
    return parse_rules([("rules.yaml", CACHES + "".join(lines))], {})


@pytest.fixture(scope="module", autouse=True)
def no_complaints() -> Iterator[None]:
    """Rules that a relation breaks are told each time; they are meant to break here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receive, "_log", Mock())
        yield


@pytest.mark.parametrize("entry", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_reference(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Sequence[Any]] = []
    monkeypatch.setattr(scan, "compile_plain", lambda *given: taken.append(given[2:5]))
    columns = tuple(pgoutput.Column(name, name == "id", 25, -1) for name in ("id", "team", "name", "bio"))
    Invalidation(rule_set((entry,), (), False)).compile(
        pgoutput.Relation(None, USERS, "public", "users", "d", columns), [Table("public", "users")]
    )
    assert taken == [(None, None, None)]


# ── What it busts ────────────────────────────────────────────────────────────────────────────────────────────────────

Told = dict[tuple[str, str], tuple[frozenset[bytes], frozenset[str], frozenset[str]]]
"""By rule and cache: keys, kinds of change, reasons."""


@dataclass
class Outcome:
    """By transaction (commit LSN, xid, time), all that it busts; of those that have ended."""

    busts: dict[tuple[int, int, int | None], Told] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    received: int = 0
    transactions: int = 0
    malformed: bool = False


def told(batches: Iterable[Batch]) -> Told:
    """What the batches of a transaction bust in all; where they are cut is nobody's business."""
    found: dict[tuple[str, str], tuple[set[bytes], set[str], set[str]]] = {}
    for batch in batches:
        for target, busts in batch.busts.items():
            keys, ops, reasons = found.setdefault((target.rule, target.cache.name), (set(), set(), set()))
            ops.update(busts.ops)
            reasons.add(busts.reason)
            if target.pairs:
                # Keys turn into bumps once they are many, which depends on the cuts; their versions don't.
                keys.update(busts.bumps, (Pair.split(key).version for key in busts.keys))
            else:
                assert not busts.bumps
                keys.update(busts.keys)
            if busts.sweep:
                keys.add(b"*")
    return {
        name: (frozenset([b"*"] if b"*" in keys else keys), frozenset(ops), frozenset(reasons))
        for name, (keys, ops, reasons) in found.items()
    }


def ended(batches: Iterable[Batch], lsns: set[int]) -> dict[tuple[int, int, int | None], Told]:
    by_transaction: dict[tuple[int, int, int | None], list[Batch]] = {}
    for batch in batches:
        if batch.commit_lsn in lsns or not batch.xid:
            by_transaction.setdefault((batch.commit_lsn, batch.xid, batch.committed_at), []).append(batch)
    return {name: found for name, some in by_transaction.items() if (found := told(some))}


def by_reference(rule_set: RuleSet, data: bytes) -> Outcome:
    """Message by message, as the documentation of the parts says."""
    world, outcome = World(rule_set), Outcome()
    invalidation, decoder, assembly = world.invalidation, pgoutput.Decoder(), Assembly()
    batches: list[Batch] = []
    lsns: set[int] = set()
    pos = 0
    try:
        while pos < len(data):
            end = pos + 1 + int.from_bytes(data[pos + 1 : pos + COPY], "big")
            frame, pos = data[pos:end], end
            if frame[COPY : COPY + 1] == b"k":
                if not assembly.in_transaction:
                    outcome.received = max(outcome.received, Keepalive.read(frame[COPY:]).end)
                continue
            found = decoder.decode(frame, PAYLOAD)
            given_now: list[Batch] = []
            if isinstance(found, pgoutput.Relation):
                tables = [Table(found.schema, found.name)] + [Table("public", "orders")] * (found.oid == PART)
                if tables := [table for table in tables if invalidation.names(table)]:
                    assembly.relation(found, invalidation.compile(found, tables)[0])
                else:
                    unknown = world.unknown
                    assembly.relation(found, invalidation.compile_unknown(found, unknown) if unknown else None)
            elif not isinstance(found, pgoutput.Message):
                given_now = list(assembly.feed(found))
            elif found.prefix == MESSAGE_PREFIX:
                given_now = list(assembly.manual(found, *world.manual.read(found.content)))
            for batch in given_now:
                batches.append(batch)
                if batch.end_lsn is not None:
                    lsns.add(batch.commit_lsn)
                    outcome.received = max(outcome.received, batch.end_lsn)
                    outcome.transactions += 1
    except errors.MalformedMessage:
        outcome.malformed = True
    outcome.busts = ended(batches, lsns)
    outcome.counts = Counter(invalidation.counted())
    return outcome


def received(rule_set: RuleSet, pieces: Iterable[bytes]) -> tuple[Outcome, int]:
    """By `Receive`, and how many runs there were."""
    backlog, outcome = Collecting(), Outcome()
    reader = Reader(rule_set, backlog)
    try:
        reader.read(*pieces)
    except errors.MalformedMessage:
        outcome.malformed = True
    outcome.received = reader.checkpoint.received_lsn
    outcome.transactions = int(reader.metrics.transactions.labels().value)
    lsns = {batch.commit_lsn for batch in backlog.batches if batch.commit_lsn + 48 <= outcome.received}
    outcome.busts = ended(backlog.batches, lsns)
    outcome.counts = Counter(reader.world.invalidation.counted())
    for (table, op), count in reader.metrics.changes.items():
        outcome.counts[table, op] += int(count)
    return outcome, backlog.runs


def pieces_of(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for cut in sorted({cut % (len(data) + 1) for cut in cuts}):
        yield data[start:cut]
        start = cut
    yield data[start:]


def agree(rule_set: RuleSet, payloads: Sequence[bytes], cuts: Iterable[int] = ()) -> tuple[Outcome, int]:
    """Assert that all three ways give the same; what they give, and how many runs the compiled one made."""
    data = copied(payloads)
    wanted = by_reference(rule_set, data)
    pieces = list(pieces_of(data, cuts))
    found, runs = received(rule_set, pieces)
    assert found == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "COMPILED", False)
        assert received(rule_set, pieces) == (wanted, 0)
    return wanted, runs


# ── Any stream ───────────────────────────────────────────────────────────────────────────────────────────────────────

_oids = st.sampled_from([USERS, USERS, USERS, ORDERS, ORDERS, PART, OTHER, EXTRA])
_texts = st.sampled_from([b"1", b"2", b"3", b"1", b"2", b"", b"\xff\0", "ä".encode(), b"%b{}", b"d\0\0\0\x05kB" * 9])
_sent = st.one_of(_texts, _texts, _texts, st.none())
_values = st.one_of(_sent, _sent, _sent, _sent, st.just(UNCHANGED))
_rows = st.tuples(_values, _values, _values, _values)
_whole_rows = st.tuples(_sent, _sent, _sent, _sent)


@st.composite
def _updates(draw: st.DrawFn) -> Content:
    oid, new, old = draw(_oids), draw(_rows), list(draw(_whole_rows))
    if draw(st.booleans()):
        # Most columns of most updates stay as they are.
        changed = draw(st.sampled_from([(), (0,), (1,), (2, 3), (0, 1, 2, 3)]))
        old = [old[at] if at in changed or value is UNCHANGED else value for at, value in enumerate(new)]
    return update(oid, draw(st.sampled_from([b"", b"", b"K", b"O"])), old, new)


_relations = st.builds(
    relation,
    _oids,
    st.sampled_from([b"d", b"d", b"f", b"n", b"i"]),
    st.sampled_from([("id",), ("id",), ("id", "team"), ("team", "name"), ()]),
    st.sampled_from([COLUMNS, COLUMNS, COLUMNS[::-1], ("id", "team", "name", "other"), ("a", "b", "c", "d")]),
)
_manual = st.sampled_from([b'{"cache": "user", "params": {"id": 1}}', b'{"cache": "counts"}', b'{"cache": "team"}'])
_plain = st.one_of(
    st.builds(insert, _oids, _whole_rows),
    _updates(),
    st.builds(delete, _oids, st.sampled_from([b"K", b"O"]), _whole_rows),
)
_contents = st.one_of(
    _plain,
    _plain,
    _plain,
    _plain,
    st.builds(insert, _oids, _rows),
    st.builds(delete, _oids, st.sampled_from([b"K", b"O"]), _rows),
    st.builds(truncate, st.lists(_oids, min_size=1, max_size=3)),
    _relations,
    st.builds(message, _manual),
    st.just(message(b"none of ours", prefix="theirs")),
    st.just(Content(b"O", struct.pack(">Q", 7) + b"upstream\0")),
    st.just(Content(b"Y", struct.pack(">I", 70) + b"public\0mood\0")),
    st.just(KEEPALIVE),
)


@st.composite
def _many(draw: st.DrawFn) -> list[tuple[int, Content]]:
    """About as many rows as the pass takes whole, or as make a batch; of one kind, with keys that differ or don't."""
    oid, count = (
        draw(_oids),
        draw(st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 200, 999, 1000, 1001, 2100])),
    )
    different = draw(st.integers(1, count))
    ids = [b"%d" % (at % different) for at in range(count)]
    kind = draw(st.sampled_from(["insert", "update", "delete"]))
    team = draw(_sent)

    def made(value: bytes) -> Content:
        if kind == "insert":
            return insert(oid, (value, team, value, b""))
        if kind == "update":
            return update(oid, b"O", (b"0", team, value, value), (value, team, value, value))
        return delete(oid, b"O", (value, team, b"", b""))

    return [(0, made(value)) for value in ids]


_small = st.lists(st.tuples(st.just(0), _plain), max_size=4)
_any = st.lists(st.tuples(st.just(0), _contents), max_size=8)


@st.composite
def _streamed(draw: st.DrawFn, xid: int) -> list[Unit]:
    """A large transaction in blocks, of which some subtransactions are rolled back, or all."""
    subxids = st.sampled_from([xid, xid + 1, xid + 2])
    some = st.lists(st.tuples(subxids, _contents), max_size=8)
    many = st.builds(lambda subxid, rows: [(subxid, row) for _, row in rows], subxids, _many())
    units = []
    for at in range(draw(st.integers(1, 3))):
        units.append(Unit("block", xid, draw(st.one_of(some, some, some, many)), first=at == 0))
        if draw(st.integers(0, 3)) == 0:
            units.append(Unit("stream abort", xid, [(draw(st.sampled_from([xid + 1, xid + 2])), KEEPALIVE)]))
    over = draw(st.sampled_from(["stream commit", "stream commit", "stream abort", ""]))
    return units + ([Unit(over, xid, [(xid, KEEPALIVE)])] if over else [])


_outside = st.one_of(
    st.builds(lambda content: Unit("loose", 0, [(0, content)]), _relations),
    st.builds(lambda text: Unit("manual", 0, [(0, Content(b"", text))]), _manual),
)


@st.composite
def streams(draw: st.DrawFn) -> Payloads:
    lines: list[list[Unit]] = []
    for at in range(draw(st.integers(1, 6))):
        xid = 700 + 10 * at
        kind = draw(
            st.sampled_from(["small", "small", "small", "any", "any", "many", "streamed", "keepalive", "outside"])
        )
        if kind == "streamed":
            lines.append(draw(_streamed(xid)))
        elif kind == "keepalive":
            lines.append([Unit("keepalive")])
        elif kind == "outside":
            lines.append([draw(_outside)])
        elif kind == "small":
            # A few in a row, as a run is made of.
            some = draw(st.lists(_small, min_size=1, max_size=5))
            lines.append([Unit("transaction", xid + more, contents) for more, contents in enumerate(some)])
        else:
            lines.append([Unit("transaction", xid, draw(_any if kind == "any" else _many()))])
    server = Server()
    known = [(0, draw(_relations)) for _ in range(draw(st.integers(0, 3)))]
    server.write(Unit("transaction", 699, [*((0, relation(oid)) for oid in TABLES), *known]))
    while lines:
        line = draw(st.sampled_from(lines))
        server.write(line.pop(0))
        lines = [line for line in lines if line]
    return server.payloads


_entries = st.one_of(
    st.lists(st.sampled_from(ENTRIES[:19]), min_size=1, max_size=3),
    st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=3),
    st.just([WIDE, WIDE]),
).map(tuple)
rule_sets = st.builds(rule_set, _entries, st.just(()) | _entries, st.sampled_from([False, False, True]))
_cuts = st.lists(st.integers(0, 2**20), max_size=6)


@settings(max_examples=100)
@given(rule_sets, streams(), _cuts)
def test_any_stream_busts_the_same_by_the_pass_and_by_the_reference(
    rule_set: RuleSet, payloads: Payloads, cuts: list[int]
) -> None:
    wanted, runs = agree(rule_set, payloads, cuts)

    assert not wanted.malformed
    event("some of it in runs" if runs else "no run")


@st.composite
def garbled(draw: st.DrawFn, rows_of: tuple[bytes, ...]) -> Payloads:
    payloads = draw(streams())
    # Rows of a table that no rule reads are not looked into.
    able = [
        at
        for at, each in enumerate(payloads)
        if each[:1] not in b"IUDk" or each[1:5] in rows_of or each[5:9] in rows_of
    ]
    at = draw(st.sampled_from(able))
    payload = payloads[at]
    how = draw(st.sampled_from(["cut", "longer", "byte", "gone", "twice", "width"]))
    if how == "cut":
        payload = payload[: draw(st.integers(0, len(payload) - 1))]
    elif how == "longer":
        payload += draw(st.sampled_from([b"\0", b"n", b"t\0\0\0\0"]))
    elif how == "byte":
        # Not the relation's oid, which may become that of a table that no rule reads; nor a position in the WAL.
        places = {b"B": [0], b"C": [0, 1], b"c": [0, 5], b"M": [0, 1]}.get(payload[:1])
        place = draw(st.sampled_from(places or [0, *range(9 if payload[5:9] in rows_of else 5, len(payload))]))
        payload = payload[:place] + bytes([draw(st.integers(0, 255))]) + payload[place + 1 :]
    elif how == "width":
        oid = struct.unpack(">I", rows_of[0])[0]
        payload = draw(st.sampled_from([insert(oid, [b"1"] * 3), delete(oid, b"K", [b"1"] * 5)])).payload()
    return Payloads([*payloads[:at], *[payload] * {"gone": 0, "twice": 2}.get(how, 1), *payloads[at + 1 :]])


@settings(max_examples=100)
@given(st.data(), _cuts)
def test_whatever_is_garbled_fails_at_the_same_place_by_the_pass_and_by_the_reference(
    data: st.DataObject, cuts: list[int]
) -> None:
    entries = data.draw(_entries.filter(bool))
    oids = tuple(struct.pack(">I", oid) for oid in (USERS, ORDERS, PART))

    wanted, _ = agree(rule_set(entries, entries, False), data.draw(garbled(oids)), cuts)

    event("malformed" if wanted.malformed else "still a stream")


# ── Single cases ─────────────────────────────────────────────────────────────────────────────────────────────────────


def of_users(*transactions: Sequence[Content]) -> Payloads:
    server = Server()
    server.write(Unit("transaction", 699, [(0, relation(oid)) for oid in TABLES]))
    for xid, contents in enumerate(transactions, 700):
        server.write(Unit("transaction", xid, [(0, content) for content in contents]))
    return server.payloads


def by_id(number: int) -> Content:
    return insert(USERS, (b"%d" % number, b"7", b"Ada", None))


def test_a_transaction_of_few_rows_is_taken_whole_and_a_larger_one_is_not() -> None:
    plain = rule_set(("bust: [counts]",), (), False)
    for rows, runs in ((1, 1), (64, 1), (65, 0)):
        assert agree(plain, of_users([by_id(at) for at in range(rows)]))[1] == runs


def test_a_transaction_of_few_keys_is_taken_whole_and_a_larger_one_is_not() -> None:
    plain = rule_set(("bust: [user]",), (), False)
    for keys, runs in ((32, 1), (33, 0)):
        assert agree(plain, of_users([by_id(at % keys) for at in range(64)]))[1] == runs


def test_a_transaction_of_few_targets_is_taken_whole_and_a_larger_one_is_not() -> None:
    eight = "bust: [user, team, member, twice, dash, every, counts, bio], old_row: ignore"
    shown = insert(USERS, (b"1", b"2", b"3", b"4"))
    for entries, runs in (((eight, eight), 1), ((eight, eight, "bust: [user]"), 0)):
        assert agree(rule_set(entries, (), False), of_users([shown]))[1] == runs


def test_a_transaction_that_comes_in_two_pieces_is_taken_once() -> None:
    plain = rule_set(("bust: [user]",), (), False)
    payloads = of_users([by_id(1)], [by_id(2), by_id(3)], [by_id(4)])
    size = len(copied(payloads))

    for cut in range(size):
        wanted, _ = agree(plain, payloads, [cut])
        assert wanted.transactions == 4


def test_a_truncate_is_not_made_a_change_by_the_rows_that_follow_it() -> None:
    payloads = of_users([truncate([USERS]), by_id(1)])

    wanted, _ = agree(rule_set(("bust: [counts]",), (), False), payloads)

    ((_, _, reasons),) = wanted.busts[1200, 700, 8400].values()
    assert reasons == {"truncate"}


def test_rows_of_a_table_that_no_rule_reads_are_taken_with_the_others() -> None:
    other = insert(OTHER, (b"1", b"2"))

    _, runs = agree(
        rule_set(("bust: [user]",), (), False), of_users([other, by_id(1), other], [other] * 200, [by_id(2)])
    )

    assert runs == 1


def test_a_relation_wider_than_any_is_none_of_the_pass() -> None:
    plain = rule_set(("bust: [user]",), (), False)
    for width, runs in ((1664, 1), (1665, 0)):
        wide = relation(USERS, columns=("id", *(f"c{at}" for at in range(width - 1))))
        shown = insert(USERS, [b"1"] * width)
        assert agree(plain, of_users([wide], [shown]))[1] == runs


def test_a_message_without_anything_is_malformed() -> None:
    with pytest.raises(errors.MalformedMessage):
        Reader(rule_set(("bust: [user]",), (), False), Collecting()).read(b"d\0\0\0\x04")


def test_no_run_is_larger_than_a_batch() -> None:
    rule = rule_set((WIDE,), (), False)
    payloads = of_users(*([insert(USERS, (b"%d" % at, b"%d" % -at, b"", b"1"))] for at in range(1000)))
    backlog = Collecting()

    Reader(rule, backlog).read(copied(payloads))

    assert backlog.runs > 5
    assert max(len(list(batch.events())) for batch, _ in backlog.take(2**60)) < 1000 + 16
