"""Does a query read a table? As far as its text shows, without a server. Pure.

The rule that holds here: where that is not plain, it reads one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cdc_invalidator.rules.template import Param

_WORD = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|[\w$.]+|\S", re.DOTALL)
# What begins a list of tables, and what ends one.
_BEGINS = frozenset({"from", "join"})
_ENDS = frozenset(
    {"select", "where", "group", "having", "order", "limit", "offset", "union", "except", "intersect", "on"}
)
_BESIDE = frozenset({"lateral", "only"})


def reads_no_table(parts: Sequence[str | Param]) -> bool:
    """Return whether a query is an expression over the columns of the changed row, and gives the same at any time.

    A function that is written with its schema may read a table; others are taken for PostgreSQL's own.
    """
    text = "".join(part if isinstance(part, str) else " $1 " for part in parts)
    words = [word.lower() for word in _WORD.findall(text) if not word.startswith(("--", "/*"))]
    if "with" in words or "table" in words:
        return False
    listing = [False]
    for at, word in enumerate(words):
        rest = [*(each for each in words[at + 1 : at + 4] if each not in _BESIDE), "", ""]
        if word == "(":
            if at and "." in words[at - 1] and not words[at - 1].startswith("pg_catalog."):
                return False
            listing.append(False)
        elif word == ")" and len(listing) > 1:
            listing.pop()
        elif word in _BEGINS or (word == "," and listing[-1]):
            if _is_name(rest[0]) and rest[1] != "(":
                return False
            listing[-1] = True
        elif word in _ENDS:
            listing[-1] = False
    return True


def _is_name(word: str) -> bool:
    return word.startswith('"') or (word[:1].isalpha() or word[:1] == "_")
