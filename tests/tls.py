"""TLS before a plain Redis: one that is built without it looks as a managed one does."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import trustme

from cdc_invalidator.embedded.process import HOST, free_port, scratch

_CHUNK = 65536


class TLSFront:
    """127.0.0.1:`port` speaks TLS, the server behind it on another port doesn't; use it as a context manager.

    Its certificate is for 127.0.0.1 and localhost, by a throw-away authority that nobody trusts yet.

    Args:
        server_port: Where the plain server listens.
        client_certificates: Whether a client must show one by the same authority, such as `client_cert_file`.
        names: What the certificate is for.
    """

    def __init__(
        self,
        server_port: int,
        *,
        client_certificates: bool = False,
        names: tuple[str, ...] = (HOST, "localhost"),
    ) -> None:
        self._server_port = server_port
        self._client_certificates = client_certificates
        self._names = names
        self._stack = ExitStack()
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"rediss://{HOST}:{self.port}/0"

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=scratch())))
        authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.client_cert_file = folder / "client.pem"  # with its key
        authority.cert_pem.write_to_path(str(self.ca_file))
        authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(
            str(self.client_cert_file)
        )
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(*self._names).configure_cert(self._context)
        if self._client_certificates:
            authority.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        # Two threads must not use one TLS connection at once; one loop may.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._stack.close()

    _server: asyncio.Server | None = None

    async def _listen(self) -> None:
        # A client that sits on a connection doesn't answer the farewell.
        self._server = await asyncio.start_server(
            self._serve, HOST, self.port, ssl=self._context, ssl_shutdown_timeout=1
        )

    async def _end(self) -> None:
        if self._server:
            self._server.close()
        # Twice: a link that ends leaves its pumps behind.
        for _ in range(2):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled is only who is about to end; asyncio would report it as an error.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                await self._link(reader, writer)
                # What was sent before the server's end still arrives.
                writer.close()
                await writer.wait_closed()
            finally:
                writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(HOST, self._server_port)
        pumps = [
            asyncio.create_task(_pump(reader, server_writer)),
            asyncio.create_task(_pump(server_reader, writer)),
        ]
        try:
            # The first end of the two ends the other.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server_writer.transport.abort()
            for pump in pumps:
                pump.cancel()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
