"""From a parameter to its text in a key, as PostgreSQL prints it: by the type of its column, where that is known. Pure.

The rule that holds here: all spellings that a loader may take for one value give one text, the one that busts name.
What may be printed in another way, or may be another value for a loader, has no text, and so no key. So text is taken
only as PostgreSQL prints it, but for upper-case UUIDs; where the type of a column makes a Python value exact, that is
written as the column would print it. Types whose values can be equal and print differently (``numeric`` without a
scale, ``citext``, floats, JSON) have no text.

A maker takes a parameter's value and returns its text. It is chosen once, when the type becomes known.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Make = Callable[[Any], bytes]

Parameter: TypeAlias = int | str | bytes | uuid.UUID | dt.date | decimal.Decimal | enum.Enum
"""A parameter whose column's type nobody knows."""


class NoKey(Exception):
    """These parameters have no key.

    ``reason``: a word for metrics: null, unbounded, unprintable, spelling, or why the cache is not used at all.
    ``sentence``: what a developer should know; empty if nothing.
    """

    def __init__(self, reason: str, sentence: str = "") -> None:
        self.reason = reason
        self.sentence = sentence
        super().__init__(reason)


def maker_as_given(name: str) -> Make:
    """Return a maker for a parameter whose type does not matter, or is not known as long as no daemon has run."""

    def make(value: Any) -> bytes:
        known = _AS_GIVEN.get(type(value))
        return known(value) if known is not None else _unusual(value, name)

    return make


def maker(name: str, told: str | None, settings: Mapping[str, str], *, folded: bool = False) -> Make:
    """Return a maker for a parameter whose values are printed by a column.

    Args:
        name: the parameter.
        told: the column's type, as the watermark tells it; ``None``: nobody knows.
        settings: of the database, for printing values.
        folded: the case of letters does not show in the key, because of a filter.

    Returns:
        A function that raises `NoKey` for what has no certain text, and TypeError for a value that is no parameter.
    """
    text = _text_of(told or "", settings, folded=folded)

    def make(value: Any) -> bytes:
        found = None if text is None else text(value)
        if found is None:
            raise _no_text(value, name, told)
        return found

    if told in _INTEGERS:

        def make_integer(value: Any) -> bytes:
            return b"%d" % value if type(value) is int else make(value)

        return make_integer
    if told == "text" or _VARCHAR.fullmatch(told or ""):

        def make_text(value: Any) -> bytes:
            return encoded(value) if type(value) is str else make(value)

        return make_text
    return make


def has_text(told: str | None, settings: Mapping[str, str], *, folded: bool = False) -> bool:
    """Return whether values of a type have a certain text at all; see `maker`."""
    return _text_of(told or "", settings, folded=folded) is not None


def encoded(text: str) -> bytes:
    """Return text in UTF-8.

    Raises:
        NoKey: it has none.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NoKey("unprintable") from None


# ── As given ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_null(_value: None) -> bytes:
    raise NoKey("null")


_AS_GIVEN: Mapping[type, Make] = {
    int: b"%d".__mod__,
    str: encoded,
    bool: lambda value: b"t" if value else b"f",
    bytes: bytes,
    uuid.UUID: lambda value: str(value).encode(),
    dt.date: lambda value: value.isoformat().encode(),
    decimal.Decimal: lambda value: format(value, "f").encode(),
    type(None): _of_null,
}


def _unusual(value: Any, name: str) -> bytes:
    """Return the text of a value whose type is not in `_AS_GIVEN`."""
    if isinstance(value, enum.Enum) and type(value.value) in _AS_GIVEN:
        return _AS_GIVEN[type(value.value)](value.value)
    if isinstance(value, (int, str)):
        return encoded(value) if isinstance(value, str) else b"%d" % value
    if isinstance(value, dt.datetime):
        # Its text depends on the column, and the daemon, which knows that, has not run yet.
        raise NoKey("spelling")
    raise _wrong_type(value, name)


def _wrong_type(value: Any, name: str) -> TypeError:
    return TypeError(
        f"parameter {name} is a {type(value).__name__}, which PostgreSQL may print in several ways; give it as text, "
        "as the database prints it"
    )


def _no_text(value: Any, name: str, told: str | None) -> Exception:
    """Return why a value has no text."""
    if value is None:
        return NoKey("null")
    if not isinstance(value, _PARAMETERS):
        return _wrong_type(value, name)
    if told is None:
        why = "its type is not known: rules take it from columns of several types, or a query fails; see `check`"
    elif not has_text(told, {}, folded=True) and not told.startswith(("timestamp", "date", "bytea")):
        why = f"its type is {told}, where equal values may be printed differently; busts need a column of another type"
    else:
        why = f"its type is {told}, and a {type(value).__name__} like this may be written otherwise there"
    return NoKey("spelling", f"parameter {name} has no certain text, so that each read with it loads: {why}")


_PARAMETERS = (int, str, bytes, bytearray, memoryview, uuid.UUID, dt.date, decimal.Decimal, enum.Enum)


# ── By type: each function returns None where there is no certain text ───────────────────────────────────────────────

_Text = Callable[[Any], "bytes | None"]

_INTEGERS = frozenset({"smallint", "integer", "bigint"})
_VARCHAR = re.compile(r"character varying(\(\d+\))?")
_CHAR = re.compile(r"character\((\d+)\)")
_NUMERIC = re.compile(r"numeric\(\d+,(-?\d+)\)")
_TIMESTAMP = re.compile(r"timestamp(?:\((\d)\))? (with|without) time zone")
_UTC = frozenset({"UTC", "Etc/UTC", "GMT", "Etc/GMT"})
_NAME_BYTES = 63


def _text_of(told: str, settings: Mapping[str, str], *, folded: bool) -> _Text | None:
    """Return how values of a type are printed; ``None`` if that is not certain of any."""
    if told in _SIMPLE:
        return _SIMPLE[told]
    if _VARCHAR.fullmatch(told):
        return _letters
    if found := _CHAR.fullmatch(told):
        return _padded(int(found[1]))
    if found := _NUMERIC.fullmatch(told):
        return _numeric(int(found[1]))
    if told == "citext" and folded:
        return _ascii
    if told == "bytea" and settings.get("bytea_output") == "hex":
        return _hexadecimal
    style, _, order = settings.get("DateStyle", "").partition(", ")
    if told == "date":
        form = _DATES.get((style, order)) or _DATES.get((style, ""))
        return None if form is None else _date(form)
    if style == "ISO" and (found := _TIMESTAMP.fullmatch(told)):
        aware = found[2] == "with"
        if not aware or settings.get("TimeZone") in _UTC:
            return _timestamp(6 if found[1] is None else int(found[1]), aware=aware)
    return None


def _integer(value: Any) -> bytes | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, str):
        return value.encode() if re.fullmatch("0|-?[1-9][0-9]*", value) else None
    if isinstance(value, decimal.Decimal):
        return _exactly(value, 0)
    return None


def _numeric(scale: int) -> _Text:
    def text(value: Any) -> bytes | None:
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, bool):
            return None
        if isinstance(value, (int, decimal.Decimal)):
            return _exactly(decimal.Decimal(value), scale)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
            written = value.encode()
            return written if _exactly(decimal.Decimal(value), scale) == written else None
        return None

    return text


_EXACT = decimal.Context(prec=2000, traps=[decimal.Inexact, decimal.InvalidOperation])


def _exactly(value: decimal.Decimal, scale: int) -> bytes | None:
    """Return a number with just so many digits behind the point; ``None`` if these are not enough."""
    try:
        exact = value.quantize(decimal.Decimal((0, (1,), -scale)), context=_EXACT)
    except decimal.DecimalException:
        return None
    if not exact.is_finite():
        return None
    # PostgreSQL has no negative zero.
    return format(exact or abs(exact), "f").encode()


def _letters(value: Any) -> bytes | None:
    if isinstance(value, enum.Enum):
        # Some drivers send the name, and some the value.
        return encoded(value.name) if value.value == value.name else None
    if isinstance(value, str):
        return encoded(value)
    if isinstance(value, (int, uuid.UUID)) and not isinstance(value, bool):
        return str(value).encode()
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value.isoformat().encode()
    return None


def _name(value: Any) -> bytes | None:
    # Text that is longer is cut off.
    found = _letters(value)
    return found if found is not None and len(found) <= _NAME_BYTES else None


def _ascii(value: Any) -> bytes | None:
    found = _letters(value)
    return found if found is not None and found.isascii() else None


def _padded(length: int) -> _Text:
    def text(value: Any) -> bytes | None:
        found = _letters(value)
        if found is None:
            return None
        given = found.decode()
        # Whether blanks at the end count depends on how the loader compares.
        return None if given.endswith(" ") or len(given) > length else given.ljust(length).encode()

    return text


_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)


def _uuid(value: Any) -> bytes | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, uuid.UUID):
        return str(value).encode()
    return value.lower().encode() if isinstance(value, str) and _UUID.fullmatch(value) else None


def _flag(value: Any) -> bytes | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, int) and value in {0, 1}:
        return b"t" if value else b"f"
    return value.encode() if isinstance(value, str) and value in {"t", "f"} else None


def _hexadecimal(value: Any) -> bytes | None:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b"\\x" + bytes(value).hex().encode()
    return value.encode() if isinstance(value, str) and re.fullmatch(r"\\x([0-9a-f]{2})*", value) else None


# By DateStyle, how a date is printed.
_DATES = {
    ("ISO", ""): "{0.year:04}-{0.month:02}-{0.day:02}",
    ("SQL", "MDY"): "{0.month:02}/{0.day:02}/{0.year:04}",
    ("SQL", "YMD"): "{0.month:02}/{0.day:02}/{0.year:04}",
    ("SQL", "DMY"): "{0.day:02}/{0.month:02}/{0.year:04}",
    ("Postgres", "MDY"): "{0.month:02}-{0.day:02}-{0.year:04}",
    ("Postgres", "YMD"): "{0.month:02}-{0.day:02}-{0.year:04}",
    ("Postgres", "DMY"): "{0.day:02}-{0.month:02}-{0.year:04}",
    ("German", ""): "{0.day:02}.{0.month:02}.{0.year:04}",
}


def _date(form: str) -> _Text:
    def text(value: Any) -> bytes | None:
        if isinstance(value, enum.Enum):
            value = value.value
        # ISO is read alike whatever the style of the loader's session.
        if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            try:
                value = dt.date.fromisoformat(value)
            except ValueError:
                return None
        if isinstance(value, dt.datetime) or not isinstance(value, dt.date):
            return None
        return form.format(value).encode()

    return text


def _timestamp(digits: int, *, aware: bool) -> _Text:
    written = re.compile(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{0,5}[1-9])?" + (r"\+00" if aware else "")
    )

    def text(value: Any) -> bytes | None:
        if isinstance(value, str) and written.fullmatch(value):
            try:
                value = dt.datetime.fromisoformat(value)
            except ValueError:
                return None
        if not isinstance(value, dt.datetime) or (value.tzinfo is not None) != aware:
            return None
        if value.microsecond % 10 ** (6 - digits):
            return None
        try:
            moment = value.astimezone(dt.UTC).replace(tzinfo=None) if aware else value
        except OverflowError:
            return None
        printed = moment.isoformat(" ")
        printed = printed.rstrip("0") if moment.microsecond else printed
        return (printed + ("+00" if aware else "")).encode()

    return text


_SIMPLE: Mapping[str, _Text] = {
    **dict.fromkeys(_INTEGERS, _integer),
    **dict.fromkeys(("text", "enum"), _letters),
    "name": _name,
    "uuid": _uuid,
    "boolean": _flag,
}
