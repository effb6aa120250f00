"""The names of the columns that a `via` query returns, as far as its text alone proves them. Pure.

The rule that holds here: what is not sure is not said. `*`, an expression without a name and a WITH give ``None``.
"""

from __future__ import annotations

import re

from cdc_invalidator.rules.model import Query

_TOKEN = re.compile(
    r"""
      (?P<space> \s+ | --[^\n]* | /\*.*?\*/ )
    | (?P<text> '(?:[^']|'')*' )
    | (?P<name> "(?:[^"]|"")+" | [^\W\d][\w$]* )
    | (?P<sign> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_ENDS = frozenset(
    "from where union intersect except group having window order limit offset fetch for into".split()  # noqa: SIM905
)
# Words that are values, not columns.
_VALUES = frozenset({"null", "true", "false", "default"})


def selected(query: Query) -> tuple[str, ...] | None:
    """Return the names that the query's rows have; ``None`` where that is not certain."""
    # A column of the changed row is an operand without a name.
    text = "".join(part if isinstance(part, str) else "0" for part in query.parts)
    tokens = [token for token in _TOKEN.finditer(text) if token.lastgroup != "space"]
    # With a backslash or a dollar sign, texts may end elsewhere than it seems.
    if (
        "\\" in text
        or any(token[0] in "'\"$" for token in tokens)
        or [_word(token) for token in tokens[:1]] != ["select"]
    ):
        return None
    at = 2 if len(tokens) > 1 and _word(tokens[1]) in {"all", "distinct"} else 1
    items: list[list[re.Match[str]]] = [[]]
    depth = 0
    for token in tokens[at:]:
        depth += (token[0] in "([") - (token[0] in ")]")
        if depth == 0 and (token[0] == ";" or _word(token) in _ENDS):
            break
        if depth == 0 and token[0] == ",":
            items.append([])
        else:
            items[-1].append(token)
    names = [_named(item) for item in items]
    return None if None in names else tuple(name for name in names if name is not None)


def _word(token: re.Match[str]) -> str:
    """Return a word that is no name in quotes, in lower case; empty for all else."""
    return token[0].lower() if token.lastgroup == "name" and not token[0].startswith('"') else ""


def _named(item: list[re.Match[str]]) -> str | None:
    """Return the name of an entry of the list: the one after AS, or that of a column."""
    if not item or item[-1].lastgroup != "name" or _word(item[0]) in {"on", *_VALUES}:
        return None
    if len(item) > 2 and _word(item[-2]) == "as":
        return _name(item[-1][0])
    is_path = all(token.lastgroup == "name" if at % 2 == 0 else token[0] == "." for at, token in enumerate(item))
    return _name(item[-1][0]) if is_path else None


def _name(text: str) -> str:
    return text[1:-1].replace('""', '"') if text.startswith('"') else text.lower()
