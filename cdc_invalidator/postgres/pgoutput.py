"""pgoutput messages, protocol versions 1 and 2: bytes in, tuples out. Knows no socket and no clock.

Follows https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html. Whatever the bytes are, the
outcome is a message or `errors.MalformedMessage`: every message must end exactly where its payload ends, so a cut at
any byte is found.

A row's values are a list with one entry a column: text form in the client encoding (we ask for UTF-8), ``None`` for
NULL, or `UNCHANGED` for a TOAST value that the UPDATE did not touch and the server therefore does not send.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from cdc_invalidator import errors
from cdc_invalidator.rules.values import UNCHANGED, Row


class Begin(NamedTuple):
    """Start of a committed transaction. ``lsn`` is that of its commit record; times are µs since 2000."""

    lsn: int
    committed_at: int
    xid: int


class Commit(NamedTuple):
    """End of a transaction. Confirming ``end_lsn`` says that it need not be sent again."""

    lsn: int
    end_lsn: int
    committed_at: int


class Origin(NamedTuple):
    """The transaction came to this server by replication from ``name``."""

    lsn: int
    name: str


class Column(NamedTuple):
    """One column of a relation; ``is_key``: the replica identity carries it."""

    name: str
    is_key: bool
    type_oid: int
    type_modifier: int


class Relation(NamedTuple):
    """A table's shape, sent before its first change and after each change of shape.

    ``identity``: d (primary key), n (nothing), f (full), i (an index).
    """

    xid: int | None
    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]


class Type(NamedTuple):
    """A column's type that is not built in."""

    xid: int | None
    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    """A new row."""

    xid: int | None
    oid: int
    new: Row


class Update(NamedTuple):
    """A changed row.

    ``old_kind``: K, only the identity's columns of ``old`` are given (the others read as None, which is not NULL);
    O, all are; empty, there is no ``old`` because the identity's columns did not change.
    """

    xid: int | None
    oid: int
    old_kind: str
    old: Row | None
    new: Row


class Delete(NamedTuple):
    """A deleted row; ``old_kind`` as in `Update`, never empty."""

    xid: int | None
    oid: int
    old_kind: str
    old: Row


class Truncate(NamedTuple):
    """Tables emptied by one TRUNCATE."""

    xid: int | None
    oids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class Wide(NamedTuple):
    """A row that is too large to be held: only its table and the kind of change are known. See `replication`."""

    xid: int | None
    oid: int
    op: str


class Message(NamedTuple):
    """What pg_logical_emit_message wrote."""

    xid: int | None
    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class StreamStart(NamedTuple):
    """A block of changes of a transaction in progress follows; ``first``: its first block."""

    xid: int
    first: bool


class StreamStop(NamedTuple):
    """End of the block."""


class StreamCommit(NamedTuple):
    """The streamed transaction committed."""

    xid: int
    lsn: int
    end_lsn: int
    committed_at: int


class StreamAbort(NamedTuple):
    """The streamed transaction, or only its subtransaction ``subxid``, was rolled back."""

    xid: int
    subxid: int


Change: TypeAlias = Insert | Update | Delete | Truncate
AnyMessage: TypeAlias = (
    Begin | Commit | Origin | Relation | Type | Change | Message | StreamStart | StreamStop | StreamCommit | StreamAbort
)

WIDE = b"w"
"""The tag of `Wide`, which no server sends; the message's own tag and its beginning follow."""
_OPS = {ord("I"): "insert", ord("U"): "update", ord("D"): "delete"}

_U16 = struct.Struct(">H").unpack_from
_U32 = struct.Struct(">I").unpack_from
_U64 = struct.Struct(">Q").unpack_from
_BEGIN = struct.Struct(">QqI").unpack_from
_COMMIT = struct.Struct(">BQQq").unpack_from
_COLUMN_TYPE = struct.Struct(">Ii").unpack_from
_TRUNCATE = struct.Struct(">IB").unpack_from
_MESSAGE = struct.Struct(">BQ").unpack_from
_STREAM_COMMIT = struct.Struct(">IBQQq").unpack_from
_STREAM_ABORT = struct.Struct(">II").unpack_from

_NULL, _UNCHANGED_TOAST, _TEXT = b"nut"
_OLD_KEY, _OLD_ROW, _NEW = b"KON"


class Decoder:
    """Turns one payload at a time into a message. Keeps one bit of state: whether a streamed block is open.

    Inside such a block, every message about rows carries the id of its (sub)transaction (protocol version 2).
    """

    def __init__(self) -> None:
        self.in_stream = False
        self._decode: dict[int, Callable[[bytes, int], tuple[AnyMessage, int]]] = {
            ord("B"): self._begin,
            ord("C"): self._commit,
            ord("O"): self._origin,
            ord("R"): self._relation,
            ord("Y"): self._type,
            ord("I"): self._insert,
            ord("U"): self._update,
            ord("D"): self._delete,
            ord("T"): self._truncate,
            ord("M"): self._message,
            ord("S"): self._stream_start,
            ord("E"): self._stream_stop,
            ord("c"): self._stream_commit,
            ord("A"): self._stream_abort,
        }

    def decode(self, data: bytes, start: int = 0) -> AnyMessage:
        """Decode one message.

        Args:
            data: bytes that hold the payload of one XLogData message.
            start: where in them the payload begins; it ends where they end.

        Raises:
            errors.MalformedMessage: they are not a pgoutput message of protocol version 1 or 2.
        """
        try:
            message, end = self._decode[data[start]](data, start + 1)
        except (struct.error, IndexError, KeyError, ValueError) as error:
            raise _malformed(data, start, f"{type(error).__name__}: {error}") from error
        if end != len(data):
            raise _malformed(data, start, f"it should end after {end - start} bytes")
        return message

    def wide(self, data: bytes, start: int = 0) -> Wide:
        """Decode what stands for a row that is too large: `WIDE` and the beginning of its message.

        Raises:
            errors.MalformedMessage: it is no row's message.
        """
        try:
            xid, pos = self._xid(data, start + 2)
            return Wide(xid, _U32(data, pos)[0], _OPS[data[start + 1]])
        except (struct.error, IndexError, KeyError) as error:
            raise _malformed(data, start, f"{type(error).__name__}: {error}") from error

    def _xid(self, data: bytes, pos: int) -> tuple[int | None, int]:
        if self.in_stream:
            return _U32(data, pos)[0], pos + 4
        return None, pos

    def _begin(self, data: bytes, pos: int) -> tuple[Begin, int]:
        return Begin(*_BEGIN(data, pos)), pos + 20

    def _commit(self, data: bytes, pos: int) -> tuple[Commit, int]:
        flags, lsn, end_lsn, committed_at = _COMMIT(data, pos)
        if flags:
            raise ValueError("unknown commit flags")
        return Commit(lsn, end_lsn, committed_at), pos + 25

    def _origin(self, data: bytes, pos: int) -> tuple[Origin, int]:
        (lsn,) = _U64(data, pos)
        name, pos = _string(data, pos + 8)
        return Origin(lsn, name), pos

    def _relation(self, data: bytes, pos: int) -> tuple[Relation, int]:
        xid, pos = self._xid(data, pos)
        (oid,) = _U32(data, pos)
        schema, pos = _string(data, pos + 4)
        name, pos = _string(data, pos)
        identity = chr(data[pos])
        if identity not in "dnfi":
            raise ValueError("unknown replica identity")
        (count,) = _U16(data, pos + 1)
        pos += 3
        columns = []
        for _ in range(count):
            flags = data[pos]
            if flags > 1:
                raise ValueError("unknown column flags")
            column, pos = _string(data, pos + 1)
            columns.append(Column(column, flags == 1, *_COLUMN_TYPE(data, pos)))
            pos += 8
        # PostgreSQL leaves the schema of pg_catalog empty.
        return Relation(xid, oid, schema or "pg_catalog", name, identity, tuple(columns)), pos

    def _type(self, data: bytes, pos: int) -> tuple[Type, int]:
        xid, pos = self._xid(data, pos)
        (oid,) = _U32(data, pos)
        schema, pos = _string(data, pos + 4)
        name, pos = _string(data, pos)
        return Type(xid, oid, schema or "pg_catalog", name), pos

    def _insert(self, data: bytes, pos: int) -> tuple[Insert, int]:
        xid, pos = self._xid(data, pos)
        (oid,) = _U32(data, pos)
        if data[pos + 4] != _NEW:
            raise ValueError("an Insert without its new row")
        new, pos = _row(data, pos + 5)
        return Insert(xid, oid, new), pos

    def _update(self, data: bytes, pos: int) -> tuple[Update, int]:
        xid, pos = self._xid(data, pos)
        (oid,) = _U32(data, pos)
        kind = data[pos + 4]
        pos += 5
        old, old_kind = None, ""
        if kind in (_OLD_KEY, _OLD_ROW):
            old_kind = chr(kind)
            old, pos = _row(data, pos)
            kind = data[pos]
            pos += 1
        if kind != _NEW:
            raise ValueError("an Update without its new row")
        new, pos = _row(data, pos)
        return Update(xid, oid, old_kind, old, new), pos

    def _delete(self, data: bytes, pos: int) -> tuple[Delete, int]:
        xid, pos = self._xid(data, pos)
        (oid,) = _U32(data, pos)
        kind = data[pos + 4]
        if kind not in (_OLD_KEY, _OLD_ROW):
            raise ValueError("a Delete without its old row")
        old, pos = _row(data, pos + 5)
        return Delete(xid, oid, chr(kind), old), pos

    def _truncate(self, data: bytes, pos: int) -> tuple[Truncate, int]:
        xid, pos = self._xid(data, pos)
        count, options = _TRUNCATE(data, pos)
        if options > 3:
            raise ValueError("unknown TRUNCATE options")
        pos += 5
        end = pos + 4 * count
        if end != len(data):
            raise ValueError("a Truncate of another length than its count says")
        oids = tuple(_U32(data, at)[0] for at in range(pos, end, 4))
        return Truncate(xid, oids, bool(options & 1), bool(options & 2)), end

    def _message(self, data: bytes, pos: int) -> tuple[Message, int]:
        xid, pos = self._xid(data, pos)
        flags, lsn = _MESSAGE(data, pos)
        if flags > 1:
            raise ValueError("unknown message flags")
        prefix, pos = _string(data, pos + 9)
        (length,) = _U32(data, pos)
        pos += 4
        content = data[pos : pos + length]
        return Message(xid, flags == 1, lsn, prefix, content), pos + length

    def _stream_start(self, data: bytes, pos: int) -> tuple[StreamStart, int]:
        if self.in_stream:
            raise ValueError("a Stream Start inside a streamed block")
        (xid,) = _U32(data, pos)
        first = data[pos + 4]
        if first > 1 or pos + 5 != len(data):
            raise ValueError("a Stream Start of another form")
        self.in_stream = True
        return StreamStart(xid, first == 1), pos + 5

    def _stream_stop(self, data: bytes, pos: int) -> tuple[StreamStop, int]:
        if not self.in_stream or pos != len(data):
            raise ValueError("a Stream Stop outside a streamed block")
        self.in_stream = False
        return StreamStop(), pos

    def _stream_commit(self, data: bytes, pos: int) -> tuple[StreamCommit, int]:
        xid, flags, lsn, end_lsn, committed_at = _STREAM_COMMIT(data, pos)
        if flags:
            raise ValueError("unknown commit flags")
        return StreamCommit(xid, lsn, end_lsn, committed_at), pos + 29

    def _stream_abort(self, data: bytes, pos: int) -> tuple[StreamAbort, int]:
        return StreamAbort(*_STREAM_ABORT(data, pos)), pos + 8


def _string(data: bytes, pos: int) -> tuple[str, int]:
    end = data.index(0, pos)
    # A SQL_ASCII database may hold names and prefixes in any encoding, and the server converts none of them.
    return data[pos:end].decode("utf-8", "surrogateescape"), end + 1


def _row(data: bytes, pos: int) -> tuple[Row, int]:
    # The hot loop. Lengths are read unsigned and slices may fall short: either leads past the end, which decode sees.
    (count,) = _U16(data, pos)
    pos += 2
    row: Row = []
    append = row.append
    for _ in range(count):
        kind = data[pos]
        if kind == _TEXT:
            start = pos + 5
            pos = start + _U32(data, pos + 1)[0]
            append(data[start:pos])
        elif kind == _NULL:
            append(None)
            pos += 1
        elif kind == _UNCHANGED_TOAST:
            append(UNCHANGED)
            pos += 1
        else:
            raise ValueError("a column of unknown kind")
    return row, pos


def _malformed(data: bytes, start: int, reason: str) -> errors.MalformedMessage:
    # No content of the message: it may hold row values (promise 8).
    tag = data[start : start + 1]
    return errors.MalformedMessage(
        f"A replication message with tag {tag!r} and {len(data) - start} bytes is not pgoutput ({reason}); "
        "report it with the server's version."
    )
