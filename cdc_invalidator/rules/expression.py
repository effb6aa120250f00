"""Reads a CEL expression: which columns it names and what it does with them. Pure.

It also writes the expression anew, with calls of the functions of `comparison` in the places of CEL's operators. The
CEL library has found the text right before; the grammar is that of https://github.com/google/cel-spec.

And it counts how much work the expression is at most, because nobody can stop the CEL library once it works. A *weight*
is how many values a result may hold (a text that is put together of three counts as three); what looks at a result
takes a step for each. The body of a macro takes its steps once for each value that the macro goes through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cdc_invalidator.rules.comparison import MATCHES, NAMES, NEGATE, PLAIN, TEXT_OF, Kind, decimal_literal
from cdc_invalidator.rules.wording import nearest

_TOKEN = re.compile(
    r"""
      (?: \s | //[^\n]* )+
    | (?P<bytes> [bB][rR]? (?:'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*") )
    | (?P<raw> [rR] (?:'''.*?'''|\"\"\".*?\"\"\"|'[^']*'|"[^"]*") )
    | (?P<string> '''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*" )
    | (?P<float> \d*\.\d+(?:[eE][-+]?\d+)? | \d+[eE][-+]?\d+ )
    | (?P<int> 0[xX][0-9a-fA-F]+[uU]? | \d+[uU]? )
    | (?P<name> [A-Za-z_]\w* )
    | (?P<sign> && | \|\| | [=!<>]= | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_MACROS = frozenset({"all", "exists", "exists_one", "filter", "map"})
# What functions give, as far as it is known before they are called.
_GIVES = {
    "timestamp": Kind.TIME, "duration": Kind.OTHER, "string": Kind.TEXT, "bool": Kind.FLAG,
    **dict.fromkeys(("int", "uint", "double", "size"), Kind.NUMBER),
}  # fmt: skip
# What conditions may call.
FUNCTIONS = frozenset({
    "bool", "bytes", "contains", "double", "duration", "dyn", "endsWith", "int", "matches", "size", "startsWith",
    "string", "timestamp", "type", "uint",
    "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours", "getMilliseconds",
    "getMinutes", "getMonth", "getSeconds",
})  # fmt: skip
# Those of which the result is as large as what they are given; that of the others is one value.
_COPIES = frozenset({"bytes", "dyn", "string"})
# Steps that an expression may take: some ms.
MOST_STEPS = 10_000
# How deep parts of an expression may stand in each other, so that no reader's stack ends.
MOST_NESTED = 40
# The columns that a row is taken to have, where an expression reads it as a whole.
_ROW_WEIGHT = 200
# A text that is written out counts as one value for so many signs.
_TEXT_WEIGHT = 64
_LEVELS = ({"||"}, {"&&"}, {"<", "<=", ">", ">=", "==", "!=", "in"}, {"+", "-"}, {"*", "/", "%"})


class Operand(NamedTuple):
    """A part of an expression, written anew; and what is known of it before any row is.

    ``column``: the column that it is, if it is one; ``row``: the row that it is, as a whole; ``kind``: that of a
    literal, or of what a function gives; ``null``: it is null; ``elements``: those of a list that is written out;
    ``weight``: of its result; ``literal``: it is a text that is written out.
    """

    text: str
    start: int
    column: str = ""
    row: str | None = None
    kind: Kind | None = None
    null: bool = False
    elements: Sequence[Operand] | None = None
    weight: int = 1
    literal: bool = False


class Use(NamedTuple):
    """Something that an expression does with values: an operator's sign, ``.`` (a member), or a function's name."""

    what: str
    operands: Sequence[Operand]


class Search(NamedTuple):
    """A search for a regular expression: the literal, written as in CEL; how much text it goes through."""

    pattern: Operand
    weight: int


class TooMuchError(ValueError):
    """An expression may do too much, or what nobody knows the work of; ``offset`` is where."""

    def __init__(self, sentence: str, offset: int) -> None:
        self.offset = offset
        super().__init__(sentence)


@dataclass(slots=True)
class Expression:
    """An expression that was read.

    ``text``: it, written anew; ``columns``: those that it names, by row; ``whole``: rows that it reads as a whole;
    ``bound``: names that macros bind; ``constants``: bytes that it writes out; ``steps``: how many it takes at most,
    without those of its ``searches``.
    """

    text: str = ""
    uses: list[Use] = field(default_factory=list)
    columns: dict[str, set[str]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    constants: list[int] = field(default_factory=list)
    steps: int = 0
    searches: list[Search] = field(default_factory=list)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def _tokens(source: str) -> Iterator[_Token]:
    for found in _TOKEN.finditer(source):
        if found.lastgroup is not None:
            yield _Token(found.lastgroup, found[0], found.start())
    yield _Token("end", "", len(source))


def read(source: str, rows: Iterable[str]) -> Expression:
    """Read an expression that the CEL library takes.

    Args:
        source: its text.
        rows: the variables that are rows.

    Raises:
        TooMuchError: it is too much work.
        ValueError: it is none.
    """
    return _Reader(source, rows).read()


class _Reader:
    """Goes through the text once. Each method reads one thing of the grammar, and returns it written anew."""

    def __init__(self, source: str, rows: Iterable[str]) -> None:
        self._tokens = list(_tokens(source))
        self._at = 0
        self._found = Expression(columns={row: set() for row in rows})
        # How often what is read now runs; how deep it stands; the weights of the names that macros bind.
        self._times = 1
        self._depth = 0
        self._bound: dict[str, int] = {}

    def read(self) -> Expression:
        whole = self._value(self._ternary())
        if self._next.kind != "end":
            raise ValueError(f"unexpected {self._next.text!r}")
        self._found.text = whole.text
        return self._found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> bool:
        if self._next.kind in {"sign", "name"} and self._next.text in texts:
            self._at += 1
            return True
        return False

    def _must(self, text: str) -> None:
        if not self._take(text):
            raise ValueError(f"{text!r} is missing")

    def _spend(self, steps: int, start: int) -> None:
        self._found.steps += self._times * steps
        if self._found.steps > MOST_STEPS:
            raise TooMuchError(
                f"takes more than {MOST_STEPS:,} steps for one row; take macros (`all`, `map`, …) out of each other, "
                "or shorten its lists",
                start,
            )

    @contextmanager
    def _nested(self) -> Iterator[None]:
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise TooMuchError(f"nests more than {MOST_NESTED} deep; take parentheses out", self._next.start)
        yield
        self._depth -= 1

    def _value(self, operand: Operand) -> Operand:
        """Note that a row is read as a whole, where it is."""
        if operand.row is not None:
            self._found.whole.add(operand.row)
        return operand

    def _ternary(self) -> Operand:
        with self._nested():
            condition = self._binary(0)
            if not self._take("?"):
                return condition
            yes = self._value(self._binary(0))
            self._must(":")
            no = self._value(self._ternary())
        weight = max(yes.weight, no.weight)
        return Operand(f"({condition.text} ? {yes.text} : {no.text})", condition.start, weight=weight)

    def _binary(self, level: int) -> Operand:
        if level == len(_LEVELS):
            return self._unary()
        left, joined = self._binary(level + 1), False
        while self._next.text in _LEVELS[level] and self._next.kind in {"sign", "name"}:
            sign = self._next.text
            self._at += 1
            right = self._value(self._binary(level + 1))
            self._value(left)
            self._found.uses.append(Use(sign, (left, right)))
            if sign in NAMES:
                both = left.weight + right.weight
                self._spend(both, left.start)
                text = f"{NAMES[sign]}({left.text}, {right.text})"
                left = Operand(text, left.start, weight=both if sign == "+" else 1)
            else:
                # A row of them stays one, however long it is: no reader of it need go deep.
                self._spend(1, left.start)
                left = Operand(f"{left.text} {sign} {right.text}", left.start)
                joined = True
        return left._replace(text=f"({left.text})") if joined else left

    def _unary(self) -> Operand:
        start = self._next.start
        if self._take("!"):
            with self._nested():
                return Operand(f"!{self._value(self._unary()).text}", start)
        if self._take("-"):
            if self._next.kind in {"int", "float"}:
                return self._number("-")
            with self._nested():
                return Operand(f"{NEGATE}({self._value(self._unary()).text})", start)
        return self._member(self._primary())

    def _number(self, sign: str = "") -> Operand:
        token = self._next
        self._at += 1
        self._spend(1, token.start)
        text = sign + token.text
        return self._member(
            Operand(decimal_literal(text) if token.kind == "float" else text, token.start, kind=Kind.NUMBER)
        )

    def _member(self, left: Operand) -> Operand:
        while True:
            if self._take("."):
                name = self._next
                self._at += 1
                left = self._method(left, name) if self._take("(") else self._field(left, name.text, f".{name.text}")
            elif self._take("["):
                index = self._next
                quoted = index.kind in {"string", "raw"} and self._tokens[self._at + 1].text == "]"
                inner = self._value(self._ternary())
                self._must("]")
                name_of = _unquoted(index.text) if quoted else None
                left = self._field(left, name_of, f"[{inner.text}]")
            else:
                return left

    def _field(self, left: Operand, name: str | None, written: str) -> Operand:
        text = left.text + written
        self._spend(1, left.start)
        if left.row is None:
            self._found.uses.append(Use(".", (left,)))
            return Operand(text, left.start, weight=left.weight)
        if name is None:
            return Operand(self._value(left).text + written, left.start)
        self._found.columns[left.row].add(name)
        return Operand(text, left.start, column=name)

    def _method(self, left: Operand, name: _Token) -> Operand:
        self._value(left)
        if name.text in _MACROS:
            return self._macro(left, name.text)
        given = self._list(")")
        weight = self._call(name, (left, *given))
        if name.text == "matches" and len(given) == 1:
            (pattern,) = given
            if not pattern.literal:
                raise TooMuchError("searches for an expression that is not written out; write it as a text", name.start)
            self._found.searches.append(Search(pattern, self._times * left.weight))
            return Operand(f"{MATCHES}({PLAIN}({left.text}), {pattern.text})", left.start)
        text = f"{PLAIN}({left.text}).{name.text}({self._written(given, PLAIN)})"
        return Operand(text, left.start, weight=weight)

    def _macro(self, left: Operand, name: str) -> Operand:
        variable, before = self._next.text, dict(self._bound)
        self._found.bound.add(variable)
        times = self._times
        # How many values the macro goes through, and the weight of the heaviest, where that is seen.
        many, each = left.weight, 1 if left.row is not None else left.weight
        if left.elements is not None:
            many, each = len(left.elements), max((element.weight for element in left.elements), default=1)
        self._times *= many
        self._bound[variable] = each
        given = self._list(")")
        self._times, self._bound = times, before
        self._spend(many, left.start)
        weights = {"map": 1 + many * sum(body.weight for body in given[1:]), "filter": left.weight}
        return Operand(f"{left.text}.{name}({self._written(given)})", left.start, weight=weights.get(name, 1))

    def _call(self, name: _Token, given: Sequence[Operand]) -> int:
        """Note a call of a function; return the weight of its result."""
        if name.text not in FUNCTIONS:
            remedy = nearest(name.text, sorted(FUNCTIONS))
            raise TooMuchError(f"calls {name.text}(), which is no function here; {remedy}", name.start)
        self._found.uses.append(Use(name.text, given))
        weight = sum(each.weight for each in given)
        self._spend(1 + weight, name.start)
        return weight if name.text in _COPIES else 1

    def _list(self, end: str) -> list[Operand]:
        found = []
        while not self._take(end):
            found.append(self._value(self._ternary()))
            if not self._take(","):
                self._must(end)
                break
        return found

    @staticmethod
    def _written(operands: Sequence[Operand], around: str = "") -> str:
        return ", ".join(f"{around}({operand.text})" if around else operand.text for operand in operands)

    def _primary(self) -> Operand:
        token = self._next
        if token.kind in {"int", "float"}:
            return self._number()
        self._at += 1
        weight = 1 + (len(token.text) // _TEXT_WEIGHT)
        self._spend(weight, token.start)
        if token.kind in {"string", "raw"}:
            return Operand(token.text, token.start, kind=Kind.TEXT, weight=weight, literal=True)
        if token.kind == "bytes":
            self._found.constants.append(token.start)
            return Operand(token.text, token.start)
        if token.kind == "name":
            return self._name(token)
        if token.text == "(":
            inside = self._ternary()
            self._must(")")
            return inside._replace(text=f"({inside.text})")
        if token.text == "[":
            elements = self._list("]")
            weight = 1 + sum(each.weight for each in elements)
            self._spend(weight, token.start)
            return Operand(f"[{self._written(elements)}]", token.start, elements=elements, weight=weight)
        if token.text == "{":
            return self._map(token)
        raise ValueError(f"unexpected {token.text!r}")

    def _name(self, token: _Token) -> Operand:
        if self._take("("):
            if token.text == "has":
                field_of = self._value(self._ternary())
                self._must(")")
                return Operand(f"has({field_of.text})", token.start)
            given = self._list(")")
            weight = self._call(token, given)
            around = TEXT_OF if token.text == "string" else PLAIN
            text = f"{token.text}({self._written(given, around)})"
            return Operand(text, token.start, kind=_GIVES.get(token.text), weight=weight)
        if token.text in {"true", "false"}:
            return Operand(token.text, token.start, kind=Kind.FLAG)
        weight = self._bound.get(token.text, 1)
        if token.text in self._found.columns:
            return Operand(token.text, token.start, row=token.text, weight=max(weight, _ROW_WEIGHT))
        kind = Kind.TEXT if token.text == "op" else None
        return Operand(token.text, token.start, kind=kind, null=token.text == "null", weight=weight)

    def _map(self, token: _Token) -> Operand:
        entries = []
        weight = 1
        while not self._take("}"):
            key = self._value(self._ternary())
            self._must(":")
            value = self._value(self._ternary())
            entries.append(f"{key.text}: {value.text}")
            weight += key.weight + value.weight
            if not self._take(","):
                self._must("}")
                break
        self._spend(weight, token.start)
        return Operand(f"{{{', '.join(entries)}}}", token.start, weight=weight)


def _unquoted(text: str) -> str | None:
    text = text.lstrip("rR")
    return None if "\\" in text else text.strip(text[0])
