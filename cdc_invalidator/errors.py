"""Every error that an operator can see, in one tree. Errors that are caught near where they arise stand there.

::

    InvalidatorError                exit 1
    ├── WrongSettings               exit 2   settings or rule files are wrong
    │   ├── WrongRules              exit 2   every mistake of the rule files at once
    │   └── PoolerInBetween         exit 2   PostgreSQL's address is that of a connection pooler
    ├── ServerRefuses               exit 3   a server says no for good: privilege, wal_level
    │   └── LoginRefused            exit 3   user or password; tried again once the daemon has led or stood by
    ├── MalformedMessage            exit 1   the bytes are not pgoutput (they are wrong)
    ├── WrongMessage                         a manual bust can't be read: it is reported and skipped
    ├── OutputLost                  exit 1   nobody takes the events
    └── Retryable                            lost for now: throw the session away and build it anew
        ├── PostgresUnavailable
        │   └── CannotSend                   the server fails at what comes next in the stream
        ├── Locked                           a lock was not to be had in time
        ├── PositionGivenUp                  the slot is of no use any more: drop it, and sweep
        │   └── PositionSkipped              only what comes next is: move the slot behind it, and sweep
        ├── SlotInUse                        another daemon leads
        ├── HandedOver                       Redis takes no busts from here, and another daemon could lead
        ├── Untold                           busts went untold: they are received again
        ├── Superseded                       Redis holds a later watermark than ours: another daemon leads
        ├── WatermarkTaken                   another PostgreSQL's daemon writes the watermark
        └── RedisUnavailable

A message is one sentence that names the place, and ends with what the operator should do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

# Of ASCII and Latin-1, but for tab and line feed, and those that turn the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return a text with escapes for control signs: names from a database may have some, and terminals obey them."""
    return _CONTROL.sub(lambda sign: repr(sign[0])[1:-1], text)


def visible_json(text: bytes) -> bytes:
    """Return a JSON text with escapes for control signs beyond ASCII, which JSON may hold as they are."""
    if text.isascii():
        return text
    return _CONTROL.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text.decode()).encode()


class InvalidatorError(Exception):
    """Something that cdc-invalidator cannot work around went wrong; look at the log lines before this one."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(visible(message or type(self).__doc__ or ""))


class WrongSettings(InvalidatorError):
    """A setting is missing or wrong; set it in the environment, as a flag, or in .env."""

    exit_code = 2


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a rule file: where it stands (line and column count from 1) and a sentence with the remedy.

    ``code`` is what pipelines know this kind of mistake by; ``sql``: the statements of the remedy, ``or_sql``: those of
    another one that does as well; empty where SQL does not help.
    """

    file: str
    line: int
    column: int
    sentence: str
    code: str = field(default="wrong_rule_file", compare=False)
    sql: tuple[str, ...] = field(default=(), compare=False)
    or_sql: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.sentence}"


class WrongRules(WrongSettings):
    """The rule files have mistakes; each is listed with its file, line and column."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(map(str, self.problems)))


class PoolerInBetween(WrongSettings):
    """The connection string leads to a connection pooler; name the host and port of PostgreSQL itself."""

    def __init__(self, setting: str, sign: str) -> None:
        super().__init__(
            f"{setting} leads to a connection pooler such as PgBouncer ({sign}), through which nobody can stream, and "
            "whose sessions are the application's; name the host and port of PostgreSQL itself."
        )


class ServerRefuses(InvalidatorError):
    """The server refuses for good; give the privilege or the setting that the message names."""

    exit_code = 3

    def __init__(self, message: str | None = None, *, sql: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        # The statements that the message tells an administrator to run, as far as they are all of its remedy.
        self.sql = sql


class LoginRefused(ServerRefuses):
    """The server does not take the user or the password; put the right ones into the connection string."""


class MalformedMessage(InvalidatorError):
    """The replication stream holds a message that is not pgoutput; report it with the server's version."""


class WrongMessage(InvalidatorError):
    """A manual bust can't be read; write it as the README shows."""


class OutputLost(InvalidatorError):
    """Standard output was closed, and busts must not go untold; start the daemon with its output going somewhere."""


class Retryable(InvalidatorError):
    """Lost for now; the session is thrown away and built anew after a pause."""


class PostgresUnavailable(Retryable):
    """PostgreSQL cannot be reached; check CDC_POSTGRES_DSN and the server."""


class CannotSend(PostgresUnavailable):
    """PostgreSQL fails at a change that comes next in the stream; after some attempts it is skipped."""


class SlotInUse(Retryable):
    """Another daemon streams from the slot; this one stands by and takes over when that ends."""


class Locked(Retryable):
    """Somebody holds a lock for long; it is tried again."""


class PositionGivenUp(Retryable):
    """Redis is away and the slot held more than CDC_MAX_RETAINED_WAL: it is dropped, and the caches swept later."""


class PositionSkipped(PositionGivenUp):
    """What comes next in the stream never gets through: the slot is moved behind it, and the caches are swept."""


class HandedOver(Retryable):
    """Redis takes no busts from here, and another daemon says that it takes its own: the slot is left to that one."""


class Untold(Retryable):
    """Standard output is read again: what was busted meanwhile, and could not be told, is received again, and told."""


class Superseded(Retryable):
    """Redis holds a later watermark of this slot: another daemon leads it, and this session ends."""


class WatermarkTaken(Retryable):
    """Another deployment's daemon writes the watermark; set CDC_WATERMARK to another name for one of the two."""


class RedisUnavailable(Retryable):
    """Redis cannot be reached or cannot take writes; check CDC_REDIS_URL and the server."""

    def __init__(self, message: str | None = None, *, code: str = "ERR", report: bool = False) -> None:
        super().__init__(message)
        # The failure's row in `replies.TABLE`, and whether only an operator can help.
        self.code = code
        self.report = report
