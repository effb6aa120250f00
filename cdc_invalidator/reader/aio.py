"""`AsyncCaches` over a client of redis.asyncio or valkey.asyncio: the shell that awaits."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, overload

from cdc_invalidator.reader import handle, transactions
from cdc_invalidator.reader.aio_servers import Cluster, Master, Server, Way, way_to
from cdc_invalidator.reader.background import AsyncCrew
from cdc_invalidator.reader.breaker import Breaker
from cdc_invalidator.reader.clients import Target, recognise
from cdc_invalidator.reader.contract import Contract
from cdc_invalidator.reader.decorated import AsyncDecorator
from cdc_invalidator.reader.entry import MISS, Entry
from cdc_invalidator.reader.flights import Flights, loading
from cdc_invalidator.reader.freshness import ANY, Demand
from cdc_invalidator.reader.leases import AsyncKeeper
from cdc_invalidator.reader.leftovers import Aged
from cdc_invalidator.reader.local import Local, Locals
from cdc_invalidator.reader.memory import AsyncMemory
from cdc_invalidator.reader.options import Changes, Options, as_options
from cdc_invalidator.reader.own_writes import required
from cdc_invalidator.reader.serializers import Serializer, serializer_of
from cdc_invalidator.reader.spelling import NoKey
from cdc_invalidator.reader.steps import Command, Later, Load, Send, Steps, Unavailable, Wait
from cdc_invalidator.reader.tracing import Tracing
from cdc_invalidator.reader.tracking import AsyncFollower
from cdc_invalidator.reader.world import World

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self, Unpack

T = TypeVar("T")
R = TypeVar("R")
Many: TypeAlias = Mapping[Any, T | None] | Sequence[T | None]
Loader = Callable[[Load], Awaitable[Sequence[Any]]]


class Link:
    """What is behind a client, in each event loop that reads."""

    def __init__(self, target: Target | AsyncMemory, breaker: Breaker, world: World, connection: Any = None) -> None:
        # Of the database; it is asked where a read names none.
        self.connection = transactions.usual(connection)
        self.locals = Locals()
        self.keeper = AsyncKeeper(self.send)
        django = self.connection if isinstance(self.connection, transactions.DjangoConnections) else None
        self.crew = AsyncCrew() if django is None else AsyncCrew(django.close)
        # Whether loaders may run in the background: what is a request's own would be used by two at once.
        self.apart = self.connection is None or django is not None
        self._target = target
        self._breaker = breaker
        self._world = world
        world.marks.node_of, world.marks.doubt = self._node_of, self._doubt
        self._stand_in: AsyncMemory | None = None
        self._loops: dict[asyncio.AbstractEventLoop, tuple[Way | AsyncMemory, Any]] = {}
        self._here: tuple[Any, Any] = (None, None)

    @property
    def memory(self) -> AsyncMemory | None:
        """The stand-in for Redis, if there is one."""
        if self._stand_in is not None:
            return self._stand_in
        return self._target if isinstance(self._target, AsyncMemory) else None

    def here(self) -> Way | AsyncMemory:
        """Return what sends commands, of the running event loop."""
        if self._stand_in is not None:
            return self._stand_in
        loop, way = self._here
        return way if loop is asyncio.get_running_loop() else self._enter()

    def _new_way(self) -> Way | AsyncMemory:
        target = self._target
        return target if isinstance(target, AsyncMemory) else way_to(target, self._breaker, self._moved)

    def _enter(self) -> Way | AsyncMemory:
        loop = asyncio.get_running_loop()
        for other in [other for other in list(self._loops) if other.is_closed()]:
            self._loops.pop(other, None)
            self._world.flights.forget(other)
        if loop not in self._loops:
            way = self._new_way()
            end = _until_the_end(way)
            with suppress(StopIteration):
                end.asend(None).send(None)
            self._loops[loop] = (way, end)
        way, _ = self._loops[loop]
        self._here = (loop, way)
        return way

    def one(self) -> Server | Master:
        """Return the same, where it is of one server.

        Raises:
            ValueError: it is of many.
        """
        way = self.here()
        if not isinstance(way, (Server, Master)):
            raise ValueError(  # noqa: TRY004  it is a client of the right kind
                "local entries need one server that sends messages; a cluster has many, so leave them out"
            )
        return way

    def _node_of(self, slot: int) -> Server | None:
        """Return which node of a cluster has a hash slot, as far as is known by now."""
        way = self.here()
        return way.owner(slot) if isinstance(way, Cluster) else None

    def _doubt(self) -> None:
        way = self.here()
        if isinstance(way, Cluster):
            way.doubt()

    async def close(self) -> None:
        """Close the connections of the running event loop; a later read opens others."""
        await self.here().close()

    def _moved(self) -> None:
        """Drop what the process's own memory has of another server."""
        self.locals.lost()

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one go and return their replies, errors in their places.

        Raises:
            Unavailable: there is no answer.
        """
        way = self.here()
        replies = await way.send(commands)
        again = handle.unknown_scripts(commands, replies, self._world.scripts.texts)
        if again:
            for at, reply in zip(again, await way.send(list(again.values())), strict=True):
                replies[at] = reply
        return replies

    @contextmanager
    def over(self, stand_in: AsyncMemory) -> Iterator[None]:
        """Use a stand-in for Redis as long as this is entered."""
        before = self._stand_in, self.locals
        self._stand_in, self.locals = stand_in, Locals()
        try:
            yield
        finally:
            self._stand_in, self.locals = before

    def forget(self, entry: Entry) -> None:
        """Drop what the process's own memory has of an entry that the process has changed in Redis just now."""
        self.locals.forget(entry.key)

    async def run(self, steps: Steps[R], load: Loader, *, apart: bool = False) -> R:
        """Do what the steps ask for, and return their result; ``apart``: some of it may be done in the background."""
        try:
            effect = next(steps)
            while True:
                try:
                    outcome: Any = None
                    if isinstance(effect, Send):
                        outcome = await self.send(effect.commands)
                    elif isinstance(effect, Load):
                        with self.keeper.holding(effect.renewal), loading(effect.flights):
                            outcome = await load(effect)
                    elif isinstance(effect, Wait):
                        await _happened(effect.event, effect.seconds)
                    elif isinstance(effect, Later):
                        if apart:
                            self.crew.start(partial(self.run, effect.steps, load))
                        else:
                            await self.run(effect.steps, load)
                    else:
                        await asyncio.sleep(effect.seconds)
                except BaseException as error:  # noqa: BLE001  the steps raise it again, once they have given back leases
                    effect = steps.throw(error)
                else:
                    effect = steps.send(outcome)
        except StopIteration as end:
            result: R = end.value
            return result


class AsyncCache(Generic[T]):
    """One cache of the rule file.

    Parameters are those of the key's template. Pass them by name, or as a mapping if a name is one of our arguments.
    Loaders are called with them by name, and return ``None`` for a missing row; the read raises what they raise.
    They may be coroutine functions.
    """

    def __init__(self, contract: Contract[T], link: Link, demand: Demand) -> None:
        self._contract = contract
        self._link = link
        self._demand = demand
        if contract.world.tracing is not None:
            self._trace(contract.world.tracing)
        self._agreement = contract.world.agreement
        self._quick = contract.plain and contract.looks_once and demand == ANY
        self._of_standby = bool(contract.world.standby)
        self._typed: dict[Any, AsyncCache[Any]] = {}

    @overload
    def using(self, *, serializer: Serializer[R], **options: Unpack[Changes]) -> AsyncCache[R]: ...

    @overload
    def using(self, **options: Unpack[Changes]) -> AsyncCache[T]: ...

    def using(self, **options: Any) -> AsyncCache[Any]:
        """Return the same cache with other `Options`: ``caches.user.using(schema=2, wait=0.5)``."""
        contract = handle.other_options(self._contract, options)
        return AsyncCache(contract, self._link, contract.demand._replace(lsn=self._demand.lsn))

    @overload
    def of(self, kind: type[R], /) -> AsyncCache[R]: ...

    @overload
    def of(self, kind: object, /) -> AsyncCache[Any]: ...

    def of(self, kind: Any, /) -> AsyncCache[Any]:
        """Return the same cache with values of a type: ``caches.user.of(User)``; see `serializer_of` for the types.

        Raises:
            TypeError: nobody knows how to store such values.
        """
        found = self._typed.get(kind)
        if found is None:
            found = self._typed[kind] = self.using(serializer=serializer_of(kind))
        return found

    async def get(
        self,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        load: Callable[..., Awaitable[T | None] | T | None],
        max_staleness: float | None = None,
        primary: Callable[..., Awaitable[T | None] | T | None] | None = None,
        connection: Any = None,
        **named: Any,
    ) -> T | None:
        """Return the value, from the cache or from the loader.

        Args:
            params: the parameters, if not by name.
            load: returns the value for the parameters.
            max_staleness: bypass the cache unless all commits older than this many seconds have been busted.
            primary: loads in place of ``load`` what the cache may not serve to a read that asks for a freshness. Needed
                where ``load`` reads from a standby.
            connection: of the database, which the loader uses: inside a transaction that has written or keeps a
                snapshot, the cache is neither read nor filled. By default that of `from_rules`.
            named: the parameters.

        Raises:
            TypeError: the parameters are not those of the cache; the connection can't be asked; or values are loaded
                from a standby, and a read that asks for a freshness has no ``primary``.
        """
        contract, link = self._contract, self._link
        given = named if params is None else handle.by_name(contract, params)
        if self._of_standby:
            handle.require_primary(contract, self._demand, max_staleness, primary)

        if time.monotonic() >= self._agreement.next_at and (reason := await link.run(contract.agree(), _nothing)):
            entry = Entry(given, given, b"")
            await link.run(contract.beside([entry], reason), self._each(load, primary, max_staleness))
            return entry.value  # type: ignore[no-any-return]
        try:
            entry = contract.entry(given, given)
        except NoKey as no:
            entry = Entry(given, given, b"")
            await link.run(contract.beside([entry], no.reason), self._each(load, primary, max_staleness))
            return entry.value  # type: ignore[no-any-return]
        apart = link.apart and connection is None
        if connection is None:
            connection = link.connection
        if connection is not None and await transactions.aown_view(connection):
            await link.run(contract.beside([entry], "transaction"), self._each(load, primary, max_staleness))
            return entry.value  # type: ignore[no-any-return]
        looked = False
        if self._quick and max_staleness is None and not required():
            local, token = link.locals.of.get(contract.cache.name), None
            if local is not None:
                kept = local.get(entry.key, time.monotonic())
                value: Any = MISS if kept is None else contract.local(kept)
                if value is not MISS:
                    return value  # type: ignore[no-any-return]
                token = local.ask(entry.key)
            try:
                (reply,) = await link.here().send((contract.look(entry),))
            except Unavailable as gone:
                await link.run(contract.beside([entry], gone.reason), _each(load))
                return entry.value  # type: ignore[no-any-return]
            value = contract.hit(entry, reply)
            if token is not None and local is not None:
                local.keep(entry.key, token, *((None, 0.0) if value is MISS else (reply, contract.kept_until(reply))))
            if value is not MISS:
                return value  # type: ignore[no-any-return]
            looked = not isinstance(reply, Exception)
        steps = contract.read([entry], handle.demanded(self._demand, max_staleness), looked=looked)
        await link.run(steps, self._each(load, primary, max_staleness), apart=apart)
        return entry.value  # type: ignore[no-any-return]

    def _each(
        self, load: Callable[..., Any], primary: Callable[..., Any] | None, max_staleness: float | None
    ) -> Loader:
        asks = primary is not None and handle.demanded(self._demand, max_staleness) != ANY
        return _each(load, primary if asks else None)

    def _trace(self, tracing: Tracing) -> None:
        """Let each read make a span."""

        def traced(call: str, read: Callable[..., Any]) -> Any:
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with tracing.span(call, self._contract.cache.name):
                    return await read(*args, **kwargs)

            return wrapper

        for call in ("get", "get_many", "get_with_age", "refresh"):
            setattr(self, call, traced(call, getattr(self, call)))

    async def get_with_age(
        self,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        load: Callable[..., Awaitable[T | None] | T | None],
        max_staleness: float | None = None,
        primary: Callable[..., Awaitable[T | None] | T | None] | None = None,
        connection: Any = None,
        **named: Any,
    ) -> Aged[T]:
        """Return the value as `get` does, always from Redis or from the loader, and how old it is.

        Args:
            params: as for `get`.
            load: as for `get`.
            max_staleness: as for `get`.
            primary: as for `get`.
            connection: as for `get`.
            named: the parameters.

        Raises:
            TypeError: as for `get`.
        """
        contract = self._contract
        given = named if params is None else handle.by_name(contract, params)
        if self._of_standby:
            handle.require_primary(contract, self._demand, max_staleness, primary)

        def steps(entry: Entry) -> Steps[None]:
            return contract.read([entry], handle.demanded(self._demand, max_staleness))

        return contract.aged(await self._read(given, steps, self._each(load, primary, max_staleness), connection))

    async def refresh(
        self,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        load: Callable[..., Awaitable[T | None] | T | None],
        primary: Callable[..., Awaitable[T | None] | T | None] | None = None,
        connection: Any = None,
        **named: Any,
    ) -> T | None:
        """Load the value now, store it in place of what is there, and return it.

        What other readers are loading is not stored. A bust that comes meanwhile wins, as always.

        Args:
            params: as for `get`.
            load: as for `get`.
            primary: as for `get`; it loads in any case, where a freshness is asked for.
            connection: as for `get`.
            named: the parameters.

        Raises:
            TypeError: as for `get`.
        """
        given = named if params is None else handle.by_name(self._contract, params)
        if self._of_standby:
            handle.require_primary(self._contract, self._demand, None, primary)
        # Without a look, nothing is proven of a standby.
        asks = primary is not None and handle.demanded(self._demand, None) != ANY
        loader = _each(primary if asks and primary is not None else load)
        entry = await self._read(given, self._contract.reload, loader, connection)
        self._link.forget(entry)
        return entry.value  # type: ignore[no-any-return]

    async def _read(
        self,
        given: Mapping[str, Any],
        steps: Callable[[Entry], Steps[None]],
        loader: Loader,
        connection: Any,
    ) -> Entry:
        """Read an entry by steps, if it has a key and the connection's transaction allows it; else load it."""
        contract, link = self._contract, self._link
        apart = link.apart and connection is None
        if connection is None:
            connection = link.connection
        reason = ""
        if time.monotonic() >= self._agreement.next_at:
            reason = await link.run(contract.agree(), _nothing)
        try:
            entry = contract.entry(given, given) if not reason else Entry(given, given, b"")
        except NoKey as no:
            entry, reason = Entry(given, given, b""), no.reason
        if reason:
            way = contract.beside([entry], reason)
        else:
            own = connection is not None and await transactions.aown_view(connection)
            way = contract.beside([entry], "transaction") if own else steps(entry)
        await link.run(way, loader, apart=apart)
        return entry

    async def get_many(
        self,
        items: Iterable[Any],
        *,
        load: Callable[[list[Any]], Awaitable[Many[T]] | Many[T]],
        max_staleness: float | None = None,
        primary: Callable[[list[Any]], Awaitable[Many[T]] | Many[T]] | None = None,
        connection: Any = None,
    ) -> list[T | None]:
        """Return the values of many keys: one look at the cache, and one call of the loader for all that is missing.

        There is another call only for values that other readers were loading and did not finish in time.

        Args:
            items: mappings of the parameters; bare values for a cache with one parameter.
            load: takes the missing items, each once; returns their values in order, or a mapping from items as they
                were given: what is missing there does not exist.
            max_staleness: as for `get`.
            primary: as for `get`, of many items as ``load``.
            connection: as for `get`.

        Raises:
            TypeError: an item is not of this cache; ``primary`` is missing, as for `get`; or the loader's answer has
                another length, or a key that was not asked for.
        """
        contract, link = self._contract, self._link
        if self._of_standby:
            handle.require_primary(contract, self._demand, max_staleness, primary)
        reason = ""
        if time.monotonic() >= self._agreement.next_at:
            reason = await link.run(contract.agree(), _nothing)
        found = handle.group(contract, items)
        demand = handle.demanded(self._demand, max_staleness)
        beside = load if primary is None or demand == ANY else primary

        async def loader(effect: Load) -> Sequence[Any]:
            missing = [entry.item for entry in effect.entries]
            chosen = beside if effect.beside else load
            return handle.in_order(missing, await _awaited(chosen(missing)))

        for word, entries in found.beside.items():
            await link.run(contract.beside(entries, word), loader)
        apart = link.apart and connection is None
        if connection is None:
            connection = link.connection
        if found.entries and reason:
            await link.run(contract.beside(found.entries, reason), loader)
        elif found.entries and connection is not None and await transactions.aown_view(connection):
            await link.run(contract.beside(found.entries, "transaction"), loader)
        elif found.entries:
            entries, kept = found.entries, None
            local = link.locals.of.get(contract.cache.name)
            if local is not None and self._quick and max_staleness is None and not required():
                kept = handle.Kept(contract, local, entries)
                entries = kept.missing
            try:
                if entries:
                    await link.run(contract.read(entries, demand), loader, apart=apart)
            finally:
                if kept is not None:
                    kept.keep()
        return [entry.value for entry in found.order]

    @property
    def cached(self) -> AsyncDecorator[T]:
        """Decorate a coroutine function that loads: calls of it read through the cache.

        It has ``invalidate`` and ``refresh``, with the same arguments; ``load`` is the function itself, and ``cache``
        this cache. Of a method, they take the object first: ``Users.load.invalidate(users, 42)``.

        Args:
            function: its arguments are the parameters.
            ignore: arguments that are no part of the key, such as a session; a connection among them is asked, as that
                of `get` is.
            params: from a parameter to the argument, where their names differ.
            primary: as for `get`; called with the same arguments as the function.

        Raises:
            TypeError: arguments and parameters don't fit; or ``primary`` is missing, as for `get`.
        """
        return self._decorate

    def _decorate(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        ignore: Collection[str] = (),
        params: Mapping[str, str] | None = None,
        primary: Callable[..., Any] | None = None,
    ) -> Any:
        if self._of_standby:
            handle.require_primary(self._contract, self._demand, None, primary)
        if function is None:
            return lambda function: self._cached(function, ignore, params, primary)
        return self._cached(function, ignore, params, primary)

    def _cached(
        self,
        function: Callable[..., Any],
        ignore: Collection[str],
        params: Mapping[str, str] | None,
        primary: Callable[..., Any] | None,
    ) -> Any:
        of_call = handle.Cached(function, self._contract.keys.names, ignore, params, awaits=True)

        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            given, connection = of_call(args, kwargs)
            return await self.get(
                given,
                load=lambda **_: function(*args, **kwargs),
                primary=None if primary is None else lambda **_: primary(*args, **kwargs),
                connection=connection,
            )

        async def invalidate(*args: Any, **kwargs: Any) -> bool:
            given, connection = of_call.partly(args, kwargs)
            return await self.invalidate(given, connection=connection)

        async def refresh(*args: Any, **kwargs: Any) -> Any:
            given, connection = of_call(args, kwargs)
            return await self.refresh(
                given,
                load=lambda **_: function(*args, **kwargs),
                primary=None if primary is None else lambda **_: primary(*args, **kwargs),
                connection=connection,
            )

        return handle.dressed(wrapper, function, invalidate=invalidate, refresh=refresh, load=function, cache=self)

    async def warm(
        self,
        items: Iterable[Any],
        *,
        load: Callable[..., Awaitable[T | None] | T | None],
        rate: float = 50.0,
        limit: int | None = None,
        connection: Any = None,
    ) -> int:
        """Load what is not in the cache, one after the other, and return how many values were stored.

        Skips what another reader is loading. Ends early when Redis is down.

        Args:
            items: as for `get_many`, the most wanted first.
            load: as for `get`.
            rate: loads a second, at most.
            limit: loads, at most.
            connection: as for `get`.
        """
        if connection is None:
            connection = self._link.connection
        if connection is not None and await transactions.aown_view(connection):
            self._contract.metrics.bypasses("transaction")
            return 0
        if time.monotonic() >= self._agreement.next_at:
            await self._link.run(self._contract.agree(), _nothing)
        return await self._link.run(
            self._contract.warm(handle.keyed(self._contract, items), rate=rate, limit=limit), _each(load)
        )

    @asynccontextmanager
    async def writing(
        self, params: Mapping[str, Any] | None = None, /, *, connection: Any = None, **named: Any
    ) -> AsyncIterator[AsyncWrite[T]]:
        """Write through: enter it before the transaction begins, and `AsyncWrite.set` the new value after its commit.

        From here on, values that other readers are loading are not stored. The new value is stored unless a bust of
        this or a later transaction came first; a later bust deletes it. Never fails because of Redis.

        Inside a transaction that has written, nothing is stored: it may still be rolled back.

        Args:
            params: as for `get`.
            connection: of the database, which writes. By default that of `from_rules`.
            named: the parameters.

        Raises:
            TypeError: the parameters are not those of the cache; or the connection can't be asked.
        """
        contract, link = self._contract, self._link
        given = named if params is None else handle.by_name(contract, params)
        if time.monotonic() >= self._agreement.next_at:
            await link.run(contract.agree(), _nothing)
        try:
            entry = contract.entry(given, given)
        except NoKey as no:
            contract.metrics.bypasses(no.reason)
            yield AsyncWrite(contract, link, None)
            return
        if connection is None:
            connection = link.connection
        if connection is not None and await transactions.aown_view(connection, objects=False):
            contract.not_committed("`writing` was entered")
            yield AsyncWrite(contract, link, None)
            return
        held = await link.run(contract.seize(entry), _nothing)
        write = AsyncWrite(contract, link, entry if held else None, connection)
        try:
            with link.keeper.holding(contract.renewal([entry])) if held else nullcontext():
                yield write
        finally:
            try:
                await write.close()
            finally:
                link.forget(entry)

    async def invalidate(
        self, params: Mapping[str, Any] | None = None, /, *, connection: Any = None, **named: Any
    ) -> bool:
        """Bust a key now rather than when the daemon does; False if Redis failed. Call it after the commit.

        Inside a transaction that has written, it returns False as well: a reader may store the old row again before
        the commit.

        Args:
            params: as for `get`.
            connection: of the database, which writes. By default that of `from_rules`.
            named: the parameters.

        Raises:
            TypeError: the parameters are not those of the cache; or the connection can't be asked.
        """
        given = named if params is None else handle.by_name(self._contract, params)
        if time.monotonic() >= self._agreement.next_at:
            # Types decide how the key is written.
            await self._link.run(self._contract.agree(), _nothing)
        try:
            entry = self._contract.entry(given, given, anyway=True)
        except NoKey as no:
            self._contract.metrics.bypasses(no.reason)
            return False
        if connection is None:
            connection = self._link.connection
        early = connection is not None and await transactions.aown_view(connection, objects=False)
        if early:
            self._contract.not_committed("`invalidate` was called")
        try:
            return await self._link.run(self._contract.invalidate(entry), _nothing) and not early
        finally:
            self._link.forget(entry)


class AsyncWrite(Generic[T]):
    """A value that is about to be written; see `AsyncCache.writing`."""

    def __init__(self, contract: Contract[T], link: Link, entry: Entry | None, connection: Any = None) -> None:
        self._contract = contract
        self._link = link
        self._entry = entry
        self._connection = connection
        self._began = contract.world.clocks.wall()

    async def set(self, value: T | None) -> bool:
        """Store the value that was committed; False if it was not stored."""
        asked = self._connection if self._entry is not None else None
        if asked is not None and await transactions.aown_view(asked, objects=False):
            self._contract.not_committed("`write.set` was called")
            await self.close()
            return False
        entry, self._entry = self._entry, None
        if entry is None:
            return False
        try:
            return await self._link.run(self._contract.put(entry, value, self._began), _nothing)
        finally:
            self._link.forget(entry)

    async def close(self) -> None:
        """Give the lease back, if nothing was set."""
        entry, self._entry = self._entry, None
        if entry is not None:
            await self._link.run(self._contract.let_go(entry), _nothing)


def _each(load: Callable[..., Any], beside: Callable[..., Any] | None = None) -> Loader:
    """Load entries one by one; ``beside``: by this where the cache may not be used."""

    async def loader(effect: Load) -> Sequence[Any]:
        chosen = beside if effect.beside and beside is not None else load
        return [await _awaited(chosen(**entry.params)) for entry in effect.entries]

    return loader


async def _nothing(_effect: Load) -> Sequence[Any]:
    return ()


async def _until_the_end(way: Way | AsyncMemory) -> AsyncGenerator[None]:
    """Close the connections when the event loop ends, which closes what generates."""
    try:
        yield
    finally:
        await way.close()


async def _happened(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _awaited(value: Any) -> Any:
    return await value if isawaitable(value) else value


class AsyncCaches:
    """The caches of a rule file, as attributes: ``caches.user``, and ``caches["team-members"]``.

    Make it by `from_rules`. It may be shared by event loops: each has its own connections, which end with it.
    """

    def __init__(self, book: handle.Book, link: Link, lsn: int = 0) -> None:
        self._book = book
        self._link = link
        self._lsn = lsn
        self._handles: dict[str, AsyncCache[Any]] = {}

    @classmethod
    def from_rules(
        cls,
        path: str | Path,
        redis: Any,
        *,
        slot: str = "cdc_invalidator",
        watermark: str = "",
        standby: str = "",
        connection: Any = None,
        env: Mapping[str, str] | None = None,
        options: Options[Any] | Mapping[str, Any] | None = None,
        breaker: Breaker | None = None,
        registry: Any = None,
        tracer: Any = None,
    ) -> Self:
        """Read rule files, as the daemon does.

        Args:
            path: a rule file, or a directory of them.
            redis: a client: `redis.asyncio.Redis`, also of a master that Sentinel names, or a `RedisCluster` of these;
                or valkey-py's. Its own connections are not used, but others like them are opened: without the client's
                retries, and with time-outs of half a second unless ``socket_timeout`` or ``socket_connect_timeout`` of
                the client says otherwise.
            slot: the daemon's ``CDC_SLOT``, which names the watermark unless ``watermark`` does.
            watermark: the daemon's ``CDC_WATERMARK``, if that is set.
            standby: the standby that values are loaded from, by its name in the watermark; empty for the primary.
            connection: that loaders use, or a function that returns it, where reads name none; Django's connections are
                asked without being named. See `transactions`.
            env: the environment of key templates; the process's by default.
            options: how caches are read, unless `AsyncCache.using` says otherwise; `Options`, or a dictionary of some.
            breaker: detects that Redis is gone.
            registry: of prometheus-client, or a `Metrics` that several share; without one, nothing is counted.
            tracer: of OpenTelemetry: each read makes a span; without one, nothing is traced.

        Raises:
            errors.WrongRules: all mistakes of all files.
            TypeError: the client can't be read through, the connection can't be asked, or there is no such option.
        """
        chosen = as_options(options)
        target = redis if isinstance(redis, AsyncMemory) else recognise(redis, awaits=True)
        flights = Flights(asyncio.Event, asyncio.get_running_loop)
        world = handle.world(watermark or slot, standby, target, flights, tracer=tracer)
        caches = handle.read_caches(path, os.environ if env is None else env)
        book = handle.Book(caches, world, handle.metrics_for(registry), chosen)
        return cls(book, Link(target, breaker or Breaker(), world, connection))

    @classmethod
    def disabled(
        cls, path: str | Path | None = None, *, env: Mapping[str, str] | None = None, registry: Any = None
    ) -> Self:
        """Make caches of which every read loads, and that need no Redis: bypasses for the reason ``disabled``.

        Args:
            path: the rule files: names of caches and parameters are checked by them. Without them, any will do.
            env: as for `from_rules`.
            registry: as for `from_rules`.

        Raises:
            errors.WrongRules: all mistakes of all files.
        """
        flights = Flights(asyncio.Event, asyncio.get_running_loop)
        world = handle.world("", "", AsyncMemory(), flights, disabled=True)
        caches = None if path is None else handle.read_caches(path, os.environ if env is None else env)
        book = handle.Book(caches, world, handle.metrics_for(registry), Options())
        return cls(book, Link(AsyncMemory(), Breaker(), world))

    @classmethod
    def in_memory(cls, path: str | Path, *, clock: Callable[[], float] = time.time, **settings: Any) -> Self:
        """Make caches for tests, over a stand-in for Redis in the memory of this process, which begins empty.

        Args:
            path: the rule files.
            clock: seconds since 1970; by it, entries expire.
            settings: others of `from_rules`.

        Raises:
            errors.WrongRules: all mistakes of all files.
        """
        return cls.from_rules(path, AsyncMemory(clock), **settings)

    def __getitem__(self, name: str) -> AsyncCache[Any]:
        found = self._handles.get(name)
        if found is None:
            contract = self._book.contract(name)
            found = self._handles[name] = AsyncCache(contract, self._link, contract.demand._replace(lsn=self._lsn))
        return found

    def __getattr__(self, name: str) -> AsyncCache[Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def at_least(self, lsn: int) -> Self:
        """Return a view whose reads see all commits up to an LSN, from the database if need be.

        Until the watermark has passed the LSN, loaders must read from the primary, since a standby may lag: where
        ``load`` reads from a standby, reads also name ``primary``.
        """
        return type(self)(self._book, self._link, lsn)

    async def aclose(self, seconds: float = 5.0) -> None:
        """Wait for what is refreshed in the background, at most so long.

        Close the connections of the running event loop; they are closed with it in any case.
        """
        await self._link.crew.finish(seconds)
        await self._link.close()

    @asynccontextmanager
    async def local(self, *names: str, size: int = 10_000) -> AsyncIterator[None]:
        """Keep entries of some caches in this process's memory as well, as long as this is entered.

        Redis reports changes on a separate connection; when that is silent for two seconds, nothing is served from
        memory. What this process itself invalidates or writes through is dropped at once. Reads that ask for a
        freshness always go to Redis. Does nothing in caches that are disabled or in memory.

        Args:
            names: the caches; none of them may have a version.
            size: how many entries are kept, at most.

        Raises:
            ValueError: a cache has a version, or the client is of a cluster.
        """
        if self._link.memory is not None:
            yield
            return
        local = Local((self._book.contract(name).cache for name in names), size)
        follower = AsyncFollower(self._link.one(), local)
        follower.start()
        self._link.locals.enter(local)
        try:
            yield
        finally:
            self._link.locals.leave(local)
            await follower.stop()
