"""Which page answers which path: /livez, /readyz, /status and /metrics for programs, and / for people."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import orjson

from cdc_invalidator import errors
from cdc_invalidator.web.exposition import Exposition
from cdc_invalidator.web.page import NOTHING, PATHS, StatusPage, View
from cdc_invalidator.web.pulse import Pulse
from cdc_invalidator.web.server import Page, Request, text


class Site:
    """Answers requests.

    Args:
        pulse: tells how the daemon is.
        exposition: answers scrapes.
        page: the page for people; ``None`` if there is none.
        look: makes what it shows, in the daemon's loop.
    """

    def __init__(
        self,
        pulse: Pulse,
        exposition: Exposition,
        page: StatusPage | None = None,
        look: Callable[[], View] = lambda: NOTHING,
    ) -> None:
        self._pulse = pulse
        self._exposition = exposition
        self._page = page
        self._look = look

    async def run(self) -> None:
        """Do what goes on while nobody asks, until cancelled."""
        if self._page is not None:
            await self._page.run(self._pulse, self._look)

    async def get(self, request: Request) -> Page:
        """Answer a request."""
        match request.path:
            case "/metrics":
                return await self._exposition.get(request.accept)
            case "/livez":
                return self._live()
            case "/readyz":
                return await self._ready()
            case "/status":
                return await self._status()
            case path if path in PATHS and self._page is not None:
                return await self._page.get(request, self._pulse, self._look)
        return text(404, "not found; try /metrics, /livez, /readyz or /status")

    def _live(self) -> Page:
        # Whether a server is up is not its business, or every outage would restart every Pod.
        hangs = self._pulse.hangs()
        return text(200, "ok") if hangs is None else text(503, f"not live: {hangs}")

    async def _ready(self) -> Page:
        answer, old = await self._pulse.ask()
        why = (old and self._pulse.hangs()) or answer.unready
        return text(200, "ok") if why is None else text(503, f"not ready: {why}")

    async def _status(self) -> Page:
        answer, old = await self._pulse.ask()
        as_of = datetime.fromtimestamp(answer.at, UTC).isoformat(timespec="milliseconds")
        body = orjson.dumps(
            answer.status | {"as_of": as_of, "old": old}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        )
        return Page(200, "application/json", errors.visible_json(body))
