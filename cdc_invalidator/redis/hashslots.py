"""Which node of a cluster has which hash slot, as one of its nodes says. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from cdc_invalidator.redis.endpoint import Address


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as one node sees it; of several, the one with the highest ``epoch`` is right.

    ``owners``: the master of each of the 16,384 hash slots; ``idle``: masters without any; ``moving``: hash slots that
    the node that answered is giving away or taking in; ``ids``: what the cluster calls the masters with hash slots.
    """

    epoch: int
    owners: list[Address | None]
    idle: frozenset[Address]
    moving: frozenset[int]
    ids: Mapping[Address, str] = field(default_factory=dict)

    def homes(self) -> dict[Address, str]:
        """Return each master's id and hash slots, such as ``07c3… 0-5460 7000-7000``, without those on the move."""
        runs: dict[Address, list[str]] = {}
        first = 0
        for owner, run in groupby(
            None if hash_slot in self.moving else owner for hash_slot, owner in enumerate(self.owners)
        ):
            end = first + sum(1 for _ in run)
            if owner is not None:
                runs.setdefault(owner, []).append(f"{first}-{end - 1}")
            first = end
        return {owner: " ".join([self.ids.get(owner, "-"), *ranges]) for owner, ranges in runs.items()}


def read_view(asked: str, info: bytes, slots: Any, nodes: bytes) -> View:
    """Read the replies of one node.

    Args:
        asked: the host at which we reach the node.
        info: its reply to CLUSTER INFO.
        slots: its reply to CLUSTER SLOTS.
        nodes: its reply to CLUSTER NODES.

    Raises:
        ValueError, KeyError, TypeError: they can't be read.
    """
    owners: list[Address | None] = [None] * 16384
    ids: dict[Address, str] = {}
    for first, last, (host, port, name, *_), *_ in slots:
        # Without a host, the node does not know how others reach it.
        owner = Address(host.decode() if host else asked, int(port))
        ids[owner] = name.decode()
        owners[first : last + 1] = [owner] * (last + 1 - first)
    idle: set[Address] = set()
    moving: set[int] = set()
    for line in nodes.splitlines():
        _, address, flags, _, _, _, _, _, *ranges = line.split(b" ")
        names = flags.split(b",")
        if b"myself" in names:
            # [slot->-node or [slot-<-node: it is giving the slot away, or taking it in.
            moving |= {int(part[1:].split(b"-", 1)[0]) for part in ranges if part.startswith(b"[")}
        if b"master" in names and not ranges and not {b"fail", b"noaddr", b"handshake"} & set(names):
            # The form is ip:port@bus,hostname; an IPv6 address has no brackets here, and a lone node has no address.
            host, _, port = address.split(b"@", 1)[0].rpartition(b":")
            idle.add(Address(host.decode() or asked, int(port)))
    facts = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    epoch = int(facts[b"cluster_current_epoch"])
    return View(epoch, owners, frozenset(idle), frozenset(moving), ids)
