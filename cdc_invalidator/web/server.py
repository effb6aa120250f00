"""The HTTP server: one request a connection, GET and HEAD only, in a thread and an event loop of its own.

Busts don't wait for whoever asks here, and an answer does not wait for busts. The rule that holds here: whatever
clients do, connections, bytes and seconds are bounded, and nothing is written to the log. Where there is no room for a
new connection, the oldest one gives way that has not sent its request yet.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from urllib.parse import parse_qsl

import h11

from cdc_invalidator import errors

# A client that is slower than this with its request or with taking the answer is dropped.
REQUEST_SECONDS = 10.0
HEADER_BYTES = 16_384
# So many connections at once; a quarter of the descriptors that this process may have, if that is less.
MOST_CONNECTIONS = 256
# The kernel holds so many more that nobody has accepted yet.
BACKLOG = 128
# Busts go on while a crowd of clients comes and goes: so long nobody is accepted after so many.
BATCH = 32
PAUSE_SECONDS = 0.005
# A client is still sending when it is refused. It would lose the answer if the rest were not read; but not more of it.
LINGER_BYTES = 1 << 20
LINGER_SECONDS = 1.0
NO_DESCRIPTOR_SECONDS = 0.1
CLOSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: a path, the fields of its query, and the header ``Accept``."""

    path: str
    query: Mapping[str, str]
    accept: str


@dataclass(frozen=True, slots=True)
class Page:
    """An answer: status code, content type, body and further headers."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def text(status: int, sentence: str) -> Page:
    """Return a page of plain text."""
    return Page(status, "text/plain; charset=utf-8", f"{errors.visible(sentence)}\n".encode(errors="replace"))


@contextmanager
def serve(
    get: Callable[[Request], Awaitable[Page]],
    host: str,
    port: int,
    beside: Callable[[], Coroutine[None, None, None]] | None = None,
) -> Iterator[int]:
    """Serve pages while the context lasts, and give the port.

    Args:
        get: answers a request; it runs in the server's own event loop.
        beside: what goes on in that loop all the time; ``None`` for nothing.
        host: an address or name of this machine; empty for all addresses.
        port: 0 for any free one.

    Raises:
        errors.WrongSettings: the address can't be listened on.
    """
    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(each) for each in _listen(host, port)]
        except OSError as error:
            raise errors.WrongSettings(
                f"The pages can't be served on {host}:{port} ({error.strerror}); set CDC_HTTP_HOST and CDC_HTTP_PORT."
            ) from error
        server = _Server(get, sockets, beside)
        thread = threading.Thread(target=server.run, name="http", daemon=True)
        thread.start()
        try:
            yield sockets[0].getsockname()[1]
        finally:
            server.stop()
            thread.join(CLOSE_SECONDS)


def _listen(host: str, port: int) -> Iterator[socket.socket]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, address in dict.fromkeys(found):
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        listening.setblocking(False)
        yield listening


class _Server:
    def __init__(
        self,
        get: Callable[[Request], Awaitable[Page]],
        sockets: list[socket.socket],
        beside: Callable[[], Coroutine[None, None, None]] | None,
    ) -> None:
        self._get = get
        self._beside = beside
        self._sockets = sockets
        self._loop = asyncio.new_event_loop()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = descriptors == resource.RLIM_INFINITY
        self._most = MOST_CONNECTIONS if unlimited else max(1, min(MOST_CONNECTIONS, descriptors // 4))
        # In order of arrival: those who have not sent their request, and those who get an answer.
        self._asking: dict[asyncio.Task[None], None] = {}
        self._answered: dict[asyncio.Task[None], None] = {}
        self._stopping = asyncio.Event()

    def run(self) -> None:
        """Serve until `stop`."""
        # A mistake in the code of a page is answered with 500; there is nothing that a client could have logged.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self) -> None:
        working = [asyncio.create_task(self._accept(each)) for each in self._sockets]
        working += [asyncio.create_task(self._beside())] if self._beside is not None else []
        await self._stopping.wait()
        tasks = [*working, *self._asking, *self._answered]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CLOSE_SECONDS / 2)

    async def _accept(self, listening: socket.socket) -> None:
        accepted = 0
        while True:
            try:
                client, _ = await self._loop.sock_accept(listening)
            except OSError:
                # Others have taken all descriptors, or the client is gone already.
                await asyncio.sleep(NO_DESCRIPTOR_SECONDS)
                continue
            if len(self._asking) + len(self._answered) >= self._most:
                oldest = next(iter(self._asking or self._answered))
                self._forget(oldest)
                oldest.cancel()
            task = self._loop.create_task(self._converse(client))
            self._asking[task] = None
            # Also of one that is cancelled before it has begun.
            task.add_done_callback(partial(self._over, client))
            accepted += 1
            if accepted % BATCH == 0:
                await asyncio.sleep(PAUSE_SECONDS)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._asking.pop(task, None)
        self._answered.pop(task, None)

    def _over(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        client.close()
        self._forget(task)

    async def _converse(self, client: socket.socket) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._answer(client)
        except (OSError, TimeoutError, asyncio.CancelledError):
            # The client is gone or dawdles, another one needs its place, or the daemon ends: nobody is owed more.
            return

    async def _answer(self, client: socket.socket) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES)
        with_body, refused = True, False
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await self._loop.sock_recv(client, 65536))
        except h11.RemoteProtocolError as error:
            page, refused = text(error.error_status_hint, "bad request"), True
        else:
            if not isinstance(event, h11.Request):
                return
            task = asyncio.current_task()
            if task is not None and task in self._asking:
                del self._asking[task]
                self._answered[task] = None
            if event.method in {b"GET", b"HEAD"}:
                page = await self._page(event)
            else:
                page, refused = text(405, "GET only"), True
            # A HEAD gets the length of what it does not get.
            with_body = event.method != b"HEAD"
        response = h11.Response(
            status_code=page.status,
            reason=HTTPStatus(page.status).phrase.encode(),
            headers=[
                ("Content-Type", page.content_type),
                ("Content-Length", str(len(page.body))),
                ("Connection", "close"),
                *page.headers.items(),
            ],
        )
        await self._loop.sock_sendall(client, connection.send(response) or b"")
        if with_body:
            await self._loop.sock_sendall(client, page.body)
        if refused:
            client.shutdown(socket.SHUT_WR)
            await self._linger(client)

    async def _page(self, request: h11.Request) -> Page:
        path, _, query = request.target.decode("latin-1").partition("?")
        accept = ", ".join(value.decode("latin-1") for name, value in request.headers if name == b"accept")
        try:
            return await self._get(Request(path, dict(parse_qsl(query, errors="replace")), accept))
        except (OSError, asyncio.CancelledError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  a page that can't be made says so, and the others go on
            return text(500, f"this page can't be made: {type(error).__name__}; please report it")

    async def _linger(self, client: socket.socket) -> None:
        left = LINGER_BYTES
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0 and (more := await self._loop.sock_recv(client, 65536)):
                left -= len(more)
