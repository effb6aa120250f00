"""The daemon's pages: /metrics, /livez, /readyz, /status. One request a connection, GET and HEAD only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import h11
import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from cdc_invalidator import errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# A client that is slower than this with its request or with taking the answer is dropped.
REQUEST_SECONDS = 10.0


class Page(NamedTuple):
    """An answer: status code, content type and body."""

    status: int
    content_type: str
    body: bytes


class Pages:
    """What is served.

    Args:
        registry: the metrics.
        status: gives the content of /status.
        unready: tells why /readyz is not 200; ``None`` if it is.
    """

    def __init__(
        self, registry: CollectorRegistry, status: Callable[[], dict[str, Any]], unready: Callable[[], str | None]
    ) -> None:
        self._registry = registry
        self._status = status
        self._unready = unready

    def get(self, path: str, accept: str) -> Page:
        """Answer a request for a path (without its query); ``accept`` is the header of that name."""
        if path == "/metrics":
            return self._metrics(accept)
        if path == "/livez":
            # That this line runs is the answer: the loop turns. Whether a server is up is not its business, or every
            # outage would restart every Pod.
            return Page(200, "text/plain; charset=utf-8", b"ok\n")
        if path == "/readyz":
            why = self._unready()
            body = b"ok\n" if why is None else f"not ready: {why}\n".encode()
            return Page(200 if why is None else 503, "text/plain; charset=utf-8", body)
        if path == "/status":
            body = orjson.dumps(self._status(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            return Page(200, "application/json", body)
        return Page(404, "text/plain; charset=utf-8", b"not found; try /metrics, /livez, /readyz or /status\n")

    def _metrics(self, accept: str) -> Page:
        try:
            encoder, content_type = choose_encoder(accept)
            return Page(200, content_type, encoder(self._registry))
        except (TypeError, ValueError):
            # The client trips over an escaping scheme that it does not know; the plain form suits everybody.
            encoder, content_type = choose_encoder("")
            return Page(200, content_type, encoder(self._registry))


@asynccontextmanager
async def serve(pages: Pages, host: str, port: int) -> AsyncIterator[int]:
    """Serve the pages while the context lasts, and give the port.

    Raises:
        errors.WrongSettings: the address can't be listened on.
    """
    answering: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        task.add_done_callback(answering.discard)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await _answer(pages, reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            # The client went away or dawdled, or the daemon ends: the pages owe nothing to anybody.
            writer.transport.abort()
        finally:
            writer.close()

    try:
        server = await asyncio.start_server(answer, host, port)
    except OSError as error:
        raise errors.WrongSettings(
            f"The pages can't be served on {host}:{port} ({error.strerror}); set CDC_HTTP_HOST and CDC_HTTP_PORT."
        ) from error
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(answering):
            task.cancel()


async def _answer(pages: Pages, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = h11.Connection(h11.SERVER)
    with_body = True
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
    except h11.RemoteProtocolError as error:
        page = Page(error.error_status_hint, "text/plain; charset=utf-8", b"bad request\n")
    else:
        if not isinstance(event, h11.Request):
            return
        page = _page(pages, event)
        # A HEAD gets the length of what it does not get.
        with_body = event.method != b"HEAD"
    response = h11.Response(
        status_code=page.status,
        reason=HTTPStatus(page.status).phrase.encode(),
        headers=[
            ("Content-Type", page.content_type),
            ("Content-Length", str(len(page.body))),
            ("Connection", "close"),
        ],
    )
    for part in (response, h11.Data(data=page.body if with_body else b""), h11.EndOfMessage()):
        writer.write(connection.send(part) or b"")
    await writer.drain()


def _page(pages: Pages, request: h11.Request) -> Page:
    if request.method not in {b"GET", b"HEAD"}:
        return Page(405, "text/plain; charset=utf-8", b"GET only\n")
    accept = b", ".join(value for name, value in request.headers if name == b"accept")
    return pages.get(request.target.partition(b"?")[0].decode("latin-1"), accept.decode("latin-1"))
