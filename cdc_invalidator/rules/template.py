"""Key templates: from a row's columns to the key of a cache, and from a key back to its parameters.

``"shop:${APP_ENV:-prod}:user:{id}"``: ``${NAME}`` and ``${NAME:-default}`` are environment, expanded once, at load;
``{name}`` is a parameter, ``{name|lower|sha256}`` one with filters, ``{team ":" name|sha256}`` a hash over a text that
is put together of parameters and quoted text; ``{{`` and ``}}`` are literal braces. As in a shell, the default also
stands in for a variable that is set but empty. A ``*`` at the end stands for the rest of a key, which a bust can't
name; ``**``, ``??``, ``[[`` and ``]]`` are these signs themselves.

The rule that holds here: values of the environment are literal text. They are never parsed again, nor shown in errors.

Keys and values are bytes: PostgreSQL's text form in UTF-8, as it came off the wire.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import md5, sha1, sha256
from operator import itemgetter
from typing import Self
from urllib.parse import quote

from cdc_invalidator.rules.wording import nearest, shown

MakeKey = Callable[[Sequence[bytes | None]], bytes | None]
"""From a row, its values by position, to a key; ``None`` where a parameter is NULL."""


class TemplateError(ValueError):
    """The text is not a key template; ``offset`` (from 0) is where, the message is one sentence with the remedy."""

    def __init__(self, sentence: str, offset: int) -> None:
        self.offset = offset
        super().__init__(sentence)


def _on_text(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    # A SQL_ASCII database may hold bytes that are not UTF-8; they pass through unchanged.
    return lambda value: change(value.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


FILTERS: Mapping[str, Callable[[bytes], bytes]] = {
    "lower": _on_text(str.lower),
    "upper": _on_text(str.upper),
    "urlencode": lambda value: quote(value, safe="").encode(),
    # They shorten keys, and protect nothing.
    "md5": lambda value: md5(value, usedforsecurity=False).hexdigest().encode(),
    "sha1": lambda value: sha1(value, usedforsecurity=False).hexdigest().encode(),
    "sha256": lambda value: sha256(value).hexdigest().encode(),
}
HASHES: Mapping[str, int] = {"md5": 32, "sha1": 40, "sha256": 64}
"""The filters whose result is of one length whatever the value: how many hexadecimal digits it has."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a key: its name, and the filters that its value goes through, in order.

    ``parts``: where a text is put together for a hash, its literals and parameters; its name is how they are written.
    """

    name: str
    filters: tuple[str, ...] = ()
    parts: tuple[bytes | Param, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values that it is made of: its own, or those of its parts."""
        return tuple(part.name for part in self.parts if isinstance(part, Param)) if self.parts else (self.name,)

    @property
    def hashed(self) -> bool:
        """Whether its text is of one length whatever the value."""
        return not HASHES.keys().isdisjoint(self.filters)

    def maker(self, index: Mapping[str, int]) -> MakeKey:
        """Return a function from a row to its text; see `Template.compile`."""
        make: MakeKey = Template.of(self.parts).compile(index) if self.parts else itemgetter(index[self.name])
        change = FILTERS[self.filters[0]] if len(self.filters) == 1 else self.change

        def make_text(row: Sequence[bytes | None]) -> bytes | None:
            value = make(row)
            return None if value is None else change(value)

        return make_text if self.filters else make

    def change(self, value: bytes) -> bytes:
        """Return the value after all filters."""
        return reduce(lambda changed, name: FILTERS[name](changed), self.filters, value)


@dataclass(frozen=True, slots=True)
class Template:
    """A key template: the text as written, and its parts, where no two literals stand side by side.

    ``rest``: behind the parts, a key goes on with any text, also none. What is compiled or rendered is the prefix then.
    """

    text: str
    parts: tuple[bytes | Param, ...]
    rest: bool = False

    @classmethod
    def parse(cls, text: str, env: Mapping[str, str]) -> Self:
        """Read a template and expand its environment.

        Raises:
            TemplateError: the text is empty, a brace or a sign of patterns stands alone, a name or filter is unknown, a
                variable is not set, or a literal holds white space or a control character.
        """
        parts: list[bytes | Param] = []
        rest = False
        for token in _TOKEN.finditer(text):
            if token.lastgroup == "rest":
                rest = True
                continue
            part = _part(token, env)
            if isinstance(part, bytes) and parts and isinstance(parts[-1], bytes):
                parts[-1] += part
            elif part:
                parts.append(part)
        if not parts and not rest:
            raise TemplateError("the template is empty; write a key, such as `shop:user:{id}`", 0)
        return cls(text, tuple(parts), rest)

    @classmethod
    def of(cls, parts: Iterable[bytes | Param]) -> Self:
        """Make a template of parts, for what no file writes down."""
        joined: list[bytes | Param] = []
        for part in parts:
            if isinstance(part, bytes) and joined and isinstance(joined[-1], bytes):
                joined[-1] += part
            else:
                joined.append(part)
        return cls("", tuple(joined))

    @property
    def params(self) -> tuple[str, ...]:
        """The names of the parameters, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for param in self._occurrences for name in param.names))

    @property
    def prefix(self) -> bytes:
        """The literal text up to the first parameter: what a log line may show of a key."""
        return self.parts[0] if self.parts and isinstance(self.parts[0], bytes) else b""

    @property
    def hash_tag(self) -> tuple[bytes | Param, ...]:
        """The hash tag (``user:{{{id}}}:name``), by which Redis Cluster keeps keys in one hash slot; empty for none.

        Redis hashes the text between the first ``{`` and the first ``}`` after it, if there is any; so a value that is
        empty, or holds braces itself, may still leave a key without one.
        """
        tag: list[bytes | Param] = []
        inside = False
        for part in self.parts:
            if isinstance(part, Param):
                if inside:
                    tag.append(part)
                continue
            text = part
            if not inside:
                _, opened, text = part.partition(b"{")
                inside = bool(opened)
            if inside:
                text, closed, _ = text.partition(b"}")
                tag += [text] if text else []
                if closed:
                    return tuple(tag)
        return ()

    def glob(self) -> bytes:
        r"""Return the pattern for ``SCAN … MATCH`` that finds every key of this template.

        A parameter is ``*``, however many stand side by side. Redis reads ``* ? [ ] \`` and, inside brackets, ``^ -``;
        a backslash makes any character literal (stringmatchlen in Redis' util.c).
        """
        pattern = b""
        before: bytes | Param = b""
        for part in self.parts:
            if isinstance(part, bytes):
                pattern += escape_glob(part)
            elif isinstance(before, bytes):
                pattern += b"*"
            before = part
        return pattern + b"*" if self.rest and isinstance(before, bytes) else pattern

    def like(self) -> re.Pattern[bytes]:
        """Return the regular expression that finds what `glob` finds."""
        parts = [re.escape(part) if isinstance(part, bytes) else b".*" for part in self.parts]
        return re.compile(b"".join(parts) + (b".*" if self.rest else b""), re.DOTALL)

    def compile(self, index: Mapping[str, int]) -> MakeKey:
        """Return a function from a row to its key, or to None where a parameter is NULL.

        The function runs for each row, so each usual shape has its own; bytes formatting does the rest.

        Args:
            index: the position in the row of each parameter's value.

        Raises:
            KeyError: a parameter is not in ``index``.
        """
        params = self._occurrences
        form = b"".join(b"%b" if isinstance(part, Param) else part.replace(b"%", b"%%") for part in self.parts)
        if any(param.filters for param in params):
            return _filtered(form, [param.maker(index) for param in params])
        at = [index[param.name] for param in params]
        if len(at) > 2:
            return _of_many(form, at)
        return (_of_none, _of_one, _of_two)[len(at)](form, *at)

    def plain(self, index: Mapping[str, int]) -> tuple[list[bytes], list[int]] | None:
        """Return what `compile` needs in two lists: the literals around the values, and the values' positions.

        ``None`` where a filter changes a value.

        Raises:
            KeyError: a parameter is not in ``index``.
        """
        literals, places = [b""], []
        for part in self.parts:
            if isinstance(part, bytes):
                literals[-1] = part
            elif part.filters:
                return None
            else:
                places.append(index[part.name])
                literals.append(b"")
        return literals, places

    def render(self, values: Mapping[str, str | bytes | None]) -> bytes | None:
        """Return the key for values by name, or None where one is NULL; `compile` is for the stream of rows.

        Raises:
            KeyError: a parameter is not in ``values``.
        """
        params = self.params
        row = [_as_bytes(values[name]) for name in params]
        return self.compile({name: position for position, name in enumerate(params)})(row)

    def match(self, key: bytes) -> dict[str, bytes] | None:
        """Return the parameters of a key, or None if the key is not of this template.

        Where a key can be read in several ways, each parameter is as short as can be and the last one takes the rest.
        A filter cannot be undone: its parameter reads as the filtered text, unless the template has it unfiltered too.
        A text that is put together reads as its hash, by the name of that parameter.
        The rest of a key is given as ``*``.
        """
        groups: dict[Param, str] = {}
        parts = (*self.parts, Param("*")) if self.rest else self.parts
        last = len(parts) - 1 if isinstance(parts[-1], Param) else len(parts) - 2
        pattern = b"".join(_regex(part, groups, greedy=at >= last) for at, part in enumerate(parts))
        found = re.fullmatch(pattern, key, re.DOTALL)
        if found is None:
            return None
        plain_last = sorted(groups, key=lambda param: not param.filters)
        return {param.name: found[groups[param]] for param in plain_last}

    def reader(self) -> Callable[[bytes], dict[Param, bytes] | None]:
        """Return a function from a key to its parameters, after their filters.

        It gives None where the key is not of this template, or can be read in several ways. Two of these are compared:
        the one with the shortest first parameter, then second, and so on, and the one with the longest.
        """
        patterns = []
        groups: dict[Param, str] = {}
        for greedy in (False, True):
            groups = {}
            parts = [_regex(part, groups, greedy=greedy) for part in self.parts]
            patterns.append(re.compile(b"".join(parts), re.DOTALL))

        def read(key: bytes) -> dict[Param, bytes] | None:
            shortest, longest = (pattern.fullmatch(key) for pattern in patterns)
            if shortest is None or longest is None or shortest.groups() != longest.groups():
                return None
            return {param: shortest[name] for param, name in groups.items()}

        return read

    @property
    def _occurrences(self) -> list[Param]:
        return [part for part in self.parts if isinstance(part, Param)]


# ── From a row to a key ──────────────────────────────────────────────────────────────────────────────────────────────


def _of_none(form: bytes) -> MakeKey:
    key = form % ()
    return lambda _row: key


def _of_one(form: bytes, at: int) -> MakeKey:
    def make_key(row: Sequence[bytes | None]) -> bytes | None:
        value = row[at]
        return None if value is None else form % value

    return make_key


def _of_two(form: bytes, first_at: int, second_at: int) -> MakeKey:
    def make_key(row: Sequence[bytes | None]) -> bytes | None:
        first = row[first_at]
        second = row[second_at]
        return None if first is None or second is None else form % (first, second)

    return make_key


def _of_many(form: bytes, at: Sequence[int]) -> MakeKey:
    pick = itemgetter(*at)

    def make_key(row: Sequence[bytes | None]) -> bytes | None:
        values = pick(row)
        return None if None in values else form % values

    return make_key


def _filtered(form: bytes, makers: Sequence[MakeKey]) -> MakeKey:
    def make_key(row: Sequence[bytes | None]) -> bytes | None:
        values = [make(row) for make in makers]
        return None if None in values else form % tuple(values)

    return make_key


def _as_bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


# ── From a key to its parameters, and to a pattern ───────────────────────────────────────────────────────────────────

_GLOB = re.compile(rb"[*?\[\]\\^]")


def escape_glob(text: bytes) -> bytes:
    """Return the pattern for ``SCAN … MATCH`` that finds this text alone."""
    return _GLOB.sub(rb"\\\g<0>", text)


def _regex(part: bytes | Param, groups: dict[Param, str], *, greedy: bool) -> bytes:
    """Return the regular expression of one part; a parameter that came before must have the same value again.

    Groups are named by number, because a parameter's name may be any Unicode identifier and a group's name may not.
    """
    if isinstance(part, bytes):
        return re.escape(part)
    if part in groups:
        return b"(?P=%b)" % groups[part].encode()
    groups[part] = f"g{len(groups)}"
    if part.filters and part.filters[-1] in HASHES:
        return b"(?P<%b>[0-9a-f]{%d})" % (groups[part].encode(), HASHES[part.filters[-1]])
    return b"(?P<%b>.*%b)" % (groups[part].encode(), b"" if greedy else b"?")


# ── From text to parts ───────────────────────────────────────────────────────────────────────────────────────────────

# Every character is part of exactly one token. `${{` is a dollar sign before a literal brace.
_TOKEN = re.compile(
    r"""
      (?P<doubled> \{\{ | \}\} | \*\* | \?\? | \[\[ | \]\] )
    | \$\{ (?!\{) (?P<env> [^{}]* ) \}
    | \{ (?P<param> [^{}]* ) \}
    | (?P<rest> \* \Z )
    | (?P<wrong> \$\{ (?!\{) | [{}*?\[\]] )
    | (?P<text> [^{}$*?\[\]]+ | \$ )
    """,
    re.VERBOSE,
)
_ENV = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_WRONG = {
    "${": "`${` is not closed; write `${NAME}` or `${NAME:-default}`, with no brace in the default",
    "{": "`{` opens no parameter; write `{name}`, or `{{` for the brace itself",
    "}": "`}` closes no parameter; write `}}` for the brace itself",
    "*": "a `*` stands for the rest of a key, at its end only; write `**` for the sign itself, or a parameter",
    "?": "a key is no pattern, so `?` matches nothing; write `??` for the sign itself, or a parameter",
    "[": "a key is no pattern, so `[` opens nothing; write `[[` for the sign itself, or a parameter",
    "]": "a key is no pattern, so `]` closes nothing; write `]]` for the sign itself, or a parameter",
}


def _part(token: re.Match[str], env: Mapping[str, str]) -> bytes | Param:
    """Return a token as a part: a parameter, or a literal, which is empty if a variable is."""
    text, offset = token[0], token.start()
    match token.lastgroup:
        case "text":
            for at, character in enumerate(text):
                _refuse_unprintable(character, "the template", offset + at)
            return text.encode()
        case "doubled":
            return text[0].encode()
        case "env":
            return _expand(token["env"], env, offset)
        case "param":
            return _param(token["param"], offset)
        case _:
            raise TemplateError(_WRONG[text], offset)


def _expand(reference: str, env: Mapping[str, str], offset: int) -> bytes:
    found = _ENV.fullmatch(reference)
    if found is None:
        raise TemplateError(
            "`${…}` does not hold a name of an environment variable; write `${NAME}` or `${NAME:-default}`", offset
        )
    name, default = found[1], found[2]
    value = env.get(name) if default is None else env.get(name) or default
    if value is None:
        raise TemplateError(
            f"the environment variable `{name}` is not set; set it, or give a default: `${{{name}:-default}}`", offset
        )
    for character in value:
        _refuse_unprintable(character, f"the value of `${{{name}}}`", offset)
    return value.encode()


# A parameter: what stands before its filters, where a quoted text may hold any sign but braces; and the pieces of that.
_BEFORE_FILTERS = re.compile(r"""(?:[^|"']|"[^"]*"|'[^']*')*""")
_PIECES = re.compile(r"""(?P<name>[^\W\d]\w*)|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<blank>\ +)|(?P<wrong>.)""")


def _param(content: str, offset: int) -> Param:
    found = _BEFORE_FILTERS.match(content)
    before = found[0] if found else ""
    after = content[len(before) :]
    parts = () if before.isidentifier() else _pieces(before, offset)
    if (after and after[0] != "|") or not (before.isidentifier() or any(isinstance(part, Param) for part in parts)):
        raise TemplateError(
            "`{…}` does not hold a parameter's name; write `{name}` or `{name|filter}`, without blanks,"
            " or `{{` for the brace itself",
            offset,
        )
    filters = after.split("|")[1:]
    at = offset + 1 + len(before) + 1
    for filter_name in filters:
        if filter_name not in FILTERS:
            remedy = nearest(filter_name, FILTERS, f"there are {', '.join(FILTERS)}")
            raise TemplateError(f"there is no filter {shown(filter_name)}; {remedy}", at)
        at += len(filter_name) + 1
    if not parts:
        return Param(before, tuple(filters))
    param = Param(_written(parts), tuple(filters), parts)
    if not param.hashed:
        suffix = "".join(f"|{name}" for name in filters)
        outside = "".join(f"{{{part.name}{suffix}}}" if isinstance(part, Param) else part.decode() for part in parts)
        raise TemplateError(
            f"a text is put together in `{{…}}` only for a hash, such as `|sha256`; write it outside: {shown(outside)}",
            offset,
        )
    return param


def _pieces(text: str, offset: int) -> tuple[bytes | Param, ...]:
    """Return the literals and parameters that stand side by side in a parameter; none if there is something else."""
    parts: list[bytes | Param] = []
    for piece in _PIECES.finditer(text):
        if piece["wrong"] or (piece["name"] and not piece["name"].isidentifier()) or text != text.strip():
            return ()
        if piece["name"]:
            parts.append(Param(piece["name"]))
        elif not piece["blank"]:
            literal = piece[0][1:-1]
            for at, character in enumerate(literal):
                if character != " ":
                    _refuse_unprintable(character, "the template", offset + 1 + piece.start() + 1 + at)
            parts.append(literal.encode())
    return tuple(parts)


def _written(parts: Sequence[bytes | Param]) -> str:
    """Return how parts that stand side by side are written."""
    texts = (part.name if isinstance(part, Param) else part.decode() for part in parts)
    quotes = ("" if isinstance(part, Param) else "'" if b'"' in part else '"' for part in parts)
    return " ".join(f"{quote}{text}{quote}" for text, quote in zip(texts, quotes, strict=True))


def _refuse_unprintable(character: str, where: str, offset: int) -> None:
    if character.isspace() or unicodedata.category(character) in {"Cc", "Cs"}:
        raise TemplateError(
            f"{where} holds white space or a control character (U+{ord(character):04X}); remove it", offset
        )
