"""What texts the columns of a database put into keys: numbers, UUIDs, or anything. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.model import Cache, RuleSet
from cdc_invalidator.rules.overlap import Texts
from cdc_invalidator.rules.table import Table

if TYPE_CHECKING:
    # `check --offline` does without the driver.
    from cdc_invalidator.postgres.queries import ColumnInfo

_TEXTS: Mapping[int, Texts] = {
    **dict.fromkeys((20, 21, 23, 26), overlap.NUMBER),
    16: overlap.FLAG,
    2950: overlap.UUID,
}


def texts(oid: int, category: str = "S") -> Texts:
    """Return the texts of a type, by its OID and category."""
    return _TEXTS.get(oid, overlap.TEXT if category == "S" else overlap.PART)


@dataclass(slots=True)
class Columns:
    """What a database knows of the parameters' values; empty where none was asked.

    ``values``: by cache and parameter, the texts that there can be.
    """

    values: dict[str, dict[str, Texts]] = field(default_factory=dict)

    def of(self, cache: Cache) -> Mapping[str, Texts]:
        """Return what is known of a cache's parameters."""
        return self.values.get(cache.name, {})

    def learn(self, cache: Cache, parameter: str, values: Texts) -> None:
        """Store what values a parameter can have; if rules disagree, any text."""
        known = self.values.setdefault(cache.name, {})
        known[parameter] = values if known.get(parameter, values) == values else overlap.TEXT


def certain(rules: RuleSet, found: Mapping[Table, Sequence[ColumnInfo]]) -> Columns:
    """Return what the types of columns say for certain; a parameter that a query gives may be any text.

    Args:
        rules: the rule set.
        found: the columns of its tables.
    """
    known = Columns()
    for rule in rules.rules:
        columns = {column.name: column for column in found.get(rule.table, ())}
        for bust in rule.busts:
            for parameter in bust.cache.key.params:
                column = columns.get(bust.mapped.get(parameter, ""))
                values = overlap.TEXT if column is None else texts(column.base_oid, column.base_category)
                known.learn(bust.cache, parameter, overlap.TEXT if values.free else values)
    return known
