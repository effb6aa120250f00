"""Bust events: one line for each transaction, rule and cache, and the counters that say the same in sum.

Events are rendered and counted only after Redis has acknowledged what they tell. No bust goes unlogged, and no line
grows without bound. This is the one place that is hot enough to render its lines itself; all else goes by structlog.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdc_invalidator import lsn
from cdc_invalidator.cache import BUMP_MISSING, Outcome
from cdc_invalidator.invalidation import Batch, Busts, Target
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.sweep import Sweep

KEYS_A_LINE = 1000


class Line:
    """One event to be: up to KEYS_A_LINE keys of one target in one batch, to be deleted or bumped (``action``)."""

    __slots__ = ("action", "batch", "keys", "op", "reason", "target")

    def __init__(self, batch: Batch, target: Target, busts: Busts, keys: Sequence[bytes], action: str) -> None:
        self.action = action
        self.batch = batch
        self.target = target
        self.keys = keys
        self.op = ",".join(busts.ops)
        self.reason = busts.reason


def lines_of(batch: Batch) -> Iterable[Line]:
    """Give the events of a batch, without those of its sweeps."""
    for target, busts in batch.busts.items():
        named = busts.keys if target.query is None else busts.derived
        for action, keys in ((target.action, list(named)), ("bump", list(busts.bumps))):
            for start in range(0, len(keys), KEYS_A_LINE):
                yield Line(batch, target, busts, keys[start : start + KEYS_A_LINE], action)


@dataclass(slots=True)
class _Total:
    """What one flush adds to the counters of one target; lags in seconds."""

    lines: int = 0
    keys: int = 0
    existed: int = 0
    lags: list[float] = field(default_factory=list)


class Events:
    """Tells and counts busts.

    Args:
        metrics: what to count.
        display: how keys are shown.
        log: where the lines go.
    """

    def __init__(self, metrics: Metrics, display: KeyDisplay, log: EventLog) -> None:
        self._metrics = metrics
        self._display = display
        self._log = log
        self._children: dict[tuple[str, str, str], tuple[Any, ...]] = {}
        self._second = -1
        self._second_text = ""

    async def room(self) -> None:
        """Wait until what has been told is written, as far as memory asks for it."""
        await self._log.room()

    def busted(self, lines: Sequence[Line], outcome: Outcome, replay_until: int) -> None:
        """Tell what Redis answered to a flush.

        Args:
            lines: in the order of the flush, which ``outcome.existed`` follows for the deletes among them.
            outcome: the answer.
            replay_until: what was committed before this LSN had been busted by an earlier run.
        """
        now_us = time.time_ns() // 1000
        existed_of_deletes = iter(outcome.existed)
        totals: dict[tuple[Target, str], _Total] = {}
        told = []
        for line in lines:
            target, batch, count = line.target, line.batch, len(line.keys)
            own = self._display.fields(line.keys)
            if line.action == "delete":
                existed = next(existed_of_deletes)
            else:
                own["versions"] = versions = [outcome.versions[key] for key in line.keys]
                existed = count - versions.count(BUMP_MISSING)
            reason = line.reason
            if reason == "change" and batch.commit_lsn < replay_until:
                reason = "replay"
            own["op"] = line.op
            own["keys"] = count
            own["lsn"] = lsn.text(batch.commit_lsn)
            own["xid"] = batch.xid
            own["existed"] = existed
            own["reason"] = reason
            name = (target, line.action)
            total = totals.get(name) or totals.setdefault(name, _Total())
            total.lines += 1
            total.keys += count
            total.existed += existed
            if batch.committed_at is not None:
                total.lags.append(self._time(own, batch.committed_at, now_us))
            told.append((target.shown[line.action], own))
        self._log.write(told)
        for (target, action), total in totals.items():
            self._count(target.rule, target.cache.name, action, total)

    def swept(self, sweep: Sweep) -> None:
        """Tell that a sweep is over: a line for each cause, and its transactions in it."""
        now_us = time.time_ns() // 1000
        cache, tally = sweep.cache, sweep.tally
        total = _Total(keys=tally.keys, existed=tally.existed)
        for cause, request in sweep.requests.items():
            self._metrics.sweeps.labels(cache.name, cause.reason).inc()
            shown = {
                "rule": cause.rule or None,
                "cache": cache.name,
                "action": "sweep",
                "table": cause.table or None,
                "key_prefix": cache.target.prefix.decode(errors="replace"),
            }
            own = {
                "op": cause.op,
                "transactions": request.transactions,
                "keys": tally.keys,
                "lsn": lsn.text(request.commit_lsn),
                "xid": request.xid,
                "existed": tally.existed,
                "reason": cause.reason,
            }
            total.lines = 1
            if request.committed_at is not None:
                total.lags.append(self._time(own, request.committed_at, now_us))
            self._log.write([(shown, own)])
            self._count(cause.rule, cache.name, "sweep", total)
            # What was swept is counted once, whoever asked for it.
            total = _Total()

    def _count(self, rule: str, cache: str, action: str, total: _Total) -> None:
        busts, keys, existed = self._of(rule, cache, action)
        busts.inc(total.lines)
        keys.inc(total.keys)
        existed.inc(total.existed)
        if total.lags:
            self._metrics.lag.observe(cache, total.lags)

    def _time(self, own: dict[str, Any], committed_at: int, now_us: int) -> float:
        """Show when the transaction was committed, and give the seconds since then."""
        committed_us = lsn.unix_us(committed_at)
        lag_us = max(0, now_us - committed_us)
        own["committed_at"] = self._iso(committed_us)
        own["lag_ms"] = lag_us / 1000
        return lag_us / 1e6

    def _iso(self, unix_us: int) -> str:
        seconds, us = divmod(unix_us, 1_000_000)
        if seconds != self._second:
            # Many commits share a second, and a calendar costs more than the rest of the line.
            self._second = seconds
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
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
