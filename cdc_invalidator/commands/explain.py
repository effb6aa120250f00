"""`explain`: a key's cache and what busts it; a change's busts and why the other rules bust nothing. Pure.

Both ways give plain values first, the same in JSON as in text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.simulate import Change, Verdict
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.model import Bust, Cache, Rule, RuleSet
from cdc_invalidator.rules.overlap import Language
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX, split_suffix
from cdc_invalidator.rules.table import Table, read_table
from cdc_invalidator.rules.template import Param, Template
from cdc_invalidator.rules.values import OPS, ROWS_OF, row_texts, value_types
from cdc_invalidator.rules.wording import nearest, shown

# Busts that are told of a cache.
LAST = 10
_NUMBER = re.compile(rb"[0-9]+")
Form = Literal["text", "json"]
What = Literal["key", "lock", "old_value", "version", "old_version"]
_BESIDE_KEY: dict[bytes, What] = {LOCK_SUFFIX: "lock", STALE_SUFFIX: "old_value"}


# ── A key ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Reading(NamedTuple):
    """A cache that a key is of, and as what; ``params`` as they read.

    ``what``: a key, its ``lock``, its ``old_value`` (see ``stale_for``), a ``version``, or the ``old_version`` that a
    bump has left.
    """

    cache: Cache
    what: What
    params: Mapping[str, str]

    @property
    def of_version(self) -> bool:
        """Whether it is a version, not a key."""
        return self.what in {"version", "old_version"}

    @property
    def template(self) -> Template:
        """The template that the key was read by."""
        version = self.cache.version
        return version if self.of_version and version is not None else self.cache.key

    @property
    def version_key(self) -> str | None:
        """The version's key, where the cache has one and the parameters tell it: a filter can't be undone."""
        version = self.cache.version
        if version is None:
            return None
        read = set(self.template.parts)
        wanted = [part for part in version.parts if isinstance(part, Param)]
        unread = {part for part in wanted if not all(Param(name) in read for name in part.names)}
        if not unread <= read:
            return None
        # What was read after a filter stands as it is.
        parts = (self.params[p.name].encode() if isinstance(p, Param) and p in unread else p for p in version.parts)
        key = Template.of(parts).render(self.params)
        return None if key is None else key.decode("utf-8", "backslashreplace")


def read_key(rules: RuleSet, key: str) -> list[Reading]:
    """Return every cache that the key may be of, the likeliest first: where least of the key is parameters."""
    text = _bytes(key)
    readings = [reading for cache in rules.caches.values() for reading in _read(cache, text)]
    return sorted(readings, key=lambda reading: sum(map(len, reading.params.values())))


def _bytes(key: str) -> bytes:
    r"""Return a key as Redis has it; its NUL, which no command line can hold, may be written ``\x00lock``."""
    text = key.encode("utf-8", "surrogateescape")
    for suffix in _BESIDE_KEY:
        written = suffix.replace(b"\0", rb"\x00")
        if text.endswith(written):
            return text.removesuffix(written) + suffix
    return text


def _read(cache: Cache, key: bytes) -> Iterator[Reading]:
    base, suffix = split_suffix(key)
    if suffix and (params := _params(cache, base)) is not None:
        yield Reading(cache, _BESIDE_KEY[suffix], params)
    elif (params := _params(cache, key)) is not None:
        yield Reading(cache, "key", params)
    if cache.version is None:
        return
    if suffix == STALE_SUFFIX and (found := cache.version.match(base)) is not None:
        yield Reading(cache, "old_version", _texts(found))
    elif (found := cache.version.match(key)) is not None:
        yield Reading(cache, "version", _texts(found))


def _params(cache: Cache, key: bytes) -> dict[str, str] | None:
    """The parameters of a cache's key, in which a version is a number, or stands as `simulate` shows it."""
    versioned = cache.version is not None and Param("version") in cache.key.parts
    if not versioned:
        found = cache.key.match(key)
        return None if found is None else _texts(found)
    for version in dict.fromkeys([b"{version}", *reversed(_NUMBER.findall(key))]):
        parts = (version if part == Param("version") else part for part in cache.key.parts)
        found = Template.of(parts).match(key)
        if found is not None:
            values = _texts({**found, "version": version})
            names = (part.name for part in cache.key.parts if isinstance(part, Param))
            return {name: values[name] for name in names}
    return None


def _texts(params: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.decode("utf-8", "backslashreplace") for name, value in params.items()}


def explain_key(
    rules: RuleSet, key: str, hashed: Callable[[bytes], str] | None = None, columns: Columns | None = None
) -> dict[str, Any]:
    """Tell of which caches the key is, and what busts them.

    Args:
        rules: the rule set.
        key: the key.
        hashed: gives the hash that events show of a key; ``None`` where the daemon's secret is not known.
        columns: what the database says for certain of the parameters' values; a key that they can't make is not of a
            cache. ``None`` where it was not asked.

    Raises:
        errors.InvalidatorError: it is of no cache.
    """
    readings = read_key(rules, key)
    if not readings:
        raise errors.InvalidatorError(_of_no_cache(rules, key))
    judged = [(reading, "" if columns is None else _refused(reading, key, columns)) for reading in readings]
    if all(why for _, why in judged):
        near = "; ".join(f"it looks like one of cache {reading.cache.name}, but {why}" for reading, why in judged)
        raise errors.InvalidatorError(f"No cache has the key {shown(key)}: {near}.")
    readings = [reading for reading, why in judged if not why]
    caches = [_told(rules, reading) for reading in readings]
    if hashed is not None:
        for cache, reading in zip(caches, readings, strict=True):
            cache["hashes"] = {name: hashed(name.encode("utf-8", "surrogateescape")) for name in _named(reading, key)}
    return {
        "key": key.replace("\0", r"\x00"),
        "database": columns is not None,
        "caches": caches,
        "not_of": [{"cache": reading.cache.name, "why": why} for reading, why in judged if why],
    }


def _named(reading: Reading, key: str) -> list[str]:
    """Return the key or version that events name when this one is busted."""
    base = split_suffix(_bytes(key))[0].decode("utf-8", "surrogateescape")
    version = reading.version_key
    if reading.what in {"key", "version"}:
        base = key
    return [base] if reading.of_version or version is None else [version]


_CALLED = {overlap.NUMBER: "a whole number", overlap.UUID: "a UUID", overlap.FLAG: "a boolean"}


def _refused(reading: Reading, key: str, columns: Columns) -> str:
    """Return why the types of the columns don't let a cache have the key; empty if they do."""
    known = columns.of(reading.cache)
    values = {name: known.get(name, overlap.TEXT) for name in (*reading.template.params, overlap.REST)}
    values |= {overlap.REST: overlap.ANYTHING, "version": overlap.TEXT}
    text = _bytes(key)
    bare = text if reading.what in {"key", "version"} else split_suffix(text)[0]
    if Language(reading.template, values).has(bare):
        return ""
    typed = [f"{name} is {_CALLED[of]} in the database" for name, of in values.items() if of in _CALLED]
    return " and ".join(typed)


class LastBusts:
    """The last busts of a key's caches, out of the event stream.

    Args:
        rules: the rule set.
        key: the key; it is of a cache.
        hashed: gives the hash that events show of a key; ``None`` where the daemon's secret is not known.
    """

    def __init__(self, rules: RuleSet, key: str, hashed: Callable[[bytes], str] | None) -> None:
        self._readings = {reading.cache.name: reading for reading in reversed(read_key(rules, key))}
        self._key = _bytes(key)
        self._hashed = hashed
        self._busts: dict[str, list[dict[str, Any]]] = {name: [] for name in self._readings}
        self._looked_back_to: str | None = None
        self._error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether older events would change nothing."""
        return all(len(busts) >= LAST and not all(map(_others, busts)) for busts in self._busts.values())

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event, newer ones before older ones."""
        self._looked_back_to = event.get("ts")
        reading = self._readings.get(event.get("cache", ""))
        if event["event"] != "bust" or reading is None:
            return
        busts = self._busts[reading.cache.name]
        named = self._named(reading, event)
        # Of those beyond, only the newest that names the key is worth telling.
        if len(busts) < LAST or (named and all(map(_others, busts))):
            busts.append({"names_key": named, **event})

    def fail(self, error: str) -> None:
        """Note why they can't be read."""
        self._error = error

    def tell(self, told: dict[str, Any]) -> None:
        """Add them to what `explain_key` tells."""
        told["event_stream"] = {"looked_back_to": self._looked_back_to, "error": self._error}
        for cache in told["caches"]:
            cache["last_busts"] = None if self._error else self._busts[cache["cache"]]

    def _named(self, reading: Reading, event: Mapping[str, Any]) -> bool | None:
        """Whether an event names the key, or the version that the key is under; ``None`` if that can't be told."""
        action = event.get("action")
        if action == "sweep":
            return True
        if action == "search":
            return self._searched(reading, event)
        if action == "bump":
            version = reading.version_key
            wanted = self._base(reading) if reading.of_version else None if version is None else version.encode()
        elif reading.of_version:
            return False
        else:
            wanted = None if reading.params.get("version") == "{version}" else self._base(reading)
        if wanted is None:
            return None
        if "raw_keys" in event:
            return wanted.decode(errors="backslashreplace") in event["raw_keys"]
        if "key_hashes" in event and self._hashed is not None:
            return self._hashed(wanted) in event["key_hashes"]
        return None

    def _searched(self, reading: Reading, event: Mapping[str, Any]) -> bool | None:
        """Whether a search was for a prefix that the key, or the version that it is under, has."""
        version = reading.version_key
        name = self._base(reading) if reading.of_version or reading.cache.version is None else (version or "").encode()
        prefixes = [name[:length] for length in range(1, len(name) + 1)]
        if "raw_keys" in event:
            return any(prefix.decode(errors="backslashreplace") in event["raw_keys"] for prefix in prefixes)
        if "key_hashes" in event and self._hashed is not None:
            return any(self._hashed(prefix) in event["key_hashes"] for prefix in prefixes)
        return None

    def _base(self, reading: Reading) -> bytes:
        """Return the key or version that the key is, or stands beside."""
        return self._key if reading.what in {"key", "version"} else split_suffix(self._key)[0]


def _others(bust: Mapping[str, Any]) -> bool:
    return bust["names_key"] is False


def _told(rules: RuleSet, reading: Reading) -> dict[str, Any]:
    cache = reading.cache
    return {
        "cache": cache.name,
        "defined_at": _place(cache.place),
        "is": reading.what,
        "params": dict(reading.params),
        "filtered": sorted({part.name for part in reading.template.parts if isinstance(part, Param) and part.filters}),
        "version_key": reading.version_key,
        "ttl_only": cache.ttl_only,
        "publish": cache.publish.text if cache.publish is not None else None,
        "busted_by": [
            _cause(rule, bust) for rule in rules.rules for bust in rule.busts if bust.cache.name == cache.name
        ],
    }


def _cause(rule: Rule, bust: Bust) -> dict[str, Any]:
    cache, query = bust.cache, bust.query
    action = "delete" if cache.version is None else "bump" if cache.bump_over is None else "delete or bump"
    if bust.sweep or cache.key.rest:
        action = "sweep" if bust.sweep else "search"
    return {
        "rule": rule.name,
        "defined_at": _place(rule.place),
        "table": str(rule.table),
        "on": [op for op in OPS if op in rule.on],
        "columns": list(rule.columns) or None,
        "when": rule.when,
        "where": rule.where_of(bust),
        "params": dict(bust.mapped),
        "via": None if query is None else query.text,
        # A query may give no row of which this key is made.
        "certain": query is None,
        "action": action,
    }


def _of_no_cache(rules: RuleSet, key: str) -> str:
    prefixes = {name: cache.key.prefix.decode("utf-8", "replace") for name, cache in rules.caches.items()}
    if not prefixes:
        return f"No cache has the key {shown(key)}: the rule files define none; check CDC_RULES."
    near = max(prefixes, key=lambda name: (_in_common(key, prefixes[name]), -len(prefixes[name])))
    return (
        f"No cache has the key {shown(key)}; the nearest is cache {near}, whose keys look like "
        f"{shown(_pattern(rules.caches[near].key))}."
    )


def _in_common(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _pattern(template: Template) -> str:
    parts = (
        part.decode("utf-8", "replace") if isinstance(part, bytes) else f"{{{part.name}}}" for part in template.parts
    )
    return "".join(parts) + ("*" if template.rest else "")


_WHAT: dict[What, str] = {
    "key": "a key",
    "lock": "the lock of a key",
    "old_value": "the old value of a key",
    "version": "a version",
    "old_version": "the old value of a version",
}


def key_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Return what `explain_key` tells as lines of text."""
    for cache in told["caches"]:
        what = _WHAT[cache["is"]]
        yield f"{told['key']} is {what} of cache {cache['cache']} ({cache['defined_at']})"
        for name, value in cache["params"].items():
            yield f"  {name} = {value}{' (after its filters)' if name in cache['filtered'] else ''}"
        if cache["version_key"] is not None and cache["is"] != "version":
            yield f"  its version is {cache['version_key']}"
        for name, digest in cache.get("hashes", {}).items():
            yield f"  events show {name} as the hash {digest}"
        if cache["ttl_only"]:
            yield "  nothing busts or sweeps it: it is `ttl_only`"
        elif not cache["busted_by"]:
            yield "  no rule busts it"
        for cause in cache["busted_by"]:
            yield from _cause_lines(cause)
        if cache["publish"] is not None:
            yield f"  each bust is told on the channel {cache['publish']}"
        yield from _last_lines(cache, told)
    for other in told.get("not_of", ()):
        yield f"not of cache {other['cache']}: {other['why']}"
    if told.get("types_error"):
        yield f"the types of the columns can't be told: {told['types_error']}"


def _last_lines(cache: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    stream = told.get("event_stream")
    if stream is None:
        return
    if stream["error"] is not None:
        yield f"  its last busts can't be told: {stream['error']}"
        return
    since = f"since {stream['looked_back_to']}" if stream["looked_back_to"] else "which is empty"
    busts = cache["last_busts"]
    if not busts:
        yield f"  no bust of it is in the event stream, {since}"
        return
    yield "  its last busts in the event stream, the newest first; * names this key:"
    yield from map(_bust_line, busts)
    if any(bust["names_key"] is None for bust in busts):
        yield (
            "    ? may name this key: it can be told by a CDC_LOG_HASH_KEY that is set here as for the daemon, or by "
            "CDC_LOG_KEYS=raw of the daemon"
        )
    elif all(map(_others, busts)):
        yield f"    none in the event stream names this key, {since}"


def _bust_line(bust: Mapping[str, Any]) -> str:
    mark = {True: "*", False: " ", None: "?"}[bust["names_key"]]
    rule = f" by rule {bust['rule']}" if bust.get("rule") else ""
    change = f" on {bust.get('op')} of {bust['table']}" if bust.get("table") else ""
    keys = f"{bust.get('keys')} {'key' if bust.get('keys') == 1 else 'keys'}, {bust.get('existed')} there"
    lag = f", {bust['lag_ms']} ms after the commit" if "lag_ms" in bust else ""
    reason = f", {bust['reason']}" if bust.get("reason", "change") != "change" else ""
    line = f"{bust.get('ts')} {bust.get('action')}{rule}{change}: {keys}, LSN {bust.get('lsn')}{lag}{reason}"
    return f"    {mark} {line if line.isprintable() else repr(line)[1:-1]}"


def _cause_lines(cause: Mapping[str, Any]) -> Iterator[str]:
    verb = {
        "delete": "deleted",
        "bump": "bumped",
        "delete or bump": "deleted, or bumped past `bump_over`,",
        "search": "searched for by its prefix, and deleted,",
        "sweep": "swept with its whole cache",
    }
    told = verb[cause["action"]]
    told = told if cause["certain"] else f"may be {told}"
    yield f"  {told} by rule {cause['rule']} ({cause['defined_at']})"
    yield f"    on {', '.join(cause['on'])} of {cause['table']}"
    if cause["columns"]:
        of_key = "" if cause["action"] == "sweep" else ", or a column of the key"
        yield f"    an update counts if it changes {', '.join(cause['columns'])}{of_key}"
    if cause["when"]:
        yield f"    when {cause['when']}"
    if cause["where"]:
        yield f"    for each row, old or new, where {cause['where']}"
    for parameter, column in cause["params"].items():
        yield f"    {parameter} is column {column}"
    if cause["via"]:
        yield f"    if its query gives this key: the other parameters are the rows of {cause['via']}"


# ── A change ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_change(table: str, op: str, old: str | None, new: str | None) -> Change:
    """Make a change of what the command line gives.

    Args:
        table: ``schema.table``.
        op: insert, update, delete or truncate.
        old: JSON, the row before it; an update and a delete have one.
        new: JSON, the row after it; an insert and an update have one.

    Raises:
        errors.WrongSettings: something of it is wrong.
    """
    try:
        named = read_table(table)
    except ValueError as error:
        raise errors.WrongSettings(f"--table: {error}.") from None
    if op not in OPS:
        raise errors.WrongSettings(f"--op: {shown(op)} is no kind of change; {nearest(op, OPS)}")
    before, after = _json_row("--old", old), _json_row("--new", new)
    wanted = {f"--{row}" for row in ROWS_OF[op]}
    for flag, row in (("--old", before), ("--new", after)):
        if (row is None) == (flag in wanted):
            what = f"needs {flag}; give its row as JSON" if row is None else f"has no {flag}; leave it out"
            raise errors.WrongSettings(f"A change of kind {op} {what}.")
    return Change(named, op, row_texts(before), row_texts(after), value_types(before, after))


def _json_row(flag: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        row = json.loads(text)
    except ValueError as error:
        raise errors.WrongSettings(f'{flag} is not JSON ({error}); write {{"column": value, …}}.') from None
    if not isinstance(row, dict) or any(isinstance(value, (dict, list)) for value in row.values()):
        raise errors.WrongSettings(f'{flag} is no row; write {{"column": value, …}}, with text for other types.')
    if any("\0" in value or not _is_unicode(value) for value in row.values() if isinstance(value, str)):
        raise errors.WrongSettings(f"{flag} holds a character that PostgreSQL can't store; remove it.")
    return row


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def explain_change(change: Change, verdicts: Iterable[Verdict], *, live: bool) -> dict[str, Any]:
    """Tell what each rule makes of a change, as plain values."""
    found = [_verdict(verdict) for verdict in verdicts]
    busts = {bust["text"]: bust for verdict in found for bust in verdict["busts"]}
    return {
        "table": str(change.table),
        "op": change.op,
        "database": live,
        "rules": found,
        "busts": list(busts.values()),
    }


def no_rule(rules: RuleSet, table: Table) -> errors.InvalidatorError:
    """Return the error for a table that no rule names."""
    remedy = nearest(str(table), map(str, rules.tables), "write a rule for it")
    return errors.InvalidatorError(f"No rule names the table {table}; {remedy}")


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "rule": verdict.rule.name,
        "defined_at": _place(verdict.rule.place),
        "fires": verdict.fired,
        "why_not": list(verdict.why_not),
        "busts": [
            {"action": bust.kind, "cache": bust.cache, "key": bust.key or None, "text": str(bust)}
            for bust in verdict.busts
        ],
        "notes": list(verdict.notes),
        "unanswered": [lack.cache for lack in verdict.unanswered],
    }


def change_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Return what `explain_change` tells as lines of text."""
    source = "as the database has the table" if told["database"] else "by the rule files alone, without the database"
    yield f"{told['op']} of {told['table']}, {source}"
    for rule in told["rules"]:
        yield f"rule {rule['rule']} ({rule['defined_at']}) {'fires' if rule['fires'] else 'does not fire'}"
        yield from (f"  {reason}" for reason in rule["why_not"])
        yield from (f"  {bust['text']}   cache {bust['cache']}" for bust in rule["busts"])
        yield from (f"  note: {note}" for note in rule["notes"])
        for cache in rule["unanswered"]:
            yield f"  not known: keys of cache {cache}, which a query gives; set CDC_POSTGRES_DSN to ask it"
    yield f"{len(told['busts'])} busts in all" if len(told["busts"]) != 1 else "1 bust in all"


def _place(place: Any) -> str:
    return f"{place.file}:{place.line}"
