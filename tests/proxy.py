"""A TCP proxy before a real server: it passes bytes on until it is told to cut, to refuse, to stall or to go deaf."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Self

from cdc_invalidator.embedded.process import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Close with a reset instead of a farewell.
_RESET = struct.pack("ii", 1, 0)
_CHUNK = 65536


class Proxy:
    """127.0.0.1:`port`, before the server that listens on another port there; use it as a context manager."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._refusing = False
        self._deaf = False
        self._moving = threading.Event()
        self._moving.set()
        self.accepted = 0
        self.port = free_port()

    def __enter__(self) -> Self:
        self._listener = socket.create_server((HOST, self.port), backlog=50)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        # A thread that waits in accept() hears of it by a connection.
        listener, self._refusing = self._listener, True
        self._closing = True
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=5).close()
        self._thread.join()
        listener.close()
        self.cut()

    _closing = False

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.reset()

    def cut_after(self, count: int) -> None:
        """Reset each connection that is open now once the server has sent so many more bytes through it."""
        with self._lock:
            for link in self._links:
                link.left = count

    def refuse(self) -> None:
        """Reset all connections, and new ones at once."""
        self._refusing = True
        self.cut()

    def stall(self) -> None:
        """Hold back all bytes, ends of connections as well; nothing is lost."""
        self._moving.clear()

    def hold(self) -> None:
        """Hold back the bytes of the connections that are open now; new ones are taken, and pass."""
        with self._lock:
            for link in self._links:
                link.moving.clear()

    def go_deaf(self) -> None:
        """Swallow all bytes; connections stay open, new ones are taken."""
        self._deaf = True

    def mend(self) -> None:
        """Pass on again; after deafness, on new connections only."""
        if self._deaf:
            self.cut()
        self._refusing = self._deaf = False
        self._moving.set()
        with self._lock:
            for link in self._links:
                link.moving.set()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self.accepted += 1
            if self._closing or self._refusing:
                reset_socket(client)
                if self._closing:
                    return
                continue
            try:
                server = socket.create_connection((HOST, self._server_port), timeout=10)
            except OSError:
                reset_socket(client)
                continue
            server.settimeout(None)
            _Link(self, client, server).start()

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield what a client says in the pieces that are passed on; a subclass may do something in between."""
        yield data

    def passes(self, data: bytes) -> bytes:
        """Give what is passed on of these bytes, when it is time to."""
        self._moving.wait()
        return b"" if self._deaf and data else data

    def note(self, link: _Link, *, gone: bool) -> None:
        """Keep the list of links."""
        with self._lock:
            (self._links.discard if gone else self._links.add)(link)


class _Link:
    """One client's connection and the one that was made for it to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self.left: int | None = None
        self.moving = threading.Event()
        self.moving.set()

    def start(self) -> None:
        self._proxy.note(self, gone=False)
        pumps: list[tuple[socket.socket, socket.socket, Callable[[bytes], Iterable[bytes]]]] = [
            (self._client, self._server, self._proxy.pieces),
            (self._server, self._client, self._counted),
        ]
        for pump in pumps:
            threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, pieces: Callable[[bytes], Iterable[bytes]]) -> None:
        # The proxy has the last word, also on the end of a connection.
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self.moving.wait()
                for piece in pieces(self._proxy.passes(data)):
                    sink.sendall(piece)
                if self.left == 0:
                    break
        self.moving.wait()
        self._proxy.passes(b"")
        self.reset()

    def _counted(self, data: bytes) -> Iterator[bytes]:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        yield data

    def reset(self) -> None:
        self._proxy.note(self, gone=True)
        self.moving.set()
        for end in (self._client, self._server):
            reset_socket(end)


def reset_socket(end: socket.socket) -> None:
    """Close with a reset instead of a farewell."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        # Wakes up a thread that reads from it.
        end.shutdown(socket.SHUT_RDWR)
    end.close()
