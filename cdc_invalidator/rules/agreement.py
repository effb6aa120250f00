"""What readers and the daemon must agree on: how the values of a row become keys. Pure.

The rule that holds here: where the digests are the same, both name the same key for the same values. So all that names
depend on is in them: the templates after the environment, the names beside a key, and whether busts name keys or
versions; and `RELEASE`, which goes up with each change of how values are written, or keys made of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cdc_invalidator.rules.draft import canonical_parts, short_digest
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

RELEASE = 1

FIELDS = ("templates", "types", "settings")
"""The fields of the watermark with what the daemon says; each is JSON. A field ``agreed`` has their digest."""


@dataclass(frozen=True)
class Agreement:
    """What the daemon says, of all caches of its rule files, also of those that have a gap.

    ``templates``: by cache, its `templates_digest`. ``types``: by cache and parameter, the type of the column that
    busts take it from, see `postgres.parameters`; ``None`` where that is not known. A parameter that no bust names is
    left out. ``settings``: by name, the settings of the database that values are printed with, as SHOW prints them.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fields(self) -> Mapping[str, str]:
        """The fields of the watermark with it."""
        return {
            name: json.dumps(getattr(self, name), separators=(",", ":"), sort_keys=True, default=dict)
            for name in FIELDS
        }

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with it."""
        return short_digest(*self.fields.values())


def templates_digest(cache: Cache) -> str:
    """Return 16 hexadecimal digits that change with how the keys of a cache are made and busted."""
    return short_digest(
        RELEASE,
        [LOCK_SUFFIX.decode(), STALE_SUFFIX.decode()],
        canonical_parts(cache.key),
        cache.version and canonical_parts(cache.version),
        cache.bump_over is not None,
        cache.ttl_only,
    )
