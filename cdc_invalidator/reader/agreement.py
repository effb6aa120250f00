"""What the daemon says of the caches, looked at once a second; each cache asks its `Terms` before a read. Pure.

The rules that hold here:

- A cache whose keys the daemon makes in another way, or does not know, is neither read nor filled: no bust would find
  its entries. Nor is one that somebody has switched off.
- A look that fails keeps the last answer; without any, nothing is read or filled.
- Without a watermark no daemon has run here, and the first one sweeps: so caches are read, and values written as given.
  A watermark that was there and is gone keeps the last answer: the daemon goes on, and writes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import orjson

from cdc_invalidator.reader.keys import Keys, NoKeys
from cdc_invalidator.rules import agreement
from cdc_invalidator.rules.model import Cache

_log = logging.getLogger("cdc_invalidator.reader")

LOOK_SECONDS = 1.0
REPORT_SECONDS = 60.0
# In place of a cache's name, in the hash that switches caches off: all of them.
ALL = b"*"

# The fields that each look asks for: when the watermark was written, and that again with a digest of what is said. A
# daemon of an earlier release writes the first alone, and lets the other stand.
_FIRST = (b"at", b"agreed")
_SENTENCES = {
    "templates_differ": "the daemon makes its keys in another way, or does not know it; give both the same rule files, "
    "the same environment for their keys, and releases that belong together",
    "old_daemon": "the daemon is of an older release, and does not say how it makes keys; roll the daemon before its "
    "readers",
    "off": "it is switched off, by a field of {switch}",
    "refused": "Redis does not let this user read {watermark}; grant it +hmget on that and on {switch}",
}


class Terms:
    """On which terms one cache may be read now.

    ``refusal``: why it is neither read nor filled, a word for metrics; empty if it may be. ``keys``: makes its keys.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.digest = agreement.templates_digest(cache)
        self.keys: Keys | NoKeys = Keys(cache)
        self.refusal = ""
        # What `keys` was made for, and when to log the refusal again.
        self.types: tuple[Any, Any] = (None, None)
        self.report_at = float("-inf")


class Agreement:
    """What the daemon has said last, and the terms that follow for each cache.

    ``next_at``: when to look again, in seconds of a steady clock; 0.0 as long as nothing is known. ``whole``: the
    command that asks for all that the daemon says. ``digest``: of what it has said last; empty if nothing.

    Args:
        watermark: the watermark's name.
        disabled: caches are neither read nor filled, and nobody looks.
    """

    def __init__(self, watermark: str, *, disabled: bool = False) -> None:
        self._watermark = f"cdc:{watermark}:watermark"
        self._switch = f"cdc:{watermark}:off"
        self._disabled = disabled
        self._terms: dict[str, Terms] = {}
        # Why nothing is known; once something is, that stays.
        self._unknown = "unknown"
        # What was said last, and its digest; whether that still holds for the watermark that is there.
        self._said = agreement.Agreement()
        self._digest = self.digest = b""
        self._holds = False
        # Why no cache may be read that busts keep right.
        self._word = ""
        self._off: frozenset[bytes] = frozenset()
        self.next_at = float("inf") if disabled else 0.0
        self.whole = ("HMGET", self._watermark.encode(), *_FIRST, *(name.encode() for name in agreement.FIELDS))

    def of(self, cache: Cache) -> Terms:
        """Return the terms of a cache, always the same object; each look may change them."""
        terms = self._terms.get(cache.name)
        if terms is None:
            terms = Terms(cache)
            if self._disabled:
                terms.keys = NoKeys(Keys(cache) if cache.key.parts else None)
            elif not self._unknown:
                self._judge(terms)
            self._terms[cache.name] = terms
            if not self._disabled:
                # Whether it is switched off is not known yet.
                self.next_at = 0.0
        return terms

    def again(self) -> None:
        """Let the next read look."""
        if not self._disabled:
            self.next_at = 0.0

    def begin(self, now: float) -> list[tuple[Any, ...]]:
        """Return the commands of a look that begins now."""
        if not self._unknown:
            # Meanwhile, other reads go by the last answer.
            self.next_at = now + LOOK_SECONDS
        names = [name.encode() for name in self._terms]
        return [("HMGET", self._watermark.encode(), *_FIRST), ("HMGET", self._switch.encode(), *names, ALL)]

    def is_news(self, fields: Any) -> bool:
        """Return whether the first reply to a look takes the reply to `whole` in its place."""
        return not isinstance(fields, Exception) and _digest(fields) not in {None, self._digest}

    def take(self, commands: Sequence[tuple[Any, ...]], replies: Sequence[Any], now: float) -> None:
        """Take the replies to the commands of `begin`; an error stands in the place of one that was refused."""
        fields, switches = replies
        if not isinstance(switches, Exception):
            values = zip(commands[1][2:], switches, strict=True)
            self._off = frozenset(name for name, value in values if value not in {None, b"", b"0"})
        if not isinstance(fields, Exception):
            self._unknown = ""
            self._read(fields)
            self.next_at = now + LOOK_SECONDS
        elif self._unknown:
            self._unknown = "refused"
        for terms in list(self._terms.values()):
            self._judge(terms)
            self._tell(terms, now)
        # Last: who has it before has the terms of it, or later ones.
        self.digest = self._digest

    def failed(self, reason: str) -> bool:
        """Note that a look had no answer; return whether an earlier answer holds instead."""
        if self._unknown:
            self._unknown = reason
            for terms in list(self._terms.values()):
                self._judge(terms)
        return not self._unknown

    def _read(self, fields: Sequence[bytes | None]) -> None:
        at, _, *texts = fields
        if at is None:
            return
        digest = _digest(fields)
        self._holds, self._word = False, ""
        if digest is None:
            self._word = "old_daemon"
            return
        if digest != self._digest:
            try:
                templates, types, settings = (dict(orjson.loads(text or b"")) for text in texts)
            except (ValueError, TypeError):
                self._word = "templates_differ"
                return
            self._said, self._digest = agreement.Agreement(templates, types, settings), digest
        self._holds = True

    def _judge(self, terms: Terms) -> None:
        name, word = terms.cache.name, self._unknown
        if not word and not terms.cache.ttl_only:
            # What nothing busts needs no agreement.
            agreed = self._said.templates.get(name) == terms.digest
            word = self._word or ("templates_differ" if self._holds and not agreed else "")
            types = (self._said.types.get(name), self._said.settings)
            # What was said last of types is better than nothing, also where the watermark is gone.
            if agreed and types != terms.types:
                terms.keys, terms.types = Keys(terms.cache, *types), types
        terms.refusal = "off" if not self._unknown and self._off & {name.encode(), ALL} else word

    def _tell(self, terms: Terms, now: float) -> None:
        if not terms.refusal:
            terms.report_at = float("-inf")
        elif terms.refusal in _SENTENCES and now >= terms.report_at:
            terms.report_at = now + REPORT_SECONDS
            sentence = _SENTENCES[terms.refusal].format(watermark=self._watermark, switch=self._switch)
            _log.warning("cache %s is neither read nor filled: %s", terms.cache.name, sentence)


def _digest(fields: Sequence[bytes | None]) -> bytes | None:
    """Return the digest of what the daemon says, if it has said it with the watermark that is there."""
    at, agreed, *_ = fields
    said_at, _, digest = (agreed or b"").partition(b" ")
    return digest if at is not None and said_at == at and digest else None
