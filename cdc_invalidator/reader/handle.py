"""What `sync` and `aio` share that does no I/O: finding caches, options, arguments of callers."""

from __future__ import annotations

import functools
import inspect
import reprlib
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cdc_invalidator.reader.agreement import Agreement
from cdc_invalidator.reader.clients import Target
from cdc_invalidator.reader.contract import Contract
from cdc_invalidator.reader.entry import Entry
from cdc_invalidator.reader.flights import Flights
from cdc_invalidator.reader.freshness import Demand
from cdc_invalidator.reader.local import Local
from cdc_invalidator.reader.marks import Marks
from cdc_invalidator.reader.memory import AsyncMemory, Memory
from cdc_invalidator.reader.metrics import Metrics, no_metrics
from cdc_invalidator.reader.options import Options
from cdc_invalidator.reader.own_writes import in_request, required
from cdc_invalidator.reader.spelling import NoKey
from cdc_invalidator.reader.steps import word
from cdc_invalidator.reader.tracing import Tracing
from cdc_invalidator.reader.transactions import is_connection
from cdc_invalidator.reader.world import Clocks, World
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.model import DEFAULT_VERSION_TTL, Cache
from cdc_invalidator.rules.template import Template
from cdc_invalidator.rules.wording import nearest

if TYPE_CHECKING:
    from cdc_invalidator.reader.steps import Command


class Book:
    """The caches of a rule set, each as a `Contract`; all views of one `Caches` share it.

    Args:
        caches: by name; ``None`` where no rule file says which there are.
        world: what their contracts share.
        metrics: what to count, if anything.
        options: how they are read, unless said otherwise.
    """

    def __init__(
        self, caches: Mapping[str, Cache] | None, world: World, metrics: Metrics | None, options: Options[Any]
    ) -> None:
        self._caches = caches
        self._world = world
        self._metrics = metrics
        self._options = options
        self._contracts: dict[str, Contract[Any]] = {}

    def contract(self, name: str) -> Contract[Any]:
        """Return the contract of a cache; its name may be written with ``_`` for ``-`` and ``.``.

        Raises:
            KeyError: there is no such cache; the message is a sentence.
            ValueError: it can't be read by this library as it is.
        """
        contract = self._contracts.get(name)
        if contract is None:
            contract = self._contracts[name] = self._make(name)
        return contract

    def begin_anew(self) -> None:
        """Forget which keys were stored, and what the daemon has said."""
        self._world.agreement.again()
        for contract in self._contracts.values():
            if contract.space is not None:
                contract.space.clear()

    def _make(self, name: str) -> Contract[Any]:
        if self._caches is None:
            return self._contract(_unknown(name))
        names = [known for known in self._caches if name in {known, identifier(known)}]
        if name in names:
            names = [name]
        if len(names) != 1:
            remedy = f"write one of {', '.join(names)} in brackets" if names else nearest(name, self._caches)
            raise KeyError(f"there is no cache {name}; {remedy}")
        if names[0] != name:
            return self.contract(names[0])
        return self._contract(self._caches[name])

    def _contract(self, cache: Cache) -> Contract[Any]:
        metrics = self._metrics.of(cache.name) if self._metrics is not None else no_metrics()
        if self._world.tracing is not None:
            metrics = self._world.tracing.told(metrics)
        return Contract(cache, self._options, self._world, metrics)


def _unknown(name: str) -> Cache:
    """Return a cache of which only the name is known, and no key."""
    return Cache(name, Template.of(()), None, DEFAULT_VERSION_TTL, ttl=1, jitter=0, ttl_only=False, digest="")


def identifier(name: str) -> str:
    """Return a cache's name as an attribute."""
    return name.replace("-", "_").replace(".", "_")


def read_caches(path: str | Path, env: Mapping[str, str]) -> Mapping[str, Cache]:
    """Read the caches of a rule file or a directory of them.

    Raises:
        errors.WrongRules: all mistakes of all files.
    """
    return load_rules(Path(path), env, conditions=False).caches


def other_options(contract: Contract[Any], changes: Mapping[str, Any]) -> Contract[Any]:
    """Return the same cache with other options."""
    return Contract(
        contract.cache, replace(contract.options, **changes), contract.world, contract.metrics, contract.space
    )


def demanded(base: Demand, max_staleness: float | None) -> Demand:
    """Return the freshness that one call asks for, also by what its visitor has written."""
    lsn = required()
    if lsn > base.lsn:
        base = base._replace(lsn=lsn)
    return base if max_staleness is None else base._replace(max_age=int(max_staleness * 1000))


def require_primary(contract: Contract[Any], base: Demand, max_staleness: float | None, primary: Any) -> None:
    """Check that a read that asks for a freshness has what to load it by, where values come from a standby.

    Raises:
        TypeError: it has not.
    """
    if primary is None and contract.world.standby and (in_request() or demanded(base, max_staleness) != (0, None)):
        raise TypeError(
            f"cache {contract.cache.name} is loaded from the standby {contract.world.standby}, which may lag "
            "behind what is asked for; give this read primary=, a loader that reads from the primary"
        )


class Group(NamedTuple):
    """The items of a `get_many`: the entries, each key once, and in ``order`` the entry of each item.

    ``beside``: those without a key.
    """

    entries: list[Entry]
    beside: dict[str, list[Entry]]
    order: list[Entry]


# Types whose values are no mappings, as most have; others are asked, which takes longer.
_BARE = frozenset({int, str, uuid.UUID})


def group(contract: Contract[Any], items: Iterable[Any]) -> Group:
    """Make entries of items: mappings, or bare values where the cache has one parameter.

    Raises:
        TypeError: an item is not of this cache.
    """
    entries: dict[tuple[bytes, bytes], Entry] = {}
    beside: dict[str, list[Entry]] = {}
    order = []
    names = contract.keys.names
    single = names[0] if names is not None and len(names) == 1 else None
    for item in items:
        params = {single: item} if single is not None and type(item) in _BARE else as_params(contract, item)
        try:
            entry = contract.entry(item, params)
            # A version may have parameters that the key lacks.
            entry = entries.setdefault((entry.rest, entry.version_key), entry)
        except NoKey as no:
            entry = Entry(item, params, b"")
            beside.setdefault(no.reason, []).append(entry)
        order.append(entry)
    return Group(list(entries.values()), beside, order)


class Kept:
    """What the process's own memory does for the entries of a `get_many`.

    ``missing``: the entries that it does not have; `keep` what a look has found of them since.
    """

    def __init__(self, contract: Contract[Any], local: Local, entries: Sequence[Entry]) -> None:
        self._contract = contract
        self._local = local
        found = local.get_many([entry.key for entry in entries], time.monotonic())
        self.missing = contract.take_local(entries, found)
        self._token = local.ask(*[entry.key for entry in self.missing])

    def keep(self) -> None:
        """Keep what was found in Redis, as far as it is still right."""
        for entry in self.missing:
            # An old value that was served is none of the key's.
            seen = entry.seen if type(entry.seen) is bytes and not entry.saved else None
            until = 0.0 if seen is None else self._contract.kept_until(seen)
            self._local.keep(entry.key, self._token, seen, until)


def by_name(contract: Contract[Any], params: Any) -> Mapping[str, Any]:
    """Return the parameters that were given as a mapping.

    Raises:
        TypeError: it is none.
    """
    if type(params) is dict or isinstance(params, Mapping):
        return params
    names = contract.keys.names or ("id",)
    given = reprlib.repr(params) if len(names) == 1 else "…"
    remedy = ", ".join(f"{name}={given}" for name in names)
    raise TypeError(f"parameters of cache {contract.cache.name} are passed by name; write {remedy}")


def as_params(contract: Contract[Any], item: Any) -> Mapping[str, Any]:
    """Return an item's parameters."""
    if isinstance(item, Mapping):
        return item
    names = contract.keys.names
    if names is None:
        return {}
    if len(names) != 1:
        raise TypeError(
            f"cache {contract.cache.name} has the parameters {', '.join(names) or 'none'}; give mappings of them"
        )
    return {names[0]: item}


def keyed(contract: Contract[Any], items: Iterable[Any]) -> Iterator[Entry]:
    """Make entries one by one; items without a key are left out."""
    for item in items:
        try:
            yield contract.entry(item, as_params(contract, item))
        except NoKey as no:
            contract.metrics.bypasses(no.reason)


def in_order(items: Sequence[Any], answer: Any) -> Sequence[Any]:
    """Return what a loader of many returned, in the order of the items.

    Raises:
        TypeError: it is neither a mapping from items to values nor a sequence of the same length.
    """
    if isinstance(answer, Mapping):
        if any(isinstance(item, Mapping) for item in items):
            raise TypeError("a loader that is given mappings gives a list of values, in the same order")
        # Else a loader that is asked for text and answers with UUIDs would say of each row that there is none.
        asked = set(items)
        foreign = [key for key in answer if key not in asked]
        if foreign:
            raise TypeError(
                f"a loader that is asked for items of type {_types(items)} gives a mapping with a key of type "
                f"{_types(foreign)} that was not asked for; use the items as keys, as they were given, or give a list "
                "of values in the same order"
            )
        return [answer.get(item) for item in items]
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence) or len(answer) != len(items):
        raise TypeError(
            f"a loader that is asked for {len(items)} values gives as many, in order and None where there is nothing, "
            "or a mapping"
        )
    return answer


def _types(values: Iterable[Any]) -> str:
    return " or ".join(sorted({type(value).__name__ for value in values}))


def at_hand(value: Any) -> Any:
    """Return what a loader gave to a shell that waits.

    Raises:
        TypeError: it must be awaited.
    """
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(_TO_AWAIT)
    return value


_TO_AWAIT = "the loader is a coroutine function; read through AsyncCaches, which await it"


class Cached:
    """Turns the arguments of a decorated function into parameters.

    Args:
        function: what loads.
        names: the cache's parameters; ``None`` where they are not known: all arguments but those to ignore.
        ignore: arguments that are no part of the key.
        params: for a parameter, the argument that it is, where the names differ.
        awaits: whether the shell awaits what the function returns.

    Raises:
        TypeError: they don't fit; the message is a sentence with the remedy.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        names: Sequence[str] | None,
        ignore: Collection[str],
        params: Mapping[str, str] | None,
        *,
        awaits: bool,
    ) -> None:
        if not awaits and inspect.iscoroutinefunction(function):
            raise TypeError(_TO_AWAIT)
        if isinstance(function, classmethod):
            raise TypeError(f"{function.__name__} is a class method; write @classmethod above `cached`, not below it")
        self._signature = inspect.signature(function)
        self._ignored = tuple(ignore)
        if names is None:
            names = [name for name in self._signature.parameters if name not in ignore]
        self._arguments = {name: (params or {}).get(name, name) for name in names}
        has = self._signature.parameters
        # A partial has no name.
        name = getattr(function, "__name__", type(function).__name__)
        missing = [argument for argument in self._arguments.values() if argument not in has or _is_many(has[argument])]
        if missing:
            raise TypeError(
                f"{name} has no argument {missing[0]}, which is a parameter of the cache; name one so, or say by "
                "`params=` which one it is"
            )
        extra = [argument for argument in has if argument not in {*self._arguments.values(), *ignore}]
        if extra:
            raise TypeError(
                f"the argument {extra[0]} of {name} is no parameter of the cache, so that one value would "
                f'be served for all of its values; make it one, or write ignore=["{extra[0]}"]'
            )

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the parameters of a call, and the connection among its other arguments, if there is one."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._told(bound.arguments)

    def _told(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        connection = next((given[name] for name in self._ignored if is_connection(given.get(name))), None)
        return {name: given[argument] for name, argument in self._arguments.items()}, connection

    def partly(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the same of a call that may leave out arguments that are no parameters."""
        bound = self._signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        missing = [argument for argument in self._arguments.values() if argument not in given]
        if missing:
            raise TypeError(f"the argument {missing[0]} is missing; without it, nobody knows which entry is meant")
        return self._told(given)


def _is_many(argument: inspect.Parameter) -> bool:
    return argument.kind in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def dressed(wrapper: Callable[..., Any], function: Callable[..., Any], **ways: Any) -> Any:
    """Return the wrapper with the function's name and documentation, and with ``ways`` as attributes."""
    functools.update_wrapper(wrapper, function)
    vars(wrapper).update(ways)
    return wrapper


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def unknown_scripts(
    commands: Sequence[Command], replies: Sequence[Any], texts: Mapping[bytes, str]
) -> dict[int, Command]:
    """Return, by position, the commands whose script the server did not know, now with the script's text."""
    return {
        at: ("EVAL", texts[command[1]], *command[2:])
        for at, (command, reply) in enumerate(zip(commands, replies, strict=True))
        if isinstance(reply, Exception) and word(reply) == "NOSCRIPT"
    }


def world(
    watermark: str,
    standby: str,
    target: Target | Memory | AsyncMemory,
    flights: Flights,
    *,
    disabled: bool = False,
    tracer: Any = None,
) -> World:
    """Make what caches share; a stand-in for Redis brings its own clock."""
    agreement = Agreement(watermark, disabled=disabled)
    tracing = Tracing(tracer) if tracer is not None else None
    if isinstance(target, (Memory, AsyncMemory)):
        clocks = Clocks(wall=target.store.clock)
        return World(
            *(Marks(watermark), agreement, standby), clocks=clocks, flights=flights, disabled=disabled, tracing=tracing
        )
    marks = Marks(watermark, cluster=target.cluster)
    return World(marks, agreement, standby, cluster=target.cluster, flights=flights, tracing=tracing)


def metrics_for(registry: Any) -> Metrics | None:
    """Return the metrics of a registry; a `Metrics` may be handed in as well."""
    return registry if registry is None or isinstance(registry, Metrics) else Metrics(registry)
