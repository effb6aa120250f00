"""Recognises the client that a program passes, and says how connections like the client's are made. Does no I/O.

The library opens its own connections. They have the address, the login, the TLS and the number of the client's, but
none of its retries, which pause, and bounded time-outs where the program chose none. So a server that is gone costs a
read little whatever the client would do; and connections belong to an event loop even if the client is of a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from cdc_invalidator.reader.steps import word

Address = tuple[str, int]

# Time-outs in seconds where a client has its driver's defaults, which are none, or many.
SECONDS = 0.5
# What a driver calls its clients, and where.
_NAMES = {"redis": ("Redis", "RedisCluster"), "valkey": ("Valkey", "ValkeyCluster")}
# Options of a client's connections that are not for ours.
_NOT_OURS = (
    "retry",
    "retry_on_timeout",
    "retry_on_error",
    "cache",
    "cache_config",
    "connection_pool",
    "event_dispatcher",
)
_NOT_OURS_BEGIN = ("maint", "oss_cluster_maint", "orig_")


class Driver(NamedTuple):
    """redis-py or valkey-py.

    ``client``, ``cluster``, ``pipelines``: its classes. ``connection``: its class of a connection by TCP.
    """

    package: str
    awaits: bool
    client: type[Any]
    cluster: type[Any]
    pipelines: tuple[type[Any], ...]
    connection: type[Any]
    errors: Any
    retry: Any

    @property
    def name(self) -> str:
        """What its users call a client."""
        return f"{self.package}{'.asyncio' if self.awaits else ''}.{self.client.__name__}"


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a connection to one server is made.

    ``seconds``: how long an answer may take; ``connect_seconds``: a connection. ``most``: how many connections.
    """

    driver: Driver
    make: Callable[..., Any]
    options: Mapping[str, Any]
    seconds: float
    connect_seconds: float
    most: int

    def connection(self, **options: Any) -> Any:
        """Make a connection, which is not open yet."""
        return self.make(**{**self.options, **options})

    def at(self, host: str, port: int) -> Recipe:
        """Return how one to another server is made."""
        options = {**self.options, "host": host, "port": port}
        return Recipe(self.driver, self.make, options, self.seconds, self.connect_seconds, self.most)

    def __str__(self) -> str:
        options = self.options
        return str(options["path"]) if "path" in options else f"{options.get('host')}:{options.get('port')}"


@dataclass(frozen=True, eq=False)
class Target:
    """What a client is of: one server, whose recipe this is; or more.

    ``sentinels``: those that name the master of a ``service``; a Sentinel that sees fewer than ``peers`` others does
    not count; ``force_ip``: what to take for the address they name. ``starts``: nodes that know a cluster, whose
    addresses are mapped by ``remap``.
    """

    recipe: Recipe
    sentinels: tuple[Recipe, ...] = ()
    service: str = ""
    peers: int = 0
    force_ip: str | None = None
    starts: tuple[Address, ...] = ()
    remap: Callable[[Address], Address] = field(default=lambda address: address)

    @property
    def cluster(self) -> bool:
        """Whether it is a cluster."""
        return bool(self.starts)


def recognise(client: Any, *, awaits: bool) -> Target:
    """Return what a client is of.

    Args:
        client: the client.
        awaits: whether it must be one that is awaited.

    Raises:
        TypeError: it can't be read through; the message is a sentence with the remedy.
    """
    driver = _driver(client, awaits)
    if isinstance(client, driver.cluster):
        return _cluster(driver, client)
    pool = client.connection_pool
    recipe = _recipe(driver, pool.connection_class, pool.connection_kwargs, pool.max_connections)
    manager = getattr(pool, "sentinel_manager", None)
    if manager is None:
        return Target(recipe)
    if not pool.is_master:
        raise TypeError("a reader takes leases, which a replica refuses; pass master_for(…) of the Sentinel")
    recipe = _of_sentinel(recipe)
    pools = [sentinel.connection_pool for sentinel in manager.sentinels]
    return Target(
        recipe,
        tuple(_recipe(driver, each.connection_class, each.connection_kwargs, 2) for each in pools),
        pool.service_name,
        manager.min_other_sentinels,
        getattr(manager, "_force_master_ip", None),
    )


def _driver(client: Any, awaits: bool) -> Driver:
    """Return the driver whose client this is.

    Raises:
        TypeError: it is none that can be read through.
    """
    packages = {each.__module__.partition(".")[0] for each in type(client).__mro__}
    for package in packages & _NAMES.keys():
        for driver in (_load(package, awaits=awaits), _load(package, awaits=not awaits)):
            if isinstance(client, driver.pipelines):
                raise TypeError("this is a pipeline, whose commands wait to be sent together; pass its client")
            if not isinstance(client, (driver.client, driver.cluster)):
                continue
            if driver.awaits is not awaits:
                kind, other = ("Caches", "AsyncCaches") if driver.awaits else ("AsyncCaches", "Caches")
                raise TypeError(
                    f"{kind} can't use a {driver.name}; take {other}, or a {_load(package, awaits=awaits).name}"
                )
            return driver
    ours = _load("redis", awaits=awaits).name
    found = type(client)
    hint = f"make one by {ours}.from_url(…)" if isinstance(client, str) else "pass one of redis-py or valkey-py"
    if found.__name__ == "Sentinel":
        hint = "pass master_for(…) of it"
    raise TypeError(
        f"a {found.__module__}.{found.__qualname__} is no client such as {ours}; {hint}".replace("a builtins.", "a ")
    )


def _load(package: str, *, awaits: bool) -> Driver:
    """Return a driver; it is imported, as its client is there."""
    one, many = _NAMES[package]
    folder = f"{package}.asyncio" if awaits else package
    client, cluster = import_module(f"{folder}.client"), import_module(f"{folder}.cluster")
    connection = import_module(f"{folder}.connection")
    backoff, retry = import_module(f"{package}.backoff"), import_module(f"{folder}.retry")
    return Driver(
        package,
        awaits,
        getattr(client, one),
        getattr(cluster, many),
        (client.Pipeline, cluster.ClusterPipeline),
        connection.Connection,
        import_module(f"{package}.exceptions"),
        retry.Retry(backoff.NoBackoff(), 0),
    )


def _cluster(driver: Driver, client: Any) -> Target:
    manager = client.nodes_manager
    options = dict(manager.connection_kwargs)
    make, most = options.pop("connection_class", driver.connection), options.pop("max_connections", None)
    if not driver.awaits:
        # Its nodes have clients, who know what a connection is made of.
        found = [getattr(node, f"{driver.package}_connection") for node in client.get_nodes()]
        pools = [each.connection_pool for each in found if each is not None]
        make, options, most = pools[0].connection_class, pools[0].connection_kwargs, pools[0].max_connections
    # It asks to read from replicas, or sets a parser.
    options = {
        name: value for name, value in options.items() if name not in {"redis_connect_func", "response_callbacks"}
    }
    known = {**manager.startup_nodes, **manager.nodes_cache}
    starts = tuple((node.host, int(node.port)) for node in known.values())
    remap = getattr(manager, "address_remap", None)
    target = Target(_recipe(driver, make, options, most), starts=starts)
    return Target(target.recipe, starts=starts, remap=remap) if remap else target


def _of_sentinel(recipe: Recipe) -> Recipe:
    """Return how a connection to a server is made, rather than one that asks Sentinel for the server first."""
    classes: list[type[Any]] = recipe.make.__mro__  # type: ignore[attr-defined]
    plain = [each for each in classes if not any(base.__name__.startswith("SentinelManaged") for base in each.__mro__)]
    return Recipe(recipe.driver, plain[0], recipe.options, recipe.seconds, recipe.connect_seconds, recipe.most)


def _recipe(driver: Driver, make: Callable[..., Any], given: Mapping[str, Any], most: int | None) -> Recipe:
    read = _chosen(driver, given, "socket_timeout") or SECONDS
    connect = _chosen(driver, given, "socket_connect_timeout") or read
    options = {
        name: value for name, value in given.items() if name not in _NOT_OURS and not name.startswith(_NOT_OURS_BEGIN)
    }
    options |= {"retry": driver.retry, "decode_responses": False, "socket_connect_timeout": connect}
    # Who awaits has a deadline for all of it.
    options["socket_timeout"] = None if driver.awaits else read
    return Recipe(driver, make, options, read, connect, most or 2**31)


def _chosen(driver: Driver, given: Mapping[str, Any], name: str) -> float | None:
    """Return a time-out that the program chose, rather than the driver."""
    default = inspect.signature(driver.connection.__mro__[1]).parameters[name].default
    return given[name] if given.get(name) not in {None, default} else None


def redirection(error: BaseException) -> tuple[str, Address] | None:
    """Return where a node of a cluster sends a command: MOVED or ASK, and the address; its host may be empty."""
    kind = word(error)
    if kind not in {"MOVED", "ASK"}:
        return None
    host, _, port = str(error).rsplit(" ", 1)[-1].rpartition(":")
    return kind, (host, int(port))
