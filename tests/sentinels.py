"""A real master with a replica and three Sentinels, which promote the replica when the master is lost."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from running import eventually

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SERVICE: Final = "cache"
_QUORUM: Final = 2

_SETTINGS: Final[Mapping[str, str]] = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}


class Sentinels:
    """A service named `SERVICE` and the Sentinels that watch it, on 127.0.0.1; use it as a context manager.

    A master that is killed and started again is made the replica of the new one by the Sentinels, some seconds later:
    until then it thinks that it is master.

    For a failover that loses writes, a test goes through these steps, and does in between what it wants to::

        sentinels.hold_back()     # from here on, the replica gets nothing
        ...                       # what is written here is lost
        sentinels.lose_master()   # the master dies, the replica wakes up
        sentinels.promoted()

    Args:
        binary: Another ``valkey-server`` or ``redis-server``.
        settings: More lines of the master's and the replica's configuration.
    """

    def __init__(self, binary: Path | None = None, *, settings: Mapping[str, str] | None = None) -> None:
        self._binary = binary
        self._settings = {**_SETTINGS, **(settings or {})}
        self._stack = ExitStack()
        self._clients: dict[Valkey, redis.Redis] = {}
        self.sentinels: list[Valkey] = []

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        self.master = self._started(Valkey(binary=self._binary, settings=self._settings))
        follow = {**self._settings, "replicaof": f"{HOST} {self.master.port}"}
        self.replica = self._started(Valkey(binary=self._binary, settings=follow))
        # A Sentinel looks for replicas when it starts, and again ten seconds later.
        eventually(lambda: self.ask(self.master, "ROLE")[2], "the replica follows")
        self.catch_up()
        self.sentinels = [self._started(self._sentinel()) for _ in range(3)]
        eventually(lambda: all(map(self._knows_all, self.sentinels)), "the Sentinels know each other")

    def _sentinel(self) -> Valkey:
        lines = [
            f"monitor {SERVICE} {HOST} {self.master.port} {_QUORUM}",
            f"down-after-milliseconds {SERVICE} 500",
            f"failover-timeout {SERVICE} 3000",
        ]
        return Valkey(binary=self._binary, settings={"sentinel": lines}, arguments=["--sentinel"])

    def _started(self, server: Valkey) -> Valkey:
        self._stack.enter_context(server)
        self._stack.callback(server.kill)  # in order, a master would wait for its replica
        client = redis.Redis(host=HOST, port=server.port, protocol=2, retry=Retry(NoBackoff(), 1), socket_timeout=10)
        self._clients[server] = client
        self._stack.callback(client.close)
        return server

    def ask(self, server: Valkey, *words: Any) -> Any:
        """Run a command on one of the five servers."""
        return self._clients[server].execute_command(*words)  # type: ignore[no-untyped-call]

    def _knows_all(self, sentinel: Valkey) -> bool:
        flat: Sequence[bytes] = self.ask(sentinel, "SENTINEL", "MASTER", SERVICE)
        said = dict(zip(flat[::2], flat[1::2], strict=True))
        return (said[b"flags"], said[b"num-slaves"], said[b"num-other-sentinels"]) == (b"master", b"1", b"2")

    # Who is who.

    @property
    def url(self) -> str:
        """The Sentinels, the service's name, and database 0."""
        return f"redis+sentinel://{','.join(f'{HOST}:{one.port}' for one in self.sentinels)}/{SERVICE}/0"

    def current_url(self) -> str:
        """The URL of whom most Sentinels call master now."""
        return f"redis://{HOST}:{self._named()}/0"

    def _named(self) -> int:
        """Give the port of whom most Sentinels call master; 0 when they disagree."""
        running = [sentinel for sentinel in self.sentinels if sentinel.running]
        ports = [int(self.ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for sentinel in running]
        return max((port for port in ports if ports.count(port) >= _QUORUM), default=0)

    def role(self, server: Valkey) -> str:
        """What a server itself thinks it is: ``master`` or ``slave``."""
        answer: Sequence[bytes] = self.ask(server, "ROLE")
        return answer[0].decode()

    def catch_up(self) -> None:
        """Wait until the first replica has all that the first master has had so far."""
        sent = self.ask(self.master, "ROLE")[1]

        def done() -> bool:
            _, _, _, state, received = self.ask(self.replica, "ROLE")
            return bool(state == b"connected" and received >= sent)

        eventually(done, "the replica has caught up")

    # Losing the master.

    def hold_back(self) -> None:
        """Let the replica catch up and freeze it there; it gets nothing of what is written from now on."""
        self.catch_up()
        self.replica.pause()
        # What is sent to a frozen process waits in the kernel, also when the sender dies: it would be read after all.
        self.ask(self.master, "CLIENT", "KILL", "TYPE", "replica")

    def lose_master(self) -> None:
        """Kill the master; a replica that was held back wakes up and finds itself alone."""
        self.master.kill()
        self.replica.resume()

    def fail_over(self) -> bool:
        """Ask for a failover that loses nothing; False if the Sentinels can't begin one now."""
        try:
            return bool(self.ask(self.sentinels[0], "SENTINEL", "FAILOVER", SERVICE))
        except redis.ResponseError:
            return False

    def swap(self) -> None:
        """After a failover: wait until the first master, which runs again, follows; from then on it is the replica."""
        self.master, self.replica = self.replica, self.master
        eventually(lambda: self.role(self.replica) == "slave", "the old master is a replica")
        self.catch_up()

    def promoted(self) -> None:
        """Wait until most Sentinels call the first replica master, and it agrees."""
        eventually(
            lambda: self._named() == self.replica.port and self.role(self.replica) == "master",
            "the replica is promoted",
        )
