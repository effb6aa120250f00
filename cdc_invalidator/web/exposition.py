"""/metrics: the daemon's metrics, and those of its process, in the format that the client prefers.

A scrape of many series takes milliseconds, so clients that come within a second share it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from cdc_invalidator.web.server import Page

# An exposition with so many lines is kept for so long; a shorter one costs no more than to send it.
SHARED_LINES = 2000
SHARED_SECONDS = 1.0

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Exposition:
    """Answers scrapes.

    Args:
        render: yields the daemon's own metrics in parts; the argument ``openmetrics`` says in which format.
        process: the metrics of the process; few.
    """

    def __init__(self, render: Callable[[bool], Iterator[str]], process: CollectorRegistry = REGISTRY) -> None:
        self._render = render
        self._process = process
        # By format: until when it may be shared, and what was made.
        self._shared: dict[bool, tuple[float, Page]] = {}
        self._making: dict[bool, asyncio.Lock] = {True: asyncio.Lock(), False: asyncio.Lock()}

    async def get(self, accept: str) -> Page:
        """Answer a scrape; ``accept`` is the header of that name."""
        openmetrics = prefers_openmetrics(accept)
        async with self._making[openmetrics]:
            until, page = self._shared.get(openmetrics, (0.0, None))
            if page is None or time.monotonic() >= until:
                page, lines = await self._make(openmetrics)
                self._shared.pop(openmetrics, None)
                if lines >= SHARED_LINES:
                    self._shared[openmetrics] = time.monotonic() + SHARED_SECONDS, page
        return page

    async def _make(self, openmetrics: bool) -> tuple[Page, int]:
        parts, lines = [], 0
        for part in self._render(openmetrics):
            parts.append(part.encode(errors="replace"))
            lines += part.count("\n")
            # Other clients, /livez before all, have their turn in between.
            await asyncio.sleep(0)
        # OpenMetrics has a mark at its end.
        generate = generate_openmetrics if openmetrics else generate_latest
        parts.append(generate(self._process))
        return Page(200, _OPENMETRICS if openmetrics else _TEXT, b"".join(parts)), lines


def prefers_openmetrics(accept: str) -> bool:
    """Return whether a client takes OpenMetrics 1.0 at least as gladly as Prometheus's text format."""
    liked = {True: 0.0, False: 0.0}
    for each in accept.split(","):
        kind, *parameters = (word.strip() for word in each.split(";"))
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        openmetrics = kind == "application/openmetrics-text"
        if openmetrics and given.get("version", "1.0.0") != "1.0.0":
            continue
        try:
            quality = float(given.get("q", "1"))
        except ValueError:
            continue
        if openmetrics or kind in {"text/plain", "text/*", "*/*"}:
            liked[openmetrics] = max(liked[openmetrics], quality)
    return liked[True] > 0 and liked[True] >= liked[False]
