"""What looks at entries around their busts: `Inspection`, which `Verify` and `Observe` implement.

The rule that holds here: nothing waits for an inspection, no bust and no position.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.redis.fingerprint import Look
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.rules.model import RuleSet

Bust = Callable[[CacheServer, list[PlainBatch]], Awaitable[None]]
"""Busts once more, and has that logged."""


class Inspection(Protocol):
    """Looks at entries when they are busted, or would be, and again later; it outlives sessions and connections."""

    # Under which /status shows it.
    name: str

    def show(self, rules: RuleSet) -> None:
        """Show the results in the metrics before there are any: an increase needs a sample to begin with."""

    def status(self) -> dict[str, Any]:
        """Return what /status shows."""

    def connected(self) -> None:
        """Note that another connection begins, maybe to another Redis, or of another session."""

    def choose(self, events: Sequence[BustEvent], deletes: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
        """Choose what to look at.

        Args:
            events: of a flush, before it is done.
            deletes: the keys of each event that deletes, in order.

        Returns:
            Keys; `begin` is called with the fingerprints that these had just before, if the flush succeeds.
        """

    def begin(self, looks: Sequence[Look], taken: Iterable[tuple[Batch | PlainBatch, Ticket]], now: float) -> None:
        """Begin with what was chosen last: the flush is done.

        Args:
            looks: the fingerprints that the keys had just before.
            taken: what was busted. Of a batch with follow-ups, the ticket says when they are done.
            now: the time, of the monotonic clock.
        """

    def swept(self, caches: Iterable[str]) -> None:
        """Note that more of some caches is busted than keys that are named."""

    def due_in(self, now: float) -> float | None:
        """Return the seconds until `step` has something to do; ``None`` if nothing is under way."""

    async def step(self, server: CacheServer, bust: Bust) -> None:
        """Look at what is due.

        Args:
            server: where.
            bust: busts once more.

        Raises:
            errors.RedisUnavailable: the connection is lost.
        """
