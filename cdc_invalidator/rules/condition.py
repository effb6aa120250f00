"""Conditions of rules, as CEL expressions. Pure.

`when`, over ``op``, ``old`` and ``new``, tells whether a rule fires for a change. `where`, over ``row``, tells whether
one image of a row (the old one, or the new one) gives keys.

The CEL library is slow to import and to feed. It is imported with the first rule that has a condition, and gets only
the columns that the expression names. What the expression does with values is done by `comparison`.

The rule that holds here: what is not known for sure counts as true. A condition holds when the expression fails, when
its result is neither true nor false, or when it reads a value that the stream did not carry. So it does for a row whose
values are too long for the work that the expression does with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from cdc_invalidator.rules.comparison import ARITHMETIC, NAMES, ORDERS, ColumnType, Kind, converter, functions
from cdc_invalidator.rules.expression import MOST_STEPS, Operand, Search, TooMuchError, Use, read
from cdc_invalidator.rules.model import Rule
from cdc_invalidator.rules.regex import MOST_STATES, STATE_COST, states
from cdc_invalidator.rules.values import ROWS_OF, UNCHANGED, Value

if TYPE_CHECKING:
    import cel

Holds = Callable[[str, Sequence[Value] | None, Sequence[Value] | None], bool]
HoldsOf = Callable[[Sequence[Value]], bool]
# Bytes of a row's values, times the steps of an expression: what it may do for one row, a fifth of a second.
MOST_WORK = 50_000_000


class _Field(NamedTuple):
    """What a condition may say, by the field of the rule file that it stands in.

    ``rows``: its variables that are rows; ``others``: those that are none; ``prefer``: the row that an error writes;
    ``example``: a condition; ``instead``: what to do without one; ``elsewhere``: for variables of the other field, what
    to write.
    """

    rows: tuple[str, ...]
    others: tuple[str, ...]
    prefer: str
    example: str
    instead: str
    elsewhere: Mapping[str, str]

    @property
    def variables(self) -> str:
        """The names of the variables in a sentence."""
        names = [f"`{name}`" for name in (*self.others, *self.rows)]
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


_EACH = "it is asked for the old row and for the new one, each as `row`"
_FIELDS: Mapping[str, _Field] = {
    "when": _Field(
        ("old", "new"),
        ("op",),
        "new",
        "new.plan != old.plan",
        "list it in `columns` instead",
        {"row": "write `old` or `new`, or a `where`, which is asked for each row"},
    ),
    "where": _Field(
        ("row",),
        (),
        "row",
        "row.kind == 'admin'",
        "take it out of the condition",
        {"old": _EACH, "new": _EACH, "op": "list the kinds of change under `on`, or write a `when`"},
    ),
}

# Signs that nobody types: YAML makes them of a backslash in double quotes (`"App\Post"` holds U+2029).
_STRANGE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\xa0\u2028\u2029]")
_CORRECT = "correct it: CEL writes `==`, `== null`, `&&`, `||`, `!`, and a backslash twice"
_ERROR_AT = re.compile(r"<input>:(\d+):(\d+): (?:Syntax error: )?([^\n]*)")


def _ignore() -> None:
    """Do nothing."""


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
        field: what it stands in, `when` or `where`.

    Raises:
        ConditionError: it can't be read, or names something else than its variables.
    """

    def __init__(self, source: str, field: str = "when") -> None:
        import cel  # noqa: PLC0415  0.4 s and 39 MB, which only rules with a condition pay for

        self.source = source
        self.field = field
        known = _FIELDS[field]
        if strange := _STRANGE.search(source):
            raise ConditionError(
                f"`{field}` holds a sign that can't be seen (U+{ord(strange[0]):04X}), which YAML may have made of a "
                "backslash in double quotes; leave the quotes out, and double the backslash",
                strange.start(),
            )
        try:
            variables = set(cel.compile(source).variables())
            self._expression = read(source, known.rows)
        except TooMuchError as error:
            raise ConditionError(f"`{field}` {error}", error.offset) from None
        except ValueError as error:
            raise _wrong(source, str(error), field) from None
        try:
            self._program: cel.Program = cel.compile(self._expression.text)
        except ValueError:
            # Written anew, it stands deeper: the library reads no deeper than 96.
            raise ConditionError(f"`{field}` nests too deep; calculate and call less in a row", 0) from None
        self._steps = self._expression.steps
        for search in self._expression.searches:
            self._steps += self._search_steps(search)
        strangers = sorted(variables - {*known.rows, *known.others} - self._expression.bound)
        if strangers:
            at = re.search(rf"\b{re.escape(strangers[0])}\b", source)
            remedy = known.elsewhere.get(strangers[0], f"write `{known.prefer}.{strangers[0]}` for a column")
            raise ConditionError(
                f"`{field}` knows {known.variables}, and no `{strangers[0]}`; {remedy}", at.start() if at else 0
            )
        if self._expression.constants:
            raise ConditionError(
                f"`{field}` sees no column as bytes; write text, as PostgreSQL prints the value",
                self._expression.constants[0],
            )
        self._context = cel.Context
        self.reads = {
            row: Reads(frozenset(self._expression.columns[row]), row in self._expression.whole) for row in known.rows
        }

    def _search_steps(self, search: Search) -> int:
        """Return how many steps a search takes at most for each value of a row that it goes through."""
        import cel  # noqa: PLC0415  see above

        offset = search.pattern.start
        try:
            size = states(cel.compile(search.pattern.text).execute())
        except ValueError as error:
            raise ConditionError(f"a regular expression of `{self.field}` {error}", offset) from None
        steps = search.weight * size * STATE_COST
        if size > MOST_STATES or self._steps + steps > MOST_STEPS:
            raise ConditionError(
                f"a regular expression of `{self.field}` is too much work; repeat less in it ({{n,m}})", offset
            )
        return steps

    @property
    def columns(self) -> frozenset[str]:
        """All columns that it names, of whichever row."""
        return frozenset(name for reads in self.reads.values() for name in reads.columns)

    def refuses(self, op: str) -> bool:
        """Return whether it is false for all changes of this kind, whatever the rows hold."""
        # Rows that exist stay undefined: an expression that depends on one fails, and so is not false.
        absent = (ROWS_OF["update"] - ROWS_OF[op]) & set(_FIELDS[self.field].rows)
        try:
            known = self._context({"op": op, **dict.fromkeys(absent)}, functions(order_text=True))
            return self._program.execute(known) is False
        except Exception:  # noqa: BLE001  as when it is asked for a change
            return False

    def misuses(self, columns: Mapping[str, ColumnType]) -> list[str]:
        """Return what it does with columns of these types that CEL can't do as PostgreSQL does: a sentence each."""
        found = (misuse for use in self._expression.uses for misuse in _misuses(use, columns))
        instead = _FIELDS[self.field].instead
        return [f"`{self.field}` {misuse}, or {instead}" for misuse in dict.fromkeys(found)]

    def bind(
        self, names: Sequence[str], types: Sequence[ColumnType], *, gave_up: Callable[[], None] = _ignore
    ) -> Holds:
        """Return the function that decides about changes of one relation; of `when`.

        Args:
            names: the relation's columns.
            types: their types.
            gave_up: is called for each row of which the values are too long for this expression.
        """
        decide = self._decide(names, types, gave_up)
        return lambda op, old, new: decide({"op": op, "old": None, "new": None}, (("old", old), ("new", new)))

    def bind_row(
        self, names: Sequence[str], types: Sequence[ColumnType], *, gave_up: Callable[[], None] = _ignore
    ) -> HoldsOf:
        """Return the function that decides about images of rows of one relation; of `where`."""
        decide = self._decide(names, types, gave_up)
        return lambda row: decide({}, (("row", row),))

    def _decide(
        self, names: Sequence[str], types: Sequence[ColumnType], gave_up: Callable[[], None]
    ) -> Callable[[dict[str, Any], Iterable[tuple[str, Sequence[Value] | None]]], bool]:
        """Return the function that decides for variables, to which it adds those that are rows."""
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
        most = MOST_WORK // max(1, self._steps)

        def decide(values: dict[str, Any], rows: Iterable[tuple[str, Sequence[Value] | None]]) -> bool:
            size = 0
            try:
                for row, columns in rows:
                    if columns is None:
                        continue
                    taken = values[row] = {}
                    for name, position, convert in read_columns[row]:
                        value = columns[position]
                        if value is None:
                            taken[name] = None
                            continue
                        if value is UNCHANGED:
                            return True
                        size += len(value)
                        if size > most:
                            gave_up()
                            return True
                        taken[name] = convert(value)
                return program.execute(context(values, called)) is not False
            except Exception:  # noqa: BLE001  an expression may fail in any way, and none may end the daemon
                return True

        return decide


@lru_cache(1024)
def condition_of(source: str, field: str = "when") -> Condition:
    """Return the condition of this text; one that was compiled lately is not compiled again."""
    return Condition(source, field)


def asked_columns(rule: Rule) -> frozenset[str]:
    """Return the columns that the `where`s of a rule and of its busts read.

    With `columns`, an UPDATE that changes one of these counts too: the row moves into what the cache holds, or out.
    """
    asked = [condition_of(each.source, "where").columns for each in rule.conditions if each.field == "where"]
    return frozenset[str]().union(*asked)


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
        f"uses column {name}, of type {column.name}, with `{use.what}`, but CEL {why}; compare it by == or != "
        "with a column of its type"
    )


def _wrong(source: str, message: str, field: str) -> ConditionError:
    found = _ERROR_AT.search(message)
    if found is None:
        return ConditionError(f"`{field}` is no CEL expression; write one such as `{_FIELDS[field].example}`", 0)
    lines = source.splitlines(keepends=True)
    offset = sum(map(len, lines[: int(found[1]) - 1])) + max(0, int(found[2]) - 1)
    return ConditionError(f"`{field}` is no CEL expression ({found[3].strip()}); {_CORRECT}", offset)
