"""The metrics of readers, by cache; without a registry, nothing is counted.

prometheus-client is imported, and needed, only with a registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_PREFIX = "cdc_invalidator_reader_"
_COUNTERS = {
    "hits": "Reads that the cache answered with a value.",
    "misses": "Reads that found nothing under their key.",
    "negative_hits": "Reads that the cache answered with: there is nothing.",
    "stale_hits": "Reads that were answered with the old value while somebody loaded the new one.",
    "fail_safe_hits": "Reads that were answered with an old value because the load failed.",
    "waits": "Reads that waited for somebody else's load.",
    "fills": "Values stored after a load.",
    "dropped_fills": "Values not stored, because a bust overtook their load or the lease ran out.",
    "early_refreshes": "Values that were loaded again before their time was up.",
    "l1_hits": "Reads that the process's own memory answered.",
}
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All metrics, in one registry. Make one for each registry, however many `Caches` share it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Histogram  # noqa: PLC0415  not everybody has it

        self._counters = {
            name: Counter(_PREFIX + name, text, ["cache"], registry=registry) for name, text in _COUNTERS.items()
        }
        self._bypasses = Counter(
            _PREFIX + "bypasses",
            "Reads that went to the database beside the cache, or whose value was not stored, and why.",
            ["cache", "reason"],
            registry=registry,
        )
        self._load = Histogram(
            _PREFIX + "load_seconds", "How long loads took.", ["cache"], registry=registry, buckets=_SECONDS
        )

    def of(self, cache: str) -> CacheMetrics:
        """Return the metrics of one cache."""
        incs = {name: counter.labels(cache).inc for name, counter in self._counters.items()}
        observe = self._load.labels(cache).observe
        return CacheMetrics(incs, lambda reason, count: self._bypasses.labels(cache, reason).inc(count), observe)


class CacheMetrics:
    """The counters of one cache; each attribute of `_COUNTERS` adds to one."""

    hits: Callable[..., Any]
    misses: Callable[..., Any]
    negative_hits: Callable[..., Any]
    stale_hits: Callable[..., Any]
    fail_safe_hits: Callable[..., Any]
    waits: Callable[..., Any]
    fills: Callable[..., Any]
    dropped_fills: Callable[..., Any]
    early_refreshes: Callable[..., Any]
    l1_hits: Callable[..., Any]

    def __init__(
        self,
        incs: dict[str, Callable[..., Any]],
        bypasses: Callable[[str, int], Any],
        load_seconds: Callable[[float], Any],
    ) -> None:
        for name, inc in incs.items():
            setattr(self, name, inc)
        self._bypasses = bypasses
        self.load_seconds = load_seconds

    def bypasses(self, reason: str, count: int = 1) -> None:
        """Count reads that went beside the cache."""
        self._bypasses(reason, count)


def no_metrics() -> CacheMetrics:
    """Return metrics that count nothing."""

    def ignore(*_: Any) -> None:
        return

    return CacheMetrics(dict.fromkeys(_COUNTERS, ignore), ignore, ignore)
