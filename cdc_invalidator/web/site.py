"""Which page answers which path: /livez, /readyz, /status, /metrics."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson

from cdc_invalidator import errors
from cdc_invalidator.web.exposition import Exposition
from cdc_invalidator.web.pulse import Pulse
from cdc_invalidator.web.server import Page, Request, text


class Site:
    """Answers requests.

    Args:
        pulse: tells how the daemon is.
        exposition: answers scrapes.
    """

    def __init__(self, pulse: Pulse, exposition: Exposition) -> None:
        self._pulse = pulse
        self._exposition = exposition

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
