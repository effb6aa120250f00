"""Daemons and commands without the second that a new interpreter takes to import everything.

A nursery is one process for each test process. It imports the whole package, and then forks a child for each that is
asked for; the child sets itself up as `python -m cdc_invalidator` would find the world, and runs it. `Forked` is to a
test what `subprocess.Popen` is. Where the start itself is tested, start a new interpreter instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType
    from typing import Self

_MESSAGE = 1 << 18
_STATUS_BYTES = 4


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a fork would see the same Python as a new interpreter with these variables."""
    return hasattr(os, "pidfd_open") and _of_python(env) == _of_python(os.environ)


def _of_python(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("PYTHON")}


# The side of the tests


class Forked:
    """``python -m cdc_invalidator`` with these words, forked from the nursery.

    Args:
        words: The arguments.
        env: All its variables.
        deadlines: Constants of the package's modules that have other values there, by their dotted names below it.
    """

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], deadlines: Mapping[str, float] | None = None
    ) -> None:
        self.args = ["cdc_invalidator", *words]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        (out, its_out), (err, its_err), (self._status, its_status) = (os.pipe() for _ in range(3))
        given = [its_out, its_err, its_status]
        request = {"words": words, "env": dict(env), "cwd": os.getcwd(), "deadlines": dict(deadlines or {})}  # noqa: PTH109
        try:
            self.pid, self._pidfd = _nursery().fork(request, given)
        finally:
            for each in given:
                os.close(each)
        self.stdout: IO[str] = open(out, encoding="utf-8")  # noqa: PTH123, SIM115
        self.stderr: IO[str] = open(err, encoding="utf-8")  # noqa: PTH123, SIM115

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It runs on.
        """
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _ended(self, seconds: float | None) -> int | None:
        with self._lock:
            if self.returncode is None:
                ready = select.poll()
                ready.register(self._status, select.POLLIN | select.POLLHUP)
                if ready.poll(None if seconds is None else seconds * 1000):
                    status = os.read(self._status, _STATUS_BYTES)
                    assert status, "the nursery has ended"
                    self.returncode = os.waitstatus_to_exitcode(int.from_bytes(status, "big"))
                    os.close(self._status)
                    os.close(self._pidfd)
            return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; does nothing when it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.Signals(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Return what it writes until its end."""
        deadline = time.monotonic() + timeout
        texts = ["", ""]

        def read(number: int, file: IO[str]) -> None:
            with file:
                texts[number] = file.read()

        threads = [threading.Thread(target=read, args=each) for each in enumerate((self.stdout, self.stderr))]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 1.0))
        return texts[0], texts[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


class _Nursery:
    """The nursery's process, as its owner sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the tests, which end what they have started.
                start_new_session=True,
            )
        atexit.register(self.close)

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[int, int]:
        """Return the pid of a new child, and a descriptor for it."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
            answer, (pidfd,), _, _ = socket.recv_fds(self._channel, _MESSAGE, 1)
        return int(answer), pidfd

    def close(self) -> None:
        """Let it end; what it still has for children ends as well."""
        self._channel.close()
        self._process.wait()


@functools.cache
def _nursery_of(pid: int) -> _Nursery:
    """Start the nursery of that process: a fork of the tests has another."""
    assert pid == os.getpid()
    return _Nursery()


def _nursery() -> _Nursery:
    return _nursery_of(os.getpid())


# The side of the nursery


class _Children:
    """Forks and reaps.

    Args:
        channel: Where requests come from; its end is ours.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._statuses: dict[int, int] = {}
        # What an interpreter would have found; meanwhile they are for the tests alone.
        self._inherited = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGCHLD)}
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGCHLD, _do_nothing)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def serve(self) -> Callable[[], object] | None:
        """Fork for each request. Returns what a child has to do in the child, and None in the nursery's end."""
        ready = select.poll()
        ready.register(self._channel, select.POLLIN)
        ready.register(self._woken, select.POLLIN)
        while True:
            which = {descriptor for descriptor, _ in ready.poll()}
            if self._woken in which:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 1024)
            self._reap()
            if self._channel.fileno() in which:
                data, descriptors, _, _ = socket.recv_fds(self._channel, _MESSAGE, 3)
                if not data:
                    break
                request = json.loads(data)
                if (pid := os.fork()) == 0:
                    self._become(request, *descriptors[:2])
                    return lambda: _run(request["words"])
                out, err, self._statuses[pid] = descriptors
                os.close(out)
                os.close(err)
                pidfd = os.pidfd_open(pid)
                socket.send_fds(self._channel, [str(pid).encode()], [pidfd])
                os.close(pidfd)
        for pid in self._statuses:
            os.kill(pid, signal.SIGKILL)
        return None

    def _reap(self) -> None:
        while self._statuses:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            descriptor = self._statuses.pop(pid)
            # Nobody may be there who wants to know.
            with contextlib.suppress(BrokenPipeError):
                os.write(descriptor, status.to_bytes(_STATUS_BYTES, "big"))
            os.close(descriptor)

    def _become(self, request: Mapping[str, Any], out: int, err: int) -> None:
        """Be what a new interpreter would be: its output, its signals, its variables, no descriptor of ours."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._inherited.items():
            signal.signal(number, handler)
        os.dup2(out, 1)
        os.dup2(err, 2)
        self._channel.detach()
        os.closerange(3, 1 << 12)
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        os.chdir(request["cwd"])
        for name, seconds in request["deadlines"].items():
            module, _, constant = f"cdc_invalidator.{name}".rpartition(".")
            assert isinstance(getattr(sys.modules[module], constant), (int, float))
            setattr(sys.modules[module], constant, seconds)
        sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Let the wakeup descriptor tell."""


def _run(words: Sequence[str]) -> object:
    import runpy

    sys.argv = ["cdc_invalidator", *words]
    return runpy.run_module("cdc_invalidator", run_name="__main__", alter_sys=True)


def _import_everything() -> None:
    """Import what the package imports sooner or later, and what that does."""
    import importlib
    import pkgutil

    # As the command line does; see there.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    del sys.modules["rich"]
    import encodings.idna

    import cel  # noqa: F401
    import watchfiles  # noqa: F401

    import cdc_invalidator

    for module in pkgutil.walk_packages(cdc_invalidator.__path__, "cdc_invalidator."):
        # The demo imports rich, and the package's main runs; adapters import frameworks, which no command needs.
        if module.name not in {
            "cdc_invalidator.__main__",
            "cdc_invalidator.embedded.demo",
            "cdc_invalidator.pytest_plugin",
            *(f"cdc_invalidator.reader.{framework}" for framework in ("django", "fastapi", "flask")),
        }:
            importlib.import_module(module.name)
    assert encodings.idna


def _main() -> NoReturn:
    import gc

    codes: list[int] = []
    # Registered first and so called last, when nothing remains but to take the interpreter apart.
    atexit.register(_leave, codes)
    children = _Children(socket.socket(fileno=int(sys.argv[1])))
    _import_everything()
    # Pages that the collector does not touch stay shared.
    gc.collect()
    gc.freeze()
    child = children.serve()
    try:
        if child is not None:
            child()
        sys.exit(0)
    except SystemExit as end:
        if isinstance(end.code, int):
            codes.append(end.code)
        raise


def _leave(codes: list[int]) -> None:
    """End at once with the exit code: half of a command's time would be spent on taking apart what it shares."""
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    _main()
