"""The fill contract as generators: each yields what it needs done and is sent the result. No I/O happens here.

Both shells, `sync` and `aio`, drive the same generators; `steps` says what they yield.

The rules that hold here: whatever Redis does, a read is answered, if need be from the database; and only the script
that checks the lease stores a value. Clocks are passed in; no socket or thread is used.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from cdc_invalidator.reader.commands import LATER, NOT_STORED, Commands, Looks
from cdc_invalidator.reader.entry import MISS, Entry
from cdc_invalidator.reader.envelope import Envelope, Times
from cdc_invalidator.reader.flights import Flight, copies, is_loading
from cdc_invalidator.reader.freshness import ANY, Demand, NotProven
from cdc_invalidator.reader.keys import NUL, Keys, NoKeys
from cdc_invalidator.reader.keyspace import KeySpace
from cdc_invalidator.reader.leftovers import Aged, Leftovers
from cdc_invalidator.reader.metrics import CacheMetrics
from cdc_invalidator.reader.options import STRICT, Options
from cdc_invalidator.reader.serializers import Unstorable, form_of, written
from cdc_invalidator.reader.spelling import NoKey
from cdc_invalidator.reader.steps import Command, Later, Load, Renewal, Send, Sleep, Steps, Unavailable, Wait, word
from cdc_invalidator.reader.world import World
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import STALE_SUFFIX

_log = logging.getLogger("cdc_invalidator.reader")

T = TypeVar("T")

# Seconds between two looks at what another reader loads; randomised, so that not all look at once.
FIRST_PAUSE, LONGEST_PAUSE = 0.004, 0.1
REPORT_SECONDS = 60.0


class Contract(Generic[T]):
    """How one cache is read, with some options.

    Args:
        cache: the cache, from the rule file.
        options: what the program decides.
        world: what all caches share.
        metrics: the cache's counters.
        space: bounds the number of keys.

    Raises:
        ValueError: the cache can't be read by this library as it is; the message is a sentence with the remedy.
    """

    def __init__(
        self, cache: Cache, options: Options[T], world: World, metrics: CacheMetrics, space: KeySpace | None = None
    ) -> None:
        if cache.ttl is None:
            raise ValueError(f"cache {cache.name} has no `ttl`, so what is stored would stay for ever; add one to it")
        if world.cluster and cache.lacks_hash_tag:
            raise ValueError(
                f"in a cluster, a key of cache {cache.name} and its lock lie in different slots; give the key a hash "
                "tag, such as `user:{{{id}}}:profile`"
            )
        self.cache = cache
        self.options = options
        self.world = world
        self.metrics = metrics
        self.terms = world.agreement.of(cache)
        self.space = space or (KeySpace(cache.max_keys_hint, cache.ttl / 1000) if cache.max_keys_hint else None)
        self._envelope = Envelope(
            options.schema,
            form_of(options.serializer),
            clock=world.clocks.wall,
            compress_from=options.compress_from,
            compression=options.compression,
            kept=options.fail_safe > 0,
        )
        self._header = self._envelope.header
        self._loads = options.serializer.loads
        # Readers share a load only if they read values in the same way, and fail for the same ones.
        self._form = (self._header, options.strict)
        self._commands = Commands(cache, world, self._header, options.lease)
        self._leftovers = Leftovers(self._commands, self._envelope, self._loads, options.fail_safe)
        self.look, self.looks_once = self._commands.look, self._commands.looks_once
        self._stored = self._commands.stored
        self._ttl, self._jitter = cache.ttl, cache.jitter
        self._versioned = cache.version is not None
        # When to log each kind of refusal again.
        self._reported: dict[str, float] = {}
        self.plain = not options.early
        self._stale = cache.stale_for is not None
        max_age = options.max_staleness
        self.demand = Demand(0, None if max_age is None else int(max_age * 1000))

    # ── One look, which most reads are ───────────────────────────────────────────────────────────────────────────────

    @property
    def keys(self) -> Keys | NoKeys:
        """What makes the cache's keys now."""
        return self.terms.keys

    def agree(self) -> Steps[str]:
        """Look at what the daemon says, and return why Redis is not to be asked now; empty if it may be."""
        agreement, steady = self.world.agreement, self.world.clocks.steady
        commands = agreement.begin(steady())
        try:
            said, off = yield Send(commands)
            if isinstance(said, Unavailable):
                raise said
            if agreement.is_news(said):
                (said,) = yield Send([agreement.whole])
            agreement.take(commands, [said, off], steady())
        except Unavailable as gone:
            # In a cluster, the node that did not answer may be another than an entry's.
            return "" if agreement.failed(gone.reason) and self.world.cluster else gone.reason
        return ""

    def entry(self, item: Any, params: Mapping[str, Any], *, anyway: bool = False) -> Entry:
        """Make an entry; ``anyway``: also where the cache may not be read.

        Raises:
            NoKey: the parameters have no key, or the cache may not be read.
            TypeError: they are not those of the cache.
        """
        terms = self.terms
        if terms.refusal and not anyway:
            raise NoKey(terms.refusal)
        try:
            key, version_key = terms.keys.of(params)
        except NoKey as no:
            if no.sentence:
                self._advise(no.sentence)
            raise
        entry = Entry(item, params, key, version_key)
        if self._stale:
            entry.stale = True
        return entry

    def _advise(self, sentence: str) -> None:
        """Log now and then what a developer should know."""
        now = self.world.clocks.steady()
        if now >= self._reported.get(sentence, now):
            self._reported[sentence] = now + REPORT_SECONDS
            _log.warning("cache %s: %s", self.cache.name, sentence)

    def hit(self, entry: Entry, reply: Any) -> Any:
        """Return the value in the reply to a look, or `MISS`; a hit is counted."""
        reply = self._stored(entry, reply)
        if type(reply) is not bytes:
            entry.seen = reply
            return MISS
        payload = self._envelope.payload(reply)
        if payload is None:
            entry.refresh = True
            return MISS
        if not payload:
            self.metrics.negative_hits()
            return None
        try:
            value = self._loads(payload)
        except Exception:  # noqa: BLE001  whatever a serializer raises, the database has the value
            return MISS
        self.metrics.hits()
        return value

    def local(self, stored: bytes) -> Any:
        """Return the value of what `Local` kept, or `MISS` if it was stored with other options; a hit is counted."""
        payload = self._envelope.payload(stored)
        if payload is None:
            return MISS
        try:
            value = self._loads(payload) if payload else None
        except Exception:  # noqa: BLE001  whatever a serializer raises, the database has the value
            return MISS
        self.metrics.l1_hits()
        return value

    def take_local(self, entries: Sequence[Entry], kept: Sequence[bytes | None]) -> list[Entry]:
        """Give entries the values that `Local` kept of them, and return those of which it has none."""
        missing = []
        for entry, stored in zip(entries, kept, strict=True):
            value = MISS if stored is None else self.local(stored)
            if value is MISS:
                missing.append(entry)
            else:
                entry.found(value)
        return missing

    def kept_until(self, stored: bytes) -> float:
        """Return until when (a steady time) the reply to a look may be kept: until it expires."""
        try:
            remaining = self._envelope.times(stored).expires - self._now()
        except ValueError:
            return 0.0
        return self.world.clocks.steady() + remaining / 1000

    # ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, entries: Sequence[Entry], demand: Demand, *, looked: bool = False) -> Steps[None]:
        """Read each entry's value into it.

        Args:
            entries: no key twice.
            demand: how fresh it must be.
            looked: each entry's look was a miss by `hit`; else they are looked for first.
        """
        try:
            if demand == ANY:
                for entry in entries:
                    entry.saves = self.options.fail_safe > 0
            else:
                refusal = self._unprovable(demand) or self._agreed(entries)
                if refusal:
                    yield from self.beside(entries, refusal)
                    return
                for entry in entries:
                    # How old an old value is, nobody knows: its bust may have come late.
                    entry.stale = False
                    # For a cache that nothing busts, the age of its entries is looked at instead.
                    entry.demand = ANY if self.cache.ttl_only else demand
            if not looked:
                yield from self._look(entries)
                yield from self._judge(entries, demand)
            missing = [entry for entry in entries if not entry.done]
            if missing:
                self.metrics.misses(len(missing))
                yield from self._miss(missing, demand)
        except Unavailable as gone:
            yield from self.beside(entries, gone.reason)
        except GeneratorExit:
            raise
        except BaseException:
            # It may have been cancelled while a lease was on its way here.
            yield from self._release([entry for entry in entries if entry.token])
            raise

    def _unprovable(self, demand: Demand) -> str:
        """Return why nothing can be proven, whatever the watermark says; empty if it can."""
        # Nothing busts such a cache. What was loaded from a standby is older than its entry by nobody knows how much.
        return "ttl_only" if self.cache.ttl_only and (demand.lsn or self.world.standby) else ""

    def _agreed(self, entries: Sequence[Entry]) -> str:
        """Note by which agreement the keys of entries are made; return why they are not, if they were by another."""
        # Before the terms, which change before it does: so at worst it is an older one, that no watermark has any more.
        digest, terms = self.world.agreement.digest, self.terms
        if terms.refusal:
            return terms.refusal
        keys = terms.keys
        for entry in entries:
            entry.agreed = digest
            try:
                if keys.of(entry.params) != (entry.rest, entry.version_key):
                    return "templates_differ"
            except NoKey as no:
                return no.reason
        return ""

    def _look(self, entries: Sequence[Entry]) -> Steps[None]:
        """Look for all entries, and note in each what was seen."""
        yield from self._do(self._commands.looks(entries))
        later = [entry for entry in entries if entry.seen is LATER]
        if later and entries[0].demand != ANY:
            yield from self._do(self._commands.takes(later))
        elif later:
            for entry, reply in zip(later, (yield Send([("GET", entry.key) for entry in later])), strict=True):
                entry.seen = reply

    def _do(self, looks: Looks) -> Steps[None]:
        if looks.commands:
            looks.read((yield Send(looks.commands)))

    def _judge(self, entries: Sequence[Entry], demand: Demand) -> Steps[None]:
        """Take the values that may be served, and refresh some of them early."""
        early = []
        refused: dict[str, list[Entry]] = {}
        hits = negative_hits = 0
        for entry in entries:
            seen = entry.seen
            if type(seen) is not bytes:
                if isinstance(seen, Exception):
                    refused.setdefault(self._refused(seen), []).append(entry)
                continue
            value = self._value(entry, seen, demand)
            if value is MISS:
                continue
            if value is None:
                negative_hits += 1
            else:
                hits += 1
            entry.found(value, seen)
            if self.options.early and self._due(seen):
                early.append(entry)
        if hits:
            self.metrics.hits(hits)
        if negative_hits:
            self.metrics.negative_hits(negative_hits)
        for reason, some in refused.items():
            yield from self.beside(some, reason)
        if early and self.options.background:
            # Others that look meanwhile would want the same.
            begun, now = self.world.refreshing, self.world.clocks.steady()
            early = [copy.copy(entry) for entry in early if begun.get(entry.key, now) <= now]
            if early:
                begun.update(dict.fromkeys([entry.key for entry in early], now + self.options.longest_load))
                yield Later(self._refresh_later(early))
        elif early:
            yield from self._refresh(early)

    def _value(self, entry: Entry, stored: Any, demand: Demand) -> Any:
        """Read what is stored; `MISS`, and a refresh, where it can't be read or is too old."""
        if type(stored) is not bytes:
            return MISS
        try:
            payload = self._envelope.payload(stored)
            entry.refresh = payload is None
            if self.cache.ttl_only and demand.max_age is not None:
                entry.refresh |= self._now() - self._envelope.times(stored).began > demand.max_age
            if not entry.refresh:
                return self._loads(payload) if payload else None
        except Exception:  # noqa: BLE001  whatever a serializer raises, the database has the value
            entry.refresh = True
        return MISS

    # ── Not there: the lease, or somebody else's load ────────────────────────────────────────────────────────────────

    def _miss(self, missing: Sequence[Entry], demand: Demand) -> Steps[None]:
        """Load what nobody else loads, and wait for the rest.

        What this reader loads is done before it waits for others of this process, so no two wait for each other.

        Args:
            missing: entries that are not there; their looks may have taken leases.
            demand: how old an entry may be of a cache that nothing busts.
        """
        flights, clocks = self.world.flights, self.world.clocks
        counted = False
        while missing:
            led, joined, nested = [], [], []
            for entry in missing:
                granted = type(entry.seen) is int and entry.seen > 0
                # Who may be given an old value asks for it, rather than wait.
                if entry.stale and not granted:
                    led.append(entry)
                    continue
                key = (entry.key, entry.version_key, self._form, demand)
                if is_loading(key):
                    nested.append(entry)
                    continue
                flight, new = flights.board(key, clocks.steady(), self.options.longest_load, replace=granted)
                if new:
                    entry.flight, entry.flight_key = flight, key
                    led.append(entry)
                else:
                    joined.append((entry, flight, flight.looks))
            if joined and not counted:
                self.metrics.waits(len(joined))
                counted = True
            missing = []
            yield from self.beside(nested, "nested")
            if led:
                try:
                    missing += yield from self._lead(led, demand)
                finally:
                    for entry in led:
                        self._land(entry)
            missing += yield from self._join(joined, demand)
            for entry in missing:
                entry.seen = None

    def _join(self, joined: Sequence[tuple[Entry, Flight, int]], demand: Demand) -> Steps[list[Entry]]:
        """Wait for what others of this process load, and return the entries that must be read again."""
        again: list[Entry] = []
        alone: dict[str, list[Entry]] = {}
        for entry, flight, looks in joined:
            while not flight.over and (remaining := flight.until - self.world.clocks.steady()) > 0:
                yield Wait(flight.landed, remaining)
            if flight.error is not None:
                if not (yield from self._save([entry], flight.error)):
                    raise flight.error
                continue
            if not flight.over:
                alone.setdefault("waited", []).append(entry)
                continue
            # With a version that is not known, nobody knows whether the lease was for the current one. And whatever the
            # lease says, a load that began long ago may lack what an age asks for.
            known = NUL not in entry.key and demand.max_age is None
            word, value = flight.value(joined=looks, known=known)
            if word == "take":
                entry.found(value)
            elif word == "alone":
                alone.setdefault("unserializable", []).append(entry)
            else:
                again.append(entry)
        for reason, entries in alone.items():
            yield from self.beside(entries, reason)
        return again

    def _replaced(self, entry: Entry) -> bool:
        return entry.flight is not None and self.world.flights.replaced(entry.flight_key, entry.flight)

    def _begin(self, entries: Iterable[Entry]) -> None:
        """Note that a look or a load begins."""
        for entry in entries:
            if entry.flight is not None:
                entry.flight.looks += 1

    def _close(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.flight is not None:
                self.world.flights.close(entry.flight_key, entry.flight)

    def _land(self, entry: Entry, payload: bytes | None = None, *, fenced: bool = False) -> None:
        """Give those that wait the entry's value, if there is one, and let nobody wait any longer."""
        flight = entry.flight
        if flight is None or flight.over:
            return
        self._close([entry])
        flight.land(copies(entry.value, payload, self._loads) if entry.done else None, fenced=fenced)

    def _lead(self, led: Sequence[Entry], demand: Demand) -> Steps[list[Entry]]:
        """Load what no other process loads, and wait for the rest.

        Returns:
            entries that another reader of this process loads, or of which no old value is there: it may wait for that.
        """
        clocks = self.world.clocks
        deadline = clocks.steady() + self.options.wait
        pause, waited = FIRST_PAUSE, False
        waiting: Sequence[Entry] = led
        again: list[Entry] = []
        while True:
            # The first look may have tried to take the lease.
            unknown = [entry for entry in waiting if entry.refresh or type(entry.seen) not in {int, list}]
            if unknown:
                self._begin(unknown)
                yield from self._take(unknown)
            mine, others, alone = [], [], []
            refused: dict[str, list[Entry]] = {}
            for entry in waiting:
                reply, entry.seen = entry.seen, None
                if isinstance(reply, Exception):
                    refused.setdefault(self._refused(reply), []).append(entry)
                elif self._commands.granted(entry, reply):
                    mine.append(entry)
                elif reply == NOT_STORED:
                    alone.append(entry)
                elif self._served(entry, reply, demand):
                    self._land(entry)
                elif entry.stale:
                    entry.stale = False
                    again.append(entry)
                else:
                    others.append(entry)
            if mine:
                yield from self._load(mine)
            yield from self.beside(alone, "not_stored", joining=True)
            for reason, some in refused.items():
                yield from self.beside(some, reason)
            # Another reader of this process may have been given the lease.
            moved = {entry for entry in others if self._replaced(entry)}
            again += moved
            others = [entry for entry in others if entry not in moved]
            if not others:
                return again
            if not waited:
                self.metrics.waits(len(others))
                waited = True
            remaining = deadline - clocks.steady()
            if remaining <= 0:
                yield from self.beside(others, "waited")
                return again
            yield Sleep(min(remaining, pause * (0.5 + clocks.chance())))
            pause = min(2 * pause, LONGEST_PAUSE)
            waiting = others

    def _take(self, entries: Sequence[Entry]) -> Steps[None]:
        """Look again and take leases, and note what was seen: a value, a number (mine), 0 or a list (not mine)."""
        if self._versioned:
            yield from self._do(self._commands.looks(entries, guessing=False))
            entries = [entry for entry in entries if entry.seen is LATER]
        if entries:
            yield from self._do(self._commands.takes(entries))

    def _served(self, entry: Entry, reply: Any, demand: Demand) -> bool:
        """Return whether what another reader stored, or a bust left, is this entry's value."""
        # Another reader has the lease, so what is there next time may be new.
        entry.refresh = False
        stale = isinstance(reply, list)
        stored = reply[0] if stale and reply else reply
        value = self._value(entry, stored, demand)
        if value is MISS:
            return False
        if stale:
            self.metrics.stale_hits()
            entry.saved = True
        entry.found(value, stored)
        return True

    # ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _load(self, mine: Sequence[Entry]) -> Steps[int]:
        """Load entries whose leases are held, store them, and return how many were stored."""
        clocks = self.world.clocks
        began, started = clocks.wall(), clocks.steady()
        self._begin(mine)
        try:
            values = yield Load(mine, self.renewal(mine))
        except GeneratorExit:
            raise
        except BaseException as error:
            self._failed(mine, error)
            yield from self._release(mine, telling=isinstance(error, Exception))
            if (yield from self._save(mine, error)):
                return 0
            raise
        took = clocks.steady() - started
        self.metrics.load_seconds(took)
        for entry, value in zip(mine, values, strict=True):
            entry.found(value)
        return (yield from self._store(mine, began, took))

    def _store(self, mine: Sequence[Entry], began: float, took: float) -> Steps[int]:
        """Store loaded values, as far as their leases are still held, and return how many were.

        Raises:
            Unstorable: one of them can't be stored, and readers want to know.
        """
        try:
            payloads = [self._payload(entry.value, strict=self.options.strict) for entry in mine]
        except Unstorable as error:
            self._failed(mine, error)
            yield from self._release(mine)
            raise
        commands = [self._storing(entry, payload, began, took) for entry, payload in zip(mine, payloads, strict=True)]
        self._close(mine)
        stored, refused = 0, []
        try:
            replies = yield Send(commands)
            for entry, payload, command, reply in zip(mine, payloads, commands, replies, strict=True):
                if isinstance(reply, Exception):
                    self.metrics.bypasses(self._refused(reply))
                    if not isinstance(reply, Unavailable):
                        refused.append(entry)
                    continue
                entry.token = b""
                self._land(entry, payload, fenced=reply == 1)
                if command[1] == self.world.scripts.fill:
                    stored += reply == 1
                    (self.metrics.fills if reply == 1 else self.metrics.dropped_fills)()
        finally:
            for entry, payload in zip(mine, payloads, strict=True):
                self._land(entry, payload)
        if refused:
            # Redis may be full; a lease can be given back nevertheless.
            yield from self._release(refused)
        return stored

    def _storing(self, entry: Entry, payload: bytes | None, began: float, took: float) -> Command:
        """Return the command that stores a value, or that gives back the lease if nothing is to be stored."""
        clocks = self.world.clocks
        ttl = self._ttl if entry.value is not None else self.cache.negative_ttl
        if (
            self.space is not None
            and payload is not None
            and ttl is not None
            and not self.space.admits(entry.rest, clocks.steady())
        ):
            self.metrics.bypasses("max_keys")
            # The word to those that wait would be a key, too.
            return self._commands.release(entry)
        if payload is None or ttl is None:
            return self._commands.release(entry, telling=True)
        if entry.value is not None and self._jitter:
            ttl += int(clocks.chance() * self._jitter)
        expires = int(clocks.wall() * 1000) + ttl
        stored = self._envelope.seal(payload, Times(int(began * 1000), expires, int(took * 1000)))
        kept = ttl + int(self.options.fail_safe * 1000) if payload else ttl
        return self._commands.fill(entry, stored, kept)

    def _payload(self, value: Any, *, strict: bool = False) -> bytes | None:
        """Return the bytes of a value; ``None`` for one that can't be stored, or `Unstorable` is raised."""
        if value is None:
            return b""
        try:
            return written(self.options.serializer, value)
        except Unstorable as no:
            self.metrics.bypasses("unserializable")
            if strict:
                raise Unstorable(
                    f"a value of cache {self.cache.name} can't be stored: {no}. Write "
                    f'`caches["{self.cache.name}"].of(…)` with the type of its values, or `.using(serializer=ROWS)` '
                    "for rows as drivers give them"
                ) from no.__cause__
            if self._reports("unserializable"):
                name = type(value).__name__
                _log.warning(
                    "values of cache %s are not stored: a %s would not come back as it is; %s=1 tells more",
                    *(self.cache.name, name, STRICT),
                )
            return None

    def renewal(self, mine: Iterable[Entry]) -> Renewal:
        """Return what keeps the leases of entries alive."""
        return self._commands.renewal(mine, self.options.longest_load)

    def _release(self, mine: Sequence[Entry], *, telling: bool = False) -> Steps[None]:
        """Give leases back; where it is not known whether one was granted, by the token alone."""
        # Where the version is not known, nor is the lock; the lease runs out.
        known = [entry for entry in mine if NUL not in entry.key]
        commands = [self._commands.release(entry, telling=telling) for entry in known]
        silent = [self._commands.release(entry) for entry in known]
        for entry in mine:
            entry.token = entry.lease = b""
        try:
            if commands:
                replies = yield Send(commands)
                # A Redis that is full can't be told.
                refused = [quiet for quiet, reply in zip(silent, replies, strict=True) if isinstance(reply, Exception)]
                if telling and refused:
                    yield Send(refused)
        except Unavailable:
            return  # the leases run out

    def _failed(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Tell those that wait that the load failed."""
        for entry in entries:
            if entry.flight is not None:
                self._close([entry])
                entry.flight.fail(error)

    def beside(self, entries: Iterable[Entry], reason: str, *, joining: bool = False) -> Steps[None]:
        """Load, without storing, what has no value yet.

        Args:
            entries: the entries.
            reason: why, for metrics.
            joining: let readers that come meanwhile wait for the end of this load and share the next one; else each of
                them loads at once.
        """
        undone = [entry for entry in entries if not entry.done]
        if not undone:
            return
        self.metrics.bypasses(reason, len(undone))
        started = self.world.clocks.steady()
        # Whoever has joined by now did so before this load.
        if not joining:
            self._close(undone)
        self._begin(undone)
        try:
            values = yield Load(undone, beside=True)
        except GeneratorExit:
            raise
        except BaseException as error:
            self._failed(undone, error)
            if (yield from self._save(undone, error)):
                return
            raise
        self.metrics.load_seconds(self.world.clocks.steady() - started)
        for entry, value in zip(undone, values, strict=True):
            entry.found(value)
            if entry.flight is not None and not entry.flight.over:
                self._land(entry, self._payload(value))

    def _save(self, entries: Sequence[Entry], error: BaseException) -> Steps[bool]:
        """Give entries their old values instead of those whose load has failed, if that may be and all have one."""
        if not isinstance(error, self.options.fail_safe_on) or not all(
            entry.saves and not entry.done for entry in entries
        ):
            return False
        found = yield from self._leftovers.of(entries)
        if found is None:
            return False
        for entry, (value, stored) in zip(entries, found, strict=True):
            entry.found(value, stored)
            entry.saved = True
        self.metrics.fail_safe_hits(len(entries))
        if self._reports("fail_safe"):
            name = type(error).__name__
            _log.warning("a load of cache %s failed (%s); old values are served", self.cache.name, name)
        return True

    def aged(self, entry: Entry) -> Aged[T]:
        """Return an entry's value with its age."""
        began = self._envelope.began(entry.seen) if type(entry.seen) is bytes else self._now()
        return Aged(entry.value, max(0, self._now() - began) / 1000, entry.saved)

    def _refused(self, error: Exception) -> str:
        """Return the reason for metrics, and log now and then what Redis refuses: an operator must fix it."""
        if isinstance(error, (Unavailable, NotProven)):
            return error.reason
        what = word(error)
        if self._reports(what):
            _log.warning("Redis refuses reads of cache %s (%s)", self.cache.name, what)
        return "refused"

    def _reports(self, word: str) -> bool:
        """Return whether to log something that goes wrong now: each only now and then."""
        now = self.world.clocks.steady()
        if now < self._reported.get(word, now):
            return False
        self._reported[word] = now + REPORT_SECONDS
        return True

    # ── Early refresh ────────────────────────────────────────────────────────────────────────────────────────────────

    def _due(self, stored: bytes) -> bool:
        """Decide by chance, as in "Optimal Probabilistic Cache Stampede Prevention" (XFetch)."""
        try:
            times = self._envelope.times(stored)
        except ValueError:
            return True
        ahead = times.load * self.options.early * -math.log(1.0 - self.world.clocks.chance())
        return self._now() + ahead >= times.expires

    def _refresh(self, early: Sequence[Entry]) -> Steps[None]:
        """Reload entries that have a value, unless another reader does."""
        for entry in early:
            entry.refresh = True
        replies = yield Send([self._commands.take(entry) for entry in early])
        mine = [entry for entry, reply in zip(early, replies, strict=True) if self._commands.granted(entry, reply)]
        if not mine:
            return
        self.metrics.early_refreshes(len(mine))
        try:
            yield from self._load(mine)
        except Unavailable as gone:
            self.metrics.bypasses(gone.reason, len(mine))
        except Exception:  # noqa: BLE001  a value is there, and in date; if loads still fail when it is not, that shows
            _log.warning("an early refresh of cache %s failed", self.cache.name, exc_info=True)

    def _refresh_later(self, early: Sequence[Entry]) -> Steps[None]:
        """Do the same after the read has returned."""
        for entry in early:
            entry.token = entry.lease = b""
        try:
            yield from self._refresh(early)
        except Unavailable:
            return
        except GeneratorExit:
            raise
        except BaseException:
            yield from self._release([entry for entry in early if entry.token])
            raise
        finally:
            for entry in early:
                self.world.refreshing.pop(entry.key, None)

    # ── Warming, writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def warm(self, entries: Iterable[Entry], *, rate: float, limit: int | None) -> Steps[int]:
        """Load missing entries that nobody else loads, one after the other, and return how many were stored.

        Args:
            entries: in the order in which they are wanted; no more are taken than needed.
            rate: how many are loaded a second, at most.
            limit: how many are loaded, at most.
        """
        clocks = self.world.clocks
        loaded = stored = 0
        due = clocks.steady()
        for entry in entries:
            if loaded == limit:
                break
            try:
                yield from self._take([entry])
                if self._value(entry, entry.seen, Demand()) is MISS and entry.refresh:
                    yield from self._take([entry])  # what is there has expired
                reply = entry.seen
                if isinstance(reply, Exception):
                    self.metrics.bypasses(self._refused(reply))
                    break
                if not self._commands.granted(entry, reply):
                    continue
                stored += yield from self._load([entry])
            except Unavailable as gone:
                self.metrics.bypasses(gone.reason)
                if self.world.cluster:
                    continue  # other servers have other keys
                break
            loaded += 1
            due = max(due + 1 / rate, clocks.steady() - 1)
            if (early := due - clocks.steady()) > 0:
                yield Sleep(early)
            if clocks.steady() >= self.world.agreement.next_at:
                yield from self.agree()
        return stored

    def seize(self, entry: Entry) -> Steps[bool]:
        """Take the lease even if another reader has it: its load may be older than what is about to be written."""
        try:
            if self._versioned:
                (version,) = yield Send([self._commands.make_version(entry)])
                if isinstance(version, Exception):
                    self.metrics.bypasses(self._refused(version))
                    return False
                self._commands.name(entry, version)
            (reply,) = yield Send([self._commands.seize(entry)])
        except Unavailable as gone:
            self.metrics.bypasses(gone.reason)
            return False
        except GeneratorExit:
            raise
        except BaseException:
            yield from self._release([entry])
            raise
        if isinstance(reply, Exception):
            self.metrics.bypasses(self._refused(reply))
            return False
        return self._commands.granted(entry, reply)

    def reload(self, entry: Entry) -> Steps[None]:
        """Load an entry whatever is there, and store it, unless a bust comes meanwhile."""
        if (yield from self.seize(entry)):
            yield from self._load([entry])
        else:
            (value,) = yield Load([entry])
            entry.found(value)

    def put(self, entry: Entry, value: Any, began: float) -> Steps[bool]:
        """Store what was written, if no bust came since `seize`."""
        entry.found(value)
        try:
            return (yield from self._store([entry], began, 0.0)) == 1
        except Unavailable as gone:
            self.metrics.bypasses(gone.reason)
            return False

    def let_go(self, entry: Entry) -> Steps[None]:
        """Give back what `seize` took."""
        yield from self._release([entry])

    def not_committed(self, what: str) -> None:
        """Count and tell that ``what`` came before the commit."""
        self.metrics.bypasses("transaction")
        self._advise(
            f"{what} inside a transaction that has written; do it after the commit (in Django by transaction.on_commit)"
        )

    def invalidate(self, entry: Entry) -> Steps[bool]:
        """Do what a bust does; False if Redis did not."""
        commands: list[Command] = []
        try:
            if self._versioned and self.cache.bump_over is None:
                # The next reader makes a new version, from the clock.
                commands = [("UNLINK", entry.version_key), ("UNLINK", entry.version_key + STALE_SUFFIX)]
            else:
                versions: Sequence[Any] = [b""]
                if self._versioned:
                    # Under the version before, there may be a value that readers are shown while another one loads.
                    versions = yield Send([("GET", name) for name in self._commands.with_old(entry.version_key)])
                for version in versions:
                    if isinstance(version, Exception):
                        self.metrics.bypasses(self._refused(version))
                        return False
                    if version is not None:
                        self._commands.name(entry, version)
                        commands += self._commands.bust(entry)
                if not commands:
                    return True
            replies = yield Send(commands)
        except Unavailable as gone:
            self.metrics.bypasses(gone.reason)
            return False
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if refused:
            self.metrics.bypasses(self._refused(refused[0]))
        return not refused

    def _now(self) -> int:
        return int(self.world.clocks.wall() * 1000)
