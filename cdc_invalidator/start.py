"""`run`: makes a daemon out of the settings, and runs it."""

from __future__ import annotations

import asyncio
import gc
import os

import structlog
from prometheus_client import REGISTRY, disable_created_metrics

from cdc_invalidator import log, settings
from cdc_invalidator.daemon import Daemon
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.pipeline import eventstream
from cdc_invalidator.pipeline.events import Events
from cdc_invalidator.pipeline.eventstream import EventStream
from cdc_invalidator.pipeline.verify import Verify
from cdc_invalidator.postgres.standbys import Standbys
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.session import SessionOptions


def run(given: settings.Settings) -> None:
    """Run the daemon until it is told to stop.

    Raises:
        errors.WrongSettings: settings or rules can't be used.
        errors.InvalidatorError: see `Daemon.run`.
    """
    output = log.configure(given.log_format, given.log_level)
    for sentence in settings.renamed(given):
        structlog.get_logger().warning("setting_renamed", error=sentence)
    daemon = _daemon(given, output)
    # What is loaded by now stays, so the collector need not look at it again. It did not look before, either: imports
    # leave hardly a cycle.
    gc.freeze()
    gc.enable()
    try:
        asyncio.run(daemon.run(given.http_host, given.http_port))
    finally:
        output.close()


def _daemon(given: settings.Settings, output: log.Output) -> Daemon:
    # OpenMetrics would carry a _created series beside each counter: noise that doubles them.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    # A URL that can't be used is reported before PostgreSQL is touched.
    redis = Endpoint.parse(given.redis_url)
    cache_server(redis, given.watermark_name)
    eventstream.check_key(given.event_stream, given.watermark_name)
    options = SessionOptions(
        postgres_dsn=given.postgres_dsn,
        postgres_readers=given.postgres_readers,
        redis=redis,
        event_stream=given.event_stream,
        slot=given.slot,
        watermark=given.watermark_name,
        publication=given.publication,
        sweep_gaps=given.on_gap == "sweep",
        sweep_rate=given.sweep_rate,
        max_retained_wal=given.max_retained_wal,
    )
    rules, metrics = load_rules(given.rules, os.environ), Metrics(REGISTRY)
    eventstream.check_rules(given.event_stream, rules)
    stream = EventStream(given.event_stream, given.event_stream_length, metrics) if given.event_stream else None
    display = log.KeyDisplay(given.log_keys, given.log_hash_key.encode() if given.log_hash_key else None)
    events = Events(metrics, display, log.EventLog(output, given.log_format, given.log_level), stream=stream)
    standbys = Standbys(given.postgres_standbys.split(), limit=given.standby_limit, metrics=metrics)
    verify = None
    if given.verify_sample:
        verify = Verify(given.verify_sample, given.observe_grace, metrics=metrics, events=events)
    return Daemon(options, rules, metrics, events, standbys, given.rules, verify)
