"""A real cluster: three masters with a replica each, slots that can be moved, masters that can be lost."""

from __future__ import annotations

import random
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from running import eventually

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SLOTS: Final = 16384
_BUS: Final = 10_000  # the bus of a node listens on its port plus this
_PORTION: Final = 10  # keys that a resharding moves at once, as redis-cli does
_MOVE_MILLISECONDS: Final = 5000

_SETTINGS: Final[Mapping[str, str]] = {
    "cluster-enabled": "yes",
    "cluster-config-file": "nodes.conf",
    "cluster-node-timeout": "1000",
    "cluster-replica-validity-factor": "0",  # a replica stands for election however old its data
    "cluster-allow-replica-migration": "no",  # a shard stays the pair that it was made as
    "repl-diskless-sync-delay": "0",
    "repl-ping-replica-period": "1",
}


class Node(Valkey):
    """One server of a cluster, and a connection for questions."""

    def __init__(self, binary: Path | None = None, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(binary=binary, settings={**_SETTINGS, **(settings or {})})
        self._port = _port_with_bus()
        self._client = redis.Redis(
            host=HOST, port=self._port, protocol=2, retry=Retry(NoBackoff(), 1), socket_timeout=10
        )
        self.paused = False
        self.id = ""

    def start(self) -> None:
        super().start()
        self.paused = False
        self.id = self.ask("CLUSTER", "MYID").decode()

    def ask(self, *words: Any) -> Any:
        """Run a command on this node, whoever has the slot."""
        return self._client.execute_command(*words)  # type: ignore[no-untyped-call]

    def is_well(self) -> bool:
        """Whether it can serve: the cluster is whole, and a replica has its master's data."""
        text: bytes = self.ask("CLUSTER", "INFO")
        replication: Any = self._client.info("replication")
        return b"cluster_state:ok" in text and (
            replication["role"] == "master" or replication["master_link_status"] == "up"
        )

    @property
    def answers(self) -> bool:
        """Whether it runs and isn't paused."""
        return self.running and not self.paused

    def pause(self) -> None:
        self.paused = True
        super().pause()

    def resume(self) -> None:
        super().resume()
        self.paused = False

    def close(self) -> None:
        # In order, a master would wait for its replicas; there is nothing to save.
        self.kill()
        self._client.close()
        super().close()

    def __repr__(self) -> str:
        return f"<Node {self.port} {self.id[:8]}>"


@dataclass(frozen=True)
class Seen:
    """What one node's CLUSTER NODES says of another."""

    master: bool
    follows: str
    slots: tuple[tuple[int, int], ...]


class Cluster:
    """Three masters and three replicas on 127.0.0.1; use it as a context manager.

    Args:
        binary: Another ``valkey-server`` or ``redis-server``.
        settings: More lines of each node's configuration.
        replicas: Whether each master has one; without, it starts sooner.
    """

    def __init__(
        self, binary: Path | None = None, *, settings: Mapping[str, str] | None = None, replicas: bool = True
    ) -> None:
        self._binary = binary
        self._settings = settings
        self._stack = ExitStack()
        self._shards: list[list[Node]] = []
        self._members = 2 if replicas else 1

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Who is who.

    @property
    def nodes(self) -> list[Node]:
        """All nodes, also those that don't run."""
        return [node for shard in self._shards for node in shard]

    @property
    def url(self) -> str:
        """The nodes that the cluster was made of."""
        return "redis+cluster://" + ",".join(f"{HOST}:{node.port}" for node in self.nodes)

    def client(self) -> redis.RedisCluster:
        """Connect as an application does; the caller closes it."""
        nodes = [redis.cluster.ClusterNode(HOST, node.port) for node in self.nodes if node.answers]  # type: ignore[no-untyped-call]
        return redis.RedisCluster(startup_nodes=nodes, socket_timeout=2)

    def masters(self) -> list[Node]:
        """The present masters, once all agree; one without slots is among them."""
        seen = self.agreed()
        return [node for node in self.nodes if node.answers and seen[node.id].master]

    def master_of(self, key: bytes | str) -> Node:
        """The present master of a key's slot."""
        return self.master_of_slot(slot_of(key))

    def master_of_slot(self, slot: int) -> Node:
        return self._owners()[slot]

    def replica_of(self, node: Node) -> Node:
        """The other node of its shard, which is its replica while this one is master."""
        for shard in self._shards:
            if node in shard and len(shard) == 2:
                return shard[1 - shard.index(node)]
        raise LookupError(node)

    def _owners(self) -> list[Node]:
        """Give the master of each slot."""
        seen = self.agreed()
        owners: dict[int, Node] = {}
        for node in self.nodes:
            if node.answers:
                owners |= {slot: node for first, last in seen[node.id].slots for slot in range(first, last + 1)}
        return [owners[slot] for slot in range(SLOTS)]

    # What they think.

    def agreed(self) -> dict[str, Seen]:
        """Wait until all nodes that answer see the same, and give it by node id."""
        found: dict[str, Seen] = eventually(self._agreed, "all nodes see the same cluster")
        return found

    def settle(self) -> None:
        """Wait until all nodes that answer agree that all is well, and each replica has all data."""
        eventually(lambda: self._agreed() and self._well(), "the cluster is well")

    def _answering(self) -> list[Node]:
        return [node for node in self.nodes if node.answers]

    def _well(self) -> bool:
        return all(node.is_well() for node in self._answering())

    def _agreed(self) -> dict[str, Seen]:
        there = {node.id for node in self._answering()}
        views = [_view(node, there) for node in self._answering()]
        return views[0] if all(view == views[0] and view.keys() == there for view in views) else {}

    # How it is made.

    def _make(self) -> None:
        nodes = [self._new_node() for _ in range(3 * self._members)]
        for epoch, node in enumerate(nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            if node is not nodes[0]:
                node.ask("CLUSTER", "MEET", HOST, nodes[0].port)
        self._shards = [nodes[n::3] for n in range(3)]
        bounds = [SLOTS * n // 3 for n in range(4)]
        for first, end, shard in zip(bounds, bounds[1:], self._shards, strict=False):
            # Redis 6.2 has no ADDSLOTSRANGE.
            shard[0].ask("CLUSTER", "ADDSLOTS", *range(first, end))
        self.agreed()
        for master, *replicas in self._shards:
            for replica in replicas:
                replica.ask("CLUSTER", "REPLICATE", master.id)
        self.settle()

    def _new_node(self) -> Node:
        return self._stack.enter_context(Node(self._binary, self._settings))

    def add_master(self) -> Node:
        """Let one more master in, without slots and without a replica."""
        node = self._new_node()
        node.ask("CLUSTER", "MEET", HOST, self._answering()[0].port)
        self._shards.append([node])
        self.settle()
        return node

    # Losing masters.

    def kill(self, node: Node) -> None:
        node.kill()

    def failed_over(self, node: Node) -> Node:
        """Wait until the lost master's replica has its slots, and all agree that all is well; give the new master."""
        heir = self.replica_of(node)

        def done() -> bool:
            seen = self._agreed()
            return bool(seen and seen[heir.id].master and seen[heir.id].slots and self._well())

        eventually(done, f"{heir} has taken over from {node}")
        return heir

    # Moving slots.

    def move_slots(self, first: int, last: int, target: Node, *, pause: float = 0.0) -> None:
        """Move slots with their keys, one after the other, as ``redis-cli --cluster reshard`` does.

        Args:
            first: The first slot.
            last: The last slot.
            target: The master that gets them; those that it has already stay.
            pause: Seconds before each portion of a slot's keys, and after the last one.
        """
        owners = self._owners()
        masters = self.masters()
        for slot in range(first, last + 1):
            source = owners[slot]
            if source is not target:
                _open(slot, source, target)
                _move_keys(slot, source, target, pause)
                # The target first: a slot that nobody claims would be lost with the source.
                for node in [target, *(master for master in masters if master is not target)]:
                    node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        self.settle()

    def open_slot(self, slot: int, target: Node) -> Node:
        """Begin to move a slot and leave it so; gives its present master.

        From then on the present master answers ASK for a key that it doesn't have, and for several keys of which it has
        some TRYAGAIN (before Redis 7 ASK, and then it's the other one that answers TRYAGAIN). `move_key` moves one key,
        `move_slots` goes on and finishes, `close_slot` gives up.
        """
        source = self.master_of_slot(slot)
        _open(slot, source, target)
        return source

    def move_key(self, key: bytes | str, target: Node) -> None:
        """Move one key of an open slot."""
        _migrate(self.master_of(key), target, [key])

    def close_slot(self, slot: int) -> None:
        """Leave an open slot where it is; keys that have been moved stay lost on the other side."""
        for node in self.masters():
            node.ask("CLUSTER", "SETSLOT", slot, "STABLE")


def slot_of(key: bytes | str) -> int:
    """The slot of a key."""
    return key_slot(key.encode() if isinstance(key, str) else key)


def _open(slot: int, source: Node, target: Node) -> None:
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)


def _move_keys(slot: int, source: Node, target: Node, pause: float) -> None:
    while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, _PORTION):
        time.sleep(pause)
        _migrate(source, target, keys)
        if len(keys) < _PORTION:
            time.sleep(pause)


def _migrate(source: Node, target: Node, keys: Sequence[bytes | str]) -> None:
    source.ask("MIGRATE", HOST, target.port, "", 0, _MOVE_MILLISECONDS, "KEYS", *keys)


def _view(node: Node, there: set[str]) -> dict[str, Seen]:
    """Give what a node sees of those that are there."""
    seen: dict[str, Seen] = {}
    # Id, address, flags, master's id, ping, pong, epoch, link, slots; an open slot is in brackets.
    for line in node.ask("CLUSTER", "NODES").decode().splitlines():
        name, _, flags, master, _, _, _, _, *slots = line.split()
        marks = set(flags.split(","))
        if name in there and not marks & {"handshake", "noaddr", "fail", "fail?"}:
            ranges = tuple(sorted(_range(text) for text in slots if not text.startswith("[")))
            seen[name] = Seen("master" in marks, master, ranges)
    return seen


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _port_with_bus() -> int:
    """Find a port whose bus is free as well, both below the ephemeral range."""
    while True:
        port = random.randint(15_000, 32_000 - _BUS)
        with suppress(OSError), socket.socket() as plain, socket.socket() as bus:
            for probe, number in ((plain, port), (bus, port + _BUS)):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, number))
            return port
