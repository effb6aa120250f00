"""The metrics' own types: counters, gauges and a histogram that cost little to count on, and little to show.

A thousand rules make tens of thousands of series, and the library takes 15 µs to render each. Here, a series keeps its
labels as the text that a scrape shows; a line of the answer is this text and a figure. One thread counts; any thread
may render meanwhile. They are collectors of prometheus-client as well, so that a registry can hold them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from math import isfinite, isnan
from operator import add
from typing import Literal

from prometheus_client import Metric
from prometheus_client.registry import Collector

Kind = Literal["counter", "gauge"]
# A renderer of so many lines is done in a fraction of a millisecond.
LINES_A_PART = 500
# Names of tables come from the database: an escape sequence would reach the terminal of whoever looks.
_SIGNS = {code: f"\\\\x{code:02x}" for code in (*range(32), *range(127, 160))} | str.maketrans(
    {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
)


def label(name: str, value: str) -> str:
    """Return a label as an exposition has it, with a comma behind it; control characters are shown by their number."""
    return f'{name}="{value.translate(_SIGNS)}",'


def figure(value: float) -> str:
    """Return a sample's value as an exposition has it."""
    if isfinite(value):
        return repr(value)
    return "NaN" if isnan(value) else "+Inf" if value > 0 else "-Inf"


class Series:
    """One figure; ``text`` has its labels as an exposition shows them."""

    __slots__ = ("text", "value")

    def __init__(self, text: str = "", value: float = 0.0) -> None:
        self.text = text
        self.value = value

    def inc(self, amount: float = 1) -> None:
        """Add to it."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replace it."""
        self.value = float(value)

    def set_to_current_time(self) -> None:
        """Set it to the Unix time."""
        self.value = time.time()


class Family(Collector):
    """All series of one name. Without labels it is its one series itself.

    Args:
        kind: ``counter`` if it only rises, else ``gauge``.
        name: its full name; that of a counter ends in ``_total``.
        text: its help text.
        labels: the names of its labels.
        silent: it has no sample before `set`, and none after `clear`: a counter of somebody else's that started at 0
            and jumped to what was counted for months would look like a burst.
    """

    def __init__(self, kind: Kind, name: str, text: str, labels: Sequence[str] = (), *, silent: bool = False) -> None:
        self.kind = kind
        self.name = name
        self._text = text
        self._labels = tuple(labels)
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels and not silent:
            self.labels()

    def labels(self, *values: str) -> Series:
        """Return the series with these values of the labels; from now on it is shown."""
        found = self._series.get(values)
        if found is None:
            text = "".join(label(name, value) for name, value in zip(self._labels, values, strict=True))
            found = self._series[values] = Series(text)
        return found

    def inc(self, amount: float = 1) -> None:
        """Add to its one series."""
        self.labels().inc(amount)

    def set(self, value: float) -> None:
        """Replace the figure of its one series."""
        self.labels().set(value)

    def set_to_current_time(self) -> None:
        """Set its one series to the Unix time."""
        self.labels().set_to_current_time()

    @property
    def value(self) -> float | None:
        """The figure of its one series; ``None`` if it is not shown."""
        series = self._series.get(())
        return series.value if series is not None else None

    def clear(self) -> None:
        """Show nothing of what was known, until somebody knows again."""
        self._series = {}

    def items(self) -> list[tuple[tuple[str, ...], float]]:
        """Return the values of the labels and the figure of each series."""
        return [(values, series.value) for values, series in list(self._series.items())]

    def render(self, common: str, *, openmetrics: bool) -> Iterator[str]:
        """Yield its lines, in parts of at most LINES_A_PART.

        Args:
            common: labels that all series get, see `label`, without the last comma.
            openmetrics: in that format; otherwise in Prometheus's text format.
        """
        name = self.name.removesuffix("_total") if openmetrics and self.kind == "counter" else self.name
        yield _head(name, self._text, self.kind)
        start, end = self.name + "{", common + "} "
        # The list is made in one go, whoever adds series meanwhile.
        lines = (f"{start}{each.text}{end}{figure(each.value)}\n" for each in list(self._series.values()))
        yield from _parts(lines)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric as it is now."""
        metric = Metric(self.name.removesuffix("_total"), self._text, self.kind)
        for values, value in self.items():
            metric.add_sample(self.name, dict(zip(self._labels, values, strict=True)), value)
        yield metric


class Histogram(Collector):
    """A histogram by one label. It takes what many observations add in one call.

    Args:
        name: its full name.
        text: its help text.
        label: the name of its label.
        bounds: of its buckets; one more has no bound.
    """

    kind = "histogram"

    def __init__(self, name: str, text: str, label: str, bounds: Sequence[float]) -> None:
        self.name = name
        self._text = text
        self._label = label
        self._bounds = [*(repr(float(bound)) for bound in bounds), "+Inf"]
        # By the label's value: its text, the counts and the sum.
        self._series: dict[str, tuple[str, list[int], float]] = {}
        # Unix time of the last observation, by the label's value.
        self.last: dict[str, float] = {}

    def observe(self, value: str, counts: Sequence[int], total: float) -> None:
        """Add observations: how many fall into each bucket, and their sum."""
        self.last[value] = time.time()
        known = self._series.get(value)
        if known is None:
            self._series[value] = (label(self._label, value), list(counts), total)
        else:
            text, before, total_before = known
            # Replaced as a whole, so that whoever renders meanwhile sees counts and sum of one moment.
            self._series[value] = (text, list(map(add, before, counts)), total_before + total)

    def render(self, common: str, *, openmetrics: bool) -> Iterator[str]:  # noqa: ARG002  the formats agree here
        """Yield its lines, see `Family.render`."""
        yield _head(self.name, self._text, self.kind)
        ends = [f'{common},le="{bound}"}} ' for bound in self._bounds]
        bucket, end = self.name + "_bucket{", common + "} "

        def lines() -> Iterator[str]:
            for text, counts, total in list(self._series.values()):
                for tail, below in zip(ends, accumulate(counts), strict=True):
                    yield f"{bucket}{text}{tail}{below}\n"
                yield f"{self.name}_count{{{text}{end}{sum(counts)}\n{self.name}_sum{{{text}{end}{figure(total)}\n"

        yield from _parts(lines())

    def collect(self) -> Iterator[Metric]:
        """Yield the metric as it is now."""
        metric = Metric(self.name, self._text, self.kind)
        for value, (_, counts, total) in list(self._series.items()):
            labels = {self._label: value}
            for bound, count in zip(self._bounds, accumulate(counts), strict=True):
                metric.add_sample(f"{self.name}_bucket", labels | {"le": bound}, count)
            metric.add_sample(f"{self.name}_count", labels, sum(counts))
            metric.add_sample(f"{self.name}_sum", labels, total)
        yield metric


def _head(name: str, text: str, kind: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _parts(lines: Iterable[str]) -> Iterator[str]:
    lines = iter(lines)
    while part := "".join(islice(lines, LINES_A_PART)):
        yield part
