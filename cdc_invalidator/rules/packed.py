"""Several texts in one: a query's arguments, or a version's key and a key, travel the data path as one key. Pure.

NUL stands between them, since no text of PostgreSQL holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cdc_invalidator.rules.template import Param, Template


def join_arguments(values: Iterable[bytes | None]) -> bytes:
    """Pack a query's arguments, each of which may be NULL."""
    return b"\0".join(b"-" if value is None else b"+" + value for value in values)


def split_arguments(arguments: bytes) -> list[bytes | None]:
    """Unpack what `join_arguments` packed."""
    return [value[1:] if value.startswith(b"+") else None for value in arguments.split(b"\0")]


class Question(NamedTuple):
    """What a query is asked for one row: packed arguments.

    ``expects``: the row is gone or has moved away, and an entry of it may be cached, so that an answer without any key
    means that a joined row is gone too.
    """

    arguments: bytes
    expects: bool

    @classmethod
    def split(cls, packed: bytes) -> Question:
        """Unpack what `pack` gives."""
        return cls(packed[1:], expects=True) if packed.startswith(_EXPECTS) else cls(packed, expects=False)

    def pack(self) -> bytes:
        """Return it as one text, that travels the data path as a key does."""
        return _EXPECTS + self.arguments if self.expects else self.arguments


# No packed argument begins with it.
_EXPECTS = b"!"


class Pair(NamedTuple):
    """Of a cache with ``bump_over``: a version's key, and a key under that version with NUL in the version's place."""

    version: bytes
    rest: bytes

    @classmethod
    def split(cls, busted: bytes) -> Pair:
        """Unpack what a template made by `pair` gives."""
        version, _, rest = busted.partition(b"\0")
        return cls(version, rest)

    def key(self, version: bytes) -> bytes:
        """Return the key under this version."""
        return self.rest.replace(b"\0", version)


def pair(version: Template, key: Template) -> Template:
    """Return a template that packs a `Pair`."""
    rest = [b"\0" if isinstance(part, Param) and part.name == "version" else part for part in key.parts]
    return Template.of((*version.parts, b"\0", *rest))
