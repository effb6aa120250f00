"""The tables of a database as far as `matching` asks, and which questions it asks about values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cdc_invalidator.discovery.words import words
from cdc_invalidator.rules.table import Table


class Category(StrEnum):
    """What the values of a column look like in a key."""

    NUMBER = "number"
    UUID = "uuid"
    TEXT = "text"
    OTHER = "other"


class Column(NamedTuple):
    """A column; ``askable``: values can be looked up at little cost, and our role may.

    ``values``: all values, where the catalogs say that there are only a few; else empty.
    """

    name: str
    category: Category
    askable: bool
    values: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table; ``key``: its primary key; ``references``: the tables that its columns refer to by a foreign key.

    ``indexes``: the first two columns of each index that has so many.
    """

    table: Table
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    references: Mapping[str, Table]
    indexes: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The words of its name."""
        return words(self.table.name)


class Question(NamedTuple):
    """Which of the sampled values of a parameter does the column hold?"""

    family: int
    parameter: int
    table: Table
    column: str


class PairQuestion(NamedTuple):
    """Which of the sampled pairs of values of two parameters does a row of the table hold in two columns?"""

    family: int
    parameters: tuple[int, int]
    table: Table
    columns: tuple[str, str]


Shares = Mapping[Question | PairQuestion, float]
"""Of the values that were looked up, the part that is there; 0 to 1. What could not be asked is missing."""
