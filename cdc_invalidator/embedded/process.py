"""Child processes that never outlive this one, and what they need: folders, ports, an unprivileged user.

All folders are inside one scratch folder, which is removed when this process ends. If this process is killed, a
guardian stops each child and removes that folder, which may lie in memory.

PostgreSQL refuses to run as root, so root starts it as uid 65534, without creating a user.
"""

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
    """Create this process's scratch folder, once; it is removed when the process ends."""
    parent = Path(tempfile.gettempdir())
    if is_root() and not nobody_can_reach(parent):
        parent = Path("/tmp")  # noqa: S108 - mkdtemp makes the name; uid 65534 cannot enter root's own TMPDIR
    folder = Path(tempfile.mkdtemp(prefix="cdc-invalidator-", dir=parent))
    folder.chmod(0o711)  # uid 65534 must pass; the folders inside are private
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked copy of this process
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def is_root() -> bool:
    """Return whether this process runs as root, and so starts PostgreSQL as uid 65534."""
    return os.geteuid() == 0


def nobody_can_reach(folder: Path) -> bool:
    """Return whether uid 65534 can enter the folder and all folders above it."""
    folder = folder.resolve()
    for step in (folder, *folder.parents):
        status = step.stat()
        bit = stat.S_IXUSR if status.st_uid == NOBODY else stat.S_IXOTH
        if not status.st_mode & bit:
            return False
    return True


def give_to_nobody(folder: Path) -> None:
    """When root, make uid 65534 the owner of a folder and of all that is in it."""
    if not is_root():
        return
    os.chown(folder, NOBODY, NOBODY)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), NOBODY, NOBODY, follow_symlinks=False)


def as_nobody() -> dict[str, object]:
    """Return the arguments by which Popen starts a child as uid 65534 when we are root; none otherwise."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root() else {}


# Ports and processes


def free_port() -> int:
    """Return a TCP port on loopback that nobody listens on now.

    It lies below the ephemeral range: a client that keeps trying a closed ephemeral port can connect to itself, and the
    server that restarts then finds its port taken.
    """
    for _ in range(200):
        port = random.randint(15_000, 32_000)  # noqa: S311
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise errors.InvalidatorError("No free TCP port on 127.0.0.1 between 15000 and 32000; end what listens there.")


# Reads a pipe that only this process writes to. When it ends, this process is gone, and the child must go too.
# CONT, because the child may be paused. It is given ten seconds.
_GUARDIAN: Final = """
cat >/dev/null
kill -"$2" "$1"
kill -CONT "$1"
n=0
while [ $n -lt 100 ] && kill -0 "$1"; do sleep 0.1; n=$((n + 1)); done
rm -rf "$3"
"""


def plain_environment() -> dict[str, str]:
    """Return our environment in the C locale, without the variables that PostgreSQL's programs and libpq read."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return ours | {"LC_ALL": "C"}


class ChildProcess:
    """A child process with a log and a guardian. It runs in the folder of its log.

    Args:
        command: The program and its arguments.
        log: The file to which its output is appended.
        orphaned: The signal that it gets when this process is gone.
        unprivileged: Whether it runs as uid 65534 when we are root.
        environment: Its environment variables; `plain_environment` by default.
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
                start_new_session=True,  # Ctrl-C in the terminal must not reach it: we stop it in order
                **user,
            )
        self._guardian = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", _GUARDIAN, "guardian", str(self.pid), orphaned, str(scratch())],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def said(self) -> str:
        """Return what it has written to its log since it started."""
        with self.log.open("rb") as lines:
            lines.seek(self._log_start)
            return lines.read().decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.alive:
            self._process.send_signal(number)

    def family(self) -> list[int]:
        """Return the pids of the process and of its children."""
        return [self.pid, *(pid for pid, parent in _processes() if parent == self.pid)]

    def stop(self, number: signal.Signals, seconds: float) -> int:
        """Send a signal and wait for the end; after so many seconds, kill the process and its children.

        Returns:
            Its exit code; minus the signal's number when a signal ended it.
        """
        self.send(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._dismiss_guardian()
        return self._process.wait()

    def kill(self) -> None:
        """SIGKILL the process and its children, and wait until all are gone."""
        self.send(signal.SIGSTOP)  # so that it starts no child while we list them
        family = self.family()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not {pid for pid, _ in _processes()} & set(family[1:]), "the server's children ended")
        self._dismiss_guardian()

    def _dismiss_guardian(self) -> None:
        # Its whole session: the shell, and the `cat` that it waits for. Until we reap it, its number cannot belong to
        # another process.
        if self._guardian.poll() is None:
            os.killpg(self._guardian.pid, signal.SIGKILL)
        self._guardian.wait()
        assert self._guardian.stdin
        self._guardian.stdin.close()


def _processes() -> Iterator[tuple[int, int]]:
    """Return (pid, parent's pid) of all running processes, without zombies."""
    for pid, state, parent in _linux_processes() if Path("/proc/self/stat").exists() else _other_processes():
        if not state.startswith("Z"):
            yield int(pid), int(parent)


def _linux_processes() -> Iterator[tuple[str, str, str]]:
    """Return (pid, state, parent's pid) from proc(5), since small images have no ``ps``."""
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
    """Wait until a condition is true.

    Args:
        condition: Called every 10 ms.
        what: The condition in words, for the error.
        seconds: How long to wait.

    Raises:
        errors.InvalidatorError: It is not true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise errors.InvalidatorError(f"Waited {seconds:g} s in vain until {what}; see the server's log.")
        time.sleep(0.01)
