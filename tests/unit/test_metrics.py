"""What a daemon shows of what others count, and of what it does not know any more."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import choose_encoder

from cdc_invalidator.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def shown(metrics: Metrics) -> dict[str, float]:
    """The samples as they are served."""
    lines = generate_latest(metrics.shown("s")).decode().splitlines()
    return {sample: float(value) for sample, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_what_a_server_counts_is_not_shown_before_it_has_told(metrics: Metrics) -> None:
    name = 'cdc_invalidator_redis_keyspace_hits_total{slot="s"}'
    assert name not in shown(metrics)
    metrics.redis_hits.set(1_000_000)
    assert shown(metrics)[name] == 1_000_000


def test_what_a_session_knew_is_forgotten_and_what_the_daemon_counted_is_not(metrics: Metrics) -> None:
    before = shown(metrics)
    metrics.sweeps.labels("user", "change").inc()
    metrics.watermark_at.set(1_700_000_000)
    counted = shown(metrics)
    assert counted != before
    metrics.redis_up.set(0)
    metrics.redis_hits.set(5)
    metrics.postgres_up.set(1)
    metrics.retained_wal.set(2**30)
    metrics.slot_wal_status.labels("lost").set(1)
    metrics.standby_awaited.labels("db2:5432").set(0)
    metrics.watermark_stalled.set(1)
    metrics.backlog.set(7)
    assert len(shown(metrics)) == len(counted) + 5
    metrics.forget()
    assert shown(metrics) == counted


def test_a_gap_is_counted_and_has_its_time(metrics: Metrics) -> None:
    metrics.gap("new_slot")
    first = shown(metrics)
    metrics.gap("new_slot")
    second = shown(metrics)
    count, at = (
        f'cdc_invalidator_gap{name}{{reason="new_slot",slot="s"}}' for name in ("s_total", "_timestamp_seconds")
    )
    assert (first[count], second[count]) == (1, 2)
    assert 1_600_000_000 < first[at] <= second[at]


def test_the_errors_of_each_rule_and_of_busts_by_hand_begin_at_zero(metrics: Metrics) -> None:
    metrics.rules("abc", ["user-changed"])
    metrics.rules("def", ["user-changed", "order-changed"])
    found = shown(metrics)
    assert {
        (name, value)
        for name, value in found.items()
        if name.startswith(("cdc_invalidator_rule_errors_total", "cdc_invalidator_rule_set"))
    } == {
        ('cdc_invalidator_rule_set_info{digest="def",slot="s"}', 1),
        ('cdc_invalidator_rule_errors_total{rule="",slot="s"}', 0),
        ('cdc_invalidator_rule_errors_total{rule="user-changed",slot="s"}', 0),
        ('cdc_invalidator_rule_errors_total{rule="order-changed",slot="s"}', 0),
    }


def test_everything_of_ours_has_the_slot_and_nothing_else_has(metrics: Metrics) -> None:
    ProcessCollector(registry=metrics.registry)
    metrics.lag.observe("user", [1] * 19, 2.5)
    metrics.redis_hits.set(1)
    for accept in ("text/plain", "application/openmetrics-text"):
        encode, _ = choose_encoder(accept)
        samples = [line for line in encode(metrics.shown("s")).decode().splitlines() if line[0] != "#"]
        assert {line.startswith("cdc_invalidator_") for line in samples} == {True, False}
        assert all(('slot="s"' in line) == line.startswith("cdc_invalidator_") for line in samples)
    # Nothing is left in the registry itself.
    assert b"slot=" not in generate_latest(metrics.registry)
