"""Scrapes: which format, and how often one is made for a crowd of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cdc_invalidator.metrics import Metrics
from cdc_invalidator.web import exposition
from cdc_invalidator.web.exposition import SHARED_LINES, Exposition, prefers_openmetrics

OPENMETRICS = "application/openmetrics-text"
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,"
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        (OPENMETRICS, True),
        (f"{OPENMETRICS}; version=1.0.0; escaping=nonsense", True),
        ("text/plain, application/openmetrics-text", True),
        ("text/plain;q=0.9, application/openmetrics-text;q=0.8", False),
        (f"{OPENMETRICS};version=0.0.1", False),
        (f"{OPENMETRICS};version=2.0.0", False),
        (f"{OPENMETRICS};q=0", False),
        (f"{OPENMETRICS};q=much", False),
        ("text/plain;version=0.0.4", False),
        ("*/*", False),
        ("", False),
        (";;;,,,===;q=", False),
    ],
)
def test_the_format_is_the_one_that_the_client_prefers(accept: str, preferred: bool) -> None:
    assert prefers_openmetrics(accept) is preferred


class Rendered:
    """So many lines; counts how often they were rendered."""

    def __init__(self, lines: int) -> None:
        self.times = 0
        self._lines = lines

    def __call__(self, _openmetrics: bool) -> Iterator[str]:
        self.times += 1
        for number in range(0, self._lines, 100):
            yield "".join(f"ours_{number + each} {self.times}\n" for each in range(100))


async def crowd(exposition_: Exposition, clients: int) -> None:
    bodies = {page.body for page in await asyncio.gather(*(exposition_.get("") for _ in range(clients)))}
    assert len(bodies) == 1


def test_clients_that_come_within_a_second_share_a_scrape_of_many_series(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = Rendered(SHARED_LINES)
    scraped = Exposition(rendered, CollectorRegistry())

    async def main() -> None:
        monkeypatch.setattr(exposition, "SHARED_SECONDS", 60.0)
        await crowd(scraped, 50)
        await crowd(scraped, 50)
        assert rendered.times == 1
        await scraped.get(OPENMETRICS)
        assert rendered.times == 2
        monkeypatch.setattr(exposition, "SHARED_SECONDS", 0.0)
        scraped._shared.clear()
        await scraped.get("")
        await scraped.get("")
        assert rendered.times == 4

    asyncio.run(main())


def test_a_small_scrape_is_always_of_now() -> None:
    rendered = Rendered(SHARED_LINES - 100)
    scraped = Exposition(rendered, CollectorRegistry())

    async def main() -> None:
        assert b"ours_0 1\n" in (await scraped.get("")).body
        assert b"ours_0 2\n" in (await scraped.get("")).body

    asyncio.run(main())


def test_other_clients_have_their_turn_between_the_parts_of_a_scrape() -> None:
    scraped = Exposition(Rendered(10_000), CollectorRegistry())

    async def main() -> None:
        turns = 0
        scrape = asyncio.create_task(scraped.get(""))
        while not scrape.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 100

    asyncio.run(main())


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_a_scrape_has_the_metrics_of_the_daemon_and_of_its_process(accept: str) -> None:
    metrics, process = Metrics(CollectorRegistry()), CollectorRegistry()
    ProcessCollector(registry=process)
    scraped = Exposition(lambda openmetrics: metrics.render("s", openmetrics=openmetrics), process)
    page = asyncio.run(scraped.get(accept))
    parse = parse_openmetrics if accept else parse_text
    assert page.content_type.startswith(OPENMETRICS if accept else "text/plain")
    names = {family.name for family in parse(page.body.decode())}
    assert {"cdc_invalidator_leader", "process_cpu_seconds"} <= names
