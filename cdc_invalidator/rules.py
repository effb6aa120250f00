"""Rule files: YAML to one checked set of caches and rules, or every mistake in them at once.

Text goes down in one straight line: YAML nodes (which know their places) → plain values → the models of the file format
→ checks across entries and files → the runtime objects that the rest of the program uses.

The rule that holds here: whatever a file holds, the result is a ``RuleSet`` or ``errors.WrongRules``. A mistake in one
entry hides none in another, and what follows only from a mistake that is already told is not told again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
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

from cdc_invalidator.errors import Problem, WrongRules
from cdc_invalidator.template import Param, Template, TemplateError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails

MAX_BYTES = 1 << 20
MAX_NODES = 200_000
MAX_DEPTH = 40
DEFAULT_VERSION_TTL = 30 * 86_400_000
LONGEST_AGAIN = 60_000


# ── What the rest of the program uses ────────────────────────────────────────────────────────────────────────────────


class Table(NamedTuple):
    """A table's name as PostgreSQL's catalogue has it: folded and unquoted. As text, it is ready for SQL."""

    schema: str
    name: str

    def __str__(self) -> str:
        return ".".join(part if _PLAIN_NAME.fullmatch(part) else '"' + part.replace('"', '""') + '"' for part in self)


class Place(NamedTuple):
    """Where something stands in a rule file; line and column count from 1."""

    file: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


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
    again_after: int | None = None

    @property
    def target(self) -> Template:
        """What a bust names: the version's keys where the cache has a version, else its own."""
        return self.version or self.key


@dataclass(frozen=True, slots=True)
class Bust:
    """A cache that a rule busts; ``columns`` gives the column of each parameter of the cache's target."""

    cache: Cache
    columns: Mapping[str, str] = field(hash=False)


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

    @property
    def key_columns(self) -> frozenset[str]:
        """All columns that a key is made of."""
        return frozenset(column for bust in self.busts for column in bust.columns.values())


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rule files together; ``digest`` changes with the digest of a cache and with the names of caches and rules."""

    caches: Mapping[str, Cache] = field(hash=False)
    rules: tuple[Rule, ...]
    digest: str

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that rules name, each once, in order of appearance."""
        return tuple(dict.fromkeys(rule.table for rule in self.rules))


def load(path: Path, env: Mapping[str, str]) -> RuleSet:
    """Read a rule file, or all ``*.yaml`` and ``*.yml`` directly in a directory, hidden ones left out.

    Raises:
        WrongRules: all mistakes of all files; what cannot be read is one at line 1, column 1.
    """
    problems: list[Problem] = []
    sources: list[tuple[str, str]] = []
    try:
        for file in _files(path):
            try:
                sources.append((str(file), _text(file)))
            except WrongRules as wrong:
                problems += wrong.problems
    except OSError as error:
        raise _wrong(
            Place(str(path)), f"this cannot be read ({error.strerror}); check CDC_RULES and its permissions"
        ) from error
    return _parse(sources, env, problems)


def parse(sources: Sequence[tuple[str, str]], env: Mapping[str, str]) -> RuleSet:
    """Make one rule set of pairs of file name and text.

    Raises:
        WrongRules: all mistakes of all files.
    """
    return _parse(sources, env, [])


def _parse(sources: Sequence[tuple[str, str]], env: Mapping[str, str], problems: list[Problem]) -> RuleSet:
    documents: list[_Document] = []
    for name, text in sources:
        try:
            documents.append(_read(name, text))
        except WrongRules as wrong:
            problems += wrong.problems
    for document in documents:
        _check_format(document)
    draft = _Draft(documents, env, every_file=not problems)
    problems += [problem for document in documents for problem in document.problems]
    if problems:
        # An alias brings the same mistake from the same place more than once.
        raise WrongRules(list(dict.fromkeys(problems)))
    return draft.rule_set()


# ── Files to text ────────────────────────────────────────────────────────────────────────────────────────────────────


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # A ConfigMap's mount is links to files in `..data`, itself a link: hidden names are not looked into.
    found = sorted(
        file for file in path.iterdir() if file.suffix in {".yaml", ".yml"} and not file.name.startswith(".")
    )
    if not found:
        raise _wrong(
            Place(str(path)), "no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
        )
    return found


def _text(file: Path) -> str:
    """The text of a file, of which no more is read than may be."""
    try:
        if file.exists() and not file.is_file():
            raise _wrong(
                Place(str(file)), "this is not a regular file; remove it, or rename it to end in something else"
            )
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _wrong(
            Place(str(file)), f"this file cannot be read ({reason}); check CDC_RULES and its permissions"
        ) from error
    if len(data) > MAX_BYTES:
        raise _too_large(str(file))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _wrong(Place(str(file)), f"byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _too_large(file: str) -> WrongRules:
    return _wrong(Place(file), f"the file is larger than {MAX_BYTES >> 20} MiB; split it")


def _wrong(place: Place, sentence: str) -> WrongRules:
    """A mistake after which no more can be read."""
    return WrongRules([Problem(*place, sentence)])


# ── Text to plain values, with places ────────────────────────────────────────────────────────────────────────────────

# The base loaders resolve nothing: each scalar stays text, and _scalar gives it its YAML 1.2 meaning.
_LOADER: Any = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

Loc = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True, eq=False)
class _Document:
    """One rule file: its nodes, the same as plain values, and the mistakes found so far."""

    name: str
    text: str
    root: yaml.Node
    value: Any = None
    problems: list[Problem] = field(default_factory=list)

    def find(self, loc: Loc) -> tuple[yaml.Node, yaml.Node]:
        """The key and the value at a path; a part that the file does not have (a union's tag) is passed over."""
        key = value = self.root
        for part in loc:
            pairs: Iterable[tuple[yaml.Node, yaml.Node]] = ()
            if isinstance(value, yaml.MappingNode):
                pairs = (pair for pair in value.value if pair[0].value == part)
            elif isinstance(value, yaml.SequenceNode) and isinstance(part, int):
                pairs = ((item, item) for item in value.value[part : part + 1])
            key, value = next(iter(pairs), (key, value))
        return key, value

    def place(self, loc: Loc, *, of_key: bool = False) -> Place:
        """Where the value at a path begins, or its key."""
        return _place(self.name, self.find(loc)[0 if of_key else 1].start_mark)

    def complain(self, loc: Loc, sentence: str, *, of_key: bool = False) -> None:
        """Note a mistake at a path."""
        self.problems.append(Problem(*self.place(loc, of_key=of_key), sentence))

    def complain_inside(self, loc: Loc, sentence: str, offset: int) -> None:
        """Note a mistake at an offset in a text; where escapes or lines shift it, at the text's beginning."""
        node = self.find(loc)[1]
        raw = self.text[node.start_mark.index : node.end_mark.index]
        shift = offset if raw == node.value else offset + 1 if raw[1:-1] == node.value else 0
        file, line, column = self.place(loc)
        self.problems.append(Problem(file, line, column + shift, sentence))

    def entries(self, section: str) -> Iterator[tuple[Loc, Any]]:
        """The caches or rules of the file as plain values, right or wrong."""
        found = self.value.get(section) if isinstance(self.value, dict) else None
        if section == "caches" and isinstance(found, dict):
            yield from (((section, name), entry) for name, entry in found.items())
        elif section == "rules" and isinstance(found, list):
            yield from (((section, number), entry) for number, entry in enumerate(found))

    def sound(self, section: str, model: type[Model]) -> Iterator[tuple[Loc, Model, bool]]:
        """The entries that can be checked further, and whether they are right as a whole.

        _check_format has told what is wrong with the others; of these, wrong fields are left out.
        """
        for loc, entry in self.entries(section):
            try:
                yield loc, model.model_validate(entry), True
            except ValidationError as wrong:
                fields = {part for error in wrong.errors() for part in error["loc"][:1]}
                if isinstance(entry, dict) and not fields & _VITAL[section]:
                    rest = {name: value for name, value in entry.items() if name not in fields}
                    yield loc, model.model_validate(_STAND_INS[section] | rest), False


def _read(name: str, text: str) -> _Document:
    text = text.removeprefix("\ufeff")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _too_large(name)
    if strange := _NOT_YAML.search(text):
        line, column = text.count("\n", 0, strange.start()), strange.start() - text.rfind("\n", 0, strange.start())
        sentence = f"the character U+{ord(strange[0]):04X} may not stand in YAML; remove it"
        raise _wrong(Place(name, line + 1, column), sentence)
    try:
        tags = _check_events(name, text)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml reads ahead, and has a limit of its own
            raise _too_deep(_place(name, getattr(error, "problem_mark", None))) from error
        sentence = f"this is not YAML ({_reason(error)}); check quotes, brackets and indentation"
        raise _wrong(_place(name, getattr(error, "problem_mark", None)), sentence) from error
    if root is None:
        raise _wrong(Place(name), "the file is empty; begin it with `version: 1`")
    document = _Document(name, text, root, problems=tags)
    document.value = _Plain(document).value(root)
    return document


def _reason(error: yaml.YAMLError) -> str:
    """PyYAML's own words: what it found, and where what it was reading begins."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    if error.context is None or error.context_mark is None:
        return str(error.problem)
    return f"{error.context} at line {error.context_mark.line + 1}, {error.problem}"


def _check_events(name: str, text: str) -> list[Problem]:
    """Look over the file before nodes are made of it: composing deep nesting overflows libyaml's stack.

    Returns:
        The tags, which are mistakes.
    """
    tags: list[Problem] = []
    depth = documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        place, tag = _place(name, event.start_mark), getattr(event, "tag", None)
        if depth > MAX_DEPTH:
            raise _too_deep(place)
        if documents > 1:
            raise _wrong(place, "a second document begins here; put it in a file of its own")
        if tag is not None:
            tags.append(Problem(*place, f"the tag {shown(tag)} is not allowed in a rule file; remove it"))
    return tags


def _too_deep(place: Place) -> WrongRules:
    return _wrong(place, f"this is nested deeper than {MAX_DEPTH} levels; rule files need few")


def _place(name: str, mark: Any) -> Place:
    """A place of PyYAML's, which counts from 0; its two loaders have a class of mark each."""
    return Place(name) if mark is None else Place(name, mark.line + 1, mark.column + 1)


class _Plain:
    """Makes plain values of a document's nodes, within limits that hold after aliases have been followed."""

    def __init__(self, document: _Document) -> None:
        self._document = document
        self._left = MAX_NODES

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            sentence = "with its aliases followed, this holds itself or too much; write it out without them"
            raise _wrong(_place(self._document.name, node.start_mark), sentence)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        places: dict[str, Place] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._complain(key, "a key must be text; write `name: value`")
            elif key.value == "<<" and not key.style:
                self._complain(key, "merge keys (`<<`) are not supported; write the fields out")
            elif key.value in places:
                first = places[key.value]
                self._complain(key, f"{shown(key.value)} stands here twice, first at {first}; remove one of the two")
            else:
                places[key.value] = self._place(key)
                values[key.value] = self.value(value, depth + 1)
        return values

    def _place(self, node: yaml.Node) -> Place:
        return _place(self._document.name, node.start_mark)

    def _complain(self, node: yaml.Node, sentence: str) -> None:
        self._document.problems.append(Problem(*self._place(node), sentence))


def _scalar(node: Any) -> Any:
    """A scalar as YAML 1.2's core schema reads it (section 10.3.2), less octal, hexadecimal, .inf and .nan."""
    text: str = node.value
    if node.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


# ── The file format: the only list of its fields ─────────────────────────────────────────────────────────────────────

_DURATION = re.compile(r"([0-9]{1,10})(ms|s|m|h|d)")
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_LONGEST = 36_500 * 86_400_000

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_$]*")
_TABLE = re.compile(r"(?:(?P<schema>{0})\.)?(?P<name>{0})".format(r'"(?:[^"\0]|"")+"|[^\W\d][\w$]*'))
_FOLD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def _duration(value: object) -> int:
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"{shown(str(value))} is not a duration; write a whole number and a unit: 500ms, 30s, 5m, 1h or 30d"
        )
    milliseconds = int(found[1]) * _UNITS[found[2]]
    if not 0 < milliseconds <= _LONGEST:
        raise ValueError(f"{shown(found[0])} is out of range; a duration is longer than 0 and at most 36500d")
    return milliseconds


def _table(value: object) -> Table:
    """A table's name read as PostgreSQL reads it: folded to lower case, unless it is in double quotes."""
    found = _TABLE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"{shown(str(value))} is not a table; write `schema.table`, names with capitals or signs in double quotes"
        )
    if found["schema"] is None:
        raise ValueError(f"{shown(found[0])} lacks its schema; write {shown('public.' + found[0])}")
    table = Table(_identifier(found["schema"]), _identifier(found["name"]))
    if any(len(name.encode()) > 63 for name in table):
        raise ValueError(
            f"{shown(found[0])} has a name of more than 63 bytes, which PostgreSQL cuts off; cut it as well"
        )
    return table


def _identifier(text: str) -> str:
    return text[1:-1].replace('""', '"') if text.startswith('"') else text.translate(_FOLD)


def _format_version(value: object) -> object:
    if value != 1 or type(value) is not int:
        raise ValueError(f"the format {shown(str(value))} is not known; write `version: 1`, without quotes")
    return value


def _bust_kind(value: object) -> str | None:
    return "<name>" if isinstance(value, str) else "<mapping>" if isinstance(value, dict) else None


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Column = Annotated[str, Field(min_length=1)]
Duration = Annotated[
    int, PlainValidator(_duration), WithJsonSchema({"type": "string", "pattern": r"^[0-9]{1,10}(ms|s|m|h|d)$"})
]
TableName = Annotated[Table, PlainValidator(_table), WithJsonSchema({"type": "string", "examples": ["public.users"]})]
MappedBust = Annotated[dict[str, dict[str, Column]], Field(min_length=1, max_length=1)]
BustEntry = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[MappedBust, Tag("<mapping>")], Discriminator(_bust_kind)
]
Op = Literal["insert", "update", "delete", "truncate"]


class _Entry(BaseModel):
    """What all parts of the format have in common: no other fields, no conversions, nothing empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: object) -> object:
        if value is None:
            raise ValueError  # _sentence has the words for everything empty
        return value


class CacheEntry(_Entry):
    """One family of keys."""

    key: str = Field(description="Template of the keys: `shop:${APP_ENV:-prod}:user:{id}`.")
    version: str | None = Field(None, description="Template of the version counters' keys; a bust bumps the counter.")
    version_ttl: Duration | None = Field(None, description="How long a version counter lives; 30d by default.")
    ttl: Duration | None = Field(None, description="How long readers store a value.")
    jitter: Duration | None = Field(None, description="Up to how much is added to the ttl, at random.")
    ttl_only: bool = Field(default=False, description="A decision written down: no rule busts this cache.")
    again_after: Duration | None = Field(
        None, description="Bust a second time, that long after the first: for readers without the fill contract."
    )


class RuleEntry(_Entry):
    """Which changes of a table bust which caches."""

    name: Name = Field(description="Unique in all files; a label of metrics and events.")
    table: TableName = Field(description="`schema.table`; a partitioned table stands for its partitions.")
    on: list[Op] = Field(
        ["insert", "update", "delete", "truncate"], min_length=1, description="Which changes; all four by default."
    )
    columns: list[Column] | None = Field(
        None, min_length=1, description="An UPDATE that changes none of these busts nothing."
    )
    old_row: Literal["require", "sweep", "ignore"] = Field(
        "require", description="What to do when the replica identity does not carry a key's columns."
    )
    immutable: list[Column] = Field([], description="Columns that no UPDATE ever changes.")
    bust: list[BustEntry] = Field(
        min_length=1, description="Caches, or `cache: {parameter: column}` where the names differ."
    )


class RuleFile(_Entry):
    """A rule file of cdc-invalidator."""

    version: Annotated[Literal[1], BeforeValidator(_format_version)] = Field(description="The version of the format.")
    caches: dict[Name, CacheEntry] = Field({}, description="Caches by name.")
    rules: list[RuleEntry] = Field([], description="Rules, in any order.")


# ── The models' errors in our own words ──────────────────────────────────────────────────────────────────────────────

# By the section of the file that an entry stands in: what it is called, its model, and fields that later work brings.
_SECTIONS: dict[int | str, tuple[str, type[BaseModel], frozenset[str]]] = {
    "": ("a rule file", RuleFile, frozenset({"tests"})),
    "caches": (
        "a cache",
        CacheEntry,
        frozenset({"bump_over", "negative_ttl", "stale_for", "max_keys_hint"}),
    ),
    "rules": ("a rule", RuleEntry, frozenset({"when", "debounce"})),
}
_LATER_IN_BUST = frozenset({"via"})

# An entry is still checked against others when only fields beside these are wrong; stand-ins take a rule's place.
_VITAL = {"caches": frozenset({"key", "version"}), "rules": frozenset({"bust"})}
_STAND_INS = {"caches": {}, "rules": {"name": "stand-in", "table": "stand.in"}}

_EMPTY = "{what} is empty; give it a value or remove it"
_SENTENCES = {
    "missing": "{owner} lacks {field}; add it",
    "string_type": "{what} must be text; put it in quotes if it is one word, number or sign",
    "string_too_short": "{what} must not be empty; give it a name",
    "string_pattern_mismatch": (
        "{value} is not a name; use 1 to 63 of A-Z a-z 0-9 _ . -, and begin with a letter or a digit"
    ),
    "bool_type": "{what} must be `true` or `false`",
    "list_type": "{what} must be a list; write `[one, two]`, or one `- ` on each line",
    "dict_type": "{what} must be a mapping; write `name: value`",
    "model_type": "{what} must be a mapping; write `name: value` on each line",
    "too_short": "{what} must not be empty; write at least one entry",
    "too_long": "{what} may name one cache only; write a `- ` for each",
    "union_tag_not_found": "{what} must be the name of a cache, or `name: {{parameter: column}}`",
}


def _check_format(document: _Document) -> None:
    try:
        RuleFile.model_validate(document.value)
    except ValidationError as wrong:
        for error in wrong.errors(include_url=False):
            # What is too much, ill-named, or empty is shown at its key; what is missing, at its owner's.
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
        return f"{shown(str(value))} is not allowed here; {_nearest(str(value), allowed)}"
    sentence = _SENTENCES.get(kind, "{what} is wrong; look at the documentation of rule files")
    return sentence.format(what=_what(loc), owner=_what(loc[:-1]), field=_what(loc[-1:]), value=shown(str(value)))


def _what(loc: Loc) -> str:
    """What stands at a path: ``ttl``, an entry of ``on``, the file."""
    named = [part for part in loc if isinstance(part, str) and part not in {"<name>", "<mapping>", "[key]"}]
    if not named:
        return "the file"
    in_list = any(isinstance(part, int) for part in loc[loc.index(named[-1]) :])
    return f"an entry of {shown(named[-1])}" if in_list else shown(named[-1])


def _unknown_field(loc: Loc) -> str:
    name = str(loc[-1])
    noun, model, later = _SECTIONS[loc[0] if len(loc) > 1 else ""]
    if name in later:
        return _not_yet(name)
    return f"{shown(name)} is not a field of {noun}; {_nearest(name, model.model_fields)}"


def _not_yet(name: str) -> str:
    return f"{shown(name)} is not supported yet; remove it"


def _nearest(name: str, valid: Iterable[str], otherwise: str = "") -> str:
    """The remedy for a name that is unknown."""
    names = list(valid)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {shown(near[0])}?" if near else otherwise or f"write one of {', '.join(names)}"


# ── Checks across entries and files, and the runtime objects ─────────────────────────────────────────────────────────


class _CacheDraft(NamedTuple):
    """A cache as far as it is right; a template that is wrong or not there is None."""

    document: _Document
    loc: Loc
    entry: CacheEntry
    key: Template | None
    version: Template | None
    whole: bool

    @property
    def target(self) -> Template | None:
        """What a bust needs the parameters of; None where that is not known, because fields are wrong."""
        if not self.whole:
            return None
        return self.key if self.entry.version is None else self.version


class _BustDraft(NamedTuple):
    cache: str
    columns: Mapping[str, str]


class _RuleDraft(NamedTuple):
    entry: RuleEntry
    place: Place
    busts: tuple[_BustDraft, ...]


class _Draft:
    """The set of rules as far as it is right; what is wrong is told to its document.

    Args:
        documents: all files that are YAML.
        env: the environment of templates.
        every_file: no file is missing, so that a cache which is not found is a mistake.
    """

    def __init__(self, documents: Sequence[_Document], env: Mapping[str, str], *, every_file: bool) -> None:
        self._every_file = every_file
        self._declared = _declared(documents)
        self._caches: dict[str, _CacheDraft] = {}
        for document in documents:
            for loc, cache, whole in document.sound("caches", CacheEntry):
                key = _template(document, (*loc, "key"), cache.key, env)
                version = _template(document, (*loc, "version"), cache.version, env)
                draft = _CacheDraft(document, loc, cache, key, version, whole)
                _check_cache(draft)
                self._caches.setdefault(str(loc[1]), draft)
        _check_same_keys(self._caches)
        self._rules = [
            _RuleDraft(rule, document.place(loc), self._busts(document, loc, rule))
            for document in documents
            for loc, rule, _ in document.sound("rules", RuleEntry)
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
        return RuleSet(caches, rules, _digest(digests, sorted(rule.name for rule in rules)))

    def _busts(self, document: _Document, loc: Loc, rule: RuleEntry) -> tuple[_BustDraft, ...]:
        _check_repeats(document, loc, rule)
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

    def _bust(self, document: _Document, loc: Loc, name: str, mapping: Mapping[str, str]) -> _BustDraft | None:
        """The bust with its mapping made complete, or None where that cannot be known."""
        if name not in self._declared and self._every_file:
            remedy = _nearest(name, self._declared, "define it under `caches`")
            document.complain(loc, f"there is no cache {shown(name)}; {remedy}", of_key=True)
        draft = self._caches.get(name)
        if draft is not None and draft.entry.ttl_only:
            sentence = f"cache {shown(name)} is `ttl_only`, so no rule may bust it; remove it here, or `ttl_only` there"
            document.complain(loc, sentence, of_key=True)
        for parameter in mapping.keys() & _LATER_IN_BUST:
            document.complain((*loc, parameter), _not_yet(parameter), of_key=True)
        if draft is None or draft.target is None:
            return None
        params = draft.target.params
        for parameter in sorted(mapping.keys() - set(params) - _LATER_IN_BUST):
            of = "key" if draft.entry.version is None else "version"
            remedy = _nearest(parameter, params, "remove it") if params else "it has none, so remove it"
            sentence = f"the `{of}` of cache {shown(name)} has no parameter {shown(parameter)}; {remedy}"
            document.complain((*loc, parameter), sentence, of_key=True)
        return _BustDraft(name, {parameter: mapping.get(parameter, parameter) for parameter in params})


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
        digest=_digest(_canonical_parts(key), version and _canonical_parts(version), sorted(busts)),
        again_after=entry.again_after,
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
        busts=tuple(Bust(caches[bust.cache], bust.columns) for bust in draft.busts),
        place=draft.place,
    )


def _declared(documents: Sequence[_Document]) -> set[str]:
    """The names of all caches, also of those that are wrong; a cache or rule whose name is taken is a mistake."""
    first: dict[tuple[str, str], tuple[_Document, Loc]] = {}
    for document in documents:
        for noun, name, loc in _names(document):
            owner, taken = first.setdefault((noun, name), (document, loc))
            if (owner, taken) != (document, loc):
                of_key = noun == "cache"
                place = owner.place(taken, of_key=of_key)
                sentence = f"{noun} {shown(name)} is defined twice, first at {place}; rename or remove one"
                document.complain(loc, sentence, of_key=of_key)
    return {name for noun, name in first if noun == "cache"}


def _names(document: _Document) -> Iterator[tuple[str, str, Loc]]:
    """What the file defines: a cache at its name, which is a key; a rule at the value of its name."""
    for loc, _ in document.entries("caches"):
        yield "cache", str(loc[1]), loc
    for loc, rule in document.entries("rules"):
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
    if entry.again_after is not None and entry.again_after > LONGEST_AGAIN:
        sentence = "`again_after` is at most 1m, since PostgreSQL keeps its WAL until then; shorten it"
        document.complain((*loc, "again_after"), sentence)
    if entry.ttl is None and entry.jitter is not None:
        document.complain((*loc, "jitter"), "`jitter` needs a `ttl`; remove it, or add one", of_key=True)


def _template(document: _Document, loc: Loc, text: str | None, env: Mapping[str, str]) -> Template | None:
    if text is None:
        return None
    try:
        template = Template.parse(text, env)
    except TemplateError as error:
        document.complain_inside(loc, str(error), error.offset)
        return None
    if template.glob() == b"*":
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


def _check_repeats(document: _Document, loc: Loc, rule: RuleEntry) -> None:
    for name, items in (("on", rule.on), ("columns", rule.columns or ()), ("immutable", rule.immutable)):
        seen: set[str] = set()
        for number, item in enumerate(items):
            if item in seen:
                document.complain((*loc, name, number), f"{shown(item)} stands twice in `{name}`; remove one")
            seen.add(item)


def _canonical(rule: RuleEntry, bust: _BustDraft) -> list[Any]:
    """How a rule busts a cache, without the rule's name: a rule that is only renamed busts as before."""
    columns = sorted(set(rule.columns or ()))
    return [rule.table, sorted(rule.on), columns, rule.old_row, sorted(rule.immutable), sorted(bust.columns.items())]


def _canonical_parts(template: Template) -> list[Any]:
    return [part.decode() if isinstance(part, bytes) else [part.name, *part.filters] for part in template.parts]


def _digest(*canonical: Any) -> str:
    return sha256(json.dumps(canonical).encode()).hexdigest()[:16]
