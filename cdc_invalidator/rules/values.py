"""The text form of values, and of what stands for several of them in one text. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final, Literal, TypeAlias


def join_arguments(values: Iterable[bytes | None]) -> bytes:
    """Give one text of a query's arguments, which may be NULL; NUL, which no text of PostgreSQL holds, is between."""
    return b"\0".join(b"-" if value is None else b"+" + value for value in values)


def split_arguments(arguments: bytes) -> list[bytes | None]:
    """Take apart what `join_arguments` gave."""
    return [value[1:] if value.startswith(b"+") else None for value in arguments.split(b"\0")]


def value_text(value: str | float | bool | None) -> str | None:
    """Give a value of YAML or JSON as PostgreSQL shows it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    return repr(value)


def value_types(*rows: Mapping[str, Any] | None) -> dict[str, int]:
    """Give the pg_type OIDs (bool, int8, float8, text) of columns, as values of YAML or JSON speak for them."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for column, value in (row or {}).items():
            found.setdefault(column, set()).update(() if value is None else [type(value)])
    return {column: _OIDS.get(frozenset(types), _TEXT_OID) for column, types in found.items()}


_TEXT_OID = 25


_OIDS = {
    frozenset({bool}): 16,
    frozenset({int}): 20,
    frozenset({float}): 701,
    frozenset({int, float}): 701,
}


class _Unchanged(Enum):
    UNCHANGED = "unchanged TOAST value"


UNCHANGED: Final = _Unchanged.UNCHANGED


Value: TypeAlias = bytes | Literal[_Unchanged.UNCHANGED] | None


Row: TypeAlias = list[Value]
