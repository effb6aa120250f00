"""The settings, where they come from, and nothing else. Only the command line reads them.

Precedence: flag, environment variable ``CDC_…``, ``.env``, file in the directory ``CDC_SECRETS_DIR``, default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ByteSize, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from cdc_invalidator import errors

PREFIX = "CDC_"
# Old names of settings, which are still accepted in this release, and the names that replace them.
RENAMED: Mapping[str, str] = {"postgres_replicas": "postgres_standbys", "replica_limit": "standby_limit"}


EventStreamKey = Annotated[
    str,
    Field(
        pattern=r"^\S*$",
        description="Redis stream that gets the events as well, such as cdc:cdc_invalidator:events; none by default.",
    ),
]


class Database(BaseSettings):
    """What every command that talks to PostgreSQL reads; ``slot`` is ``CDC_SLOT`` and ``--slot``, and so on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True)

    postgres_dsn: SecretStr = Field(
        description="Connection string of the database; the role needs REPLICATION. Several hosts are allowed."
    )
    slot: str = Field(
        default="cdc_invalidator", pattern=r"^[a-z0-9_]{1,63}$", description="Name of the replication slot."
    )
    publication: str = Field(
        default="cdc_invalidator", min_length=1, max_length=63, description="Name of the publication."
    )


class Rules(BaseSettings):
    """What a command reads that needs no server."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True)

    rules: Path = Field(description="A rule file, or a directory of rule files.")


class Offline(Rules):
    """What a command reads that can do without a server, and tells more with one."""

    postgres_dsn: SecretStr | None = Field(
        default=None, description="Connection string of the database, to read its tables and ask queries; optional."
    )


class Explain(Offline):
    """What `explain` reads: of a key, the last busts are told where there is an event stream."""

    redis_url: SecretStr | None = Field(default=None, description="Where the cache lives; optional.")
    event_stream: EventStreamKey = ""
    log_hash_key: SecretStr | None = Field(default=None, description="Secret of the keyed hashes in events; optional.")


class Tail(BaseSettings):
    """What `tail` reads."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True)

    redis_url: SecretStr = Field(description="Where the cache lives, as the daemon has it.")
    event_stream: EventStreamKey = ""


class CheckOffline(Rules):
    """What `check --offline` reads; ``redis_url`` only tells which kind of Redis there is."""

    redis_url: SecretStr | None = Field(default=None, description="Where the cache lives; optional.")
    event_stream: EventStreamKey = ""


class Stream(Database):
    """What setting the stream up reads, besides."""

    rules: Path = Field(description="A rule file, or a directory of rule files.")


class Settings(Stream):
    """Every setting of the daemon."""

    redis_url: SecretStr = Field(
        description="Where the cache lives: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://."
    )
    postgres_standbys: SecretStr = Field(
        default=SecretStr(""),
        description="Connection strings of the standbys that readers use, with spaces between: busts wait for them.",
    )
    standby_limit: float = Field(
        default=60.0, gt=0, description="Seconds that busts wait for a standby before it is dropped from the wait."
    )
    postgres_replicas: SecretStr | None = Field(default=None, description="Old name of postgres_standbys.")
    replica_limit: float | None = Field(default=None, gt=0, description="Old name of standby_limit.")
    event_stream: EventStreamKey = ""
    event_stream_length: int = Field(
        default=10_000, ge=1, description="About how many events the event stream keeps; some 400 bytes each."
    )
    sweep_rate: int = Field(
        default=0, ge=0, description="Keys a second that sweeps look at; 0 for as many as the server gives."
    )
    http_host: str = Field(default="0.0.0.0", description="Address of /metrics, /livez, /readyz and /status.")  # noqa: S104  a Pod's probes come from outside
    http_port: int = Field(default=9479, ge=0, le=65535, description="Port of these pages; 0 takes a free one.")
    log_format: Literal["json", "console"] = Field(default="json", description="One JSON object a line, or text.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Bust events are info; warning silences them."
    )
    log_keys: Literal["prefix", "hash", "raw"] = Field(
        default="hash",
        description="What a bust event shows of its keys: their prefix, also a hash of each, or the keys themselves.",
    )
    log_hash_key: SecretStr | None = Field(
        default=None,
        description="Secret of the keyed hashes. Without it, each start of the daemon makes its own.",
    )
    max_retained_wal: ByteSize = Field(
        default=ByteSize(1 << 30),
        description="WAL that the slot may hold while Redis is away; beyond, the caches are swept instead.",
    )
    on_gap: Literal["sweep", "warn"] = Field(
        default="sweep", description="What to do when changes may have been missed: empty the caches, or only say so."
    )


Kind = TypeVar("Kind", bound=BaseSettings)


def load(kind: type[Kind], flags: Mapping[str, str | None]) -> Kind:
    """Read the settings.

    Args:
        kind: which of them.
        flags: what the command line was given, by field name; ``None`` means not given.

    Raises:
        errors.WrongSettings: naming each setting that is missing or wrong, without its value.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        return _under_new_names(kind(_secrets_dir=os.environ.get("CDC_SECRETS_DIR"), **given))
    except SettingsError as error:
        raise errors.WrongSettings(f"The settings can't be read ({error}); check CDC_SECRETS_DIR.") from None
    except ValidationError as error:
        raise errors.WrongSettings("\n".join(map(_sentence, error.errors(include_input=False)))) from None


def renamed(given: BaseSettings) -> list[str]:
    """Return a sentence for each setting that was given under its old name."""
    return [
        f"{_variable(old)} (or {_flag(old)}) is an old name, which the next release does not know; use "
        f"{_variable(new)} or {_flag(new)}."
        for old, new in RENAMED.items()
        if old in given.model_fields_set
    ]


def _under_new_names(given: Kind) -> Kind:
    """Copy what was given under old names to the settings that replace them.

    Raises:
        errors.WrongSettings: both names were given, with different values.
    """
    for old, new in RENAMED.items():
        if old in given.model_fields_set:
            value = getattr(given, old)
            if new in given.model_fields_set and getattr(given, new) != value:
                raise errors.WrongSettings(
                    f"{_variable(old)} is the old name of {_variable(new)}, and the two differ; remove "
                    f"{_variable(old)} (or {_flag(old)})."
                )
            given = given.model_copy(update={new: value})
    return given


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _sentence(item: ErrorDetails) -> str:
    name = str(item["loc"][0])
    variable, flag = _variable(name), _flag(name)
    if item["type"] == "missing":
        return f"{variable} is not set; set it in the environment or give {flag}."
    return f"{variable} is wrong: {item['msg'][0].lower()}{item['msg'][1:]}; set it in the environment or give {flag}."
