"""`run`: makes a daemon out of the settings, and runs it."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from cdc_invalidator import log, settings
from cdc_invalidator.daemon import Daemon
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import eventstream
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.eventstream import EventStream
from cdc_invalidator.pipeline.inspection import Inspection
from cdc_invalidator.pipeline.observe import Observe
from cdc_invalidator.pipeline.sweep import SweepOptions
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.fitness import Fitness
from cdc_invalidator.redis.observed import Observed
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.redis.writes import Writes
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.session import SessionOptions
from cdc_invalidator.web.page import StatusPage

# While another thread works, such as that of the pages, the loop that busts waits for the interpreter at most so long.
# Python's default is ten times as much, several times for each bust.
SWITCH_SECONDS = 0.0005


def run(given: settings.Settings, *, seconds: float | None = None, log_to: int | None = None) -> dict[str, Any]:
    """Run the daemon until it is told to stop, or for so many seconds.

    Args:
        given: its settings.
        seconds: for how long at most.
        log_to: the file descriptor that the log goes to; ``None`` for standard output.

    Returns:
        What /status shows at its end.

    Raises:
        errors.WrongSettings: settings or rules can't be used.
        errors.InvalidatorError: see `Daemon.run`.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    journal = log.Journal() if given.page else None
    output = log.configure(given.log_format, given.log_level, log_to, journal)
    for sentence in settings.renamed(given):
        structlog.get_logger().warning("setting_renamed", error=sentence)
    daemon = _daemon(given, output, journal)
    # What is loaded by now stays, so the collector need not look at it again. It did not look before, either: imports
    # leave hardly a cycle.
    gc.freeze()
    gc.enable()
    try:
        asyncio.run(daemon.run(given.http_host, given.http_port, seconds))
    finally:
        output.close()
    return daemon.status()


def _explain(rules: RuleSet, key: str) -> dict[str, Any]:
    # Most daemons are never asked.
    from cdc_invalidator.commands.explain import explain_key  # noqa: PLC0415

    return explain_key(rules, key)


def _daemon(given: settings.Settings, output: log.Output, journal: log.Journal | None) -> Daemon:
    metrics = Metrics(CollectorRegistry())
    # Addresses that can't be used are reported before a server is touched.
    redis = EndpointSource(given.redis_url)
    postgres = DsnSource(given.postgres_dsn)
    readers = DsnSource(given.postgres_readers, "CDC_POSTGRES_READERS") if given.postgres_readers else None
    standbys = Standbys(given.postgres_standbys, limit=given.standby_limit, metrics=metrics)
    eventstream.check_key(given.event_stream, given.watermark_name)
    observing = given.mode == "observe"
    options = SessionOptions(
        postgres_dsn=postgres,
        postgres_readers=readers,
        redis=redis,
        event_stream=given.event_stream,
        slot=given.slot,
        publication=given.publication,
        sweeps=SweepOptions(gaps=given.on_gap == "sweep" and not observing, rate=given.sweep_rate),
        max_retained_wal=given.max_retained_wal,
        handover_seconds=given.handover_seconds,
        observe=observing,
    )
    rules = load_rules(given.rules, os.environ)
    metrics.observing.set(observing)
    eventstream.check_rules(given.event_stream, rules)
    # Who observes writes nothing into Redis.
    kept = given.event_stream if not observing else ""
    stream = EventStream(kept, given.event_stream_length, metrics) if kept else None
    display = log.KeyDisplay(given.log_keys, given.log_hash_key().encode() if given.log_hash_key else None)
    event_log = log.EventLog(output, given.log_format, given.log_level, journal, dropped=metrics.events_dropped.inc)
    events = Events(metrics, display, event_log, stream=stream, observing=observing, logged=given.log_busts)
    open_server: Callable[[], CacheServer] = partial(
        cache_server, redis, given.watermark_name, old_locks=given.old_locks
    )
    fitness = Fitness(partial(_probed, open_server, read_only=observing), patience=given.handover_seconds)
    inspection: Inspection
    if observing:
        templates = [each for cache in rules.caches.values() for each in (cache.key, cache.version) if each]
        # A stream that is behind looks late.
        writes = Writes([each.prefix for each in templates], 60 + 2 * given.observe_grace)
        inspection = Observe(given.observe_grace, writes, metrics=metrics, events=events)
        open_server = partial(_observed, open_server, given.watermark_name, writes)
    else:
        inspection = Verify(given.verify_sample, given.observe_grace, metrics=metrics, events=events)
    page = StatusPage(metrics, journal, display, _explain) if journal is not None else None
    return Daemon(options, open_server, rules, metrics, events, standbys, given.rules, inspection, fitness, page)


def _probed(open_server: Callable[[], CacheServer], *, read_only: bool) -> CacheServer:
    server = open_server()
    # Who observes may not write.
    server.scripts.read_only = read_only
    return server


def _observed(open_server: Callable[[], CacheServer], watermark: str, writes: Writes) -> CacheServer:
    return Observed(open_server(), watermark, writes)
