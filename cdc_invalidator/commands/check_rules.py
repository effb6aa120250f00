"""What is worth saying about a rule set before a daemon runs by it: findings, each with its remedy. Pure.

`offline` looks at the rules alone. What a database says of their columns makes some of its findings sharper, which is
why it takes `Columns`; `check_postgres` asks the database.

The rule that holds here: a finding that the rules alone don't prove is a warning or a note, never an error; and nothing
asks for another key where a cache is `given`: to follow that would lose busts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.condition import asked_columns, condition_of
from cdc_invalidator.rules.model import Bust, Cache, Rule, RuleSet
from cdc_invalidator.rules.overlap import Language, Texts
from cdc_invalidator.rules.selected import selected
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param, Template
from cdc_invalidator.rules.wording import nearest

# How much alike two names of columns are if one may be meant by the other: `tenantId` and `tenant_id`.
_ALIKE = 0.8


# ── The rules alone ──────────────────────────────────────────────────────────────────────────────────────────────────


def offline(rules: RuleSet, columns: Columns, *, cluster: bool) -> list[Finding]:
    """Return what the rules alone show.

    Args:
        rules: the rule set.
        columns: what is known of the columns that keys are made of.
        cluster: whether the caches live in a Redis Cluster.
    """
    findings = [found for rule in rules.rules for found in (*_of_rule(rule), *lacking_parameters(rule))]
    findings += _not_shown(rules)
    busted = {bust.cache.name for rule in rules.rules for bust in rule.busts}
    for cache in rules.caches.values():
        findings += _of_cache(cache, busted=cache.name in busted, cluster=cluster)
        findings += _ambiguous(cache, columns)
    findings += _clashes(list(rules.caches.values()), columns)
    findings += _swept_besides(list(rules.caches.values()))
    return findings


def _of_rule(rule: Rule) -> Iterator[Finding]:
    if rule.old_row == "ignore":
        yield Finding(
            Severity.NOTE,
            "old_row_ignored",
            rule.place,
            f"rule {rule.name} has `old_row: ignore`: where the replica identity does not carry a key's columns, the "
            "entries under former values stay until their TTL; this is only listed, so that it stays a decision.",
        )
    silent = never(rule)
    if silent == rule.on:
        yield Finding(
            Severity.WARNING,
            "never_fires",
            rule.place,
            f"rule {rule.name} can never fire, since its `when` or `where` is false for every "
            f"{' and '.join(sorted(rule.on))} or its `columns` never change; correct it, or remove the rule.",
        )
    elif silent:
        yield Finding(
            Severity.NOTE,
            "never_fires_on",
            rule.place,
            f"rule {rule.name} never fires on {' or '.join(sorted(silent))}; take that out of its `on`.",
        )
    if rule.columns and "update" not in rule.on:
        yield Finding(
            Severity.WARNING,
            "columns_unused",
            rule.place,
            f"rule {rule.name} has `columns`, which only an UPDATE looks at, and `on` has no update; remove one of "
            "them.",
        )


def lacking_parameters(rule: Rule) -> Iterator[Finding]:
    """Yield findings on parameters that the text of a query shows it not to give."""
    for bust in rule.busts:
        names = selected(bust.query) if bust.query is not None else None
        if names is not None:
            yield from query_lacks(rule, bust, names)


def query_lacks(rule: Rule, bust: Bust, names: Iterable[str]) -> Iterator[Finding]:
    """Yield a finding on each parameter that a query whose rows have these names does not give."""
    for parameter in sorted(set(bust.cache.bust_template.params) - set(names) - bust.given.keys()):
        yield Finding(
            Severity.ERROR,
            "query_lacks_parameter",
            rule.place,
            f"the `via` query of rule {rule.name} gives no {parameter}, which cache {bust.cache.name} needs; "
            f"{nearest(parameter, names, f'select it AS {parameter}')}",
        )


def _not_shown(rules: RuleSet) -> Iterator[Finding]:
    """Yield findings on columns of keys that no test of the table has, while some have one that is spelled alike."""
    shown: dict[Table, set[str]] = {}
    for test in rules.tests:
        shown.setdefault(test.table, set()).update(test.old or (), test.new or ())
    for rule in rules.rules:
        for column in sorted(rule.key_columns - shown.get(rule.table, set())):
            near = get_close_matches(column, shown.get(rule.table, ()), 1, _ALIKE)
            if near and near[0] not in rule.key_columns:
                yield Finding(
                    Severity.WARNING,
                    "column_not_shown",
                    rule.place,
                    f"rule {rule.name} makes keys of column {column} of {rule.table}, which no test shows; did you "
                    f"mean {near[0]}?",
                )


def never(rule: Rule) -> frozenset[str]:
    """Return the kinds of change that a rule names and can't fire on, whatever the rows hold."""
    silent: set[str] = set()
    if rule.when is not None:
        condition = condition_of(rule.when)
        silent = {op for op in rule.on if condition.refuses(op)}
    if rule.where is not None and condition_of(rule.where, "where").refuses("update"):
        silent |= rule.on - {"truncate"}
    if "update" in rule.on and rule.columns and {*rule.columns, *asked_columns(rule)} <= rule.immutable:
        silent.add("update")
    return frozenset(silent)


def _of_cache(cache: Cache, *, busted: bool, cluster: bool) -> Iterator[Finding]:
    def warning(code: str, sentence: str) -> Finding:
        return Finding(Severity.WARNING, code, cache.place, sentence)

    if not busted and not cache.ttl_only:
        yield warning(
            "never_busted",
            f"no rule busts cache {cache.name}, so its entries are stale until they expire; name it in the `bust` of "
            "a rule, or write down with `ttl_only: true` that this is meant.",
        )
    if cache.ttl is None and not cache.ttl_only:
        yield warning(
            "no_ttl",
            f"cache {cache.name} has no `ttl`, so what nobody reads any more stays in memory; add one, such as "
            "`ttl: 1h`.",
        )
    for of, template in (("key", cache.key), ("version", cache.version)):
        if template is not None and not cache.given and template.prefix.count(b":") < 2:
            yield warning(
                "short_prefix",
                f"the `{of}` of cache {cache.name} does not begin with an application and an environment, so that "
                "others may use, or a sweep may delete, the same keys; write it as `shop:${APP_ENV:-prod}:…`.",
            )
    if cluster and cache.lacks_hash_tag and not cache.given:
        yield warning(
            "no_hash_tag",
            f"in a cluster, a key of cache {cache.name} and its lock lie in different slots, so that a reader's fill "
            "fails; give the key a hash tag, such as `user:{{{id}}}:profile`.",
        )
    if cache.key.rest and cache.stale_for is not None:
        yield Finding(
            Severity.NOTE,
            "stale_for_unused",
            cache.place,
            f"a search leaves no old values, so `stale_for` does nothing for cache {cache.name}; remove it.",
        )


# ── Keys that are two things at once ─────────────────────────────────────────────────────────────────────────────────


def _ambiguous(cache: Cache, columns: Columns) -> Iterator[Finding]:
    if cache.given:
        return
    known = columns.of(cache)
    for of, template in (("key", cache.key), ("version", cache.version)):
        if template is None or len(template.params) + template.rest < 2:
            continue
        # Of values that nobody knows, only what holds for numbers as well is told.
        unknown = {name: Texts.of_numbers(values) for name, values in _assumed(template, known).items()}
        parts = {name: Texts.of_parts(values) for name, values in known.items()}
        for severity, values in (
            (Severity.WARNING, unknown | parts),
            (Severity.NOTE, unknown | dict(known)),
        ):
            found = overlap.readings(Language(template, values))
            if found is not None:
                yield Finding(
                    severity,
                    "ambiguous_key",
                    cache.place,
                    f"two rows can have the same `{of}` of cache {cache.name}: `{found.key}` is both {found.one} and "
                    f"{found.other}; put a separator between the parameters that no value holds, or add the filter "
                    "`|urlencode`.",
                )
                break


def _assumed(template: Template, known: Mapping[str, Texts]) -> dict[str, Texts]:
    return {
        part.name: known.get(part.name, overlap.COUNTER if part.name == "version" else overlap.PART)
        for part in template.parts
        if isinstance(part, Param)
    } | ({overlap.REST: overlap.PART} if template.rest else {})


def _clashes(caches: Sequence[Cache], columns: Columns) -> Iterator[Finding]:
    """Keys of one cache that are keys, counters or locks of another; and counters of its own."""
    strict = {
        cache.name: {parameter: Texts.of_parts(values) for parameter, values in columns.of(cache).items()}
        for cache in caches
    }
    usual = [Language(cache.key, strict[cache.name]) for cache in caches]
    widest = [Language(cache.key, columns.of(cache)) for cache in caches]
    shared: list[tuple[Cache, Cache, str]] = []
    for at, cache in enumerate(caches):
        for beside, other in enumerate(caches[at + 1 :], at + 1):
            sure = not usual[at].free and not usual[beside].free
            open_end = cache.key.rest or other.key.rest
            severity, remedy = Severity.ERROR if sure else Severity.WARNING, ""
            key = overlap.common(usual[at], usual[beside])
            if key is None:
                # Only a value with a separator in it would do.
                key = overlap.common(widest[at], widest[beside])
                severity, remedy = Severity.NOTE, ", or add the filter `|urlencode` to the parameter"
            if open_end:
                # Of what no bust can name, nobody knows whether it is ever the same.
                severity = Severity.NOTE
            free = [each for each in (other, cache) if not each.given]
            if key is not None and not free:
                shared.append((cache, other, key))
            elif key is not None:
                which = "one of them" if len(free) == 2 else f"cache {free[0].name}"
                yield Finding(
                    severity,
                    "same_keys",
                    free[0].place,
                    f"caches {cache.name} (at {cache.place}) and {other.name} can have the same key, such as `{key}`, "
                    f"and readers of one would be given values of the other; give {which} another literal "
                    f"part{remedy}.",
                )
    yield from _shared(shared)
    yield from _clashes_with_ours(caches, strict)


def _shared(pairs: Sequence[tuple[Cache, Cache, str]]) -> Iterator[Finding]:
    """Given keys that are of several caches: one note for all of them, since nothing is to be done."""
    groups: list[list[str]] = []
    for cache, other, _ in pairs:
        joined = [group for group in groups if cache.name in group or other.name in group]
        names = [name for group in joined for name in group] + [cache.name, other.name]
        groups = [group for group in groups if group not in joined] + [list(dict.fromkeys(names))]
    if groups:
        examples = {name: key for cache, other, key in reversed(pairs) for name in (cache.name, other.name)}
        told = "; ".join(f"{_listed(group)} (such as `{examples[group[0]]}`)" for group in groups)
        yield Finding(
            Severity.NOTE,
            "same_keys",
            pairs[0][0].place,
            "given keys of several caches can be the same, so that a bust of one may delete an entry of another, which "
            f"costs a miss: {told}; nothing needs to be done.",
        )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _clashes_with_ours(caches: Sequence[Cache], values: Mapping[str, Mapping[str, Texts]]) -> Iterator[Finding]:
    """Keys that are version counters, which a bump would overwrite. No key can be a lock, or an old value."""
    for cache in caches:
        mine = Language(cache.key, values[cache.name])
        for other in caches:
            if other.version is None:
                continue
            theirs = Language(other.version, values[other.name])
            key = overlap.common(mine, theirs)
            if key is not None:
                yield Finding(
                    Severity.WARNING if mine.free or theirs.free else Severity.ERROR,
                    "key_is_ours",
                    other.place if cache.given else cache.place,
                    f"a key of cache {cache.name} can be the version counter of cache {other.name} (at {other.place}), "
                    f"such as `{key}`; give {f'the version of {other.name}' if cache.given else 'the key'} another "
                    "literal part.",
                )


def _swept_besides(caches: Sequence[Cache]) -> Iterator[Finding]:
    """Caches within the pattern of another. Any text could be what ends that: numbers stand for texts."""
    numbers = {
        cache.name: {name: Texts.of_numbers(values) for name, values in _assumed(template, {}).items()}
        for cache in caches
        for template in (Template.of((*cache.key.parts, *(cache.version.parts if cache.version else ()))),)
    }
    languages = {
        cache.name: [
            Language(cache.key, numbers[cache.name]),
            *([Language(cache.version, numbers[cache.name])] if cache.version is not None else []),
        ]
        for cache in caches
    }
    given: dict[str, list[str]] = {}
    first: Cache | None = None
    for cache in caches:
        swept = Language.of_sweep(cache.sweep_template)
        others = [
            other.name
            for other in caches
            if other is not cache
            and other.version != cache.sweep_template
            and any(overlap.common(swept, theirs) is not None for theirs in languages[other.name])
        ]
        if not others or not (cache.sweep_template.params or cache.sweep_template.rest):
            continue
        pattern = cache.sweep_template.glob().decode("utf-8", "replace")
        if cache.given:
            first = first or cache
            given.setdefault(pattern, []).append(cache.name)
            continue
        yield Finding(
            Severity.NOTE,
            "sweeps_others",
            cache.place,
            f"a sweep of cache {cache.name} looks for `{pattern}`, which also deletes what belongs to "
            f"{', '.join(others)}; that does no harm but costs misses, and another prefix avoids it.",
        )
    if first is not None:
        told = "; ".join(f"`{pattern}` for {_listed(names)}" for pattern, names in given.items())
        yield Finding(
            Severity.NOTE,
            "sweeps_others",
            first.place,
            f"sweeps of caches with given keys also delete keys of other caches, which does no harm but costs misses: "
            f"they look for {told}; `check` on a live Redis tells what it holds there.",
        )
