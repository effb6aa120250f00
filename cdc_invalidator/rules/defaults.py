"""`defaults`: what the caches and rules of one file have where they say nothing themselves. Pure.

A default never gives a cache what it could not use: see `Defaults.cache`. What an entry says itself always wins.
"""

from __future__ import annotations

from typing import Any, TypeVar

from cdc_invalidator.rules.document import Document
from cdc_invalidator.rules.duration import LONGEST_AGAIN, TOO_LONG
from cdc_invalidator.rules.format import CacheEntry, RuleEntry, defaults

Entry = TypeVar("Entry", CacheEntry, RuleEntry)

_OF_RULES = frozenset({"old_row"})
# A cache that is never busted has no use for these.
_OF_BUSTS = frozenset({"again_after", "stale_for"})


class Defaults:
    """The defaults of one file; a mistake in them is noted in its document.

    Args:
        document: the file.
    """

    def __init__(self, document: Document) -> None:
        entry, wrong = defaults(document)
        given = {name: getattr(entry, name) for name in entry.model_fields_set}
        if given.get("again_after", 0) > LONGEST_AGAIN:
            document.complain(("defaults", "again_after"), TOO_LONG.format(field="again_after"))
            del given["again_after"]
        if "ttl" in wrong:
            given["ttl"] = 1  # so that a `jitter` is not told to lack one
        self._of_rules = {name: value for name, value in given.items() if name in _OF_RULES}
        self._of_caches = {name: value for name, value in given.items() if name not in _OF_RULES}

    def cache(self, entry: CacheEntry) -> CacheEntry:
        """Return a cache with its defaults.

        What was loaded before a bump is stored under a version that nobody reads any more, so a cache with a version,
        whose keys no bust deletes, takes no `again_after`.
        """
        fitting = dict(self._of_caches)
        if entry.ttl_only:
            fitting = {name: value for name, value in fitting.items() if name not in _OF_BUSTS}
        if entry.version is not None and entry.bump_over is None:
            fitting.pop("again_after", None)
        if entry.ttl is None and "ttl" not in fitting:
            fitting.pop("jitter", None)
        return _with(entry, fitting)

    def rule(self, entry: RuleEntry) -> RuleEntry:
        """Return a rule with its defaults."""
        return _with(entry, self._of_rules)


def _with(entry: Entry, fields: dict[str, Any]) -> Entry:
    return entry.model_copy(update={name: fields[name] for name in fields.keys() - entry.model_fields_set})
