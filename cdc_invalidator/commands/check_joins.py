"""Checks what `via` queries read: is every row that they join watched, and do they find keys only through each other?

The rule that holds here: a query asks the present. A key that it misses because a joined row has changed must be named
by that row's own rule. So each table that it reads needs a rule for the same cache. And among the tables whose rules
need queries, none may need another one that needs it: where rows of both change at once, each query finds the other
one's new row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.rules.model import Bust, Cache, Rule, RuleSet
from cdc_invalidator.rules.table import Table


@dataclass(frozen=True, slots=True)
class Reads:
    """The tables that a bust's query reads; of a partition, the tables above it stand behind it."""

    rule: Rule
    bust: Bust
    tables: Sequence[Sequence[Table]]


def of_joins(rules: RuleSet, reads: Sequence[Reads]) -> Iterator[Finding]:
    """Yield findings on tables that queries read.

    Args:
        rules: the rule set.
        reads: what its queries read, as far as they could be explained.
    """
    for each in reads:
        yield from _unwatched(rules, each)
    for cache in rules.caches.values():
        yield from _circles(rules, cache, [each for each in reads if each.bust.cache.name == cache.name])


def _busts(rules: RuleSet, cache: Cache) -> Iterator[tuple[Rule, Bust]]:
    return ((rule, bust) for rule in rules.rules for bust in rule.busts if bust.cache.name == cache.name)


def _unwatched(rules: RuleSet, reads: Reads) -> Iterator[Finding]:
    rule, bust = reads.rule, reads.bust
    assert bust.query is not None
    watched = {each.table for each, _ in _busts(rules, bust.cache) if "delete" in each.on}
    gone = "nothing is busted" if bust.query.ignores_empty else "all that it may be is swept"
    for table in dict.fromkeys(names[-1] for names in reads.tables if watched.isdisjoint(names)):
        yield Finding(
            Severity.WARNING,
            "query_reads_unwatched",
            bust.query.place,
            f"the `via` query of rule {rule.name} reads {table}, and no rule busts cache {bust.cache.name} when a row "
            "of it is deleted: where such a row changes, or goes together with the one that asks, the query no longer "
            f"finds the key; then an entry stays stale, or {gone}; write a rule for {table} that busts "
            f"{bust.cache.name}, also for its old rows.",
        )


def _circles(rules: RuleSet, cache: Cache, reads: Iterable[Reads]) -> Iterator[Finding]:
    """Yield a finding for tables whose rules find the keys of a cache only through each other's rows."""
    named = {rule.table for rule, bust in _busts(rules, cache) if bust.query is None}
    asks: dict[Table, set[Table]] = {}
    for each in reads:
        found = {name for names in each.tables for name in names} - named
        asks.setdefault(each.rule.table, set()).update(found)
    told: set[Table] = set()
    for table in asks:
        circle = sorted(other for other in _reached(asks, table) if table in _reached(asks, other))
        if not circle or told & set(circle):
            continue
        told.update(circle)
        of_circle = [(rule, bust) for rule, bust in _busts(rules, cache) if rule.table in circle]
        if _finds_all(of_circle):
            continue
        first = next(bust.query for _, bust in of_circle if bust.query is not None)
        tables = " and ".join(map(str, circle))
        names = " and ".join(sorted({rule.name for rule, _ in of_circle}))
        yield Finding(
            Severity.WARNING,
            "queries_ask_each_other",
            first.place,
            f"{names} find the keys of cache {cache.name} only through rows of {tables}: where rows that belong "
            "together are updated at once, or one is updated and another one deleted, nobody names the old key; name "
            "the columns under `immutable` if they never change, or let one of these tables sweep: "
            f"`{cache.name}: {{sweep: true}}`; where they are deleted at once, a rule without `on_empty` finds no "
            "answer and sweeps.",
        )


def _reached(asks: dict[Table, set[Table]], start: Table) -> set[Table]:
    """Return the tables that are asked for a table's rows, directly or through others."""
    reached: set[Table] = set()
    left = [start]
    while left:
        found = asks.get(left.pop(), set()) - reached
        reached |= found
        left += found
    return reached


def _finds_all(of_circle: Sequence[tuple[Rule, Bust]]) -> bool:
    """Whether the rows of at most one table of a circle move, and its rules sweep where they have no answer.

    Its old row asks for rows that are as they were, or gone; if gone, there is no answer, and the cache is swept.
    Where none moves, some rule must still sweep when rows are deleted together.
    """
    moving = [(rule, bust) for rule, bust in of_circle if not _never_moves(rule, bust)]
    sweeping = [bust for _, bust in of_circle if bust.query is not None and not bust.query.ignores_empty]
    return (
        bool(sweeping) and len({rule.table for rule, _ in moving}) <= 1 and all(bust in sweeping for _, bust in moving)
    )


def _never_moves(rule: Rule, bust: Bust) -> bool:
    return "update" not in rule.on or set(bust.columns.values()) <= rule.immutable
