"""How much work a regular expression may be. Pure.

The engine (Rust's, within pydantic) never goes back in a text, so a search takes at most as many steps as the text has
bytes, times the states of the compiled expression. Here they are counted, never too few: what is repeated 100 times is
100 times as large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

MOST_STATES = 1000
# What one state costs for each byte, as compared with what else is done with a text.
STATE_COST = 3

_ATOM = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|.", re.DOTALL)
_TIMES = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
# In this mode blanks and comments don't count, and so hide what a repetition repeats.
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


def states(pattern: str) -> int:
    """Return roughly how many states an expression has, and at least a third of them.

    Raises:
        ValueError: it is none, or written in a way that hides its size; one sentence's end.
    """
    if _VERBOSE.search(pattern):
        raise ValueError("is written with the flag x; write it without blanks and comments")
    # By group: its size, and that of the last thing in it, which a repetition repeats.
    groups = [[0, 0]]
    for atom in _atoms(pattern):
        group = groups[-1]
        if atom == "(":
            groups.append([0, 0])
        elif atom == ")" and len(groups) > 1:
            inner = groups.pop()[0] + 1
            groups[-1] = [groups[-1][0] + inner, inner]
        elif times := _TIMES.fullmatch(atom):
            again = max(1, *(int(each) for each in times.groups() if each)) if any(times.groups()) else 1
            groups[-1] = [group[0] + group[1] * (again - 1), group[1] * again]
        elif atom not in {"*", "+", "?"}:
            groups[-1] = [group[0] + 1, 1]
    found = sum(size for size, _ in groups)
    if found <= MOST_STATES:
        _validator(pattern)
    return found


def _atoms(pattern: str) -> Iterator[str]:
    """Yield the parts of an expression; a class in brackets is one, and so is a repetition."""
    at = 0
    while at < len(pattern):
        end = _class_end(pattern, at) if pattern[at] == "[" else at
        if end == at:
            found = _TIMES.match(pattern, at) or _ATOM.match(pattern, at)
            assert found is not None
            end = found.end()
        yield pattern[at:end]
        at = end


def _class_end(pattern: str, at: int) -> int:
    """Return where the class ends that begins here; classes may stand in one another."""
    depth, first = 0, False
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            at += 1
        elif sign == "[":
            depth += 1
            first = True
            at += 1 + pattern.startswith("^", at + 1)
            continue
        elif sign == "]" and not first:
            depth -= 1
            if depth == 0:
                return at + 1
        first = False
        at += 1
    return at


def found_in(text: str, pattern: str) -> bool:
    """Return whether a text holds what a checked expression describes."""
    return _validator(pattern).isinstance_python(text)


@lru_cache(1024)
def _validator(pattern: str) -> SchemaValidator:
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))
    except SchemaError as error:
        lines = str(error).strip().splitlines()
        raise ValueError(f"is none ({lines[-1].removeprefix('error: ').strip()}); correct it") from None
