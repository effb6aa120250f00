"""A proxy before a real Redis that knows commands from replies: it refuses single commands, and cuts a reply in half.

Each command that is passed on has one reply, in order. A command that is refused isn't passed on; a PING goes in its
place, and the error in the place of the PONG. So pipelines stay in step, and the server has really not seen it.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Self

from proxy import reset_socket

from cdc_invalidator.embedded.process import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Command = Sequence[bytes]
    Predicate = Callable[[Command], bool]

READONLY = b"-READONLY You can't write against a read only replica.\r\n"
OOM = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"
MASTERDOWN = b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n"
NOREPLICAS = b"-NOREPLICAS Not enough good replicas to write.\r\n"
MISCONF = b"-MISCONF Errors writing to the AOF file: No space left on device\r\n"
NOPERM = b"-NOPERM this user has no permissions to run the command\r\n"
BUSY = b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.\r\n"

NONE = b""
HALF = b"half"

_PING = b"*1\r\n$4\r\nPING\r\n"
_DISCARD = b"*1\r\n$7\r\nDISCARD\r\n"
_EXECABORT = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
_CHUNK = 65536


def named(*names: str) -> Predicate:
    """Tell whether a command has one of these names."""
    wanted = {name.upper().encode() for name in names}
    return lambda command: command[0].upper() in wanted


def anything(command: Command) -> bool:
    """Every command will do."""
    return True


class RespProxy:
    """127.0.0.1:`port`, before the Redis that listens on another port there; use it as a context manager.

    It carries RESP2 and RESP3, but neither MONITOR nor SUBSCRIBE, whose messages answer no command.

    Args:
        server_port: Where Redis listens.
        seed: Of the random positions; print it with a failure.
    """

    def __init__(self, server_port: int, *, seed: int | None = None) -> None:
        self._server_port = server_port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._faults: list[_Fault] = []
        self._silent = self._executing = self._closing = False
        self.port = free_port()
        self.accepted = 0
        self.injected = 0
        self.halved = 0
        self.refused: list[list[bytes]] = []

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def __enter__(self) -> Self:
        self._listener = socket.create_server((HOST, self.port), backlog=50)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        # A thread that waits in accept() hears of it by a connection.
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=5).close()
        self._thread.join()
        self._listener.close()
        self.cut()

    # Faults.

    def fail_next(self, count: int, error: bytes, where: Predicate = anything, *, times: int = 1) -> None:
        """Refuse some of the coming commands, on whichever connection they come; `refused` tells which it were.

        A transaction of which a command was refused is discarded, as Redis does it: its EXEC answers EXECABORT.

        Args:
            count: How many coming commands that match are considered; with 1 it is the very next one.
            error: The reply, such as `READONLY`.
            where: Which commands match, see `named`.
            times: How many of them are refused, at random positions.
        """
        with self._lock:
            chosen = set(self._random.sample(range(count), times))
            self._faults.append(_Fault(error, where, chosen))

    def half(self, n: int = 1, where: Predicate = anything) -> None:
        """Send only the first half of a reply and then cut its connection: the n-th coming command's that matches.

        The command itself is executed.
        """
        with self._lock:
            self._faults.append(_Fault(HALF, where, {n - 1}))

    def silent(self, *, executing: bool = False) -> None:
        """Take connections and commands, and never answer; the server doesn't see the commands unless `executing`."""
        self._silent, self._executing = True, executing

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.reset()

    def mend(self) -> None:
        """Pass on everything again; after silence, on new connections only."""
        with self._lock:
            self._faults.clear()
        if self._silent:
            self._silent = False
            self.cut()

    @property
    def armed(self) -> bool:
        """Whether a fault still waits for its command."""
        return bool(self._faults)

    # What the links ask.

    def fault_of(self, command: list[bytes]) -> bytes:
        """Give the error that answers this command, `HALF`, or `NONE`."""
        if not self._faults:
            return NONE
        with self._lock:
            for fault in self._faults:
                if fault.where(command) and fault.strikes():
                    self._faults = [one for one in self._faults if one.chosen]
                    if fault.error == HALF:
                        self.halved += 1
                    else:
                        self.injected += 1
                        self.refused.append(command)
                    return fault.error
        return NONE

    def passes_commands(self) -> bool:
        return not self._silent or self._executing

    def passes_replies(self) -> bool:
        return not self._silent

    def note(self, link: _Link, *, gone: bool) -> None:
        """Keep the list of links."""
        with self._lock:
            (self._links.discard if gone else self._links.add)(link)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closing:
                client.close()
                return
            self.accepted += 1
            try:
                server = socket.create_connection((HOST, self._server_port), timeout=10)
            except OSError:
                reset_socket(client)
                continue
            for end in (client, server):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Link(self, client, server).start()


class _Fault:
    """An error and the positions, among the commands that match, of those that get it."""

    def __init__(self, error: bytes, where: Predicate, chosen: set[int]) -> None:
        self.error = error
        self.where = where
        self.chosen = chosen
        self._position = 0

    def strikes(self) -> bool:
        position, self._position = self._position, self._position + 1
        strikes = position in self.chosen
        self.chosen.discard(position)
        return strikes


class _Link:
    """One client's connection and the one that was made for it to the server."""

    def __init__(self, proxy: RespProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        # For each command on its way what becomes of its reply: an error in its place, `HALF`, or `NONE`. The
        # commands' thread appends before it sends, so the replies' thread always finds one.
        self._substitutes: deque[bytes] = deque()
        self._in_transaction = self._spoiled = False

    def start(self) -> None:
        self._proxy.note(self, gone=False)
        for pump in (self._pump_commands, self._pump_replies):
            threading.Thread(target=self._until_it_ends, args=[pump], daemon=True).start()

    def _until_it_ends(self, pump: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            pump()
        self.reset()

    def _pump_commands(self) -> None:
        for batch in _Frames(self._client):
            if self._proxy.passes_commands():
                self._server.sendall(b"".join([self._passed(frame) for frame in batch]))

    def _passed(self, frame: bytes) -> bytes:
        """Give what goes to the server in a command's place, and note what its reply becomes."""
        command = _words(frame)
        fault = self._proxy.fault_of(command)
        passed = _PING if fault.startswith(b"-") else frame
        name = command[0].upper()
        if name in (b"MULTI", b"EXEC", b"DISCARD"):
            passed, fault = self._in_order(name, passed, fault)
        elif self._in_transaction and passed is _PING:
            self._spoiled = True
        self._substitutes.append(fault)
        return passed

    def _in_order(self, name: bytes, passed: bytes, fault: bytes) -> tuple[bytes, bytes]:
        """Keep up with the transaction: where a command of it was refused, EXEC would execute the PING."""
        refused = passed is _PING
        if name == b"MULTI":
            self._in_transaction, self._spoiled = not refused, False
        elif name == b"DISCARD":
            self._in_transaction = self._in_transaction and refused
        elif self._in_transaction:
            self._in_transaction = False
            if refused:
                return _DISCARD, b"-EXECABORT Transaction discarded because of: " + fault[1:]
            if self._spoiled:
                return _DISCARD, _EXECABORT
        return passed, fault

    def _pump_replies(self) -> None:
        for batch in _Frames(self._server):
            if not self._proxy.passes_replies():
                continue
            replies: list[bytes] = []
            for frame in batch:
                # RESP3's pushes answer no command.
                fault = NONE if frame.startswith(b">") else self._substitutes.popleft()
                if fault == HALF:
                    self._client.sendall(b"".join([*replies, frame[: len(frame) // 2]]))
                    return
                replies.append(fault or frame)
            self._client.sendall(b"".join(replies))

    def reset(self) -> None:
        self._proxy.note(self, gone=True)
        for end in (self._client, self._server):
            reset_socket(end)


class _Frames:
    """The whole frames that arrive on a socket, in batches: what one read completes."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source

    def __iter__(self) -> Iterator[list[bytes]]:
        buffer = b""
        while data := self._source.recv(_CHUNK):
            buffer += data
            batch: list[bytes] = []
            start = 0
            while (end := _end(buffer, start)) > 0:
                batch.append(buffer[start:end])
                start = end
            buffer = buffer[start:]
            if batch:
                yield batch


def _end(data: bytes, start: int) -> int:
    """Give where the frame that begins here ends; 0 when it isn't complete."""
    wanted = 1
    while wanted:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return 0
        kind, text = data[start : start + 1], data[start + 1 : line_end]
        start = line_end + 2
        wanted -= 1
        if kind in b"$!=":
            # -1 is nil
            start += int(text) + 2 if text != b"-1" else 0
            if start > len(data):
                return 0
        elif kind in b"*~>":
            wanted += max(int(text), 0)
        elif kind in b"%":
            wanted += 2 * int(text)
        elif kind == b"|":
            # Attributes come before the value that they are of.
            wanted += 2 * int(text) + 1
        # Anything else is one line: + - : _ # , (
    return start


def _words(frame: bytes) -> list[bytes]:
    """Give a command's words: an array of bulk strings, or a line."""
    if not frame.startswith(b"*"):
        return frame.split()
    words: list[bytes] = []
    start = frame.index(b"\r\n") + 2
    while start < len(frame):
        line_end = frame.index(b"\r\n", start)
        length = int(frame[start + 1 : line_end])
        words.append(frame[line_end + 2 : line_end + 2 + length])
        start = line_end + 2 + length + 2
    return words
