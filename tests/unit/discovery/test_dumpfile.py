"""RDB files: those that servers of two versions wrote, and, as bytes, what no server here writes."""

from __future__ import annotations

import os
import tracemalloc
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cdc_invalidator import errors
from cdc_invalidator.discovery.dumpfile import Dump, Key, sample
from cdc_invalidator.discovery.families import Sample

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DUMPS = Path(__file__).parent / "dumps"
# 2100-01-01
LATER = 4_102_444_800_000
LONG = "user:profile:settings:" * 3 + "7"

OF_BOTH = {
    "ends": ("string", LATER + 123),
    "hash": ("hash", None),
    "hash:ends": ("hash", LATER),
    "hash:fields": ("hash", None),
    "hash:fields:large": ("hash", None),
    "hash:large": ("hash", None),
    "list": ("list", None),
    "list:large": ("list", None),
    "long": ("string", None),
    LONG: ("string", None),
    "number": ("string", None),
    "set": ("set", None),
    "set:integers": ("set", None),
    "set:large": ("set", None),
    "stream": ("stream", None),
    "text": ("string", None),
    "zset": ("zset", None),
    "zset:large": ("zset", None),
}
OF_MODULES = {
    "module:bloom": ("MBbloom--", None),
    "module:json": ("ReJSON-RL", None),
    "module:series": ("TSDB-TYPE", None),
    "module:sketch": ("CMSk-TYPE", None),
    "module:top": ("TopK-TYPE", None),
}


@pytest.mark.parametrize(("server", "expected"), [("redis-7.4", OF_BOTH | OF_MODULES), ("redis-8.2", OF_BOTH)])
def test_a_file_of_a_server_is_read(server: str, expected: dict[str, tuple[str, int | None]]) -> None:
    with (DUMPS / f"{server}.rdb").open("rb") as file:
        keys = list(Dump(file, "dump.rdb").read())
        assert file.read() == b""
    assert {(key.name or b"").decode(): (key.type, key.ends) for key in keys if key.database == 0} == expected
    assert [(key.database, key.name) for key in keys if key.database] == [(2, b"elsewhere")]


def test_a_pipe_is_read_like_a_file() -> None:
    text = (DUMPS / "redis-7.4.rdb").read_bytes()
    out, into = os.pipe()
    with os.fdopen(out, "rb") as file, os.fdopen(into, "wb") as writer:
        writer.write(text)
        writer.close()
        assert list(Dump(file, "dump.rdb").read()) == list(Dump(BytesIO(text), "dump.rdb").read())
    out, into = os.pipe()
    with os.fdopen(out, "rb") as file, os.fdopen(into, "wb") as writer:
        writer.write(text[:5000])
        writer.close()
        with pytest.raises(errors.WrongSettings, match="ends too early"):
            list(Dump(file, "dump.rdb").read())


# What no server here writes: a value, or an entry, and behind it a key that must be found

BEHIND = b"\x00\x06behind\x02of"
END = b"\xff" + bytes(8)
ID = b"\x42\x00\x03"  # a stream's: a millisecond and a number, as lengths
RAW_ID = bytes(16)
ENTRIES = b"\x01\x10" + RAW_ID + b"\x04pack"
NUMBERS = b"\x01" + ID
NUMBERS_2 = NUMBERS + ID + ID + b"\x01"
PENDING = b"\x01" + RAW_ID + bytes(8) + b"\x05"
OWNED = b"\x01" + RAW_ID
# From 8.6 on: entries, numbers, and a group with what is pending and one consumer.
GROUP = ENTRIES + NUMBERS_2 + b"\x01\x05group" + ID + b"\x01" + PENDING + b"\x01\x03own" + bytes(16) + OWNED
IDEMPOTENT = b"\x40\x64\x0a" + b"\x01\x03pid\x02" + (b"\x03iid" + ID) * 2 + b"\x02\x00"
RECORDS = b"\x01\x07\x02\x40\x80\x03" + bytes(4) + b"\x04" + bytes(8) + b"\x05\x03abc\x00"
MODULE_ID = b"\x81" + (((0 << 48 | 1) << 10) | 3).to_bytes(8, "big")

OF_REDIS = {
    "list of strings": (1, b"\x02\x01a\xc0\x05", "list"),
    "zset with old doubles": (3, b"\x04\x01a\x031.5\x01b\xfd\x01c\xfe\x01d\xff", "zset"),
    "zipmap": (9, b"\x03abc", "hash"),
    "ziplists": (14, b"\x02\x03abc\xc3\x02\x05ab", "list"),
    "hash with ends of 7.4-rc": (22, b"\x01\x00\x01f\x01v", "hash"),
    "packed hash with ends of 7.4-rc": (23, b"\x03abc", "hash"),
    "hash with ends": (24, bytes(8) + b"\x02\x00\x01f\x01v\x40\xff\x01g\x01v", "hash"),
    "packed hash with ends": (25, bytes(8) + b"\x03abc", "hash"),
    "stream of 5.0": (
        15,
        ENTRIES + NUMBERS + b"\x01\x05group" + ID + PENDING + b"\x01\x03own" + bytes(8) + OWNED,
        "stream",
    ),
    "stream of 7.0": (
        19,
        ENTRIES + NUMBERS_2 + b"\x01\x05group" + ID + b"\x01" + PENDING + b"\x01\x03own" + bytes(8) + OWNED,
        "stream",
    ),
    "stream of 8.6": (
        26,
        GROUP + IDEMPOTENT,
        "stream",
    ),
    "stream with refused entries": (
        27,
        GROUP + b"\x01" + RAW_ID + IDEMPOTENT,
        "stream",
    ),
    "module": (7, MODULE_ID + RECORDS, "AAAAAAAAB"),
}
OF_VALKEY = {"hash with ends": (22, b"\x02\x01f\x01v" + b"\xff" * 8 + b"\x01g\x01v" + bytes(8), "hash")}


@pytest.mark.parametrize(
    ("magic", "number", "value", "kind"),
    [
        *(pytest.param(b"REDIS0014", *given, id=name) for name, given in OF_REDIS.items()),
        *(pytest.param(b"VALKEY080", *given, id=f"{name} of Valkey") for name, given in OF_VALKEY.items()),
    ],
)
def test_a_value_is_skipped_to_its_end(magic: bytes, number: int, value: bytes, kind: str) -> None:
    text = magic + bytes([number]) + b"\x03key" + value + BEHIND + END
    assert [(key.name, key.type) for key in read(text)] == [(b"key", kind), (b"behind", "string")]


@pytest.mark.parametrize(
    ("magic", "entry"),
    [
        pytest.param(b"REDIS0011", b"\xf8\x40\xff", id="idle time"),
        pytest.param(b"REDIS0011", b"\xf9\x07", id="frequency"),
        pytest.param(b"REDIS0012", b"\xf4\x01\x02\x03", id="slot"),
        pytest.param(b"REDIS0011", b"\xf7" + MODULE_ID + b"\x02\x01" + RECORDS, id="of a module"),
        pytest.param(b"REDIS0013", b"\xf3\x02" + (bytes(4) + RECORDS) * 2, id="metadata of the next key"),
        pytest.param(b"VALKEY080", b"\xf3\x03job\x02\x01\x02\x40\xff\x41\x00", id="slots that are imported"),
    ],
)
def test_an_entry_that_is_no_key_is_skipped(magic: bytes, entry: bytes) -> None:
    assert [key.name for key in read(magic + entry + BEHIND + END)] == [b"behind"]


def test_an_old_time_in_seconds_is_a_time_and_holds_for_one_key() -> None:
    first, second = read(b"REDIS0003\xfd" + (100).to_bytes(4, "little") + b"\x00\x01a\x01b" + BEHIND + b"\xff")
    assert (first.ends, second.ends) == (100_000, None)


def read(text: bytes) -> list[Key]:
    return list(Dump(BytesIO(text), "dump.rdb").read())


# What is refused


@pytest.mark.parametrize(
    "text", [b"", b"REDIS", b"REDISxxxx", b"VALKEY", b"\x1f\x8b\x08 compressed", b"*3\r\n$3\r\nSET\r\n"]
)
def test_another_file_is_refused(text: bytes) -> None:
    with pytest.raises(errors.WrongSettings, match=r"^dump.rdb is no RDB file, since it does not begin with REDIS"):
        Dump(BytesIO(text), "dump.rdb")


@pytest.mark.parametrize(
    ("rest", "what"),
    [
        (b"\x06\x03key", "an entry of type 6"),
        (b"\x1c\x03key", "an entry of type 28"),
        (b"\x00\xc4", "a string of encoding 4"),
        (b"\x00\x03key\xc9", "a string of encoding 9"),
        (b"\x01\x03key\xc0", "a text in place of a length"),
        (b"\x01\x03key\x8f", "a length of kind 143"),
        (b"\x07\x03key" + MODULE_ID + b"\x09", "a module's record of type 9"),
        (b"\x00\xc3\x02\x0a\x20\x00", "a text that can't be decompressed"),
        (b"\x00\xc3\x01\x0a\xff", "a text that can't be decompressed"),
    ],
)
def test_what_is_not_known_is_refused_with_its_place(rest: bytes, what: str) -> None:
    with pytest.raises(errors.WrongSettings) as refused:
        read(b"REDIS0012" + rest + bytes(20))
    assert str(refused.value).startswith(f"dump.rdb has {what} before byte ")
    assert "(RDB version 12)" in str(refused.value)
    assert "key " not in str(refused.value).partition(";")[0]


@pytest.mark.parametrize("size", [b"\x81\xff\xff\xff\xff\xff\xff\xff\xff", b"\x80\xff\xff\xff\xff", b"\x7f\xff"])
def test_a_length_beyond_the_end_is_an_end_too_early(size: bytes) -> None:
    for text in (b"\x00" + size, b"\x00\x01a" + size, b"\x01\x01a" + size, b"\x0f\x01a" + size):
        with pytest.raises(errors.WrongSettings, match="ends too early"):
            read(b"REDIS0011" + text + b"\x00" * 9)


def test_a_database_without_keys_is_refused_where_others_have_some() -> None:
    with (DUMPS / "redis-8.2.rdb").open("rb") as file, pytest.raises(errors.WrongSettings) as refused:
        sample(file, "dump.rdb", 1, 0, lambda *_: None)
    assert str(refused.value) == "dump.rdb has no keys in database 1; give one of 0, 2 as --database."
    assert sample(BytesIO(b"REDIS0011" + END), "dump.rdb", 0, 0, lambda *_: None).samples == []


def test_a_key_that_had_expired_when_the_file_was_made_is_left_out() -> None:
    made = b"\xfa\x05ctime\xc2" + (1_000).to_bytes(4, "little")
    keys = b"".join(
        b"\xfc" + at.to_bytes(8, "little") + b"\x00\x01" + name + b"\x01v"
        for name, at in ((b"a", 999_000), (b"b", 1_002_500))
    )
    found = sample(BytesIO(b"REDIS0011" + made + keys + END), "dump.rdb", 0, 0, lambda *_: None)
    assert found.samples == [Sample(b"b", "string", 2.5)]
    assert found.complete


class Pipe(RawIOBase):
    """A pipe that gives some bytes, or so many zeros, part by part."""

    def __init__(self, *parts: bytes | int) -> None:
        self._parts = list(parts)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        if not self._parts:
            return 0
        part = self._parts.pop(0)
        count = min(len(target), part if isinstance(part, int) else len(part))
        target[:count] = bytes(count) if isinstance(part, int) else part[:count]
        left = part - count if isinstance(part, int) else part[count:]
        if left:
            self._parts.insert(0, left)
        return count


def test_memory_does_not_grow_with_a_value_of_a_pipe() -> None:
    size = 300_000_000
    pipe = Pipe(b"REDIS0011\x00\x01a\x80" + size.to_bytes(4, "big"), size, BEHIND + END)
    tracemalloc.start()
    assert [key.name for key in Dump(BufferedReader(pipe), "dump.rdb").read()] == [b"a", b"behind"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
