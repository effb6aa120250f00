"""What `check` says of the keys that Redis holds: which of them sweeps would delete although they are of another.

The rule that holds here: Redis is only looked at, a bounded number of keys, at half its pace at most. Of a key nothing
is shown but the literal text of the rule files and its shape, unless CDC_LOG_KEYS=raw says that keys may be seen.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.redis.node import Node
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.rules.overlap import Language, Texts
from cdc_invalidator.rules.suffixes import split_suffix

REDIS = "Redis"
# Keys that are looked at, in all and in a step, and the longest time that this may take.
KEYS = 20_000
KEYS_A_STEP = 500
SECONDS = 3.0
# What a sentence names: patterns, and things under each.
NAMED = 5

_OWN = re.compile(rb"cdc:[^:]+:")


class Sample(NamedTuple):
    """Some keys of a server. SCAN returns them in no order, so that they stand for the others."""

    keys: Sequence[bytes]
    complete: bool


async def sample(opened: Node) -> Sample:
    """Take a sample of the keys; empty where the ACL refuses it.

    Raises:
        errors.RedisUnavailable: the connection is lost.
    """
    keys: dict[bytes, None] = {}
    cursor, until = 0, time.monotonic() + SECONDS
    while len(keys) < KEYS and time.monotonic() < until:
        began = time.monotonic()
        answers = await opened.ask_if_granted(("SCAN", cursor, "COUNT", KEYS_A_STEP))
        if not answers:
            break
        cursor, found = int(answers[0][0]), answers[0][1]
        keys.update(dict.fromkeys(found))
        if cursor == 0:
            break
        await asyncio.sleep(time.monotonic() - began)
    return Sample(list(keys), complete=cursor == 0)


def of_sweeps(rules: RuleSet, columns: Columns, taken: Sample, *, raw: bool) -> Iterator[Finding]:
    """Yield one finding on all that sweeps find beside the keys of their own caches, if there is any.

    Args:
        rules: the rule set.
        columns: what is known of the columns that keys are made of.
        taken: what Redis holds.
        raw: show words of keys.
    """
    caches = list(rules.caches.values())
    languages = {cache.name: _languages(cache, columns) for cache in caches}
    swept = [(cache, cache.sweep_template.like()) for cache in caches if not cache.ttl_only]
    # By pattern: its caches, and of what keys Redis holds how many there.
    names: dict[str, list[str]] = {}
    there: dict[str, Counter[str]] = {}
    strange = False
    for key in taken.keys:
        if _OWN.match(key):
            continue
        bare = split_suffix(key)[0]
        matching = [(cache, like) for cache, like in swept if key.startswith(cache.sweep_template.prefix)]
        found = [cache for cache, like in matching if like.fullmatch(bare)]
        if not found:
            continue
        owners = [name for name, of in languages.items() if any(each.has(bare) for each in of)]
        strange = strange or not owners
        for cache in found:
            if cache.name in owners:
                continue
            pattern = cache.sweep_template.glob().decode("utf-8", "replace")
            if cache.name not in names.setdefault(pattern, []):
                names[pattern].append(cache.name)
            what = f"of {owners[0]}" if owners else f"{shape(bare, cache.sweep_template.prefix, raw=raw)} of no cache"
            there.setdefault(pattern, Counter())[what] += 1
    if there:
        looked = f"{'all' if taken.complete else 'a sample of'} {len(taken.keys):,} keys"
        yield Finding(
            Severity.WARNING if strange else Severity.NOTE,
            "sweeps_others",
            REDIS,
            f"sweeps also delete keys that are not of their cache; of {looked} there are {_told(names, there)}; "
            + (
                "look who keeps those of no cache there: if they can't be loaded again, move them to another Redis."
                if strange
                else "that costs misses, and nothing needs to be done."
            ),
        )


def _told(names: Mapping[str, Sequence[str]], there: Mapping[str, Counter[str]]) -> str:
    most = sorted(there, key=lambda pattern: -sum(there[pattern].values()))
    told = [
        f"{', '.join(f'{number:,} {what}' for what, number in _strange_first(there[pattern]))} under `{pattern}` "
        f"({', '.join(names[pattern][:NAMED])})"
        for pattern in most[:NAMED]
    ]
    more = len(most) - NAMED
    return "; ".join(told) + (f"; and more under {more} other patterns" if more > 0 else "")


def _strange_first(counted: Counter[str]) -> list[tuple[str, int]]:
    most = sorted(counted.items(), key=lambda item: (not item[0].endswith("of no cache"), -item[1], item[0]))
    rest = sum(number for _, number in most[NAMED:])
    return most[:NAMED] + ([("others", rest)] if rest else [])


def _languages(cache: Cache, columns: Columns) -> list[Language]:
    """Return what a cache's keys can be. What is not known of a parameter may be any text."""
    templates = [cache.key] if cache.version is None else [cache.key, cache.version]
    known = columns.of(cache)
    return [
        Language(template, {name: known.get(name, _unknown(name)) for name in (*template.params, overlap.REST)})
        for template in templates
    ]


def _unknown(parameter: str) -> Texts:
    if parameter == overlap.REST:
        return overlap.ANYTHING
    return overlap.COUNTER if parameter == "version" else overlap.TEXT


_SHAPES = re.compile(
    rb"(?P<uuid>[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})"
    rb"|(?P<hash>(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})(?![0-9A-Za-z]))"
    rb"|(?P<number>[0-9]+(?![0-9A-Za-z]))"
    rb"|(?P<sign>[:/|#_.{}-])"
    rb"|(?P<text>[^:/|#_.{}-]+)"
)


def shape(key: bytes, prefix: bytes, *, raw: bool) -> str:
    """Return what a key looks like: the literal prefix, then UUIDs, numbers and words as such, and the signs between.

    With ``raw``, words are shown as they are.
    """
    shown = [prefix.decode("utf-8", "replace")]
    for found in _SHAPES.finditer(key.removeprefix(prefix)):
        kind = found.lastgroup
        if kind == "sign" or (raw and kind == "text"):
            shown.append(found[0].decode("utf-8", "backslashreplace"))
        else:
            shown.append(f"<{kind}>")
    return f"`{''.join(shown)}`"
