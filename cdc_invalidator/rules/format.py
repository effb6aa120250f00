"""The format of rule files: its fields, as models, and their errors in our own words.

A mistake in one entry hides none in another: `sound` returns the entries that can be checked further.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    StringConstraints,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from cdc_invalidator.rules.document import Document, Loc
from cdc_invalidator.rules.duration import read_duration
from cdc_invalidator.rules.table import Table, read_table
from cdc_invalidator.rules.values import OPS, Op
from cdc_invalidator.rules.wording import nearest, shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

LONGEST_CONDITION = 4096


def _format_version(value: object) -> object:
    if value != 1 or type(value) is not int:
        raise ValueError(f"the format {shown(str(value))} is not known; write `version: 1`, without quotes")
    return value


def _scalar_value(value: object) -> object:
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError("a column's value is text, a number, `true`, `false` or `null`; write one of these")
    return value


def _bust_kind(value: object) -> str | None:
    return "<name>" if isinstance(value, str) else "<mapping>" if isinstance(value, dict) else None


def _bust_mapping(value: object) -> object:
    if not isinstance(value, dict) or "sweep" not in value:
        return value
    if value["sweep"] is not True:
        raise ValueError("`sweep` stands for the whole cache; write `sweep: true`, or remove it")
    # Of a mapping, all values are texts.
    return {**value, "sweep": "true"}


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Column = Annotated[str, Field(min_length=1)]
Duration = Annotated[
    int, PlainValidator(read_duration), WithJsonSchema({"type": "string", "pattern": r"^[0-9]{1,10}(ms|s|m|h|d)$"})
]
TableName = Annotated[
    Table, PlainValidator(read_table), WithJsonSchema({"type": "string", "examples": ["public.users"]})
]
BustMapping = Annotated[
    dict[str, Column],
    BeforeValidator(_bust_mapping),
    Field(
        description="`parameter: column` where the names differ; `via: SELECT …` for a query whose rows give "
        "parameters, with `{column}` for the changed row's; `on_empty: ignore` beside it if nothing is stale where it "
        "gives nothing for an old row; `where`, as that of the rule, for this cache alone; `sweep: true` for the whole "
        "cache.",
        json_schema_extra={"properties": {"sweep": {"const": True}}},
    ),
]
MappedBust = Annotated[dict[str, BustMapping], Field(min_length=1, max_length=1)]
BustEntry = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[MappedBust, Tag("<mapping>")], Discriminator(_bust_kind)
]
VarName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
Scalar = Annotated[
    Any,
    PlainValidator(_scalar_value),
    WithJsonSchema(
        {
            "type": ["string", "number", "boolean", "null"],
            "description": "A column's value; text stands for any type, as PostgreSQL shows it.",
        }
    ),
]


class _Entry(BaseModel):
    """What all parts of the format share: no other fields, no conversions, nothing empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: object) -> object:
        if value is None:
            raise ValueError  # _sentence has the words for everything empty
        return value


class CacheEntry(_Entry):
    """One family of keys."""

    key: str = Field(
        description="Template of the keys: `shop:${APP_ENV:-prod}:user:{id}`. A `*` at its end stands for the rest of "
        "the keys; a bust then searches for them."
    )
    version: str | None = Field(None, description="Template of the version counters' keys; a bust bumps the counter.")
    version_ttl: Duration | None = Field(None, description="How long a version counter lives; 30d by default.")
    ttl: Duration | None = Field(None, description="How long readers store a value.")
    jitter: Duration | None = Field(None, description="Up to how much is added to the ttl, at random.")
    ttl_only: bool = Field(default=False, description="A decision written down: nothing busts or sweeps this cache.")
    bump_over: int | None = Field(
        None,
        ge=1,
        description="Of a cache with a version: single keys are deleted until a transaction touches more than so many, "
        "then the version is bumped once.",
    )
    again_after: Duration | None = Field(
        None, description="Bust a second time, that long after the first: for readers without the fill contract."
    )
    negative_ttl: Duration | None = Field(None, description="How long readers store that there is nothing.")
    stale_for: Duration | None = Field(
        None,
        description="How long readers may still show the old value after a bust, while somebody loads the new one.",
    )
    max_keys_hint: int | None = Field(None, ge=1, description="How many keys there are at most, roughly.")
    given: bool = Field(
        default=False,
        description="The keys are the application's, and nobody may change them: `check` asks for no other.",
    )
    publish: str | None = Field(
        None, description="Template of the Redis channel on which each bust is told, once Redis has acknowledged it."
    )


class RuleEntry(_Entry):
    """Which changes of a table bust which caches."""

    name: Name = Field(description="Unique in all files; a label of metrics and events.")
    table: TableName = Field(description="`schema.table`; a partitioned table stands for its partitions.")
    on: list[Op] = Field(list(OPS), min_length=1, description="Which changes; all four by default.")
    columns: list[Column] | None = Field(
        None, min_length=1, description="An UPDATE that changes none of these busts nothing."
    )
    when: str | None = Field(
        None,
        min_length=1,
        max_length=LONGEST_CONDITION,
        description="A CEL expression over `op`, `old` and `new`: the rule fires when it is true, or fails.",
    )
    where: str | None = Field(
        None,
        min_length=1,
        max_length=LONGEST_CONDITION,
        description="A CEL expression over `row`: the old row and the new row each give keys only where it is true, or "
        "fails.",
    )
    debounce: Duration | None = Field(
        None, description="At most one bust of a key in that time; the last one always happens."
    )
    old_row: Literal["require", "sweep", "ignore"] = Field(
        "require", description="What to do when the replica identity does not carry a key's columns."
    )
    immutable: list[Column] = Field([], description="Columns that no UPDATE ever changes.")
    bust: list[BustEntry] = Field(
        min_length=1, description="Caches, or `cache: {parameter: column}` where the names differ."
    )


class ChangeEntry(_Entry):
    """One change of one row, or of a table."""

    table: TableName = Field(description="`schema.table`; for a partition, the table that the rules name.")
    op: Op = Field(description="insert, update, delete or truncate.")
    old: dict[str, Scalar] | None = Field(
        None, description="The row before it, as far as the replica identity carries it; columns left out are unknown."
    )
    new: dict[str, Scalar] | None = Field(None, description="The row after it; columns left out are NULL.")


class TestEntry(_Entry):
    """A change and the busts that it must give, no more and no fewer."""

    __test__ = False  # pytest

    name: str = Field(min_length=1, description="What it shows, as a sentence.")
    change: ChangeEntry = Field(description="What is committed.")
    via: dict[Name, list[dict[str, Scalar]]] = Field(
        {}, description="By cache, the rows that its query gives; `test --live` asks the database instead."
    )
    busts: list[str] = Field(
        description="`KEY` for a deleted one, `PREFIX*` for a search, `bump KEY` for a version, `sweep CACHE` for a "
        "whole cache."
    )


class DefaultsEntry(_Entry):
    """What the caches and rules of this file have where they say nothing themselves."""

    ttl: Duration | None = Field(None, description="`ttl` of caches.")
    jitter: Duration | None = Field(None, description="`jitter` of caches that have a `ttl`.")
    negative_ttl: Duration | None = Field(None, description="`negative_ttl` of caches.")
    stale_for: Duration | None = Field(None, description="`stale_for` of caches that are busted.")
    again_after: Duration | None = Field(None, description="`again_after` of caches whose keys are deleted.")
    given: bool | None = Field(None, description="`given` of caches.")
    old_row: Literal["require", "sweep", "ignore"] | None = Field(None, description="`old_row` of rules.")


class RuleFile(_Entry):
    """A rule file of cdc-invalidator."""

    version: Annotated[Literal[1], BeforeValidator(_format_version)] = Field(description="The version of the format.")
    vars: dict[VarName, str] = Field(
        {}, description="Texts for templates, as `${name}`; they go before the environment, and may name it."
    )
    defaults: DefaultsEntry | None = Field(
        None, description="Fields of this file's caches and rules that don't have them."
    )
    caches: dict[Name, CacheEntry] = Field({}, description="Caches by name.")
    rules: list[RuleEntry] = Field([], description="Rules, in any order.")
    tests: list[TestEntry] = Field([], description="Changes and what they must bust; `cdc-invalidator test` runs them.")


# The models' errors in our own words.

# By section of the file: what an entry is called, and its model.
_SECTIONS: dict[int | str, tuple[str, type[BaseModel]]] = {
    "": ("a rule file", RuleFile),
    "defaults": ("`defaults`", DefaultsEntry),
    "caches": ("a cache", CacheEntry),
    "rules": ("a rule", RuleEntry),
    "tests": ("a test", TestEntry),
    "change": ("a change", ChangeEntry),
}

# An entry is still checked against others when only fields beside these are wrong; stand-ins take a rule's place.
_VITAL = {
    "caches": frozenset({"key", "version"}),
    "rules": frozenset({"bust"}),
    "tests": frozenset({"change", "busts"}),
}
_STAND_INS = {"caches": {}, "rules": {"name": "stand-in", "table": "stand.in"}, "tests": {"name": "stand-in"}}

_EMPTY = "{what} is empty; give it a value or remove it"
_SENTENCES = {
    "missing": "{owner} lacks {field}; add it",
    "string_type": "{what} must be text; put it in quotes if it is one word, number or sign",
    "string_too_short": "{what} must not be empty; give it a text or remove it",
    "string_pattern_mismatch": (
        "{value} is not a name; use 1 to 63 of A-Z a-z 0-9 _ . -, and begin with a letter or a digit"
    ),
    "string_too_long": "{what} is too long; write it shorter",
    "int_type": "{what} must be a whole number, without quotes",
    "greater_than_equal": "{what} must be at least 1",
    "bool_type": "{what} must be `true` or `false`",
    "list_type": "{what} must be a list; write `[one, two]`, or one `- ` on each line",
    "dict_type": "{what} must be a mapping; write `name: value`",
    "model_type": "{what} must be a mapping; write `name: value` on each line",
    "too_short": "{what} must not be empty; write at least one entry",
    "too_long": "{what} may name one cache only; write a `- ` for each",
    "union_tag_not_found": "{what} must be the name of a cache, or `name: {{parameter: column}}`",
}


def check_format(document: Document) -> None:
    """Note in a document what is wrong with it by the models."""
    try:
        RuleFile.model_validate(document.value)
    except ValidationError as wrong:
        for error in wrong.errors(include_url=False):
            # Point to the key of what is superfluous, ill-named or empty; of what is missing, to its owner's.
            of_key = error["type"] in {"extra_forbidden", "missing"} or error["loc"][-1:] == ("[key]",)
            document.complain(error["loc"], _sentence(error), of_key=of_key or error["input"] is None)


def _sentence(error: ErrorDetails) -> str:
    loc, kind, value = error["loc"], error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_field(loc)
    if value is None:
        return _EMPTY.format(what=_what(loc))
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{shown(str(value))} is not allowed here; {nearest(str(value), allowed)}"
    if kind == "string_pattern_mismatch" and loc[0] == "vars":
        return f"{shown(str(value))} is not a name; use 1 to 63 of A-Z a-z 0-9 _, and begin with no digit"
    sentence = _SENTENCES.get(kind, "{what} is wrong; look at the documentation of rule files")
    return sentence.format(what=_what(loc), owner=_what(loc[:-1]), field=_what(loc[-1:]), value=shown(str(value)))


def _what(loc: Loc) -> str:
    """Return what stands at a path: ``ttl``, an entry of ``on``, the file."""
    named = [part for part in loc if isinstance(part, str) and part not in {"<name>", "<mapping>", "[key]"}]
    if not named:
        return "the file"
    in_list = any(isinstance(part, int) for part in loc[loc.index(named[-1]) :])
    return f"an entry of {shown(named[-1])}" if in_list else shown(named[-1])


def _unknown_field(loc: Loc) -> str:
    name = str(loc[-1])
    noun, model = _SECTIONS["change" if "change" in loc[:-1] else loc[0] if len(loc) > 1 else ""]
    return f"{shown(name)} is not a field of {noun}; {nearest(name, model.model_fields)}"


def entries(document: Document, section: str) -> Iterator[tuple[Loc, Any]]:
    """Return the caches, rules or tests of a file as plain values, right or wrong."""
    found = document.value.get(section) if isinstance(document.value, dict) else None
    if section == "caches" and isinstance(found, dict):
        yield from (((section, name), entry) for name, entry in found.items())
    elif section != "caches" and isinstance(found, list):
        yield from (((section, number), entry) for number, entry in enumerate(found))


def defaults(document: Document) -> tuple[DefaultsEntry, frozenset[str]]:
    """Return the defaults of a file as far as they are right, and the names of those that are wrong."""
    given = document.value.get("defaults") if isinstance(document.value, dict) else None
    if not isinstance(given, dict):
        return DefaultsEntry.model_construct(), frozenset()
    try:
        return DefaultsEntry.model_validate(given), frozenset()
    except ValidationError as wrong:
        fields = frozenset(str(error["loc"][0]) for error in wrong.errors())
    right = {name: value for name, value in given.items() if name not in fields}
    return DefaultsEntry.model_validate(right), fields


def sound(document: Document, section: str, model: type[Model]) -> Iterator[tuple[Loc, Model, bool]]:
    """Return the entries that can be checked further, and whether they are right as a whole.

    `check_format` has noted the mistakes in the others; wrong fields of these are left out.
    """
    for loc, entry in entries(document, section):
        try:
            yield loc, model.model_validate(entry), True
        except ValidationError as wrong:
            fields = {part for error in wrong.errors() for part in error["loc"][:1]}
            if isinstance(entry, dict) and not fields & _VITAL[section]:
                rest = {name: value for name, value in entry.items() if name not in fields}
                yield loc, model.model_validate(_STAND_INS[section] | rest), False
