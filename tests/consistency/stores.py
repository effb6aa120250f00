"""The Redis under the check: one server, a service of Sentinels, or a cluster; how it is reached, what befalls it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.sentinel
from clusters import Cluster
from proxy import Proxy
from running import eventually
from sentinels import Sentinels

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from running import RunningDaemon

    Fault = Callable[[], None]

TIMEOUT_SECONDS: Final = 0.25
_OPTIONS: Final[dict[str, Any]] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}


def client(url: str) -> Any:
    """Make a client as an application does, by the URL that the daemon would be given."""
    kind, nodes, service = _parts(url)
    if kind == "redis+sentinel":
        return redis.sentinel.Sentinel(nodes, **_OPTIONS).master_for(service, **_OPTIONS)  # type: ignore[no-untyped-call]
    if kind == "redis+cluster":
        known = [redis.cluster.ClusterNode(host, port) for host, port in nodes]  # type: ignore[no-untyped-call]
        return redis.RedisCluster(startup_nodes=known, **_OPTIONS)
    return redis.Redis.from_url(url, **_OPTIONS)


def async_client(url: str) -> Any:
    """Make one that awaits."""
    kind, nodes, service = _parts(url)
    if kind == "redis+sentinel":
        return redis.asyncio.sentinel.Sentinel(nodes, **_OPTIONS).master_for(service, **_OPTIONS)  # type: ignore[no-untyped-call]
    if kind == "redis+cluster":
        known = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in nodes]
        return redis.asyncio.cluster.RedisCluster(startup_nodes=known, **_OPTIONS)
    return redis.asyncio.Redis.from_url(url, **_OPTIONS)


def _parts(url: str) -> tuple[str, list[tuple[str, int]], str]:
    """Give the scheme, the addresses and the first part of the path."""
    found = urlsplit(url)
    nodes = [node.rpartition(":") for node in found.netloc.split(",")]
    return found.scheme, [(host, int(port)) for host, _, port in nodes], found.path.strip("/").partition("/")[0]


class Store:
    """What all have in common; use it as a context manager.

    ``url``: the application's way to it; ``daemon_url``: the daemon's; ``ways``: the proxies on these ways.
    """

    url = daemon_url = ""
    ways: Sequence[Proxy] = ()

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

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
        raise NotImplementedError

    def directly(self) -> Any:
        """Make a client that no fault befalls on its way; the caller closes it."""
        return client(self.url)

    def faults(self, daemon: RunningDaemon, dice: random.Random) -> list[Fault]:
        """Give what may befall it; each returns when all is well again."""
        raise NotImplementedError


class Single(Store):
    """One server, which is restarted, killed and emptied."""

    def _make(self) -> None:
        self._valkey = self._stack.enter_context(Valkey())
        to_redis, from_daemon = self.ways = [self._stack.enter_context(Proxy(self._valkey.port)) for _ in range(2)]
        self.url, self.daemon_url = (
            self._valkey.url.replace(f":{self._valkey.port}/", f":{way.port}/") for way in (to_redis, from_daemon)
        )

    def directly(self) -> redis.Redis:
        return redis.Redis.from_url(self._valkey.url)

    def faults(self, daemon: RunningDaemon, dice: random.Random) -> list[Fault]:  # noqa: ARG002  failovers use it
        def restart_redis() -> None:
            self._valkey.restart()

        def kill_redis() -> None:
            self._valkey.kill()
            time.sleep(dice.random())
            self._valkey.start()

        def flush_redis() -> None:
            with self.directly() as client:
                client.flushall()

        return [restart_redis, kill_redis, flush_redis]


class Watched(Store):
    """A master with a replica, and Sentinels that promote it.

    Args:
        planned: failovers are asked for, and lose nothing; else the master is killed while its replica lags.
    """

    def __init__(self, *, planned: bool) -> None:
        super().__init__()
        self._planned = planned

    def _make(self) -> None:
        self._sentinels = self._stack.enter_context(Sentinels())
        self.url = self.daemon_url = self._sentinels.url

    def faults(self, daemon: RunningDaemon, dice: random.Random) -> list[Fault]:
        def planned_failover() -> None:
            eventually(self._sentinels.fail_over, "the Sentinels begin a failover")
            self._sentinels.promoted()
            self._sentinels.swap()

        def lost_master() -> None:
            with _dead(daemon, dice):
                self._sentinels.hold_back()
                time.sleep(dice.random())
                self._sentinels.lose_master()
                self._sentinels.promoted()
            self._sentinels.master.start()
            self._sentinels.swap()

        return [planned_failover if self._planned else lost_master]


class Clustered(Store):
    """Three masters with a replica each: masters are killed while their replicas lag, or give way to them."""

    def _make(self) -> None:
        self._cluster = self._stack.enter_context(Cluster())
        self.url = self.daemon_url = self._cluster.url

    def faults(self, daemon: RunningDaemon, dice: random.Random) -> list[Fault]:
        def lost_master() -> None:
            victim = dice.choice(self._cluster.masters())
            heir = self._cluster.replica_of(victim)
            with _dead(daemon, dice):
                heir.pause()
                victim.ask("CLIENT", "KILL", "TYPE", "replica")
                time.sleep(dice.random() / 2)
                victim.kill()
                heir.resume()
                self._cluster.failed_over(victim)
            victim.start()
            self._cluster.settle()

        def planned_failover() -> None:
            victim = dice.choice(self._cluster.masters())
            heir = self._cluster.replica_of(victim)
            heir.ask("CLUSTER", "FAILOVER")
            eventually(lambda: self._cluster.agreed()[heir.id].master, "the replica has taken over")
            self._cluster.settle()

        return [lost_master, planned_failover]


@contextlib.contextmanager
def _dead(daemon: RunningDaemon, dice: random.Random) -> Any:
    """Let the daemon be dead meanwhile, every other time: what Redis loses then, nobody applies again."""
    dead = dice.random() < 0.5
    if dead:
        daemon.kill()
    try:
        yield
    finally:
        if dead:
            daemon.start()
