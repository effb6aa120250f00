"""`when`: a CEL expression over ``op``, ``old`` and ``new`` that tells whether a rule fires for a change. Pure.

The CEL library is slow to import and to feed. It is imported with the first rule that has a condition, and gets only
the columns that the expression names. What the expression does with values is done by `comparison`.

The rule that holds here: what is not known for sure counts as true. The rule fires when the expression fails, when its
result is neither true nor false, or when it reads a value that the stream did not carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cdc_invalidator.rules.comparison import ARITHMETIC, NAMES, ORDERS, ColumnType, Kind, converter, functions
from cdc_invalidator.rules.expression import Operand, Use, read
from cdc_invalidator.rules.values import ROWS_OF, UNCHANGED, Value

if TYPE_CHECKING:
    import cel

Holds = Callable[[str, Sequence[Value] | None, Sequence[Value] | None], bool]

ROOTS = frozenset({"op", "old", "new"})

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
            variables = set(cel.compile(source).variables())
            self._expression = read(source)
            self._program: cel.Program = cel.compile(self._expression.text)
        except ValueError as error:
            raise _wrong(source, str(error)) from None
        strangers = sorted(variables - ROOTS - self._expression.bound)
        if strangers:
            at = re.search(rf"\b{re.escape(strangers[0])}\b", source)
            raise ConditionError(
                f"`when` knows `op`, `old` and `new`, and no `{strangers[0]}`; write `new.{strangers[0]}` for a column",
                at.start() if at else 0,
            )
        if self._expression.constants:
            raise ConditionError(
                "`when` sees no column as bytes; write text, as PostgreSQL prints the value",
                self._expression.constants[0],
            )
        self._context = cel.Context
        self.reads = {
            row: Reads(frozenset(self._expression.columns[row]), row in self._expression.whole)
            for row in ("old", "new")
        }

    def refuses(self, op: str) -> bool:
        """Return whether it is false for all changes of this kind, whatever the rows hold."""
        # Rows that exist stay undefined: an expression that depends on one fails, and so is not false.
        absent = ROWS_OF["update"] - ROWS_OF[op]
        try:
            known = self._context({"op": op, **dict.fromkeys(absent)}, functions(order_text=True))
            return self._program.execute(known) is False
        except Exception:  # noqa: BLE001  as when it is asked for a change
            return False

    def misuses(self, columns: Mapping[str, ColumnType]) -> list[str]:
        """Return what it does with columns of these types that CEL can't do as PostgreSQL does: a sentence each."""
        found = (sentence for use in self._expression.uses for sentence in _misuses(use, columns))
        return list(dict.fromkeys(found))

    def bind(self, names: Sequence[str], types: Sequence[ColumnType]) -> Holds:
        """Return the function that decides about changes of one relation.

        Args:
            names: the relation's columns.
            types: their types.
        """
        index = {name: position for position, name in enumerate(names)}
        read_columns = {
            row: [
                (name, index[name], converter(types[index[name]]))
                for name in (names if reads.whole else sorted(reads.columns))
                if name in index
            ]
            for row, reads in self.reads.items()
        }
        texts = {
            types[position]
            for columns in read_columns.values()
            for _, position, _ in columns
            if types[position].kind is Kind.TEXT
        }
        called = functions(order_text=all(column.ordered for column in texts))
        program, context = self._program, self._context

        def holds(op: str, old: Sequence[Value] | None, new: Sequence[Value] | None) -> bool:
            values: dict[str, Any] = {"op": op, "old": None, "new": None}
            try:
                for row, columns in (("old", old), ("new", new)):
                    if columns is None:
                        continue
                    taken = values[row] = {}
                    for name, position, convert in read_columns[row]:
                        value = columns[position]
                        if value is UNCHANGED:
                            return True
                        taken[name] = None if value is None else convert(value)
                return program.execute(context(values, called)) is not False
            except Exception:  # noqa: BLE001  an expression may fail in any way, and none may end the daemon
                return True

        return holds


@lru_cache(1024)
def condition_of(source: str) -> Condition:
    """Return the condition of this text; one that was compiled lately is not compiled again."""
    return Condition(source)


def _misuses(use: Use, columns: Mapping[str, ColumnType]) -> Iterator[str]:
    known = {each.column: columns[each.column] for each in use.operands if each.column in columns}
    if use.what == ".":
        yield from (_cant(use, *each, "sees it as PostgreSQL prints it, without parts") for each in known.items())
    elif use.what in ORDERS:
        unordered = {name: column for name, column in known.items() if not column.ordered}
        for name, column in unordered.items():
            collated = column.kind is Kind.TEXT and not column.enum
            why = "orders by code points, and PostgreSQL by a collation" if collated else "does not know its order"
            yield _cant(use, name, column, why)
        if not unordered:
            yield from _unlike(use, columns, *use.operands)
    elif use.what in {"==", "!="}:
        yield from _unlike(use, columns, *use.operands)
    elif use.what == "in":
        left, right = use.operands
        if right.column in columns:
            yield _cant(use, right.column, columns[right.column], "has no list of it")
        for element in right.elements or ():
            yield from _unlike(use, columns, left, element)
    elif use.what in ARITHMETIC:
        for name, column in known.items():
            if column.kind is not Kind.NUMBER and not (column.kind is Kind.TEXT and use.what == "+"):
                yield _cant(use, name, column, "can't calculate with it")
    elif use.what not in NAMES:
        yield from (_cant(use, *each, "has no list of it") for each in known.items() if each[1].array)


def _unlike(use: Use, columns: Mapping[str, ColumnType], left: Operand, right: Operand) -> Iterator[str]:
    """Say that two operands never compare: one is a column, the other a column or a literal of another kind."""
    for one, other in ((left, right), (right, left)):
        if one.column not in columns or other.null:
            continue
        column, against = columns[one.column], columns.get(other.column or "")
        kind = against.kind if against else other.kind
        kinds = {column.kind, kind}
        alike = kind is None or kind is column.kind or (Kind.TEXT in kinds and kinds & {Kind.TIME, Kind.OTHER})
        if kinds == {Kind.OTHER}:
            alike = against is not None and column.oid == against.oid
        if not alike:
            what = f"column {other.column}, of type {against.name}" if against else kind.value if kind else ""
            yield _cant(use, one.column, column, f"can't compare it with {what}")
            return


def _cant(use: Use, name: str, column: ColumnType, why: str) -> str:
    return (
        f"`when` uses column {name}, of type {column.name}, with `{use.what}`, but CEL {why}; compare it by == or != "
        "with a column of its type, or list it in `columns` instead"
    )


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
