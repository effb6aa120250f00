"""The commands that readers of one cache send to Redis about an entry, and what the replies mean. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cdc_invalidator.reader.entry import Entry
from cdc_invalidator.reader.keys import NUL
from cdc_invalidator.reader.steps import Command, Renewal
from cdc_invalidator.reader.world import World
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.suffixes import LOCK_SUFFIX, STALE_SUFFIX

# How many versions a process remembers, for each cache.
REMEMBERED = 10_000


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
        self._header = header
        self._lease = max(1, int(lease * 1000))
        self._versioned = cache.version is not None
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
        return self.versioned_look(entry, taking=taking)

    def versioned_look(self, entry: Entry, *, taking: bool = True) -> Command:
        """Return the command that reads the version and then the key, and takes the lease if it may."""
        entry.guess = b""
        return (
            "EVALSHA",
            self._scripts.versioned,
            1,
            entry.version_key,
            self._token(entry) if taking else b"",
            self._lease,
            NUL if entry.refresh else self._header,
            self._cache.version_ttl,
            entry.rest,
            LOCK_SUFFIX,
            STALE_SUFFIX if entry.stale else b"",
        )

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
        if type(reply) is not int or not reply:
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

    def release(self, entry: Entry) -> Command:
        """Return the command that gives a lease back; where it is not known whether it was granted, by the token."""
        return ("EVALSHA", self._scripts.release, 1, self._lock(entry), entry.lease or entry.token + b":")

    def bust(self, entry: Entry) -> list[Command]:
        """Return the commands that delete the entry as a bust does, the lock first."""
        return [("UNLINK", self._lock(entry)), ("UNLINK", entry.key), ("UNLINK", entry.key + STALE_SUFFIX)]

    def _lock(self, entry: Entry) -> bytes:
        # Where busts only bump versions, the daemon deletes no locks; this one is named to lie in the key's slot.
        return entry.key + LOCK_SUFFIX if self._locks_beside else b"{%b}%b" % (entry.key, LOCK_SUFFIX)

    def _token(self, entry: Entry) -> bytes:
        if not entry.token:
            entry.token = self._tokens.next()
        return entry.token
