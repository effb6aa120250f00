"""The edge to the `via` queries: what they are asked for batches, and what becomes of the answers.

A query sees the present, in which a row that the answer needs may be gone: deleted with the changed row, or later, in a
backlog. So where the question of an old row has no answer, its parent's prefix is searched, or the cache is swept. The
same is done with all questions of a query that fails, or that is not answered in time.

The rule that holds here: no query holds up the busts of other caches. What a query names that is not answered at once
becomes a batch of its own, which is busted when the answer is there; its ticket stays unresolved until then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from cdc_invalidator import errors
from cdc_invalidator.pipeline.ask import QUERY_SECONDS, Answer, Asker, TooSlow
from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.checkpoint import Ticket
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.rules.packed import Question
from cdc_invalidator.trouble import Trouble

_log = structlog.get_logger()

# How long the other busts of a moment wait for a query.
PATIENCE_SECONDS = 0.2
# Queries that may run behind the busts, each on a connection of its own; beyond, the busts wait for the next one.
MOST_LATE = 3
# Questions that wait for a query that is asked already; beyond, its cache is busted without them.
MOST_WAITING = 10_000
# A query that has used up its time so often in a row is not asked for a while.
SLOW_TIMES = 3
PAUSE_SECONDS = 60.0


def _ignore(_rule: str) -> None:
    """Count nothing."""


@dataclass(slots=True)
class _Late:
    """A query that was not answered at once.

    ``parts``: the batches that need its answer; ``waiting``: those that came since, for which it is asked next.
    """

    asking: asyncio.Task[Answer]
    parts: list[tuple[Batch, Ticket]]
    waiting: list[tuple[Batch, Ticket]] = field(default_factory=list)
    questions: int = 0


@dataclass(slots=True)
class _Slow:
    """A query that has used up its time, ``times`` in a row; until ``rests_until`` (monotonic) it is not asked."""

    times: int = 0
    rests_until: float = 0.0
    trouble: Trouble | None = None


class Queries:
    """All queries of a rule set.

    Args:
        dsn: where they run.
        asked: is told the rule whose query is asked.
        failed: is told the rule whose query has failed twice, or is not asked because it is too slow.
        wake: is called when a late answer is there.
    """

    def __init__(
        self,
        dsn: DsnSource,
        *,
        asked: Callable[[str], None] = _ignore,
        failed: Callable[[str], None] = _ignore,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._asker = Asker(dsn, asked)
        self._failed = failed
        self._wake = wake
        # Of which rule and cache the query is that a turn waits for.
        self.asked_now: str | None = None
        self._late: dict[Target, _Late] = {}
        self._slow: dict[Target, _Slow] = {}

    def spell(self, settings: Mapping[str, str]) -> None:
        """Have values spelled with these settings; before the first query."""
        self._asker.spelling = settings

    @property
    def trouble(self) -> Trouble | None:
        """The query that is not asked because it is too slow, if there is one."""
        return next((slow.trouble for target, slow in self._slow.items() if self._rests(target)), None)

    def close(self) -> None:
        """Drop the connections at once, and whatever is still asked."""
        # Connections first: a task cancelled in the middle of a query would wait for the server.
        self._asker.close()
        for late in self._late.values():
            late.asking.cancel()
        self._late.clear()

    async def derive(self, taken: Iterable[tuple[str, Batch, Ticket | None]]) -> None:
        """Put what the queries give into batches, as ``derived`` or ``bumps``; widen where one fails.

        What an earlier call gave stays: it is busted again. What is not answered at once is taken out of its batch, and
        comes back from `late`.

        Args:
            taken: which bust it is, see `Batch.bust`; the batch; its ticket, or ``None`` to wait for each answer.
        """
        asked: dict[Target, list[tuple[str, Batch, Ticket | None]]] = {}
        for each in taken:
            for target, busts in each[1].busts.items():
                if busts.answered:
                    busts.answered = False
                elif target.query is not None and busts.keys and not busts.sweep:
                    asked.setdefault(target, []).append(each)
        for target, batches in asked.items():
            await self._derive(target, batches)

    async def _derive(self, target: Target, batches: Sequence[tuple[str, Batch, Ticket | None]]) -> None:
        late = self._late.get(target)
        if self._rests(target) or (late is not None and late.questions > MOST_WAITING):
            self._failed(target.rule)
            for _, batch, _ in batches:
                batch.leave_all_unanswered(target)
            return
        if late is not None:
            late.waiting += _split(target, batches)
            late.questions += sum(len(batch.busts[target].keys) for batch, _ in late.waiting[-len(batches) :])
            return
        asking = self._ask(target, [batch for _, batch, _ in batches])
        hurried = len(self._late) < MOST_LATE and all(ticket is not None for _, _, ticket in batches)
        self.asked_now = f"rule {target.rule} for cache {target.cache.name}"
        try:
            await asyncio.wait({asking}, timeout=PATIENCE_SECONDS if hurried else None)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        finally:
            self.asked_now = None
        if asking.done():
            self._answer(target, [batch for _, batch, _ in batches], asking)
        else:
            self._put_off(target, asking, _split(target, batches))

    def late(self) -> list[tuple[Batch, Ticket]]:
        """Return the batches of which the late answers have come, with them; ask for those that wait for the next."""
        ready: list[tuple[Batch, Ticket]] = []
        for target, late in list(self._late.items()):
            if not late.asking.done():
                continue
            del self._late[target]
            self._answer(target, [batch for batch, _ in late.parts], late.asking)
            ready += late.parts
            if late.waiting and self._rests(target):
                self._failed(target.rule)
                for batch, _ in late.waiting:
                    batch.leave_all_unanswered(target)
                ready += late.waiting
            elif late.waiting:
                self._put_off(target, self._ask(target, [batch for batch, _ in late.waiting]), late.waiting)
        for batch, _ in ready:
            for busts in batch.busts.values():
                busts.answered = True
        return ready

    def _put_off(self, target: Target, asking: asyncio.Task[Answer], parts: list[tuple[Batch, Ticket]]) -> None:
        self._late[target] = _Late(asking, parts)
        asking.add_done_callback(lambda _: self._wake())

    def _ask(self, target: Target, batches: Iterable[Batch]) -> asyncio.Task[Answer]:
        arguments = dict.fromkeys(
            Question.split(key).arguments for batch in batches for key in batch.busts[target].keys
        )
        return asyncio.create_task(self._asker.ask_twice(target, list(arguments)), name="query")

    def _answer(self, target: Target, batches: Sequence[Batch], asking: asyncio.Task[Answer]) -> None:
        try:
            found = asking.result()
        except errors.InvalidatorError as error:
            told = self._asker.told(target, error)
            self._failed(target.rule)
            _log.error("query_failed", rule=target.rule, cache=target.cache.name, error=told)
            if isinstance(error, TooSlow):
                self._was_slow(target)
            for batch in batches:
                batch.leave_all_unanswered(target)
            return
        self._slow.pop(target, None)
        for batch in batches:
            busts = batch.busts[target]
            before = len(busts.derived) + len(busts.bumps)
            _take(target, batch, found)
            batch.grow(len(busts.derived) + len(busts.bumps) - before)

    def _was_slow(self, target: Target) -> None:
        slow = self._slow.setdefault(target, _Slow())
        slow.times += 1
        if slow.times < SLOW_TIMES:
            return
        slow.rests_until = time.monotonic() + PAUSE_SECONDS
        text = (
            f"The `via` query of rule {target.rule} for cache {target.cache.name} has not been answered within "
            f"{QUERY_SECONDS:g} s, {slow.times} times in a row; each change sweeps what it may have named, and it is "
            f"asked again after {PAUSE_SECONDS:g} s; give it an index, or narrow it down."
        )
        slow.trouble = Trouble.now(text, slow.trouble)
        _log.warning("query_rests", rule=target.rule, cache=target.cache.name, error=text)

    def _rests(self, target: Target) -> bool:
        slow = self._slow.get(target)
        return slow is not None and time.monotonic() < slow.rests_until


def _split(target: Target, batches: Iterable[tuple[str, Batch, Ticket | None]]) -> list[tuple[Batch, Ticket]]:
    """Take what one target busts out of batches; return it as batches of its own."""
    parts = []
    for bust, batch, ticket in batches:
        assert ticket is not None
        ticket.parts += 1
        parts.append((batch.split(target, bust), ticket))
    return parts


def _take(target: Target, batch: Batch, found: Mapping[bytes, Sequence[bytes]]) -> None:
    busts = batch.busts[target]
    keys: list[bytes] = []
    for question in map(Question.split, busts.keys):
        named = found.get(question.arguments, ())
        keys += named
        if question.expects and not named:
            batch.leave_unanswered(target, question)
    busts.derive(target, keys)
