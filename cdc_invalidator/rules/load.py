"""Rule files: YAML to one checked set of caches and rules, or every mistake in them at once.

Text goes down in one straight line: YAML nodes, which know their places (`document`) → plain values → the models of the
file format (`rulefile`) → checks across entries and files → the runtime objects that the rest of the program uses.

The rule that holds here: whatever a file holds, the result is a ``RuleSet`` or ``errors.WrongRules``. A mistake in one
entry hides none in another, and what follows only from a mistake that is already told is not told again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from cdc_invalidator.errors import Problem, WrongRules
from cdc_invalidator.rules.condition import Condition, ConditionError
from cdc_invalidator.rules.document import MAX_BYTES, Document, Loc, Place, read, too_large, unusable
from cdc_invalidator.rules.format import (
    CacheEntry,
    RuleEntry,
    Table,
    TestEntry,
    check_format,
    entries,
    nearest,
    sound,
)
from cdc_invalidator.rules.template import Param, Template, TemplateError, shown

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_VERSION_TTL = 30 * 86_400_000
LONGEST_AGAIN = 60_000


# ── What the rest of the program uses ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cache:
    """A family of keys; times are in ms.

    ``digest`` changes with what decides which keys there are and how they are busted: the templates after the
    environment, and the rules. It does not change with times, names of rules, order or comments.
    """

    name: str
    key: Template
    version: Template | None
    version_ttl: int
    ttl: int | None
    jitter: int
    ttl_only: bool
    digest: str
    bump_over: int | None = None
    again_after: int | None = None
    negative_ttl: int | None = None
    stale_for: int | None = None
    max_keys_hint: int | None = None
    place: Place = field(default=Place(""), compare=False)

    @property
    def target(self) -> Template:
        """What a sweep searches for: the version's keys where the cache has a version, else its own."""
        return self.version or self.key

    @property
    def busted(self) -> Template:
        """What a bust names: a key, or a version's key; with ``bump_over`` both in one, see `Pair`."""
        return self.target if self.bump_over is None or self.version is None else pair(self.version, self.key)


class Pair(NamedTuple):
    """A version's key and a key under it, which lacks the version, of a cache with ``bump_over``."""

    version: bytes
    rest: bytes

    @classmethod
    def split(cls, busted: bytes) -> Pair:
        """Take apart what a template made by `pair` gives."""
        version, _, rest = busted.partition(b"\0")
        return cls(version, rest)

    def key(self, version: bytes) -> bytes:
        """Give the key under this version."""
        return self.rest.replace(b"\0", version)


def pair(version: Template, key: Template) -> Template:
    """Give a template of both; NUL, which no text of PostgreSQL holds, stands between them and for the version."""
    rest = [b"\0" if isinstance(part, Param) and part.name == "version" else part for part in key.parts]
    return Template.of((*version.parts, b"\0", *rest))


def join_arguments(values: Iterable[bytes | None]) -> bytes:
    """Give one text of a query's arguments, which may be NULL; NUL, which no text of PostgreSQL holds, is between."""
    return b"\0".join(b"-" if value is None else b"+" + value for value in values)


def split_arguments(arguments: bytes) -> list[bytes | None]:
    """Take apart what `join_arguments` gave."""
    return [value[1:] if value.startswith(b"+") else None for value in arguments.split(b"\0")]


@dataclass(frozen=True, slots=True)
class Query:
    """A query whose rows give parameters: SQL with the names of the changed row's columns in between.

    ``parts``: SQL (text) and columns (`Param`) in order; ``columns``: the latter, each once.
    """

    parts: tuple[str | Param, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bust:
    """A cache that a rule busts.

    ``template``: what a change gives, from the columns that ``columns`` names for its parameters. Without a ``query``
    that is what is busted. With one, it is the values that `Query.columns` and then ``given`` (parameter: column) ask
    for, as `join_arguments` puts them: the query's rows give the parameters that are not in ``given``.
    """

    cache: Cache
    template: Template = field(compare=False)
    columns: Mapping[str, str] = field(hash=False)
    query: Query | None = None
    given: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """Which changes of which table bust which caches; empty ``columns`` means that any column counts."""

    name: str
    table: Table
    on: frozenset[str]
    columns: tuple[str, ...]
    old_row: str
    immutable: frozenset[str]
    busts: tuple[Bust, ...]
    place: Place
    when: str | None = None
    when_place: Place = field(default=Place(""), compare=False)
    debounce: int | None = None

    @property
    def key_columns(self) -> frozenset[str]:
        """All columns that a key is made of."""
        return frozenset(column for bust in self.busts for column in bust.columns.values())


@dataclass(frozen=True, slots=True)
class Test:
    """A change and the busts that it must give; values are text as PostgreSQL shows it, or NULL.

    ``types``: pg_type OIDs that the file's values speak for, by column. ``via``: by cache, what its query gives.
    """

    __test__ = False  # pytest

    name: str
    table: Table
    op: str
    old: Mapping[str, str | None] | None = field(hash=False)
    new: Mapping[str, str | None] | None = field(hash=False)
    types: Mapping[str, int] = field(hash=False)
    via: Mapping[str, Sequence[Mapping[str, str | None]]] = field(hash=False)
    busts: tuple[str, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rule files together; ``digest`` changes with the digest of a cache and with the names of caches and rules.

    ``fingerprint``: of the files' names and texts, as `fingerprint` gives it.
    """

    caches: Mapping[str, Cache] = field(hash=False)
    rules: tuple[Rule, ...]
    digest: str
    tests: tuple[Test, ...] = ()
    fingerprint: str = field(default="", compare=False)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that rules name, each once, in order of appearance."""
        return tuple(dict.fromkeys(rule.table for rule in self.rules))


def load_rules(path: Path, env: Mapping[str, str], *, conditions: bool = True) -> RuleSet:
    """Read a rule file, or all ``*.yaml`` and ``*.yml`` directly in a directory, hidden ones left out.

    Args:
        path: the file or directory.
        env: the environment of templates.
        conditions: False for who has no use for `when`, and perhaps no CEL: what it says is not looked at.

    Raises:
        WrongRules: all mistakes of all files; what cannot be read is one at line 1, column 1.
    """
    problems: list[Problem] = []
    return _parse(_sources(path, problems), env, problems, conditions=conditions)


def fingerprint(path: Path) -> str:
    """Tell, without reading them as YAML, whether these files are those of a rule set: by their names and texts.

    Raises:
        WrongRules: there is no file, or one can't be read.
    """
    problems: list[Problem] = []
    sources = _sources(path, problems)
    if problems:
        raise WrongRules(problems)
    return _digest(sources)


def _sources(path: Path, problems: list[Problem]) -> list[tuple[str, str]]:
    sources: list[tuple[str, str]] = []
    try:
        for file in _files(path):
            try:
                sources.append((str(file), _text(file)))
            except WrongRules as wrong:
                problems += wrong.problems
    except OSError as error:
        raise unusable(
            Place(str(path)), f"this cannot be read ({error.strerror}); check CDC_RULES and its permissions"
        ) from error
    return sources


def parse_rules(sources: Sequence[tuple[str, str]], env: Mapping[str, str]) -> RuleSet:
    """Make one rule set of pairs of file name and text.

    Raises:
        WrongRules: all mistakes of all files.
    """
    return _parse(sources, env, [])


def _parse(
    sources: Sequence[tuple[str, str]], env: Mapping[str, str], problems: list[Problem], *, conditions: bool = True
) -> RuleSet:
    documents: list[Document] = []
    for name, text in sources:
        try:
            documents.append(read(name, text))
        except WrongRules as wrong:
            problems += wrong.problems
    for document in documents:
        check_format(document)
    draft = _Draft(documents, env, every_file=not problems, conditions=conditions)
    problems += [problem for document in documents for problem in document.problems]
    if problems:
        # An alias brings the same mistake from the same place more than once.
        raise WrongRules(list(dict.fromkeys(problems)))
    return replace(draft.rule_set(), fingerprint=_digest(sources))


# ── Files to text ────────────────────────────────────────────────────────────────────────────────────────────────────


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # A ConfigMap's mount is links to files in `..data`, itself a link: hidden names are not looked into.
    found = sorted(
        file for file in path.iterdir() if file.suffix in {".yaml", ".yml"} and not file.name.startswith(".")
    )
    if not found:
        raise unusable(
            Place(str(path)), "no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
        )
    return found


def _text(file: Path) -> str:
    """The text of a file, of which no more is read than may be."""
    try:
        if file.exists() and not file.is_file():
            raise unusable(
                Place(str(file)), "this is not a regular file; remove it, or rename it to end in something else"
            )
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise unusable(
            Place(str(file)), f"this file cannot be read ({reason}); check CDC_RULES and its permissions"
        ) from error
    if len(data) > MAX_BYTES:
        raise too_large(str(file))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise unusable(Place(str(file)), f"byte {error.start} is not UTF-8; save the file as UTF-8") from error


# ── Checks across entries and files, and the runtime objects ─────────────────────────────────────────────────────────


class _CacheDraft(NamedTuple):
    """A cache as far as it is right; a template that is wrong or not there is None."""

    document: Document
    loc: Loc
    entry: CacheEntry
    key: Template | None
    version: Template | None
    whole: bool

    @property
    def target(self) -> Template | None:
        """What a bust needs the parameters of; None where that is not known, because fields are wrong."""
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


class _RuleDraft(NamedTuple):
    entry: RuleEntry
    place: Place
    when_place: Place
    busts: tuple[_BustDraft, ...]


class _Draft:
    """The set of rules as far as it is right; what is wrong is told to its document.

    Args:
        documents: all files that are YAML.
        env: the environment of templates.
        every_file: no file is missing, so that a cache which is not found is a mistake.
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
        for document in documents:
            for loc, cache, whole in sound(document, "caches", CacheEntry):
                key = _template(document, (*loc, "key"), cache.key, env)
                version = _template(document, (*loc, "version"), cache.version, env)
                draft = _CacheDraft(document, loc, cache, key, version, whole)
                _check_cache(draft)
                self._caches.setdefault(str(loc[1]), draft)
        _check_same_keys(self._caches)
        self._rules = [
            _RuleDraft(rule, document.place(loc), document.place((*loc, "when")), self._busts(document, loc, rule))
            for document in documents
            for loc, rule, _ in sound(document, "rules", RuleEntry)
        ]
        self._tests = [
            _test(test, document.place(loc))
            for document in documents
            for loc, test, whole in sound(document, "tests", TestEntry)
            if self._check_test(document, loc, test) and whole
        ]

    def rule_set(self) -> RuleSet:
        """The runtime objects; only to be asked for when nothing is wrong."""
        busts: dict[str, list[Any]] = {name: [] for name in self._caches}
        for rule in self._rules:
            for bust in rule.busts:
                busts[bust.cache].append(_canonical(rule.entry, bust))
        caches = {name: _cache(name, draft, busts[name]) for name, draft in self._caches.items()}
        rules = tuple(_rule(draft, caches) for draft in self._rules)
        digests = sorted((cache.name, cache.digest) for cache in caches.values())
        digest = _digest(digests, sorted(rule.name for rule in rules))
        return RuleSet(caches, rules, digest, tuple(self._tests))

    def _busts(self, document: Document, loc: Loc, rule: RuleEntry) -> tuple[_BustDraft, ...]:
        _check_repeats(document, loc, rule)
        _check_debounce(document, loc, rule)
        if self._conditions:
            _check_condition(document, loc, rule)
        busts: list[_BustDraft] = []
        for number, entry in enumerate(rule.bust):
            name, mapping = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            at = (*loc, "bust", number)
            bust = self._bust(document, (*at, name), name, mapping)
            if bust is not None and bust in busts:
                document.complain(at, f"the rule busts {shown(name)} twice from the same columns; remove one")
            elif bust is not None:
                busts.append(bust)
        return tuple(busts)

    def _bust(self, document: Document, loc: Loc, name: str, mapping: Mapping[str, str]) -> _BustDraft | None:
        """The bust with its mapping made complete, or None where that cannot be known."""
        if name not in self._declared and self._every_file:
            remedy = nearest(name, self._declared, "define it under `caches`")
            document.complain(loc, f"there is no cache {shown(name)}; {remedy}", of_key=True)
        draft = self._caches.get(name)
        if draft is not None and draft.entry.ttl_only:
            sentence = f"cache {shown(name)} is `ttl_only`, so no rule may bust it; remove it here, or `ttl_only` there"
            document.complain(loc, sentence, of_key=True)
        if draft is None or draft.target is None:
            return None
        params = draft.target.params
        for parameter in sorted(mapping.keys() - set(params) - {"via"}):
            of = "key" if draft.entry.version is None or draft.entry.bump_over else "version"
            remedy = nearest(parameter, params, "remove it") if params else "it has none, so remove it"
            sentence = f"the `{of}` of cache {shown(name)} has no parameter {shown(parameter)}; {remedy}"
            document.complain((*loc, parameter), sentence, of_key=True)
        if "via" not in mapping or "via" in params:
            columns = {parameter: mapping.get(parameter, parameter) for parameter in params}
            return _BustDraft(name, draft.target, columns, None, {})
        return self._via(document, loc, name, params, mapping)

    def _via(
        self, document: Document, loc: Loc, name: str, params: Sequence[str], mapping: Mapping[str, str]
    ) -> _BustDraft | None:
        query = _query(document, (*loc, "via"), mapping["via"])
        given = {parameter: column for parameter, column in mapping.items() if parameter != "via"}
        if not set(params) - given.keys():
            sentence = f"all parameters of cache {shown(name)} are given, so its query has none to give; remove `via`"
            document.complain((*loc, "via"), sentence, of_key=True)
        if query is None:
            return None
        read = (*query.columns, *given.values())
        parts = [part for column in read for part in (Param(column), b"\0")][:-1]
        return _BustDraft(name, Template.of(parts), {column: column for column in read}, query, given)

    def _check_test(self, document: Document, loc: Loc, test: TestEntry) -> bool:
        """Tell what no run of the test could be right with."""
        change, told = test.change, len(document.problems)
        if not any(rule.entry.table == change.table for rule in self._rules) and self._every_file:
            remedy = nearest(str(change.table), [str(rule.entry.table) for rule in self._rules], "write a rule for it")
            document.complain((*loc, "change", "table"), f"no rule names the table {change.table}; {remedy}")
        wanted = {"insert": {"new"}, "update": {"old", "new"}, "delete": {"old"}, "truncate": set()}[change.op]
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
        return len(document.problems) == told


_A_CHANGE = {"insert": "an insert", "update": "an update", "delete": "a delete", "truncate": "a truncate"}


def _vars(documents: Sequence[Document], env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with the variables of all files before it; each may name the environment."""
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
                template = _template(document, loc, text, env, sweepable=False)
                if template is not None and template.params:
                    document.complain(loc, "a variable can't hold a parameter; write it into the keys")
                elif template is not None:
                    found[name] = template.prefix.decode()
    return {**env, **found}


def _query(document: Document, loc: Loc, text: str) -> Query | None:
    """Read a `via` query: one SELECT whose `{column}` are bound, never pasted."""
    told = len(document.problems)
    if not _SELECT.match(text):
        document.complain(loc, "a `via` query must be one SELECT; write `SELECT column AS parameter FROM …`")
    parts: list[str | Param] = []
    quoted = ""
    for token in _VIA_TOKEN.finditer(text):
        if token["column"] is not None:
            if quoted:
                sentence = "a column in quotes would be text of the query; take the quotes off, values are bound"
                document.complain_inside(loc, sentence, token.start())
            parts.append(Param(token["column"]))
            continue
        piece = token[0][0] if token["brace"] else token[0]
        if token["wrong"] or (piece == ";" and not quoted and text[token.end() :].strip()):
            what = "a query is one statement; remove the `;`" if piece == ";" else f"`{piece}` names no column"
            remedy = "" if piece == ";" else "; write `{column}`, or `{{` for the brace itself"
            document.complain_inside(loc, what + remedy, token.start())
        if piece in _QUOTES:
            quoted = "" if quoted == piece else quoted or piece
        parts.append("" if piece == ";" and not quoted else piece)
    if len(document.problems) > told:
        return None
    return Query(tuple(parts), tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Param))))


_SELECT = re.compile(r"\s*(SELECT|WITH)\b", re.IGNORECASE)
_VIA_TOKEN = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<column>[^{}\s]+)\}|(?P<wrong>[{}])|(?P<text>['\";]|[^{}'\";]+)")
_QUOTES = frozenset("'\"")


def _test(entry: TestEntry, place: Place) -> Test:
    change = entry.change
    return Test(
        entry.name,
        change.table,
        change.op,
        _as_text(change.old),
        _as_text(change.new),
        value_types(change.old, change.new),
        {cache: [_as_text(row) or {} for row in rows] for cache, rows in entry.via.items()},
        tuple(entry.busts),
        place,
    )


def _as_text(row: Mapping[str, Any] | None) -> Mapping[str, str | None] | None:
    """A row's values as PostgreSQL shows them."""
    return None if row is None else {column: value_text(value) for column, value in row.items()}


def value_text(value: str | float | bool | None) -> str | None:
    """Give a value of YAML or JSON as PostgreSQL shows it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    return repr(value)


def value_types(*rows: Mapping[str, Any] | None) -> dict[str, int]:
    """Give the pg_type OIDs (bool, int8, float8, text) of columns, as values of YAML or JSON speak for them."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for column, value in (row or {}).items():
            found.setdefault(column, set()).update(() if value is None else [type(value)])
    return {column: _OIDS.get(frozenset(types), _TEXT_OID) for column, types in found.items()}


_TEXT_OID = 25
_OIDS = {
    frozenset({bool}): 16,
    frozenset({int}): 20,
    frozenset({float}): 701,
    frozenset({int, float}): 701,
}


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
        digest=_digest(
            _canonical_parts(key),
            version and _canonical_parts(version),
            sorted(busts, key=json.dumps),
            *(["pairs"] if entry.bump_over else []),
        ),
        bump_over=entry.bump_over,
        again_after=entry.again_after,
        negative_ttl=entry.negative_ttl,
        stale_for=entry.stale_for,
        max_keys_hint=entry.max_keys_hint,
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
            Bust(caches[bust.cache], bust.template, bust.columns, bust.query, bust.given) for bust in draft.busts
        ),
        place=draft.place,
        when=entry.when,
        when_place=draft.when_place,
        debounce=entry.debounce,
    )


def _declared(documents: Sequence[Document]) -> set[str]:
    """The names of all caches, also of those that are wrong; a cache or rule whose name is taken is a mistake."""
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
    """What the file defines: a cache at its name, which is a key; a rule at the value of its name."""
    for loc, _ in entries(document, "caches"):
        yield "cache", str(loc[1]), loc
    for loc, rule in entries(document, "rules"):
        if isinstance(rule, dict) and isinstance(rule.get("name"), str):
            yield "rule", rule["name"], (*loc, "name")


def _check_cache(draft: _CacheDraft) -> None:
    document, loc, entry, key, version, whole = draft
    if version is not None and "version" in version.params:
        document.complain((*loc, "version"), "a `version` may not hold `{version}` itself; remove the parameter")
    if entry.version is not None and key is not None and "version" not in key.params:
        sentence = "the cache has a `version` but its key lacks `{version}`; put it there, or remove `version`"
        document.complain((*loc, "key"), sentence)
    if not whole:
        return  # a field that seems to be missing may be one that is wrong
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
    if entry.bump_over is not None and key is not None and _filters_version(key):
        sentence = "with `bump_over`, the version stands in the key as it is; take the filter off `{version}`"
        document.complain((*loc, "key"), sentence)
    if entry.again_after is not None and entry.again_after > LONGEST_AGAIN:
        sentence = "`again_after` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
        document.complain((*loc, "again_after"), sentence)
    if entry.ttl is None and entry.jitter is not None:
        document.complain((*loc, "jitter"), "`jitter` needs a `ttl`; remove it, or add one", of_key=True)


def _filters_version(key: Template) -> bool:
    return any(part.filters for part in key.parts if isinstance(part, Param) and part.name == "version")


def _template(
    document: Document, loc: Loc, text: str | None, env: Mapping[str, str], *, sweepable: bool = True
) -> Template | None:
    if text is None:
        return None
    try:
        template = Template.parse(text, env)
    except TemplateError as error:
        document.complain_inside(loc, str(error), error.offset)
        return None
    if sweepable and template.glob() == b"*":
        document.complain(loc, "without literal text, a sweep of this would empty all of Redis; begin it with a prefix")
        return None
    return template


def _check_same_keys(caches: Mapping[str, _CacheDraft]) -> None:
    first: dict[tuple[bytes | Param, ...], str] = {}
    for name, draft in caches.items():
        if draft.key is not None and first.setdefault(draft.key.parts, name) != name:
            other = first[draft.key.parts]
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


def _check_condition(document: Document, loc: Loc, rule: RuleEntry) -> None:
    if rule.when is not None:
        try:
            Condition(rule.when)
        except ConditionError as error:
            document.complain_inside((*loc, "when"), str(error), error.offset)


def _check_debounce(document: Document, loc: Loc, rule: RuleEntry) -> None:
    if rule.debounce is not None and rule.debounce > LONGEST_AGAIN:
        sentence = "`debounce` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
        document.complain((*loc, "debounce"), sentence)


def _canonical(rule: RuleEntry, bust: _BustDraft) -> list[Any]:
    """How a rule busts a cache, without the rule's name: a rule that is only renamed busts as before."""
    columns = sorted(set(rule.columns or ()))
    canonical = [
        rule.table,
        sorted(rule.on),
        columns,
        rule.old_row,
        sorted(rule.immutable),
        sorted(bust.columns.items()),
    ]
    # What later versions of the format brought is left out where it is not used: their caches need not be swept.
    more = {
        "when": rule.when,
        "via": bust.query
        and ["".join(part if isinstance(part, str) else f"{{{part.name}}}" for part in bust.query.parts)],
        "given": sorted(bust.given.items()),
    }
    used = {name: value for name, value in more.items() if value}
    return [*canonical, used] if used else canonical


def _canonical_parts(template: Template) -> list[Any]:
    return [part.decode() if isinstance(part, bytes) else [part.name, *part.filters] for part in template.parts]


def _digest(*canonical: Any) -> str:
    return sha256(json.dumps(canonical).encode()).hexdigest()[:16]
