"""The commands that readers of one cache send to Redis about an entry, and what the replies mean. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from cdc_invalidator.reader.entry import Entry
from cdc_invalidator.reader.freshness import ANY, NotProven
from cdc_invalidator.reader.keys import NUL
from cdc_invalidator.reader.marks import hash_tag
from cdc_invalidator.reader.steps import Command, Renewal
from cdc_invalidator.reader.world import World
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, OLD_LOCK_SUFFIX, STALE_SUFFIX

# How many versions a process remembers, for each cache.
REMEMBERED = 10_000
# Redis serves nobody else during a command, so one command asks for so many keys at most; a script takes longer.
MGET_KEYS, SCRIPT_KEYS = 1000, 100
# What is seen of an entry whose value was loaded by another reader, and not stored.
NOT_STORED = -1
# For how many ms readers are told so: longer than they pause between two looks.
TOLD_MS = 300
# What a look gave that found only the version, in another hash slot than the key.
LATER = object()


class Looks:
    """Looks for many entries, in one round trip: ``commands``."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self._readers: list[Callable[[Any], None]] = []

    def add(self, command: Command, read: Callable[[Any], None]) -> None:
        """Add a command, and what takes its reply."""
        self.commands.append(command)
        self._readers.append(read)

    def read(self, replies: Sequence[Any]) -> None:
        """Note in each entry what was seen of it, which is `LATER` where its key must be asked for next."""
        for read, reply in zip(self._readers, replies, strict=True):
            read(reply)


class Commands:
    """How one cache is asked for.

    Args:
        cache: the cache, from the rule file.
        world: what all caches share.
        header: what a stored value begins with.
        lease: for how long a lease is taken, in seconds.
    """

    def __init__(self, cache: Cache, world: World, header: bytes, lease: float) -> None:
        self._cache = cache
        self._scripts = world.scripts
        self._tokens = world.tokens
        self._marks = world.marks
        self._now = world.clocks.wall
        self._standby = world.standby.encode()
        self._name = cache.name.encode()
        self._header = header
        self._lease = max(1, int(lease * 1000))
        self._versioned = cache.version is not None
        self._cluster = world.cluster
        self.one_hash_slot = not world.cluster or cache.one_hash_slot
        self._locks_beside = not world.cluster or bool(cache.key.hash_tag)
        # The versions of the last reads, with which the key is asked for together with its version.
        self._versions: dict[bytes, bytes] = {}

    # ── Looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self, entry: Entry, *, taking: bool = True) -> Command:
        """Return the command that looks for an entry; for a cache with a version, it may also take the lease."""
        if not self._versioned:
            return ("GET", entry.key)
        guess = self._versions.get(entry.version_key)
        if guess is not None:
            entry.guess = guess
            return ("MGET", entry.version_key, entry.rest.replace(NUL, guess))
        entry.guess = b""
        return self._versioned_look([entry], self._token(entry) if taking else b"")

    def _versioned_look(self, entries: Sequence[Entry], token: bytes) -> Command:
        """Return the command that reads versions and then keys, and takes leases under a token, if there is one."""
        return (
            "EVALSHA",
            self._scripts.versioned,
            len(entries),
            *(entry.version_key for entry in entries),
            token,
            self._lease,
            NUL if entries[0].refresh else self._header,
            self._cache.version_ttl,
            LOCK_SUFFIX,
            STALE_SUFFIX if entries[0].stale else b"",
            *(entry.rest for entry in entries),
        )

    def looks(self, entries: Iterable[Entry], *, taking: bool = True, guessing: bool = True) -> Looks:
        """Return the looks for many entries, in as few commands as can be.

        Args:
            entries: no key twice; all ask for the same freshness, of the same agreement. If they ask for one, leases
                may be taken.
            taking: whether the leases of what is missing may be taken; only done with versions that are not guessed.
            guessing: whether remembered versions may be used.
        """
        looks = Looks()
        if not self._versioned:
            for some in self._together(entries):
                keys = [entry.key for entry in some]
                if some[0].demand != ANY:
                    command = ("EVALSHA", self._scripts.look, len(keys), *keys) if len(keys) > 1 else self.take(some[0])
                else:
                    command = ("MGET", *keys) if len(keys) > 1 else ("GET", *keys)
                read = partial(_spread, some) if len(keys) > 1 else partial(_note, some[0])
                self._add(looks, some, keys[0], command, read)
            return looks
        guessed, unknown = [], []
        for entry in entries:
            guesses = guessing and entry.demand == ANY
            entry.guess = self._versions.get(entry.version_key, b"") if guesses else b""
            if entry.guess:
                entry.key = entry.rest.replace(NUL, entry.guess)
                guessed.append(entry)
            else:
                unknown.append(entry)
        if not self.one_hash_slot:
            self._look_apart(looks, guessed, unknown)
            return looks
        for some in self._together(guessed):
            names = list(dict.fromkeys([entry.version_key for entry in some]))
            looks.add(("MGET", *names, *[entry.key for entry in some]), partial(self._compare, some, names))
        for some in self._alike(unknown):
            token = self._token(some[0]) if taking else b""
            if taking:
                for entry in some:
                    entry.token = token
            command = self._versioned_look(some, token)
            self._add(looks, some, some[0].version_key, command, partial(self._learn, some))
        return looks

    def takes(self, entries: Iterable[Entry]) -> Looks:
        """Return what looks once more for each entry, whose version is known, and takes its lease."""
        looks = Looks()
        for entry in entries:
            self._add(looks, [entry], entry.key, self.take(entry), partial(_note, entry))
        return looks

    def _add(
        self, looks: Looks, some: Sequence[Entry], key: bytes, command: Command, read: Callable[[Any], None]
    ) -> None:
        """Add a command; behind the proof, if its entries ask for a freshness: then it is a script.

        Args:
            looks: what to add it to.
            some: the entries.
            key: one of the keys of the command; all lie in one hash slot.
            command: the command.
            read: takes its reply.
        """
        lsn, max_age = demand = some[0].demand
        if demand == ANY:
            looks.add(command, read)
            return
        mark = self._marks.of(key)
        if mark is None:
            _spread(some, NotProven("elsewhere"))
            return
        as_of = b"" if max_age is None else b"%d" % max(0, int(self._now() * 1000) - max_age)
        asked = (mark.name, some[0].agreed, self._name, lsn, as_of, self._standby, mark.hash_slot)
        _, script, *rest = command
        looks.add(("EVALSHA", self._scripts.proven[script], *rest, *asked), partial(self._if_proven, some, read))

    def _if_proven(self, some: Sequence[Entry], read: Callable[[Any], None], reply: Any) -> None:
        """Take the reply to a script behind the proof: a list with one word, where nothing is proven."""
        if type(reply) is not list or len(reply) != 1:
            read(reply)
            return
        _spread(some, NotProven(reply[0].decode()))
        # Since hash slots have moved, the node may have another watermark, and no more write this one.
        self._marks.doubt()

    def _look_apart(self, looks: Looks, guessed: Sequence[Entry], unknown: Sequence[Entry]) -> None:
        """Look for versions and, where they can be guessed, for keys, which lie on other nodes.

        These may answer in any order: a version that is current after the first answer and before the second never was
        another in between.
        """
        sharing: dict[bytes, list[Entry]] = {}
        for entry in (*guessed, *unknown):
            sharing.setdefault(entry.version_key, []).append(entry)
        for some in sharing.values():
            self._add(looks, some, some[0].version_key, self.make_version(some[0]), partial(self._name_all, some))
        for entry in guessed:
            looks.add(("GET", entry.key), partial(_see, entry, entry.key))

    def _together(self, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
        """Cut entries into those that one MGET may ask for."""
        if self._cluster:
            by_tag: dict[bytes, list[Entry]] = {}
            for entry in entries:
                by_tag.setdefault(hash_tag(entry.key), []).append(entry)
            for some in by_tag.values():
                yield from _chunks(some, MGET_KEYS)
        else:
            yield from _chunks(list(entries), MGET_KEYS)

    def _alike(self, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
        """Cut entries into those that one script may ask for."""
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            tag = hash_tag(entry.version_key) if self._cluster else b""
            groups.setdefault((entry.token, entry.refresh, entry.stale, tag), []).append(entry)
        for some in groups.values():
            yield from _chunks(some, SCRIPT_KEYS)

    def _compare(self, some: Sequence[Entry], names: Sequence[bytes], reply: Any) -> None:
        """Take versions, then values under versions that were guessed."""
        if isinstance(reply, Exception):
            _spread(some, reply)
            return
        versions = dict(zip(names, reply, strict=False))
        for entry, found in zip(some, reply[len(names) :], strict=True):
            if versions[entry.version_key] == entry.guess:
                entry.seen = found
            else:
                self._versions.pop(entry.version_key, None)
                entry.key, entry.seen = entry.rest, None

    def _learn(self, some: Sequence[Entry], reply: Any) -> None:
        """Take pairs of a version and what is under it."""
        if isinstance(reply, Exception):
            _spread(some, reply)
            return
        for entry, version, found in zip(some, reply[::2], reply[1::2], strict=True):
            self._remember(entry.version_key, version)
            entry.key, entry.seen = entry.rest.replace(NUL, version), found

    def _name_all(self, some: Sequence[Entry], version: Any) -> None:
        """Take a version that some entries share."""
        for entry in some:
            if isinstance(version, Exception):
                entry.key, entry.seen = entry.rest, version
            else:
                self._remember(entry.version_key, version)
                entry.key, entry.seen = entry.rest.replace(NUL, version), LATER

    @property
    def looks_once(self) -> bool:
        """Whether one command is enough to look."""
        return self.one_hash_slot or not self._versioned

    def stored(self, entry: Entry, reply: Any) -> Any:
        """Return what a look found under the key: its bytes if there are any, else the state of the lease."""
        if not self._versioned or isinstance(reply, Exception):
            return reply
        version, found = reply
        if not entry.guess:
            self._remember(entry.version_key, version)
        elif version != entry.guess:
            self._versions.pop(entry.version_key, None)
            return None
        entry.key = entry.rest.replace(NUL, version)
        return found

    def _remember(self, version_key: bytes, version: bytes) -> None:
        if len(self._versions) >= REMEMBERED:
            self._versions.clear()
        self._versions[version_key] = version

    def make_version(self, entry: Entry) -> Command:
        """Return the command that reads the version, or makes it."""
        return ("EVALSHA", self._scripts.version, 1, entry.version_key, self._cache.version_ttl)

    def name(self, entry: Entry, version: Any) -> None:
        """Put the version into the entry's key, if the reply has one."""
        if self._versioned and isinstance(version, bytes):
            entry.key = entry.rest.replace(NUL, version)

    # ── Leases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, entry: Entry) -> Command:
        """Return the command that looks once more and takes the lease."""
        header = NUL if entry.refresh else self._header
        keys = (self._lock(entry), entry.key, *((entry.key + STALE_SUFFIX,) if entry.stale else ()))
        return ("EVALSHA", self._scripts.take, len(keys), *keys, self._token(entry), self._lease, header)

    def seize(self, entry: Entry) -> Command:
        """Return the command that takes the lease even if another reader has it."""
        return ("EVALSHA", self._scripts.seize, 1, self._lock(entry), self._token(entry), self._lease)

    def granted(self, entry: Entry, reply: Any) -> bool:
        """Return whether the lease is ours, and note its token and number; a late copy has another number."""
        if type(reply) is not int or reply <= 0:
            return False
        entry.lease = b"%b:%d" % (entry.token, reply)
        return True

    def renewal(self, mine: Iterable[Entry], limit: float) -> Renewal:
        """Return what keeps the leases of entries alive, for so many seconds at most."""
        renew = self._scripts.renew
        commands = [("EVALSHA", renew, 1, self._lock(entry), entry.lease, self._lease) for entry in mine]
        return Renewal(commands, self._lease / 3000, limit)

    def fill(self, entry: Entry, stored: bytes, ttl: int) -> Command:
        """Return the command that stores a value for so many ms, if the lease is still held."""
        return ("EVALSHA", self._scripts.fill, 2, self._lock(entry), entry.key, entry.lease, stored, ttl)

    def release(self, entry: Entry, *, telling: bool = False) -> Command:
        """Return the command that gives a lease back; where it is not known whether it was granted, by the token.

        Args:
            entry: whose lease it is.
            telling: tell those that wait for what was loaded that it is not stored.
        """
        told = (TOLD_MS,) if telling else ()
        return ("EVALSHA", self._scripts.release, 1, self._lock(entry), entry.lease or entry.token + b":", *told)

    def with_old(self, name: bytes) -> list[bytes]:
        """Return the name of a value or version, and that of the one before which a bust may have left."""
        return [name, name + STALE_SUFFIX] if self._cache.stale_for is not None else [name]

    def bust(self, entry: Entry) -> list[Command]:
        """Return the commands that delete the entry as a bust does, the locks first."""
        names = (self._lock(entry), entry.key + OLD_LOCK_SUFFIX, entry.key, entry.key + STALE_SUFFIX)
        return [("UNLINK", name) for name in names]

    def _lock(self, entry: Entry) -> bytes:
        # Where busts only bump versions, the daemon deletes no locks; this one is named to lie in the key's slot.
        return entry.key + LOCK_SUFFIX if self._locks_beside else b"{%b}%b" % (entry.key, LOCK_SUFFIX)

    def _token(self, entry: Entry) -> bytes:
        if not entry.token:
            entry.token = self._tokens.next()
        return entry.token


def _note(entry: Entry, reply: Any) -> None:
    entry.seen = reply


def _spread(some: Sequence[Entry], reply: Any) -> None:
    """Take the values of some entries, or an error for all of them."""
    if isinstance(reply, Exception):
        for entry in some:
            entry.seen = reply
    else:
        for entry, found in zip(some, reply, strict=True):
            entry.seen = found


def _see(entry: Entry, key: bytes, reply: Any) -> None:
    """Take what is under a key that was guessed, if that is the entry's key."""
    if entry.seen is LATER and entry.key == key:
        entry.seen = reply


def _chunks(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    for start in range(0, len(entries), size):
        yield list(entries[start : start + size])
