"""All metrics, in one class with a registry that is passed in. Labels come from rule files and SQL, never from data.

Of the daemons of one slot one leads. What only the leader knows, the others don't show, or show as 0: so that `max` and
`sum` over all of them give the truth, whoever led before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import add

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cdc_invalidator import __version__

NAMESPACE = "cdc_invalidator"
# Seconds from a commit to its acknowledged bust: sub-millisecond when idle, minutes after an outage.
LAG_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """The daemon's metrics.

    Args:
        registry: where they are registered; each test brings its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=NAMESPACE, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=NAMESPACE, registry=registry)

        def reported(family: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str) -> Reported:
            figure = Reported(family, f"{NAMESPACE}_{name}", text)
            registry.register(figure)
            self._reported.append(figure)
            return figure

        self._reported: list[Reported] = []

        self.build_info = gauge("build_info", "Constant 1, labelled with the version.", "version")
        self.build_info.labels(__version__).set(1)

        # The rules.
        self.rule_set = gauge("rule_set_info", "Constant 1, labelled with the digest of the rules in force.", "digest")
        self.reloads = counter("reloads_total", "Times the rule files were read again.", "result")
        for result in ("ok", "failed", "unchanged"):
            self.reloads.labels(result)
        self.reload_successful = gauge(
            "reload_successful", "0 while the rule files hold other rules than those in force."
        )
        self.reloaded_at = gauge(
            "reload_success_timestamp_seconds", "When the rule files were last found to be as they are in force."
        )

        # The stream.
        self.changes = counter("changes_total", "Row changes matched against rules.", "table", "op")
        self.transactions = counter("transactions_total", "Transactions received.")
        self.backlog = gauge("backlog_keys", "Keys matched and not yet acknowledged by Redis.")
        self.leader = gauge("leader", "1 while this daemon streams from the slot, 0 while it stands by.")
        self.received_lsn = gauge("received_lsn", "LSN up to which the stream has been received.")
        self.confirmed_lsn = gauge("confirmed_lsn", "LSN confirmed to PostgreSQL.")
        self.slot_active = reported(GaugeMetricFamily, "slot_active", "1 while a session streams from the slot.")
        self.slot_wal_status = gauge(
            "slot_wal_status", "1 for the slot's wal_status in pg_replication_slots.", "wal_status"
        )
        self.retained_wal = reported(GaugeMetricFamily, "retained_wal_bytes", "WAL that PostgreSQL keeps for the slot.")
        self.retained_wal_limit = gauge("retained_wal_limit_bytes", "CDC_MAX_RETAINED_WAL.")
        self.postgres_up = gauge("postgres_up", "1 while a session with PostgreSQL stands.")
        self.postgres_errors = counter("postgres_errors_total", "Lost or failed PostgreSQL sessions.", "error")
        self.postgres_connects = counter("postgres_connects_total", "PostgreSQL sessions opened.")
        self.watches = counter("watches_total", "Looks at the slot, the publication and the tables of the rules.")
        self.database_commits = reported(
            CounterMetricFamily, "database_commits", "xact_commit of the database in pg_stat_database."
        )
        self.database_rollbacks = reported(
            CounterMetricFamily, "database_rollbacks", "xact_rollback of the database in pg_stat_database."
        )

        # The busts.
        self.busts = counter("busts_total", "Bust events.", "rule", "cache", "action")
        self.keys = counter("busted_keys_total", "Keys deleted and versions bumped.", "rule", "cache", "action")
        self.existed = counter("busted_keys_existed_total", "Busted keys that were there.", "rule", "cache", "action")
        self.again = counter(
            "busted_again_total",
            "Transactions busted a second time: visible (at the first, no reader saw them), standby (a standby had not "
            "replayed them), again_after (the cache asks for it).",
            "reason",
        )
        self.reapplied = counter(
            "redis_behind_transactions_total", "Transactions busted anew in a Redis that came back older."
        )
        self.lag = Lags()
        registry.register(self.lag)
        self.sweeps = counter("sweeps_total", "Whole caches busted by their key pattern.", "cache", "reason")
        self.sweeps_running = gauge("sweeps_running", "Sweeps begun and not finished.")
        self.swept = counter("sweep_scanned_keys_total", "Keys looked at by sweeps, of everybody's.", "cache")
        self._gaps = counter("gaps_total", "Times continuity could not be proven.", "reason")
        self._gap_at = gauge("gap_timestamp_seconds", "When continuity could last not be proven.", "reason")
        self.rule_errors = counter(
            "rule_errors_total", "Relations on which a rule can't name its keys, and failures of its queries.", "rule"
        )
        self.queries = counter("via_queries_total", "Queries of `via`, each for all changes of a flush.", "rule")

        self.event_stream_refused = counter("event_stream_refused_total", "Events that the event stream did not take.")

        # The watermark.
        self.watermark_lsn = gauge("watermark_lsn", "LSN up to which every bust is in Redis.")
        self.watermark_at = gauge(
            "watermark_timestamp_seconds", "When the watermark was last written; its age is time() minus this."
        )
        self.watermark_as_of = reported(
            GaugeMetricFamily,
            "watermark_as_of_timestamp_seconds",
            "All that had been committed at that time is busted, as the watermark says; not known of a standby's slot.",
        )
        self.watermark_stalled = gauge("watermark_stalled", "1 while Redis has no memory for the watermark.")

        # The standbys that readers use.
        self.standby_replayed = gauge("standby_replayed_lsn", "LSN that the standby has replayed.", "standby")
        self.standby_awaited = gauge(
            "standby_awaited", "1 while busts wait for the standby, 0 once dropped.", "standby"
        )

        # Redis.
        self.redis_up = reported(GaugeMetricFamily, "redis_up", "1 while the leader's connection to Redis stands.")
        self.redis_errors = counter(
            "redis_errors_total", "Failures of Redis, by the first word of its reply, or TIMEOUT, CLOSED, …", "error"
        )
        self.redis_connects = counter("redis_connects_total", "Connections to Redis opened.")
        self.redis_hits = reported(CounterMetricFamily, "redis_keyspace_hits", "keyspace_hits of INFO.")
        self.redis_misses = reported(CounterMetricFamily, "redis_keyspace_misses", "keyspace_misses of INFO.")
        self.redis_evicted = reported(CounterMetricFamily, "redis_evicted_keys", "evicted_keys of INFO.")
        self.redis_expired = reported(CounterMetricFamily, "redis_expired_keys", "expired_keys of INFO.")
        self.redis_memory = reported(GaugeMetricFamily, "redis_used_memory_bytes", "used_memory of INFO.")

    def gap(self, reason: str) -> None:
        """Count a gap, and when it was: one at the start is counted before anybody has seen the counter at 0."""
        self._gaps.labels(reason).inc()
        self._gap_at.labels(reason).set_to_current_time()

    def rules(self, digest: str, names: Iterable[str]) -> None:
        """Show which rules are in force; their errors are counted from 0, so that the first is seen as a rise."""
        self.rule_set.clear()
        self.rule_set.labels(digest).set(1)
        for name in ("", *names):
            self.rule_errors.labels(name)

    def forget(self) -> None:
        """Show no more what a session knew: it is over, and another daemon may know better."""
        for figure in self._reported:
            figure.forget()
        for labelled in (self.slot_wal_status, self.standby_awaited, self.standby_replayed):
            labelled.clear()
        for gauge in (
            self.postgres_up,
            self.backlog,
            self.received_lsn,
            self.confirmed_lsn,
            self.sweeps_running,
            self.watermark_lsn,
            self.watermark_stalled,
        ):
            gauge.set(0)

    def shown(self, slot: str) -> CollectorRegistry:
        """Give all metrics as they are served: ours labelled with the slot.

        One job of Prometheus may hold the daemons of several slots, and only they know which of them belong together.
        """
        registry = CollectorRegistry()
        registry.register(_OfSlot(self.registry, slot))
        return registry


class Reported(Collector):
    """One figure that a server tells: no sample until it has, and none once that is forgotten.

    A counter that began at 0 and jumped to what Redis has counted for months would look like a burst.

    Args:
        family: what it is: a counter if only the server's restart ever lowers it.
        name: its whole name; a counter's gets ``_total``.
        text: its help.
    """

    def __init__(self, family: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str) -> None:
        self._family = family
        self._name = name
        self._text = text
        self._figure: float | None = None

    def set(self, figure: float) -> None:
        """Note what the server has told."""
        self._figure = figure

    def forget(self) -> None:
        """Show nothing until the server has told something again."""
        self._figure = None

    def collect(self) -> Iterator[Metric]:
        """Give the metric as it is now."""
        yield self._family(self._name, self._text, value=self._figure)


class _OfSlot(Collector):
    def __init__(self, registry: CollectorRegistry, slot: str) -> None:
        self._registry = registry
        self._slot = {"slot": slot}

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.name.startswith(NAMESPACE):
                family.samples = [each._replace(labels=self._slot | each.labels) for each in family.samples]
            yield family


class Lags(Collector):
    """A histogram of the seconds from a commit to its acknowledged bust, by cache.

    It takes what one flush has to tell in one call: the library's own costs more for each value than matching a row.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, cache: str, counts: Sequence[int], seconds: float) -> None:
        """Count lags: how many fall into each bucket, one more than LAG_BUCKETS has bounds, and their sum."""
        before = self._counts.get(cache)
        self._counts[cache] = list(counts) if before is None else list(map(add, before, counts))
        self._sums[cache] = self._sums.get(cache, 0.0) + seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Give the metric as it is now."""
        family = HistogramMetricFamily(
            f"{NAMESPACE}_commit_to_bust_seconds", "Time from a commit to its acknowledged bust.", labels=["cache"]
        )
        for cache, counts in self._counts.items():
            buckets, sum_so_far = [], 0
            for bound, count in zip((*map(str, map(float, LAG_BUCKETS)), "+Inf"), counts, strict=True):
                sum_so_far += count
                buckets.append((bound, sum_so_far))
            family.add_metric([cache], buckets, self._sums[cache])
        yield family
