"""Values come back as what was stored, or are not stored."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import math
import pickle
import subprocess
import sys
import typing
import uuid
from typing import Any

import msgspec
import pydantic
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator.reader import (
    BYTES,
    JSON,
    ROWS,
    TEXT,
    Options,
    Serializer,
    Unstorable,
    serializer_of,
    unsafe_pickle,
)
from cdc_invalidator.reader.serializers import difference, digest, form_of, written


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    city: str
    since: dt.date


class Plan(enum.StrEnum):
    PRO = "pro"


class User(pydantic.BaseModel):
    id: uuid.UUID
    at: dt.datetime
    price: decimal.Decimal
    places: list[Place] = []
    plan: Plan = Plan.PRO
    name: str = pydantic.Field(default="", alias="userName")

    @pydantic.computed_field
    def label(self) -> str:
        return f"{self.name} of {self.plan}"


class Point(typing.NamedTuple):
    x: int
    y: float


class Row(typing_extensions.TypedDict):  # pydantic wants it below Python 3.12
    id: int
    at: dt.datetime


class Order(msgspec.Struct):
    id: int
    at: dt.datetime
    lines: list[tuple[str, decimal.Decimal]]
    weight: float = math.nan


AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
ROME = Place("Rome", AT.date())
USER = User(id=uuid.UUID(int=7), at=AT, price=decimal.Decimal("9.90"), places=[ROME], userName="Ada")


# ── What comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("serializer", "value"),
    [
        *[(JSON, value) for value in (False, 0, "", [], [None], {}, 2**63 - 1, "a\0b", {"a": [1, 1.5, {"b": None}]})],
        *[
            (ROWS, value)
            for value in ((1, AT.date()), {1: "a"}, {"!": 1}, {"!": ["int", "7"]}, 2**70, math.nan, {b"x"})
        ],
        (ROWS, {"at": AT, "price": decimal.Decimal("1.50"), "id": uuid.UUID(int=7), "took": dt.timedelta(days=-1)}),
        (TEXT, ""),
        (TEXT, "Ada Ü\n"),
        (BYTES, b""),
        (BYTES, b"\0\n"),
        (serializer_of(User), USER),
        (serializer_of(list[User]), [USER, USER]),
        (serializer_of(Place), ROME),
        (serializer_of(Point), Point(1, 2.0)),
        (serializer_of(Row), {"id": 1, "at": AT}),
        (serializer_of(Order), Order(1, AT, [("a", decimal.Decimal("1.50"))])),
        (serializer_of(tuple[int, str]), (1, "a")),
        (serializer_of(dict[int, Place]), {1: ROME}),
        (serializer_of(frozenset[int]), frozenset({1, 2})),
        (serializer_of(int | str), "a"),
        (serializer_of(str), "Ada"),
        (serializer_of(bytes), b"Ada"),
        (unsafe_pickle(), {1: {AT, Plan.PRO}}),
        (unsafe_pickle(Place), ROME),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back_as_what_was_stored(serializer: Serializer[Any], value: Any) -> None:
    payload = written(serializer, value)
    assert payload
    assert difference(value, serializer.loads(payload)) == ""


class Secret(pydantic.BaseModel):
    password: pydantic.SecretStr


class Excluding(pydantic.BaseModel):
    token: str = pydantic.Field(default="", exclude=True)


class Animal(pydantic.BaseModel):
    legs: int = 4


class Dog(Animal):
    name: str = ""


class Anything(pydantic.BaseModel):
    data: dict[str, Any]


class Renaming(pydantic.BaseModel):
    id: int = pydantic.Field(default=0, validation_alias="in", serialization_alias="out")


@pytest.mark.parametrize(
    ("serializer", "value", "why"),
    [
        (JSON, (1, 2), "a tuple would come back as a list"),
        (JSON, {"a": [{"b": (1,)}]}, r"at \['a'\]\[0\]\['b'\] a tuple would come back as a list"),
        (JSON, {"at": AT}, r"at \['at'\] a datetime would come back as a str"),
        (JSON, [uuid.UUID(int=7)], r"at \[0\] a UUID would come back as a str"),
        (JSON, Plan.PRO, "a Plan would come back as a str"),
        (JSON, {"a": Plan.PRO}, r"at \['a'\] a Plan would come back as a str"),
        (JSON, ROME, "a Place would come back as a dict"),
        (JSON, [1.0, math.nan], r"at \[1\] a float would come back as a NoneType"),
        (JSON, math.inf, "a float would come back as a NoneType"),
        (JSON, {1: "a"}, "can't write a dict .Dict key must be str"),
        (JSON, {Plan.PRO: "a"}, "can't write a dict|other keys"),
        (JSON, 2**70, "can't write a int .Integer exceeds 64-bit range"),
        (JSON, "\ud800", "can't write a str"),
        (JSON, {1}, "can't write a set"),
        (JSON, decimal.Decimal(1), "can't write a Decimal"),
        (JSON, USER, "can't write a User"),
        (JSON, b"x", "can't write a bytes"),
        (ROWS, [ROME], "can't write a list .Place is no type of rows"),
        (ROWS, Plan.PRO, "Plan is no type of rows"),
        (ROWS, Point(1, 2.0), "Point is no type of rows"),
        (TEXT, Plan.PRO, "a Plan would come back as a str"),
        (TEXT, 1, "can't write a int"),
        (BYTES, bytearray(b"x"), "a bytearray would come back as a bytes"),
        (serializer_of(User), {"id": 1}, "can't write a dict"),
        (serializer_of(User), USER.model_copy(update={"price": 1.5}), "can't write a User"),
        (serializer_of(Secret), Secret(password=pydantic.SecretStr("x")), r"at \.password a SecretStr would come"),
        (serializer_of(Excluding), Excluding(token="x"), r"at \.token a str would come back with another value"),
        (serializer_of(Animal), Dog(name="Rex"), "can't write a Dog|a Dog would come back as a Animal"),
        (serializer_of(list[Animal]), [Dog(name="Rex")], "can't write|a Dog would come back as a Animal"),
        (serializer_of(Anything), Anything(data={"at": AT}), r"at \.data\['at'\] a datetime would come back as a str"),
        (serializer_of(Renaming), Renaming.model_validate({"in": 1}), r"at \.id a int would come back with another"),
        (serializer_of(float), math.nan, "can't read what it writes of a float"),
        (serializer_of(Order), {"id": 1, "at": AT, "lines": []}, "a dict would come back as a Order"),
        (unsafe_pickle(Place), "Rome", "can't write a str"),
        (unsafe_pickle(), lambda: 1, "can't write a function"),
    ],
)
def test_what_would_come_back_otherwise_is_refused(serializer: Serializer[Any], value: Any, why: str) -> None:
    with pytest.raises(Unstorable, match=why):
        written(serializer, value)


class Own:
    """An object that compares itself with nothing."""

    def __init__(self, name: Any) -> None:
        self.name = name


class OfNames:
    """A serializer of one's own."""

    def dumps(self, value: Own, /) -> bytes:
        return str(value.name).encode()

    def loads(self, data: bytes, /) -> Own:
        return Own(data.decode())


class Loose(OfNames):
    exact = True


def test_a_serializer_of_ones_own_is_looked_at_too_unless_it_says_that_it_is_exact() -> None:
    assert written(OfNames(), Own("Ada")) == b"Ada"
    with pytest.raises(Unstorable, match=r"at \.name a int would come back as a str"):
        written(OfNames(), Own(1))
    assert written(Loose(), Own(1)) == b"1"
    with pytest.raises(Unstorable, match="writes nothing, which would stand for a missing row"):
        written(OfNames(), Own(""))


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text() | st.dates() | st.uuids()
# A set with NaN has no equal.
COMPARED = SCALARS.filter(lambda value: bool(value == value))  # noqa: PLR0124
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner) | st.frozensets(COMPARED)
    ),
    max_leaves=10,
)


@given(VALUES)
def test_whatever_is_stored_as_json_is_the_same_when_it_is_read(value: Any) -> None:
    def exactly(value: Any) -> Any:
        if isinstance(value, dict):
            return {(type(key), key): exactly(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return (type(value), [exactly(each) for each in value])
        return (type(value), value)

    try:
        payload = written(JSON, value)
    except Unstorable:
        return
    assert exactly(JSON.loads(payload)) == exactly(value)


MORE = COMPARED | st.binary() | st.decimals(allow_nan=False) | st.timedeltas() | st.times() | st.integers()
MORE = MORE | st.datetimes() | st.datetimes(timezones=st.just(dt.UTC))
ROW_VALUES = st.recursive(
    MORE | st.just(math.nan),
    lambda inner: st.lists(inner) | st.dictionaries(MORE | st.just("!"), inner) | st.tuples(inner) | st.sets(MORE),
    max_leaves=10,
)


@given(ROW_VALUES)
def test_whatever_rows_hold_is_stored_and_is_the_same_when_it_is_read(value: Any) -> None:
    # It is read back, and compared.
    assert written(ROWS, value)


@given(VALUES)
def test_a_pickled_value_is_found_to_be_the_same(value: Any) -> None:
    assert difference(value, pickle.loads(pickle.dumps(value))) == ""


# ── Of which serializer an entry is ──────────────────────────────────────────────────────────────────────────────────


def test_each_serializer_has_a_form_and_that_of_json_is_as_it_was() -> None:
    given = (JSON, TEXT, BYTES, ROWS, unsafe_pickle(), unsafe_pickle(Place), serializer_of(Place), serializer_of(User))
    every: list[Serializer[Any]] = [*given, serializer_of(Order), OfNames(), typing.cast("Any", pickle)]
    forms = [form_of(each) for each in every]
    assert forms[:4] == [b"", b"text", b"bytes", b"rows"]
    assert len(set(forms)) == len(forms)
    assert form_of(OfNames()) == form_of(OfNames())


def test_a_form_is_a_word() -> None:
    class Wrong(OfNames):
        form = "a b"

    with pytest.raises(ValueError, match="`form` of a serializer is 'a b'; it is a word"):
        form_of(Wrong())


def test_a_type_that_changes_has_another_digest() -> None:
    def model(**fields: Any) -> Any:
        return pydantic.create_model("Model", **fields)

    def dataclass(*fields: Any) -> Any:
        return dataclasses.make_dataclass("Data", fields)

    def struct(*fields: Any, **more: Any) -> Any:
        return msgspec.defstruct("Struct", fields, **more)

    kinds: list[Any] = [
        model(id=(int, ...)),
        model(id=(str, ...)),
        model(id=(int, ...), plan=(str, "free")),
        model(id=(int, pydantic.Field(alias="ID"))),
        model(of=(model(x=(int, ...)), ...)),
        model(of=(model(x=(str, ...)), ...)),
        dataclass(("id", int)),
        dataclass(("id", typing.Literal["a"])),
        dataclass(("id", typing.Literal["b"])),
        dataclass(("id", int | None)),
        dataclass(("id", enum.Enum("One", ["A"]))),
        dataclass(("id", enum.Enum("One", ["A", "B"]))),
        dataclass(("id", "int"), ("plan", str, "free")),
        struct(("id", int)),
        struct(("id", int), rename="upper"),
        struct(("id", int, 1), omit_defaults=True),
        struct(("id", int, 2), omit_defaults=True),
        list[int],
        dict[str, int],
    ]
    assert len({digest(kind) for kind in kinds}) == len(kinds)
    assert digest(model(id=(int, ...))) == digest(model(id=(int, ...)))


def test_a_type_may_hold_itself() -> None:
    class Tree(pydantic.BaseModel):
        children: list[Tree] = []

    tree = Tree(children=[Tree()])
    serializer = serializer_of(Tree)
    assert serializer.loads(written(serializer, tree)) == tree


def test_the_digest_is_the_same_in_each_process() -> None:
    program = """
import dataclasses, enum, typing, pydantic
class E(enum.Enum):
    A = object()
@dataclasses.dataclass
class D:
    a: typing.Annotated[int, pydantic.AfterValidator(lambda value: value)]
    b: E
    c: "typing.Literal['x'] | None"
from cdc_invalidator.reader.serializers import digest
print(digest(D))
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout != ""


def test_of_a_type_that_nobody_knows_it_says_so() -> None:
    with pytest.raises(TypeError, match=r"nobody knows how to store .*Own \(pydantic says: .*`unsafe_pickle`"):
        serializer_of(Own)


# ── Whether it is an error ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("variables", "strict"),
    [
        ({}, False),
        ({"CDC_READER_STRICT": "1"}, True),
        ({"CDC_READER_STRICT": "0"}, False),
        ({"PYTEST_VERSION": "9"}, True),
        ({"PYTEST_VERSION": "9", "CDC_READER_STRICT": "0"}, False),
    ],
)
def test_whether_it_is_an_error_is_said_by_a_variable(
    variables: dict[str, str], strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTEST_VERSION", "CDC_READER_STRICT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Options[Any]().strict is (strict or sys.flags.dev_mode)
    assert Options[Any](strict=False).strict is False


def test_a_variable_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_READER_STRICT", "yes")
    with pytest.raises(ValueError, match=r"CDC_READER_STRICT is 'yes'; write 1 .* else 0"):
        Options[Any]()
