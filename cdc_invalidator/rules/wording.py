"""How errors about rule files point to a place, quote a text and suggest a name. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple


class Place(NamedTuple):
    """Where something stands in a rule file; line and column count from 1."""

    file: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


def shown(text: str, limit: int = 80) -> str:
    """Return the text as an error quotes it: one printable line, between backticks, cut at ``limit`` characters."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return f"`{line}`" if len(line) <= limit else f"`{line[:limit]}…`"


def nearest(name: str, valid: Iterable[str], otherwise: str = "") -> str:
    """Return the remedy for an unknown name: the nearest valid one, else ``otherwise``, else all valid ones."""
    names = list(valid)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {shown(near[0])}?" if near else otherwise or f"write one of {', '.join(names)}"
