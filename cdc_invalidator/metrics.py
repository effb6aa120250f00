"""All metrics of the daemon, in one class that takes a registry. Labels come from rule files and SQL, never from data.

One of the daemons of a slot leads. The others leave out what only the leader knows, or show it as 0, so that `max` and
`sum` over all daemons are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry

from cdc_invalidator import __version__
from cdc_invalidator.series import Family, Histogram, Kind, label

NAMESPACE = "cdc_invalidator"
# Seconds from a commit to its acknowledged bust: under a millisecond when idle, minutes after an outage. They are few,
# since each cache has them.
LAG_BUCKETS = (0.001, 0.0025, 0.01, 0.05, 0.25, 1, 5, 30, 300)


class Metrics:
    """The daemon's metrics.

    Args:
        registry: where they are registered; each test passes its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        self._families: list[Family | Histogram] = []

        def family(kind: Kind, name: str, text: str, labels: tuple[str, ...], *, silent: bool = False) -> Family:
            made = Family(kind, f"{NAMESPACE}_{name}", text, labels, silent=silent)
            registry.register(made)
            self._families.append(made)
            return made

        def counter(name: str, text: str, *labels: str) -> Family:
            return family("counter", name, text, labels)

        def gauge(name: str, text: str, *labels: str) -> Family:
            return family("gauge", name, text, labels)

        def reported(kind: Kind, name: str, text: str) -> Family:
            figure = family(kind, name, text, (), silent=True)
            self._reported.append(figure)
            return figure

        self._reported: list[Family] = []

        self.build_info = gauge("build_info", "Always 1, labelled with the version.", "version")
        self.build_info.labels(__version__).set(1)

        self.observing = gauge("observing", "1 with CDC_MODE=observe: nothing is busted, and no watermark is written.")

        # The rules.
        self.rule_set = gauge("rule_set_info", "Always 1, labelled with the digest of the rules in force.", "digest")
        self.reloads = counter("reloads_total", "Reloads of the rule files.", "result")
        for result in ("ok", "failed", "unchanged"):
            self.reloads.labels(result)
        self.reload_successful = gauge(
            "reload_successful", "1 if the rule files hold the rules in force, 0 if they hold others."
        )
        self.reloaded_at = gauge(
            "reload_success_timestamp_seconds", "Unix time when the rule files last matched the rules in force."
        )

        # The stream.
        self.changes = counter("changes_total", "Row changes matched against rules.", "table", "op")
        self.transactions = counter("transactions_total", "Transactions received.")
        self.backlog = gauge("backlog_keys", "Keys to bust that Redis has not acknowledged yet.")
        self.leader = gauge("leader", "1 while this daemon streams from the slot, 0 while it is on standby.")
        self.can_lead = gauge(
            "can_lead", "1 while this daemon gets on as the leader, or stands by and Redis takes what it asks."
        )
        self.handovers = counter(
            "handovers_total",
            "Times that this daemon led and left the slot to another one, since Redis failed (lost) or did not answer "
            "in time (slow).",
            "reason",
        )
        for reason in ("lost", "slow"):
            self.handovers.labels(reason)
        self.blocked = reported(
            "gauge",
            "blocked_seconds",
            "For how long no turn of busts and watermark has ended, whatever it waits for; 0 while they end.",
        )
        self.received_lsn = gauge("received_lsn", "LSN up to which the stream is received.")
        self.confirmed_lsn = gauge("confirmed_lsn", "LSN confirmed to PostgreSQL.")
        self.slot_active = reported("gauge", "slot_active", "1 while a session streams from the slot.")
        self.slot_wal_status = gauge(
            "slot_wal_status", "Always 1, labelled with the slot's wal_status in pg_replication_slots.", "wal_status"
        )
        self.retained_wal = reported("gauge", "retained_wal_bytes", "WAL that PostgreSQL keeps for the slot.")
        self.retained_wal_limit = gauge("retained_wal_limit_bytes", "The setting CDC_MAX_RETAINED_WAL, in bytes.")
        self.postgres_up = gauge("postgres_up", "1 while connected to PostgreSQL.")
        self.postgres_errors = counter(
            "postgres_errors_total",
            "Failed PostgreSQL sessions, by error; standby: failures of a standby's connection.",
            "error",
        )
        self.postgres_connects = counter("postgres_connects_total", "PostgreSQL sessions that started to stream.")
        self.watches = counter("watches_total", "Checks of the slot, the publication and the tables of the rules.")
        self.rows_written = reported(
            "counter",
            "database_rows_written_total",
            "Rows inserted, updated and deleted in the database (pg_stat_database), whether rules match or not.",
        )

        # The busts.
        self.busts = counter("busts_total", "Bust events.", "rule", "cache", "action")
        self.keys = counter("busted_keys_total", "Keys deleted and version counters bumped.", "rule", "cache", "action")
        self.existed = counter(
            "busted_keys_existed_total", "Busted keys that existed in Redis.", "rule", "cache", "action"
        )
        self.again = counter(
            "busted_again_total",
            "Transactions busted again: visible (readers did not see their rows yet at the first bust), standby (a "
            "standby had not replayed them yet), again_after (the cache has that option).",
            "reason",
        )
        self.reapplied = counter(
            "redis_behind_transactions_total", "Transactions applied again to a Redis that had lost them."
        )
        self.observed = counter(
            "observed_total",
            "Keys that would have been busted (CDC_MODE=observe): changes, and of these: absent, mended (by the "
            "application), stale, too_large, skipped.",
            "rule",
            "cache",
            "result",
        )
        self.observed_stale = counter(
            "observed_stale_seconds_total", "For how long stale entries were there, once they are not.", "rule", "cache"
        )
        self.verified = counter(
            "verified_total",
            "Sampled busts by what came back: overtaken (the old content, stale), unaffected (it does not depend on "
            "the change), refilled, empty, undecided, superseded (busted again meanwhile), too_large.",
            "cache",
            "result",
        )
        self.lag = Histogram(
            f"{NAMESPACE}_commit_to_bust_seconds", "Time from a commit to its acknowledged bust.", "cache", LAG_BUCKETS
        )
        registry.register(self.lag)
        self._families.append(self.lag)
        self.sweeps = counter("sweeps_total", "Sweeps: whole caches busted by their key pattern.", "cache", "reason")
        self.sweeps_running = gauge("sweeps_running", "Sweeps in progress.")
        self.swept = counter(
            "sweep_scanned_keys_total", "Keys scanned by sweeps, including other applications' keys.", "cache"
        )
        self.searches = counter(
            "searches_total",
            "Searches: keys of a cache that begin with known prefixes, found by scanning all keys.",
            "cache",
            "reason",
        )
        self.search_passes = counter(
            "search_passes_total", "Passes over all keys for searches; all prefixes that wait share one."
        )
        self.search_prefixes = gauge("search_prefixes", "Prefixes whose keys are not all busted yet.")
        self.searched = counter(
            "search_scanned_keys_total", "Keys scanned by searches, including other applications' keys."
        )
        self._gaps = counter("gaps_total", "Gaps: times when changes may have been missed.", "reason")
        self._gap_at = gauge("gap_timestamp_seconds", "Unix time of the last gap.", "reason")
        self.gaps_open = gauge("gaps_open", "Caches that the watermark leaves out because their gap is not over.")
        self.messages = counter("messages_total", "Messages published on the channels of a cache's `publish`.", "cache")
        self.cache_denied = gauge(
            "cache_denied", "1 while Redis denies the busts or the sweep of the cache: a right is missing.", "cache"
        )
        self.rule_errors = counter(
            "rule_errors_total",
            "Relations for which a rule can't build its keys, failures of its via queries, and rows that are too long "
            "for its conditions.",
            "rule",
        )
        self.queries = counter(
            "via_queries_total", "Runs of via queries; one run covers all changes of a flush.", "rule"
        )

        self.events_dropped = counter(
            "events_dropped_total",
            "Lines of events that were dropped because nobody read standard output in time; they are told later, "
            "unless events_lost says so.",
        )
        self.event_stream_refused = counter(
            "event_stream_refused_total", "Events that Redis did not add to the event stream."
        )

        # The watermark.
        self.watermark_lsn = gauge("watermark_lsn", "LSN up to which every bust is in Redis.")
        self.watermark_at = gauge(
            "watermark_timestamp_seconds",
            "Unix time when the watermark was last written; its age is time() minus this.",
        )
        self.watermark_as_of = reported(
            "gauge",
            "watermark_as_of_timestamp_seconds",
            "Unix time up to which every commit is busted, as the watermark says; missing for a slot on a standby.",
        )
        self.watermark_stalled = gauge("watermark_stalled", "1 while Redis refuses the watermark for lack of memory.")

        # The standbys that readers use.
        self.standby_replayed = gauge("standby_replayed_lsn", "LSN that the standby has replayed.", "standby")
        self.standby_awaited = gauge(
            "standby_awaited", "1 while busts wait for the standby, 0 once it is dropped.", "standby"
        )

        # Redis.
        self.redis_up = reported("gauge", "redis_up", "1 while the leader is connected to Redis.")
        self.redis_errors = counter(
            "redis_errors_total", "Redis errors, by the first word of the reply, or TIMEOUT, CLOSED, …", "error"
        )
        self.redis_connects = counter("redis_connects_total", "Connections opened to Redis.")
        self.redis_hits = reported("counter", "redis_keyspace_hits_total", "Hits (keyspace_hits in INFO of Redis).")
        self.redis_misses = reported(
            "counter", "redis_keyspace_misses_total", "Misses (keyspace_misses in INFO of Redis)."
        )
        self._own_hits = self._own_misses = 0
        self.redis_own_hits = counter(
            "redis_own_hits_total", "Those of redis_keyspace_hits_total that are the daemon's own reads."
        )
        self.redis_own_misses = counter(
            "redis_own_misses_total",
            "Those of redis_keyspace_misses_total that are the daemon's own reads: bumps of versions that nobody has.",
        )
        self.redis_evicted = reported(
            "counter", "redis_evicted_keys_total", "Evicted keys (evicted_keys in INFO of Redis)."
        )
        self.redis_expired = reported(
            "counter", "redis_expired_keys_total", "Expired keys (expired_keys in INFO of Redis)."
        )
        self.redis_memory = reported("gauge", "redis_used_memory_bytes", "Memory (used_memory in INFO of Redis).")

    def gap(self, reason: str) -> None:
        """Count a gap and note its time: a gap at the start is counted before anybody has seen the counter at 0."""
        self._gaps.labels(reason).inc()
        self._gap_at.labels(reason).set_to_current_time()

    def looked_up(self, found: tuple[int, int]) -> None:
        """Note the daemon's own hits and misses. They show when INFO is shown next, so that both are of one moment."""
        self._own_hits += found[0]
        self._own_misses += found[1]

    def show_lookups(self, hits: int, misses: int) -> None:
        """Show all hits and misses, as INFO has them, and which of them are the daemon's own."""
        self.redis_hits.set(hits)
        self.redis_misses.set(misses)
        self.redis_own_hits.set(self._own_hits)
        self.redis_own_misses.set(self._own_misses)

    def rules(self, digest: str, names: Iterable[str]) -> None:
        """Show which rules are in force; count their errors from 0, so that the first one shows as an increase."""
        self.rule_set.clear()
        self.rule_set.labels(digest).set(1)
        for name in ("", *names):
            self.rule_errors.labels(name)

    def forget(self) -> None:
        """Stop showing what a session knew: it is over, and another daemon may know better."""
        for family in (
            *self._reported,
            self.slot_wal_status,
            self.standby_awaited,
            self.standby_replayed,
            self.cache_denied,
        ):
            family.clear()
        for gauge in (
            self.postgres_up,
            self.backlog,
            self.received_lsn,
            self.confirmed_lsn,
            self.sweeps_running,
            self.search_prefixes,
            self.gaps_open,
            self.watermark_lsn,
            self.watermark_stalled,
        ):
            gauge.set(0)

    def render(self, slot: str, *, openmetrics: bool) -> Iterator[str]:
        """Yield what a scrape shows of them, in parts. All get the label ``slot``.

        One Prometheus job may scrape the daemons of several slots, and only they know which of them belong together.
        """
        common = label("slot", slot)[:-1]
        for family in self._families:
            yield from family.render(common, openmetrics=openmetrics)
