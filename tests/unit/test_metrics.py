"""What a daemon shows of what others count, and of what it does not know any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.series import LINES_A_PART, Family, Histogram, label

encode: dict[bool, Any] = {False: generate_latest, True: generate_openmetrics}


class Library:
    """What prometheus-client would render of some families, with the slot."""

    def __init__(self, families: list[Any], slot: str) -> None:
        self._families = families
        self._slot = {"slot": plain(slot)}

    def collect(self) -> Iterator[Metric]:
        for family in (each for some in self._families for each in some.collect()):
            family.samples = [
                each._replace(labels={name: plain(value) for name, value in each.labels.items()} | self._slot)
                for each in family.samples
            ]
            yield family


def plain(text: str) -> str:
    """Control characters, which the library passes on, by their numbers."""
    return "".join(f"\\x{ord(sign):02x}" if unprintable(sign) else sign for sign in text)


def unprintable(sign: str) -> bool:
    return sign != "\n" and (ord(sign) < 32 or 127 <= ord(sign) < 160)


def told(family: Metric) -> tuple[Any, ...]:
    samples = sorted((each.name, sorted(each.labels.items()), each.value) for each in family.samples)
    return family.name, family.type, family.documentation, samples


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def shown(metrics: Metrics) -> dict[str, float]:
    """The samples as they are served."""
    lines = "".join(metrics.render("s", openmetrics=False)).splitlines()
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


def test_the_daemon_s_own_reads_show_with_those_of_all_and_not_before(metrics: Metrics) -> None:
    own = [f'cdc_invalidator_redis_own_{kind}_total{{slot="s"}}' for kind in ("hits", "misses")]
    metrics.looked_up((3, 4))
    assert [shown(metrics)[name] for name in own] == [0, 0]
    metrics.looked_up((1, 0))
    metrics.show_lookups(100, 10)
    assert [shown(metrics)[name] for name in own] == [4, 4]
    assert shown(metrics)['cdc_invalidator_redis_keyspace_hits_total{slot="s"}'] == 100


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


def test_everything_of_ours_has_the_slot(metrics: Metrics) -> None:
    metrics.lag.observe("user", [1] * 10, 2.5)
    metrics.redis_hits.set(1)
    for openmetrics in (False, True):
        lines = "".join(metrics.render("s", openmetrics=openmetrics)).splitlines()
        samples = [line for line in lines if line[0] != "#"]
        assert len(samples) > 30
        assert all(line.startswith("cdc_invalidator_") and 'slot="s"' in line for line in samples)
    # Nothing is left in the registry itself.
    assert b"slot=" not in generate_latest(metrics.registry)


names = st.text(max_size=6)
figures = st.one_of(st.integers(0, 2**63), st.floats(0, allow_nan=False))


@settings(max_examples=50)
@given(
    st.dictionaries(st.tuples(names, names), figures, max_size=3),
    st.dictionaries(names, st.lists(st.integers(0, 2**40), min_size=3, max_size=3), max_size=2),
    names,
)
def test_a_scrape_says_what_the_library_would_say(
    counts: dict[tuple[str, str], float], lags: dict[str, list[int]], slot: str
) -> None:
    counter, gauge = Family("counter", "c_total", "Some.", ["table", "op"]), Family("gauge", "g", "Of many.", ["a"])
    histogram = Histogram("h", "More.", "cache", [0.25, 1])
    for labels, count in counts.items():
        counter.labels(*labels).set(count)
        gauge.labels(labels[0]).set(-count)
    for cache, buckets in lags.items():
        histogram.observe(cache, buckets, 1.5)
    families: list[Any] = [counter, gauge, histogram]
    for parse, openmetrics in ((parse_text, False), (parse_openmetrics, True)):
        encoded = encode[openmetrics](Library(families, slot)).decode()
        common = label("slot", slot)[:-1]
        parts = [part for family in families for part in family.render(common, openmetrics=openmetrics)]
        ours = "".join(parts) + ("# EOF\n" if openmetrics else "")
        assert [*map(told, parse(ours))] == [*map(told, parse(encoded))]
        heads = [line for line in ours.splitlines() if line.startswith("#")]
        assert heads == [line for line in encoded.splitlines() if line.startswith("#")]


def test_a_family_without_series_is_told_by_its_head_alone() -> None:
    family = Family("counter", "x_total", "Some text.", ["a"])
    assert (
        "".join(family.render('slot="s"', openmetrics=False)) == "# HELP x_total Some text.\n# TYPE x_total counter\n"
    )


def test_no_help_text_needs_to_be_escaped(metrics: Metrics) -> None:
    texts = [family.documentation for family in metrics.registry.collect()]
    assert len(texts) > 40
    assert not [text for text in texts if set(text) & set('\\"\n')]


def test_a_control_character_in_a_label_is_shown_by_its_number(metrics: Metrics) -> None:
    metrics.changes.labels("public.\x1b[31mt\x9b", "insert").inc()
    (line,) = (line for line in "".join(metrics.render("s", openmetrics=False)).splitlines() if "[31m" in line)
    assert line == r'cdc_invalidator_changes_total{table="public.\\x1b[31mt\\x9b",op="insert",slot="s"} 1.0'


def test_a_scrape_of_many_series_is_made_in_parts_and_each_series_is_there_once(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.busts.labels("rule", f"cache{number}", "delete").inc(number)
        metrics.lag.observe(f"cache{number}", [1] * 10, 0.5)
    parts = [*metrics.render("s", openmetrics=False)]
    assert max(part.count("\n") for part in parts) <= 2 * LINES_A_PART
    lines = [line for line in "".join(parts).splitlines() if "cache" in line and line[0] != "#"]
    # For a cache: a counter, and of the histogram ten buckets, the count and the sum.
    assert len(set(lines)) == len(lines) == 13 * 1000
