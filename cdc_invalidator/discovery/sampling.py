"""Samples the keys of a Redis: their names, types and remaining times.

The rule that holds here: no value is read, and nobody waits. SCAN goes on in small steps at a pace, on all masters in
turn, and ends after so many keys. SCAN returns keys in the order of their hashes, so those that come first are as good
a sample as any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cdc_invalidator.discovery.families import Sample
from cdc_invalidator.redis.node import Node, failed, redirection

# Keys a step. TYPE and PTTL of these follow in one round trip.
STEP = 200
# A longer name is no key of a family; it is not kept.
LONGEST_NAME = 512


@dataclass(slots=True)
class Sampled:
    """What was seen.

    ``all_keys``: how many keys there are, ``None`` where that is not known; ``long``: how many names were left out.
    """

    samples: list[Sample] = field(default_factory=list)
    all_keys: int | None = None
    long: int = 0

    @property
    def complete(self) -> bool:
        """Whether all keys were seen, as far as is known."""
        return self.all_keys is not None and len(self.samples) + self.long >= self.all_keys


async def sample(nodes: Sequence[Node], most: int, rate: int, tell: Callable[[int, int | None], None]) -> Sampled:
    """Look at keys.

    Args:
        nodes: connections to all masters.
        most: how many keys; 0 for all.
        rate: at most so many keys a second.
        tell: is called with how many keys were seen, and how many there are, after each step.

    Raises:
        errors.RedisUnavailable: a connection is lost, or the ACL refuses SCAN, TYPE or PTTL.
    """
    found = Sampled(all_keys=await _size(nodes))
    cursors = dict.fromkeys(nodes, 0)
    # A rehash may return a key twice.
    known: set[bytes] = set()
    began, looked = time.monotonic(), 0
    while cursors and (not most or len(known) < most):
        for node in list(cursors):
            ((cursor, keys),) = await node.ask(("SCAN", cursors[node], "COUNT", STEP))
            new = [key for key in dict.fromkeys(keys) if key not in known]
            known.update(new)
            short = [key for key in new if len(key) <= LONGEST_NAME]
            found.long += len(new) - len(short)
            found.samples += await _described(node, short)
            if int(cursor):
                cursors[node] = int(cursor)
            else:
                del cursors[node]
            looked += max(STEP, len(keys))
            tell(len(known), found.all_keys)
            await asyncio.sleep(max(0.0, began + looked / rate - time.monotonic()))
    return found


async def _size(nodes: Sequence[Node]) -> int | None:
    sizes = [await node.ask_if_granted(("DBSIZE",)) for node in nodes]
    return sum(int(size[0]) for size in sizes) if all(sizes) else None


async def _described(node: Node, keys: Sequence[bytes]) -> list[Sample]:
    """Return type and remaining time of keys; one that has gone, or moved to another node, has neither."""
    commands = [(name, key) for key in keys for name in ("TYPE", "PTTL")]
    answers = await node.send(commands) if commands else []
    samples = []
    for at, key in enumerate(keys):
        kind, left = answers[2 * at : 2 * at + 2]
        for name, answer in (("TYPE", kind), ("PTTL", left)):
            if isinstance(answer, Exception) and redirection(answer) is None:
                raise failed(name, answer) from answer
        known = isinstance(kind, bytes) and kind != b"none" and isinstance(left, int)
        samples.append(Sample(key, kind.decode() if known else "", left / 1000 if known and left >= 0 else None))
    return samples
