"""Makes one family of those that differ in one of a column's few values: `orders:7:paid` and `orders:7:open`. Pure.

The rule that holds here: the words are values of one column of a table that the keys name, and there are two or more.
A single such word stays a literal, since nothing says that the key would be another one for another value.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from cdc_invalidator.discovery.families import SAMPLES, Family, Kind, Parameter
from cdc_invalidator.discovery.schema import TableInfo
from cdc_invalidator.discovery.words import words

_SIGNS = ":/|.{}()[]<>#,;=&?@-_"


def fold(families: Sequence[Family], schema: Sequence[TableInfo]) -> tuple[Family, ...]:
    """Return the families, the largest first, with such as differ in one value made one.

    Args:
        families: as `families.group` returns them.
        schema: the tables.
    """
    tables: dict[tuple[str, ...], list[TableInfo]] = defaultdict(list)
    for info in schema:
        if any(column.values for column in info.columns):
            for name in filter(None, {info.words, info.words[1:]}):
                tables[name].append(info)
    alike: dict[tuple[str, tuple[str, str]], dict[int, tuple[int, int, str]]] = defaultdict(dict)
    for number, family in enumerate(families):
        for shape, column, place in _places(family, tables):
            alike[shape, column].setdefault(number, place)
    folded: dict[int, Family] = {}
    gone: set[int] = set()
    for group in sorted(alike.values(), key=len, reverse=True):
        left = [number for number in group if number not in gone]
        if len({group[number][2] for number in left}) > 1:
            folded[left[0]] = _folded([(families[number], group[number]) for number in left])
            gone.update(left)
    kept = [family for number, family in enumerate(families) if number not in gone]
    return tuple(sorted([*kept, *folded.values()], key=lambda family: (-family.keys, family.shape)))


def _places(
    family: Family, tables: Mapping[tuple[str, ...], Sequence[TableInfo]]
) -> Iterator[tuple[str, tuple[str, str], tuple[int, int, str]]]:
    """Yield the words of a family that are values: its shape without it, the column, and where the word stands."""
    literals = [part for part in family.parts if isinstance(part, str)]
    said = {words(chunk) for literal in literals for chunk in literal.replace("/", ":").split(":")}
    for info in {info.table: info for name in said for info in tables.get(name, ())}.values():
        for column in info.columns:
            for value in column.values:
                for at, part in enumerate(family.parts):
                    begin = part.find(value) if isinstance(part, str) and value else -1
                    if isinstance(part, str) and begin >= 0 and _alone(part, begin, value):
                        shape = (
                            *family.parts[:at],
                            part[:begin],
                            None,
                            part[begin + len(value) :],
                            *family.parts[at + 1 :],
                        )
                        marked = "".join(
                            "\0" if isinstance(each, Parameter) else each or "\1" for each in shape if each != ""
                        )
                        yield marked, (str(info.table), column.name), (at, begin, value)


def _alone(literal: str, begin: int, value: str) -> bool:
    """Whether a value is a whole word, so that what stands beside it is a separator, or the end."""
    return literal[:begin][-1:] in _SIGNS and literal[begin + len(value) :][:1] in _SIGNS


def _folded(same: Sequence[tuple[Family, tuple[int, int, str]]]) -> Family:
    first, (at, begin, value) = same[0]
    literal = first.parts[at]
    assert isinstance(literal, str)
    values = tuple(sorted({place[2] for _, place in same}))
    parts: list[str | Parameter] = [*first.parts[:at], literal[:begin], Parameter(Kind.TEXT, values)]
    parts += [literal[begin + len(value) :], *first.parts[at + 1 :]]
    number = sum(isinstance(part, Parameter) for part in first.parts[:at])
    # Of the other parameters, values of all of them.
    others = [_mixed([family.parameters[each] for family, _ in same]) for each in range(len(first.parameters))]
    given = iter([*others[:number], Parameter(Kind.TEXT, values), *others[number:]])
    whole = tuple(next(given) if isinstance(part, Parameter) else part for part in parts if part != "")
    types: Counter[str] = Counter()
    for family, _ in same:
        types.update(dict(family.types))
    ttls = [each for family, _ in same if family.ttls is not None for each in family.ttls]
    rows = [_with(row, number, place[2]) for family, place in same for row in _rows(family)]
    step = max(1, len(rows) // SAMPLES)
    return Family(
        whole,
        sum(family.keys for family, _ in same),
        tuple(types.most_common()),
        (min(ttls), max(ttls)) if ttls else None,
        sum(family.endless for family, _ in same),
        tuple(rows[::step][:SAMPLES]),
    )


def _rows(family: Family) -> Sequence[tuple[str, ...]]:
    """Return the values of all parameters of some keys; those of a single parameter stand for themselves."""
    return family.rows or [(value,) for parameter in family.parameters[:1] for value in parameter.values]


def _with(row: tuple[str, ...], number: int, value: str) -> tuple[str, ...]:
    return (*row[:number], value, *row[number:])


def _mixed(parameters: Sequence[Parameter]) -> Parameter:
    kinds = {parameter.kind for parameter in parameters}
    every = list(dict.fromkeys(value for parameter in parameters for value in parameter.values))
    step = max(1, len(every) // SAMPLES)
    return Parameter(kinds.pop() if len(kinds) == 1 else Kind.TEXT, tuple(every[::step][:SAMPLES]))
