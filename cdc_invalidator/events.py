"""Bust events: one line for each transaction, rule and cache, and the counters that say the same in sum.

Events are rendered and counted only after Redis has acknowledged what they tell. No bust goes unlogged, and no line
grows without bound. This is the one place that is hot enough to render its lines itself; all else goes by structlog.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from cdc_invalidator import lsn
from cdc_invalidator.cache import BUMP_MISSING, Outcome
from cdc_invalidator.invalidation import Batch, Busts, Target
from cdc_invalidator.log import EventLog, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.sweep import Sweep

KEYS_A_LINE = 1000


class Line:
    """One event to be: up to KEYS_A_LINE keys of one target in one batch."""

    __slots__ = ("batch", "keys", "op", "reason", "target")

    def __init__(self, batch: Batch, target: Target, busts: Busts, keys: Sequence[bytes]) -> None:
        self.batch = batch
        self.target = target
        self.keys = keys
        self.op = ",".join(busts.ops)
        self.reason = busts.reason


def lines_of(batch: Batch) -> Iterable[Line]:
    """Give the events of a batch, without those of its sweeps."""
    for target, busts in batch.busts.items():
        keys = list(busts.keys)
        for start in range(0, len(keys), KEYS_A_LINE):
            yield Line(batch, target, busts, keys[start : start + KEYS_A_LINE])


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
        for line in lines:
            target, batch, count = line.target, line.batch, len(line.keys)
            if target.cache.version is None:
                versions = None
                existed = next(existed_of_deletes)
            else:
                versions = [outcome.versions[key] for key in line.keys]
                existed = count - versions.count(BUMP_MISSING)
            reason = line.reason
            if reason == "change" and batch.commit_lsn < replay_until:
                reason = "replay"
            busts, keys, found, lag = self._of(target.rule, target.cache.name, target.action)
            busts.inc()
            keys.inc(count)
            found.inc(existed)
            fields: dict[str, Any] = {
                "rule": target.rule or None,
                "cache": target.cache.name,
                "action": target.action,
                "table": target.table or None,
                "op": line.op,
                "keys": count,
                "key_prefix": target.prefix,
                **self._display.fields(line.keys),
                "lsn": lsn.text(batch.commit_lsn),
                "xid": batch.xid,
                "existed": existed,
                "reason": reason,
            }
            if versions is not None:
                fields["versions"] = versions
            self._time(fields, batch.committed_at, now_us, lag)
            self._log.bust(fields)

    def swept(self, sweep: Sweep) -> None:
        """Tell that a sweep is over: a line for each cause, and its transactions in it."""
        now_us = time.time_ns() // 1000
        cache, tally = sweep.cache, sweep.tally
        for number, (cause, request) in enumerate(sweep.requests.items()):
            self._metrics.sweeps.labels(cache.name, cause.reason).inc()
            busts, keys, found, lag = self._of(cause.rule, cache.name, "sweep")
            busts.inc()
            if number == 0:
                keys.inc(tally.keys)
                found.inc(tally.existed)
            fields: dict[str, Any] = {
                "rule": cause.rule or None,
                "cache": cache.name,
                "action": "sweep",
                "table": cause.table or None,
                "op": cause.op,
                "transactions": request.transactions,
                "keys": tally.keys,
                "key_prefix": cache.target.prefix.decode(errors="replace"),
                "lsn": lsn.text(request.commit_lsn),
                "xid": request.xid,
                "existed": tally.existed,
                "reason": cause.reason,
            }
            self._time(fields, request.committed_at, now_us, lag)
            self._log.bust(fields)

    def _time(self, fields: dict[str, Any], committed_at: int | None, now_us: int, lag: Any) -> None:
        if committed_at is None:
            return
        committed_us = lsn.unix_us(committed_at)
        lag_us = max(0, now_us - committed_us)
        lag.observe(lag_us / 1e6)
        fields["committed_at"] = self._iso(committed_us)
        fields["lag_ms"] = lag_us / 1000

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
                metrics.lag.labels(cache),
            )
        return children
