"""Groups key names into families: templates made of literals and parameters, each with its number of keys. Pure.

The rule that holds here: a literal is a word of the program, never a row's data. A word is one if many keys have it at
that place, and if what follows it there is not what follows all of its neighbours as well; a word of few keys is one
only if it is in the `Vocabulary`. Everything else becomes a parameter, or a key that is only counted.

A key is cut into atoms: separators, words, and values that show what they are (numbers, UUIDs, hashes, addresses). The
keys walk down a tree of these atoms together. At each place the values become one parameter, and the words are told
apart.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cdc_invalidator.discovery.words import Vocabulary
from cdc_invalidator.rules.suffixes import split_suffix

# A word that fewer keys have is data, unless it is in the vocabulary.
LEAST_KEYS = 10
# Where names of families stand, and different ids follow, so many will do.
_LEAST_LED = 5
# Of the values of a parameter, so many are kept for look-ups.
SAMPLES = 100
# Separators, literals and parameters of a template; what comes behind these is one parameter.
_LONGEST = 80
# Literals at one place: more words than this are values, however many keys each has.
_LITERALS = 400
# Behind a constant prefix; behind a parameter, where words come again for each of its values.
_ALIKE = 8
_AFTER_PARAMETER = 24
# The part of all keys that makes a place one where names of families stand.
_NAME_PLACE = 0.4

_HARD = frozenset(":/|{}()[]<>#,;=&?")
_SOFT = frozenset("_-.@+~!$%^*'\"\\`")
UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_WORD = re.compile(r"[^:/|{}()\[\]<>#,;=&?_\-.@+~!$%^*'\"\\`\s]+")
_MAIL = re.compile(r"[^\s:/|{}()\[\]<>#,;=&?_@]+[^\s:/|{}()\[\]<>#,;=&?@]*@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"[a-z][a-z0-9+]{1,9}://.*", re.DOTALL)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9])")
_HEX = re.compile(r"(?=.*[0-9])[0-9a-fA-F]{16,}")
_REST = re.compile(r"[^:/|{}()\[\]<>#,;=&?]+")
_BLANK = re.compile(r"^[^_]*?\s")
_BUMPED = re.compile(r"v[0-9]+")


class Kind:
    """What a value looks like."""

    NUMBER = "number"
    UUID = "UUID"
    HASH = "hash"
    RANDOM = "random text"
    MAIL = "address"
    URL = "URL"
    DATE = "date"
    VERSION = "version"
    TEXT = "text"


class Sample(NamedTuple):
    """A key that was seen: its Redis type, empty if unknown, and its remaining seconds, ``None`` for no end."""

    key: bytes
    type: str = ""
    ttl: float | None = None


class Parameter(NamedTuple):
    """A place of a template that holds values; ``values``: some of them, each once. They are never shown."""

    kind: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Keys of one template.

    ``parts``: literals and parameters in turn; ``keys``: how many were seen; ``types``: how many, by Redis type;
    ``ttls``: the shortest and the longest remaining time in seconds of those that have one; ``endless``: how many have
    none; ``rows``: of some keys, the values of all parameters.
    """

    parts: tuple[str | Parameter, ...]
    keys: int
    types: tuple[tuple[str, int], ...] = ()
    ttls: tuple[float, float] | None = None
    endless: int = 0
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in order."""
        return tuple(part for part in self.parts if isinstance(part, Parameter))

    @property
    def shape(self) -> str:
        """The template with a bare mark for each parameter; two families never have the same."""
        return "".join(part if isinstance(part, str) else "\0" for part in self.parts)


@dataclass(frozen=True, slots=True)
class Found:
    """The families, the largest first.

    ``seen``: keys in all; ``beside``: of the reader library and the daemon; ``single``: of no family, whose names may
    be data.
    """

    families: tuple[Family, ...]
    seen: int
    beside: int
    single: int


class _Atom(NamedTuple):
    """A piece of a key: a separator, a word, or a value with its kind."""

    kind: str
    text: str


_SEPARATOR, _WORDS = "separator", "word"


def _atoms(key: str) -> list[_Atom]:
    atoms: list[_Atom] = []
    at = 0
    while at < len(key):
        sign = key[at]
        if sign in _HARD:
            atoms.append(_Atom(_SEPARATOR, sign))
            at += 1
            continue
        value = _value(key, at)
        if value is None:
            if sign in _SOFT or sign.isspace():
                atoms.append(_Atom(_SEPARATOR, sign))
                at += 1
                continue
            value = _word(key, at)
        if value.kind == Kind.VERSION:
            atoms.append(_Atom(_WORDS, "v"))
            value = _Atom(Kind.VERSION, value.text[1:])
            at += 1
        atoms.append(value)
        at += len(value.text)
    return atoms


def _value(key: str, at: int) -> _Atom | None:
    """Return the value that begins here and has separators of its own."""
    for kind, pattern in ((Kind.UUID, UUID), (Kind.MAIL, _MAIL), (Kind.URL, _URL), (Kind.DATE, _DATE)):
        found = pattern.match(key, at)
        if found is not None and not (kind in {Kind.MAIL, Kind.DATE} and UUID.search(found[0])):
            return _Atom(kind, found[0])
    return None


def _word(key: str, at: int) -> _Atom:
    found = _WORD.match(key, at)
    assert found is not None
    text = found[0]
    # Also of `devices1b4e28ba-…`, which has no separator.
    glued = UUID.search(key, at)
    if glued is not None and glued.start() < at + len(text):
        text = key[at : glued.start()]
    rest = _REST.match(key, at)
    if rest is not None and _BLANK.search(rest[0]) and not UUID.search(rest[0]):
        # No name of a family holds a blank.
        return _Atom(Kind.TEXT, rest[0])
    if text.isdecimal():
        return _Atom(Kind.NUMBER, text)
    if _BUMPED.fullmatch(text):
        return _Atom(Kind.VERSION, text)
    if _HEX.fullmatch(text):
        return _Atom(Kind.HASH, text)
    digits = any(sign.isdigit() for sign in text)
    if len(text) >= 16 and digits and any(map(str.isupper, text)) and any(map(str.islower, text)):
        return _Atom(Kind.RANDOM, text)
    return _Atom(_WORDS, text)


class _Kind(NamedTuple):
    """A parameter on the way down."""

    kind: str


class _Key(NamedTuple):
    """A key on its way down the tree: its atoms, where in them it stands, and the values of its parameters so far."""

    sample: Sample
    atoms: list[_Atom]
    at: int = 0
    values: tuple[str, ...] = ()

    @property
    def next(self) -> _Atom | None:
        return self.atoms[self.at] if self.at < len(self.atoms) else None


@dataclass(slots=True)
class _Leaf:
    """What ends at one place of the tree: literals and the kinds of parameters, and the keys."""

    parts: list[str | _Kind]
    keys: list[_Key]


def group(samples: Iterable[Sample], vocabulary: Vocabulary, ours: Callable[[bytes], bool] = lambda _: False) -> Found:
    """Group keys into families.

    Args:
        samples: the keys; the names may be any bytes.
        vocabulary: the words that are no data.
        ours: whether a key is the daemon's own.
    """
    keys: list[_Key] = []
    seen = beside = 0
    for sample in samples:
        seen += 1
        if split_suffix(sample.key)[1] or ours(sample.key):
            beside += 1
            continue
        keys.append(_Key(sample, _atoms(sample.key.decode("utf-8", "surrogateescape"))))
    tree = _Tree(vocabulary, len(keys))
    tree.grow(keys)
    families = _merged(tree.leaves)
    kept = [family for family in families if family.keys >= LEAST_KEYS or _clear(family)]
    single = len(keys) - sum(family.keys for family in kept)
    return Found(tuple(sorted(kept, key=lambda family: (-family.keys, family.shape))), seen, beside, single)


def _clear(family: Family) -> bool:
    """Whether few keys make a family all the same: their literals are those of others, or in the vocabulary."""
    kinds = {parameter.kind for parameter in family.parameters}
    return kinds <= {Kind.VERSION} or (family.keys >= 3 and not kinds & {Kind.TEXT, Kind.RANDOM})


Trail = list[str | _Kind]


class _Tree:
    def __init__(self, vocabulary: Vocabulary, all_keys: int) -> None:
        self._vocabulary = vocabulary
        self._all = all_keys
        self._waiting: list[tuple[list[_Key], Trail]] = []
        self.leaves: list[_Leaf] = []

    def grow(self, keys: list[_Key]) -> None:
        """Let all keys walk to their ends."""
        self._waiting.append((keys, []))
        while self._waiting:
            self._step(*self._waiting.pop())

    def _walk(self, keys: list[_Key], trail: Trail) -> None:
        """Let keys with the same beginning go on; later, since keys are longer than a stack is deep."""
        self._waiting.append((keys, trail))

    def _step(self, keys: list[_Key], trail: Trail) -> None:
        if len(trail) >= _LONGEST:
            rest = [
                key._replace(values=(*key.values, "".join(atom.text for atom in key.atoms[key.at :]))) for key in keys
            ]
            self.leaves.append(_Leaf([*trail, _Kind(Kind.TEXT)], rest))
            return
        ended = [key for key in keys if key.next is None]
        if ended:
            self.leaves.append(_Leaf(trail, ended))
        separators: dict[str, list[_Key]] = defaultdict(list)
        values: dict[str, list[_Key]] = defaultdict(list)
        named: dict[str, list[_Key]] = defaultdict(list)
        for key in keys:
            atom = key.next
            if atom is None:
                continue
            if atom.kind == _SEPARATOR:
                separators[atom.text].append(key)
            elif atom.kind == _WORDS:
                named[atom.text].append(key)
            else:
                values[atom.kind].append(key)
        for text, some in separators.items():
            self._walk([key._replace(at=key.at + 1) for key in some], [*trail, text])
        literals, texts = self._told_apart(named, values, len(keys), trail)
        for text, some in literals.items():
            self._walk([key._replace(at=key.at + 1) for key in some], [*trail, text])
        self._values(values, texts, trail, len(keys))

    def _told_apart(
        self, named: dict[str, list[_Key]], values: dict[str, list[_Key]], here: int, trail: Trail
    ) -> tuple[dict[str, list[_Key]], list[_Key]]:
        """Return the words that are literals with their keys, and the keys whose words are values."""
        if not named:
            return {}, []
        # `v` before a version is a mark.
        literals = {text: some for text, some in named.items() if text == "v" and _marks(some)}
        rest = {text: some for text, some in named.items() if text not in literals}
        known = {text for text in rest if text in self._vocabulary}
        strange = {text: some for text, some in rest.items() if text not in known}
        frequent = {text for text, some in strange.items() if len(some) >= LEAST_KEYS}
        words = sum(map(len, rest.values()))
        after_parameter = any(isinstance(part, _Kind) for part in trail)
        names = here >= _NAME_PLACE * self._all and not after_parameter
        rare = sum(len(some) for text, some in strange.items() if text not in frequent)
        typed = sum(map(len, values.values()))
        if names:
            frequent |= {text for text, some in strange.items() if len(some) >= _LEAST_LED and _led(some)}
        if len(values.get(Kind.TEXT, ())) >= LEAST_KEYS:
            # Free text stands here.
            chosen = self._apart(rest)
        elif names and len(frequent) <= _LITERALS:
            chosen = known | frequent
        elif typed >= 4 * words:
            # Words where numbers stand: `user:all`.
            chosen = known | {text for text in frequent if len(strange[text]) >= 0.1 * here}
        elif after_parameter:
            few = len(frequent) <= _AFTER_PARAMETER and rare <= 0.1 * words
            chosen = known | frequent if few else self._apart(rest)
        else:
            few = len(frequent) <= _ALIKE and rare <= 0.1 * words and not self._people(strange, frequent)
            chosen = known | frequent if few else self._apart(rest)
        literals |= {text: some for text, some in rest.items() if text in chosen}
        return literals, [key for text, some in rest.items() if text not in chosen for key in some]

    def _people(self, strange: dict[str, list[_Key]], frequent: set[str]) -> bool:
        """Whether frequent words look like values: several unknown ones, after all of which comes the same."""
        shapes = Counter(_beyond(strange[text]) for text in frequent)
        return len(frequent) > 2 and shapes.most_common(1)[0][1] > 0.6 * len(frequent)

    def _apart(self, named: dict[str, list[_Key]]) -> set[str]:
        """Return the words among values that are literals: many keys have them, and something else comes after."""
        shapes = Counter({text: len(some) for text, some in named.items()})
        usual = Counter(_beyond(some) for some in named.values()).most_common(1)[0][0]
        average = sum(shapes.values()) / len(shapes)
        return {
            text
            for text, some in named.items()
            if len(some) >= max(LEAST_KEYS, 5 * average) and _whole(some) and _beyond(some) != usual
        }

    def _values(self, values: dict[str, list[_Key]], texts: list[_Key], trail: Trail, here: int) -> None:
        """Let the keys with values at this place go on: one parameter for each kind, or for all if some are text."""
        texts = [*texts, *values.pop(Kind.TEXT, [])]
        typed = sum(map(len, values.values()))
        loose = self._glued([*texts, *values.pop(Kind.RANDOM, [])], trail, here)
        texts = [key for key in loose if key.atoms[key.at].kind != Kind.RANDOM]
        if len(texts) < len(loose):
            values[Kind.RANDOM] = [key for key in loose if key.atoms[key.at].kind == Kind.RANDOM]
        if texts and len(texts) >= max(0.02 * (typed + len(texts)), LEAST_KEYS):
            mixed = [key for kind, some in values.items() if kind != Kind.UUID for key in some]
            if len(mixed) <= 0.5 * len(texts) or Kind.RANDOM in values:
                texts = [*texts, *mixed]
                values = {kind: some for kind, some in values.items() if kind == Kind.UUID}
            self._go_on(Kind.TEXT, texts, trail, whole=True)
        elif texts:
            self.leaves.append(
                _Leaf([*trail, _Kind(Kind.TEXT)], [key._replace(values=(*key.values, "")) for key in texts])
            )
        if values:
            main = max(values, key=lambda kind: len(values[kind]))
            for kind in [kind for kind, some in values.items() if len(some) < LEAST_KEYS and kind != main]:
                values[main] += values.pop(kind)
        for kind, some in values.items():
            if some:
                self._go_on(kind, some, trail, whole=False)

    def _go_on(self, kind: str, keys: list[_Key], trail: Trail, *, whole: bool) -> None:
        taken: list[str] = []
        behind: list[_Key] = []
        for key in keys:
            end = key.at + 1
            while whole and end < len(key.atoms) and key.atoms[end].text not in _HARD:
                end += 1
            taken.append("".join(atom.text for atom in key.atoms[key.at : end]))
            behind.append(key._replace(at=end))
        if len(keys) >= LEAST_KEYS and len(set(taken)) == 1 and _constant(kind, taken[0]):
            self._walk(behind, [*trail, taken[0]])
        else:
            held = [key._replace(values=(*key.values, value)) for key, value in zip(behind, taken, strict=True)]
            self._walk(held, [*trail, _Kind(kind)])

    def _glued(self, keys: list[_Key], trail: Trail, here: int) -> list[_Key]:
        """Find literals that no separator ends, as of `apiKeysXq81…`; return the other keys."""
        before = "".join(part for part in trail if isinstance(part, str))
        named = any(self._vocabulary.names(chunk) for chunk in re.split(r"[^A-Za-z0-9_]+", before))
        if named or any(isinstance(part, _Kind) for part in trail) or here < _NAME_PLACE * self._all:
            # Behind the name of a table stand values, which may begin alike.
            return keys
        by_prefix: dict[str, list[_Key]] = defaultdict(list)
        for key in keys:
            for length in _stems(key.atoms[key.at].text):
                by_prefix[key.atoms[key.at].text[:length]].append(key)
        left = {id(key): key for key in keys}
        # What most share, and behind which many signs come.
        for prefix in sorted(by_prefix, key=lambda prefix: (-len(by_prefix[prefix]), -len(prefix))):
            if len(by_prefix[prefix]) < LEAST_KEYS:
                continue
            some = [key for key in left.values() if key.atoms[key.at].text.startswith(prefix)]
            signs = {key.atoms[key.at].text[len(prefix) : len(prefix) + 1] for key in some}
            known = prefix in self._vocabulary
            if len(some) < LEAST_KEYS or len(signs) < (6 if known else 10):
                continue
            for key in some:
                del left[id(key)]
                text = key.atoms[key.at]
                key.atoms[key.at : key.at + 1] = [_Atom(_WORDS, prefix), _Atom(Kind.RANDOM, text.text[len(prefix) :])]
            self._go_on(Kind.RANDOM, [key._replace(at=key.at + 1) for key in some], [*trail, prefix], whole=True)
        return list(left.values())


def _stems(text: str) -> list[int]:
    """Return the lengths of the beginnings of a word that can be a name: at its humps, and before its first digit."""
    found = re.match(r"[A-Za-z][a-z]{2,}(?:[A-Z][a-z]{2,})*", text)
    if found is None:
        return []
    return [at for at in range(4, found.end() + 1) if at == len(text) or not text[at].islower() or at == found.end()]


def _constant(kind: str, text: str) -> bool:
    """Whether a value that all keys share can be a part of their name: a version, Django's `1`, a digest."""
    return (kind in {Kind.VERSION, Kind.NUMBER} and len(text) < 3) or kind == Kind.HASH


def _led(keys: list[_Key]) -> bool:
    """Whether a word leads to ids, as different as the keys: `audit:{id}`, `whs:{id}`."""
    ids = set()
    for key in keys:
        atom = next((atom for atom in key.atoms[key.at + 1 :] if atom.kind not in {_SEPARATOR, _WORDS}), None)
        if atom is None or atom.kind not in {Kind.NUMBER, Kind.UUID}:
            return False
        ids.add(atom.text)
    return len(ids) == len(keys)


def _marks(keys: list[_Key]) -> bool:
    return all(key.at + 1 < len(key.atoms) and key.atoms[key.at + 1].kind == Kind.VERSION for key in keys)


def _beyond(keys: list[_Key]) -> str:
    """Return the kinds of what most often follows a word, from the next hard separator on."""
    shapes: Counter[str] = Counter()
    for key in keys[:50]:
        at = key.at
        while at < len(key.atoms) and key.atoms[at].text not in _HARD:
            at += 1
        rest = (atom.text if atom.kind == _SEPARATOR else atom.kind for atom in key.atoms[at : at + 8])
        shapes["".join(rest)] += 1
    return shapes.most_common(1)[0][0]


def _whole(keys: list[_Key]) -> bool:
    """Whether the word is followed by the end of the key or by a hard separator."""
    return all(key.at + 1 >= len(key.atoms) or key.atoms[key.at + 1].text in _HARD for key in keys)


def _merged(leaves: list[_Leaf]) -> list[Family]:
    """Make families of the leaves; those that look the same are one."""
    by_shape: dict[str, list[_Leaf]] = defaultdict(list)
    for leaf in leaves:
        joined = _joined(leaf)
        by_shape["".join(part if isinstance(part, str) else "\0" for part in joined.parts)].append(joined)
    return [_family(same) for same in by_shape.values()]


def _joined(leaf: _Leaf) -> _Leaf:
    """Return a leaf in which neither two literals nor two parameters stand side by side."""
    parts: list[str | _Kind] = []
    joined: list[list[int]] = []
    number = 0
    for part in leaf.parts:
        last = parts[-1] if parts else None
        if isinstance(part, str):
            if isinstance(last, str):
                parts[-1] = last + part
            else:
                parts.append(part)
            continue
        if isinstance(last, _Kind):
            # Nothing would tell where one ends.
            parts[-1] = _Kind(Kind.TEXT)
            joined[-1].append(number)
        else:
            parts.append(part)
            joined.append([number])
        number += 1
    if all(len(numbers) == 1 for numbers in joined):
        return _Leaf(parts, leaf.keys)
    values = [tuple("".join(key.values[at] for at in numbers) for numbers in joined) for key in leaf.keys]
    return _Leaf(parts, [key._replace(values=held) for key, held in zip(leaf.keys, values, strict=True)])


def _family(same: list[_Leaf]) -> Family:
    keys = [key for leaf in same for key in leaf.keys]
    parts: list[str | Parameter] = []
    number = 0
    for places in zip(*(leaf.parts for leaf in same), strict=True):
        if isinstance(places[0], str):
            parts.append(places[0])
            continue
        kinds = {place.kind for place in places if isinstance(place, _Kind)}
        every = list(dict.fromkeys(key.values[number] for key in keys))
        # From all over, since values of one kind stand together.
        step = max(1, len(every) // SAMPLES)
        parts.append(Parameter(kinds.pop() if len(kinds) == 1 else Kind.TEXT, tuple(every[::step][:SAMPLES])))
        number += 1
    samples = [key.sample for key in keys]
    step = max(1, len(keys) // SAMPLES)
    types = Counter(sample.type for sample in samples if sample.type)
    ttls = [sample.ttl for sample in samples if sample.ttl is not None]
    return Family(
        tuple(parts),
        len(samples),
        tuple(types.most_common()),
        (min(ttls), max(ttls)) if ttls else None,
        # Of a key that went meanwhile, nothing is known.
        sum(sample.ttl is None and bool(sample.type) for sample in samples),
        tuple(key.values for key in keys[::step][:SAMPLES]) if number > 1 else (),
    )
