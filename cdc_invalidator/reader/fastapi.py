"""FastAPI and Starlette: caches that live as long as the application, and a visitor's own writes. See FRAMEWORKS.md."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cdc_invalidator.reader import connect
from cdc_invalidator.reader.aio import AsyncCaches
from cdc_invalidator.reader.own_writes import COOKIE, SECONDS, Visitors


def lifespan(
    rules: str | Path | AsyncCaches, redis: Any = None, **options: Any
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return a lifespan: the caches are made with the application, and closed with it.

    In a lifespan of your own: ``async with lifespan(…)(app): yield``.

    Args:
        rules: a rule file, or a directory of them; or, alone, caches that a module has made.
        redis: a URL, ``memory:`` in tests; or, for Sentinel or a cluster, a function that returns a client of
            redis.asyncio.
        options: of `AsyncCaches.from_rules`.

    Raises:
        TypeError: there are rules without Redis, or caches with it or with options.
    """
    if isinstance(rules, AsyncCaches) != (redis is None) or (redis is None and options):
        raise TypeError("a lifespan is of rule files and a Redis, or of caches that are made already and nothing else")

    @asynccontextmanager
    async def living(app: Any) -> AsyncIterator[None]:
        if isinstance(rules, AsyncCaches):
            caches = rules
        else:
            client = connect.async_client(redis() if callable(redis) else redis)
            caches = AsyncCaches.from_rules(rules, client, **options)
        app.state.cdc_invalidator = caches
        try:
            yield
        finally:
            app.state.cdc_invalidator = None
            await caches.aclose()

    return living


def of_app(connection: HTTPConnection) -> AsyncCaches:
    """Return the caches of the application that answers a request.

    Raises:
        LookupError: it has none.
    """
    caches: AsyncCaches | None = getattr(connection.app.state, "cdc_invalidator", None)
    if caches is None:
        raise LookupError(
            "this application has no caches; make it by FastAPI(lifespan=lifespan(rules, redis)), and run it by a "
            "server, or by `with TestClient(app)`, which begin its lifespan"
        )
    return caches


AppCaches = Annotated[AsyncCaches, Depends(of_app)]


class OwnWrites:
    """A middleware: a visitor's reads show what the visitor has written, in later requests too.

    A write counts if its transaction is committed before the answer begins, so not by a dependency that commits after
    its ``yield`` unless its scope is ``function``.

    Args:
        app: what answers.
        secret: signs the cookie; the same in all processes.
        lsn: a coroutine function that returns the LSN of a commit: ``lambda: acommit_lsn(engine)``.
        seconds: how long reads ask for a write.
    """

    def __init__(self, app: ASGIApp, *, secret: str, lsn: Callable[[], Awaitable[int]], seconds: int = SECONDS) -> None:
        self._app = app
        self._lsn = lsn
        self._visitors = Visitors(secret, seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; after a write, the answer sets the cookie."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                await own.aask(self._lsn)
                if own.changed:
                    MutableHeaders(scope=message).append(
                        "set-cookie", self._visitors.header(own, secure=scope["scheme"] == "https")
                    )
            await send(message)

        cookie = HTTPConnection(scope).cookies.get(COOKIE)
        with self._visitors.request(scope["method"], cookie) as own:
            await self._app(scope, receive, sending)
