"""What a visitor has written: the reads of a request see it, also those of the visitor's later requests.

A request that has written notes the LSN of its commit. An adapter of a framework puts that into a cookie. A later
request brings it back, and all its reads ask for that LSN at least, as by `Caches.at_least`.

Nothing but an adapter begins a request here; outside of one, reads ask for nothing. No I/O happens here.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_log = logging.getLogger("cdc_invalidator.reader")

COOKIE = "cdc_own_writes"
SECONDS = 600
# No watermark ever comes so far: the reads of this visitor go to the database.
UNKNOWN = 2**64 - 1
# Methods that write nothing, by their definition.
SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class Request:
    """One request.

    ``lsn``: its reads see all commits up to it. ``asks``: whether the LSN of its commit is still to be asked.
    ``changed``: whether the visitor is to be told another LSN.
    """

    def __init__(self, lsn: int, method: str) -> None:
        self.lsn = lsn
        self.asks = method not in SAFE
        self.changed = False

    def wrote(self, lsn: int) -> None:
        """Note that it has committed something, up to an LSN."""
        self.lsn = lsn if self.lsn == UNKNOWN else max(lsn, self.lsn)
        self.changed = True
        self.asks = False

    def ask(self, lsn: Callable[[], int]) -> None:
        """Note what it may have written, by a function that returns the LSN of a commit; never fails."""
        if self.asks:
            try:
                self.wrote(lsn())
            except Exception as error:  # noqa: BLE001  whatever a driver raises, the write may be in
                self._unknown(error)

    async def aask(self, lsn: Callable[[], Awaitable[int]]) -> None:
        """Note the same by a coroutine function."""
        if self.asks:
            try:
                self.wrote(await lsn())
            except Exception as error:  # noqa: BLE001  whatever a driver raises, the write may be in
                self._unknown(error)

    def _unknown(self, error: Exception) -> None:
        _log.warning(
            "the LSN of a request's commit can't be asked for (%s); its visitor's reads go to the database for a while",
            type(error).__name__,
        )
        self.wrote(UNKNOWN)


_current: ContextVar[Request | None] = ContextVar("cdc_invalidator_request", default=None)


def required() -> int:
    """Return the LSN that reads ask for here; 0 for none."""
    request = _current.get()
    return 0 if request is None else request.lsn


def in_request() -> bool:
    """Return whether reads here may ask for an LSN: an adapter has begun a request."""
    return _current.get() is not None


def wrote(lsn: int) -> None:
    """Note that this request has committed something, up to an LSN: its later reads, and its visitor's, see that.

    Needed only for a request that writes though its method does not (a ``GET``), or that reads its own write after the
    commit. After other requests than ``GET``, ``HEAD``, ``OPTIONS`` and ``TRACE`` the adapter notes it. Does nothing
    outside of a request.

    Args:
        lsn: of `commit.commit_lsn`, asked for after the commit.
    """
    request = _current.get()
    if request is not None:
        request.wrote(lsn)


def only_read() -> None:
    """Note that this request writes nothing, although its method may: a search or a query of GraphQL by ``POST``."""
    request = _current.get()
    if request is not None:
        request.asks = False


class Visitors:
    """Begins requests, and writes and reads cookies.

    A cookie is signed, since who could forge a high LSN could let all reads go to the database.

    Args:
        secret: of the application; the same in all its processes.
        seconds: how long a visitor's reads ask for what the visitor has written.
        clock: seconds since 1970.
    """

    def __init__(self, secret: str | bytes, seconds: int = SECONDS, clock: Callable[[], float] = time.time) -> None:
        if not secret:
            raise ValueError("cookies of own writes are signed; give a secret, the same in all processes")
        key = secret if isinstance(secret, bytes) else secret.encode()
        # Not the application's own key, so that no other signature of it can be passed off as ours.
        self._key = hmac.digest(key, b"cdc_invalidator own writes", "sha256")
        self.seconds = seconds
        self._clock = clock

    @contextmanager
    def request(self, method: str, cookie: str | None) -> Iterator[Request]:
        """Begin a request with the cookie that it brought; reads inside ask for the LSN in it."""
        request = Request(self.lsn(cookie), method)
        token = _current.set(request)
        try:
            yield request
        finally:
            _current.reset(token)

    def cookie(self, request: Request) -> str:
        """Return the text of the cookie that the answer to a request sets."""
        signed = f"{request.lsn:x}.{int(self._clock()) + self.seconds:x}"
        return f"{signed}.{self._signature(signed)}"

    def header(self, request: Request, *, secure: bool) -> str:
        """Return the text of the header ``Set-Cookie``; ``secure``: the request came by HTTPS."""
        rest = f"Max-Age={self.seconds}; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
        return f"{COOKIE}={self.cookie(request)}; {rest}"

    def lsn(self, cookie: str | None) -> int:
        """Return the LSN in a cookie; 0 for one that is not ours, or is too old."""
        signed, _, signature = (cookie or "").rpartition(".")
        # As bytes: text that isn't ASCII can't be compared.
        if not hmac.compare_digest(_bytes(signature), _bytes(self._signature(signed))):
            return 0
        lsn, until = (int(part, 16) for part in signed.split("."))
        return lsn if self._clock() < until else 0

    def _signature(self, signed: str) -> str:
        return hmac.digest(self._key, _bytes(signed), "sha256").hex()[:32]


def _bytes(text: str) -> bytes:
    # A server may hand on bytes of a visitor that are no UTF-8, as surrogates.
    return text.encode("utf-8", "surrogatepass")
