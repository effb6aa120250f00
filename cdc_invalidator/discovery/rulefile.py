"""Writes down what was found, as a commented rule file. Pure.

The rule that holds here: a comment or a template shows no key and no value; see `families`. What is not sure is
commented out, so that the file does only what somebody has a reason for.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cdc_invalidator import errors
from cdc_invalidator.discovery.families import Family, Kind, Parameter
from cdc_invalidator.discovery.matching import Match, Sure
from cdc_invalidator.discovery.schema import TableInfo
from cdc_invalidator.rules.draft import RESERVED
from cdc_invalidator.rules.table import Table

WIDTH = 118
_SURE = {Sure.CERTAIN: "certain", Sure.LIKELY: "likely", Sure.GUESS: "a guess", Sure.NOT: "unknown"}
_DOUBLED = re.compile(r"[{}*?\[\]]")
_CHUNKS = re.compile(r"[^A-Za-z0-9]+")
_DIGEST = re.compile(r"[0-9a-fA-F]{16,}")
_SIMPLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words of the format, and YAML's.
_NOT_NAMES = RESERVED | {"version", "sweep", "on_empty", "null", "true", "false"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A family as the file has it: the name of its cache, its templates, and what it was made of.

    ``key`` is empty where no template can be written.
    """

    name: str
    key: str
    version: str
    maps: tuple[Mapping[str, str], ...]
    match: Match

    @property
    def busted(self) -> bool:
        """Whether there is a reason to write a rule."""
        return self.match.sure >= Sure.LIKELY and bool(self.key)

    def busts(self) -> Iterator[str]:
        """Yield the entries of a rule's `bust`."""
        for mapping in self.maps:
            different = {parameter: column for parameter, column in mapping.items() if parameter != column}
            if different:
                pairs = ", ".join(f"{parameter}: {_text(column)}" for parameter, column in different.items())
                yield f"{_label(self.name)}: {{{pairs}}}"
            else:
                yield _label(self.name)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the database says of the entries, by their numbers: why a rule can't be; what to do against its sweeps."""

    refused: Mapping[int, str] = field(default_factory=dict)
    sweeps: Mapping[int, str] = field(default_factory=dict)


def entries(matches: Sequence[Match]) -> list[Entry]:
    """Return the entries of matches, in their order, with names of their own."""
    common = _common([match.family for match in matches])
    taken: Counter[str] = Counter()
    found = []
    for match in matches:
        names = _parameter_names(match)
        key = _template(match.family, names, match.rest)
        version = _template(match.counter, names, None) if match.counter is not None else ""
        at = next((at for at, each in enumerate(match.family.parameters) if each.kind == Kind.VERSION), None)
        if at is not None and not version:
            # Nothing is known of its counter, so the key is searched for.
            last = match.family.parts[-1] is match.family.parameters[at]
            key = _template(match.family, names, at) if last and at else ""
        maps = tuple({names[at]: column for at, column in mapping.items()} for mapping in match.maps)
        name = _name(match.family, common, names)
        if name in taken:
            name = f"{name[:30]}-by-{_clean(' '.join(names))[:28]}"
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name[:58]}-{taken[name]}"
        found.append(Entry(name, key, version, maps, match))
    return found


def write(
    found: Sequence[Entry], verdict: Verdict, schema: Sequence[TableInfo], head: Iterable[str], single: int
) -> str:
    """Return the text of the file.

    Args:
        found: what `entries` returned.
        verdict: what the database says of them.
        schema: its tables.
        head: sentences about where all this comes from.
        single: how many keys are in no family.
    """
    lines = [line for sentence in head for line in _comment(sentence)]
    written = [(number, entry) for number, entry in enumerate(found) if entry.busted and number not in verdict.refused]
    lines += ["", "version: 1", ""]
    if written:
        lines += [
            "defaults:",
            "  given: true       # the keys are the application's",
            "  again_after: 1s   # its readers may store what they loaded before a bust",
            "",
            "caches:",
        ]
    for _, entry in written:
        lines += [line for sentence in _said(entry, schema) for line in _comment(sentence, "  ")]
        if entry.match.rest is not None or entry.key.endswith("*"):
            lines += _comment("What the `*` stands for is unknown: each bust searches through all keys of Redis.", "  ")
        lines.append(f"  {_label(entry.name)}:")
        lines.append(f"    key: {_quoted(entry.key)}")
        if entry.version:
            lines.append(f"    version: {_quoted(entry.version)}")
        if entry.match.family.ttls is not None:
            lines.append(f"    ttl: {_time(entry.match.family.ttls[1])}")
        lines.append("")
    if written:
        lines += ["rules:", *_rules(written, verdict)]
    rest = [(number, entry) for number, entry in enumerate(found) if (number, entry) not in written]
    if rest or single:
        lines += ["# ── What no rule busts yet " + "─" * 80, "#"]
    for number, entry in rest:
        lines += _left(entry, verdict.refused.get(number, ""))
    if single:
        lines += _comment(
            f"{_keys(single)} in no family: names that few keys have may hold data, and are not shown. "
            "cdc-invalidator explain KEY says what busts a key."
        )
    return "\n".join(lines).rstrip() + "\n"


def probe(found: Sequence[Entry], sweeps: Iterable[int], refused: Iterable[int]) -> str:
    """Return a file with a rule for each entry, called by its number, to be judged by the database."""
    sweeps, refused = set(sweeps), set(refused)
    asked = [(number, entry) for number, entry in enumerate(found) if entry.busted and number not in refused]
    lines = ["version: 1", "defaults: {given: true, again_after: 1s}"]
    if asked:
        lines.append("caches:")
    for _, entry in asked:
        version = f", version: {_quoted(entry.version)}" if entry.version else ""
        lines.append(f"  {_label(entry.name)}: {{key: {_quoted(entry.key)}{version}}}")
    if asked:
        lines.append("rules:")
    for number, entry in asked:
        lines += _rule(f"r{number}", entry.match.table, [entry], sweeps=number in sweeps)
    return "\n".join(lines) + "\n"


# ── Rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rules(written: Sequence[tuple[int, Entry]], verdict: Verdict) -> list[str]:
    groups: dict[tuple[Table, str], list[Entry]] = {}
    for number, entry in written:
        assert entry.match.table is not None
        groups.setdefault((entry.match.table, verdict.sweeps.get(number, "")), []).append(entry)
    lines: list[str] = []
    taken: Counter[str] = Counter()
    for (table, remedy), some in sorted(groups.items(), key=lambda each: (each[0][0], each[0][1])):
        name = _clean(table.name if table.schema == "public" else f"{table.schema}-{table.name}") + "-changed"
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}-{taken[name]}"
        lines += _comment(remedy, "  ") if remedy else []
        lines += [*_rule(name, table, some, sweeps=bool(remedy)), ""]
    return lines


def _rule(name: str, table: Table | None, some: Sequence[Entry], *, sweeps: bool) -> list[str]:
    lines = [f"  - name: {name}", f"    table: {_text(str(table))}"]
    if sweeps:
        lines.append("    old_row: sweep")
    lines.append("    bust:")
    return lines + [f"      - {bust}" for entry in some for bust in entry.busts()]


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _said(entry: Entry, schema: Sequence[TableInfo]) -> Iterator[str]:
    match = entry.match
    why = f" ({'; '.join(match.reasons)})" if match.reasons else ""
    yield f"{_described(match)}. From {match.table}, {_SURE[match.sure]}{why}."
    if match.family.types and match.family.ttls is None:
        yield "It lives without end: make sure that it is a copy of rows, and not the only one."
    if match.sure == Sure.LIKELY:
        children = [str(info.table) for info in schema if match.table in info.references.values()]
        if children:
            more = f" and {len(children) - 4} more" if len(children) > 4 else ""
            yield f"If it shows rows of these too, give each a rule: {', '.join(children[:4])}{more}."


def _left(entry: Entry, refused: str) -> list[str]:
    match = entry.match
    shown = "" if entry.key else _template(match.family, _parameter_names(match), None)
    lines = _comment(f"{_described(match)}{': ' + _quoted(shown) if shown else ''}.")
    if refused:
        lines += _comment(f"{_SURE[match.sure].capitalize()}: from {match.table}, but {refused}", "", "  ")
    elif match.table is not None:
        lines += _comment(f"{_SURE[match.sure].capitalize()}: {match.table} ({'; '.join(match.reasons)}).", "", "  ")
    else:
        reason = "; ".join(match.reasons) or "no table has such a name, and no column such values"
        lines += _comment(f"Not matched: {reason}.", "", "  ")
    if entry.key:
        version = f", version: {_quoted(entry.version)}" if entry.version else ""
        lines.append(f"#   {_label(entry.name)}: {{key: {_quoted(entry.key)}{version}}}")
    if match.table is not None and entry.key:
        lines += [f"#  {line[1:]}" for line in _rule(f"{entry.name}-changed"[:63], match.table, [entry], sweeps=False)]
    return [*lines, "#"]


def _described(match: Match) -> str:
    family = match.family
    types = f", {' and '.join(kind for kind, _ in family.types[:3])}" if family.types else ""
    if family.ttls is not None:
        shortest, longest = (_time(seconds) for seconds in family.ttls)
        left = f", {longest} left" if shortest == longest else f", {shortest} to {longest} left"
        left += f" ({family.endless} without end)" if family.endless else ""
    else:
        left = ", without end" if family.types else ""
    counted = f"; {_keys(match.counter.keys)} of versions" if match.counter is not None else ""
    return f"{_keys(family.keys)}{types}{left}{counted}"


def _keys(number: int) -> str:
    return f"{number:,} key{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * unit:
            return f"{round(seconds / unit)}{name}"
    return f"{max(1, round(seconds))}s"


def _comment(sentence: str, margin: str = "", inner: str = "") -> list[str]:
    return textwrap.wrap(
        errors.visible(sentence),
        WIDTH,
        initial_indent=f"{margin}# {inner}",
        subsequent_indent=f"{margin}# {inner}",
        break_long_words=False,
        break_on_hyphens=False,
    )


# ── Names and templates ──────────────────────────────────────────────────────────────────────────────────────────────


def _parameter_names(match: Match) -> list[str]:
    columns = match.maps[0] if match.maps else {}
    names: list[str] = []
    for at, parameter in enumerate(match.family.parameters):
        name = columns.get(at, "")
        if parameter.kind == Kind.VERSION and match.counter is not None:
            name = "version"
        elif not _SIMPLE.fullmatch(name) or name in _NOT_NAMES or name in names:
            name = f"p{at + 1}"
        names.append(name)
    return names


def _template(family: Family, names: Sequence[str], rest: int | None) -> str:
    """Return the template; empty if a literal holds what no template may, or if there is none: it would be all keys.

    Args:
        family: the family.
        names: the names of its parameters.
        rest: the number of the parameter that is written as `*`, with all behind it.
    """
    text = ""
    at = 0
    if not any(isinstance(part, str) for part in family.parts):
        return ""
    for part in family.parts:
        if isinstance(part, Parameter):
            if at == rest:
                return text + "*"
            text += f"{{{names[at]}}}"
            at += 1
        elif not part.isprintable() or any(map(str.isspace, part)):
            return ""
        else:
            text += _DOUBLED.sub(r"\g<0>\g<0>", part)
    return text


def _common(families: Sequence[Family]) -> str:
    """Return what nearly all keys begin with, up to a separator."""
    counts: Counter[str] = Counter()
    for family in families:
        first = family.parts[0] if family.parts and isinstance(family.parts[0], str) else ""
        counts.update(first[: found.end()] for found in re.finditer(r"[:/|]+", first))
    often = [text for text, count in counts.items() if count >= 0.8 * len(families) and len(families) > 2]
    return max(often, key=len, default="")


def _name(family: Family, common: str, names: Sequence[str]) -> str:
    literal = " ".join(part for part in family.parts if isinstance(part, str))
    name = _clean(_DIGEST.sub(" ", literal.removeprefix(common)))
    name = re.sub(r"-v$", "", name) if Kind.VERSION in {each.kind for each in family.parameters} else name
    return name or _clean(" ".join(names)) or "keys"


def _clean(text: str) -> str:
    return _CHUNKS.sub("-", text).strip("-").lower()[:50]


def _text(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", text) and text not in _NOT_NAMES else _quoted(text)


def _label(name: str) -> str:
    """Return the name of a cache as a key of YAML."""
    return name if re.fullmatch(r"[a-z][a-z0-9-]*", name) and name not in _NOT_NAMES else _quoted(name)


def _quoted(text: str) -> str:
    # YAML takes no control signs, and what JSON leaves as it is may be one.
    signs = json.dumps(text, ensure_ascii=False)
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in signs)
