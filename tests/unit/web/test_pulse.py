"""What the pages tell while the loop that busts turns, hangs, or is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cdc_invalidator.web import pulse
from cdc_invalidator.web.exposition import Exposition
from cdc_invalidator.web.pulse import Answer, Pulse
from cdc_invalidator.web.server import Page, Request
from cdc_invalidator.web.site import Site

IDLE = Exposition(lambda _: iter(()), CollectorRegistry())


class Daemon:
    """A loop in a thread that can be made to hang, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.unready: str | None = None
        self.go_on = threading.Event()
        self._hung = threading.Event()

    def look(self) -> Answer:
        self.asked += 1
        return Answer({"asked": self.asked}, self.unready, 1_700_000_000 + self.asked)

    def hang(self, loop: asyncio.AbstractEventLoop) -> None:
        def stop() -> None:
            self._hung.set()
            self.go_on.wait(60)

        loop.call_soon_threadsafe(stop)
        assert self._hung.wait(60)


def beside(daemon: Daemon, test: Callable[[Site, asyncio.AbstractEventLoop], Any]) -> None:
    """Run a test in a loop of its own, beside that of a daemon."""

    async def main() -> None:
        with Pulse(daemon.look) as beating:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, lambda: asyncio.run(test(Site(beating, IDLE), loop)))

    asyncio.run(main())


async def get(site: Site, path: str) -> Page:
    return await site.get(Request(path, {}, ""))


def test_a_loop_that_turns_is_asked_each_time() -> None:
    daemon = Daemon()

    async def test(site: Site, _loop: asyncio.AbstractEventLoop) -> None:
        assert (await get(site, "/livez")).body == b"ok\n"
        assert (await get(site, "/readyz")).status == 200
        first, second = [json.loads((await get(site, "/status")).body) for _ in range(2)]
        assert second["asked"] > first["asked"]
        assert (first["old"], second["old"]) == (False, False)
        assert second["as_of"].startswith("2023-11-14T22:13:2")
        daemon.unready = "it waits"
        page = await get(site, "/readyz")
        assert (page.status, page.body) == (503, b"not ready: it waits\n")

    beside(daemon, test)


def test_a_loop_that_hangs_is_told_and_its_last_answer_is_marked_as_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "ANSWER_SECONDS", 0.05)
    daemon = Daemon()

    async def test(site: Site, loop: asyncio.AbstractEventLoop) -> None:
        daemon.hang(loop)
        try:
            # Not at once: a large transaction takes a while.
            assert (await get(site, "/livez")).status == 200
            status = json.loads((await get(site, "/status")).body)
            assert status["old"] is True
            assert status["asked"] == daemon.asked
            monkeypatch.setattr(pulse, "HANGS_SECONDS", 0.0)
            for path in ("/livez", "/readyz"):
                page = await get(site, path)
                assert page.status == 503
                assert b"The daemon hangs: the loop that busts has not turned for" in page.body
        finally:
            daemon.go_on.set()

    beside(daemon, test)


def test_the_last_answer_of_a_loop_that_is_gone_stays() -> None:
    daemon = Daemon()

    async def beat() -> Pulse:
        with Pulse(daemon.look) as beating:
            return beating

    beating = asyncio.run(beat())
    answer, old = asyncio.run(beating.ask())
    assert (answer.status, old) == ({"asked": 1}, True)


async def test_an_answer_that_comes_when_the_pages_are_closed_troubles_nobody() -> None:
    failed: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: failed.append(context))

    async def leave(pulse: Pulse) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pulse.call(lambda: 1), 0.01)

    with Pulse(lambda: Answer({}, None, 0.0)) as pulse:
        pages = threading.Thread(target=lambda: asyncio.run(leave(pulse)))
        pages.start()
        # This loop does not turn until theirs is closed.
        pages.join()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert failed == []
