"""Reads `--from-redis-dump`: the keys of an RDB file, with their types and remaining times.

The rule that holds here: a value is skipped where it stands, never decoded and never held, so that memory depends on
the sample alone, and no data of the file can get anywhere. Therefore the file's checksum is not verified either.

This reader is our own, since those that exist load each value, and leave out streams. The format is that of `rdb.h` and
`rdb.c` in Redis 6.2 to 8.6 and Valkey 7.2 to 9: after a magic number with a version, each entry begins with a byte that
is an opcode, or the type of a value; then the key follows, and the value. Only the shape of a value matters here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from io import SEEK_CUR, SEEK_END
from itertools import islice
from typing import BinaryIO, Final, NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.discovery.families import Sample
from cdc_invalidator.discovery.sampling import LONGEST_NAME, Sampled

# Bytes of a pipe that are read at once to skip them; a file is not read where it is skipped.
_STEP = 1 << 20
# Keys after which it is told how far it is.
_TOLD = 2000

# ── Shapes of values ─────────────────────────────────────────────────────────────────────────────────────────────────
# A shape is what is skipped, part by part: so many bytes; a string, a length, a double as old files write it, or the
# records of a module; or a shape in brackets, before which a length says how many of it follow.
_STRING: Final = "string"
_LENGTH: Final = "length"
_DOUBLE: Final = "double"
_RECORDS: Final = "records"
Shape = tuple["int | str | Shape", ...]

_ID: Final[Shape] = (_LENGTH, _LENGTH)


def _stream(version: int) -> Shape:
    """Return the shape of a stream: its entries, its numbers, its groups with their pending entries and consumers."""
    numbers = (_LENGTH, *_ID, *((*_ID, *_ID, _LENGTH) if version >= 2 else ()))
    consumer = (_STRING, 16 if version >= 3 else 8, (16,))
    refused: Shape = ((16,),) if version >= 5 else ()
    read = (_LENGTH,) if version >= 2 else ()
    group = (_STRING, *_ID, *read, (16 + 8, _LENGTH), consumer, *refused)
    producers = (_STRING, (_STRING, *_ID))
    idempotent = (_LENGTH, _LENGTH, producers, _LENGTH, _LENGTH) if version >= 4 else ()
    return ((_STRING, _STRING), *numbers, group, *idempotent)


class _Type(NamedTuple):
    """What TYPE says of a value, and its shape."""

    name: str
    shape: Shape


_TYPES: Final[Mapping[int, _Type]] = {
    0: _Type("string", (_STRING,)),
    1: _Type("list", ((_STRING,),)),
    2: _Type("set", ((_STRING,),)),
    3: _Type("zset", ((_STRING, _DOUBLE),)),
    4: _Type("hash", ((_STRING, _STRING),)),
    5: _Type("zset", ((_STRING, 8),)),
    7: _Type("", (_RECORDS,)),  # its name precedes
    # A string that is a zipmap, a ziplist, an intset, or a listpack.
    9: _Type("hash", (_STRING,)),
    10: _Type("list", (_STRING,)),
    11: _Type("set", (_STRING,)),
    12: _Type("zset", (_STRING,)),
    13: _Type("hash", (_STRING,)),
    14: _Type("list", ((_STRING,),)),
    15: _Type("stream", _stream(1)),
    16: _Type("hash", (_STRING,)),
    17: _Type("zset", (_STRING,)),
    18: _Type("list", ((_LENGTH, _STRING),)),
    19: _Type("stream", _stream(2)),
    20: _Type("set", (_STRING,)),
    21: _Type("stream", _stream(3)),
}
# What follows is numbered differently by the two. Hashes whose fields have times of their own come first.
_OF_REDIS: Final[Mapping[int, _Type]] = {
    22: _Type("hash", ((_LENGTH, _STRING, _STRING),)),
    23: _Type("hash", (_STRING,)),
    24: _Type("hash", (8, (_LENGTH, _STRING, _STRING))),
    25: _Type("hash", (8, _STRING)),
    26: _Type("stream", _stream(4)),
    27: _Type("stream", _stream(5)),
}
_OF_VALKEY: Final[Mapping[int, _Type]] = {22: _Type("hash", ((_STRING, _STRING, 8),))}

# Opcodes of which nothing is needed. A function is its text; the others are hints for whoever loads the file.
_SKIPPED: Final[Mapping[int, Shape]] = {
    244: (_LENGTH, _LENGTH, _LENGTH),  # SLOT_INFO
    245: (_STRING,),  # FUNCTION2
    247: (_LENGTH, _RECORDS),  # MODULE_AUX
    248: (_LENGTH,),  # IDLE
    249: (1,),  # FREQ
}
# 243 is what modules say of a key in Redis, and slots that are being imported in Valkey.
_KEY_METADATA: Final[Shape] = ((4, _RECORDS),)
_SLOT_IMPORT: Final[Shape] = (_STRING, _ID)
_AUX, _SIZES, _ENDS_MS, _ENDS_S, _DATABASE, _END = 250, 251, 252, 253, 254, 255

# What follows the opcode of a module's record; 0 ends them.
_OF_RECORD: Final[Mapping[int, Shape]] = {1: (_LENGTH,), 2: (_LENGTH,), 3: (4,), 4: (8,), 5: (_STRING,)}
_MODULE_SIGNS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class Key(NamedTuple):
    """A key of the file.

    ``name``: ``None`` if it has more than `LONGEST_NAME` bytes; ``type``: as TYPE says; ``ends``: when it expires, in
    milliseconds since 1970, ``None`` for never.
    """

    database: int
    name: bytes | None
    type: str
    ends: int | None


class Dump:
    """An RDB file, to be read once, from its beginning.

    ``saved``: when it was made, in seconds since 1970, as it says itself before its first key; ``sizes``: by database,
    how many keys it says there are.

    Args:
        file: the file.
        name: its name, for errors.

    Raises:
        errors.WrongSettings: it is no RDB file.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._size = _size(file)
        self.saved: int | None = None
        self.sizes: Counter[int] = Counter()
        self._version = b""
        self._types = dict(_TYPES)
        self._skipped = dict(_SKIPPED)
        self._begin()

    def read(self) -> Iterator[Key]:
        """Yield the keys.

        Raises:
            errors.WrongSettings: it ends too early, or holds what is not known here.
        """
        database = 0
        ends: int | None = None
        while True:
            code = self._byte()
            if code in self._types:
                yield self._key(database, self._types[code], ends)
                ends = None
            elif code in self._skipped:
                self._skip_all(self._skipped[code])
            elif code == _AUX:
                self._note(self._string(), self._string())
            elif code == _SIZES:
                self.sizes[database] += self._length()
                self._length()
            elif code == _ENDS_MS:
                ends = int.from_bytes(self._take(8), "little", signed=True)
            elif code == _ENDS_S:
                ends = 1000 * int.from_bytes(self._take(4), "little", signed=True)
            elif code == _DATABASE:
                database = self._length()
            elif code == _END:
                # Its checksum; files of before Redis 2.6 have none.
                self._skip(8 if self._version >= b"0005" else 0)
                return
            else:
                raise self._unknown(f"an entry of type {code}")

    def _begin(self) -> None:
        magic = self._file.read(9)
        if magic[:5] == b"REDIS" and magic[5:].isdigit() and len(magic) == 9:
            self._types |= _OF_REDIS
            self._skipped[243] = _KEY_METADATA
        elif magic[:6] == b"VALKEY" and magic[6:].isdigit() and len(magic) == 9:
            self._types |= _OF_VALKEY
            self._skipped[243] = _SLOT_IMPORT
        else:
            raise errors.WrongSettings(
                f"{self._name} is no RDB file, since it does not begin with REDIS or VALKEY and a version; give the "
                "file that BGSAVE or `redis-cli --rdb` writes, as it is, not compressed."
            )
        self._version = magic[-4:].replace(b"Y", b"0")

    def _key(self, database: int, kind: _Type, ends: int | None) -> Key:
        name = self._string()
        type_name = kind.name or self._module()
        self._skip_all(kind.shape)
        return Key(database, name, type_name, ends)

    def _module(self) -> str:
        """Return the name of a module's type: nine signs of 6 bits each, before 10 bits for a version."""
        number = self._length()
        return "".join(_MODULE_SIGNS[number >> shift & 63] for shift in range(58, 9, -6))

    def _note(self, name: bytes | None, value: bytes | None) -> None:
        if name == b"ctime" and value is not None and value.isdigit():
            self.saved = int(value)

    # ── What is skipped ──

    def _skip_all(self, shape: Shape) -> None:
        for part in shape:
            if part == _STRING:
                self._skip_string()
            elif part == _LENGTH:
                self._length()
            elif isinstance(part, int):
                self._skip(part)
            elif isinstance(part, tuple):
                for _ in range(self._length()):
                    self._skip_all(part)
            elif part == _DOUBLE:
                # Its length; from 253 on it is not a number, or infinite.
                size = self._byte()
                self._skip(size if size < 253 else 0)
            else:
                self._skip_records()

    def _skip_records(self) -> None:
        while opcode := self._length():
            if opcode not in _OF_RECORD:
                raise self._unknown(f"a module's record of type {opcode}")
            self._skip_all(_OF_RECORD[opcode])

    def _skip_string(self) -> None:
        size, encoded = self._prefix()
        if not encoded:
            self._skip(size)
        elif size < 3:
            self._skip(1 << size)
        elif size == 3:
            packed = self._length()
            self._length()
            self._skip(packed)
        else:
            raise self._unknown(f"a string of encoding {size}")

    # ── What is read ──

    def _string(self) -> bytes | None:
        """Return a string; ``None`` if it is longer than names are."""
        size, encoded = self._prefix()
        if not encoded:
            if size > LONGEST_NAME:
                self._skip(size)
                return None
            return self._take(size)
        if size < 3:
            return b"%d" % int.from_bytes(self._take(1 << size), "little", signed=True)
        if size > 3:
            raise self._unknown(f"a string of encoding {size}")
        packed, whole = self._length(), self._length()
        if whole > LONGEST_NAME or packed > whole:
            self._skip(packed)
            return None
        text = _unpacked(self._take(packed))
        if len(text) != whole:
            raise self._unknown("a text that can't be decompressed")
        return text

    def _length(self) -> int:
        size, encoded = self._prefix()
        if encoded:
            raise self._unknown("a text in place of a length")
        return size

    def _prefix(self) -> tuple[int, bool]:
        """Return a length, or the number of an encoding and ``True``."""
        first = self._byte()
        if first < 64:
            return first, False
        if first < 128:
            return (first & 63) << 8 | self._byte(), False
        if first >= 192:
            return first & 63, True
        if first > 129:
            raise self._unknown(f"a length of kind {first}")
        return int.from_bytes(self._take(4 if first == 128 else 8), "big"), False

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, size: int) -> bytes:
        found = self._file.read(size)
        if len(found) < size:
            raise self._truncated()
        return found

    def _skip(self, size: int) -> None:
        if self._size is not None:
            if size > self._size or self._file.seek(size, SEEK_CUR) > self._size:
                raise self._truncated()
            return
        while size:
            found = len(self._file.read(min(size, _STEP)))
            if not found:
                raise self._truncated()
            size -= found

    # ── What is wrong ──

    def _truncated(self) -> errors.WrongSettings:
        return errors.WrongSettings(
            f"{self._name} ends too early, so it is only a part of an RDB file; copy it again, or make a new one with "
            "`redis-cli --rdb FILE`."
        )

    def _unknown(self, what: str) -> errors.WrongSettings:
        at = "" if self._size is None else f" before byte {self._file.tell():,}"
        version = self._version.lstrip(b"0").decode()
        return errors.WrongSettings(
            f"{self._name} has {what}{at}, which is not known here (RDB version {version}): it is of a newer server or "
            "another product, or damaged; give the names of the keys with --keys instead."
        )


def sample(file: BinaryIO, name: str, database: int, most: int, tell: Callable[[int, int | None], None]) -> Sampled:
    """Look at the keys of one database. Keys that had expired when the file was made are left out.

    A server writes the keys in the order of their hashes, so those that come first are as good a sample as any.

    Args:
        file: an RDB file.
        name: its name, for errors.
        database: the number of the database.
        most: how many keys; 0 for all.
        tell: is called now and then with how many keys were seen, and how many there are.

    Raises:
        errors.WrongSettings: it is no RDB file, or not a whole one, or it has keys, but none in this database.
    """
    dump = Dump(file, name)
    found = Sampled()
    others: Counter[int] = Counter()
    now: int | None = None
    for key in dump.read():
        if now is None:
            now = 1000 * dump.saved if dump.saved is not None else round(time.time() * 1000)
        if key.database != database:
            others[key.database] += 1
        elif key.ends is None or key.ends > now:
            if key.name is None:
                found.long += 1
            else:
                left = None if key.ends is None else (key.ends - now) / 1000
                found.samples.append(Sample(key.name, key.type, left))
        seen = len(found.samples) + found.long
        if (seen + others.total()) % _TOLD == 0:
            tell(seen, dump.sizes.get(database))
        if seen == most and most:
            found.all_keys = dump.sizes.get(database)
            return found
    found.all_keys = len(found.samples) + found.long
    if others and not found.all_keys:
        numbers = ", ".join(map(str, sorted(others)[:8]))
        raise errors.WrongSettings(f"{name} has no keys in database {database}; give one of {numbers} as --database.")
    return found


def _size(file: BinaryIO) -> int | None:
    """Return the size of a file; ``None`` for a pipe."""
    if not file.seekable():
        return None
    at = file.tell()
    size = file.seek(0, SEEK_END)
    file.seek(at)
    return size


def _unpacked(packed: bytes) -> bytes:
    """Return what LZF has compressed: runs of bytes, and references to bytes before; empty if it is damaged."""
    text = bytearray()
    signs = iter(packed)
    for control in signs:
        if control < 32:
            text += bytes(islice(signs, control + 1))
            continue
        count = (control >> 5) + 2
        if count == 9:
            count += next(signs, 0)
        begin = len(text) - ((control & 31) << 8) - next(signs, 0) - 1
        if begin < 0:
            return b""
        # It may go on into what it adds.
        for at in range(begin, begin + count):
            text.append(text[at])
    return bytes(text)
