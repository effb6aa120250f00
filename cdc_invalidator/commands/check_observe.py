"""What `check` says of Redis where the daemon only observes: whether the ACL user may look at the entries.

The rule that holds here: nothing is changed, and no value is asked for. What is tried is tried on keys that nobody has;
of a key without parameters, which may be there, only the fingerprint is taken.
"""

from __future__ import annotations

import secrets
from typing import Any

from cdc_invalidator import errors
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.redis import available, fingerprint, node
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.scripts import ScriptDigests
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.rules.template import Template

REDIS = "Redis"
# What a fingerprint reads with, as `fingerprint.RIGHTS` says.
_READS = ("TYPE", "MEMORY USAGE", "GET", "HGETALL", "SMEMBERS", "DUMP")


async def of_observing(opened: Node, rules: RuleSet | None) -> list[Finding]:
    """See whether what the rules would bust may be looked at; the rights to bust are not asked for.

    Raises:
        errors.RedisUnavailable: the connection is lost.
    """
    sentence = (
        "with CDC_MODE=observe nothing is busted, so the rights to bust are not looked at; run check once more with "
        "CDC_MODE=bust before the daemon busts."
    )
    findings = [Finding(Severity.NOTE, "observing", REDIS, sentence)]
    untold = await _untold(opened)
    if untold is not None and untold.code != "NOPERM":
        return [*findings, Finding(Severity.ERROR, "redis_lacks_commands", REDIS, str(untold))]
    (loaded,) = await opened.send([("SCRIPT LOAD", fingerprint.FINGERPRINT)])
    refused = ["+client|tracking"] if untold is not None else []
    refused += ["+script|load"] if isinstance(loaded, Exception) else []
    if refused:
        sentence = f"the ACL user of CDC_REDIS_URL may not observe; grant it {' '.join(refused)}."
        return [*findings, Finding(Severity.ERROR, "redis_rights", REDIS, sentence)]
    scripts = ScriptDigests()
    scripts.read_only = True
    await scripts.load(opened)
    return findings + [found for cache, key in _keys(rules) for found in await _of_keys(opened, scripts, cache, key)]


async def _untold(opened: Node) -> errors.RedisUnavailable | None:
    """Return why Redis does not tell of writes, ``None`` where it does."""
    command = ("CLIENT TRACKING", "ON", "BCAST", "PREFIX", secrets.token_hex(16))
    try:
        following = await opened.follow(command, lambda _: None)
    except errors.RedisUnavailable as error:
        return error
    await node.end(following)
    return None


def _keys(rules: RuleSet | None) -> list[tuple[Cache, Template]]:
    caches = rules.kept.values() if rules is not None else ()
    return [(cache, key) for cache in caches for key in (cache.key, cache.version) if key is not None]


async def _of_keys(opened: Node, scripts: ScriptDigests, cache: Cache, template: Template) -> list[Finding]:
    key = template.render(dict.fromkeys(template.params, secrets.token_hex(16)))
    if key is None:
        return []
    look = scripts.to_fingerprint(key)
    tried: list[Command] = [look, *((name, key) for name in _READS if template.params)]
    answers = await opened.send(tried)
    words = [
        "+" + str(command[0]).lower().replace(" ", "|")
        for command, answer in zip(tried, answers, strict=True)
        if _refused(answer)
    ]
    # The script has tried some of it itself.
    if not words and not isinstance(answers[0], Exception) and isinstance(fingerprint.read(answers[0]), Exception):
        words = list(fingerprint.RIGHTS)
    if not words:
        return []
    prefix = template.prefix.decode("utf-8", "replace")
    # Before Redis 7, whoever runs a script on a key needs all rights to it.
    keys = "%R~" if look[0] == "EVALSHA_RO" else "~"
    sentence = (
        f"the ACL user of CDC_REDIS_URL may not look at the entries of cache {cache.name}; grant it "
        f"{' '.join(words)} and {keys}{prefix}{'*' if template.params else ''}"
    )
    return [Finding(Severity.ERROR, "redis_rights", cache.place, sentence)]


def _refused(answer: Any) -> bool:
    return isinstance(answer, Exception) and (node.code(answer) == "NOPERM" or available.unknown(answer))
