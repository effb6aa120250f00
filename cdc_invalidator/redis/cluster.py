"""A Redis or Valkey Cluster: commands go to the node that has the key's hash slot, and follow the slot when it moves.

Every command has one key, so that a hash slot may move while it is on its way: MOVED and ASK are followed at once. All
locks are deleted, and acknowledged, before the first key is, because the two may lie on different nodes.

Each master has a watermark of its own, in one of its hash slots, because each can fail over to a replica that lagged. A
watermark is written only after all nodes have acknowledged what it covers, and the one that readers know is written
last. So whatever data set holds a watermark, wherever that was moved or copied to, has had all busts up to it. Its
field ``home`` says of which node and hash slots that was written: a reader that finds it there, and its key in one of
these slots, knows that all busts up to the watermark have reached the key.

When a node is lost, or a new one appears with hash slots, all connections are opened again and all watermarks compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from redis.crc import key_slot

from cdc_invalidator import errors
from cdc_invalidator.redis import fingerprint, node, replies
from cdc_invalidator.redis.available import require_commands
from cdc_invalidator.redis.endpoint import Address
from cdc_invalidator.redis.fingerprint import Look
from cdc_invalidator.redis.hashslots import View, read_view
from cdc_invalidator.redis.node import Command, Node, end
from cdc_invalidator.redis.scripts import Written, watermark_written
from cdc_invalidator.redis.server import (
    INFO,
    NO_GRACES,
    PROBE_SUFFIX,
    SCAN_COUNT,
    BustReply,
    CacheServer,
    Cursor,
    denied_channels,
    read_info,
    read_size,
    read_watermark,
    reply_or_denial,
    reply_or_refusal,
    scan_command,
)
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.watermark import Watermark

# How often the nodes are asked who has which hash slot, how long the first one may take to answer, and how often a
# command is redirected before that counts as a failure.
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 2.0
HOPS = 5
# How often a search passes over all nodes while hash slots move: each pass makes up for one move of a key.
PASSES = 3


@dataclass(slots=True)
class _Search:
    """Where a search for keys stands: the nodes that are still to be searched, and a cursor in the first of them."""

    nodes: list[Address]
    cursor: int = 0
    passes: int = 1
    moves: int = 0


@dataclass(slots=True)
class _Item:
    """A command on its way: ``asking`` when it follows an ASK."""

    number: int
    key: bytes
    command: Command
    to: Address | None = None
    asking: bool = False


class Cluster(CacheServer):
    """All masters of a cluster; see `CacheServer`.

    Args:
        source: says which nodes to ask first.
        watermark: name of the watermark.
        timeout: seconds until a server that does not answer counts as lost.
    """

    def __init__(self, source: EndpointSource, watermark: str, *, timeout: float) -> None:
        super().__init__(watermark)
        self._source = source
        self._timeout = timeout
        self._seeds: list[Node] = []
        self._nodes: dict[Address, Node] = {}
        self._view: View | None = None
        # By key, the watermark that was read or written last; the keys with their homes, and the count of moves for
        # which they hold.
        self._written: dict[bytes, Written] = {}
        self._known_watermark_keys: tuple[int, dict[bytes, str]] = (-1, {})
        # Counts each time that hash slots have moved, or may have.
        self._moves = 0
        self._why_lost: errors.RedisUnavailable | None = None
        self._turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    def _node(self, address: Address, timeout: float) -> Node:
        return Node(self._source.now().at(address), timeout=timeout)

    async def connect(self) -> None:
        """See `CacheServer`."""
        seconds = min(self._timeout, ANSWER_SECONDS)
        self._seeds = [self._node(address, seconds) for address in self._source.now().addresses]
        view = self._view = await self._discover()
        for address in {owner for owner in view.owners if owner}:
            self._nodes[address] = self._node(address, self._timeout)
        await _all(self._open(opened) for opened in self._nodes.values())
        for address in view.idle:
            await self._join(address)
        self._looking = asyncio.create_task(self._look_again(), name="cluster")

    async def _open(self, opened: Node) -> None:
        await opened.connect()
        await require_commands(opened)
        await self.scripts.load(opened)
        opened.answered = self.lookups.count

    @property
    def nodes(self) -> list[Node]:
        """See `CacheServer`."""
        return list(self._nodes.values())

    async def close(self) -> None:
        """See `CacheServer`."""
        if self._looking is not None:
            await end(self._looking)
        for opened in (*self._nodes.values(), *self._seeds):
            await opened.close()

    # Who has which hash slot.

    async def _discover(self) -> View:
        answers = await asyncio.gather(*map(self._first_view, self._seeds))
        views = [answer for answer in answers if isinstance(answer, View)]
        if not views:
            failure = answers[0]
            assert isinstance(failure, errors.RedisUnavailable)
            raise failure
        return max(views, key=_epoch)

    async def _first_view(self, seed: Node) -> View | errors.RedisUnavailable:
        try:
            await seed.connect()
            return await _view(seed)
        except errors.RedisUnavailable as error:
            return error
        finally:
            await seed.close()

    async def _look_again(self) -> None:
        while self._why_lost is None:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Ask all nodes who has which hash slot; set ``_why_lost`` if more has changed than that."""
        async with self._turn:
            await self._look_once()

    async def _look_once(self) -> None:
        answers = await asyncio.gather(*map(_view, self._nodes.values()), return_exceptions=True)
        views = [answer for answer in answers if isinstance(answer, View)]
        for answer in answers:
            if isinstance(answer, errors.RedisUnavailable):
                sentence = f"A node of the cluster is lost: {answer}"
                self._why_lost = errors.RedisUnavailable(sentence, code=answer.code, report=answer.report)
            elif isinstance(answer, BaseException):
                raise answer
        known = self._view
        assert known is not None
        latest = max(views, key=_epoch, default=known)
        if latest.epoch < known.epoch:
            return
        moving = frozenset(hash_slot for view in views for hash_slot in view.moving)
        owners = {owner for owner in latest.owners if owner}
        if owners - self._nodes.keys() or self._nodes.keys() - owners - latest.idle:
            self._why_lost = errors.RedisUnavailable(
                "A master of the cluster was replaced; all are looked for again.", code="MOVED_AWAY"
            )
            return
        for address in latest.idle - self._nodes.keys():
            # It has no hash slots yet. Once connected, it is known when it gets some.
            await self._join(address)
        if moving or latest.owners != known.owners:
            self._moves += 1
        self._view = replace(latest, moving=moving)

    async def _join(self, address: Address) -> None:
        newcomer: Node | None = None
        try:
            newcomer = self._node(address, self._timeout)
            await self._open(newcomer)
        except errors.RedisUnavailable:
            # It has no hash slots yet, so nothing depends on it.
            if newcomer is not None:
                await newcomer.close()
            return
        self._nodes[address] = newcomer

    # Commands.

    async def _ask(self, commands: Sequence[tuple[bytes, Command]], *, refusals: bool = False) -> list[Any]:
        """Send each command to the node that has its key, and return the replies in order.

        With ``refusals``, the replies may be errors, see `reply_or_refusal`.
        """
        self._check()
        replies_: list[Any] = [None] * len(commands)
        items = [_Item(number, key, command) for number, (key, command) in enumerate(commands)]
        for _ in range(HOPS):
            by_node: dict[Address, list[_Item]] = {}
            for item in items:
                by_node.setdefault(item.to or self._owner(item.key), []).append(item)
            rounds = [self._round(address, some) for address, some in by_node.items()]
            items = []
            for some, answers in await _all(rounds):
                for item, answer in zip(some, answers, strict=True):
                    if node.redirection(answer) is not None or (isinstance(answer, Exception) and not refusals):
                        items.append(self._redirected(item, answer))
                    else:
                        replies_[item.number] = reply_or_refusal(item.command, answer)
            if not items:
                return replies_
        raise errors.RedisUnavailable(
            "The nodes of the cluster send a command from one to the other; it is tried again.", code="MOVED"
        )

    async def _try(self, commands: Sequence[tuple[bytes, Command]]) -> list[Any]:
        """As `_ask`, but where a right is missing, why is returned in the reply's place."""
        answers = await self._ask(commands, refusals=True)
        return [reply_or_denial(command, answer) for (_, command), answer in zip(commands, answers, strict=True)]

    async def _round(self, address: Address, items: list[_Item]) -> tuple[list[_Item], list[Any]]:
        opened = self._nodes.get(address)
        if opened is None:
            raise errors.RedisUnavailable(
                f"{address} has joined the cluster; all nodes are looked for again.", code="MOVED_AWAY"
            )
        commands: list[Command] = []
        places: list[int] = []
        for item in items:
            if item.asking:
                commands.append(("ASKING",))
            places.append(len(commands))
            commands.append(item.command)
        answers = await opened.send(commands)
        return items, [answers[place] for place in places]

    def _redirected(self, item: _Item, answer: Exception) -> _Item:
        """Return the command as it is sent again after a redirection; raise any other error."""
        where = node.redirection(answer)
        if where is None or replies.of(where.code).does is not replies.Does.REDIRECT:
            raise node.failed(str(item.command[0]), answer) from answer
        # An empty host means the host of the node that answered.
        to = Address(where.host or (item.to or self._owner(item.key)).host, where.port)
        self._moves += 1
        if where.code == "MOVED":
            assert self._view is not None
            self._view.owners[key_slot(item.key)] = to
            return _Item(item.number, item.key, item.command)
        return _Item(item.number, item.key, item.command, to, asking=True)

    def _owner(self, key: bytes) -> Address:
        assert self._view is not None
        owner = self._view.owners[key_slot(key)]
        if owner is None:
            raise errors.RedisUnavailable(
                "The cluster serves not all slots; it is tried again until it does.", code="CLUSTERDOWN"
            )
        return owner

    def _check(self) -> None:
        if self._looking is not None and self._looking.done() and self._why_lost is None:
            self._looking.result()
        if self._why_lost is not None:
            raise self._why_lost

    async def probe(self) -> None:
        """See `CacheServer`."""
        self._check()
        if self.scripts.read_only:
            await _all(opened.ask(("PING",)) for opened in self._nodes.values())
            return
        assert self._view is not None
        public = self.watermark_key
        keys = [key + PROBE_SUFFIX for key in self._tagged({owner for owner in self._view.owners if owner}).values()]
        await self._ask([*((key, ("UNLINK", key)) for key in keys), (public, ("HMGET", public, "lsn"))])

    async def bust(
        self,
        deletes: Sequence[Sequence[bytes]],
        bumps: Mapping[bytes, int],
        graces: Mapping[bytes, int] = NO_GRACES,
        looks: Sequence[bytes] = (),
    ) -> BustReply:
        """See `CacheServer`."""
        keys = [(number, key) for number, group in enumerate(deletes) for key in group]
        reply = BustReply([0] * len(deletes), {})
        looking = [(key, self.scripts.to_fingerprint(key)) for key in looks]
        locks = [(lock, ("UNLINK", lock)) for lock in self.beside.locks_of([key for _, key in keys])]
        answers = await self._try([*looking, *locks])
        reply.looks.extend(map(fingerprint.read, answers[: len(looking)]))
        locked = answers[len(looking) :]
        unlinked = [(key, self._unlinking(key, graces)) for _, key in keys]
        bumped = [(key, self.scripts.to_bump([key], bumps, graces)) for key in bumps]
        answers = await self._try([*unlinked, *bumped])
        for at, ((number, _), answer) in enumerate(zip(keys, answers[: len(keys)], strict=True)):
            of_key = (*locked[at :: len(keys)], answer)
            denial = next((each for each in of_key if isinstance(each, errors.RedisUnavailable)), None)
            if denial is not None:
                reply.denied[number] = denial
            else:
                reply.existed[number] += answer
        for key, answer in zip(bumps, answers[len(keys) :], strict=True):
            if isinstance(answer, errors.RedisUnavailable):
                reply.denied[key] = answer
            else:
                reply.versions[key] = answer[0]
        return reply

    def _unlinking(self, key: bytes, graces: Mapping[bytes, int]) -> Command:
        grace = graces.get(key)
        return ("UNLINK", key) if grace is None else self.scripts.to_keep([key], grace)

    async def versions(self, counters: Sequence[bytes]) -> list[bytes | errors.RedisUnavailable | None]:
        """See `CacheServer`."""
        return await self._try([(counter, ("GET", counter)) for counter in counters])

    async def fingerprints(self, keys: Sequence[bytes]) -> list[Look]:
        """See `CacheServer`."""
        answers = await self._try([(key, self.scripts.to_fingerprint(key)) for key in keys])
        return [fingerprint.read(answer) for answer in answers]

    async def unlink(self, keys: Sequence[bytes]) -> int:
        """See `CacheServer`."""
        return sum(await self._ask([(key, ("UNLINK", key)) for key in keys]))

    async def publish(self, messages: Sequence[tuple[bytes, bytes]]) -> dict[bytes, errors.RedisUnavailable]:
        """See `CacheServer`.

        With PUBLISH, which a node passes on to all others, and not SPUBLISH: every client can subscribe to it at any
        node, and Redis before 7 has nothing else. Any node takes it; the one with the hash slot of the channel's name
        gets it, so that the work is spread, and messages on one channel stay in order.
        """
        answers = await self._try([(channel, ("PUBLISH", channel, payload)) for channel, payload in messages])
        return denied_channels(messages, answers)

    async def scan(self, cursor: Cursor, pattern: bytes, count: int = SCAN_COUNT) -> tuple[Cursor, list[bytes]]:
        """See `CacheServer`.

        A key that moves to a node that was searched already would be missed. So all nodes are searched again when
        hash slots have moved meanwhile.
        """
        self._check()
        search = cursor or _Search(sorted(self._nodes), moves=self._moves)
        assert isinstance(search, _Search)
        (answer,) = await self._nodes[search.nodes[0]].ask(scan_command(search.cursor, pattern, count))
        search.cursor = int(answer[0])
        if not search.cursor:
            search.nodes.pop(0)
        if search.nodes:
            return search, list(answer[1])
        await self._look()
        if search.moves != self._moves and search.passes < PASSES:
            again = _Search(sorted(self._nodes), passes=search.passes + 1, moves=self._moves)
            return again, list(answer[1])
        return None, list(answer[1])

    async def size(self) -> int | None:
        """See `CacheServer`."""
        sizes = await _all(map(read_size, self._nodes.values()))
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    async def ask_about(self, key: bytes, commands: Sequence[Command]) -> list[Any]:
        """See `CacheServer`."""
        return await self._ask([(key, command) for command in commands], refusals=True)

    async def info(self) -> dict[str, int] | None:
        """See `CacheServer`."""
        found = await _all(map(read_info, self._nodes.values()))
        infos = [info for info in found if info is not None]
        return {name: sum(info[name] for info in infos) for name in INFO} if infos else None

    # Watermarks.

    async def read_watermarks(self) -> list[Watermark | None]:
        """See `CacheServer`."""
        keys = self._watermark_keys()
        answers = await self._ask([(key, ("HGETALL", key)) for key in keys])
        found: list[Watermark | None] = []
        for key, fields in zip(keys, answers, strict=True):
            found.append(read_watermark(fields))
            self._written[key] = Written.of(found[-1])
        return found

    async def write_watermark(self, watermark: Watermark) -> bool:
        """See `CacheServer`."""
        *others, public = self._watermark_keys()
        if not await self._write_watermarks(others, watermark):
            # It must not go on, and yet must not name a cache that it should no longer name.
            rules = watermark.fields()["rules"]
            ((found,),) = await self._ask([(public, ("HMGET", public, "rules"))])
            if found is not None and found.decode() != rules:
                await self._ask([(public, ("HDEL", public, "rules"))])
            return False
        return await self._write_watermarks([public], watermark)

    async def _write_watermarks(self, keys: Sequence[bytes], watermark: Watermark) -> bool:
        homes, nothing = self._watermark_homes(), Written()
        answers = await self._ask(
            [
                (key, self.scripts.to_write_watermark(key, self._written.get(key, nothing), watermark, homes[key]))
                for key in keys
            ]
        )
        stored = [watermark_written(answer) for answer in answers]
        for key, done in zip(keys, stored, strict=True):
            if done:
                self._written[key] = Written.of(watermark)
        return all(stored)

    def _watermark_keys(self) -> list[bytes]:
        """Return the key of each node's watermark; the last is the one that readers know, on whichever node it lies."""
        return list(self._watermark_homes())

    def _watermark_homes(self) -> dict[bytes, str]:
        """Return the same keys, each with its node's id and hash slots."""
        moves, homes = self._known_watermark_keys
        if moves != self._moves:
            homes = self._find_watermark_homes()
            self._known_watermark_keys = (self._moves, homes)
        return homes

    def _find_watermark_homes(self) -> dict[bytes, str]:
        view, public = self._view, self.watermark_key
        assert view is not None
        homes = view.homes()
        found = self._tagged({owner for owner in view.owners if owner} - {self._owner(public)})
        keys = {owner: found[owner] for owner in sorted(found)} | {self._owner(public): public}
        return {key: homes.get(owner, "") for owner, key in keys.items()}

    def _tagged(self, without: set[Address]) -> dict[Address, bytes]:
        """Return a key for each of these nodes: the watermark's with the first hash tag in a slot of the node."""
        view = self._view
        assert view is not None
        found: dict[Address, bytes] = {}
        number = 0
        while without:
            # The same each time, as long as slots stay. A slot on the move may have left its watermark at the other
            # end; if all are on the move, any will do.
            key = b"%b:{%d}" % (self.watermark_key, number)
            hash_slot, number = key_slot(key), number + 1
            owner = view.owners[hash_slot]
            if owner in without and (hash_slot not in view.moving or number > 2 * len(view.owners)):
                assert owner is not None
                found[owner] = key
                without.remove(owner)
        return found


_epoch = attrgetter("epoch")


async def _all(calls: Iterable[Any]) -> list[Any]:
    """Wait for all, also when one fails: the others' replies must not stay unread. Then raise the first failure."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


async def read_masters(asked: Node) -> list[Address]:
    """Return the masters that have hash slots, as one node sees them.

    Raises:
        errors.RedisUnavailable: it does not answer, or is in no cluster.
    """
    return sorted({owner for owner in (await _view(asked)).owners if owner is not None})


async def _view(asked: Node) -> View:
    """Ask a node for the cluster as it sees it.

    Raises:
        errors.RedisUnavailable: it does not answer, or is in no cluster.
    """
    answers = await asked.ask(("CLUSTER INFO",), ("CLUSTER SLOTS",), ("CLUSTER NODES",))
    try:
        return read_view(asked.host, *answers)
    except (ValueError, KeyError, TypeError) as error:
        raise errors.RedisUnavailable(
            "A node describes the cluster in a way that can't be read; it is asked again.", code="GARBLED", report=True
        ) from error
