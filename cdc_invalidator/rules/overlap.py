"""Which keys a template can make, as a language, and whether two templates can make the same key. Pure.

A template is a line of bytes with loops in it, so two questions are searches over pairs of places: can two templates
make the same key (`common`), and can one template make the same key of different parameters (`readings`)? Both return
the shortest such key as an example.

The rule that holds here: a key that is found is a key of both. The search does not know that a parameter which stands
twice in a template has one value, so each result is checked once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Self

from cdc_invalidator.rules.template import HASHES, Param, Template


def _mask(characters: bytes | range) -> int:
    return sum(1 << byte for byte in characters)


_DIGITS = _mask(b"0123456789")
_HEX = _mask(b"0123456789abcdef")
_UNRESERVED = _mask(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.~-")
_ANY = _mask(range(0x20, 0x7F)) | _mask(range(0x80, 0x100))
# Separators that people put between the parts of a key; most values hold none.
_SEPARATORS = _mask(b":/|#")

# Of several bytes that would do, an example has the first of these.
_NICE = b"1023456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_." + bytes(range(0x21, 0x100)) + b" "


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that a parameter can have: one byte of each of ``steps``, then any number of ``more`` (0: none).

    Sets of bytes are masks of 256 bits. ``free``: it is text, which may or may not be so in the database's data.
    """

    steps: tuple[int, ...]
    more: int = 0
    free: bool = False

    def filtered(self, name: str) -> Texts:
        """Return the texts that a filter of a template makes of these."""
        if name in HASHES:
            return _hash(HASHES[name])
        if name == "urlencode":
            if not any(mask & ~_UNRESERVED for mask in (*self.steps, self.more)):
                return self
            encoded = _UNRESERVED | _mask(b"%")
            return Texts((encoded,), encoded, free=True)
        change: Callable[[bytes], bytes] = bytes.lower if name == "lower" else bytes.upper
        return Texts(tuple(_changed(mask, change) for mask in self.steps), _changed(self.more, change), self.free)

    def of_parts(self) -> Texts:
        """Return the texts without a separator (``: / | #``); most values have none."""
        return Texts(tuple(mask & ~_SEPARATORS for mask in self.steps), self.more & ~_SEPARATORS, self.free)

    def of_numbers(self) -> Texts:
        """Return numbers in place of free text, for questions that free text would always answer with yes."""
        return NUMBER if self.free else self


def _hash(digits: int) -> Texts:
    return Texts((_HEX,) * digits)


def _changed(mask: int, change: Callable[[bytes], bytes]) -> int:
    return _mask(bytes({change(bytes([byte]))[0] for byte in range(0x100) if mask >> byte & 1}))


TEXT = Texts((_ANY,), _ANY, free=True)
PART = TEXT.of_parts()
NUMBER = Texts((_DIGITS | _mask(b"-"),), _DIGITS)
COUNTER = Texts((_DIGITS,), _DIGITS)
FLAG = Texts((_mask(b"tf"),))
UUID = Texts(tuple(_mask(b"-") if place in {8, 13, 18, 23} else _HEX for place in range(36)))
# What a sweep finds in a parameter's place: any text, also an empty one.
ANYTHING = Texts((), _ANY)
# The rest of a key that a bust can't name, which a language has as one more parameter.
REST = "*"
_REST = Texts((), _ANY & ~_SEPARATORS, free=True)


class _Place(NamedTuple):
    """A place in a template: the bytes that lead on from it, and those that stay; each with the part they are of."""

    step: int = 0
    of_step: int = -1
    loop: int = 0
    of_loop: int = -1


class Language:
    """All keys of a template.

    Args:
        template: what they are made by.
        values: the texts of its parameters, and of the rest of a key as `REST`; one that is not named has texts without
            a separator.
    """

    def __init__(self, template: Template, values: Mapping[str, Texts]) -> None:
        self.template = template = whole(template)
        self.prefix = template.prefix
        self.free = False
        self._places: list[_Place] = []
        loop, of_loop = 0, -1
        for at, part in enumerate(template.parts):
            if isinstance(part, bytes):
                steps, more = tuple(1 << byte for byte in part), 0
            else:
                found = reduce(Texts.filtered, part.filters, values.get(part.name, _usual(part)))
                steps, more = found.steps, found.more
                self.free |= found.free
            for step in steps:
                self._places.append(_Place(step, at, loop, of_loop))
                loop, of_loop = 0, -1
            if more:
                loop, of_loop = loop | more, at
        self._places.append(_Place(loop=loop, of_loop=of_loop))

    @classmethod
    def of_sweep(cls, template: Template) -> Self:
        """Return the language of what a sweep of the template's keys finds; see `Template.glob`."""
        # The pattern finds the same with and without filters.
        plain = Template.of(Param(part.name) if isinstance(part, Param) else part for part in whole(template).parts)
        return cls(plain, {part.name: ANYTHING for part in plain.parts if isinstance(part, Param)})

    def has(self, key: bytes) -> bool:
        """Return whether the key can be one of the template."""
        places = {0}
        for byte in key:
            bit = 1 << byte
            places = {
                after
                for at in places
                for after, mask in ((at + 1, self._places[at].step), (at, self._places[at].loop))
                if mask & bit
            }
            if not places:
                return False
        return len(self._places) - 1 in places

    def search(self, other: Language, *, differing: bool) -> list[tuple[int, int, int]] | None:
        """Search for the shortest key of both.

        Args:
            other: maybe the same one.
            differing: the two must read it differently.

        Returns:
            The key's bytes, each with the part of either template that it is of.
        """
        start, end = (0, 0, not differing), (len(self._places) - 1, len(other._places) - 1, True)
        before: dict[tuple[int, int, bool], tuple[tuple[int, int, bool], tuple[int, int, int]] | None] = {start: None}
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            if state == end:
                return _path(before, state)
            here, there, differs = state
            mine, theirs = self._places[here], other._places[there]
            for mask, ours, their, forward, onward in (
                (mine.step & theirs.step, mine.of_step, theirs.of_step, 1, 1),
                (mine.loop & theirs.step, mine.of_loop, theirs.of_step, 0, 1),
                (mine.step & theirs.loop, mine.of_step, theirs.of_loop, 1, 0),
            ):
                after = (here + forward, there + onward, differs or here + forward != there + onward)
                if mask and after not in before:
                    before[after] = (state, (_nicest(mask), ours, their))
                    waiting.append(after)
        return None


def whole(template: Template) -> Template:
    """Return the template with the rest of its keys as one more parameter."""
    return Template.of((*template.parts, Param(REST))) if template.rest else template


def _usual(param: Param) -> Texts:
    if param.name == REST:
        return _REST
    return COUNTER if param.name == "version" else PART


def _nicest(mask: int) -> int:
    return next(byte for byte in _NICE if mask >> byte & 1) if mask & _ANY else mask.bit_length() - 1


def _path(
    before: Mapping[tuple[int, int, bool], tuple[tuple[int, int, bool], tuple[int, int, int]] | None],
    state: tuple[int, int, bool],
) -> list[tuple[int, int, int]]:
    path = []
    while (step := before[state]) is not None:
        state, letter = step
        path.append(letter)
    return path[::-1]


def common(one: Language, other: Language) -> str | None:
    """Return a key that both have; ``None`` if there is none."""
    if not (one.prefix.startswith(other.prefix) or other.prefix.startswith(one.prefix)):
        return None
    path = one.search(other, differing=False)
    if path is None or not _consistent(one, path, 1) or not _consistent(other, path, 2):
        return None
    return _text(letter[0] for letter in path)


class Readings(NamedTuple):
    """A key that two different rows make: the values of the parameters in each, as text to show."""

    key: str
    one: str
    other: str


def readings(language: Language) -> Readings | None:
    """Return a key that can be read in two ways; ``None`` if there is none."""
    path = language.search(language, differing=True)
    if path is None or not _consistent(language, path, 1) or not _consistent(language, path, 2):
        return None
    shown = []
    for which in (1, 2):
        values = _values(language, path, which)
        shown.append(", ".join(f"{name} = {_text(spans[0])}" for name, spans in values.items()))
    return Readings(_text(letter[0] for letter in path), *shown)


def _values(language: Language, path: Iterable[tuple[int, int, int]], which: int) -> dict[str, list[bytes]]:
    """Return the texts of the parameters in a key, one for each time that a parameter stands in the template."""
    spans: dict[int, bytearray] = {}
    for letter in path:
        spans.setdefault(letter[which], bytearray()).append(letter[0])
    values: dict[str, list[bytes]] = {}
    for at, part in enumerate(language.template.parts):
        if isinstance(part, Param):
            values.setdefault(part.name, []).append(bytes(spans.get(at, b"")))
    return values


def _consistent(language: Language, path: Iterable[tuple[int, int, int]], which: int) -> bool:
    if len(language.template.params) == sum(isinstance(part, Param) for part in language.template.parts):
        return True
    path = list(path)
    parts = [part for part in language.template.parts if isinstance(part, Param)]
    if any(part.filters for part in parts):
        return True
    return all(len(set(spans)) == 1 for spans in _values(language, path, which).values())


def _text(key: Iterable[int]) -> str:
    return bytes(key).decode("utf-8", "replace")
