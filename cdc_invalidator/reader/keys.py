"""From a read's parameters to its keys, as the daemon makes them of a row. Pure.

The rule that holds here: what the daemon could never bust has no key. The daemon knows values as PostgreSQL prints
them, so `spelling` writes them the same way. NULL has no key, and neither has long text that no filter shortens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdc_invalidator.reader.spelling import Make, NoKey, maker, maker_as_given
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.template import MakeKey, Param, Template

LONGEST = 512
"""Bytes that a value may have which stands in a key as it is."""

NUL = b"\0"


NOTHING: Mapping[str, str] = {}


class Keys:
    """The keys of one cache.

    ``names``: its parameters. Of a cache with a version, `of` gives keys with NUL in the version's place.

    Args:
        cache: the cache.
        types: of its parameters by which busts name keys, as the watermark tells them; ``None`` as long as it does not.
        settings: of the database, for printing values.

    Raises:
        ValueError: the key's template has a filter on its version, or ends in ``*``.
    """

    def __init__(
        self, cache: Cache, types: Mapping[str, str | None] | None = None, settings: Mapping[str, str] = NOTHING
    ) -> None:
        if cache.key.rest:
            raise ValueError(
                f"the key of cache {cache.name} ends in `*`, so its rule file does not say how the whole key is made; "
                "read and fill this cache with your own client, by the fill contract (CONTRACT.md)"
            )
        parts = cache.key.parts
        if cache.version is not None:
            parts = tuple(NUL if _is_version(part) else part for part in parts)
            if any(isinstance(part, Param) and part.name == "version" for part in parts):
                raise ValueError(f"the key of cache {cache.name} has a filter on `version`; take it off")
        key = Template.of(parts)
        versions = cache.version.params if cache.version is not None else ()
        self.names = tuple(dict.fromkeys((*key.params, *versions)))
        templates = (key, *([cache.version] if cache.version is not None else []))
        # A value that is hashed wherever it stands may be of any length.
        self._plain = {
            name
            for template in templates
            for part in template.parts
            if isinstance(part, Param) and not part.hashed
            for name in part.names
        }
        index = {name: at for at, name in enumerate(self.names)}
        self._key: MakeKey = key.compile(index)
        self._version: MakeKey | None = cache.version.compile(index) if cache.version is not None else None
        self._cache_name = cache.name
        types = types or {}
        folded = letters_folded(cache)
        self._makers: list[tuple[str, Make]] = [
            (
                name,
                maker(name, types[name], settings, folded=name in folded) if name in types else maker_as_given(name),
            )
            for name in self.names
        ]

    def of(self, params: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Return the key and the version's key, which is empty where there is none.

        Raises:
            NoKey: the daemon could not bust it.
            TypeError: a parameter is missing or too much, or of a type that PostgreSQL may print in several ways.
        """
        if len(params) != len(self.names):
            raise self._wrong(params)
        row = []
        for name, make in self._makers:
            try:
                value = params[name]
            except KeyError:
                raise self._wrong(params) from None
            text = make(value)
            if len(text) > LONGEST and name in self._plain:
                raise NoKey("unbounded")
            if NUL in text:
                raise NoKey("unprintable")
            row.append(text)
        key = self._key(row)
        version = self._version(row) if self._version is not None else b""
        assert key is not None
        assert version is not None
        return key, version

    def _wrong(self, params: Mapping[str, Any]) -> TypeError:
        wanted = ", ".join(self.names) or "none"
        given = ", ".join(params) or "none"
        return TypeError(f"cache {self._cache_name} has the parameters {wanted}, and was given {given}")


class NoKeys:
    """Instead of `Keys` where caches are disabled: parameters are checked, and none have a key.

    ``names``: ``None`` where no rule file says them.
    """

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys
        self.names = keys.names if keys is not None else None

    def of(self, params: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Check parameters.

        Raises:
            NoKey: always, unless they are wrong.
            TypeError: as from `Keys.of`.
        """
        if self._keys is not None:
            self._keys.of(params)
        raise NoKey("disabled")


def letters_folded(cache: Cache) -> set[str]:
    """Return the parameters of which busts' keys don't show whether letters are large or small."""
    shown: set[str] = set()
    folded: set[str] = set()
    for part in cache.bust_template.parts:
        if isinstance(part, Param):
            changed = not part.parts and part.filters[:1] in {("lower",), ("upper",)}
            (folded if changed else shown).update(part.names)
    return folded - shown


def _is_version(part: bytes | Param) -> bool:
    return isinstance(part, Param) and part.name == "version" and not part.filters
