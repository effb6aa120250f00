"""`healthcheck`: whether the daemon on this machine is live.

It runs as a probe in every Pod, so it imports next to nothing: no HTTP client, and `read` spares it the command line.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from cdc_invalidator import errors

SECONDS = 3.0
DEFAULT_PORT = 9479
_FLAG = "--http-port"


def read(words: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """Return the port that a plain call names; ``None`` for every call that the command line must judge.

    Args:
        words: the command line, without the program.
        environment: the environment variables.
    """
    match [word for each in words for word in each.split("=", 1)]:
        case ["healthcheck"]:
            port = environment.get("CDC_HTTP_PORT") or str(DEFAULT_PORT)
        case ["healthcheck", flag, port] if flag == _FLAG:
            pass
        case _:
            return None
    return int(port) if port.isascii() and port.isdigit() else None


def check(port: int) -> None:
    """Ask the daemon for /livez.

    Raises:
        errors.InvalidatorError: it does not answer, or with another status than 200.
    """
    try:
        status = _status(port)
    except (OSError, OverflowError) as error:
        raise errors.InvalidatorError(
            f"No daemon answers on port {port} ({error}); start it, or set CDC_HTTP_PORT."
        ) from error
    if status != 200:
        raise errors.InvalidatorError(f"/livez on port {port} answers {status}; look at the daemon's log.")


def _status(port: int) -> int:
    with socket.create_connection(("localhost", port), SECONDS) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        line = connection.makefile("rb").readline(1024)
    version, _, rest = line.partition(b" ")
    if not line:
        raise ConnectionResetError("Remote end closed connection without response")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ConnectionError("the answer is not HTTP")
    return int(rest[:3])
