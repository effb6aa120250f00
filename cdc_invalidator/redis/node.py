"""One connection to one Redis or Valkey server: commands out, every reply looked at, errors of the driver made ours.

A failure goes through `failed`: `code` finds its row in `replies.TABLE`, which decides what happens.

A lost connection stays lost. The driver's pool and its retries are not used, because they would silently put another
server, or an older snapshot, in its place. Of the daemon, only this module uses the driver's connections and errors.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url

from cdc_invalidator import errors
from cdc_invalidator.redis import replies

Command = tuple[Any, ...]

# Commands are sent as soon as they are so many bytes.
SEND_BYTES = 4096

# The word that the driver takes off an error reply, by the class of its exception.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.MovedError, "MOVED"),
    (exceptions.AskError, "ASK"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.ClusterCrossSlotError, "CROSSSLOT"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoScriptError, "NOSCRIPT"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.InvalidResponse, "GARBLED"),
    (exceptions.TimeoutError, "TIMEOUT"),
    (TimeoutError, "TIMEOUT"),
    (exceptions.ConnectionError, "CLOSED"),
    (OSError, "CLOSED"),
    (EOFError, "CLOSED"),
)

_QUOTED = re.compile(r"""(?<![^\s(:,])['"`]""")
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]+)\b")
_NO_RIGHT = re.compile(r"ACL failure in script|The user executing the script can't|discarded because of: NOPERM")


class Node:
    """One connection to one server. Make it, `connect`, then `ask` or `send`; `close` in the end.

    Args:
        url: the driver's: ``redis://``, ``rediss://`` or ``unix://``.
        timeout: seconds until a server that does not answer counts as lost.

    Raises:
        errors.WrongSettings: the URL can't be used.
    """

    def __init__(self, url: str, *, timeout: float = 5.0) -> None:
        self._timeout = timeout
        self._url = url
        try:
            self._connection, self._database = self._made(protocol=2)
        except (ValueError, TypeError, exceptions.RedisError):
            # The driver's message may repeat a part of the password.
            raise errors.WrongSettings(
                "CDC_REDIS_URL can't be read; write redis://user:password@host:port/db, the password percent-encoded, "
                "and behind `?` only options that redis-py knows."
            ) from None
        self._follower: AbstractConnection | None = None
        self._caught_up: deque[asyncio.Future[None]] = deque()
        # Is told of each round trip.
        self.answered: Callable[[Sequence[Command], Sequence[Any]], None] | None = None
        # One round trip at a time, so that each caller gets its own replies.
        self._turn = asyncio.Lock()

    def _made(self, **given: Any) -> tuple[AbstractConnection, int]:
        """Make a connection of the driver, and return it with the number of the database to select."""
        options: dict[str, Any] = {
            # `send` limits the whole round trip; the driver would set and clear its own for each reply.
            "socket_timeout": None,
            "socket_connect_timeout": self._timeout,
        }
        options |= parse_url(self._url) | {"decode_responses": False, **given}
        made: type[AbstractConnection] = options.pop("connection_class", Connection)
        if issubclass(made, SSLConnection):
            # Whether the certificate must name the host depends on the driver's version, unless it is told.
            checked = options.get("ssl_cert_reqs") != "none" and options.get("ssl_check_hostname") is not False
            options["ssl_check_hostname"] = checked
        # By ourselves: the driver would not say which command has failed.
        database = int(options.pop("db", None) or 0)
        return made(**options), database

    async def connect(self) -> None:
        """Open the connection.

        Raises:
            errors.RedisUnavailable: it can't be opened.
        """
        try:
            # With the greeting, for which the driver would wait without end.
            async with asyncio.timeout(self._timeout):
                await self._connection.connect()  # type: ignore[no-untyped-call]  # of redis-py
        except (exceptions.RedisError, OSError) as error:
            await self.close()
            raise failed("the connection", error) from error
        except BaseException:
            await self.close()
            raise
        if self._database:
            await self.ask(("SELECT", self._database))
        # Only for those who look at CLIENT LIST.
        await self.ask_if_granted(("CLIENT SETNAME", "cdc-invalidator"))

    @property
    def host(self) -> str:
        """The host that the URL names; empty for a socket."""
        return str(getattr(self._connection, "host", ""))

    async def ask(self, *commands: Command) -> list[Any]:
        """Send commands in one go and return their replies.

        Raises:
            errors.RedisUnavailable: the connection is lost, or one of the replies is an error.
        """
        answers = await self.send(commands)
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, Exception):
                raise failed(str(command[0]), answer) from answer
        return answers

    async def ask_if_granted(self, *commands: Command) -> list[Any]:
        """As `ask`, for what can be done without: return nothing if the server lacks a command or an ACL refuses it."""
        try:
            return await self.ask(*commands)
        except errors.RedisUnavailable as error:
            if error.code in {"NOPERM", "ERR"}:
                return []
            raise

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """As `ask`, but error replies (exceptions of the driver) are returned in their places; see `code`.

        Raises:
            errors.RedisUnavailable: the connection is lost.
        """
        connection = self._connection
        answers: list[Any] = []
        try:
            async with self._turn, asyncio.timeout(self._timeout):
                if not connection.is_connected:
                    raise exceptions.ConnectionError("the connection has ended")  # noqa: TRY301
                # The driver's own packing runs Python code for each key.
                packed = b""
                for command in commands:
                    packed += hiredis.pack_command((*command[0].split(), *command[1:]))
                    # The server works on the first large ones while the next are packed.
                    if len(packed) > SEND_BYTES:
                        await connection.send_packed_command(packed, check_health=False)
                        packed = b""
                if packed:
                    await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        answers.append(await connection.read_response())
                    except exceptions.ResponseError as error:
                        answers.append(error)
        except (exceptions.RedisError, OSError, asyncio.IncompleteReadError) as error:
            await self.close()
            raise failed("the connection", error) from error
        except BaseException:
            # The next caller must not get the replies of an interrupted round trip.
            await self.close()
            raise
        if self.answered is not None:
            self.answered(commands, answers)
        return answers

    async def follow(self, command: Command, note: Callable[[Sequence[bytes] | None], None]) -> asyncio.Task[None]:
        """Have the server tell which keys are written, on a connection of its own.

        Args:
            command: what makes it tell them.
            note: is called with the keys of each message; with ``None`` for all.

        Returns:
            What goes on until the connection is lost.

        Raises:
            errors.RedisUnavailable: the server refuses.
        """
        connection: Any
        connection, _ = self._made(protocol=3, socket_timeout=None)
        self._follower = connection
        try:
            async with asyncio.timeout(self._timeout):
                await connection.connect()
                connection._parser.set_invalidation_push_handler(_noting(note))  # noqa: SLF001  there is no other way in
                await connection.send_command(*command[0].split(), *command[1:])
                await connection.read_response()
        except (exceptions.RedisError, OSError) as error:
            if code(error) == "ERR":
                sentence = (
                    f"Redis does not tell of writes ({_without_keys('ERR', error)}); CDC_MODE=observe needs CLIENT "
                    "TRACKING and HELLO 3 of Redis 6.2 or later, or Valkey: "
                    f"{replies.TABLE['NO_COMMAND'].remedy}."
                )
                raise errors.RedisUnavailable(sentence, code="NO_COMMAND", report=True) from error
            raise failed(str(command[0]), error) from error
        return asyncio.create_task(self._following(connection), name="follow")

    async def _following(self, connection: Any) -> None:
        try:
            while True:
                if await connection.read_response(push_request=True) == b"PONG":
                    noted = self._caught_up.popleft()
                    if not noted.done():
                        noted.set_result(None)
        except (exceptions.RedisError, OSError) as error:
            lost = failed("the connection", error)
            for noted in self._caught_up:
                if not noted.done():
                    noted.set_exception(lost)
            raise lost from error

    async def catch_up(self) -> None:
        """Wait until all writes are noted that came before the replies to what was asked so far; see `follow`.

        Raises:
            errors.RedisUnavailable: the connection is lost.
        """
        noted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout):
                # The server tells of a write before it answers what it was asked later.
                self._caught_up.append(noted)
                assert self._follower is not None
                await self._follower.send_packed_command(hiredis.pack_command(("PING",)), check_health=False)
                await noted
        except (exceptions.RedisError, OSError) as error:
            raise failed("the connection", error) from error

    async def close(self) -> None:
        """Drop the connection; what was sent and not answered may or may not have been done."""
        try:
            await self._connection.disconnect(nowait=True)
            if self._follower is not None:
                await self._follower.disconnect(nowait=True)
        except (exceptions.RedisError, OSError):
            # It is thrown away in any case; what was in flight is applied again.
            return


def _noting(note: Callable[[Sequence[bytes] | None], None]) -> Callable[[Any], Awaitable[None]]:
    async def take(message: Any) -> None:
        note(message[1])

    return take


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task that asks servers, until it has ended."""
    # Cancel repeatedly: before Python 3.12, asyncio.wait_for swallows a cancellation that comes while it returns.
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


def code(error: BaseException) -> str:
    """Return the key in `replies.TABLE` of a driver's error; ``ERR`` if the table has no row for it."""
    if isinstance(error, exceptions.AuthenticationError):
        return "NOAUTH" if "required" in str(error).lower() else "WRONGPASS"
    for kind, name in _CODES:
        if isinstance(error, kind):
            return name
    text = str(error)
    word = text.split(" ", 1)[0]
    if word in replies.TABLE:
        return word
    if _NO_RIGHT.search(text):
        return "NOPERM"
    # Redis before 7 wraps the error of a command in a script.
    inside = _IN_SCRIPT.search(text)
    return inside[1] if inside and inside[1] in replies.TABLE else "ERR"


class Redirection(NamedTuple):
    """Where a reply of a cluster points: ``MOVED`` for good, or ``ASK`` for this once; the host may be empty."""

    code: str
    host: str
    port: int


def redirection(error: Any) -> Redirection | None:
    """Return where a reply points; ``None`` if nowhere."""
    if not isinstance(error, exceptions.AskError):  # MovedError is one of these
        return None
    return Redirection(code(error), str(error.host or ""), int(error.port))


def failed(what: str, error: BaseException) -> errors.RedisUnavailable:
    """Make our error of the driver's: with the remedy from `replies`, and without keys."""
    name = code(error)
    row = replies.of(name)
    # A redirection that nobody followed is as final as a wrong password.
    report = row.does in {replies.Does.REPORT, replies.Does.LOGIN, replies.Does.REDIRECT, replies.Does.DENY}
    sentence = f"Redis failed at {what} ({_without_keys(name, error)}); {row.remedy}."
    return errors.RedisUnavailable(sentence, code=name, report=report)


def _without_keys(name: str, error: BaseException) -> str:
    text = str(error).removeprefix(name).strip()
    if name != "NOPERM":  # its text names the command to grant, and no key
        # Some replies repeat the arguments (unknown command, script errors), so only the first words are shown.
        text = _QUOTED.split(text, maxsplit=1)[0].strip()
    if isinstance(error, (socket.gaierror, ssl.SSLError)):
        text = error.strerror or text
    return f"{name}: {text[:120].rstrip('.')}" if text else name
