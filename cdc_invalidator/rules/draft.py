"""The entries of all rule files together, checked against each other, made into a `RuleSet`.

`format` has checked each entry by itself. Here are the checks that need more than one: names that are defined twice or
nowhere, templates and their parameters, queries, conditions, tests. A mistake is noted in its `Document`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

from cdc_invalidator.rules.condition import Condition, ConditionError
from cdc_invalidator.rules.defaults import Defaults
from cdc_invalidator.rules.document import Document, Loc
from cdc_invalidator.rules.duration import LONGEST_AGAIN, TOO_LONG
from cdc_invalidator.rules.format import LONGEST_CONDITION, CacheEntry, RuleEntry, TestEntry, entries, sound
from cdc_invalidator.rules.model import DEFAULT_VERSION_TTL, Bust, Cache, Query, Rule, RuleSet, Test
from cdc_invalidator.rules.packed import pair
from cdc_invalidator.rules.sql import not_only_a_select, reads_no_table
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX
from cdc_invalidator.rules.template import FILTERS, Param, Template, TemplateError
from cdc_invalidator.rules.values import ROWS_OF, row_texts, value_types
from cdc_invalidator.rules.wording import Place, nearest, shown

# What stands beside the parameters in a bust's mapping.
RESERVED = frozenset({"via", "where", "on_empty", "sweep"})
# The daemon's own keys, under the usual name of the watermark and under any other.
_OURS = tuple(
    f"cdc:{name}:{what}".encode()
    for name in ("cdc_invalidator", "\1")
    for what in ("watermark", "watermark:{1}", "off", "check", "events")
)


class _CacheDraft(NamedTuple):
    """A cache as far as it is right; a template that is wrong or not there is None."""

    document: Document
    loc: Loc
    entry: CacheEntry
    key: Template | None
    version: Template | None
    publish: Template | None
    whole: bool

    @property
    def bust_template(self) -> Template | None:
        """The template whose parameters a bust needs; None if fields are wrong, so that it is not known."""
        if not self.whole or (self.entry.version is not None and self.version is None):
            return None
        if self.entry.bump_over is not None and self.version is not None:
            return pair(self.version, self.key) if self.key is not None else None
        return self.version or self.key


class _BustDraft(NamedTuple):
    cache: str
    template: Template
    columns: Mapping[str, str]
    query: Query | None
    given: Mapping[str, str]
    where: str | None = None
    where_place: Place = Place("")
    sweep: bool = False

    def like(self, other: _BustDraft) -> bool:
        """Whether both bust the same keys for the same rows."""
        return self._replace(where_place=other.where_place) == other


class _RuleDraft(NamedTuple):
    document: Document
    loc: Loc
    entry: RuleEntry
    busts: tuple[_BustDraft, ...]

    def place(self, *field: str) -> Place:
        """Where the rule begins, or a field of it."""
        return self.document.place((*self.loc, *field))


class Draft:
    """The rule set as far as it is right; each mistake is noted in its document.

    Args:
        documents: all files that are YAML.
        env: the environment of templates.
        every_file: all files could be read, so that a cache which is not found is a mistake.
        conditions: whether to look at what `when` says.
    """

    def __init__(
        self, documents: Sequence[Document], env: Mapping[str, str], *, every_file: bool, conditions: bool
    ) -> None:
        self._every_file = every_file
        self._conditions = conditions
        self._declared = _declared(documents)
        self._caches: dict[str, _CacheDraft] = {}
        env = _vars(documents, env)
        defaults = [Defaults(document) for document in documents]
        for document, of_file in zip(documents, defaults, strict=True):
            for loc, own, whole in sound(document, "caches", CacheEntry):
                cache = of_file.cache(own)
                key = _template(document, (*loc, "key"), cache.key, env)
                version = _template(document, (*loc, "version"), cache.version, env)
                publish = _template(document, (*loc, "publish"), cache.publish, env, of_key=False)
                draft = _CacheDraft(document, loc, cache, key, version, publish, whole)
                _check_cache(draft)
                self._caches.setdefault(str(loc[1]), draft)
        _check_same_keys(self._caches)
        self._rules = [
            _RuleDraft(document, loc, rule, self._busts(document, loc, rule))
            for document, of_file in zip(documents, defaults, strict=True)
            for loc, own_rule, _ in sound(document, "rules", RuleEntry)
            for rule in (of_file.rule(own_rule),)
        ]
        self._tests = [
            _test(test, document.place(loc))
            for document in documents
            for loc, test, whole in sound(document, "tests", TestEntry)
            if self._check_test(document, loc, test) and whole
        ]

    def rule_set(self) -> RuleSet:
        """Return the rule set; call it only if no document has a mistake."""
        busts: dict[str, list[Any]] = {name: [] for name in self._caches}
        for rule in self._rules:
            for bust in rule.busts:
                busts[bust.cache].append(_canonical(rule.entry, bust))
        caches = {name: _cache(name, draft, busts[name]) for name, draft in self._caches.items()}
        rules = tuple(_rule(draft, caches) for draft in self._rules)
        digests = sorted((cache.name, cache.digest) for cache in caches.values())
        digest = short_digest(digests, sorted(rule.name for rule in rules))
        return RuleSet(caches, rules, digest, tuple(self._tests))

    def _busts(self, document: Document, loc: Loc, rule: RuleEntry) -> tuple[_BustDraft, ...]:
        _check_repeats(document, loc, rule)
        _check_debounce(document, loc, rule)
        self._check_condition(document, (*loc, "when"), rule.when)
        self._check_condition(document, (*loc, "where"), rule.where)
        busts: list[_BustDraft] = []
        for number, entry in enumerate(rule.bust):
            name, mapping = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            at = (*loc, "bust", number)
            bust = self._bust(document, (*at, name), name, mapping)
            where = mapping.get("where")
            self._check_condition(document, (*at, name, "where"), where)
            if bust is not None and where is not None:
                bust = bust._replace(where=where, where_place=document.place((*at, name, "where")))
            if bust is not None and any(map(bust.like, busts)):
                document.complain(at, f"the rule busts {shown(name)} twice from the same columns; remove one")
            elif bust is not None:
                busts.append(bust)
        return tuple(busts)

    def _bust(self, document: Document, loc: Loc, name: str, mapping: Mapping[str, str]) -> _BustDraft | None:
        """Return the bust with its mapping made complete; None if a mistake makes that unknown."""
        if name not in self._declared and self._every_file:
            remedy = nearest(name, self._declared, "define it under `caches`")
            document.complain(loc, f"there is no cache {shown(name)}; {remedy}", of_key=True)
        draft = self._caches.get(name)
        if draft is not None and draft.entry.ttl_only:
            sentence = f"cache {shown(name)} is `ttl_only`, so no rule may bust it; remove it here, or `ttl_only` there"
            document.complain(loc, sentence, of_key=True)
        if draft is None or draft.bust_template is None:
            return None
        params = draft.bust_template.params
        if "sweep" in mapping:
            for other in sorted(mapping.keys() - {"sweep", "where"}):
                sentence = f"`sweep: true` busts the whole cache {shown(name)}, whatever the row; remove {shown(other)}"
                document.complain((*loc, other), sentence, of_key=True)
            return _BustDraft(name, draft.bust_template, {}, None, {}, sweep=True)
        if "on_empty" in mapping:
            _check_on_empty(document, loc, mapping)
        for parameter in sorted(mapping.keys() - set(params) - RESERVED):
            of = "key" if draft.entry.version is None or draft.entry.bump_over else "version"
            remedy = nearest(parameter, params, "remove it") if params else "it has none, so remove it"
            sentence = f"the `{of}` of cache {shown(name)} has no parameter {shown(parameter)}; {remedy}"
            document.complain((*loc, parameter), sentence, of_key=True)
        for parameter in sorted(mapping.keys() - RESERVED):
            column, filtered, change = mapping[parameter].partition("|")
            if filtered and change.rpartition("|")[2] in FILTERS:
                sentence = (
                    f"{shown(mapping[parameter])} is not a column; write {shown(column)}, and the filter in the "
                    f"cache's template: `{{{parameter}|{change}}}`"
                )
                document.complain((*loc, parameter), sentence)
        if "via" not in mapping:
            columns = {parameter: mapping.get(parameter, parameter) for parameter in params}
            return _BustDraft(name, draft.bust_template, columns, None, {})
        return self._via(document, loc, name, params, mapping)

    def _via(
        self, document: Document, loc: Loc, name: str, params: Sequence[str], mapping: Mapping[str, str]
    ) -> _BustDraft | None:
        query = _query(document, (*loc, "via"), mapping["via"])
        given = {parameter: column for parameter, column in mapping.items() if parameter not in RESERVED}
        if not set(params) - given.keys():
            sentence = f"all parameters of cache {shown(name)} are given, so its query has none to give; remove `via`"
            document.complain((*loc, "via"), sentence, of_key=True)
        if query is None:
            return None
        ignores = mapping.get("on_empty") == "ignore"
        query = replace(query, on_empty=mapping.get("on_empty"), ignores_empty=ignores or reads_no_table(query.parts))
        read = (*query.columns, *given.values())
        parts = [part for column in read for part in (Param(column), b"\0")][:-1]
        return _BustDraft(name, Template.of(parts), {column: column for column in read}, query, given)

    def _check_condition(self, document: Document, loc: Loc, source: str | None) -> None:
        if source is None or not self._conditions:
            return
        field = str(loc[-1])
        if len(source) > LONGEST_CONDITION:
            document.complain(loc, f"`{field}` is too long; write it shorter")
            return
        try:
            Condition(source, field)
        except ConditionError as error:
            document.complain_inside(loc, str(error), error.offset)

    def _check_test(self, document: Document, loc: Loc, test: TestEntry) -> bool:
        """Note mistakes with which no run of the test could pass."""
        change, before = test.change, len(document.problems)
        if not any(rule.entry.table == change.table for rule in self._rules) and self._every_file:
            remedy = nearest(str(change.table), [str(rule.entry.table) for rule in self._rules], "write a rule for it")
            document.complain((*loc, "change", "table"), f"no rule names the table {change.table}; {remedy}")
        wanted = ROWS_OF[change.op]
        for name in ("old", "new"):
            if name not in wanted and getattr(change, name) is not None:
                sentence = f"{_A_CHANGE[change.op]} has no `{name}` row; remove it"
                document.complain((*loc, "change", name), sentence, of_key=True)
            elif name in wanted and getattr(change, name) is None:
                document.complain(
                    (*loc, "change"), f"{_A_CHANGE[change.op]} needs its `{name}` row; add it", of_key=True
                )
        for cache in test.via.keys() - self._declared if self._every_file else ():
            remedy = nearest(cache, self._declared, "define it under `caches`")
            document.complain((*loc, "via", cache), f"there is no cache {shown(cache)}; {remedy}", of_key=True)
        return len(document.problems) == before


_A_CHANGE = {"insert": "an insert", "update": "an update", "delete": "a delete", "truncate": "a truncate"}


def _vars(documents: Sequence[Document], env: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment with the variables of all files on top; a variable may name the environment."""
    first: dict[str, tuple[Document, Loc]] = {}
    found: dict[str, str] = {}
    for document in documents:
        given = document.value.get("vars") if isinstance(document.value, dict) else None
        for name, text in given.items() if isinstance(given, dict) else ():
            loc = ("vars", name)
            owner, taken = first.setdefault(name, (document, loc))
            if owner is not document:
                place = owner.place(taken, of_key=True)
                document.complain(loc, f"the variable {shown(name)} is defined twice, first at {place}; remove one")
            elif isinstance(text, str) and text:
                template = _template(document, loc, text, env, of_key=False)
                if template is not None and template.params:
                    document.complain(loc, "a variable can't hold a parameter; write it into the keys")
                elif template is not None:
                    found[name] = template.prefix.decode()
    return {**env, **found}


def _query(document: Document, loc: Loc, text: str) -> Query | None:
    """Read a `via` query: one SELECT whose `{column}` are bound, never pasted."""
    before = len(document.problems)
    if not _SELECT.match(text):
        document.complain(loc, "a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`")
    parts: list[str | Param] = []
    quoted = ""
    for token in _VIA_TOKEN.finditer(text):
        if token["column"] is not None and "|" in token["column"]:
            name, _, filters = token["column"].partition("|")
            remedy = _IN_SQL.get(filters, "put the filter into the key, or write it in SQL").format(f"{{{name}}}")
            sentence = f"a query takes no filter `|{filters}`; {remedy}"
            document.complain_inside(loc, sentence, token.start())
            continue
        if token["column"] is not None:
            if quoted:
                sentence = (
                    f"`{token[0]}` in quotes would be text of the query, no column; take the quotes off, since values "
                    f"are bound, or write `{{{token[0]}}}` for the braces themselves"
                )
                document.complain_inside(loc, sentence, token.start())
            parts.append(Param(token["column"]))
            continue
        piece = token[0][0] if token["brace"] else token[0]
        if token["wrong"] or (piece == ";" and not quoted and text[token.end() :].strip()):
            sentence = (
                f"`{piece}` names no column; write `{{column}}`, or double each brace for itself: `{_doubled(piece)}`"
            )
            if piece == ";":
                sentence = "a query is one statement; remove the `;`"
            document.complain_inside(loc, sentence, token.start())
        if piece in _QUOTES:
            quoted = "" if quoted == piece else quoted or piece
        parts.append("" if piece == ";" and not quoted else piece)
    if len(document.problems) > before:
        return None
    if unsound := not_only_a_select(parts):
        document.complain(loc, f"a `via` query may be one SELECT that only reads, and this {unsound}")
        return None
    columns = tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Param)))
    return Query(tuple(parts), columns, place=document.place(loc))


# What a filter is in SQL.
_IN_SQL = {
    "lower": "write `lower({0})`",
    "upper": "write `upper({0})`",
    "md5": "write `md5({0})`",
    "sha1": "write `encode(digest({0}, 'sha1'), 'hex')`, of the extension pgcrypto",
    "sha256": "write `encode(sha256(convert_to({0}, 'UTF8')), 'hex')`",
}
_SELECT = re.compile(r"\s*(SELECT|WITH)\b", re.IGNORECASE)
_VIA_TOKEN = re.compile(
    r"(?P<brace>\{\{|\}\})|\{(?P<column>[^{}\s,]+)\}|(?P<wrong>\{[^{}'\"]*\}|[{}])|(?P<text>['\";]|[^{}'\";]+)"
)
_QUOTES = frozenset("'\"")


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _test(entry: TestEntry, place: Place) -> Test:
    change = entry.change
    return Test(
        entry.name,
        change.table,
        change.op,
        row_texts(change.old),
        row_texts(change.new),
        value_types(change.old, change.new),
        {cache: [row_texts(row) or {} for row in rows] for cache, rows in entry.via.items()},
        tuple(entry.busts),
        place,
    )


def _cache(name: str, draft: _CacheDraft, busts: list[Any]) -> Cache:
    entry, key, version = draft.entry, draft.key, draft.version
    assert key is not None
    return Cache(
        name,
        key,
        version,
        version_ttl=entry.version_ttl or DEFAULT_VERSION_TTL,
        ttl=entry.ttl,
        jitter=entry.jitter or 0,
        ttl_only=entry.ttl_only,
        digest=short_digest(
            canonical_parts(key),
            version and canonical_parts(version),
            sorted(busts, key=json.dumps),
            *(["pairs"] if entry.bump_over else []),
            # Another daemon deletes other locks, so what was stored beside it is swept.
            [suffix.decode() for suffix in (LOCK_SUFFIX, STALE_SUFFIX)],
        ),
        bump_over=entry.bump_over,
        again_after=entry.again_after,
        negative_ttl=entry.negative_ttl,
        stale_for=entry.stale_for,
        max_keys_hint=entry.max_keys_hint,
        given=entry.given,
        publish=draft.publish,
        place=draft.document.place(draft.loc, of_key=True),
    )


def _rule(draft: _RuleDraft, caches: Mapping[str, Cache]) -> Rule:
    entry = draft.entry
    return Rule(
        entry.name,
        entry.table,
        on=frozenset(entry.on),
        columns=tuple(entry.columns or ()),
        old_row=entry.old_row,
        immutable=frozenset(entry.immutable),
        busts=tuple(
            Bust(
                caches[bust.cache],
                bust.template,
                bust.columns,
                bust.query,
                bust.given,
                bust.where,
                bust.where_place,
                sweep=bust.sweep,
            )
            for bust in draft.busts
        ),
        place=draft.place(),
        when=entry.when,
        when_place=draft.place("when"),
        debounce=entry.debounce,
        where=entry.where,
        where_place=draft.place("where"),
    )


def _declared(documents: Sequence[Document]) -> set[str]:
    """Return the names of all caches, wrong ones as well; note caches and rules whose name is taken."""
    first: dict[tuple[str, str], tuple[Document, Loc]] = {}
    for document in documents:
        for noun, name, loc in _names(document):
            owner, taken = first.setdefault((noun, name), (document, loc))
            if (owner, taken) != (document, loc):
                of_key = noun == "cache"
                place = owner.place(taken, of_key=of_key)
                sentence = f"{noun} {shown(name)} is defined twice, first at {place}; rename or remove one"
                document.complain(loc, sentence, of_key=of_key)
    return {name for noun, name in first if noun == "cache"}


def _names(document: Document) -> Iterator[tuple[str, str, Loc]]:
    """Yield what the file defines: noun, name, and the place of the name."""
    for loc, _ in entries(document, "caches"):
        yield "cache", str(loc[1]), loc
    for loc, rule in entries(document, "rules"):
        if isinstance(rule, dict) and isinstance(rule.get("name"), str):
            yield "rule", rule["name"], (*loc, "name")


def _check_cache(draft: _CacheDraft) -> None:
    document, loc, entry, key, version, publish, whole = draft
    if version is not None and "version" in version.params:
        document.complain((*loc, "version"), "a `version` may not hold `{version}` itself; remove the parameter")
    for name, template in (("key", key), ("version", version)):
        for parameter in sorted(RESERVED & set(template.params if template is not None else ())):
            sentence = f"a parameter may not be called `{parameter}`, a word of a rule's `bust`; give it another name"
            document.complain((*loc, name), sentence)
    if entry.version is not None and key is not None and "version" not in key.params:
        sentence = "the cache has a `version` but its key lacks `{version}`; put it there, or remove `version`"
        document.complain((*loc, "key"), sentence)
    if entry.version is not None and key is not None and key.rest:
        sentence = "a bust of a cache with a `version` names the version alone; take the `*` off, or remove `version`"
        document.complain_inside((*loc, "key"), sentence, len(entry.key) - 1)
    if not whole:
        return  # a field that seems to be missing may be a wrong one
    if publish is not None and key is not None:
        _check_publish(draft, publish, key)
    if entry.version is None and key is not None and "version" in key.params:
        sentence = "the key has `{version}` but the cache has no `version`; add its template, or rename the parameter"
        document.complain((*loc, "key"), sentence)
    if entry.version is None and entry.version_ttl is not None:
        document.complain((*loc, "version_ttl"), "`version_ttl` needs a `version`; remove it, or add one", of_key=True)
    if entry.bump_over is not None and entry.version is None:
        document.complain((*loc, "bump_over"), "`bump_over` needs a `version`; remove it, or add one", of_key=True)
    if entry.bump_over is not None and key is not None and version is not None:
        for parameter in sorted(set(version.params) - set(key.params)):
            sentence = (
                f"with `bump_over`, the key must hold all parameters of the version; put `{{{parameter}}}` into it"
            )
            document.complain((*loc, "key"), sentence)
    if key is not None and any("version" in part.names for part in key.parts if isinstance(part, Param) and part.parts):
        document.complain((*loc, "key"), "`{version}` may not stand in a hash; write it outside")
    if entry.bump_over is not None and key is not None and _filters_version(key):
        sentence = "with `bump_over`, the version stands in the key as it is; take the filter off `{version}`"
        document.complain((*loc, "key"), sentence)
    if entry.again_after is not None and entry.again_after > LONGEST_AGAIN:
        document.complain((*loc, "again_after"), TOO_LONG.format(field="again_after"))
    if entry.ttl is None and entry.jitter is not None:
        document.complain((*loc, "jitter"), "`jitter` needs a `ttl`; remove it, or add one", of_key=True)


def _check_publish(draft: _CacheDraft, publish: Template, key: Template) -> None:
    document, loc, entry = draft.document, draft.loc, draft.entry
    if entry.ttl_only:
        sentence = "nothing busts a cache that is `ttl_only`, so there is nothing to publish; remove one of the two"
        document.complain((*loc, "publish"), sentence, of_key=True)
    busted = {"version": draft.version} if draft.version is not None else {"key": key}
    if entry.bump_over is not None:
        busted["key"] = key
    for of, template in busted.items():
        for part in publish.parts:
            if isinstance(part, Param) and part not in template.parts:
                written = "|".join((part.name, *part.filters))
                sentence = (
                    f"a channel is read from the `{of}`, which does not hold `{{{written}}}`; write a parameter as it "
                    "stands there, or none"
                )
                document.complain((*loc, "publish"), sentence)


def _filters_version(key: Template) -> bool:
    return any(part.filters for part in key.parts if isinstance(part, Param) and part.name == "version")


def _template(
    document: Document, loc: Loc, text: str | None, env: Mapping[str, str], *, of_key: bool = True
) -> Template | None:
    if text is None:
        return None
    try:
        template = Template.parse(text, env)
    except TemplateError as error:
        document.complain_inside(loc, str(error), error.offset)
        return None
    if template.rest and loc[-1] != "key":
        sentence = "a `*` stands for the rest of a `key` only; write `**` for the sign itself, or remove it"
        document.complain_inside(loc, sentence, len(text) - 1)
        return None
    if of_key and template.glob() == b"*":
        document.complain(loc, "without literal text, a sweep of this would empty all of Redis; begin it with a prefix")
        return None
    if of_key and any(template.like().fullmatch(key) for key in _OURS):
        sentence = "this can be a key of the daemon's own, such as `cdc:cdc_invalidator:watermark`, which a row, a read"
        document.complain(loc, f"{sentence} or a sweep would then replace or delete; begin it with a prefix")
        return None
    return template


def _check_same_keys(caches: Mapping[str, _CacheDraft]) -> None:
    first: dict[tuple[tuple[bytes | Param, ...], bool], str] = {}
    for name, draft in caches.items():
        if draft.key is None:
            continue
        key = (draft.key.parts, draft.key.rest)
        if first.setdefault(key, name) != name:
            other = first[key]
            place = caches[other].document.place((*caches[other].loc, "key"))
            sentence = f"cache {shown(other)} has the same key, at {place}; make one cache of the two"
            draft.document.complain((*draft.loc, "key"), sentence)


def _check_repeats(document: Document, loc: Loc, rule: RuleEntry) -> None:
    for name, items in (("on", rule.on), ("columns", rule.columns or ()), ("immutable", rule.immutable)):
        seen: set[str] = set()
        for number, item in enumerate(items):
            if item in seen:
                document.complain((*loc, name, number), f"{shown(item)} stands twice in `{name}`; remove one")
            seen.add(item)


def _check_on_empty(document: Document, loc: Loc, mapping: Mapping[str, str]) -> None:
    if mapping["on_empty"] != "ignore":
        sentence = (
            f"{shown(mapping['on_empty'])} is not allowed here; write `ignore` where a query that gives nothing for an "
            "old row means that nothing is stale, or remove `on_empty`"
        )
        document.complain((*loc, "on_empty"), sentence)
    if "via" not in mapping:
        sentence = "`on_empty` is about the answer of a query; remove it, or add `via`"
        document.complain((*loc, "on_empty"), sentence, of_key=True)


def _check_debounce(document: Document, loc: Loc, rule: RuleEntry) -> None:
    if rule.debounce is not None and rule.debounce > LONGEST_AGAIN:
        document.complain((*loc, "debounce"), TOO_LONG.format(field="debounce"))


def _canonical(rule: RuleEntry, bust: _BustDraft) -> list[Any]:
    """Return how a rule busts a cache, without the rule's name: a rule that is only renamed busts as before."""
    columns = sorted(set(rule.columns or ()))
    canonical = [
        rule.table,
        sorted(rule.on),
        columns,
        rule.old_row,
        sorted(rule.immutable),
        sorted(bust.columns.items()),
    ]
    # Later additions to the format are left out if unused, so that an upgrade sweeps no cache.
    more = {
        "when": rule.when,
        "via": bust.query and [bust.query.text],
        "given": sorted(bust.given.items()),
        "where": [text for text in (rule.where, bust.where) if text],
        "on_empty": bust.query and bust.query.on_empty,
        "sweep": bust.sweep,
    }
    used = {name: value for name, value in more.items() if value}
    return [*canonical, used] if used else canonical


def canonical_parts(template: Template) -> list[Any]:
    """Return the parts of a template, fit for JSON: with the environment's values, and without how it is written."""
    parts = [part.decode() if isinstance(part, bytes) else [part.name, *part.filters] for part in template.parts]
    return [*parts, ["*"]] if template.rest else parts


def short_digest(*canonical: Any) -> str:
    """Return 16 hexadecimal digits that change with what is given, which must be fit for JSON."""
    return sha256(json.dumps(canonical).encode()).hexdigest()[:16]
