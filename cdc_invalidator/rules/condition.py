"""`when`: a CEL expression over ``op``, ``old`` and ``new`` that tells whether a rule fires for a change. Pure.

The CEL library is slow to import and to feed. It is imported with the first rule that has a condition, and gets only
the columns that the expression names.

The rule that holds here: what is not known for sure counts as true. The rule fires when the expression fails, when its
result is neither true nor false, or when it reads a value that the stream did not carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdc_invalidator.rules.values import ROWS_OF, UNCHANGED, Value

if TYPE_CHECKING:
    import cel

Holds = Callable[[str, Sequence[Value] | None, Sequence[Value] | None], bool]

ROOTS = frozenset({"op", "old", "new"})

# pg_type.oid of the types that CEL does not get as text: bool; int8, int2, int4, oid; float4, float8; numeric.
_BOOL, _INTEGERS, _FLOATS, _NUMERIC = 16, frozenset({20, 21, 23, 26}), frozenset({700, 701}), 1700
# Quoted text, and reads of a column: new.plan, old["plan"]. `new` or `old` alone reads the whole row.
_READS = re.compile(
    r"""
      (?P<string> r?(?:'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*") )
    | (?<![\w.]) (?P<row> old|new ) \b
      (?: \s*\.\s* (?P<name> [A-Za-z_]\w* ) (?!\s*\() | \s*\[\s* (?P<quoted> '[^'\\]*'|"[^"\\]*" ) \s*\] )?
    """,
    re.VERBOSE | re.DOTALL,
)
# A name that a macro binds: ["pro", "team"].exists(plan, plan == new.plan).
_BOUND = re.compile(r"\.\s*(?:all|exists|exists_one|filter|map)\s*\(\s*([A-Za-z_]\w*)\s*,")
_ERROR_AT = re.compile(r"<input>:(\d+):(\d+): (?:Syntax error: )?([^\n]*)")


class ConditionError(ValueError):
    """The text is no condition; ``offset`` (from 0) is where, the message one sentence with the remedy."""

    def __init__(self, sentence: str, offset: int) -> None:
        self.offset = offset
        super().__init__(sentence)


@dataclass(frozen=True, slots=True)
class Reads:
    """The columns of one row that an expression names; ``whole``: it reads the row as a whole."""

    columns: frozenset[str]
    whole: bool


class Condition:
    """One expression, compiled.

    Args:
        source: its text.

    Raises:
        ConditionError: it can't be read, or names something else than op, old and new.
    """

    def __init__(self, source: str) -> None:
        import cel  # noqa: PLC0415  0.4 s and 39 MB, which only rules with a condition pay for

        self.source = source
        try:
            self._program: cel.Program = cel.compile(source)
        except ValueError as error:
            raise _wrong(source, str(error)) from None
        strangers = sorted(set(self._program.variables()) - ROOTS - set(_BOUND.findall(source)))
        if strangers:
            at = re.search(rf"\b{re.escape(strangers[0])}\b", source)
            raise ConditionError(
                f"`when` knows `op`, `old` and `new`, and no `{strangers[0]}`; write `new.{strangers[0]}` for a column",
                at.start() if at else 0,
            )
        self._context = cel.Context
        self.reads = {row: _reads(source, row) for row in ("old", "new")}

    def refuses(self, op: str) -> bool:
        """Return whether it is false for all changes of this kind, whatever the rows hold."""
        # Rows that exist stay undefined: an expression that depends on one fails, and so is not false.
        absent = ROWS_OF["update"] - ROWS_OF[op]
        try:
            return self._program.execute(self._context({"op": op, **dict.fromkeys(absent)})) is False
        except Exception:  # noqa: BLE001  as when it is asked for a change
            return False

    def bind(self, names: Sequence[str], types: Sequence[int]) -> Holds:
        """Return the function that decides about changes of one relation.

        Args:
            names: the relation's columns.
            types: their pg_type OIDs.
        """
        index = {name: position for position, name in enumerate(names)}
        read = {
            row: [
                (name, index[name], _converter(types[index[name]]))
                for name in (names if reads.whole else sorted(reads.columns))
                if name in index
            ]
            for row, reads in self.reads.items()
        }
        program, context = self._program, self._context

        def holds(op: str, old: Sequence[Value] | None, new: Sequence[Value] | None) -> bool:
            values: dict[str, Any] = {"op": op, "old": None, "new": None}
            try:
                for row, columns in (("old", old), ("new", new)):
                    if columns is None:
                        continue
                    taken = values[row] = {}
                    for name, position, convert in read[row]:
                        value = columns[position]
                        if value is UNCHANGED:
                            return True
                        taken[name] = None if value is None else convert(value)
                return program.execute(context(values)) is not False
            except Exception:  # noqa: BLE001  an expression may fail in any way, and none may end the daemon
                return True

        return holds


def _converter(type_oid: int) -> Callable[[bytes], Any]:
    if type_oid == _BOOL:
        return lambda value: value == b"t"
    if type_oid in _INTEGERS:
        return int
    if type_oid in _FLOATS:
        return float
    if type_oid == _NUMERIC:
        return lambda value: int(value) if value.lstrip(b"-").isdigit() else float(value)
    return lambda value: value.decode("utf-8", "backslashreplace")


def _reads(source: str, row: str) -> Reads:
    columns: set[str] = set()
    whole = False
    for found in _READS.finditer(source):
        if found["row"] == row:
            name = found["name"] or (found["quoted"] or "")[1:-1]
            whole |= not name
            columns |= {name} - {""}
    return Reads(frozenset(columns), whole)


def _wrong(source: str, message: str) -> ConditionError:
    found = _ERROR_AT.search(message)
    if found is None:
        return ConditionError("`when` is no CEL expression; write one such as `new.plan != old.plan`", 0)
    lines = source.splitlines(keepends=True)
    offset = sum(map(len, lines[: int(found[1]) - 1])) + max(0, int(found[2]) - 1)
    return ConditionError(f"`when` is no CEL expression ({found[3].strip()}); correct it", offset)


def missing(condition: Condition, columns: Mapping[str, object]) -> list[str]:
    """Return the columns that the condition names and the table lacks, sorted."""
    return sorted({name for reads in condition.reads.values() for name in reads.columns} - columns.keys())
