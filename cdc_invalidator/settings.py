"""The settings: their names, types, defaults and help, and where their values come from.

Flags and validation are both made from the classes below. They are plain, so that ``--help`` needs no pydantic.
Precedence: flag, environment variable ``CDC_…``, ``.env``, file in the directory ``CDC_SECRETS_DIR``, default.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NewType, TypeVar, get_args, get_type_hints

from cdc_invalidator import errors

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from pydantic_settings import BaseSettings

PREFIX = "CDC_"
# Old names of settings, which are still accepted in this release, and the names that replace them.
RENAMED: Mapping[str, str] = {"postgres_replicas": "postgres_standbys", "replica_limit": "standby_limit"}


class Secret:
    """A text that is never shown; call it to read it.

    If the setting is a file in ``CDC_SECRETS_DIR``, each call reads the file again, so that whoever opens a connection
    has the password or the token of now. False if it is empty.
    """

    def __init__(self, text: str, *, name: str = "", file: Path | None = None) -> None:
        self._text = text
        self._name = name
        self._file = file

    def __bool__(self) -> bool:
        return bool(self._text)

    def __call__(self) -> str:
        """Return the text.

        Raises:
            errors.WrongSettings: its file is gone, empty, or can't be read.
        """
        if self._file is None:
            return self._text
        try:
            text = _read(self._file)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise errors.WrongSettings(f"{self._name} can't be read from {self._file} ({why}); put it there.") from None
        if not text:
            raise errors.WrongSettings(f"{self._name} is empty in {self._file}; put it there.")
        return text


Size = NewType("Size", int)
"""Bytes; read from texts such as ``1GiB``."""


def _setting(help_text: str, default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """Declare a setting.

    Args:
        help_text: its help.
        default: its default; without one, the setting is required.
        constraints: what pydantic's ``Field`` takes, such as ``ge``.
    """
    return dataclasses.field(default=default, repr=False, metadata={"description": help_text, **constraints})


_DSN = "Connection string of the database. The role needs REPLICATION; several hosts are allowed."
_RULES = "A rule file, or a directory of rule files."
_EVENT_STREAM = "Redis stream that also receives the events, such as cdc:cdc_invalidator:events. Empty: no stream."


@dataclass(frozen=True, kw_only=True)
class Database:
    """Settings of every command that talks to PostgreSQL; ``slot`` is ``CDC_SLOT`` and ``--slot``, and so on."""

    postgres_dsn: Secret = _setting(_DSN)
    slot: str = _setting("Name of the replication slot.", "cdc_invalidator", pattern=r"^[a-z0-9_]{1,63}$")
    publication: str = _setting("Name of the publication.", "cdc_invalidator", min_length=1, max_length=63)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Settings of a command that needs no server."""

    rules: Path = _setting(_RULES)


@dataclass(frozen=True, kw_only=True)
class Explain(Rules):
    """Settings of `explain`; every server is optional, and adds to the answer."""

    postgres_dsn: Secret | None = _setting(
        "Connection string of the database, to read its tables and ask queries. Optional.", None
    )
    redis_url: Secret | None = _setting("URL of the cache's Redis, to read the event stream. Optional.", None)
    event_stream: str = _setting(_EVENT_STREAM, "", pattern=r"^\S*$")
    log_hash_key: Secret | None = _setting("Secret that key hashes in events are made with. Optional.", None)


@dataclass(frozen=True, kw_only=True)
class Handles(Rules):
    """Settings of `handles`; the database is optional."""

    postgres_dsn: Secret | None = _setting(
        "Connection string of the database, to read the types of parameters. Optional.", None
    )


@dataclass(frozen=True, kw_only=True)
class Init:
    """Settings of `init`; without ``redis_url`` it needs a file of keys."""

    postgres_dsn: Secret = _setting("Connection string of the database. The role needs to read the tables.")
    redis_url: Secret | None = _setting("URL of the cache's Redis. The user needs SCAN, TYPE and PTTL.", None)
    publication: str = _setting(
        "Name of the publication that the daemon will have.", "cdc_invalidator", min_length=1, max_length=63
    )
    event_stream: str = _setting(_EVENT_STREAM, "", pattern=r"^\S*$")


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Settings of `tail`."""

    redis_url: Secret = _setting("URL of the cache's Redis, as the daemon has it.")
    event_stream: str = _setting(_EVENT_STREAM, "", pattern=r"^\S*$")


@dataclass(frozen=True, kw_only=True)
class CheckOffline(Rules):
    """Settings of `check --offline`; ``redis_url`` only says which kind of Redis there is."""

    redis_url: Secret | None = _setting("URL of the cache's Redis. Optional.", None)
    event_stream: str = _setting(_EVENT_STREAM, "", pattern=r"^\S*$")


@dataclass(frozen=True, kw_only=True)
class Stream(Database):
    """Settings of a command that needs the stream and the rules."""

    rules: Path = _setting(_RULES)


@dataclass(frozen=True, kw_only=True)
class Settings(Stream):
    """Every setting of the daemon."""

    redis_url: Secret = _setting(
        "URL of the cache's Redis: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://."
    )
    postgres_readers: Secret = _setting(
        "Connection string of the server that readers load from, which says what they see. Needed if "
        "CDC_POSTGRES_DSN names a standby; empty: the same server.",
        Secret(""),
    )
    watermark: str = _setting(
        "Name of the watermark, the key cdc:NAME:watermark in Redis. Empty: the slot's name. Deployments that share a "
        "Redis need different ones.",
        "",
        pattern=r"^[A-Za-z0-9_.-]{0,63}$",
    )
    postgres_standbys: Secret = _setting(
        "Connection strings of the standbys that readers use, separated by spaces. Busts wait for them.", Secret("")
    )
    standby_limit: float = _setting(
        "How many seconds busts wait for a standby before they stop waiting for it.", 60.0, gt=0
    )
    postgres_replicas: Secret | None = _setting("Old name of postgres_standbys.", None)
    replica_limit: float | None = _setting("Old name of standby_limit.", None, gt=0)
    event_stream: str = _setting(_EVENT_STREAM, "", pattern=r"^\S*$")
    event_stream_length: int = _setting(
        "Approximate number of events that the event stream keeps, at about 400 bytes each.", 10_000, ge=1
    )
    sweep_rate: int = _setting(
        "Most keys per second that sweeps and searches scan; 0: as many as the server can deliver.", 0, ge=0
    )
    http_host: str = _setting("Address to serve /metrics, /livez, /readyz, /status and the page on.", "0.0.0.0")  # noqa: S104  a Pod's probes come from outside
    http_port: int = _setting("Port to serve these pages on; 0 takes a free one.", 9479, ge=0, le=65535)
    page: bool = _setting("Serve a page for people at /: what is wrong, and what the caches do.", True)
    log_format: Literal["json", "console"] = _setting("Log format: one JSON object per line, or text.", "json")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "Lowest level to log. Bust events are info; warning silences them.", "info"
    )
    log_keys: Literal["prefix", "hash", "raw"] = _setting(
        "How bust events show keys: their prefix only, also a hash of each key, or the keys themselves.", "hash"
    )
    log_hash_key: Secret | None = _setting(
        "Secret that key hashes are made with. Without it, each start of the daemon makes its own.", None
    )
    log_busts: float = _setting(
        "Share of the transactions, from 0 to 1, whose busts are logged; 0: of none. The event stream gets all, and so "
        "do the metrics; everything else is logged whatever the share.",
        1.0,
        ge=0,
        le=1,
    )
    max_retained_wal: Size = _setting(
        "WAL that the slot may retain while Redis is away, such as 500MB or 1GiB; with more, the slot is dropped and "
        "the caches are swept later.",
        Size(1 << 30),
    )
    handover_seconds: float = _setting(
        "For how many seconds a leader may get no bust through to Redis before it leaves the slot to a daemon that "
        "stands by and could. /readyz and last_error say so after the same time.",
        5.0,
        ge=3,
    )
    on_gap: Literal["sweep", "warn"] = _setting(
        "What to do when changes may have been missed: sweep the caches, or only warn.", "sweep"
    )
    old_locks: bool = _setting(
        "Also delete the locks of readers of release 0.1.0, K:lock; false once there are none.", True
    )
    mode: Literal["bust", "observe"] = _setting(
        "Bust what commits make stale, or only observe what the busts would mend.", "bust"
    )
    verify_sample: float = _setting(
        "Share of the deleted keys, from 0 to 1, of which it is looked at what comes back; 0: of none.",
        0.01,
        ge=0,
        le=1,
    )
    observe_grace: float = _setting("After how many seconds a sampled key is looked at again.", 5.0, gt=0, le=3600)

    @property
    def watermark_name(self) -> str:
        """The watermark's name, given or not."""
        return self.watermark or self.slot


# What stands for passwords in the files of deploy/.
PLACEHOLDER = "change-me"
# What Kubernetes sets CDC_HTTP_PORT to if there is a Service cdc-http in the namespace.
_SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+")
Kind = TypeVar("Kind")


class Setting(NamedTuple):
    """A setting as flags, pages and manifests see it.

    ``type``: ``str``, ``int``, ``float``, ``Path``, `Secret`, `Size` or a ``Literal``, without the ``None`` of an
    optional one; ``default``: ``None`` where there is none.
    """

    help: str
    type: Any
    required: bool
    default: Any

    @property
    def variants(self) -> tuple[str, ...]:
        """The values of a ``Literal``; empty for other types."""
        return get_args(self.type)

    @property
    def shown_default(self) -> str:
        """The default as one would write it; empty where there is none."""
        if self.default is None or isinstance(self.default, Secret):
            return ""
        if self.type is Size:
            return f"{self.default >> 30}GiB"
        if self.type is bool:
            return str(self.default).lower()
        return f"{self.default:g}" if self.type is float else str(self.default)


def fields(kind: type[Any]) -> Mapping[str, Setting]:
    """Return the settings of a kind, by name."""
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING
        some = [each for each in get_args(hints[field.name]) if each is not type(None)]
        optional = type(None) in get_args(hints[field.name])
        found[field.name] = Setting(
            field.metadata["description"],
            some[0] if optional else hints[field.name],
            required,
            None if required else field.default,
        )
    return found


def load(kind: type[Kind], flags: Mapping[str, str | None]) -> Kind:
    """Read the settings.

    Args:
        kind: which of them.
        flags: what the command line was given, by setting; ``None`` means not given.

    Raises:
        errors.WrongSettings: naming each setting that is missing or wrong, without its value.
    """
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        found = _model(kind)(_secrets_dir=os.environ.get("CDC_SECRETS_DIR"), **given)
    except SettingsError as error:
        raise errors.WrongSettings(f"The settings can't be read ({error}); check CDC_SECRETS_DIR.") from None
    except ValidationError as error:
        raise errors.WrongSettings("\n".join(map(_sentence, error.errors()))) from None
    texts = {name: getattr(found, name) for name in found.model_fields_set}
    # Under its old name, if only that is given.
    names = {new: old for old, new in RENAMED.items() if old in texts and new not in texts}
    values = _under_new_names(texts)
    for name, setting in fields(kind).items():
        if setting.type is Secret and name in values:
            if PLACEHOLDER in values[name]:
                raise errors.WrongSettings(
                    f"{variable(name)} has the password of the example, which everybody knows; put in your own."
                )
            values[name] = _secret(names.get(name, name), values[name], given)
    return kind(**values)


def _secret(name: str, text: str, flags: Mapping[str, Any]) -> Secret:
    """Return a secret with this text, which is read again if it is from a file."""
    folder = os.environ.get("CDC_SECRETS_DIR")
    if not folder or name in flags or any(each.upper() == variable(name) for each in os.environ):
        return Secret(text)
    files = (path for path in Path(folder).iterdir() if path.name.upper() == variable(name))
    # Otherwise it is from .env.
    file = next((path for path in files if _read(path) == text), None)
    return Secret(text, name=variable(name), file=file)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()


def _model(kind: type[Any]) -> type[BaseSettings]:
    """Return what reads and validates settings of a kind."""
    from pydantic import ByteSize, Field, create_model
    from pydantic_settings import BaseSettings, SettingsConfigDict

    class Base(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore")

    read_as: dict[Any, Any] = {Size: ByteSize, Secret: str, Secret | None: str | None}
    hints = {name: read_as.get(hint, hint) for name, hint in get_type_hints(kind).items()}
    definitions: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        default = ... if field.default is dataclasses.MISSING else field.default
        default = default() if isinstance(default, Secret) else default
        definitions[field.name] = (hints[field.name], Field(default, **field.metadata))
    return create_model(kind.__name__, __base__=Base, **definitions)


def renamed(given: Settings) -> list[str]:
    """Return a sentence for each setting that was given under its old name."""
    return [
        f"{variable(old)} (or {flag(old)}) is an old name, which the next release does not know; use "
        f"{variable(new)} or {flag(new)}."
        for old, new in RENAMED.items()
        if getattr(given, old) is not None
    ]


def _under_new_names(given: dict[str, Any]) -> dict[str, Any]:
    """Copy what was given under old names to the settings that replace them.

    Raises:
        errors.WrongSettings: both names were given, with different values.
    """
    for old, new in RENAMED.items():
        if old in given and given.setdefault(new, given[old]) != given[old]:
            raise errors.WrongSettings(
                f"{variable(old)} is the old name of {variable(new)}, and the two differ; remove "
                f"{variable(old)} (or {flag(old)})."
            )
    return given


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def _sentence(item: ErrorDetails) -> str:
    name = str(item["loc"][0])
    if item["type"] == "missing":
        return f"{variable(name)} is not set; set it in the environment or give {flag(name)}."
    # Of nothing else is the value shown.
    if name == "http_port" and _SERVICE_LINK.fullmatch(str(item["input"])):
        return (
            f"{variable(name)} is {item['input']}, which Kubernetes sets in each Pod for a Service that is called "
            f"cdc-http; set {variable(name)} to a port in the container, or enableServiceLinks: false in the Pod."
        )
    wrong = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{variable(name)} is wrong: {wrong}; set it in the environment or give {flag(name)}."
