"""How values are stored, and whether they come back as they were. Pure.

The rule that holds here: a value is stored only if a hit gives an equal one, with the same types all through it.

pydantic and msgspec are imported only for a type that needs them.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import hashlib
import inspect
import math
import pickle
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar, cast, overload

import orjson

T = TypeVar("T")
R = TypeVar("R")


class Serializer(Protocol[T]):
    """Turns values into bytes and back. What `loads` raises on bytes that it can't read counts as a miss.

    It may have an attribute ``form``, a word that is stored with each entry: entries of another form are misses. By
    default it is made of the name of its class. With a true attribute ``exact``, nobody looks whether values come back
    as they were.
    """

    def dumps(self, value: T, /) -> bytes:
        """Return the bytes of a value that is not ``None``: at least one byte."""
        ...

    def loads(self, data: bytes, /) -> T:
        """Return the value of bytes that `dumps` returned."""
        ...


class Unstorable(TypeError):
    """A value can't be stored so that it comes back as it is. The message names no values, but may name their keys."""


@dataclasses.dataclass(frozen=True)
class _Made(Generic[T]):
    """A serializer made of two functions."""

    form: str
    dumps: Callable[[T], bytes]
    loads: Callable[[bytes], T]
    exact: bool = False


JSON: Serializer[Any] = _Made("", orjson.dumps, orjson.loads)
"""JSON: `dict` with keys of text, `list`, `str`, `int` of 64 bits, `float`, `bool`, `None`."""

# The last byte, because an entry without a payload stands for a missing row.
TEXT: Serializer[str] = _Made("text", lambda value: value.encode() + b"\n", lambda data: data[:-1].decode())
BYTES: Serializer[bytes] = _Made("bytes", lambda value: b"%b\n" % value, lambda data: data[:-1])


_SCALARS = frozenset({str, int, bool, type(None)})
_TEXTS = frozenset({str})


def _reader(kind: Callable[[Iterable[Any]], Any]) -> Callable[[Any], Any]:
    return lambda parts: kind(map(_unmarked, parts))


# What marks a value that JSON lacks: a dictionary with this one key.
_MARK = "!"
_MARKED: Mapping[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: ("bytes", lambda value: base64.b64encode(value).decode(), base64.b64decode),
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    uuid.UUID: ("uuid", str, uuid.UUID),
    dt.datetime: ("datetime", dt.datetime.isoformat, dt.datetime.fromisoformat),
    dt.date: ("date", dt.date.isoformat, dt.date.fromisoformat),
    dt.time: ("time", dt.time.isoformat, dt.time.fromisoformat),
    dt.timedelta: (
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: dt.timedelta(*parts),
    ),
    int: ("int", str, int),
    float: ("float", str, float),
    **{kind: (kind.__name__, lambda value: [*map(_marked, value)], _reader(kind)) for kind in (tuple, set, frozenset)},
    dict: (
        "dict",
        lambda value: [[_marked(key), _marked(each)] for key, each in value.items()],
        lambda pairs: {_unmarked(key): _unmarked(each) for key, each in pairs},
    ),
}
_UNMARK = {name: read for name, _, read in _MARKED.values()}


def _marked(value: Any) -> Any:
    """Return what JSON has for a value."""
    kind = type(value)
    if (
        kind in {str, bool, type(None)}
        or (kind is int and -(2**63) <= value < 2**63)
        or (kind is float and math.isfinite(value))
    ):
        return value
    if kind is list:
        return [_marked(each) for each in value]
    if kind is dict and _TEXTS.issuperset(map(type, value)) and _MARK not in value:
        return {key: _marked(each) for key, each in value.items()}
    if kind not in _MARKED:
        raise orjson.JSONEncodeError(f"{kind.__name__} is no type of rows")
    name, write, _ = _MARKED[kind]
    return {_MARK: [name, write(value)]}


def _unmarked(value: Any) -> Any:
    if type(value) is list:
        return [_unmarked(each) for each in value]
    if type(value) is not dict:
        return value
    if _MARK in value:
        name, content = value[_MARK]
        return _UNMARK[name](content)
    return {key: _unmarked(each) for key, each in value.items()}


ROWS: Serializer[Any] = _Made(
    "rows", lambda value: orjson.dumps(_marked(value)), lambda data: _unmarked(orjson.loads(data))
)
"""JSON with marks: rows as drivers give them, with dates, times, `Decimal`, `UUID`, bytes, tuples, sets, any keys."""


@functools.lru_cache(maxsize=1000)
def _of(kind: Any) -> Serializer[Any]:
    if kind is str:
        return TEXT
    if kind is bytes:
        return BYTES
    if hasattr(kind, "__struct_fields__"):
        import msgspec  # noqa: PLC0415  only for its types

        decoder = msgspec.msgpack.Decoder(kind)
        return _Made(f"msgspec-{digest(kind)}", msgspec.msgpack.Encoder().encode, decoder.decode)
    from pydantic import TypeAdapter  # noqa: PLC0415  only for its types
    from pydantic.errors import PydanticUserError  # noqa: PLC0415  only for its types

    try:
        adapter = TypeAdapter(kind)
    except PydanticUserError as error:
        raise TypeError(
            f"nobody knows how to store {_name(kind)} (pydantic says: {error.message.splitlines()[0]}); give the cache "
            "a serializer of your own, or `unsafe_pickle`"
        ) from error
    dumps = functools.partial(adapter.dump_json, by_alias=True, round_trip=True, warnings="error")
    return _Made(f"pydantic-{digest(kind)}", dumps, adapter.validate_json)


@overload
def serializer_of(kind: type[R], /) -> Serializer[R]: ...


@overload
def serializer_of(kind: object, /) -> Serializer[Any]: ...


def serializer_of(kind: object, /) -> Serializer[Any]:
    """Return the serializer for values of a type.

    Args:
        kind: a pydantic model, a dataclass, a `TypedDict`, a `NamedTuple`, a msgspec `Struct`, `str`, `bytes`, or any
            type that pydantic knows, such as ``list[User]`` or ``dict[int, datetime]``.

    Raises:
        TypeError: it is none of these.
    """
    return _of(kind)


@overload
def unsafe_pickle(kind: type[R], /) -> Serializer[R]: ...


@overload
def unsafe_pickle(kind: None = None, /) -> Serializer[Any]: ...


def unsafe_pickle(kind: type[Any] | None = None, /) -> Serializer[Any]:
    """Return a serializer that pickles.

    **Whoever can write to this Redis can run code in each process that reads it.** Choose it only where nobody else
    can write. An object may not be pickled as one expects, and classes change: raise `Options.schema` with them.

    Args:
        kind: the class of the values; others are refused, and entries of a class with other annotations are misses.
    """

    def dumps(value: Any) -> bytes:
        if kind is not None and not isinstance(value, kind):
            raise TypeError(f"it is no {kind.__name__}")
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    def loads(data: bytes) -> Any:
        value = pickle.loads(data)  # noqa: S301  its name says it
        if kind is not None and not isinstance(value, kind):
            raise TypeError(f"it is no {kind.__name__}")
        return value

    form = "pickle" if kind is None else f"pickle-{digest(kind)}"
    return _Made(form, dumps, loads, exact=True)


def form_of(serializer: Serializer[Any]) -> bytes:
    """Return the word that entries of a serializer have in their header; that of `JSON` is empty."""
    form = getattr(serializer, "form", None)
    if form is None:
        named = serializer if isinstance(serializer, ModuleType) else type(serializer)
        form = f"own-{_hashed(_name(named))}"
    word = str(form).encode()
    if b" " in word or b"\n" in word or len(word) > 100:
        raise ValueError(f"`form` of a serializer is {form!r}; it is a word of at most 100 bytes")
    return word


def written(serializer: Serializer[T], value: T) -> bytes:
    """Return the bytes of a value that comes back as it was.

    Raises:
        Unstorable: it does not.
    """
    name = type(value).__name__
    try:
        payload = serializer.dumps(value)
    except Exception as error:  # whatever a program's serializer raises; it is raised again, as what the reader knows
        # That of JSON names a type; those of others may show values.
        why = str(error) if isinstance(error, orjson.JSONEncodeError) else type(error).__name__
        raise Unstorable(f"its serializer can't write a {name} ({why})") from error
    if not payload:
        raise Unstorable("its serializer writes nothing, which would stand for a missing row")
    if getattr(serializer, "exact", False) or (serializer is JSON and _is_json(value)):
        return payload
    try:
        back = serializer.loads(payload)
    except Exception as error:  # as above
        raise Unstorable(f"its serializer can't read what it writes of a {name} ({type(error).__name__})") from error
    changed = difference(value, back)
    if changed:
        raise Unstorable(changed)
    return payload


def _is_json(value: Any) -> bool:
    """Return whether a value that could be written as JSON consists of what JSON has: then it need not be read back."""
    left = [value]
    while left:
        each = left.pop()
        kind = type(each)
        if kind is dict:
            if not _TEXTS.issuperset(map(type, each)):
                return False
            each = each.values()
        elif kind is not list:
            if kind in _SCALARS or (kind is float and math.isfinite(each)):
                continue
            return False
        if not _SCALARS.issuperset(map(type, each)):
            left.extend(each)
    return True


# ── What comes back ──────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), decimal.Decimal, uuid.UUID}
    | {dt.date, dt.time, dt.datetime, dt.timedelta}
)
"""Types whose values are all that they are: nothing in them could be of another type."""


def difference(value: Any, back: Any, place: str = "") -> str:
    """Return how what comes back differs from a value, with its place in that; empty if they are the same.

    Both are walked through, because equal values may be of different types: ``1`` and ``True``, an enum and its text.
    """
    kind: Any = type(value)
    if type(back) is not kind:
        return f"{_at(place)}a {kind.__name__} would come back as a {type(back).__name__}"
    if kind in PLAIN:
        same = value == back or (value != value and back != back)  # noqa: PLR0124  NaN
        return "" if same else _otherwise(place, kind)
    if isinstance(value, dict):
        return _of_pairs(value, back, place)
    if isinstance(value, (list, tuple)):
        if len(value) != len(back):
            return _otherwise(place, kind)
        if _alike(value, back):
            return ""
        return _first(difference(each, back[at], f"{place}[{at}]") for at, each in enumerate(value))
    if isinstance(value, (set, frozenset)):
        same = value == back and _types(value) == _types(back)
        return "" if same else _otherwise(place, kind)
    names = _fields_of(kind) or _attributes(value)  # type: ignore[arg-type]  # a class can be hashed
    if names is None:
        return "" if value == back else _otherwise(place, kind)
    mine, its = ([getattr(each, name, _ABSENT) for name in names] for each in (value, back))
    if _alike(mine, its):
        return ""
    return _first(difference(one, its[at], f"{place}.{names[at]}") for at, one in enumerate(mine))


class _Absent:
    """The type of what stands for an attribute that is not there."""


_ABSENT = _Absent()


def _of_pairs(value: Mapping[Any, Any], back: Mapping[Any, Any], place: str) -> str:
    if value.keys() != back.keys() or list(map(type, value)) != list(map(type, back)):
        return f"{_at(place)}a {type(value).__name__} would come back with other keys"
    if _alike(list(value.values()), list(back.values())):
        return ""
    return _first(difference(each, back[key], f"{place}[{key!r}]") for key, each in value.items())


def _alike(values: Any, backs: Any) -> bool:
    """Return whether two sequences hold the same plain values; False if that must be looked at one by one."""
    types = list(map(type, values))
    return PLAIN.issuperset(types) and types == list(map(type, backs)) and bool(values == backs)


@functools.lru_cache(maxsize=1000)
def _fields_of(kind: Any) -> Sequence[str]:
    """Return the fields that objects of a class consist of; none where the class does not say."""
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    if hasattr(kind, "__struct_fields__"):
        return cast("Sequence[str]", kind.__struct_fields__)
    if hasattr(kind, "model_fields") and hasattr(kind, "__pydantic_core_schema__"):
        return [*kind.model_fields, "__pydantic_extra__", "__pydantic_private__"]
    return ()


def _attributes(value: Any) -> Sequence[str] | None:
    """Return the attributes of an object; ``None`` if it can compare itself."""
    kind: Any = type(value)
    if kind.__eq__ is not object.__eq__:
        return None
    slots = (each.__dict__.get("__slots__", ()) for each in kind.__mro__)
    return [*getattr(value, "__dict__", ()), *(name for each in slots for name in _listed(each))]


def _listed(slots: Any) -> Iterable[str]:
    return [slots] if isinstance(slots, str) else slots


def _types(values: Iterable[Any]) -> list[str]:
    return sorted(_name(type(each)) for each in values)


def _first(differences: Iterable[str]) -> str:
    return next(filter(None, differences), "")


def _at(place: str) -> str:
    return f"at {place} " if place else ""


def _otherwise(place: str, kind: type) -> str:
    return f"{_at(place)}a {kind.__name__} would come back with another value"


# ── What a type looks like ───────────────────────────────────────────────────────────────────────────────────────────


def digest(kind: Any) -> str:
    """Return a digest of a type that changes with its fields, all through it, and is the same in each process.

    Else an entry of before a change could be read as a value of after it: without a new field, which has a default.
    """
    return _hashed(_described(kind, set()))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _name(kind: Any) -> str:
    names = (getattr(kind, "__module__", ""), getattr(kind, "__qualname__", None) or getattr(kind, "__name__", kind))
    return ".".join(str(name) for name in names if name)


def _described(kind: Any, seen: set[Any]) -> str:
    """Return a text of a type; each class is described where it first appears, which is noted in ``seen``."""
    if kind is None or isinstance(kind, (str, int, bytes)):
        return repr(kind) if not isinstance(kind, enum.Enum) else str(kind)
    if isinstance(kind, (list, tuple)):
        return f"({', '.join(_described(each, seen) for each in kind)})"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        # What is noted beside a type may print differently in each process.
        return f"{_described(args[0], seen)} and {[type(each).__name__ for each in args[1:]]}"
    text = _name(origin or kind)
    if args:
        text += f"[{', '.join(_described(each, seen) for each in args)}]"
    own = origin or kind
    if not isinstance(own, type) or own.__module__ == "builtins" or own in seen:
        return text
    if issubclass(own, enum.Enum):
        return f"{text}{[(each.name, _plain(each.value)) for each in own]}"
    seen.add(own)
    return text + f"{{{', '.join(f'{name}: {_described(each, seen)}' for name, each in _fields(own).items())}}}"


def _fields(kind: Any) -> Mapping[str, Any]:
    """Return what a class consists of."""
    if hasattr(kind, "model_fields") and hasattr(kind, "__pydantic_core_schema__"):
        return {
            name: (each.annotation, str(each.alias), str(each.validation_alias), str(each.exclude))
            for name, each in kind.model_fields.items()
        }
    try:
        found: Mapping[str, Any] = typing.get_type_hints(kind, include_extras=True)
    except Exception:  # noqa: BLE001  a name in an annotation may be known nowhere any more; its text will do
        found = {
            name: each if isinstance(each, str) else _name(each)
            for base in reversed(kind.__mro__)
            for name, each in inspect.get_annotations(base).items()
        }
    found = {name: each for name, each in found.items() if typing.get_origin(each) is not typing.ClassVar}
    if not hasattr(kind, "__struct_fields__"):
        return found
    # With `omit_defaults`, defaults are not in the bytes.
    omitted = [_plain(each) for each in kind.__struct_defaults__] if kind.__struct_config__.omit_defaults else []
    return {**found, "encoded as": (*kind.__struct_encode_fields__, *omitted)}


def _plain(value: Any) -> str:
    return repr(value) if type(value) in PLAIN else type(value).__name__
