"""What the reader writes into a key is what PostgreSQL prints of each row that a loader may find by the parameter."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import execute

from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.parameters import parameter_types
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.reader.spelling import NoKey, maker
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cdc_invalidator.postgres.parameters import Types


class Mood(enum.Enum):
    sad = "sad"
    HAPPY = "happy"


class Number(enum.IntEnum):
    SEVEN = 7


class Word(enum.StrEnum):
    ADA = "Ada"


UUID = uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")
NOON = dt.datetime(2026, 1, 1, 12, 30, 5, 120_000)  # noqa: DTZ001  of a column without time zone
UTC_NOON = NOON.replace(tzinfo=dt.UTC)
TOKYO = dt.timezone(dt.timedelta(hours=9))

INTEGERS = ["7", "-7", "0", "9007199254740993"]
SPELLED_INTEGERS = [
    "7",
    "07",
    "+7",
    " 7",
    "7 ",
    "0x7",
    "7_0",
    "-7",
    "-0",
    "+0",
    "7.0",
    "7e0",
    "\u0667",
    "",
    "9007199254740993",
]
NUMBERS = ["0", "-0", "1", "1.0", "1.50", "1.5", "-2.25", "1e2", "100", "100.00", "12.345", "NaN"]
WORDS = ["Ada", "ada", "ADA", "Ada ", " Ada", "ÄDA", "ß", "SS", "a\\b", "7", "t", "sad", "", "e\u0301", "\u00e9"]
LONG = "x" * 70
DAYS = ["2026-01-01", "0099-12-31", "9999-12-31", "infinity", "0044-03-15 BC", "12026-01-01"]
SPELLED_DAYS = [
    *DAYS,
    "2026-1-1",
    "20260101",
    "2026-01-01 ",
    "01/02/2026",
    "1/1/2026",
    "2026-02-30",
    "Jan 1 2026",
    "today",
]
TIMES = [
    "2026-01-01 12:30:05.12",
    "2026-01-01 12:30:05",
    "2026-01-01 00:00:00",
    "0099-12-31 23:59:59.000001",
    "infinity",
]
SPELLED_TIMES = [
    *TIMES,
    *("2026-01-01T12:30:05.12", "2026-01-01 12:30:05.120", "2026-01-01 12:30", "2026-01-01 12:30:05Z", "2026-01-01"),
    *("2026-01-01 12:30:05.12+00", "2026-01-01T12:30:05.12Z", "2026-01-01 21:30:05.12+09", "2026-01-01 24:00:00"),
    *("2026-01-01 12:30:05.1234567", "2026-01-01 12:30:60", "2026-01-01 12:30:05+00"),
]
FLAGS = ["t", "f", "true", "True", "yes", "on", "1", "0", "F", " t"]
BYTES = [r"\x6162", r"\x", "ab", "", r"\x6A", r"\x6a", r"\152", r"\x61 62"]
UUIDS = [
    str(UUID),
    str(UUID).upper(),
    UUID.hex,
    f"{{{UUID}}}",
    f" {UUID}",
    "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
    "7",
]

# Type of the column: what rows have in it, spelled in all ways, and what is asked for besides.
COLUMNS: dict[str, tuple[list[str], list[Any]]] = {
    "smallint": (INTEGERS[:3], SPELLED_INTEGERS),
    "int": (INTEGERS[:3], SPELLED_INTEGERS),
    "bigint": (INTEGERS, SPELLED_INTEGERS),
    "oid": (["7", "0", "4294967289"], SPELLED_INTEGERS),
    "numeric": (NUMBERS, NUMBERS),
    "numeric(10,2)": (NUMBERS, NUMBERS),
    "numeric(10,0)": (NUMBERS, NUMBERS),
    "numeric(3,-2)": (["100", "1200", "0"], [*NUMBERS, "1.2e3", "149"]),
    "numeric(3,5)": (["0.00123", "0"], [*NUMBERS, "0.00123", "0.0012300", "1.23e-3"]),
    "real": (["1.5", "0", "-0", "1e20"], NUMBERS),
    "double precision": (["1.5", "0", "-0", "0.1"], NUMBERS),
    "boolean": (["t", "f"], FLAGS),
    "uuid": ([str(UUID)], UUIDS),
    "bytea": (BYTES[:3], BYTES),
    "date": (DAYS, SPELLED_DAYS),
    "timestamp": (TIMES, SPELLED_TIMES),
    "timestamp(2)": (TIMES, SPELLED_TIMES),
    "timestamptz": (TIMES, SPELLED_TIMES),
    "time": (["12:30:05.1200", "00:00"], ["12:30:05.12", "12:30:05.120", "00:00", "00:00:00"]),
    "interval": (["1 day", "24:00:00"], ["1 day", "24:00:00", "24 hours"]),
    "text": ([*WORDS, LONG], [*WORDS, LONG]),
    "varchar(80)": ([*WORDS, LONG], [*WORDS, LONG]),
    "char(5)": ([*WORDS, "abcde"], [*WORDS, "abcde", "abcde ", "abcdef", "Ada  "]),
    "bpchar": (WORDS, WORDS),
    "name": ([*WORDS, LONG], [*WORDS, LONG, LONG[:63], LONG[:64]]),
    '"char"': (["A"], ["A", "Ada"]),
    "citext": ([*WORDS, LONG], [*WORDS, LONG]),
    "mood": (["sad", "happy"], ["sad", "happy", "SAD"]),
    "jsonb": (['{"a": 1}', "1", "1.0"], ['{"a":1}', '{"a": 1}', "1", "1.0"]),
    "inet": (["10.0.0.1", "::1"], ["10.0.0.1", "10.0.0.1/32", "::1", "0:0::1"]),
    "int[]": (["{1,2}"], ["{1,2}", "{1, 2}", "{01,2}"]),
    "bit(3)": (["101"], ["101", "B101", "x5"]),
    "money": (["1.5"], ["1.5", "$1.50"]),
}
VALUES: list[Any] = [
    *(0, 1, 7, -7, 100, True, False, Number.SEVEN, 9007199254740993, 10**30),
    *map(Decimal, [*NUMBERS, "7", "7.0", "7.5", "Infinity", "1E+1000000", "0.00123"]),
    *(b"ab", b"", b"\x00\xff", bytearray(b"ab"), memoryview(b"ab"), UUID, Mood.sad, Mood.HAPPY, Word.ADA),
    *(dt.date(2026, 1, 1), dt.date(99, 12, 31), NOON, UTC_NOON, UTC_NOON.astimezone(TOKYO)),
    NOON.replace(microsecond=0),
    *(dt.datetime.min, dt.datetime.min.replace(tzinfo=TOKYO), NOON.replace(microsecond=123_456)),  # noqa: DTZ901
]  # fmt: skip

TIMED = ("timestamp", "timestamp(2)", "timestamptz")
CERTAIN = (
    *(
        "smallint",
        "int",
        "bigint",
        "numeric(10,2)",
        "numeric(10,0)",
        "numeric(3,-2)",
        "numeric(3,5)",
        "boolean",
        "uuid",
    ),
    *("bytea", "date", *TIMED, "text", "varchar(80)", "char(5)", "name", "citext", "mood"),
)

WRITTEN = [
    ("integer", 7, "7"),
    ("integer", Number.SEVEN, "7"),
    ("integer", Decimal("7.0"), "7"),
    ("integer", "7", "7"),
    ("integer", "07", None),
    ("integer", True, None),
    ("integer", Decimal("7.5"), None),
    ("integer", b"7", None),
    ("numeric(10,2)", 1, "1.00"),
    ("numeric(10,2)", Decimal("1.5"), "1.50"),
    ("numeric(10,2)", Decimal("-0"), "0.00"),
    ("numeric(10,2)", "1.50", "1.50"),
    ("numeric(10,2)", "1.5", None),
    ("numeric(10,2)", Decimal("1.005"), None),
    ("numeric(10,2)", Decimal("1E+1000000"), None),
    ("numeric(3,-2)", 1200, "1200"),
    ("numeric", 1, None),
    ("uuid", UUID, str(UUID)),
    ("uuid", str(UUID).upper(), str(UUID)),
    ("uuid", UUID.hex, None),
    ("boolean", True, "t"),
    ("boolean", 0, "f"),
    ("boolean", "true", None),
    ("bytea", b"ab", r"\x6162"),
    ("bytea", memoryview(b"ab"), r"\x6162"),
    ("bytea", "ab", None),
    ("date", dt.date(99, 12, 31), "0099-12-31"),
    ("date", "2026-01-01", "2026-01-01"),
    ("date", "2026-1-1", None),
    ("date", "2026-02-30", None),
    ("date", UTC_NOON, None),
    ("timestamp without time zone", NOON, "2026-01-01 12:30:05.12"),
    ("timestamp without time zone", UTC_NOON, None),
    ("timestamp(1) without time zone", NOON, None),
    ("timestamp with time zone", UTC_NOON.astimezone(TOKYO), "2026-01-01 12:30:05.12+00"),
    ("timestamp with time zone", "2026-01-01 12:30:05.12+00", "2026-01-01 12:30:05.12+00"),
    ("timestamp with time zone", "2026-01-01T12:30:05Z", None),
    ("timestamp with time zone", NOON, None),
    ("text", "Ada", "Ada"),
    ("text", 7, "7"),
    ("text", Mood.sad, "sad"),
    ("text", Mood.HAPPY, None),
    ("text", Word.ADA, None),
    ("text", True, None),
    ("text", b"Ada", None),
    ("text", Decimal("1E+2"), None),
    ("character varying(20)", "Ada", "Ada"),
    ("character(5)", "Ada", "Ada  "),
    ("character(5)", "Ada ", None),
    ("character(5)", "abcdef", None),
    ("bpchar", "Ada", None),
    ("enum", "sad", "sad"),
    ("name", "x" * 64, None),
    ("citext", "ada", None),
    ("text, nondeterministic", "ada", None),
    ("double precision", 1, None),
    ("jsonb", "1", None),
]


class Table:
    """A table with a column of each type; each value of a corpus is in a row of its own."""

    def __init__(self, connection: psycopg.Connection, types: Types, settings: Mapping[str, str]) -> None:
        self._connection = connection
        self._types = types["thing"]
        self._settings = settings

    def text(self, kind: str, value: Any) -> bytes | None:
        """What the reader writes; ``None``: there is no key."""
        name = _column(kind)
        try:
            return maker(name, self._types[name], self._settings, folded=kind == "citext")(value)
        except (NoKey, TypeError):
            return None

    def printed(self, kind: str, value: Any, cast: str = "") -> set[bytes]:
        """What PostgreSQL prints of the rows that a loader finds; none where it fails."""
        query = f"SELECT {_column(kind)} FROM things WHERE {_column(kind)} = %s{cast}"
        try:
            found = self._connection.execute(query.encode(), [value]).pgresult
        except (psycopg.Error, OverflowError):
            return set()
        assert found is not None
        return {found.get_value(row, 0) or b"" for row in range(found.ntuples)}


def _column(kind: str) -> str:
    return f"c{list(COLUMNS).index(kind)}"


async def _told(dsn: str) -> tuple[Types, Mapping[str, str]]:
    names = [_column(kind) for kind in COLUMNS]
    text = f"version: 1\ncaches: {{thing: {{key: 't:{':'.join(f'{{{name}}}' for name in names)}', ttl: 1m}}}}\nrules:\n"
    text += "  - {name: r, table: public.things, old_row: sweep, bust: [thing]}\n"
    source = DsnSource.fixed(dsn)
    async with await connect(source, "test") as connection:
        spelling = await Spelling.read(connection, source)
        return await parameter_types(connection, parse_rules([("rules.yaml", text)], {})), spelling.values


@contextmanager
def _table(dsn: str, date_style: str) -> Iterator[Table]:
    name = dsn.rpartition("/")[2]
    execute(
        dsn,
        "CREATE EXTENSION citext",
        "CREATE TYPE mood AS ENUM ('sad', 'happy')",
        f"CREATE TABLE things (id serial PRIMARY KEY, {', '.join(f'{_column(kind)} {kind}' for kind in COLUMNS)})",
        f"ALTER DATABASE {name} SET DateStyle = '{date_style}'",
        f"ALTER DATABASE {name} SET TimeZone = 'Etc/UTC'",
    )
    with psycopg.connect(dsn, autocommit=True) as connection:
        for kind, (rows, _) in COLUMNS.items():
            for row in rows:
                # Some are none of every type of its kind.
                with suppress(psycopg.errors.DataError):
                    connection.execute(f"INSERT INTO things ({_column(kind)}) VALUES (%s::text::{kind})", [row])
        types, settings = asyncio.run(_told(dsn))
        yield Table(connection, types, settings)


@pytest.mark.parametrize("date_style", ["ISO, MDY", "SQL, DMY", "German, DMY"])
def test_what_is_written_is_what_postgresql_prints_of_all_rows_that_are_found(database: str, date_style: str) -> None:
    wrong, found = [], Counter[str]()
    with _table(database, date_style) as table:
        for kind, (_, asked) in COLUMNS.items():
            for value in [*asked, *VALUES]:
                text = table.text(kind, value)
                if text is None:
                    continue
                # As drivers send text: of a type that is not known, or as text.
                for cast in ("", "::varchar", "::text") if isinstance(value, str) else ("",):
                    printed = table.printed(kind, value, cast)
                    if kind == "citext":
                        text, printed = text.lower(), {each.decode().lower().encode() for each in printed}
                    found[kind] += bool(printed)
                    if printed - {text}:
                        wrong.append((kind, value, cast, text, printed))
    assert wrong == []
    # Of these, something was found at all.
    assert {kind for kind in CERTAIN if not found[kind]} == set(() if date_style[:3] == "ISO" else TIMED)


@pytest.mark.parametrize(("kind", "value", "text"), WRITTEN)
def test_a_value_is_written_as_its_column_prints_it(kind: str, value: Any, text: str | None) -> None:
    settings = {"DateStyle": "ISO, MDY", "TimeZone": "UTC", "bytea_output": "hex"}
    make = maker("id", kind, settings)
    if text is not None:
        assert make(value) == text.encode()
        return
    with pytest.raises(NoKey, match="spelling") as refused:
        make(value)
    assert (
        f"parameter id has no certain text, so that each read with it loads: its type is {kind}, "
        in refused.value.sentence
    )


def test_where_letters_are_folded_by_a_filter_text_that_compares_so_has_a_key() -> None:
    assert maker("id", "citext", {}, folded=True)("ADA") == b"ADA"
    for folded, value in ((False, "ADA"), (True, "ÄDA")):
        with pytest.raises(NoKey, match="spelling"):
            maker("id", "citext", {}, folded=folded)(value)


def test_of_a_type_that_nobody_knows_nothing_has_a_key() -> None:
    with pytest.raises(NoKey, match="spelling") as refused:
        maker("id", None, {})(7)
    assert "see `check`" in refused.value.sentence
    with pytest.raises(NoKey, match="null"):
        maker("id", None, {})(None)


@pytest.mark.parametrize("kind", ["integer", "text", "numeric", None])
def test_what_is_no_parameter_at_all_is_a_mistake_of_the_program(kind: str | None) -> None:
    for value in (1.5, [1], object()):
        with pytest.raises(TypeError, match=r"parameter id is a \w+, .*; give it as text"):
            maker("id", kind, {})(value)
