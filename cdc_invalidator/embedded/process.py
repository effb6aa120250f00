"""ChildProcess processes on loopback."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from cdc_invalidator import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HOST: Final = "127.0.0.1"
NOBODY: Final = 65534  # the uid and gid that PostgreSQL runs under when we are root
START_SECONDS: Final = 60.0


# The scratch folder, and who may read it


@functools.cache
def scratch() -> Path:
    """Make this process's scratch folder; it is removed with all it holds when the process ends."""
    parent = Path(tempfile.gettempdir())
    if is_root() and not nobody_can_reach(parent):
        parent = Path("/tmp")  # noqa: S108 - mkdtemp makes the name; root's own TMPDIR is closed to uid 65534
    folder = Path(tempfile.mkdtemp(prefix="cdc-invalidator-", dir=parent))
    folder.chmod(0o711)  # its parts close themselves; uid 65534 has to pass
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a forked copy of us
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def is_root() -> bool:
    """Whether we are root, and so start PostgreSQL as uid 65534."""
    return os.geteuid() == 0


def nobody_can_reach(folder: Path) -> bool:
    """Tell whether uid 65534 can pass through the folder and all above it."""
    folder = folder.resolve()
    for step in (folder, *folder.parents):
        status = step.stat()
        bit = stat.S_IXUSR if status.st_uid == NOBODY else stat.S_IXOTH
        if not status.st_mode & bit:
            return False
    return True


def give_to_nobody(folder: Path) -> None:
    """Give a folder to the user that PostgreSQL runs under."""
    if not is_root():
        return
    os.chown(folder, NOBODY, NOBODY)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), NOBODY, NOBODY, follow_symlinks=False)


def as_nobody() -> dict[str, object]:
    """Give Popen's arguments that make a child run unprivileged; none when we are unprivileged ourselves."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root() else {}


# Ports and processes


def free_port() -> int:
    """Find a TCP port on loopback that nobody listens on now.

    It lies below the ephemeral range: a client that keeps trying a closed ephemeral port can end up connected to
    itself, and then the server that comes back finds its port taken.
    """
    for _ in range(200):
        port = random.randint(15_000, 32_000)  # noqa: S311
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise errors.InvalidatorError("No free TCP port on 127.0.0.1 between 15000 and 32000; end what listens there.")


# Reads a pipe that only we hold: its end means that we are gone, whatever the cause, and the server has to go too.
# CONT, because the server may be paused.
_GUARDIAN: Final = 'cat >/dev/null; kill -"$2" "$1"; kill -CONT "$1"'


def plain_environment() -> dict[str, str]:
    """Return our environment without what steers PostgreSQL's programs and libpq, and in the C locale."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return ours | {"LC_ALL": "C"}


class ChildProcess:
    """One process of ours: its log, its guardian, its family. Its folder is the one where its log lies.

    Args:
        command: The program and its arguments.
        log: Where its output goes; it is appended.
        orphaned: The signal that it gets when we are gone.
        unprivileged: Whether it runs as uid 65534 when we are root.
        environment: Its variables; ours without those that PostgreSQL's programs read, unless given.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        orphaned: Literal["QUIT", "TERM"],
        unprivileged: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        user = as_nobody() if unprivileged else {}
        with log.open("ab") as output:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]  # noqa: S603
                [str(part) for part in command],
                cwd=log.parent,
                env=plain_environment() if environment is None else environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we stop our servers in order
                **user,
            )
        self._guardian = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _GUARDIAN, "guardian", str(self.pid), orphaned],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def said(self) -> str:
        """Return what the process wrote to its log since it was started."""
        with self.log.open("rb") as lines:
            lines.seek(self._log_start)
            return lines.read().decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; does nothing when it has ended."""
        if self.alive:
            self._process.send_signal(number)

    def family(self) -> list[int]:
        """List the pids of the process and its children."""
        return [self.pid, *(pid for pid, parent in _processes() if parent == self.pid)]

    def stop(self, number: signal.Signals, seconds: float) -> int:
        """Ask the process to end; kill it with its children when it has not done so in time.

        Returns:
            Its exit code, negative for a signal.
        """
        self.send(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._dismiss_guardian()
        return self._process.wait()

    def kill(self) -> None:
        """SIGKILL the process and its children; returns when all are gone."""
        self.send(signal.SIGSTOP)  # so that it has no more children while we count them
        family = self.family()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not {pid for pid, _ in _processes()} & set(family[1:]), "the server's children ended")
        self._dismiss_guardian()

    def _dismiss_guardian(self) -> None:
        # Its whole session: the shell and the `cat` that it waits for. It is our child and not yet reaped, so that
        # the number cannot belong to anybody else.
        if self._guardian.poll() is None:
            os.killpg(self._guardian.pid, signal.SIGKILL)
        self._guardian.wait()
        assert self._guardian.stdin
        self._guardian.stdin.close()


def _processes() -> Iterator[tuple[int, int]]:
    """List (pid, parent's pid) of all running processes; those that only wait to be reaped are left out."""
    for pid, state, parent in _linux_processes() if Path("/proc/self/stat").exists() else _other_processes():
        if not state.startswith("Z"):
            yield int(pid), int(parent)


def _linux_processes() -> Iterator[tuple[str, str, str]]:
    """List (pid, state, parent's pid) from proc(5): small images have no ``ps``."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # pid (name) state parent ...; the name may hold anything, but nothing after it holds a parenthesis
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            yield folder.name, state, parent


def _other_processes() -> Iterator[tuple[str, str, str]]:
    command = ["ps", "-A", "-o", "pid=,stat=,ppid="]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():  # noqa: S603
        pid, state, parent = line.split()
        yield pid, state, parent


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Wait until a condition holds.

    Args:
        condition: Asked every 10 ms.
        what: What it means, as the error says it.
        seconds: How long to wait.

    Raises:
        errors.InvalidatorError: It does not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise errors.InvalidatorError(f"Waited {seconds:g} s in vain until {what}; see the server's log.")
        time.sleep(0.01)
