"""A checked rule set: caches, rules and tests, as the rest of the program works with them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cdc_invalidator.rules.packed import pair
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param, Template
from cdc_invalidator.rules.wording import Place

DEFAULT_VERSION_TTL = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class Cache:
    """A family of keys; times are in ms.

    ``digest`` changes with the keys and how they are busted: with the templates (after the environment) and the rules.
    It does not change with times, names of rules, order or comments. ``given``: the keys are the application's, and
    nobody may change them. ``publish``: the channel on which busts are told.
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
    given: bool = False
    publish: Template | None = None
    place: Place = field(default=Place(""), compare=False)

    @property
    def sweep_template(self) -> Template:
        """The keys that a sweep searches for: those of the version if the cache has one, else its own."""
        return self.version or self.key

    @property
    def bust_template(self) -> Template:
        """The keys that a bust names: its own or those of the version; with ``bump_over``, a `packed.Pair` of both."""
        return self.sweep_template if self.bump_over is None or self.version is None else pair(self.version, self.key)

    @property
    def lacks_hash_tag(self) -> bool:
        """Whether a cluster may keep a key and its lock in different hash slots, where a reader's fill fails.

        Keys that no bust deletes need no hash tag: with a version and without ``bump_over``, busts only bump the
        version, and readers name the lock so that it lies in the key's hash slot.
        """
        return (self.version is None or self.bump_over is not None) and not self.key.hash_tag

    @property
    def one_hash_slot(self) -> bool:
        """Whether a cluster keeps a key and its version in one hash slot, so that one script may read both."""
        return self.version is None or self.key.hash_tag == self.version.hash_tag != ()


@dataclass(frozen=True, slots=True)
class Query:
    """A query whose rows are parameters: SQL with columns of the changed row in between.

    ``parts``: SQL (text) and columns (`Param`) in order; ``columns``: the names of the columns, each once.
    ``ignores_empty``: where it gives no key for an old row, nothing is stale; ``on_empty``: as the file says it.
    ``place``: of its text in the rule file.
    """

    parts: tuple[str | Param, ...]
    columns: tuple[str, ...]
    ignores_empty: bool = False
    on_empty: str | None = None
    place: Place = field(default=Place(""), compare=False)

    @property
    def text(self) -> str:
        """The query as it is written, but for doubled braces."""
        return "".join(part if isinstance(part, str) else f"{{{part.name}}}" for part in self.parts)


class Expression(NamedTuple):
    """A condition as the file has it: its ``field`` (``when`` or ``where``), its text, and where that stands."""

    field: str
    source: str
    place: Place


@dataclass(frozen=True, slots=True)
class Bust:
    """A cache that a rule busts.

    ``template``: rendered for a changed row; ``columns`` names the column of each of its parameters. Without a
    ``query`` the result is the key to bust. With one, it is the query's arguments: the values of `Query.columns`, then
    of ``given`` (parameter: column), as `packed.Question` packs them. The query's rows are the other parameters.
    ``where``: which images of a row it is for, beside the rule's own.
    ``sweep``: any row busts the whole cache, and no column is needed.
    """

    cache: Cache
    template: Template = field(compare=False)
    columns: Mapping[str, str] = field(hash=False)
    query: Query | None = None
    given: Mapping[str, str] = field(default_factory=dict, hash=False)
    where: str | None = None
    where_place: Place = field(default=Place(""), compare=False)
    sweep: bool = False

    @property
    def mapped(self) -> Mapping[str, str]:
        """The column of each parameter that a column of the changed row gives; a query gives the others."""
        return self.columns if self.query is None else self.given


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
    where: str | None = None
    where_place: Place = field(default=Place(""), compare=False)

    def wheres(self, bust: Bust) -> tuple[Expression, ...]:
        """Return the conditions that an image of a row must satisfy to give a key of one of the rule's busts."""
        written = ((self.where, self.where_place), (bust.where, bust.where_place))
        return tuple(Expression("where", source, place) for source, place in written if source is not None)

    def where_of(self, bust: Bust) -> str | None:
        """Return the conditions of `wheres` as one, if there are any."""
        sources = [each.source for each in self.wheres(bust)]
        if len(sources) > 1:
            return " && ".join(f"({source})" for source in sources)
        return sources[0] if sources else None

    @property
    def conditions(self) -> tuple[Expression, ...]:
        """All conditions of the rule and its busts, each once."""
        when = [] if self.when is None else [Expression("when", self.when, self.when_place)]
        return tuple(dict.fromkeys([*when, *(each for bust in self.busts for each in self.wheres(bust))]))

    @property
    def key_columns(self) -> frozenset[str]:
        """All columns that a key is made of."""
        return frozenset(column for bust in self.busts for column in bust.columns.values())


@dataclass(frozen=True, slots=True)
class Test:
    """A change and the busts that it must lead to; values are text as PostgreSQL shows it, or NULL.

    ``types``: by column, the pg_type OID, judged by the file's values. ``via``: by cache, the rows of its query.
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
    """All rule files together; ``digest`` changes with a cache's digest and with the names of caches and rules.

    ``fingerprint``: a digest of the files' names and texts, see `load.fingerprint`.
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

    @property
    def asks(self) -> bool:
        """Whether a bust has a query."""
        return any(bust.query is not None for rule in self.rules for bust in rule.busts)

    @property
    def kept(self) -> dict[str, Cache]:
        """The caches that the daemon keeps right: all but those that are ``ttl_only``, which it never touches."""
        return {name: cache for name, cache in self.caches.items() if not cache.ttl_only}
