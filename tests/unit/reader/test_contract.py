"""What a read decides, step by step: any interleaving of readers, commits and busts, on a model of Redis."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_invalidator.reader.contract import Contract
from cdc_invalidator.reader.entry import Entry
from cdc_invalidator.reader.freshness import ANY
from cdc_invalidator.reader.marks import Marks
from cdc_invalidator.reader.metrics import no_metrics
from cdc_invalidator.reader.options import Options
from cdc_invalidator.reader.steps import Load, Renewal, Send, Sleep, Unavailable, Wait
from cdc_invalidator.reader.world import Clocks, World
from cdc_invalidator.rules.load import parse_rules

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m, negative_ttl: 1m}
  page: {key: "t:page:{id}:{version}", version: "t:page:{id}:ver", ttl: 5m, negative_ttl: 1m}
  both: {key: "t:both:{id}:{version}", version: "t:both:{id}:ver", bump_over: 10, ttl: 5m, negative_ttl: 1m}
  old: {key: "t:old:{id}", ttl: 5m, negative_ttl: 1m, stale_for: 1m}
rules: []
"""
CACHES = parse_rules([("rules.yaml", RULES)], {}).caches
OF_MANY = parse_rules(
    [
        (
            "many.yaml",
            """
version: 1
caches:
  shared: {key: "t:shared:{id}:{version}", version: "t:shared:ver", ttl: 5m}
  tagged: {key: "t:{{{team}}}:{id}:{version}", version: "t:{{{team}}}:{id}:ver", ttl: 5m}
rules: []
""",
        )
    ],
    {},
).caches


class Model:
    """Redis as far as a reader sees it; nothing expires unless told to."""

    def __init__(self, world: World) -> None:
        self.data: dict[bytes, bytes] = {}
        self.clock = 1_000_000
        self._scripts = {
            world.scripts.take: self._take,
            world.scripts.versioned: self._versioned,
            world.scripts.version: self._version,
            world.scripts.fill: self._fill,
            world.scripts.renew: self._renew,
            world.scripts.release: self._release,
            world.scripts.seize: self._seize,
        }

    def ask(self, *command: Any) -> Any:
        match command:
            case ("GET", key):
                return self.data.get(key)
            case ("MGET", *keys):
                return [self.data.get(key) for key in keys]
            case ("UNLINK", *keys):
                return sum(self.data.pop(key, None) is not None for key in keys)
            case ("HMGET", key, *fields):
                mark = json.loads(self.data.get(key, b"{}"))
                return [mark[field.decode()].encode() if field.decode() in mark else None for field in fields]
            case ("EVALSHA", digest, count, *rest):
                return self._scripts[digest](rest[:count], rest[count:])
        raise AssertionError(command)

    def _lease(self, lock: bytes, token: bytes) -> int:
        """Give the number of the lease, which is made if nobody holds one; 0 if somebody else does; -1: not stored."""
        held = self.data.get(lock)
        if held == b"-":
            return -1
        if held is None:
            return self._seize([lock], [token])
        return int(held.removeprefix(token + b":")) if held.startswith(token + b":") else 0

    def _seize(self, keys: list[bytes], args: list[Any]) -> int:
        self.clock += 1
        self.data[keys[0]] = b"%b:%d" % (args[0], self.clock)
        return self.clock

    def _take(self, keys: list[bytes], args: list[Any]) -> Any:
        value = self.data.get(keys[1])
        if value is not None and value.startswith(args[2]):
            return value
        number = self._lease(keys[0], args[0])
        return [self.data.get(keys[2])] if number <= 0 and len(keys) > 2 else number

    def _versioned(self, keys: list[bytes], args: list[Any]) -> Any:
        token, _, header, _, lock_suffix, _, *rests = args
        found: list[Any] = []
        for version_key, rest in zip(keys, rests, strict=True):
            self.clock += 1
            version = self.data.setdefault(version_key, b"%d" % self.clock)
            key = rest.replace(b"\0", version)
            value = self.data.get(key)
            if value is not None and not value.startswith(header):
                value = None
            leased = self._lease(key + lock_suffix, token) if token and value is None else None
            found += [version, leased if value is None else value]
        return found

    def _version(self, keys: list[bytes], _args: list[Any]) -> bytes:
        self.clock += 1
        return self.data.setdefault(keys[0], b"%d" % self.clock)

    def _fill(self, keys: list[bytes], args: list[Any]) -> int:
        if self.data.get(keys[0]) != args[0]:
            return 0
        self.data[keys[1]] = args[1]
        del self.data[keys[0]]
        return 1

    def _release(self, keys: list[bytes], args: list[Any]) -> int:
        if not self.data.get(keys[0], b"").startswith(args[0]):
            return 0
        del self.data[keys[0]]
        if len(args) > 1:
            self.data[keys[0]] = b"-"
        return 1

    def _renew(self, keys: list[bytes], args: list[Any]) -> int:
        return int(self.data.get(keys[0]) == args[0])

    # What the daemon does.

    def delete(self, key: bytes, grace: bool) -> None:
        self.data.pop(key + b"\0lock", None)
        value = self.data.pop(key, None)
        if grace and value is not None:
            self.data[key + b"\0stale"] = value

    def bump(self, counter: bytes) -> None:
        self.clock += 1
        if counter in self.data:
            self.data[counter] = b"%d" % max(int(self.data[counter]) + 1, self.clock)


class Times:
    """A clock that only `Sleep` moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def clocks(self) -> Clocks:
        return Clocks(steady=lambda: self.now, wall=lambda: self.now, chance=lambda: 0.5)


def contract_of(name: str, times: Times, *, cluster: bool = False, **options: Any) -> tuple[Contract[Any], Model]:
    world = World(Marks("slot"), clocks=times.clocks(), cluster=cluster)
    cache = CACHES[name] if name in CACHES else OF_MANY[name]
    return Contract(cache, Options(**options), world, no_metrics()), Model(world)


def drive(steps: Generator[Any, Any, Any], model: Model, load: Callable[[Entry], Any], times: Times) -> list[Any]:
    """Run steps to their end, and give what they wanted."""
    wanted = []
    try:
        effect = next(steps)
        while True:
            wanted.append(effect)
            match effect:
                case Send(commands):
                    effect = steps.send([model.ask(*command) for command in commands])
                case Load(entries):
                    effect = steps.send([load(entry) for entry in entries])
                case Sleep(seconds):
                    times.now += seconds
                    effect = steps.send(None)
                case Wait(_, seconds):
                    times.now += seconds
                    effect = steps.send(None)
    except StopIteration:
        return wanted


def reading(contract: Contract[Any], **params: Any) -> tuple[Entry, Generator[Any, Any, None]]:
    entry = contract.entry(params, params)
    return entry, contract.read([entry], ANY)


# ── Any interleaving ─────────────────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """One read of the row on its way; a step is one thing that it wants."""

    def __init__(self, contract: Contract[Any], model: Model, times: Times, row: Callable[[], int]) -> None:
        self.entry, self._steps = reading(contract, id=1)
        self._model = model
        self._times = times
        self._row = row
        self._effect: Any = next(self._steps)
        self.done = False
        # What readers may be given: what was there when it began, or later.
        self.at_least = 0

    def step(self) -> None:
        try:
            match self._effect:
                case Send(commands):
                    self._effect = self._steps.send([self._model.ask(*command) for command in commands])
                case Load(entries):
                    self._effect = self._steps.send([self._row()] * len(entries))
                case Sleep(seconds):
                    self._times.now += seconds
                    self._effect = self._steps.send(None)
                case Wait(event, seconds):
                    if not event.is_set():
                        self._times.now += min(seconds, 10.0)
                    self._effect = self._steps.send(None)
        except StopIteration:
            self.done = True


ACTIONS = st.lists(st.sampled_from(["begin", "step 0", "step 1", "step 2", "commit", "bust", "evict"]), max_size=60)


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=300)
@given(actions=ACTIONS)
def test_nothing_older_than_an_applied_bust_is_ever_stored_or_served(name: str, actions: list[str]) -> None:
    times = Times()
    contract, model = contract_of(name, times, wait=0.05)
    row, busted = 0, 0
    readers: list[Reader] = []
    key, counter = b"t:%b:1" % name.encode(), b"t:%b:1:ver" % name.encode()

    def bust() -> None:
        nonlocal busted
        if name == "both" and row % 2:
            version = model.data.get(counter)
            if version is not None:
                model.delete(key + b":" + version, grace=False)
        elif counter in model.data or name in {"page", "both"}:
            model.bump(counter)
        else:
            model.delete(key, grace=name == "old")
        busted = row

    def current() -> int:
        return row

    def step(number: int) -> None:
        if number < len(readers) and not readers[number].done:
            readers[number].step()

    for action in actions:
        if action == "begin" and len(readers) < 3:
            readers.append(Reader(contract, model, times, current))
            readers[-1].at_least = busted
        elif action == "commit":
            row += 1
        elif action == "bust":
            bust()
        elif action == "evict":
            model.data.pop(counter, None)
        elif action.startswith("step"):
            step(int(action[-1]))
    for number in range(3):
        while number < len(readers) and not readers[number].done:
            step(number)
    if busted < row:
        bust()
    if name != "old":
        assert all(reader.entry.value >= reader.at_least for reader in readers)
    entry, steps = reading(contract, id=1)
    drive(steps, model, lambda _: row, times)
    assert entry.value == row
    times.now += 1
    entry, steps = reading(contract, id=1)
    drive(steps, model, lambda _: pytest.fail("it is stored now"), times)
    assert entry.value == row


# ── One step after the other ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_miss_is_a_look_a_lease_a_load_and_a_fill() -> None:
    times = Times()
    contract, model = contract_of("user", times)
    entry, steps = reading(contract, id=1)
    look, take, load, fill = drive(steps, model, lambda _: "Ada", times)
    scripts = contract.world.scripts
    assert look == Send([("GET", b"t:user:1")])
    token = take.commands[0][5]
    assert take == Send([("EVALSHA", scripts.take, 2, b"t:user:1\0lock", b"t:user:1", token, 3_000, b"cdc1 1 ")])
    renewal = [("EVALSHA", scripts.renew, 1, b"t:user:1\0lock", b"%b:%d" % (token, model.clock), 3_000)]
    assert load == Load([entry], Renewal(renewal, 1.0, 60.0))
    stored = b'cdc1 1 0000001000000 0000001300000 0000000\n"Ada"'
    lease = b"%b:%d" % (token, model.clock)
    assert fill == Send([("EVALSHA", scripts.fill, 2, b"t:user:1\0lock", b"t:user:1", lease, stored, 300_000)])
    entry, steps = reading(contract, id=1)
    assert drive(steps, model, lambda _: None, times) == [look]
    assert entry.value == "Ada"


def read_many(contract: Contract[Any], model: Model, times: Times, ids: Iterable[int], row: str) -> list[str]:
    """Read many keys, and give the commands of each round trip, and ``load``."""
    entries = [contract.entry(each, {"id": each}) for each in ids]
    wanted = drive(contract.read(entries, ANY), model, lambda _: row, times)
    assert [entry.value for entry in entries] == [row] * len(entries)
    names = {
        digest: name
        for name in ("take", "versioned", "version", "fill")
        for digest in [getattr(contract.world.scripts, name)]
    }
    return [
        " ".join(f"{names.get(command[1], command[0])}" for command in effect.commands)
        if isinstance(effect, Send)
        else "load"
        for effect in wanted
    ]


def test_many_keys_are_looked_for_in_one_round_trip_and_as_few_commands_as_can_be() -> None:
    times = Times()
    contract, model = contract_of("page", times)
    ids = range(250)
    fills = " ".join(["fill"] * 250)
    assert read_many(contract, model, times, ids, "Ada") == ["versioned versioned versioned", "load", fills]
    assert read_many(contract, model, times, ids, "Ada") == ["MGET"]
    cold = Contract(contract.cache, contract.options, contract.world, no_metrics())
    assert read_many(cold, model, times, range(50), "Ada") == ["versioned"]
    assert read_many(cold, model, times, range(100), "Ada") == ["MGET versioned"]


def test_of_many_keys_only_those_whose_version_has_changed_are_loaded_again() -> None:
    times = Times()
    contract, model = contract_of("page", times)
    read_many(contract, model, times, range(100), "Ada")
    for each in (7, 70):
        model.bump(b"t:page:%d:ver" % each)
    entries = [contract.entry(each, {"id": each}) for each in range(100)]
    drive(contract.read(entries, ANY), model, lambda entry: f"new {entry.item}", times)
    assert [entry.value for entry in entries if entry.value != "Ada"] == ["new 7", "new 70"]


def test_of_many_keys_without_a_version_those_that_are_there_are_one_mget() -> None:
    times = Times()
    contract, model = contract_of("user", times)
    assert read_many(contract, model, times, range(2), "Ada") == ["MGET", "take take", "load", "fill fill"]
    assert read_many(contract, model, times, range(2), "Ada") == ["MGET"]


def test_keys_of_a_cluster_that_share_a_version_on_another_node_ask_for_it_once() -> None:
    times = Times()
    contract, model = contract_of("shared", times, cluster=True)
    assert read_many(contract, model, times, range(3), "Ada")[:2] == ["version", "GET GET GET"]
    assert read_many(contract, model, times, range(3), "Ada") == ["version GET GET GET"]
    model.bump(b"t:shared:ver")
    assert read_many(contract, model, times, range(3), "Grace")[:2] == ["version GET GET GET", "GET GET GET"]


def test_keys_of_a_cluster_are_asked_for_together_if_they_have_the_same_hash_tag() -> None:
    times = Times()
    contract, model = contract_of("tagged", times, cluster=True)
    items = [{"team": team, "id": each} for team in ("red", "blue") for each in range(3)]

    def read() -> list[Any]:
        entries = [contract.entry(item, item) for item in items]
        (look, *_) = drive(contract.read(entries, ANY), model, lambda _: "Ada", times)
        return [command[0] for command in look.commands]

    assert read() == ["EVALSHA", "EVALSHA"]
    assert read() == ["MGET", "MGET"]


def test_who_waits_looks_again_ever_more_rarely_and_gives_up_in_time() -> None:
    times = Times()
    contract, model = contract_of("user", times, wait=1.0)
    model.data[b"t:user:1\0lock"] = b"somebody else"
    entry, steps = reading(contract, id=1)
    wanted = drive(steps, model, lambda _: "Ada", times)
    pauses = [effect.seconds for effect in wanted if isinstance(effect, Sleep)]
    assert pauses[:4] == [0.004, 0.008, 0.016, 0.032]
    assert max(pauses) == 0.1
    assert sum(pauses) == pytest.approx(1.0)
    assert wanted[-1] == Load([entry], beside=True)
    assert model.data == {b"t:user:1\0lock": b"somebody else"}


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("name", CACHES)
def test_whenever_redis_goes_away_the_value_is_loaded_once(name: str, at: int) -> None:
    times = Times()
    contract, model = contract_of(name, times)
    entry, steps = reading(contract, id=1)
    loads = sends = 0
    try:
        effect = next(steps)
        while True:
            if isinstance(effect, Load):
                loads += 1
                effect = steps.send(["Ada"])
            elif sends >= at:
                effect = steps.throw(Unavailable("redis_down"))
            else:
                sends += 1
                effect = steps.send([model.ask(*command) for command in effect.commands])
    except StopIteration:
        assert (entry.value, loads) == ("Ada", 1)


def test_a_load_that_fails_gives_the_lease_back() -> None:
    times = Times()
    contract, model = contract_of("user", times)
    _, steps = reading(contract, id=1)

    def fail(_: Entry) -> None:
        raise AssertionError

    effect = next(steps)
    while not isinstance(effect, Load):
        effect = steps.send([model.ask(*command) for command in effect.commands])
    assert model.data.keys() == {b"t:user:1\0lock"}
    effect = steps.throw(LookupError("no such row"))
    for command in effect.commands:
        model.ask(*command)
    assert model.data == {b"t:user:1\0lock": b"-"}, "which tells those that wait"
    with pytest.raises(LookupError):
        steps.send([1])


@pytest.mark.parametrize("name", CACHES)
def test_a_load_that_is_cancelled_gives_the_lease_back_and_another_reader_takes_it(name: str) -> None:
    times = Times()
    contract, model = contract_of(name, times)
    _, steps = reading(contract, id=1)
    effect = next(steps)
    while not isinstance(effect, Load):
        effect = steps.send([model.ask(*command) for command in effect.commands])
    before = set(model.data)
    effect = steps.throw(KeyboardInterrupt())
    for command in effect.commands:
        model.ask(*command)
    assert before - set(model.data) == {key for key in before if key.endswith(b"\0lock")}
    with pytest.raises(KeyboardInterrupt):
        steps.send([1])


@pytest.mark.parametrize("name", CACHES)
def test_who_waits_for_what_is_not_stored_loads_at_once_and_a_bust_ends_that(name: str) -> None:
    times = Times()
    contract, model = contract_of(name, times, strict=False)
    waiting = Contract(contract.cache, contract.options, World(Marks("slot"), clocks=times.clocks()), no_metrics())
    _, first = reading(contract, id=1)
    effect = next(first)
    while not isinstance(effect, Load):
        effect = first.send([model.ask(*command) for command in effect.commands])
    entry, second = reading(waiting, id=1)
    wanted = next(second)
    while not isinstance(wanted, Sleep):
        wanted = second.send([model.ask(*command) for command in wanted.commands])
    for command in first.send([object()]).commands:
        model.ask(*command)
    wanted = second.send(None)
    for _ in range(2):
        assert isinstance(wanted, Send)
        wanted = second.send([model.ask(*command) for command in wanted.commands])
        if not isinstance(wanted, Send):
            break
    assert wanted == Load([entry], beside=True), "and nothing is renewed"
    with pytest.raises(StopIteration):
        second.send(["Ada"])
    (lock,) = (key for key in model.data if key.endswith(b"\0lock"))
    assert model.data[lock] == b"-"
    del model.data[lock]
    entry, third = reading(waiting, id=1)
    drive(third, model, lambda _: "Ada", times)
    assert any(value.endswith(b'"Ada"') for value in model.data.values()), "it is stored again"


def test_what_nobody_can_read_is_loaded_by_one_of_two_readers() -> None:
    times = Times()
    contract, model = contract_of("user", times)
    model.data[b"t:user:1"] = b"cdc1 1 0000001000000 0000001300000 0000000\n{broken"
    loads: list[int] = []

    def row() -> int:
        loads.append(1)
        return 7

    readers = [Reader(contract, model, times, row) for _ in range(2)]
    while not all(reader.done for reader in readers):
        for reader in readers:
            if not reader.done:
                reader.step()
    assert [reader.entry.value for reader in readers] == [7, 7]
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("left", "beta", "due"), [(300_000, 1.0, False), (100, 1.0, False), (60, 1.0, True), (60, 0.1, False)]
)
def test_early_refresh_is_the_likelier_the_nearer_the_end_and_the_longer_the_load(
    left: int, beta: float, due: bool
) -> None:
    times = Times()
    contract, model = contract_of("user", times, early=beta)
    # A chance of a half, and a load of 100 ms: 69 ms ahead.
    model.data[b"t:user:1"] = b'cdc1 1 %013d %013d 0000100\n"old"' % (0, 1_000_000 + left)
    entry, steps = reading(contract, id=1)
    wanted = drive(steps, model, lambda _: "new", times)
    assert entry.value == ("new" if due else "old")
    assert any(isinstance(effect, Load) for effect in wanted) is due


def test_an_early_refresh_whose_redis_goes_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    contract, model = contract_of("user", Times(), early=1.0)
    model.data[b"t:user:1"] = b'cdc1 1 %013d %013d 0000100\n"old"' % (0, 1_000_060)
    entry, steps = reading(contract, id=1)
    fill = contract.world.scripts.fill
    effect, went = next(steps), False
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(effect, Load):
                effect = steps.send(["new"])
            elif isinstance(effect, Send) and any(fill in command for command in effect.commands):
                went = True
                effect = steps.throw(Unavailable("redis_down"))
            else:
                assert isinstance(effect, Send)
                effect = steps.send([model.ask(*command) for command in effect.commands])
    assert went
    assert entry.value in {"old", "new"}
    assert not caplog.records


# ── The model, as far as it may be wrong itself, is what tests/integration/test_reader.py runs on a real server ──────


def test_the_options_are_checked() -> None:
    for wrong in ({"schema": -1}, {"lease": 0}, {"wait": -1}, {"early": -0.5}, {"max_staleness": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
            Options(**wrong)


def test_a_cache_that_can_not_be_read_is_told_with_the_remedy() -> None:
    text = """
version: 1
caches:
  endless: {key: "t:endless:{id}"}
  filtered: {key: "t:filtered:{version|lower}", version: "t:ver", ttl: 5m}
  open: {key: "t:open:{id}:*", ttl: 5m}
rules: []
"""
    found = parse_rules([("rules.yaml", text)], {}).caches
    world = World(Marks("slot"))
    with pytest.raises(ValueError, match="cache endless has no `ttl`"):
        Contract(found["endless"], Options[Any](), world, no_metrics())
    with pytest.raises(ValueError, match="cache filtered has a filter on `version`; take it off"):
        Contract(found["filtered"], Options[Any](), world, no_metrics())
    with pytest.raises(ValueError, match=r"the key of cache open ends in `\*`, so its rule file does not say how"):
        Contract(found["open"], Options[Any](), world, no_metrics())
