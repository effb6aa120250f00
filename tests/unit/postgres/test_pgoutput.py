"""pgoutput messages: written by hand after the protocol's page, and recorded from PostgreSQL 15 to 18.

The recorded ones come from ``record_pgoutput.py``; its scripts say what they must decode to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import PGOUTPUT_MESSAGES

from cdc_invalidator import errors, lsn
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import (
    AnyMessage,
    Begin,
    Column,
    Commit,
    Decoder,
    Delete,
    Insert,
    Message,
    Origin,
    Relation,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdc_invalidator.rules.values import UNCHANGED, Row, Value

pytestmark = pytest.mark.timeout(60)  # whatever the bytes are, the answer comes at once


def decode(payload: bytes, *, in_stream: bool = False) -> AnyMessage:
    decoder = Decoder()
    decoder.in_stream = in_stream
    return decoder.decode(payload)


def decodes_or_is_malformed(payload: bytes, *, in_stream: bool = False) -> None:
    with contextlib.suppress(errors.MalformedMessage):
        decode(payload, in_stream=in_stream)


# ── Written by hand ──────────────────────────────────────────────────────────────────────────────────────────────────

LSN = bytes.fromhex("00000016 b374d848")
LSN_INT = 0x16B374D848
END_LSN = bytes.fromhex("00000016 b374d900")
END_LSN_INT = 0x16B374D900
LAST_LSN = b"\xff" * 8
AT = bytes.fromhex("0002b5e3f0a1c000")
AT_INT = 0x0002B5E3F0A1C000
BEFORE_2000 = struct.pack(">q", -1)
XID = bytes.fromhex("000002d8")
SUBXID = bytes.fromhex("000002d9")
OID = bytes.fromhex("00004001")
OTHER_OID = bytes.fromhex("ffffffff")
INT4 = bytes.fromhex("00000017 ffffffff")  # type 23, no modifier
VARCHAR20 = bytes.fromhex("00000413 00000018")  # type 1043, modifier 20 + 4
ONE = b"t\0\0\0\x011"
TWO = b"t\0\0\0\x012"

MESSAGES: list[tuple[str, bool, bytes, AnyMessage]] = [
    ("begin", False, b"B" + LSN + AT + XID, Begin(LSN_INT, AT_INT, 0x2D8)),
    ("begin_at_the_ends", False, b"B" + LAST_LSN + BEFORE_2000 + b"\xff" * 4, Begin(2**64 - 1, -1, 2**32 - 1)),
    ("commit", False, b"C\0" + LSN + END_LSN + AT, Commit(LSN_INT, END_LSN_INT, AT_INT)),
    ("origin", False, b"O" + LSN + b"upstream\0", Origin(LSN_INT, "upstream")),
    ("origin_without_a_name", False, b"O" + LSN + b"\0", Origin(LSN_INT, "")),
    (
        "relation",
        False,
        b"R" + OID + b"public\0users\0d\0\x02" + b"\x01id\0" + INT4 + b"\0name\0" + VARCHAR20,
        Relation(
            None,
            16385,
            "public",
            "users",
            "d",
            (Column("id", is_key=True, type_oid=23, type_modifier=-1), Column("name", False, 1043, 24)),
        ),
    ),
    (
        "relation_streamed",
        True,
        b"R" + XID + OID + b"a b\0t\xc3\xa4\0f\0\x01" + b"\x01\xe5\x90\x8d\0" + INT4,
        Relation(0x2D8, 16385, "a b", "tä", "f", (Column("名", is_key=True, type_oid=23, type_modifier=-1),)),
    ),
    (
        "relation_of_pg_catalog",
        False,
        b"R" + OID + b"\0pg_class\0n\0\0",
        Relation(None, 16385, "pg_catalog", "pg_class", "n", ()),
    ),
    (
        "relation_by_index",
        False,
        b"R" + OTHER_OID + b"s\0t\0i\0\x01\0a\0" + INT4,
        Relation(None, 2**32 - 1, "s", "t", "i", (Column("a", is_key=False, type_oid=23, type_modifier=-1),)),
    ),
    ("type", False, b"Y" + OID + b"public\0mood\0", Type(None, 16385, "public", "mood")),
    ("type_streamed", True, b"Y" + XID + OID + b"public\0mood\0", Type(0x2D8, 16385, "public", "mood")),
    ("type_of_pg_catalog", False, b"Y" + OID + b"\0text\0", Type(None, 16385, "pg_catalog", "text")),
    ("insert", False, b"I" + OID + b"N\0\x02" + ONE + b"n", Insert(None, 16385, [b"1", None])),
    ("insert_streamed", True, b"I" + XID + OID + b"N\0\x01" + ONE, Insert(0x2D8, 16385, [b"1"])),
    ("insert_of_an_empty_text", False, b"I" + OID + b"N\0\x01t\0\0\0\0", Insert(None, 16385, [b""])),
    ("insert_of_no_columns", False, b"I" + OID + b"N\0\0", Insert(None, 16385, [])),
    (
        "insert_of_text_that_looks_like_a_message",
        False,
        b"I" + OID + b"N\0\x01t\0\0\0\x04N\0\0n",
        Insert(None, 16385, [b"N\0\0n"]),
    ),
    (
        "insert_of_many_columns",
        False,
        b"I" + OID + b"N" + struct.pack(">H", 1600) + b"n" * 1600,
        Insert(None, 16385, [None] * 1600),
    ),
    (
        "insert_of_a_long_value",
        False,
        b"I" + OID + b"N\0\x01t\0\0\x01\x00" + b"\xc3\xa4" * 128,
        Insert(None, 16385, ["ä".encode() * 128]),
    ),
    ("update", False, b"U" + OID + b"N\0\x02" + ONE + b"u", Update(None, 16385, "", None, [b"1", UNCHANGED])),
    (
        "update_with_old_key",
        False,
        b"U" + OID + b"K\0\x02" + ONE + b"n" + b"N\0\x02" + TWO + b"u",
        Update(None, 16385, "K", [b"1", None], [b"2", UNCHANGED]),
    ),
    (
        "update_with_old_row",
        False,
        b"U" + OID + b"O\0\x01" + ONE + b"N\0\x01" + TWO,
        Update(None, 16385, "O", [b"1"], [b"2"]),
    ),
    (
        "update_streamed",
        True,
        b"U" + SUBXID + OID + b"O\0\x01nN\0\x01" + TWO,
        Update(0x2D9, 16385, "O", [None], [b"2"]),
    ),
    ("delete_by_key", False, b"D" + OID + b"K\0\x02" + ONE + b"n", Delete(None, 16385, "K", [b"1", None])),
    ("delete_with_row", False, b"D" + OID + b"O\0\x02" + ONE + TWO, Delete(None, 16385, "O", [b"1", b"2"])),
    ("delete_streamed", True, b"D" + XID + OID + b"K\0\x01" + ONE, Delete(0x2D8, 16385, "K", [b"1"])),
    ("truncate", False, b"T\0\0\0\x01\0" + OID, Truncate(None, (16385,), False, False)),
    ("truncate_cascade", False, b"T\0\0\0\x01\x01" + OID, Truncate(None, (16385,), True, False)),
    ("truncate_restart", False, b"T\0\0\0\x01\x02" + OID, Truncate(None, (16385,), False, True)),
    ("truncate_of_two", False, b"T\0\0\0\x02\x03" + OID + OTHER_OID, Truncate(None, (16385, 2**32 - 1), True, True)),
    ("truncate_streamed", True, b"T" + XID + b"\0\0\0\x01\0" + OID, Truncate(0x2D8, (16385,), False, False)),
    (
        "message",
        False,
        b"M\0" + LSN + b"cdc\0\0\0\0\x03a\0b",
        Message(None, False, LSN_INT, "cdc", b"a\0b"),
    ),
    ("message_transactional", False, b"M\x01" + LSN + b"p\0\0\0\0\0", Message(None, True, LSN_INT, "p", b"")),
    (
        "message_streamed",
        True,
        b"M" + XID + b"\x01" + LSN + b"\0\0\0\0\x01\xff",
        Message(0x2D8, True, LSN_INT, "", b"\xff"),
    ),
    ("stream_start", False, b"S" + XID + b"\x01", StreamStart(0x2D8, True)),
    ("stream_start_again", False, b"S" + XID + b"\0", StreamStart(0x2D8, False)),
    ("stream_stop", True, b"E", StreamStop()),
    (
        "stream_commit",
        False,
        b"c" + XID + b"\0" + LSN + END_LSN + AT,
        StreamCommit(0x2D8, LSN_INT, END_LSN_INT, AT_INT),
    ),
    ("stream_abort", False, b"A" + XID + SUBXID, StreamAbort(0x2D8, 0x2D9)),
]
by_hand = pytest.mark.parametrize(
    ("in_stream", "payload", "message"), [row[1:] for row in MESSAGES], ids=[row[0] for row in MESSAGES]
)


@by_hand
def test_a_message_decodes(in_stream: bool, payload: bytes, message: AnyMessage) -> None:
    decoded = decode(payload, in_stream=in_stream)

    assert decoded == message
    assert type(decoded) is type(message)


@by_hand
def test_a_message_decodes_in_place_behind_its_frame(in_stream: bool, payload: bytes, message: AnyMessage) -> None:
    decoder = Decoder()
    decoder.in_stream = in_stream

    assert decoder.decode(b"w" * 25 + payload, 25) == message


@by_hand
def test_a_message_with_a_byte_too_many_is_malformed(in_stream: bool, payload: bytes, message: AnyMessage) -> None:
    with pytest.raises(errors.MalformedMessage):
        decode(payload + b"\0", in_stream=in_stream)


@by_hand
def test_a_message_cut_at_any_byte_is_malformed(in_stream: bool, payload: bytes, message: AnyMessage) -> None:
    for length in range(len(payload)):
        with pytest.raises(errors.MalformedMessage):
            decode(payload[:length], in_stream=in_stream)


@by_hand
def test_a_message_behind_its_frame_and_cut_does_not_read_the_frame(
    in_stream: bool, payload: bytes, message: AnyMessage
) -> None:
    for length in range(len(payload)):
        decoder = Decoder()
        decoder.in_stream = in_stream
        with pytest.raises(errors.MalformedMessage):
            decoder.decode(payload + payload[:length], len(payload))


def test_every_kind_of_message_has_a_row_here() -> None:
    assert {type(message) for *_, message in MESSAGES} == set(pgoutput.AnyMessage.__args__)


@pytest.mark.parametrize(
    ("in_stream", "payload"),
    [
        pytest.param(False, b"", id="nothing"),
        pytest.param(False, b"Z", id="an_unknown_tag"),
        pytest.param(False, b"b" + LSN + END_LSN + AT + XID + b"gid\0", id="a_tag_of_protocol_3"),
        pytest.param(False, b"C\x01" + LSN + END_LSN + AT, id="commit_flags"),
        pytest.param(False, b"c" + XID + b"\x01" + LSN + END_LSN + AT, id="stream_commit_flags"),
        pytest.param(False, b"O" + LSN + b"a\0b\0", id="two_names"),
        pytest.param(False, b"R" + OID + b"s\0t\0x\0\0", id="an_unknown_identity"),
        pytest.param(False, b"R" + OID + b"s\0t\0d\0\x01\x02a\0" + INT4, id="column_flags"),
        pytest.param(False, b"R" + OID + b"s\0t\0d\0\x02\x01a\0" + INT4, id="fewer_columns_than_announced"),
        pytest.param(False, b"I" + OID + b"K\0\x01" + ONE, id="an_insert_of_an_old_row"),
        pytest.param(False, b"I" + OID + b"N\0\x02" + ONE, id="fewer_values_than_announced"),
        pytest.param(False, b"I" + OID + b"N\0\x01b\0\0\0\x011", id="a_binary_value"),
        pytest.param(False, b"I" + OID + b"N\0\x01t\xff\xff\xff\xff", id="a_value_of_4_gigabytes"),
        pytest.param(False, b"I" + OID + b"N\0\x02t\xff\xff\xff\xfen", id="a_value_of_minus_2_bytes"),
        pytest.param(False, b"I" + OID + b"N\xff\xff", id="65535_columns"),
        pytest.param(False, b"U" + OID + b"K\0\x01" + ONE, id="an_update_without_its_new_row"),
        pytest.param(False, b"U" + OID + b"K\0\x01" + ONE + b"K\0\x01" + ONE, id="an_update_of_two_old_rows"),
        pytest.param(False, b"U" + OID + b"D\0\x01" + ONE, id="an_update_of_an_unknown_kind"),
        pytest.param(False, b"D" + OID + b"N\0\x01" + ONE, id="a_delete_of_a_new_row"),
        pytest.param(False, b"T\0\0\0\x02\0" + OID, id="fewer_tables_than_announced"),
        pytest.param(False, b"T\xff\xff\xff\xff\0" + OID, id="4_billion_tables"),
        pytest.param(False, b"T\0\0\0\x01\x04" + OID, id="truncate_options"),
        pytest.param(False, b"M\x02" + LSN + b"p\0\0\0\0\0", id="message_flags"),
        pytest.param(False, b"M\0" + LSN + b"p\0\xff\xff\xff\xff", id="a_message_of_4_gigabytes"),
        pytest.param(False, b"S" + XID + b"\x02", id="stream_start_flags"),
        pytest.param(True, b"S" + XID + b"\0", id="a_block_in_a_block"),
        pytest.param(False, b"E", id="the_end_of_a_block_that_is_not_open"),
        pytest.param(True, b"I" + OID + b"N\0\x01" + ONE, id="a_streamed_row_without_its_xid"),
        pytest.param(False, b"I" + XID + OID + b"N\0\x01" + ONE, id="a_row_with_an_xid_outside_a_block"),
    ],
)
def test_what_is_not_pgoutput_is_malformed(in_stream: bool, payload: bytes) -> None:
    with pytest.raises(errors.MalformedMessage):
        decode(payload, in_stream=in_stream)


def test_a_block_opens_and_closes_and_a_malformed_message_does_neither() -> None:
    decoder = Decoder()
    states = [decoder.in_stream]
    for payload in (
        b"S" + XID + b"\x02",
        b"S" + XID + b"\x01\0",
        b"S" + XID + b"\x01",
        b"E\0",
        b"S" + XID + b"\0",
        b"E",
        b"E",
    ):
        with contextlib.suppress(errors.MalformedMessage):
            decoder.decode(payload)
        states.append(decoder.in_stream)

    assert states == [False, False, False, True, True, True, False, False]


def test_the_error_names_tag_and_length_and_shows_nothing_of_the_row() -> None:
    payload = b"I" + OID + b"N\0\x03t\0\0\0\x06s3cretn"

    with pytest.raises(errors.MalformedMessage) as caught:
        decode(payload)

    shown = f"{caught.value} {caught.value.__cause__}"
    assert f"tag b'I' and {len(payload)} bytes" in shown
    assert "s3cret" not in shown


# ── Recorded ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Recorded(NamedTuple):
    in_stream: bool
    payload: bytes


class Recording(NamedTuple):
    """One scenario as one server sent it."""

    server: str
    protocol: int
    scenario: str
    messages: Sequence[Recorded]

    def decoded(self) -> list[AnyMessage]:
        decoder = Decoder()
        return [decoder.decode(payload) for _, payload in self.messages]


@functools.cache
def recordings() -> tuple[Recording, ...]:
    lines = [json.loads(line) for line in PGOUTPUT_MESSAGES.read_text().splitlines()]
    return tuple(
        Recording(*name, tuple(_with_state([bytes.fromhex(line["hex"]) for line in of_one])))
        for name, of_one in groupby(lines, key=lambda line: (line["server"], line["protocol"], line["scenario"]))
    )


def _with_state(payloads: list[bytes]) -> Iterator[Recorded]:
    """Tell for each message, by tags alone, whether it stands inside a streamed block."""
    in_stream = False
    for payload in payloads:
        yield Recorded(in_stream, payload)
        if payload[:1] in (b"S", b"E"):
            in_stream = payload[:1] == b"S"


SERVERS = sorted({recording.server for recording in recordings()})
each_recording = pytest.mark.parametrize(
    "recording", recordings(), ids=[f"{r.server}-v{r.protocol}-{r.scenario}" for r in recordings()]
)
each_server = pytest.mark.parametrize("server", SERVERS)


def of_server(server: str) -> list[Recorded]:
    """All different messages of one server."""
    return list(dict.fromkeys(message for r in recordings() if r.server == server for message in r.messages))


class Story:
    """Messages in words: without LSNs and times, tables by name, transactions numbered in order of appearance."""

    def __init__(self) -> None:
        self._tables: dict[int, Relation] = {}
        self._xids: dict[int, int] = {}

    def tell(self, message: AnyMessage) -> str:
        match message:
            case Begin() | Commit() | StreamStop():
                return type(message).__name__.lower()
            case Origin(at, name):
                return f"origin {name} {lsn.text(at)}"
            case StreamStart(xid, first):
                return f"{self._xid(xid)}streamstart{' first' if first else ''}"
            case StreamCommit(xid):
                return f"{self._xid(xid)}streamcommit"
            case StreamAbort(xid, subxid):
                return f"{self._xid(xid)}streamabort {self._xid(subxid)}".rstrip()
            case _:
                return self._xid(message.xid) + self._tell_change(message)

    def _tell_change(self, message: Relation | Type | pgoutput.Change | Message) -> str:
        match message:
            case Relation(_, oid, schema, name, identity, columns):
                self._tables[oid] = message
                shown = [("*" if column.is_key else "") + column.name for column in columns]
                return f"relation {schema}.{name} {identity}: {', '.join(shown)}"
            case Type(_, _, schema, name):
                return f"type {schema}.{name}"
            case Insert(_, oid, new):
                return f"insert {self._row(oid, new)}"
            case Update(_, oid, kind, old, new):
                before = "" if old is None else f"{kind} {self._values(old)} -> "
                assert old is None or len(old) == len(new)
                return f"update {self._row(oid, new, before)}"
            case Delete(_, oid, kind, old):
                return f"delete {self._row(oid, old, kind + ' ')}"
            case Truncate(_, oids, cascade, restart):
                tables = " ".join(self._tables[oid].name for oid in oids)
                return f"truncate {tables}{' cascade' if cascade else ''}{' restart' if restart else ''}"
            case Message(_, transactional, _, prefix, content):
                return f"message {'in' if transactional else 'of no'} transaction {prefix!r}: {content!r}"

    def _xid(self, xid: int | None) -> str:
        return "" if xid is None else f"[{self._xids.setdefault(xid, len(self._xids) + 1)}] "

    def _row(self, oid: int, row: Row, before: str = "") -> str:
        assert len(row) == len(self._tables[oid].columns)
        return f"{self._tables[oid].name}: {before}{self._values(row)}"

    def _values(self, row: Row) -> str:
        return ", ".join(map(_shown, row))


def _shown(value: Value) -> str:
    if value is None:
        return "NULL"
    if value is UNCHANGED:
        return "unchanged"
    text = value.decode()
    return repr(text) if len(text) < 1000 else f"{text[0]!r} * {len(text)}"


def story(messages: Sequence[AnyMessage]) -> list[str]:
    """Tell a recording, without the truths and without later blocks that hold nothing."""
    teller = Story()
    told = [teller.tell(message) for message in messages]
    kept: list[str] = []
    for line in told:
        if "'truth'" in line:
            continue
        if line == "streamstop" and kept[-1].endswith("streamstart"):
            kept.pop()
            continue
        kept.append(line)
    return kept


STORIES = {
    "identities": r"""
        begin
        relation public.by_key d: *id, name, note
        insert by_key: '1', 'Ada', NULL
        update by_key: '1', 'Grace', NULL
        update by_key: K '1', NULL, NULL -> '2', 'Grace', ''
        delete by_key: K '2', NULL, NULL
        commit
        begin
        relation public.by_index i: id, *code, note
        insert by_index: '1', 'a', 'x'
        update by_index: '1', 'a', NULL
        update by_index: K NULL, 'a', NULL -> '1', 'b', NULL
        delete by_index: K NULL, 'b', NULL
        commit
        begin
        relation public.whole f: *id, *name
        insert whole: '7', NULL
        update whole: O '7', NULL -> '7', 'seven'
        update whole: O '7', 'seven' -> '8', 'seven'
        delete whole: O '8', 'seven'
        relation public.by_nothing n: id
        insert by_nothing: '1'
        relation public.keyless d: word
        insert keyless: 'word'
        commit
    """,
    # A domain is announced by the type under it; a generated column is not published.
    "names": r"""
        begin
        type Ünï cöde..mood
        type public.point3
        type pg_catalog.text
        relation Ünï cöde..Tä "ble" 表 d: *select, a b, 名前, 👍, plain
        insert Tä "ble" 表: '9223372036854775807', 'häppy', '(1,,"a,b")', 'ada@example.org', '{1.50,NULL,-2.00}'
        commit
        begin
        relation public.values_of_types d: *id, yes, raw, code
        insert values_of_types: '00000000-0000-0000-0000-00000000002a', 't', '\\x00ff', ''
        relation public.times_and_texts d: *at, span, doc, words
        insert times_and_texts: '2024-02-29 12:00:00.123456+00', '1 day 02:03:04', '{"a": [1, null]}', "ä\n👍\t'"
        commit
    """,
    "toast": """
        begin
        relation public.toasted d: *id, body, note
        insert toasted: '1', 'b' * 2100, 'n'
        update toasted: '1', unchanged, 'm'
        update toasted: K '1', NULL, NULL -> '2', unchanged, 'm'
        update toasted: '2', NULL, 'm'
        commit
        begin
        relation public.toasted_whole f: *id, *body, *note
        insert toasted_whole: '1', 'w' * 2100, NULL
        update toasted_whole: O '1', 'w' * 2100, NULL -> '1', unchanged, 'm'
        commit
    """,
    "truncate": """
        begin
        relation public.alone d: *id
        truncate alone
        commit
        begin
        relation public.parent d: *id
        relation public.alone d: *id
        relation public.child d: *id, parent_id
        truncate parent alone child cascade restart
        commit
        begin
        relation public.alone d: *id
        truncate alone restart
        commit
        begin
        relation public.parent d: *id
        relation public.child d: *id, parent_id
        truncate parent child cascade
        commit
    """,
    # A message of no transaction comes at once: before the transaction that wrote it, or from one that was rolled back.
    "messages": r"""
        message of no transaction 'at once': b'non-transactional'
        begin
        message in transaction 'cdc_invalidator': b'{"cache": "user", "params": {"id": 42}}'
        message in transaction 'präfix': b'\x00\xff\x00'
        message in transaction '': b''
        commit
        message of no transaction 'kept': b'of a transaction that is rolled back'
    """,
    "origin": """
        begin
        origin upstream ä 16/B374D848
        relation public.replicated d: *id
        insert replicated: '1'
        commit
        begin
        insert replicated: '2'
        commit
    """,
    "reshaped": """
        begin
        relation public.reshaped d: *id, name, old
        insert reshaped: '1', 'a', 'b'
        relation public.reshaped d: *id, name, old, more
        update reshaped: '1', 'c', 'b', '5'
        relation public.reshaped d: *id, name, more
        update reshaped: '1', 'd', '5'
        relation public.renamed d: *id, title, more
        update renamed: '1', 'e', '5'
        relation public.renamed f: *id, *title, *more
        delete renamed: O '1', 'e', '5'
        commit
    """,
    # A row that moves to another partition is a delete and an insert.
    "partitioned": """
        begin
        relation public.measured_2023 d: *day, value
        insert measured_2023: '2023-12-31', '1'
        delete measured_2023: K '2023-12-31', NULL
        relation public.measured_2024 d: *day, value
        insert measured_2024: '2024-01-01', '1'
        relation public.measured_2023 d: *day, value
        relation public.measured_2024 d: *day, value
        truncate measured_2023 measured_2024
        commit
    """,
    # A message inside a savepoint carries the xid of the whole transaction, unlike a row.
    "streamed": """
        [1] streamstart first
        [1] type public.mood
        [1] relation public.by_key d: *id, mood, body
        [1] insert by_key: '1', 'sad', 'b' * 2100
        [1] update by_key: '1', 'happy', unchanged
        [1] update by_key: K '1', NULL, NULL -> '2', NULL, unchanged
        streamstop
        [1] streamstart
        [2] relation public.whole f: *id, *name
        [2] insert whole: '1', NULL
        [2] update whole: O '1', NULL -> '1', 'one'
        [1] message in transaction 'in a savepoint': b'two'
        [2] delete whole: O '1', 'one'
        [1] delete by_key: K '2', NULL, NULL
        [1] type public.mood
        [1] relation public.by_key d: *id, mood, body
        [1] relation public.whole f: *id, *name
        [1] truncate by_key whole cascade restart
        streamstop
        [1] streamcommit
    """,
    "interleaved": """
        [1] streamstart first
        [1] relation public.words d: *id, word
        [1] insert words: '1', 'streamed'
        streamstop
        begin
        relation public.words d: *id, word
        insert words: '2', 'between'
        commit
        message of no transaction 'between': b'blocks'
        [2] streamstart first
        [2] relation public.words d: *id, word
        [2] insert words: '3', 'streamed too'
        streamstop
        [1] streamstart
        [1] update words: '1', 'again'
        streamstop
        [1] streamcommit
        [2] streamcommit
    """,
    # A relation that a streamed transaction has announced is known to those after its commit.
    "rolled_back": """
        [1] streamstart first
        [1] relation public.words d: *id, word
        [1] insert words: '1', 'first kept'
        streamstop
        [1] streamstart
        [2] insert words: '2', 'lost'
        streamstop
        [1] streamabort [2]
        [1] streamstart
        [3] relation public.words d: *id, word
        [3] insert words: '3', 'kept too'
        streamstop
        [1] streamcommit
        begin
        insert words: '5', 'plain'
        commit
        [4] streamstart first
        [4] relation public.words d: *id, word
        [4] insert words: '4', 'nothing kept'
        streamstop
        [4] streamabort [4]
    """,
    # A shape that is rolled back, or that its transaction has to itself, is followed by the one that holds.
    "reshaped_in_vain": """
        begin
        relation public.words d: *id, word
        insert words: '1', 'as it was'
        commit
        [1] streamstart first
        [1] relation public.words d: *id, word
        [1] update words: '1', 'in place'
        [2] relation public.words d: *id, word, more
        [2] insert words: '2', 'reshaped', '5'
        streamstop
        [1] streamabort [2]
        [1] streamcommit
        begin
        relation public.words d: *id, word
        insert words: '3', 'as it is'
        commit
        [3] streamstart first
        [3] relation public.words d: *id
        [3] insert words: '4'
        streamstop
        [3] streamabort [3]
        begin
        relation public.words d: *id, word
        insert words: '5', 'still'
        commit
        [4] streamstart first
        [4] relation public.words d: *id
        [4] insert words: '6'
        streamstop
        [4] streamcommit
        begin
        relation public.words d: *id
        insert words: '7'
        commit
    """,
}


@each_recording
def test_a_recorded_scenario_tells_what_its_script_did(recording: Recording) -> None:
    assert story(recording.decoded()) == [line.strip() for line in STORIES[recording.scenario].strip().splitlines()]


@each_recording
def test_commits_follow_their_begins_and_positions_rise(recording: Recording) -> None:
    begun: Begin | None = None
    reached = 0
    for message in recording.decoded():
        match message:
            case Begin():
                assert begun is None
                begun = message
            case Commit(at, end, committed_at):
                assert begun is not None
                assert (begun.lsn, begun.committed_at) == (at, committed_at)
                assert reached <= at < end
                begun, reached = None, end
            case StreamCommit(_, at, end, _):
                assert begun is None
                assert reached <= at < end
                reached = end
            case Message(_, transactional, at, _, _):
                assert at > 0
                assert transactional or at > reached
            case _:
                pass
    assert begun is None


@each_recording
def test_xids_oids_and_positions_are_those_that_the_server_told(recording: Recording) -> None:
    messages = recording.decoded()
    truths = [json.loads(m.content) for m in messages if isinstance(m, Message) and m.prefix == "truth"]
    assert bool(truths) == (recording.scenario in ("identities", "streamed"))
    for truth in truths:
        relations = {f"{m.schema}.{m.name}": m.oid for m in messages if isinstance(m, Relation)}
        assert relations[truth["relation"]] == int(truth["oid"])
        assert next(m.xid for m in messages if isinstance(m, Begin | StreamStart)) == int(truth["xid"])
        committed = next(m for m in messages if isinstance(m, Commit | StreamCommit))
        [told] = [m for m in messages if isinstance(m, Message) and m.prefix == "truth"]
        assert lsn.parse(truth["wal"]) <= told.lsn < committed.lsn


def test_the_time_of_a_commit_is_that_of_its_origin() -> None:
    # 2024-02-29 12:00:00.123456+00, by pg_replication_origin_xact_setup.
    for recording in recordings():
        if recording.scenario == "origin":
            begin = recording.decoded()[0]
            assert isinstance(begin, Begin)
            assert lsn.unix_us(begin.committed_at) == 1_709_208_000_123_456


@each_recording
def test_in_stream_follows_the_blocks(recording: Recording) -> None:
    decoder = Decoder()
    for in_stream, payload in recording.messages:
        assert decoder.in_stream == in_stream
        decoder.decode(payload)
    assert not decoder.in_stream


def test_every_scenario_is_recorded_on_every_server() -> None:
    assert [server.partition(".")[0] for server in SERVERS] == ["15", "16", "17", "18"]
    for server in SERVERS:
        assert {r.scenario for r in recordings() if r.server == server} == STORIES.keys()


def test_the_recordings_hold_every_kind_of_message() -> None:
    kinds = {type(message) for recording in recordings() for message in recording.decoded()}
    assert kinds == set(pgoutput.AnyMessage.__args__)


@each_server
def test_a_recorded_message_cut_at_any_byte_is_malformed(server: str) -> None:
    for in_stream, payload in of_server(server):
        for length in range(len(payload)):
            with pytest.raises(errors.MalformedMessage):
                decode(payload[:length], in_stream=in_stream)


@each_server
@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF], ids=hex)
def test_a_recorded_message_with_a_byte_changed_decodes_or_is_malformed(server: str, mask: int) -> None:
    for in_stream, payload in of_server(server):
        changed = bytearray(payload)
        for at in range(len(payload)):
            changed[at] ^= mask
            decodes_or_is_malformed(bytes(changed), in_stream=in_stream)
            changed[at] ^= mask


@each_server
def test_a_recorded_message_read_in_the_other_state_decodes_or_is_malformed(server: str) -> None:
    for in_stream, payload in of_server(server):
        decodes_or_is_malformed(payload, in_stream=not in_stream)


@given(
    tag=st.sampled_from(b"BCORYIUDTMSEcA").map(lambda byte: bytes([byte])) | st.binary(max_size=1),
    rest=st.lists(
        st.sampled_from([b"N", b"K", b"O", b"n", b"u", b"t\0\0\0\x01", b"\0", b"\0\x01", OID, XID, b"a\0", b"\xff"])
        | st.binary(max_size=12),
        max_size=12,
    ).map(b"".join),
    in_stream=st.booleans(),
)
def test_any_bytes_decode_or_are_malformed(tag: bytes, rest: bytes, in_stream: bool) -> None:
    decodes_or_is_malformed(tag + rest, in_stream=in_stream)


def test_a_name_that_is_not_utf8_is_taken_as_it_is() -> None:
    message = Decoder().decode(b"O" + LSN + b"caf\xe9\0")

    assert isinstance(message, Origin)
    assert message.name.encode("utf-8", "surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize(("tag", "op"), [(b"I", "insert"), (b"U", "update"), (b"D", "delete")])
@pytest.mark.parametrize("in_stream", [False, True])
def test_what_stands_for_a_row_that_is_too_large_tells_its_table(tag: bytes, op: str, *, in_stream: bool) -> None:
    decoder = pgoutput.Decoder()
    decoder.in_stream = in_stream
    xid = struct.pack(">I", 730) if in_stream else b""

    message = decoder.wide(pgoutput.WIDE + tag + xid + struct.pack(">I", 16384) + b"N\0\1t")

    assert message == pgoutput.Wide(730 if in_stream else None, 16384, op)


@pytest.mark.parametrize("rest", [b"\0\0\0\x40\0N", b"I\0\0", b""])
def test_what_stands_for_no_row_is_malformed(rest: bytes) -> None:
    with pytest.raises(errors.MalformedMessage):
        Decoder().wide(pgoutput.WIDE + rest)
