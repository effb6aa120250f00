"""Reads a CEL expression: which columns it names and what it does with them. Pure.

It also writes the expression anew, with calls of the functions of `comparison` in the places of CEL's operators. The
CEL library has found the text right before; the grammar is that of https://github.com/google/cel-spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cdc_invalidator.rules.comparison import NAMES, NEGATE, PLAIN, TEXT_OF, Kind, decimal_literal

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
_LEVELS = ({"||"}, {"&&"}, {"<", "<=", ">", ">=", "==", "!=", "in"}, {"+", "-"}, {"*", "/", "%"})


class Operand(NamedTuple):
    """A part of an expression, written anew; and what is known of it before any row is.

    ``column``: the column that it is, if it is one; ``row``: the row that it is, as a whole; ``kind``: that of a
    literal, or of what a function gives; ``null``: it is null; ``elements``: those of a list that is written out.
    """

    text: str
    start: int
    column: str = ""
    row: str | None = None
    kind: Kind | None = None
    null: bool = False
    elements: Sequence[Operand] | None = None


class Use(NamedTuple):
    """Something that an expression does with values: an operator's sign, ``.`` (a member), or a function's name."""

    what: str
    operands: Sequence[Operand]


@dataclass(slots=True)
class Expression:
    """An expression that was read.

    ``text``: it, written anew; ``columns``: those that it names, by row; ``whole``: rows that it reads as a whole;
    ``bound``: names that macros bind; ``constants``: bytes that it writes out.
    """

    text: str = ""
    uses: list[Use] = field(default_factory=list)
    columns: dict[str, set[str]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    constants: list[int] = field(default_factory=list)


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
        ValueError: it is none.
    """
    return _Reader(source, rows).read()


class _Reader:
    """Goes through the text once. Each method reads one thing of the grammar, and returns it written anew."""

    def __init__(self, source: str, rows: Iterable[str]) -> None:
        self._tokens = list(_tokens(source))
        self._at = 0
        self._found = Expression(columns={row: set() for row in rows})

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

    def _value(self, operand: Operand) -> Operand:
        """Note that a row is read as a whole, where it is."""
        if operand.row is not None:
            self._found.whole.add(operand.row)
        return operand

    def _ternary(self) -> Operand:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        yes = self._value(self._binary(0))
        self._must(":")
        no = self._value(self._ternary())
        return Operand(f"({condition.text} ? {yes.text} : {no.text})", condition.start)

    def _binary(self, level: int) -> Operand:
        if level == len(_LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while self._next.text in _LEVELS[level] and self._next.kind in {"sign", "name"}:
            sign = self._next.text
            self._at += 1
            right = self._value(self._binary(level + 1))
            self._value(left)
            self._found.uses.append(Use(sign, (left, right)))
            if sign in NAMES:
                left = Operand(f"{NAMES[sign]}({left.text}, {right.text})", left.start)
            else:
                left = Operand(f"({left.text} {sign} {right.text})", left.start)
        return left

    def _unary(self) -> Operand:
        start = self._next.start
        if self._take("!"):
            return Operand(f"!{self._value(self._unary()).text}", start)
        if self._take("-"):
            if self._next.kind in {"int", "float"}:
                return self._number("-")
            return Operand(f"{NEGATE}({self._value(self._unary()).text})", start)
        return self._member(self._primary())

    def _number(self, sign: str = "") -> Operand:
        token = self._next
        self._at += 1
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
        if left.row is None:
            self._found.uses.append(Use(".", (left,)))
            return Operand(text, left.start)
        if name is None:
            return Operand(self._value(left).text + written, left.start)
        self._found.columns[left.row].add(name)
        return Operand(text, left.start, column=name)

    def _method(self, left: Operand, name: _Token) -> Operand:
        self._value(left)
        if name.text in _MACROS:
            self._found.bound.add(self._next.text)
            return Operand(f"{left.text}.{name.text}({self._written(self._list(')'))})", left.start)
        given = self._list(")")
        self._found.uses.append(Use(name.text, (left, *given)))
        return Operand(f"{PLAIN}({left.text}).{name.text}({self._written(given, PLAIN)})", left.start)

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
        if token.kind in {"string", "raw"}:
            return Operand(token.text, token.start, kind=Kind.TEXT)
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
            return Operand(f"[{self._written(elements)}]", token.start, elements=elements)
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
            self._found.uses.append(Use(token.text, given))
            around = TEXT_OF if token.text == "string" else PLAIN
            return Operand(f"{token.text}({self._written(given, around)})", token.start, kind=_GIVES.get(token.text))
        if token.text in {"true", "false"}:
            return Operand(token.text, token.start, kind=Kind.FLAG)
        if token.text in self._found.columns:
            return Operand(token.text, token.start, row=token.text)
        kind = Kind.TEXT if token.text == "op" else None
        return Operand(token.text, token.start, kind=kind, null=token.text == "null")

    def _map(self, token: _Token) -> Operand:
        entries = []
        while not self._take("}"):
            key = self._value(self._ternary())
            self._must(":")
            entries.append(f"{key.text}: {self._value(self._ternary()).text}")
            if not self._take(","):
                self._must("}")
                break
        return Operand(f"{{{', '.join(entries)}}}", token.start)


def _unquoted(text: str) -> str | None:
    text = text.lstrip("rR")
    return None if "\\" in text else text.strip(text[0])
