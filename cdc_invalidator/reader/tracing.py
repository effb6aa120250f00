"""Spans of OpenTelemetry: one for each read, with its cache and what became of it; never a key or a value.

Nothing of OpenTelemetry is imported unless a program passes a tracer. Without one, reads run the same code as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cdc_invalidator.reader.metrics import CacheMetrics

# The span of the read that goes on here.
_SPAN: ContextVar[Any] = ContextVar("cdc_invalidator_span", default=None)
# What a count says of a read; what comes last counts.
_OUTCOMES = {
    "hits": "hit",
    "negative_hits": "negative_hit",
    "l1_hits": "local_hit",
    "stale_hits": "stale_hit",
    "fail_safe_hits": "fail_safe_hit",
    "misses": "miss",
}


class Tracing:
    """Makes spans.

    Args:
        tracer: of OpenTelemetry's API.
    """

    def __init__(self, tracer: Any) -> None:
        from opentelemetry.trace import StatusCode  # noqa: PLC0415  who has a tracer has it

        self._tracer = tracer
        self._error = StatusCode.ERROR

    @contextmanager
    def span(self, call: str, cache: str) -> Iterator[None]:
        """Make the span of a read, as long as this is entered."""
        # What a loader raises may have values in its message, so its kind alone is told.
        with self._tracer.start_as_current_span(
            f"cache {call}", attributes={"cdc.cache": cache}, record_exception=False, set_status_on_exception=False
        ) as span:
            token = _SPAN.set(span)
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._error)
                raise
            finally:
                _SPAN.reset(token)

    def told(self, metrics: CacheMetrics) -> CacheMetrics:
        """Return metrics that say the same to the span of the read, too."""
        counts = {name: _telling(getattr(metrics, name), outcome) for name, outcome in _OUTCOMES.items()}

        def bypasses(reason: str, count: int) -> None:
            metrics.bypasses(reason, count)
            _tell("bypass", count)
            if (span := _SPAN.get()) is not None:
                span.set_attribute("cdc.reason", reason)

        return CacheMetrics({**vars(metrics), **counts}, bypasses, metrics.load_seconds)


def _telling(count: Callable[..., Any], outcome: str) -> Callable[..., None]:
    def counted(number: int = 1) -> None:
        count(number)
        _tell(outcome, number)

    return counted


def _tell(outcome: str, number: int) -> None:
    span = _SPAN.get()
    if span is not None:
        span.set_attribute("cdc.outcome", outcome)
        span.set_attribute(f"cdc.{outcome}", number)
