"""The kinds of change; values of columns as the stream, rule files and the command line have them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Literal, TypeAlias, get_args

Op = Literal["insert", "update", "delete", "truncate"]
OPS: Final[tuple[Op, ...]] = get_args(Op)
ROWS_OF: Final[Mapping[str, frozenset[str]]] = {
    "insert": frozenset({"new"}),
    "update": frozenset({"old", "new"}),
    "delete": frozenset({"old"}),
    "truncate": frozenset(),
}
"""The rows that each kind of change has."""


class _Unchanged(Enum):
    UNCHANGED = "unchanged TOAST value"


UNCHANGED: Final = _Unchanged.UNCHANGED
"""Stands for a TOAST value that the stream leaves out because it did not change."""

Value: TypeAlias = bytes | Literal[_Unchanged.UNCHANGED] | None
Row: TypeAlias = list[Value]

_TEXT_OID = 25
_OIDS = {
    frozenset({bool}): 16,
    frozenset({int}): 20,
    frozenset({float}): 701,
    frozenset({int, float}): 701,
}


def value_text(value: str | float | bool | None) -> str | None:
    """Return a value of YAML or JSON as PostgreSQL shows it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    return repr(value)


def row_texts(row: Mapping[str, Any] | None) -> dict[str, str | None] | None:
    """Return a row of YAML or JSON, by column, with its values as PostgreSQL shows them."""
    return None if row is None else {column: value_text(value) for column, value in row.items()}


def value_types(*rows: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the pg_type OID of each column (bool, int8, float8 or text), judged by its values of YAML or JSON."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for column, value in (row or {}).items():
            found.setdefault(column, set()).update(() if value is None else [type(value)])
    return {column: _OIDS.get(frozenset(types), _TEXT_OID) for column, types in found.items()}
