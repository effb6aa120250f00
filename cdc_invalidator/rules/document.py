"""A YAML document that knows the place of everything in it: text to nodes to plain values, and mistakes with places.

The rule that holds here: whatever the text is, the result is a `Document` or `errors.WrongRules`; no tag is followed,
no size is trusted, and a word means what YAML 1.2 says (``on`` and ``no`` are text).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from cdc_invalidator.errors import Problem, WrongRules
from cdc_invalidator.rules.wording import Place, shown

MAX_BYTES = 1 << 20
MAX_NODES = 200_000
MAX_DEPTH = 40


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


@dataclass(slots=True, eq=False)
class Document:
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


def read(name: str, text: str) -> Document:
    """Read one file's text.

    Raises:
        WrongRules: it can't be used at all.
    """
    text = text.removeprefix("\ufeff")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise too_large(name)
    if strange := _NOT_YAML.search(text):
        line, column = text.count("\n", 0, strange.start()), strange.start() - text.rfind("\n", 0, strange.start())
        sentence = f"the character U+{ord(strange[0]):04X} may not stand in YAML; remove it"
        raise unusable(Place(name, line + 1, column), sentence)
    try:
        tags = _check_events(name, text)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml reads ahead, and has a limit of its own
            raise _too_deep(_place(name, getattr(error, "problem_mark", None))) from error
        remedy = "check quotes (texts with braces or commas need them), brackets and indentation"
        sentence = f"this is not YAML ({_reason(error)}); {remedy}"
        raise unusable(_place(name, getattr(error, "problem_mark", None)), sentence) from error
    if root is None:
        raise unusable(Place(name), "the file is empty; begin it with `version: 1`")
    document = Document(name, text, root, problems=tags)
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
            raise unusable(place, "a second document begins here; put it in a file of its own")
        if tag is not None:
            tags.append(Problem(*place, f"the tag {shown(tag)} is not allowed in a rule file; remove it"))
    return tags


def _too_deep(place: Place) -> WrongRules:
    return unusable(place, f"this is nested deeper than {MAX_DEPTH} levels; rule files need few")


def _place(name: str, mark: Any) -> Place:
    """A place of PyYAML's, which counts from 0; its two loaders have a class of mark each."""
    return Place(name) if mark is None else Place(name, mark.line + 1, mark.column + 1)


class _Plain:
    """Makes plain values of a document's nodes, within limits that hold after aliases have been followed."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._left = MAX_NODES

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            sentence = "with its aliases followed, this holds itself or too much; write it out without them"
            raise unusable(_place(self._document.name, node.start_mark), sentence)
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


def too_large(file: str) -> WrongRules:
    """Return the error for a file that is too large to read."""
    return unusable(Place(file), f"the file is larger than {MAX_BYTES >> 20} MiB; split it")


def unusable(place: Place, sentence: str) -> WrongRules:
    """Return the error for a file of which no more can be read."""
    return WrongRules([Problem(*place, sentence)])
