"""Bust events: one line for each transaction, rule and cache, and the counters that say the same in sum.

Events are rendered and counted only after Redis has acknowledged their busts. Every bust is logged (or only those of a
sample of the transactions), and no line grows without bound. Only this hot path renders its lines itself; everything
else uses structlog. The compiled part (`_tell`), where it is there, gives the same JSON as `Events.busted`, to the
byte.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from cdc_invalidator import lsn
from cdc_invalidator.log import Event, EventLog, KeyDisplay, Level
from cdc_invalidator.metrics import LAG_BUCKETS, Metrics
from cdc_invalidator.pipeline.batch import KEYS_AN_EVENT, BustEvent, Target
from cdc_invalidator.pipeline.eventstream import EventStream
from cdc_invalidator.pipeline.sweep import Asked, Cause, Pass, Request
from cdc_invalidator.redis.scripts import BUMP_MISSING
from cdc_invalidator.redis.server import BustReply
from cdc_invalidator.trouble import Trouble

try:
    from cdc_invalidator.compiled import _tell
except ImportError:
    COMPILED = False
else:
    COMPILED = True


# A multiplication by 2^32 over the golden ratio spreads numbers that follow each other over all of 2^32.
_SAMPLE_OF = 1 << 32
_GOLDEN = 2654435769


@dataclass(slots=True)
class _Total:
    """What one flush adds to the counters of one target; ``lags``: how many fall into each of LAG_BUCKETS."""

    lines: int = 0
    keys: int = 0
    existed: int = 0
    lag_us: int = 0
    lags: list[int] = field(default_factory=lambda: [0] * (len(LAG_BUCKETS) + 1))


class Events:
    """Logs and counts busts.

    Args:
        metrics: what to count.
        display: how keys are shown.
        log: where the lines go.
        stream: where they go as well, as JSON; ``None`` for nowhere.
        compiled: whether the compiled part may be used, where it is there.
        observing: nothing is busted: events are named `observed`, and no bust is counted.
        logged: of which share of the transactions, from 0 to 1, the busts go into the log. The stream gets all, and
            whatever is no plain bust (sweeps, searches, gaps) is logged always.
    """

    def __init__(
        self,
        metrics: Metrics,
        display: KeyDisplay,
        log: EventLog,
        *,
        stream: EventStream | None = None,
        compiled: bool = True,
        observing: bool = False,
        logged: float = 1.0,
    ) -> None:
        self._metrics = metrics
        self._display = display
        self._log = log
        self.stream = stream
        self._observing = observing
        self._sample = math.ceil(logged * _SAMPLE_OF)
        self._children: dict[tuple[str, str, str], tuple[Any, ...]] = {}
        self._second: int | None = None
        self._second_text = ""
        self._teller = None
        if compiled and not observing and COMPILED and log.direct and display.form != "raw":
            keyed = display.keyed if display.form == "hash" else None
            self._teller = _tell.Teller(keyed, LAG_BUCKETS, log.begin, _second_text, lsn.EPOCH_OFFSET_US)

    async def room(self) -> None:
        """Wait while too much of the log is unwritten; see `EventLog.room`."""
        await self._log.room()

    def begin(self) -> None:
        """Note that a stream begins, which brings again what is not confirmed."""
        self._log.begin_stream()

    @property
    def mark(self) -> int:
        """Where the events end that were logged by now; see `told`."""
        return self._log.mark

    def told(self, mark: int) -> bool:
        """Return whether the events up to a mark are with the kernel, or no position may wait for that any longer."""
        return self._log.told(mark)

    async def farewell(self, seconds: float) -> None:
        """Wait until what was logged is with the kernel, at most so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._log.told(self._log.mark) and time.monotonic() < deadline:  # noqa: ASYNC110  a thread writes
            await asyncio.sleep(0.005)

    @property
    def trouble(self) -> Trouble | None:
        """What an operator should know of the log."""
        return self._log.trouble

    def hurry(self, *, much_wal: bool) -> None:
        """Note whether PostgreSQL keeps more WAL than it may: then no position waits for a reader of the log."""
        self._log.hurry = much_wal

    def busted(self, events: list[BustEvent], reply: BustReply, replay_until: int, now_us: int) -> None:
        """Log what Redis answered to a flush.

        Args:
            events: in the order of the flush, which ``reply.existed`` follows for the deletes among them.
            reply: the answer.
            replay_until: what was committed before this LSN had been busted by an earlier run.
            now_us: when the answer came, in µs since 1970.
        """
        if self._teller is not None:
            text, compiled_totals = self._teller.busted(
                events, reply.existed, reply.versions, replay_until, now_us, BUMP_MISSING
            )
            if self.stream is not None:
                self.stream.take(text)
            if self._sample < _SAMPLE_OF:
                # A line for each event.
                lines = zip(events, text.splitlines(keepends=True), strict=True)
                text = b"".join(line for event, line in lines if self._sampled(event))
            self._log.write_text(text)
            for sums in compiled_totals:
                self._count(sums.target.rule, sums.target.cache.name, sums.action, sums)
            return
        existed_of_deletes = iter(reply.existed)
        totals: dict[tuple[Target, str], _Total] = {}
        shown = []
        for event in events:
            target, count = event.target, len(event.keys)
            own = self._display.fields(event.keys)
            if event.action == "delete":
                existed = next(existed_of_deletes)
            else:
                versions = [reply.versions[key] for key in event.keys]
                own |= {} if self._observing else {"versions": versions}
                existed = count - versions.count(BUMP_MISSING)
            reason = event.reason
            if reason == "change" and event.commit_lsn < replay_until:
                reason = "replay"
            own["op"] = event.op
            own["keys"] = count
            own["lsn"] = lsn.text(event.commit_lsn)
            own["xid"] = event.xid
            own["existed"] = existed
            own["reason"] = reason
            name = (target, event.action)
            total = totals.get(name) or totals.setdefault(name, _Total())
            total.lines += 1
            total.keys += count
            total.existed += existed
            if event.committed_at is not None:
                self._time(own, event.committed_at, now_us, total)
            shown.append((target.shown[event.action], own))
        if self._sample < _SAMPLE_OF:
            if self.stream is not None:
                self.stream.take(self._log.render(shown))
            sampled = [line for event, line in zip(events, shown, strict=True) if self._sampled(event)]
            self._log.write(sampled, self._name)
        else:
            self._write(shown)
        for (target, action), total in totals.items():
            self._count(target.rule, target.cache.name, action, total)

    def swept(self, over: Pass) -> None:
        """Log that a sweep or search is over: a line for each cause, with its transactions."""
        now_us = time.time_ns() // 1000
        for asked in over.asked.values():
            # What was busted is counted once, whoever asked for it.
            total = _Total(keys=asked.keys, existed=asked.existed)
            for cause, request in asked.requests.items():
                self._asked(over, asked, cause, request, total, now_us)
                total = _Total()

    def _asked(self, over: Pass, asked: Asked, cause: Cause, request: Request, total: _Total, now_us: int) -> None:
        cache, searches = asked.cache, over.action == "search"
        if not self._observing:
            (self._metrics.searches if searches else self._metrics.sweeps).labels(cache.name, cause.reason).inc()
        shown = {
            "rule": cause.rule or None,
            "cache": cache.name,
            "action": over.action,
            "table": cause.table or None,
            "key_prefix": cache.sweep_template.prefix.decode(errors="replace"),
        }
        prefixes = list(request.prefixes)
        # With too many prefixes for one line, further lines show the rest of them, and count nothing.
        for start in range(0, max(1, len(prefixes)), KEYS_AN_EVENT):
            some = prefixes[start : start + KEYS_AN_EVENT]
            found = {**self._display.fields(some), "prefixes": len(some), "scanned": over.scanned} if searches else {}
            own = {
                **found,
                "op": cause.op,
                "transactions": 0 if start else request.transactions,
                "keys": 0 if start else asked.keys,
                "lsn": lsn.text(request.commit_lsn),
                "xid": request.xid,
                "existed": 0 if start else asked.existed,
                "reason": cause.reason,
            }
            total.lines += 1
            if request.committed_at is not None:
                self._time(own, request.committed_at, now_us, total)
            self._write([(shown, own)])
        self._count(cause.rule, cache.name, over.action, total)

    def published(self, cache: str) -> None:
        """Count a message that Redis has taken."""
        self._metrics.messages.labels(cache).inc()

    def gap(self, reason: str, caches: list[str], *, swept: bool, level: Level = "warning", **more: str) -> None:
        """Log that changes to these caches may have been missed, and whether they are swept for it."""
        self._metrics.gap(reason)
        self._write([({"reason": reason, "caches": caches}, {"swept": swept, **more})], "gap", level)

    def overtaken(self, bust: BustEvent) -> None:
        """Log that the one key of a bust was filled with old content after it, and was busted once more."""
        cache = bust.target.cache
        remedy = "a longer `again_after`" if cache.again_after else "`again_after`"
        own = {
            **self._display.fields(bust.keys),
            "op": bust.op,
            "lsn": lsn.text(bust.commit_lsn),
            "xid": bust.xid,
            "error": "A reader stored after this bust what it had loaded before; the key was busted once more. Give "
            f"cache {cache.name} {remedy}, or read it by the fill contract.",
        }
        self._write([(self._shared(bust), own)], "overtaken", "warning")

    def stale(self, bust: BustEvent) -> None:
        """Log that the one key of a bust that was only observed is stale."""
        own = {"op": bust.op, "lsn": lsn.text(bust.commit_lsn), "xid": bust.xid}
        self._write([(self._shared(bust), self._display.fields(bust.keys) | own)], "stale", "warning")

    def shown(self, bust: BustEvent) -> dict[str, Any]:
        """Return the fields that show one bust."""
        own = {"lsn": lsn.text(bust.commit_lsn), "xid": bust.xid}
        return self._shared(bust) | self._display.fields(bust.keys) | own

    def _shared(self, bust: BustEvent) -> dict[str, Any]:
        return {name: value for name, value in bust.target.shown[bust.action].items() if name != "action"}

    def _sampled(self, event: BustEvent) -> bool:
        """Whether the busts of this transaction are logged: all of one, or none."""
        return event.xid * _GOLDEN % _SAMPLE_OF < self._sample

    @property
    def _name(self) -> str:
        return "observed" if self._observing else "bust"

    def _write(self, shown: list[Event], event: str | None = None, level: Level = "info") -> None:
        event = event or self._name
        if self.stream is None:
            self._log.write(shown, event, level)
            return
        # One line for both.
        text = self._log.render(shown, event, level)
        self.stream.take(text)
        if self._log.direct:
            self._log.write_text(text, level)
        else:
            self._log.write(shown, event, level)

    def _count(self, rule: str, cache: str, action: str, total: _Total | _tell.Total) -> None:
        if self._observing:
            return
        busts, keys, existed = self._of(rule, cache, action)
        busts.inc(total.lines)
        keys.inc(total.keys)
        existed.inc(total.existed)
        self._metrics.lag.observe(cache, total.lags, total.lag_us / 1e6)

    def _time(self, own: dict[str, Any], committed_at: int, now_us: int, total: _Total) -> None:
        """Show when the transaction was committed, and count the time since then."""
        committed_us = lsn.unix_us(committed_at)
        lag_us = max(0, now_us - committed_us)
        own["committed_at"] = self._iso(committed_us)
        own["lag_ms"] = lag_us / 1000
        total.lag_us += lag_us
        total.lags[bisect_left(LAG_BUCKETS, lag_us / 1e6)] += 1

    def _iso(self, unix_us: int) -> str:
        seconds, us = divmod(unix_us, 1_000_000)
        if seconds != self._second:
            # Many commits share a second, and a calendar costs more than the rest of the event.
            self._second = seconds
            self._second_text = _second_text(seconds)
        return f"{self._second_text}.{us:06d}Z"

    def _of(self, rule: str, cache: str, action: str) -> tuple[Any, ...]:
        # Looking a child up costs more than counting on it.
        children = self._children.get((rule, cache, action))
        if children is None:
            metrics, labels = self._metrics, (rule, cache, action)
            children = self._children[labels] = (
                metrics.busts.labels(*labels),
                metrics.keys.labels(*labels),
                metrics.existed.labels(*labels),
            )
        return children


def _second_text(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
