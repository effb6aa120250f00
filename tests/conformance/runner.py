"""Proves a client of any language against the vectors: a real Valkey, a proxy that sees each command, one subprocess.

The client reads JSON lines and answers with JSON lines; CONTRACT.md of the reader tells which. It is told what to read,
asks for the load when it wants one, and gives the value. What it stores, and by which commands, is its own affair: what
counts is what it reads when a commit, a bust or a fault comes before any of its commands. So an `interleave` is played
as often as there are places for its events, each time with a key of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import redis
from resp import NONE, RespProxy

from cdc_invalidator.redis.scripts import BUMP
from cdc_invalidator.rules.suffixes import STALE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

VECTORS: Final = Path(__file__).with_name("vectors.json")
SECONDS: Final = 30.0
MILLISECONDS: Final = {"s": 1000, "m": 60_000, "h": 3_600_000}
# What a driver says for itself.
_DRIVERS: Final = {b"HELLO", b"AUTH", b"SELECT", b"CLIENT", b"PING", b"INFO", b"COMMAND", b"SCRIPT", b"QUIT"}
_LOOKS: Final = {b"GET", b"MGET", b"EXISTS", b"TIME", b"PTTL", b"TTL"}
_SOMEBODY: Final = "somebody"
_MARK: Final = "cdc:cdc_invalidator:watermark"
_LSN: Final = 2**63 + 11  # more than doubles hold exactly


def names() -> list[str]:
    """Give the names of all vectors."""
    return [vector["name"] for vector in json.loads(VECTORS.read_text())["vectors"]]


class Broken(Exception):
    """The client does not keep the contract; the message says what it did."""


class _Way(RespProxy):
    """The way to Redis: tells each command of the client, before it is passed on, and may be told to refuse it."""

    def __init__(self, server_port: int) -> None:
        super().__init__(server_port)
        self.sent: list[list[bytes]] = []
        self.before: Callable[[int], bytes] = lambda _: NONE
        self.failure: Exception | None = None

    def fault_of(self, command: list[bytes]) -> bytes:
        if command[0].upper() in _DRIVERS:
            return NONE
        number = len(self.sent)
        try:
            answer = self.before(number)
        except Exception as failure:  # noqa: BLE001  raised again by the runner's own thread
            self.failure = failure
            answer = NONE
        self.sent.append(command)
        return answer


class _Client:
    """The client under test: a process that reads and writes JSON lines."""

    def __init__(self, command: Sequence[str], url: str, rules: Path) -> None:
        environment = os.environ | {"CONFORMANCE_REDIS": url, "CONFORMANCE_RULES": str(rules)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Give its next line.

        Raises:
            Broken: it has ended, says nothing, or no JSON.
        """
        try:
            line = self._lines.get(timeout=SECONDS)
        except queue.Empty:
            raise Broken(f"it has said nothing for {SECONDS:g} s") from None
        try:
            heard = json.loads(line)
        except ValueError:
            raise Broken(f"it said {line!r}, which is no JSON" if line else "it has ended") from None
        if not isinstance(heard, dict):
            raise Broken(f"it said {line!r}; an object is expected")
        return heard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            end.close()


class Runner:
    """Plays vectors with one client.

    Args:
        command: starts the client.
        port: of the Redis or Valkey on this machine that it is tested with; it is emptied.
        folder: for the rule file.
    """

    def __init__(self, command: Sequence[str], port: int, folder: Path) -> None:
        self._command = command
        self._port = port
        self._book = json.loads(VECTORS.read_text())
        self._rules = folder / "rules.yaml"
        # JSON is YAML.
        self._rules.write_text(json.dumps({"version": 1, "caches": self._book["caches"], "rules": []}))
        self._ids = itertools.count(1)

    def run(self, name: str) -> None:
        """Play one vector.

        Raises:
            Broken: the client does not do what the contract asks.
        """
        (vector,) = (each for each in self._book["vectors"] if each["name"] == name)
        with (
            _Way(self._port) as way,
            _Client(self._command, way.url, self._rules) as client,
            redis.Redis(port=self._port, decode_responses=True) as server,
        ):
            server.flushall()
            for play in self._plays(vector, way):
                scene = _Scene(vector["cache"], self._book["caches"], next(self._ids), way, client, server)
                play(scene)

    def _plays(self, vector: Mapping[str, Any], way: _Way) -> Iterator[Callable[[_Scene], None]]:
        if "steps" in vector:
            yield lambda scene: scene.play(vector["steps"])
            return
        events: list[str] = vector["interleave"]
        # The first play tells how many commands there are; each event comes before one of them, in order. A play may
        # have more commands than the first one had, because of what came in between.
        yield lambda scene: scene.interleave([], vector)
        places = range(len(way.sent) + 2)
        for chosen in itertools.combinations_with_replacement(places, len(events)):
            yield lambda scene, chosen=chosen: scene.interleave(chosen, vector)  # type: ignore[misc]


class _Scene:
    """One key of one cache, the row that it is of, and all that can be done to them."""

    def __init__(
        self, name: str, caches: Mapping[str, Any], number: int, way: _Way, client: _Client, server: redis.Redis
    ) -> None:
        cache = caches[name]
        self._way, self._client, self._server = way, client, server
        self._counter = cache["version"].replace("{id}", str(number)) if "version" in cache else None
        self._single = "bump_over" in cache or self._counter is None
        self._template = cache["key"].replace("{id}", str(number))
        times = {each: _milliseconds(cache.get(each)) for each in ("ttl", "negative_ttl", "version_ttl")}
        self._ttl, self._version_ttl = times["ttl"] or 0, times["version_ttl"]
        self._request = {
            "cache": name,
            "params": {"id": number},
            "key": self._template,
            "version": self._counter,
            **times,
        }
        self._row: int | None = 1
        self._commits = 1
        self._kept: bytes | None = None
        self._older: dict[Any, Any] = {}
        self._made = 0
        self._began = 0
        way.before = lambda _: NONE

    # A read.

    def play(self, steps: Iterable[Mapping[str, Any]]) -> None:
        for step in steps:
            if "get" in step:
                self.get(step["get"])
            for what in (*step.get("do", ()), *step.get("check", ())):
                self._do(what)

    def get(self, wanted: Mapping[str, Any]) -> None:
        """Let the client read, and hold what it gives against what is wanted."""
        self._began = len(self._way.sent)
        if "after" in wanted:
            left = [(self._began + wanted["after"], event) for event in wanted["then"]]
            self._way.before = partial(self._before, left)
        before = self._row
        asks = {"at_least": str(_LSN), "watermark": _MARK} if wanted.get("at_least") else {}
        self._client.tell({"get": self._request | asks})
        loads = 0
        while "load" in (heard := self._client.hear()):
            loads += 1
            self._client.tell(self._load(wanted.get("meanwhile", ())))
        if self._way.failure is not None:
            raise self._way.failure
        if ("error" in heard) != wanted.get("error", False):
            raise Broken(f"it gave {heard}")
        if "loads" in wanted and loads != wanted["loads"]:
            raise Broken(f"it loaded {loads} times, and should have {wanted['loads']} times")
        commands = self._way.sent[self._began :]
        if "commands" in wanted and len(commands) > wanted["commands"]:
            raise Broken(f"it sent {len(commands)} commands for a hit: {commands}")
        expected = {"now": self._row, "before": before}.get(wanted.get("value", ""), heard.get("value"))
        if "error" not in heard and heard.get("value") != expected:
            raise Broken(f"it gave {heard.get('value')}, where {expected} is in the database")

    def _load(self, meanwhile: Sequence[str]) -> dict[str, Any]:
        """Answer a load: what is in the database now, or at the event `load`, and what comes between."""
        loaded: dict[str, Any] | None = None
        for what in meanwhile:
            if what == "load":
                loaded = {"loaded": self._row}
            elif what == "fail":
                loaded = {"failed": "the database is away"}
            else:
                self._do(what)
        return {"loaded": self._row} if loaded is None else loaded

    def interleave(self, places: Sequence[int], vector: Mapping[str, Any]) -> None:
        """Let the client read while each event comes before the command of its place; then it must read what is new."""
        events, value = vector["interleave"][: len(places)], vector.get("value")
        asks = {"at_least": True} if vector.get("at_least") else {}
        for what in vector.get("begin", ()):
            self._do(what)
        first = len(self._way.sent)
        left = [(first + place, event) for place, event in zip(places, events, strict=True)]
        self._way.before = partial(self._before, left)
        told = ", ".join(f"`{event}` before its command {place + 1 - first}" for place, event in left)
        try:
            self.get(({"value": value} if value else {}) | asks)
            self._way.before = lambda _: NONE
            for _, event in left:
                self._do(event)
            # A lease that nobody gives back would run out by itself.
            self._let_go()
            self.get({"value": "now"} | asks)
        except Broken as broken:
            commands = [b" ".join(word[:40] for word in each) for each in self._way.sent[first:]]
            raise Broken(f"{told}: {broken}; it sent {commands}") from broken

    def _before(self, left: list[tuple[int, str]], number: int) -> bytes:
        """Let those events happen, and take them out, whose place is before the command of this number."""
        answer = NONE
        while left and left[0][0] <= number:
            answer = self._do(left.pop(0)[1]) or answer
        return answer

    # What happens, and what is looked at.

    def _do(self, what: str) -> bytes:
        """Let something happen, or look whether something is so; give an error that is the next command's answer."""
        name, _, rest = what.partition(" ")
        if name == "refuse":
            return f"-{rest}\r\n".encode()
        done: Any = getattr(self, f"_{what.replace(' ', '_')}")()
        if done is False:
            raise Broken(f"`{what}` is not so")
        return NONE

    @property
    def _key(self) -> str:
        return str(self._template).replace("{version}", str(self._version))

    @property
    def _version(self) -> int:
        """What the version is, 0 if there is none."""
        found: Any = self._server.get(self._counter) if self._counter else None
        return int(found or 0)

    @property
    def _lock(self) -> str:
        return f"{self._key}\0lock"

    def _commit(self) -> None:
        self._commits += 1
        self._row = self._commits

    def _delete(self) -> None:
        self._row = None

    def _bust(self) -> None:
        """As the daemon does it: the lock goes first, or the version is bumped."""
        if not self._single:
            self._bump()
            return
        self._server.unlink(self._lock)
        self._server.unlink(self._key)

    def _bump(self) -> None:
        assert self._counter is not None
        self._server.eval(BUMP, 1, self._counter, str(self._version_ttl), "0", STALE_SUFFIX.decode())

    def _evict(self) -> None:
        assert self._counter is not None
        self._made = max(self._made, self._version)
        self._server.unlink(self._counter)

    def _again(self) -> None:
        """Deliver what the client has sent for this read once more; nobody hears the replies."""
        with redis.Redis(port=self._port) as late:
            for command in self._way.sent[self._began :]:
                if command[0].upper() not in _LOOKS:
                    late.execute_command(*command)

    def _keep(self) -> None:
        with redis.Redis(port=self._port) as raw:
            self._kept = raw.get(self._key)

    def _restore(self) -> None:
        assert self._kept is not None
        self._server.set(self._key, self._kept, px=self._ttl)

    def _fill(self) -> None:
        self.get({"value": "now"})

    def _mark_there(self) -> None:
        self._write_mark(_LSN)

    def _mark_behind(self) -> None:
        self._write_mark(_LSN - 1)

    def _mark_without_cache(self) -> None:
        self._write_mark(_LSN, "another")

    def _write_mark(self, lsn: int, cache: str = "") -> None:
        rules = {cache or self._request["cache"]: "digest"}
        self._server.hset(_MARK, mapping={"lsn": str(lsn), "rules": json.dumps(rules, separators=(",", ":"))})

    def _note(self) -> None:
        """Note down all that a master that is replaced goes on answering with."""
        with redis.Redis(port=self._port) as raw:
            self._older = {key: raw.dump(key) for key in raw.keys("*")}

    def _lag(self) -> None:
        """Have again what was noted down, as a replica that lagged has when it is promoted."""
        with redis.Redis(port=self._port) as raw:
            raw.flushdb()
            for key, dumped in self._older.items():
                raw.restore(key, 0, dumped)

    def _seize(self) -> None:
        self._server.set(self._lock, _SOMEBODY, px=60_000)

    def _let_go(self) -> None:
        self._server.unlink(self._lock)

    def _forget_scripts(self) -> None:
        self._server.script_flush()

    def _cut(self) -> None:
        self._way.cut()

    def _lock_held(self) -> bool:
        return 0 < self._left(self._lock) <= SECONDS * 1000

    def _lock_free(self) -> bool:
        # What tells readers for a moment that nothing was stored is no lease.
        return self._server.get(self._lock) in {None, "-", b"-"}

    def _lock_theirs(self) -> bool:
        return self._server.get(self._lock) == _SOMEBODY

    def _key_absent(self) -> bool:
        return not self._server.exists(self._key)

    def _key_kept(self) -> bool:
        return 0 < self._left(self._key) <= self._ttl

    def _version_kept(self) -> bool:
        assert self._counter is not None
        return 0 < self._left(self._counter) <= (self._version_ttl or 0)

    def _version_of_the_clock(self) -> bool:
        return abs(self._version - time.time_ns() // 1000) < SECONDS * 1_000_000

    def _version_grew(self) -> bool:
        return self._version > self._made

    def _left(self, key: str) -> int:
        left: Any = self._server.pttl(key)
        return int(left)

    @property
    def _port(self) -> int:
        return int(self._server.connection_pool.connection_kwargs["port"])


def _milliseconds(time: str | None) -> int | None:
    return None if time is None else int(time[:-1]) * MILLISECONDS[time[-1]]
