"""The edge that `check` looks at Redis through: its kind, the rights of the ACL user, and the watermark.

The rule that holds here: nothing is changed. What is tried is tried on keys of our own, or on keys that nobody has,
and what is published tells of no key.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc_invalidator import errors, lsn
from cdc_invalidator.commands import check_keyspace
from cdc_invalidator.commands.check_observe import of_observing
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.pipeline.eventstream import FIELD
from cdc_invalidator.pipeline.messages import Channel, nothing
from cdc_invalidator.redis import available, node, replies
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.occupied import refuse_occupied
from cdc_invalidator.redis.sentinel import Sentinels
from cdc_invalidator.redis.server import SCAN_COUNT, CacheServer
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import TIMEOUT, cache_server
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX
from cdc_invalidator.rules.template import Template

REDIS = "Redis"
OLDEST = (6, 2)
# How long the pace of searches is measured, and how late a key may be gone before that is a warning.
SAMPLE_SECONDS = 0.25
LATE_SECONDS = 60


async def look_at(
    source: EndpointSource,
    watermark: str,
    event_stream: str,
    rules: RuleSet | None,
    *,
    system_id: str | None,
    columns: Columns,
    raw_keys: bool,
    sweep_rate: int,
    fingerprints: bool,
    observing: bool,
) -> list[Finding]:
    """Look at the Redis that is busted.

    Args:
        source: where it is.
        watermark: name of the watermark.
        event_stream: the key of the stream of bust events; empty for none.
        rules: the rule set; ``None`` where the files are wrong.
        system_id: identifies our PostgreSQL; ``None`` where it could not be asked.
        columns: what is known of the columns that keys are made of.
        raw_keys: whether keys may be shown.
        sweep_rate: how many keys a second searches may look at; 0 for as many as there are.
        fingerprints: whether the daemon makes any to verify its busts.
        observing: whether it busts nothing, so that only the rights to look at entries are asked for.

    Raises:
        errors.RedisUnavailable: it is away, or refuses to be looked at.
    """
    findings = await _look_at_server(
        source,
        watermark,
        event_stream,
        rules,
        columns,
        raw_keys=raw_keys,
        fingerprints=fingerprints,
        observing=observing,
    )
    if any(found.severity is Severity.ERROR for found in findings):
        return findings  # the daemon's own way in fails for what is told already
    server = cache_server(source, watermark, timeout=TIMEOUT)
    try:
        await server.connect()
        if observing:
            return findings  # it neither reads nor writes a watermark, and sweeps nothing
        marks = await server.read_watermarks()
        if system_id is not None:
            marks = list(await refuse_occupied(server, marks, system_id, suspicious=True))
        findings += await _of_searches(server, rules, sweep_rate)
    except errors.WatermarkTaken as error:
        return [*findings, Finding(Severity.ERROR, "watermark_taken", REDIS, str(error))]
    finally:
        await server.close()
    mark = marks[0] if marks else None
    if mark is not None and system_id not in {None, mark.system_id}:
        sentence = (
            f"cdc:{watermark}:watermark is of another PostgreSQL, whose daemon does not run now, and the caches are "
            "swept at the start; if that one is to use this Redis as well, give one of the two another name in "
            "CDC_WATERMARK."
        )
        return [*findings, Finding(Severity.WARNING, "watermark_of_another", REDIS, sentence)]
    if mark is None:
        sentence = "there is no watermark yet, so the caches are swept at the first start; nothing needs to be done."
    else:
        age = max(0, round(time.time() - mark.at / 1000))
        sentence = (
            f"the watermark stands at {lsn.text(mark.lsn)} and is {age} s old; where a daemon runs, more than some "
            "seconds mean that it is behind: look at its /status."
        )
    return [*findings, Finding(Severity.NOTE, "watermark", REDIS, sentence)]


async def _of_searches(server: CacheServer, rules: RuleSet | None, rate: int) -> list[Finding]:
    """Tell what a search costs, of each cache that is searched for; the pace is measured if none is set."""
    searched = [cache for cache in rules.caches.values() if cache.key.rest and not cache.ttl_only] if rules else []
    size = await server.size() if searched else None
    if size is None:
        return []
    began, looked, cursor = time.monotonic(), 0, None
    while time.monotonic() - began < SAMPLE_SECONDS:
        cursor, _ = await server.scan(cursor, searched[0].key.glob(), SCAN_COUNT)
        looked += SCAN_COUNT
        if cursor is None:
            break
    measured = min(looked, max(size, 1)) / (time.monotonic() - began)
    pace = min(measured, rate) if rate else measured
    why = "as CDC_SWEEP_RATE allows" if rate and rate <= measured else "as measured"
    # The keys are gone at the end of the search that follows the one that runs; each goes over all keys twice.
    one = 2 * size / pace
    late = 2 * one > LATE_SECONDS
    remedy = "nothing needs to be done"
    if late:
        paced = ", raise CDC_SWEEP_RATE" if rate else ""
        remedy = f"to be faster, keep such caches in a smaller Redis{paced}, or use a `version` where keys may change"
    return [
        Finding(
            Severity.WARNING if late else Severity.NOTE,
            "search_cost",
            cache.place,
            f"a bust of cache {cache.name} is a search, which looks twice at all {size:,} keys of this Redis: about "
            f"{_seconds(one)} at {pace:,.0f} keys a second ({why}), so a key is gone, and the watermark goes on, at "
            f"most about {_seconds(2 * one)} after the commit; {remedy}.",
        )
        for cache in searched
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 1 else "a second"


@dataclass(slots=True)
class _Server:
    """What INFO says of a server; empty where the ACL refuses it."""

    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, answers: Sequence[Any]) -> _Server:
        text = b"\n".join(answer for answer in answers if isinstance(answer, bytes)).decode("utf-8", "replace")
        return cls(dict(line.split(":", 1) for line in text.split() if ":" in line))

    @property
    def product(self) -> str:
        """Its name and version."""
        if "valkey_version" in self.fields:
            return f"Valkey {self.fields['valkey_version']}"
        return f"Redis {self.fields['redis_version']}"

    @property
    def version(self) -> tuple[int, ...]:
        """The version of Redis that it is or is compatible with."""
        return tuple(int(number) for number in re.findall(r"\d+", self.fields.get("redis_version", ""))[:2])


async def _look_at_server(
    source: EndpointSource,
    watermark: str,
    event_stream: str,
    rules: RuleSet | None,
    columns: Columns,
    *,
    raw_keys: bool,
    fingerprints: bool,
    observing: bool,
) -> list[Finding]:
    opened, close = await _open(source)
    try:
        findings = _of_server(source, rules, _Server.read(await opened.send([("INFO",)])))
        missing = await available.lacking(opened, available.NEEDED)
        if missing:
            # Without these, nothing else can be tried.
            sentence = str(available.not_there(missing))
            return [*findings, Finding(Severity.ERROR, "redis_lacks_commands", REDIS, sentence)]
        findings += await _of_cosmetic(opened)
        if observing:
            return findings + await of_observing(opened, rules)
        findings += await _of_commands(opened, watermark, transactions=source.kind != "cluster")
        if rules is not None:
            findings += await _of_keys(opened, watermark, rules)
            findings += await _of_old_values(opened, watermark, rules)
            findings += check_keyspace.of_sweeps(rules, columns, await check_keyspace.sample(opened), raw=raw_keys)
            findings += await _of_channels(opened, rules)
        if event_stream:
            findings += await _of_event_stream(opened, event_stream)
        if fingerprints:
            findings += await _of_fingerprints(opened, watermark)
    finally:
        await close()
    return findings


async def _open(source: EndpointSource) -> tuple[Node, Callable[[], Awaitable[None]]]:
    """Open a connection to a server that holds caches, and give what closes it."""
    if source.kind == "sentinel":
        sentinels = Sentinels(source, timeout=TIMEOUT)
        try:
            master = await sentinels.open_master()
        except errors.InvalidatorError:
            await sentinels.close()
            raise

        async def close() -> None:
            await sentinels.close()
            await master.close()

        return master, close
    endpoint = source.now()
    urls = [endpoint.url] if endpoint.kind == "server" else [endpoint.at(address) for address in endpoint.addresses]
    for left, url in enumerate(urls, 1 - len(urls)):
        opened = Node(url, timeout=TIMEOUT)
        try:
            await opened.connect()
        except errors.RedisUnavailable:
            if left == 0:
                raise
        else:
            return opened, opened.close
    raise AssertionError("an endpoint names a server")


def _of_server(source: EndpointSource, rules: RuleSet | None, server: _Server) -> list[Finding]:
    if not server.version:
        sentence = "its version is not known, since INFO is refused; Redis 6.2 and later will do."
        return [Finding(Severity.NOTE, "redis_version", REDIS, sentence)]
    kind = {"server": "a single server", "sentinel": "a master named by Sentinel", "cluster": "a cluster"}
    sentence = f"this is {server.product}, {kind[source.kind]}; nothing needs to be done."
    findings = [Finding(Severity.NOTE, "redis_version", REDIS, sentence)]
    if server.version < OLDEST:
        sentence = f"{server.product} can't be used; run Redis 6.2 or later, or Valkey."
        findings = [Finding(Severity.ERROR, "redis_too_old", REDIS, sentence)]
    if (server.fields.get("cluster_enabled") == "1") != (source.kind == "cluster"):
        remedy = replies.TABLE["MOVED"].remedy if source.kind == "server" else "CDC_REDIS_URL names a single server"
        sentence = f"CDC_REDIS_URL names another kind of Redis than answers; {remedy}."
        findings.append(Finding(Severity.ERROR, "other_kind_of_redis", REDIS, sentence))
    if server.fields.get("maxmemory_policy") == "allkeys-random":
        sentence = (
            "maxmemory-policy is allkeys-random, which may evict the watermark, and then all caches are swept; "
            "set allkeys-lru or allkeys-lfu."
        )
        findings.append(Finding(Severity.WARNING, "watermark_evicted", REDIS, sentence))
    versioned = [cache.name for cache in rules.caches.values() if cache.version is not None] if rules else []
    if versioned and server.fields.get("maxmemory_policy") == "noeviction":
        findings.append(
            Finding(
                Severity.NOTE,
                "noeviction",
                REDIS,
                f"maxmemory-policy is noeviction, and a bump of {', '.join(versioned)} leaves the old entries until "
                "their TTL, so that memory may fill up and writes fail; keep the TTLs short, or set allkeys-lru.",
            )
        )
    return findings


async def _of_cosmetic(opened: Node) -> list[Finding]:
    missing = await available.lacking(opened, available.COSMETIC)
    if not missing:
        return []
    without = ", ".join(available.COSMETIC[name] for name in missing)
    sentence = f"it does not have {', '.join(missing)}, so the daemon does without {without}; nothing needs to be done."
    return [Finding(Severity.NOTE, "redis_lacks_commands", REDIS, sentence)]


async def _of_commands(opened: Node, watermark: str, *, transactions: bool) -> list[Finding]:
    """Try what the daemon does on keys of our own."""
    text, mapping = f"cdc:{watermark}:check", f"cdc:{watermark}:check:hash"
    tried: tuple[Command, ...] = (
        ("SET", text, 1, "PX", 1000),
        ("GET", text),
        ("UNLINK", text),
        ("HSET", mapping, "at", 1),
        ("HMGET", mapping, "at"),
        ("HGETALL", mapping),
        ("HDEL", mapping, "at"),
        ("TIME",),
        ("SCAN", 0, "MATCH", text, "COUNT", 1),
        ("SCRIPT LOAD", _NOTHING),
    )
    refused: list[str] = []
    findings: list[Finding] = []
    if transactions:
        tried = (*tried, ("WATCH", text), ("MULTI",), ("EXEC",))
    for command, answer in zip(tried, await opened.send(tried), strict=True):
        if not isinstance(answer, Exception):
            continue
        code = node.code(answer)
        if command == ("EXEC",) and code == "ERR":
            continue  # where MULTI was denied
        if code == "NOPERM":
            refused.append("+" + str(command[0]).lower().replace(" ", "|"))
        elif replies.of(code).does is replies.Does.WIDEN:
            sentence = f"{node.failed(str(command[0]), answer)}"
            findings.append(Finding(Severity.WARNING, "redis_full", REDIS, sentence))
        elif node.redirection(answer) is None:
            sentence = f"{node.failed(str(command[0]), answer)}"
            findings.append(Finding(Severity.ERROR, "redis_refuses", REDIS, sentence))
    if refused:
        sentence = (
            f"the ACL user of CDC_REDIS_URL lacks rights; grant it ~cdc:{watermark}:* and {' '.join(refused)}, and "
            "what else the README lists."
        )
        findings.append(Finding(Severity.ERROR, "redis_rights", REDIS, sentence))
    return list(dict.fromkeys(findings))


# Its keys are checked against the ACL, and then it leaves them alone.
_NOTHING = "return 1"


async def _of_event_stream(opened: Node, key: str) -> list[Finding]:
    """Try what is done with the event stream. Nothing is written: no entry can have this id, as Redis finds at last."""
    answers = await opened.send(
        [
            ("XADD", key, "NOMKSTREAM", "0-0", FIELD, ""),
            ("XREVRANGE", key, "+", "-", "COUNT", 1),
            ("XREAD", "COUNT", 1, "STREAMS", key, "0-0"),
        ]
    )
    codes = [node.code(answer) if isinstance(answer, Exception) else "" for answer in answers]
    if "WRONGTYPE" in codes:
        sentence = f"{key}, which CDC_EVENT_STREAM names, holds something else; delete it, or name another key."
        return [Finding(Severity.WARNING, "event_stream_refused", REDIS, sentence)]
    if codes[0] == "NOPERM":
        sentence = (
            "the ACL user of CDC_REDIS_URL may not write the event stream, so that no event gets there; grant it "
            f"+xadd and ~{key}"
        )
        return [Finding(Severity.WARNING, "event_stream_refused", REDIS, sentence)]
    if "NOPERM" in codes:
        sentence = (
            "the ACL user of CDC_REDIS_URL may not read the event stream, which only `tail` and `explain` do; grant "
            "whom they are for +xread and +xrevrange."
        )
        return [Finding(Severity.NOTE, "event_stream_unreadable", REDIS, sentence)]
    return []


async def _of_fingerprints(opened: Node, watermark: str) -> list[Finding]:
    """Try what a fingerprint needs, on a key of our own that is not there."""
    key = f"cdc:{watermark}:check"
    tried: tuple[Command, ...] = (("TYPE", key), ("MEMORY USAGE", key), ("SMEMBERS", key), ("DUMP", key))
    answers = await opened.send(tried)
    refused = [
        "+" + str(command[0]).lower().replace(" ", "|")
        for command, answer in zip(tried, answers, strict=True)
        if _denied(answer) or available.unknown(answer)
    ]
    if not refused:
        return []
    sentence = (
        f"of no bust can be verified what comes back; grant the ACL user of CDC_REDIS_URL {' '.join(refused)}, or set "
        "CDC_VERIFY_SAMPLE=0."
    )
    return [Finding(Severity.WARNING, "verify_refused", REDIS, sentence)]


async def _of_keys(opened: Node, watermark: str, rules: RuleSet) -> list[Finding]:
    """See whether the ACL lets us bust each cache.

    A script that does nothing is given a key of it, and a key that is not there is deleted. A server that tells what
    the ACL allows (ACL DRYRUN; few users may ask) is asked as well. What is denied for any key is told already.
    """
    own = f"cdc:{watermark}:check"
    loaded, user, unlinked = await opened.send([("SCRIPT LOAD", _NOTHING), ("ACL WHOAMI",), ("UNLINK", own)])
    if isinstance(loaded, Exception) or _denied(unlinked):
        return []
    nobody = secrets.token_hex(16)
    named: list[tuple[Cache, Template]] = []
    tried: list[Command] = []
    for cache in rules.kept.values():
        for template in (cache.key, cache.version):
            if template is None:
                continue
            key = template.render(dict.fromkeys(template.params, nobody))
            for name in (key, key + LOCK_SUFFIX) if key is not None else ():
                some: list[Command] = [("EVALSHA", loaded, 1, name), ("UNLINK", name)]
                more: list[Command] = [("GET", name), ("SET", name, 1)] if template is cache.version else []
                asked = [("ACL DRYRUN", user, *each) for each in (*some, *more)]
                # Without a parameter, the key is a real one.
                tried += [*(some if template.params else some[:1]), *(asked if isinstance(user, bytes) else ())]
                named += [(cache, template)] * (len(tried) - len(named))
    answers = await opened.send(tried) if tried else []
    lacking: dict[tuple[str, bytes], tuple[Cache, dict[str, None]]] = {}
    for (cache, template), command, answer in zip(named, tried, answers, strict=True):
        dry = command[0] == "ACL DRYRUN"
        # A dry run answers with what is denied; whoever may not ask gets an error.
        if (isinstance(answer, bytes) and answer != b"OK") if dry else _denied(answer):
            word = str(command[2 if dry else 0]).lower()
            lacking.setdefault((cache.name, template.prefix), (cache, {}))[1][f"+{word}"] = None
    return [
        Finding(
            Severity.ERROR,
            "redis_rights",
            cache.place,
            f"the ACL user of CDC_REDIS_URL may not bust cache {cache.name}; grant it {' '.join(words)} and "
            f"~{prefix.decode('utf-8', 'replace')}*",
        )
        for (_, prefix), (cache, words) in lacking.items()
    ]


def _denied(answer: Any) -> bool:
    return isinstance(answer, Exception) and node.code(answer) == "NOPERM"


async def _of_channels(opened: Node, rules: RuleSet) -> list[Finding]:
    """Publish a message that tells of no key on the channels of each cache, to see whether the ACL lets us."""
    tried: list[tuple[Cache, Template, Command]] = []
    for cache in rules.kept.values():
        template = cache.publish
        if template is None:
            continue
        named = template.render(dict.fromkeys(template.params, secrets.token_hex(16)))
        channels = dict.fromkeys((named, Channel(cache, template).everybody))
        tried += [(cache, template, ("PUBLISH", channel, nothing(cache.name))) for channel in channels]
    answers = await opened.send([command for _, _, command in tried]) if tried else []
    findings = []
    for (cache, template, _), answer in zip(tried, answers, strict=True):
        if available.unknown(answer):
            sentence = (
                f"Redis does not have PUBLISH, which cache {cache.name} needs; have it enabled, or remove `publish`."
            )
            findings.append(Finding(Severity.ERROR, "redis_lacks_commands", cache.place, sentence))
        elif _denied(answer):
            granted = template.prefix.decode("utf-8", "replace") + ("*" if template.params else "")
            sentence = (
                f"the ACL user of CDC_REDIS_URL may not publish the busts of cache {cache.name}; grant it +publish and "
                f"&{granted}"
            )
            findings.append(Finding(Severity.ERROR, "redis_rights", cache.place, sentence))
    return list(dict.fromkeys(findings))


async def _of_old_values(opened: Node, watermark: str, rules: RuleSet) -> list[Finding]:
    """See whether old values may be left for `stale_for`, by moving a key of our own that is not there."""
    kept = [cache for cache in rules.kept.values() if cache.stale_for is not None]
    # In a cluster the two may lie in different slots; rights are looked at first.
    key = f"cdc:{watermark}:check"
    tried: tuple[Command, ...] = (("PEXPIRE", key, 1), ("RENAME", key, f"{key}{STALE_SUFFIX.decode()}"))
    answers = await opened.send(tried) if kept else []
    refused = [
        "+" + str(command[0]).lower()
        for command, answer in zip(tried, answers, strict=False)
        if isinstance(answer, Exception) and node.code(answer) == "NOPERM"
    ]
    missing = [str(command[0]) for command, answer in zip(tried, answers, strict=False) if available.unknown(answer)]
    why = []
    if refused:
        why.append(("redis_rights", f"the ACL user of CDC_REDIS_URL may not; grant it {' '.join(refused)}"))
    if missing:
        why.append(("redis_lacks_commands", f"Redis does not have {', '.join(missing)}; have it enabled"))
    return [
        Finding(
            Severity.WARNING,
            code,
            cache.place,
            f"old values of cache {cache.name} are deleted rather than left for its `stale_for`, because {reason}.",
        )
        for cache in kept
        for code, reason in why
    ]
