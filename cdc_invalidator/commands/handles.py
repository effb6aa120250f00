"""Writes a Python module that tells type checkers of each cache and its parameters, for readers.

At runtime the module's `Caches` are those of `reader`. For type checkers they have an attribute for each cache, whose
methods take the parameters of that cache. The methods are those of `reader`, as their own annotations tell them.

The module notes the types that it was made of. So without a database it can be made again, and compared.
"""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import inspect
import json
import keyword
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cdc_invalidator.postgres.connection import connect
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.parameters import Types, parameter_types
from cdc_invalidator.reader import aio, sync
from cdc_invalidator.reader.handle import identifier
from cdc_invalidator.reader.keys import Keys
from cdc_invalidator.rules.model import Cache, RuleSet

_TYPES = "# types: "
_ANYTHING = "Parameter"
_SHELLS: tuple[tuple[ModuleType, str], ...] = ((sync, ""), (aio, "Async"))


async def types_of(dsn: DsnSource, rules: RuleSet) -> Types:
    """Ask the database for the types of parameters.

    Raises:
        errors.InvalidatorError: the database can't be asked.
    """
    async with await connect(dsn, "cdc-invalidator handles", {"default_transaction_read_only": "on"}) as connection:
        return await parameter_types(connection, rules)


def noted_types(file: Path | None) -> Types:
    """Return the types that a module was made of; none if there is no such module."""
    if file is None or not file.exists():
        return {}
    noted = [line.removeprefix(_TYPES) for line in file.read_text().splitlines() if line.startswith(_TYPES)]
    found: Any = {}
    with contextlib.suppress(ValueError):
        found = json.loads(noted[0]) if noted else {}
    return found if isinstance(found, dict) else {}


def module(rules: RuleSet, types: Mapping[str, Mapping[str, str | None]]) -> str:
    """Return the text of the module.

    Args:
        rules: the rules.
        types: by cache and parameter, as `parameter_types` tells them.
    """
    caches = [_Handle.of(cache, types.get(name, {})) for name, cache in _readable(rules).items()]
    _name_classes(caches)
    noted = {each.cache.name: {name: each.told[name] for name in each.names if each.told.get(name)} for each in caches}
    written = _Writer()
    body = [line for each in caches for line in written.parameters(each)]
    for shell, prefix in _SHELLS:
        body += [line for each in caches if each.by_name for line in _decorator(each, prefix)]
        body += [line for each in caches for line in written.handle(each, shell, prefix)]
        body += written.caches(caches, shell, prefix)
    classes = [f"{prefix}{each.title}Cache" for each in caches for _, prefix in _SHELLS]
    return "\n".join(
        [
            *_HEAD,
            _TYPES + json.dumps(noted, sort_keys=True),
            "# fmt: off",
            "# ruff: noqa",
            '# mypy: disable-error-code="assignment, misc, no-overload-impl, override"',
            "# pyright: basic",
            "# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false",
            "# pyright: reportNoOverloadImplementation=false",
            "",
            "from __future__ import annotations",
            "",
            "from typing import TYPE_CHECKING",
            "",
            "from cdc_invalidator import reader as _reader",
            "",
            "if TYPE_CHECKING:",
            *written.imports(body),
            "",
            *(f"    {line}".rstrip() for line in body),
            "else:",
            "    Caches, AsyncCaches = _reader.Caches, _reader.AsyncCaches",
            *(f"    {name} = _reader.{'Async' * name.startswith('Async')}Cache" for name in classes),
            "",
            f"__all__ = {json.dumps(sorted(['AsyncCaches', 'Caches', *classes]))}",
            "",
        ]
    )


_HEAD = (
    '"""The caches of the rule files, for type checkers: each with its parameters and their types.',
    "",
    "Made by `cdc-invalidator handles`; make it again when the rule files change.",
    '"""',
    "",
)


# ── Names and types ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Handle:
    """A cache as the module has it.

    ``names``: its parameters. ``told``: their types, as the database tells them. ``title``: what the names of its
    classes begin with.
    """

    cache: Cache
    names: Sequence[str]
    told: Mapping[str, str | None]
    title: str = ""

    @classmethod
    def of(cls, cache: Cache, told: Mapping[str, str | None]) -> _Handle:
        return cls(cache, Keys(cache).names, told)

    def type(self, name: str) -> str:
        """Return a parameter's type in Python."""
        return _python(self.told.get(name))

    @property
    def by_name(self) -> bool:
        """Whether parameters can be written by name."""
        return not any(name in _TAKEN or not _is_name(name) for name in self.names)

    @property
    def item(self) -> str:
        """The type of an item of `get_many`."""
        return self.type(self.names[0]) if len(self.names) == 1 else f"{self.title}Parameters"


def _readable(rules: RuleSet) -> Mapping[str, Cache]:
    """Return the caches that `reader` can read."""
    found = {}
    for name, cache in rules.caches.items():
        with contextlib.suppress(ValueError):
            Keys(cache)
            found[name] = cache
    return found


def _name_classes(caches: Sequence[_Handle]) -> None:
    taken: set[str] = set()
    for each in caches:
        words = "".join(word[:1].upper() + word[1:] for word in re.split(r"\W|_", each.cache.name) if word)
        title = words if _is_name(words) else f"Cache{words}"
        numbers = (f"{title}{number or ''}" for number in [0, *range(2, len(caches) + 2)])
        each.title = next(name for name in numbers if name not in taken)
        taken.add(each.title)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


_PYTHON = {
    **dict.fromkeys(("smallint", "integer", "bigint"), "int"),
    **dict.fromkeys(("text", "character varying", "character", "enum", "name", "citext"), "str"),
    "uuid": "uuid.UUID",
    "boolean": "bool",
    "date": "datetime.date",
    "numeric": "decimal.Decimal",
    "bytea": "bytes",
    "timestamp with time zone": "datetime.datetime",
    "timestamp without time zone": "datetime.datetime",
}


def _python(told: str | None) -> str:
    """Return the type in Python of a type of PostgreSQL, as `postgres.parameters` tells it."""
    plain = re.sub(r"\([0-9,-]*\)|, nondeterministic", "", told or "")
    return _PYTHON.get(plain, _ANYTHING)


# ── Methods, as their annotations tell them ──────────────────────────────────────────────────────────────────────────


def _own(kind: Any) -> Iterator[tuple[str, inspect.Signature]]:
    """Give the public methods of a class that have no overloads, with annotations as text."""
    for name, found in vars(kind).items():
        if inspect.isfunction(found) and not name.startswith("_") and not typing.get_overloads(inspect.unwrap(found)):
            yield name, inspect.signature(found)


# Arguments that a parameter of the same name would collide with.
_TAKEN = {
    argument
    for shell, prefix in _SHELLS
    for _, signature in _own(vars(shell)[f"{prefix}Cache"])
    for argument in signature.parameters
}


def _decorator(of: _Handle, prefix: str) -> list[str]:
    """Return the class of what decorates functions that take a cache's parameters.

    With options, arguments may have other names, so that there it is that of `reader`.
    """
    own = f"{prefix}{of.title}Decorator"
    options = "params: Mapping[str, str] | None = ..., primary: Callable[..., Any] | None = ..."
    lines = [f"class {own}(Protocol[V_contra]):"]
    for ignore, back in (("", "Decorator"), ("ignore: Collection[str], ", "DecoratorIgnoring")):
        given = f"function: None = ..., /, *, {ignore}{options}"
        lines += ["    @overload", f"    def __call__(self, {given}) -> decorated.{prefix}{back}[V_contra]: ..."]
    for this, value in ((f"self: {own}[decorated.Untyped]", "R"), ("self", "V_contra"), ("self", "V_contra | None")):
        loaded = f"Awaitable[{value}]" if prefix else value
        given, back = f"function: {of.title}Function[P, {loaded}]", f"decorated.{prefix}CachedFunction[P, {value}]"
        lines += ["    @overload", f"    def __call__({this}, {given}, /) -> {back}: ..."]
    return [*lines, ""]


class _Writer:
    """Writes the classes, and notes what has to be imported."""

    def __init__(self) -> None:
        self._abstract: set[str] = set()
        self._typing = {"Any", "Literal", "ParamSpec", "Protocol", "TypeVar", "TypedDict", "Unpack", "overload"}

    def imports(self, body: Sequence[str]) -> list[str]:
        """Return the import statements that the body needs, and the type variables."""
        variables = [
            'P = ParamSpec("P")',
            'R = TypeVar("R")',
            'T = TypeVar("T")',
            'V_co = TypeVar("V_co", covariant=True)',
            'V_contra = TypeVar("V_contra", contravariant=True)',
        ]
        # A parameter may be called as a module; what stands in quotes is no name.
        text = re.sub(r"\"[^\"]*\"", "", "\n".join([*variables, *body]))
        used = {*re.findall(r"\b\w+\b(?!:)", text)}
        places: Mapping[str, Iterable[str]] = {
            "collections.abc": {*self._abstract, "Awaitable", "Callable", "Collection", "Mapping"},
            "contextlib": ("AbstractAsyncContextManager", "AbstractContextManager"),
            "typing": self._typing,
            "cdc_invalidator.reader": ("Aged", "Parameter", "Serializer", "aio", "decorated", "sync"),
            "cdc_invalidator.reader.options": ("Changes",),
        }
        lines = [f"import {name}" for name in ("datetime", "decimal", "uuid") if f"{name}." in text]
        for place, names in places.items():
            needed = sorted(used.intersection(names))
            lines += [f"from {place} import {', '.join(needed)}"] if needed else []
        return [f"    {line}" for line in (*lines, *variables)]

    def parameters(self, of: _Handle) -> list[str]:
        """Return the types of a cache's parameters and its loaders."""
        fields = ", ".join(f'"{name}": {of.type(name)}' for name in of.names)
        lines = [f'{of.title}Parameters = TypedDict("{of.title}Parameters", {{{fields}}})']
        if of.by_name:
            loaded = ((name, of.type(name)) for name in of.names)
            # A loader need not take what nobody knows to be passed.
            keywords = "".join(f", {name}: {'Any' if kind == _ANYTHING else kind}" for name, kind in loaded)
            star = ", *" if keywords else ""
            lines += ["", f"class {of.title}Load(Protocol[V_co]):"]
            lines += [f"    def __call__(self{star}{keywords}) -> V_co: ..."]
            # What is decorated can be called like this, and in its own way.
            lines += ["", f"class {of.title}Function(Protocol[P, V_co]):"]
            lines += ["    @overload", f"    def __call__(self{star}{keywords}) -> V_co: ..."]
            lines += ["    @overload", "    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> V_co: ..."]
        return [*lines, ""]

    def handle(self, of: _Handle, shell: ModuleType, prefix: str) -> list[str]:
        """Return the class of a cache."""
        own = f"{prefix}{of.title}Cache"
        lines = [f"class {own}(_reader.{prefix}Cache[T]):"]
        for name, signature in _own(vars(shell)[f"{prefix}Cache"]):
            if any(argument in signature.parameters for argument in ("named", "items")):
                lines.append(self._method(name, signature, of, vars(shell)[f"{prefix}Cache"], shell))
        if of.by_name:
            lines += ["    @property", f"    def cached(self) -> {prefix}{of.title}Decorator[T]: ..."]
        return [
            *lines,
            "    @overload",
            f"    def using(self, *, serializer: Serializer[R], **options: Unpack[Changes]) -> {own}[R]: ...",
            "    @overload",
            f"    def using(self, **options: Unpack[Changes]) -> {own}[T]: ...",
            "    @overload",
            f"    def of(self, kind: type[R], /) -> {own}[R]: ...",
            "    @overload",
            f"    def of(self, kind: object, /) -> {own}[Any]: ...",
            "",
        ]

    def caches(self, every: Sequence[_Handle], shell: ModuleType, prefix: str) -> list[str]:
        """Return the class of all caches."""
        kind = vars(shell)[f"{prefix}Caches"]
        lines = [f"class {prefix}Caches(_reader.{prefix}Caches):", "    __getattr__: None"]
        names: dict[str, _Handle] = {}
        for each in every:
            names.setdefault(identifier(each.cache.name), each)
        for name, each in names.items():
            if _is_name(name) and not hasattr(kind, name):
                lines += ["    @property", f"    def {name}(self) -> {prefix}{each.title}Cache[Any]: ..."]
        for each in every:
            lines += ["    @overload"] if len(every) > 1 else []
            literal = f"Literal[{json.dumps(each.cache.name)}]"
            lines += [f"    def __getitem__(self, name: {literal}) -> {prefix}{each.title}Cache[Any]: ..."]
        literal = f"Literal[{', '.join(json.dumps(each.cache.name) for each in every)}]"
        for name, signature in _own(kind):
            if "names" in signature.parameters:
                given = [
                    each.replace(annotation=literal) if each.name == "names" else each
                    for each in signature.parameters.values()
                ]
                lines.append(self._written(name, signature.replace(parameters=given), kind, shell))
        return [*lines, ""]

    def _method(self, name: str, signature: inspect.Signature, of: _Handle, kind: Any, shell: ModuleType) -> str:
        """Return a method with the parameters of a cache in place of any."""
        given = []
        for each in signature.parameters.values():
            if each.name == "params":
                if not of.by_name:
                    positional = inspect.Parameter(
                        "params", inspect.Parameter.POSITIONAL_ONLY, annotation=f"{of.title}Parameters"
                    )
                    given.append(positional)
            elif each.name == "named":
                if of.by_name:
                    given += [
                        inspect.Parameter(own, inspect.Parameter.KEYWORD_ONLY, annotation=of.type(own))
                        for own in of.names
                    ]
            elif each.name == "items":
                given.append(each.replace(annotation=each.annotation.replace("Any", of.item)))
            elif each.name == "load":
                text = each.annotation.replace("[list[Any]]", f"[list[{of.item}]]")
                given.append(each.replace(annotation=_loader(text, of) if of.by_name else text))
            else:
                given.append(each)
        return self._written(name, signature.replace(parameters=given), kind, shell)

    def _written(self, name: str, signature: inspect.Signature, kind: Any, shell: ModuleType) -> str:
        found = inspect.unwrap(vars(kind)[name])
        awaited = "async " if inspect.iscoroutinefunction(found) else ""
        parameters = [
            each.replace(annotation=_Text(self._named(str(each.annotation), shell)), default=_shown(each.default))
            if each.annotation is not each.empty
            else each
            for each in signature.parameters.values()
        ]
        back = re.sub(
            r"^(Async)?Iterator\[", lambda m: f"Abstract{m[1] or ''}ContextManager[", str(signature.return_annotation)
        )
        shown = signature.replace(parameters=parameters, return_annotation=_Text(self._named(back, shell)))
        return f"    {awaited}def {name}{shown}: ..."

    def _named(self, annotation: str, shell: ModuleType) -> str:
        """Return an annotation whose names the module knows."""
        # What stands in quotes, or behind a dot, is no name.
        return re.sub(r"\"[^\"]*\"|(?<![\w.])[A-Za-z_]\w*", lambda found: self._known(found[0], shell), annotation)

    def _known(self, name: str, shell: ModuleType) -> str:
        if name in {"T", "R", "None", "AbstractContextManager", "AbstractAsyncContextManager"} or name[0] == '"':
            return name
        if hasattr(builtins, name):
            return name
        if hasattr(collections.abc, name):
            self._abstract.add(name)
        elif hasattr(typing, name):
            self._typing.add(name)
        elif name in vars(shell) and getattr(vars(shell)[name], "__module__", shell.__name__) in _ALIASES | {
            shell.__name__
        }:
            return f"{shell.__name__.rpartition('.')[2]}.{name}"
        return name


# Where an alias of a generic type says that it comes from.
_ALIASES = {"typing", "types"}


class _Text(str):
    """An annotation that is printed as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _shown(default: Any) -> Any:
    """Return a default as a stub shows it."""
    return default if default is inspect.Parameter.empty or default is None else _Text("...")


def _loader(annotation: str, of: _Handle) -> str:
    """Return the type of a loader that is called with a cache's parameters."""
    return annotation.replace("Callable[..., ", f"{of.title}Load[")
