"""Compares the values that `when` and `where` see as PostgreSQL compares them. Pure.

CEL has neither decimals nor PostgreSQL's types, so an expression's operators become calls of the functions made here
(see `expression`). A value of a type that CEL has not is passed as bytes: a tag, and the text that PostgreSQL prints.

The rule that holds here: what can't be compared for sure is `UNKNOWN`, never false. It makes an expression fail, or
come out neither true nor false, and then the condition counts as true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from cdc_invalidator.rules.regex import found_in


class ColumnType(NamedTuple):
    """What decides how a column's values compare.

    ``name``: as written in SQL; ``declared``: the pg_type OID that the stream names; ``oid``: that of the type under
    domains; ``enum``, ``array``: what kind of type that is; ``by_code_point``: its text is ordered as CEL orders text.
    """

    name: str
    declared: int
    oid: int
    enum: bool = False
    array: bool = False
    by_code_point: bool = False

    @classmethod
    def built_in(cls, oid: int, *, by_code_point: bool) -> ColumnType:
        """Return what is known of a type by its OID alone; of one that is not built in, nothing."""
        return cls(f"type {oid}", oid, oid, by_code_point=by_code_point)

    @property
    def kind(self) -> Kind:
        """What its values are in an expression."""
        return Kind.TEXT if self.enum else _KINDS.get(self.oid, Kind.OTHER)

    @property
    def ordered(self) -> bool:
        """Whether `<` and the like say what PostgreSQL says."""
        return self.kind is not Kind.OTHER and (self.kind is not Kind.TEXT or self.by_code_point) and not self.enum


class Kind(Enum):
    """What a value is in an expression; the values are the words for it."""

    FLAG = "a boolean"
    NUMBER = "a number"
    TEXT = "text"
    TIME = "a time"
    OTHER = "a value of another type"


_BOOL, _NUMERIC, _BPCHAR, _TIMESTAMPTZ = 16, 1700, 1042, 1184
# int8, int2, int4, oid, xid, cid, xid8; float4, float8.
_INTEGERS, _FLOATS = frozenset({20, 21, 23, 26, 28, 29, 5069}), frozenset({700, 701})
_KINDS: Mapping[int, Kind] = {
    _BOOL: Kind.FLAG,
    **dict.fromkeys((*_INTEGERS, *_FLOATS, _NUMERIC), Kind.NUMBER),
    # "char", name, text, bpchar, varchar.
    **dict.fromkeys((18, 19, 25, _BPCHAR, 1043), Kind.TEXT),
    # date, timestamp, timestamptz.
    **dict.fromkeys((1082, 1114, _TIMESTAMPTZ), Kind.TIME),
}
# Of these, a literal that is written so and differs is another value: uuid; bit, varbit.
_CANONICAL: Mapping[int, re.Pattern[str]] = {
    2950: re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"),
    **dict.fromkeys((1560, 1562), re.compile("[01]*")),
}

UNKNOWN: Final = b"?"
_DECIMAL, _TIME, _OTHER = b"n", b"t", b"o"
_EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow])
_INT64 = range(-(1 << 63), 1 << 63)


def converter(column: ColumnType) -> Callable[[bytes], Any]:
    """Return the function that turns a value, as the stream has it, into one of an expression."""
    oid, kind = column.oid, column.kind
    if kind is Kind.FLAG:
        return lambda value: value == b"t"
    if oid in _INTEGERS:
        return int
    if oid in _FLOATS:
        return float
    if oid == _NUMERIC:
        return lambda value: _DECIMAL + value
    if oid == _BPCHAR:
        # Trailing blanks don't count, as in PostgreSQL.
        return lambda value: _text(value).rstrip(" ")
    if kind is Kind.TEXT:
        return _text
    tag = b"%s%d%s:" % (_TIME if kind is Kind.TIME else _OTHER, oid, b"a" if column.array else b"")
    return lambda value: tag + value


def decimal_literal(text: str) -> str:
    """Return a number with a fraction, as CEL writes it, as a constant of an expression."""
    return f"b'{_DECIMAL.decode()}{text}'"


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


class _Tagged(NamedTuple):
    """A value of a type that CEL has not."""

    oid: int
    array: bool
    text: str


def _tagged(value: bytes) -> _Tagged:
    head, _, text = value[1:].partition(b":")
    return _Tagged(int(head.rstrip(b"a")), head.endswith(b"a"), _text(text))


def _is(value: Any, tag: bytes) -> bool:
    return isinstance(value, bytes) and value[:1] == tag


def _decimal(value: Any) -> Decimal | None:
    """Return the exact value of an integer or a decimal."""
    if _is(value, _DECIMAL):
        return Decimal(value[1:].decode())
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any) -> float:
    return float(value[1:] if isinstance(value, bytes) else value)


def _of_numbers(one: Any, other: Any) -> int | None:
    # As PostgreSQL: with a float, both are floats; without, both are exact. NaN equals NaN, and is above all others.
    if isinstance(one, float) or isinstance(other, float):
        numbers: list[float | Decimal] = [_float(one), _float(other)]
    else:
        numbers = [number for number in (_decimal(one), _decimal(other)) if number is not None]
    ranks = [(True, 0) if number != number else (False, number) for number in numbers]  # noqa: PLR0124  NaN
    return _sign(*ranks)


def _sign(one: Any, other: Any) -> int:
    return int(one > other) - int(one < other)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _decimal(value) is not None


def _moment(value: Any) -> tuple[bool, int, datetime] | None:
    """Return whether the time has a zone, whether it is finite (else its sign), and the time; ``None``: unreadable."""
    if isinstance(value, datetime):
        return (value.tzinfo is not None, 0, value)
    zoned = None
    if not isinstance(value, str):
        oid, _, value = _tagged(value)
        zoned = oid == _TIMESTAMPTZ
        if value in {"infinity", "-infinity"}:
            return (zoned, -1 if value[0] == "-" else 1, datetime.min)  # noqa: DTZ901  stands for no time
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (found.tzinfo is not None, 0, found) if zoned in {None, found.tzinfo is not None} else None


def _of_times(one: Any, other: Any) -> int | None:
    if one == other:
        return 0
    first, second = _moment(one), _moment(other)
    if first is None or second is None or first[0] != second[0]:
        return None
    return _sign(first[1], second[1]) or (0 if first[1] or second[1] else _sign(first[2], second[2]))


def _order(one: Any, other: Any) -> int | None:
    """Return -1, 0 or 1 as PostgreSQL orders the two; ``None`` where that is not known."""
    if isinstance(one, bool) and isinstance(other, bool):
        return _sign(one, other)
    if _is_number(one) and _is_number(other):
        return _of_numbers(one, other)
    texts = [isinstance(value, str) for value in (one, other)]
    times = [isinstance(value, datetime) or _is(value, _TIME) for value in (one, other)]
    if any(times) and sum(texts) + sum(times) == len(texts):
        return _of_times(one, other)
    for same in (str, datetime, timedelta):
        if isinstance(one, same) and isinstance(other, same):
            return _sign(one, other)
    return None


def _equal(one: Any, other: Any) -> Any:
    if UNKNOWN in (one, other):
        return UNKNOWN
    if one is None or other is None:
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return _all([len(one) == len(other), *map(_equal, one, other)])
    if isinstance(one, dict) and isinstance(other, dict):
        return _all([one.keys() == other.keys(), *(_equal(one[key], other[key]) for key in one.keys() & other.keys())])
    if _is(one, _OTHER) or _is(other, _OTHER):
        return _of_others(one, other)
    order = _order(one, other)
    return UNKNOWN if order is None else order == 0


def _of_others(one: Any, other: Any) -> Any:
    # What prints the same is the same. What prints differently may be: 1 day is 24:00:00.
    texts: list[str] = []
    canonical = None
    for value in (one, other):
        if _is(value, _OTHER):
            tagged = _tagged(value)
            texts.append(tagged.text)
            canonical = _CANONICAL.get(tagged.oid)
        elif isinstance(value, str):
            texts.append(value)
        else:
            return UNKNOWN
    if texts[0] == texts[1]:
        return True
    return False if canonical and all(map(canonical.fullmatch, texts)) else UNKNOWN


def _all(results: Sequence[Any]) -> Any:
    return False if False in results else UNKNOWN if UNKNOWN in results else True


def _not_equal(one: Any, other: Any) -> Any:
    equal = _equal(one, other)
    return equal if equal == UNKNOWN else not equal


def _compare(one: Any, other: Any, *, accepted: frozenset[int], text: bool) -> Any:
    if isinstance(one, str) and isinstance(other, str) and not text:
        return UNKNOWN
    order = _order(one, other)
    return UNKNOWN if order is None else order in accepted


def _member(one: Any, container: Any) -> Any:
    if not isinstance(container, list | dict):
        return UNKNOWN
    results = [_equal(one, each) for each in container]
    return True if True in results else UNKNOWN if UNKNOWN in results else False


# ── Arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _calculate(operator: str, one: Any, other: Any) -> Any:
    if _is_number(one) and _is_number(other):
        if isinstance(one, float) or isinstance(other, float):
            return _of_floats(operator, _float(one), _float(other))
        if isinstance(one, int) and isinstance(other, int):
            found = _of_integers(operator, one, other)
            return found if found in _INT64 else UNKNOWN
        first, second = _decimal(one), _decimal(other)
        assert first is not None
        assert second is not None
        return _DECIMAL + str(_DECIMALS[operator](first, second)).encode()
    times = (datetime, timedelta)
    if (operator == "+" and _joins(one, other)) or (isinstance(one, times) and isinstance(other, times)):
        return one + other if operator == "+" else one - other if operator == "-" else UNKNOWN
    return UNKNOWN


def _joins(one: Any, other: Any) -> bool:
    return any(isinstance(one, kind) and isinstance(other, kind) for kind in (str, list))


def _of_floats(operator: str, one: float, other: float) -> Any:
    if operator == "%":
        return UNKNOWN
    return {"+": float.__add__, "-": float.__sub__, "*": float.__mul__, "/": float.__truediv__}[operator](one, other)


def _of_integers(operator: str, one: int, other: int) -> int:
    if operator in "/%":
        # Towards zero, in PostgreSQL as in CEL.
        quotient = abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)
        return quotient if operator == "/" else one - quotient * other
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](one, other)


# A result that is not exact is an error, and so unknown.
_DECIMALS: Mapping[str, Callable[[Decimal, Decimal], Decimal]] = {
    "+": _EXACT.add,
    "-": _EXACT.subtract,
    "*": _EXACT.multiply,
    "/": _EXACT.divide,
    "%": _EXACT.remainder,
}


def _negate(value: Any) -> Any:
    if isinstance(value, float | timedelta):
        return -value
    return _calculate("-", 0, value)


def _plain(value: Any) -> Any:
    """Return what a function of CEL is given: a number, or the text that PostgreSQL prints; null, so that it fails."""
    if not isinstance(value, bytes):
        return value
    if _is(value, _DECIMAL):
        text = value[1:].decode()
        return int(text) if text.lstrip("-").isdigit() and int(text) in _INT64 else float(text)
    if value == UNKNOWN:
        return None
    _, array, printed = _tagged(value)
    return None if array else printed


def _text_of(value: Any) -> Any:
    """Return what `string()` is given."""
    return value[1:].decode() if _is(value, _DECIMAL) else _plain(value)


def _safe(function: Callable[..., Any]) -> Callable[..., Any]:
    # CEL prints the exceptions of functions, which may hold values.
    def called(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception:  # noqa: BLE001  whatever fails is unknown
            return UNKNOWN

    return called


NAMES: Mapping[str, str] = {
    "==": "cdc_equal",
    "!=": "cdc_not_equal",
    "<": "cdc_less",
    "<=": "cdc_at_most",
    ">": "cdc_more",
    ">=": "cdc_at_least",
    "in": "cdc_member",
    "+": "cdc_add",
    "-": "cdc_subtract",
    "*": "cdc_multiply",
    "/": "cdc_divide",
    "%": "cdc_remainder",
}
"""The functions that stand for operators."""
ORDERS = frozenset({"<", "<=", ">", ">="})
ARITHMETIC = frozenset("+-*/%")
NEGATE, PLAIN, TEXT_OF, MATCHES = "cdc_negate", "cdc_plain", "cdc_text", "cdc_matches"
_ACCEPTED = {"<": {-1}, "<=": {-1, 0}, ">": {1}, ">=": {0, 1}}


def functions(*, order_text: bool) -> dict[str, Callable[..., Any]]:
    """Return the functions that a rewritten expression calls.

    Args:
        order_text: whether CEL's order of text, by code points, is that of the columns.
    """
    made: dict[str, Callable[..., Any]] = {
        NAMES["=="]: _equal,
        NAMES["!="]: _not_equal,
        NAMES["in"]: _member,
        NEGATE: _negate,
        PLAIN: _plain,
        TEXT_OF: _text_of,
        # CEL's own compiles the expression for each row.
        MATCHES: found_in,
        **{NAMES[operator]: partial(_calculate, operator) for operator in ARITHMETIC},
        **{
            NAMES[operator]: partial(_compare, accepted=frozenset(accepted), text=order_text)
            for operator, accepted in _ACCEPTED.items()
        },
    }
    return {name: _safe(function) for name, function in made.items()}
