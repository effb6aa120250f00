"""Names of tables, read as PostgreSQL reads them. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from cdc_invalidator.rules.wording import shown

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_$]*")
_TABLE = re.compile(r"(?:(?P<schema>{0})\.)?(?P<name>{0})".format(r'"(?:[^"\0]|"")+"|[^\W\d][\w$]*'))
_FOLD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


class Table(NamedTuple):
    """A table's name as PostgreSQL's catalogue has it: folded and unquoted. As text, it is ready for SQL."""

    schema: str
    name: str

    def __str__(self) -> str:
        return ".".join(part if _PLAIN_NAME.fullmatch(part) else '"' + part.replace('"', '""') + '"' for part in self)


def read_table(value: object) -> Table:
    """Read a table's name as PostgreSQL reads it: folded to lower case, unless it is in double quotes.

    Raises:
        ValueError: it is none; the message is a sentence with the remedy.
    """
    found = _TABLE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"{shown(str(value))} is not a table; write `schema.table`, names with capitals or signs in double quotes"
        )
    if found["schema"] is None:
        raise ValueError(f"{shown(found[0])} lacks its schema; write {shown('public.' + found[0])}")
    table = Table(_identifier(found["schema"]), _identifier(found["name"]))
    if any(len(name.encode()) > 63 for name in table):
        raise ValueError(
            f"{shown(found[0])} has a name of more than 63 bytes, which PostgreSQL cuts off; cut it as well"
        )
    return table


def _identifier(text: str) -> str:
    return text[1:-1].replace('""', '"') if text.startswith('"') else text.translate(_FOLD)
