"""Finds the table and the columns that a family of keys comes from, by names and by values. Pure.

The rule that holds here: what is not sure makes no rule, only a comment. A rule needs a name that the table and the
family share, and for each parameter a reason: its name, a foreign key, or values that this column holds and its
neighbours don't. Small numbers are in every table, so for them the values alone are no reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import permutations
from typing import NamedTuple

from cdc_invalidator.discovery.families import UUID, Family, Kind, Parameter
from cdc_invalidator.discovery.schema import Category, Column, PairQuestion, Question, Shares, TableInfo
from cdc_invalidator.discovery.words import singular, words
from cdc_invalidator.rules.table import Table

# Values that are looked up for a parameter, and how many there must be to count for something.
VALUES = 50
ENOUGH = 5
# Columns that are asked for one parameter, and altogether.
COLUMNS_A_PARAMETER = 40
QUESTIONS = 4000

_CATEGORIES: Mapping[str, tuple[Category, ...]] = {
    Kind.NUMBER: (Category.NUMBER,),
    Kind.UUID: (Category.UUID, Category.TEXT),
    Kind.MAIL: (Category.TEXT,),
    Kind.URL: (Category.TEXT,),
    Kind.HASH: (Category.TEXT,),
    Kind.RANDOM: (Category.TEXT,),
    Kind.TEXT: (Category.TEXT,),
    Kind.DATE: (),
    Kind.VERSION: (),
}
# Words that say in which form a row is cached, not what of.
_FORMS = frozenset(
    """
    all by cache cached count data detail dict entity entry exist for hash html id info item json key list map meta
    model obj object page record row set show single summary v view
    """.split()  # noqa: SIM905  a list
)
# Words of keys that are no copies of rows: to delete these would break what they are for.
_NO_COPIES = frozenset(
    """
    bull celery csrf heartbeat job leader limit limiter lock mutex nonce otp presence queue ratelimit resque semaphore
    sidekiq throttle
    """.split()  # noqa: SIM905  a list
)
_CHUNKS = re.compile(r"[:/|.{}()\[\]<>#,;=&?@\s]+")
_COUNTERS = ("ver", "version", "rev", "revision", "gen", "generation")


class Sure(IntEnum):
    """How sure a match is."""

    NOT = 0
    GUESS = 1
    LIKELY = 2
    CERTAIN = 3


@dataclass(frozen=True, slots=True)
class Match:
    """Where the keys of a family come from.

    ``table``: ``None`` if nothing fits; ``maps``: from the parameter's number to the column, several where the same
    place holds values of several columns; ``reasons``: why, in words; ``counter``: the family of its version counters.
    ``rest``: the number of the parameter from which on the key is not known, and is searched for.
    """

    family: Family
    table: Table | None = None
    maps: tuple[Mapping[int, str], ...] = ()
    sure: Sure = Sure.NOT
    reasons: tuple[str, ...] = ()
    counter: Family | None = None
    rest: int | None = None


class _Chunk(NamedTuple):
    """A piece of a family's literals, and the number of parameters before it."""

    text: str
    words: tuple[str, ...]
    after: int


# ── Versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def versions(families: Sequence[Family]) -> dict[int, int]:
    """Return, by the number of a family whose keys hold a version, the number of the family of its counters."""
    by_shape = {family.shape: number for number, family in enumerate(families)}
    found: dict[int, int] = {}
    versioned = [number for number, family in enumerate(families) if _version(family) is not None]
    for number in versioned:
        before = _before_version(families[number])
        counter = next((by_shape[before + name] for name in _COUNTERS if before + name in by_shape), None)
        if counter is not None:
            found[number] = counter
    # `page:{id}:v{version}` and `pages:ver`: one counter for all.
    for number in versioned:
        if number in found:
            continue
        literal = families[number].parts[0]
        stem = _singulars(literal) if isinstance(literal, str) else ()
        for counter, family in enumerate(families):
            ending = _without_counter(family)
            if ending and counter not in found.values() and stem and _singulars(ending) == stem:
                found[number] = counter
    return found


def _version(family: Family) -> int | None:
    kinds = [parameter.kind for parameter in family.parameters]
    return kinds.index(Kind.VERSION) if kinds.count(Kind.VERSION) == 1 else None


def _before_version(family: Family) -> str:
    text = ""
    for part in family.parts:
        if not isinstance(part, str) and part.kind == Kind.VERSION:
            break
        text += part if isinstance(part, str) else "\0"
    return text.removesuffix("v")


def _without_counter(family: Family) -> str:
    (text, *rest) = family.parts
    if rest or not isinstance(text, str):
        return ""
    return next((text.removesuffix(name) for name in _COUNTERS if text.endswith((":" + name, "/" + name))), "")


def _singulars(text: str) -> tuple[str, ...]:
    return tuple(singular(chunk) for chunk in _CHUNKS.split(text) if chunk)


# ── Questions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def questions(families: Sequence[Family], schema: Sequence[TableInfo]) -> list[Question | PairQuestion]:
    """Return what to ask about values: of each parameter, the columns that may hold it, those with fitting names first.

    There are at most `COLUMNS_A_PARAMETER` of one parameter, and `QUESTIONS` in all.
    """
    asked: list[Question | PairQuestion] = []
    for number, family in enumerate(families):
        chunks = _chunks(family)
        tables = sorted(schema, key=lambda info: -_named(chunks, info)[0])
        asked += _pairs(number, family, [info for info in tables if _named(chunks, info)[0] >= 2.5])
        for at, parameter in enumerate(family.parameters):
            if not usable_values(parameter.values):
                continue
            wanted = [
                Question(number, at, info.table, column.name)
                for info in tables
                for column in sorted(info.columns, key=lambda column: column.name not in info.key)
                if column.askable and column.category in _categories(parameter)
            ]
            asked += wanted[:COLUMNS_A_PARAMETER]
    return asked[:QUESTIONS]


def _pairs(number: int, family: Family, tables: Sequence[TableInfo]) -> list[PairQuestion]:
    """Return which two columns of an index may hold the values of two parameters, whichever of them is the first."""
    counted = [at for at, each in enumerate(family.parameters) if each.kind != Kind.VERSION]
    asked = []
    for info in tables:
        columns = {column.name: column for column in info.columns}
        for names in dict.fromkeys(info.indexes):
            asked += [
                PairQuestion(number, (one, other), info.table, names)
                for one, other in permutations(counted, 2)
                if all(
                    _fits(family.parameters[at], columns[name]) for at, name in zip((one, other), names, strict=True)
                )
            ]
    return asked[:COLUMNS_A_PARAMETER]


def _fits(parameter: Parameter, column: Column) -> bool:
    """Whether a column can hold the values of a parameter, by its type or since it has only these."""
    return column.category in _categories(parameter) or _enumerated(parameter, column)


def _enumerated(parameter: Parameter, column: Column) -> bool:
    """Whether all values are words, and among the few of a column; a single one would say nothing."""
    return parameter.kind == Kind.TEXT and len(parameter.values) > 1 and column.values.issuperset(parameter.values)


def usable_pairs(family: Family, parameters: tuple[int, int]) -> list[tuple[str, str]]:
    """Return the pairs of values that are looked up."""
    one, other = parameters
    pairs = dict.fromkeys((row[one], row[other]) for row in family.rows)
    sound = [pair for pair in pairs if len(usable_values(pair)) == 2]
    step = max(1, len(sound) // VALUES)
    return sound[::step][:VALUES]


def _categories(parameter: Parameter) -> tuple[Category, ...]:
    """Return what columns can hold the values of a parameter; several kinds of value are several columns."""
    mixed = parameter.kind == Kind.TEXT and any(UUID.fullmatch(value) for value in parameter.values)
    return (*_CATEGORIES[parameter.kind], Category.UUID) if mixed else _CATEGORIES[parameter.kind]


def usable_values(values: Sequence[str]) -> list[str]:
    """Return the values that are looked up."""
    sound = [value for value in values if value and "\0" not in value and value.isprintable() and len(value) < 500]
    step = max(1, len(sound) // VALUES)
    return sound[::step][:VALUES]


# ── Matches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def match(families: Sequence[Family], schema: Sequence[TableInfo], shares: Shares) -> list[Match]:
    """Return what each family comes from, in their order; the families of version counters are part of others.

    Args:
        families: as `families.group` returns them.
        schema: the tables.
        shares: the answers to `questions`.
    """
    counters = versions(families)
    usual = _usual(families)
    matches = []
    for number, family in enumerate(families):
        if number in counters.values():
            continue
        counter = families[counters[number]] if number in counters else None
        # A bust needs the parameters of the version alone.
        needed = len((counter or family).parameters)
        found = _of_family(number, family, needed, usual, schema, shares)
        matches.append(replace(found, counter=counter))
    return matches


@dataclass(frozen=True, slots=True)
class _Idea:
    """One table that the family may come from."""

    info: TableInfo
    score: float
    sure: Sure
    maps: tuple[Mapping[int, str], ...]
    reasons: tuple[str, ...]
    rest: int | None


def _usual(families: Sequence[Family]) -> frozenset[str]:
    """Return the words that nearly all keys begin with: the application's name, the environment."""
    counts = Counter(chunk.text for family in families for chunk in set(_chunks(family)) if chunk.after == 0)
    return frozenset(text for text, count in counts.items() if len(families) > 2 and count >= 0.8 * len(families))


def _of_family(
    number: int, family: Family, needed: int, usual: frozenset[str], schema: Sequence[TableInfo], shares: Shares
) -> Match:
    chunks = _chunks(family)
    ideas = [
        idea
        for info in schema
        if (idea := _idea(number, family, needed, usual, chunks, info, schema, shares)) is not None
    ]
    ideas.sort(key=lambda idea: -idea.score)
    if not ideas:
        return _by_values(number, family, schema, shares)
    best = ideas[0]
    if best.sure > Sure.GUESS and (doubt := _doubt(family, chunks, best.info)):
        best = replace(best, sure=Sure.GUESS, reasons=(*best.reasons, doubt))
    sure = best.sure
    if sure == Sure.GUESS and not best.maps[0]:
        by_values = _by_values(number, family, schema, shares)
        if by_values.table is not None:
            return by_values
    if len(ideas) > 1 and ideas[1].score > best.score - 1 and sure > Sure.GUESS:
        return Match(
            family,
            best.info.table,
            best.maps,
            Sure.GUESS,
            (*best.reasons, f"{ideas[1].info.table} fits almost as well"),
            rest=best.rest,
        )
    return Match(family, best.info.table, best.maps, sure, best.reasons, rest=best.rest)


def _doubt(family: Family, chunks: Sequence[_Chunk], info: TableInfo) -> str:
    """Return why a family may be no cache, although a table fits; empty for no doubt."""
    said = [word for chunk in chunks for word in chunk.words if word in _NO_COPIES and word not in info.words]
    if said:
        return f"but the word {said[0]} says that it is no copy of rows"
    types = {kind for kind, _ in family.types}
    if "stream" in types:
        return "but a stream is no copy of rows"
    if types & {"list", "set", "zset"} and family.ttls is None:
        return "but without end, it may be the only copy"
    return ""


def _chunks(family: Family) -> list[_Chunk]:
    found = []
    after = 0
    for part in family.parts:
        if not isinstance(part, str):
            after += 1
            continue
        found += [_Chunk(text, words(text), after) for text in _CHUNKS.split(part) if words(text)]
    return found


def _named(chunks: Sequence[_Chunk], info: TableInfo) -> tuple[float, int]:
    """Return how well the name of a table fits one of the chunks, 0 to 3, and the chunk's number."""
    best = (0.0, -1)
    for number, chunk in enumerate(chunks):
        score = _same(chunk.words, info)
        # Django's app and model: `blog.post` of blog_post.
        if number and score < 3 and chunks[number - 1].words + chunk.words == info.words:
            score = 3.0
        if score and score >= best[0]:
            best = (score, number)
    return best


def _same(name: tuple[str, ...], info: TableInfo) -> float:
    table = info.words
    if _joined(name, table) == len(name):
        return 3.0
    # custom_emojis, tb_user: an adjective, or the prefix of an application.
    short = table[1:]
    if short and _joined(name, short) == len(name):
        return 2.5
    known = {word for column in info.columns for word in words(column.name)} | _FORMS
    for called in filter(None, (table, short)):
        begun = _joined(name, called)
        if begun and set(name[begun:]) <= known:
            return 2.5
    if _joined(name, table):
        return 1.0
    if len(name) < len(table) and table[: len(name)] == name:
        return 1.5  # attribute_kv
    return 1.0 if name[-len(table) :] == table else 0.5 if set(table) <= set(name) else 0.0


def _joined(name: tuple[str, ...], table: tuple[str, ...]) -> int:
    """Return how many words a name begins with that are the table's, which may write them as one: `userprofile`."""
    called = "".join(table)
    return next((count for count in range(1, len(name) + 1) if "".join(name[:count]) == called), 0)


def _idea(
    number: int,
    family: Family,
    needed: int,
    usual: frozenset[str],
    chunks: Sequence[_Chunk],
    info: TableInfo,
    schema: Sequence[TableInfo],
    shares: Shares,
) -> _Idea | None:
    name, at = _named(chunks, info)
    if not name:
        return None
    own = chunks[at]
    score = name
    reasons = [f"the name {own.text.strip('_-')}"]
    # What else the key names: tables, and words that no table explains.
    others = [
        other
        for other in schema
        if other.table != info.table and any(_same(chunk.words, other) == 3 for chunk in chunks if chunk != own)
    ]
    assigned, maps = _columns(number, family, chunks, own, info, others, shares)
    reasons += [each.reason for each in assigned.values() if each.reason]
    referred = {info.references.get(each.column) for each in assigned.values()}
    hinted = {word for each in assigned.values() for word in words(each.column)}
    loose = [
        other for other in others if other.table not in referred and not set(other.words) <= hinted | set(info.words)
    ]
    known = {word for column in info.columns for word in words(column.name)} | _FORMS | {"ver", "v"}
    extra = [
        chunk
        for chunk in chunks
        if chunk != own
        and chunk.text not in usual
        and len(chunk.words[0]) > 1
        and not all(word in known or word.isdigit() for word in chunk.words)
        and not any(_same(chunk.words, other) == 3 for other in others)
    ]
    # `user:{id}:followers` is about other rows, and `Group:member:{id}` may be: which ones, nobody says. A word before
    # the name, or one behind the parameter that names no things, is a part of the row or a view of it.
    strange = [chunk for chunk in extra if _plural(chunk) or (chunk.after == own.after and chunks.index(chunk) > at)]
    later = [chunk for chunk in extra if chunks.index(chunk) > at]
    score += sum(min(each.score, 2) for each in assigned.values()) - len(loose)
    wanted = [at for at, each in enumerate(family.parameters[:needed]) if each.kind != Kind.VERSION]
    lacking = [at for at in wanted if at not in assigned and not (maps and at in maps[0])]
    rest = lacking[0] if lacking else None
    firm = all(each.score >= 2 for each in assigned.values())
    sure = Sure.CERTAIN
    if name < 2.5 or loose or strange or not firm or not (assigned or maps or not wanted):
        sure = Sure.GUESS
    elif later or rest is not None or not wanted:
        sure = Sure.LIKELY
    if rest is not None and (len(wanted) == 1 or family.parts[-1] is not family.parameters[rest]):
        # What a bust can't name must come last, and behind something that it can.
        sure, rest = Sure.GUESS, None
    if not wanted and name < 3:
        sure = Sure.GUESS
    if loose:
        reasons.append(f"but the key names {', '.join(str(other.table) for other in loose[:3])} too")
    elif strange:
        reasons.append(f"but nothing says what {strange[0].text.strip('_-')} are made of")
    elif later and sure == Sure.LIKELY:
        reasons.append(f"{later[0].text.strip('_-')} may show other tables too")
    if not maps:
        maps = ({at: each.column for at, each in assigned.items()},)
    return _Idea(info, score, sure, maps, tuple(dict.fromkeys(reasons)), rest)


class _Choice(NamedTuple):
    """The column of a parameter; a ``score`` of 2 or more is a reason of its own."""

    column: str
    score: float
    reason: str


def _columns(
    number: int,
    family: Family,
    chunks: Sequence[_Chunk],
    own: _Chunk,
    info: TableInfo,
    others: Sequence[TableInfo],
    shares: Shares,
) -> tuple[dict[int, _Choice], tuple[Mapping[int, str], ...]]:
    """Return the column of each parameter that has one; or several maps, if a parameter holds values of several."""
    choices: list[tuple[float, int, _Choice]] = []
    parameters = [at for at, each in enumerate(family.parameters) if each.kind != Kind.VERSION]
    for at in parameters:
        kind = family.parameters[at].kind
        fitting = [column for column in info.columns if _fits(family.parameters[at], column)]
        counted = len(usable_values(family.parameters[at].values)) >= ENOUGH
        found = {
            column.name: shares[question]
            for column in fitting
            if counted and (question := Question(number, at, info.table, column.name)) in shares
        }
        several = {name: share for name, share in found.items() if share > 0}
        if len(parameters) == 1 and kind != Kind.NUMBER and len(several) > 1 and 0.9 <= sum(several.values()) <= 1.1:
            shown = " and ".join(sorted(several))
            best = max(several, key=several.__getitem__)
            choice = _Choice(best, 2.5, f"its values are those of {shown}")
            return {at: choice}, tuple({at: name} for name in sorted(several, key=lambda name: -several[name]))
        for column in fitting:
            candidate = _choice(family, at, column, chunks, own, info, others, found)
            if candidate is not None:
                choices.append((candidate.score, at, candidate))
    choices += [(choice.score, at, choice) for at, choice in _by_pairs(number, family, info, shares)]
    assigned: dict[int, _Choice] = {}
    for _, at, choice in sorted(choices, key=lambda each: (-each[0], each[1])):
        if at not in assigned and choice.column not in {each.column for each in assigned.values()}:
            assigned[at] = choice
    return assigned, ()


def _by_pairs(number: int, family: Family, info: TableInfo, shares: Shares) -> Iterator[tuple[int, _Choice]]:
    """Yield the columns of an index that hold two parameters together, where no other columns do."""
    found = {
        question: share
        for question, share in shares.items()
        if isinstance(question, PairQuestion) and (question.family, question.table) == (number, info.table)
    }
    if not found:
        return
    best = max(found, key=found.__getitem__)
    rivals = [share for question, share in found.items() if question != best and share > 0.5 * found[best]]
    if found[best] < 0.8 or rivals or len(usable_pairs(family, best.parameters)) < ENOUGH:
        return
    reason = f"{' and '.join(best.columns)} hold {found[best]:.0%} of the pairs that were looked up"
    for at, column in zip(best.parameters, best.columns, strict=True):
        yield at, _Choice(column, 3.0, reason)


def _choice(
    family: Family,
    at: int,
    column: Column,
    chunks: Sequence[_Chunk],
    own: _Chunk,
    info: TableInfo,
    others: Sequence[TableInfo],
    found: Mapping[str, float],
) -> _Choice | None:
    share = found.get(column.name)
    if share is not None and share < 0.5:
        return None
    if _enumerated(family.parameters[at], column):
        return _Choice(column.name, 2.5, f"{column.name} has such values")
    kind = family.parameters[at].kind
    name = words(column.name)
    score, reason = 0.0, ""
    parents = {chunk.words for chunk in chunks if chunk != own} | _by(own)
    direct = [chunk for chunk in chunks if chunk.after == at]
    referred = info.references.get(column.name)
    if any(name in {each, (*each, "id")} for each in parents):
        score, reason = 2.0, f"{column.name} is named in the key"
    if referred is not None and any(other.table == referred for other in others):
        score, reason = score + 2, f"{column.name} refers to {referred}"
    if info.key == (column.name,) and own.after == 0 and at == 0 and own in direct:
        # By convention, what stands behind the name of a table is its key; unless other columns would do.
        rivals = [
            other.name
            for other in info.columns
            if other.name != column.name
            and other.category == column.category
            and (other.name in info.references or other.name.lower().endswith("id"))
            and found.get(other.name, 1.0) >= 0.9 * (share or 1.0)
        ]
        # `user:1` and `users/1` are ids; `users:1` may be any number that belongs to users.
        alone = not rivals or own.text == singular(own.text.lower()) or _before(family, at).endswith("/")
        convention = 2.0 if kind == Kind.NUMBER and alone else 1.0
        if convention > score:
            score, reason = convention, f"{column.name} is its key"
    if share is not None and share >= 0.8:
        rivals = [other for other, of_other in found.items() if other != column.name and of_other > 0.5 * share]
        if kind != Kind.NUMBER or (len(found) > 1 and not rivals):
            score += 2.5 if not rivals else 2 if info.key == (column.name,) else 1.8
            reason = f"{column.name} holds {share:.0%} of the values that were looked up"
        else:
            score += 0.5
    elif share is not None and kind != Kind.NUMBER:
        score, reason = score + 1, f"{column.name} holds {share:.0%} of the values that were looked up"
    return _Choice(column.name, score, reason) if score else None


def _before(family: Family, at: int) -> str:
    """Return the literal before a parameter."""
    place = family.parts.index(family.parameters[at])
    literal = family.parts[place - 1] if place else ""
    return literal if isinstance(literal, str) else ""


def _plural(chunk: _Chunk) -> bool:
    """Whether the last word of a name is a plural."""
    last = re.findall(r"[A-Za-z][a-z]*", chunk.text)[-1:]
    return bool(last) and singular(last[0].lower()) != last[0].lower()


def _by(own: _Chunk) -> set[tuple[str, ...]]:
    """Return what a name says behind `by`: `("email",)` of `userByEmail`."""
    return {own.words[own.words.index("by") + 1 :]} if "by" in own.words[:-1] else set()


def _by_values(number: int, family: Family, schema: Sequence[TableInfo], shares: Shares) -> Match:
    """Guess by values alone: the primary keys, and other columns, that hold nearly all of them."""
    for at, parameter in enumerate(family.parameters):
        if len(usable_values(parameter.values)) < ENOUGH:
            continue
        held = [(info, column) for info, column, share in _held(number, at, schema, shares) if share >= 0.8]
        keys = [(info, column) for info, column in held if info.key == (column,)]
        if len(keys) == 1 or (len(held) == 1 and not keys):
            info, column = (keys or held)[0]
            reason = f"its values are those of {info.table}.{column}, but nothing says which tables are shown"
            return Match(family, info.table, ({at: column},), Sure.GUESS, (reason,))
        if keys:
            names = Counter(str(info.table) for info, _ in keys)
            return Match(family, reasons=(f"its values are numbers that {', '.join(list(names)[:4])} all have as ids",))
    return Match(family)


def _held(number: int, at: int, schema: Sequence[TableInfo], shares: Shares) -> Iterator[tuple[TableInfo, str, float]]:
    for info in schema:
        for column in info.columns:
            question = Question(number, at, info.table, column.name)
            if question in shares:
                yield info, column.name, shares[question]
