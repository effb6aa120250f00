"""What a `via` query does, as far as its text shows, without a server. Pure.

Does it read a table? Where that is not plain, it reads one. Is it one SELECT, without functions that do what a
transaction that is READ ONLY would not keep from happening? Where that is not plain, it is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

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


# As PostgreSQL reads it, with standard_conforming_strings. A word that begins with a digit is a number.
_LEXEME = re.compile(
    r"""
      (?P<space> \s+ | --[^\n]* )
    | (?P<comment> /\*.*?\*/ )
    | (?P<escaped> [eE]'(?:[^'\\]|''|\\.)*' )
    | (?P<text> (?:[uU]&|[bBxXnN])?'(?:[^']|'')*' | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$ )
    | (?P<strange> [uU]&" )
    | (?P<quoted> "(?:[^"]|"")+" )
    | (?P<word> \w[\w$]* )
    | (?P<sign> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_STATEMENTS = frozenset({"select", "with", "values", "table"})
# PostgreSQL's own functions that write, wait, lock, end sessions, keep WAL or run a text as SQL: those that its catalog
# calls volatile. All names that begin so, but for the harmless ones; and single ones.
_RISKY = (
    *("pg_", "lo_", "binary_upgrade_", "brin_"),
    *("query_to_xml", "cursor_to_xml", "database_to_xml", "schema_to_xml", "table_to_xml"),
)
_RISKY_NAMES = frozenset({
    "currtid2", "current_query", "gin_clean_pending_list", "loread", "lowrite", "nextval", "set_config", "setval",
    "ts_rewrite", "ts_stat", "txid_current", "txid_status",
})  # fmt: skip
_HARMLESS = frozenset({
    "pg_char_to_encoding", "pg_column_size", "pg_encoding_to_char", "pg_input_error_info", "pg_input_is_valid",
    "pg_size_bytes", "pg_size_pretty", "pg_typeof",
})  # fmt: skip


def not_only_a_select(parts: Sequence[str | Param]) -> str | None:
    """Return what keeps a query from being a single SELECT that only reads, as the end of a sentence; else ``None``."""
    text = "".join(part if isinstance(part, str) else " 0 " for part in parts)
    found = [each for each in _LEXEME.finditer(text) if each.lastgroup != "space"]
    if any(each.lastgroup == "comment" and "/*" in each[0][2:] for each in found):
        return "has a comment in a comment; take it out"
    lexemes = [each for each in found if each.lastgroup != "comment"]
    if any(each.lastgroup == "strange" for each in lexemes):
        return 'has a name that is written with U&"…"; write it plainly'
    if any(one.lastgroup == "escaped" and other[0][0] == "'" for one, other in pairwise(lexemes)):
        return "has a text that goes on after E'…'; write it as one"
    words = [each[0].lower() for each in lexemes]
    if not set(words[:1]) <= {"(", *_STATEMENTS} or not words:
        return "does not begin with SELECT; it may only read"
    depth = 0
    for word in words:
        depth += (word == "(") - (word == ")")
        if depth < 0 or word == ";":
            return f"has a `{word}` that ends it; write a single SELECT"
    if depth:
        return "has a `(` that nothing closes; write a single SELECT"
    called = (
        (lexemes[at - 2 : at] if words[at - 1 : at] == ["."] else [], lexemes[at])
        for at, after in enumerate(words[1:])
        if after == "(" and lexemes[at].lastgroup in {"word", "quoted"}
    )
    for schema, function in called:
        name = _plain(function)
        if _is_risky(name, _plain(schema[0]) if len(schema) > 1 else "pg_catalog"):
            return f"calls {name}(), which may do more than read; take it out"
    return None


def _plain(lexeme: re.Match[str]) -> str:
    return lexeme[0][1:-1].replace('""', '"') if lexeme.lastgroup == "quoted" else lexeme[0].lower()


def _is_risky(name: str, schema: str) -> bool:
    if name.startswith("dblink"):
        return True
    risky = name.startswith(_RISKY) or name in _RISKY_NAMES
    return schema == "pg_catalog" and risky and name not in _HARMLESS


def _is_name(word: str) -> bool:
    return word.startswith('"') or (word[:1].isalpha() or word[:1] == "_")
