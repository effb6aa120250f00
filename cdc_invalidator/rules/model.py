"""A checked rule set: caches, rules and tests, as the rest of the program works with them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cdc_invalidator.rules.packed import pair
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param, Template
from cdc_invalidator.rules.wording import Place

DEFAULT_VERSION_TTL = 30 * 86_400_000


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
    def sweep_template(self) -> Template:
        """What a sweep searches for: the version's keys where the cache has a version, else its own."""
        return self.version or self.key

    @property
    def bust_template(self) -> Template:
        """What a bust names: a key, or a version's key; with ``bump_over`` both in one, see `packed.Pair`."""
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
    for, as `packed.join_arguments` puts them: the query's rows give the parameters that are not in ``given``.
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

    ``fingerprint``: of the files' names and texts, as `load.fingerprint` gives it.
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
