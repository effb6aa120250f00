"""CDC_REDIS_URL: one setting that says which Redis, of which kind. Pure.

::

    redis://user:password@host:port/db                  one server; rediss:// with TLS, unix:///path?db=0 by a socket
    redis+sentinel://host:port,host:port/service/db     the master of a service, which Sentinel names
    redis+cluster://host:port,host:port                 a cluster; these hosts name all others

User and password are those of the servers that hold the caches; Sentinels have their own (``sentinel_username``,
``sentinel_password``). All other options behind ``?`` (``ssl_ca_certs``, …) are the driver's, and hold for all servers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from cdc_invalidator import errors

Kind = Literal["server", "sentinel", "cluster"]

_KINDS: dict[str, Kind] = {"": "server", "sentinel": "sentinel", "cluster": "cluster"}
_PORTS = {"server": 6379, "cluster": 6379, "sentinel": 26379}
_SENTINELS_OWN = {"sentinel_username": "username", "sentinel_password": "password"}


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, port: int = 6379) -> Self:
        """Read ``host:port``, ``[v6]:port`` or ``host``.

        Raises:
            ValueError: it is none of these.
        """
        host, _, tail = text.rpartition("]") if text.startswith("[") else text.partition(":")
        number = tail.removeprefix(":")
        host = host.removeprefix("[")
        if not host or (number and not number.isdecimal()):
            raise ValueError(text)
        return cls(host, int(number or port))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the URL says.

    ``url``: for ``server``, the driver's URL; ``addresses``: for the other kinds, the Sentinels or nodes to ask;
    ``service``: what Sentinel calls the master. Its text form shows no password.
    """

    kind: Kind
    url: str
    addresses: tuple[Address, ...] = ()
    service: str = ""
    _scheme: str = "redis"
    _user: str = ""
    _path: str = ""
    _query: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read the setting.

        Raises:
            errors.WrongSettings: it can't be read; without its words, which may hold the password.
        """
        scheme, _, rest = url.partition("://")
        transport, _, name = scheme.partition("+")
        if transport not in {"redis", "rediss", "unix"} or name not in _KINDS or (transport == "unix" and name):
            raise errors.WrongSettings(
                "CDC_REDIS_URL has a scheme that is not supported; it must start with redis://, rediss://, unix://, "
                "redis+sentinel:// or redis+cluster://."
            )
        if any(sign < " " for sign in url):
            # The driver would leave them out.
            raise errors.WrongSettings(
                "CDC_REDIS_URL has a line break or another control character in it; remove that."
            )
        kind = _KINDS[name]
        if kind == "server":
            _check_server(transport, rest)
            return cls(kind, url)
        # urlsplit does not read lists of hosts with IPv6 addresses.
        place, _, query = rest.partition("?")
        network, _, path = place.partition("/")
        user, _, hosts = network.rpartition("@")
        service, _, database = path.strip("/").partition("/")
        if kind == "cluster":
            service, database = "", service
        try:
            addresses = tuple(Address.parse(host.strip(), _PORTS[kind]) for host in hosts.split(","))
            number = int(database or 0)
            url.encode()
        except ValueError:
            raise errors.WrongSettings(_UNREADABLE[kind]) from None
        # With these signs unencoded in a password, its beginning would be read as a host.
        stray = "#" in rest or "@" in query or "@" in path or set(user) & set("[] ")
        if (kind == "sentinel" and not service) or number < 0 or stray:
            raise errors.WrongSettings(_UNREADABLE[kind])
        if kind == "cluster" and number:
            raise errors.WrongSettings("CDC_REDIS_URL names a database of a cluster, which has only 0; leave it out.")
        return cls(
            kind,
            url,
            addresses,
            unquote(service),
            _scheme=transport,
            _user=f"{user}@" if user else "",
            _path=f"/{database}" if database else "",
            _query=tuple(parse_qsl(query)),
        )

    @property
    def place(self) -> str:
        """Where it is, for people, and nothing else of it."""
        if self.kind != "server":
            service = f" of service {self.service}" if self.service else ""
            return f"{self.kind}{service} at {', '.join(map(str, self.addresses))}"
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"socket {parts.path}"
        database = parts.path.strip("/") or "0"
        return f"{Address(parts.hostname or 'localhost', parts.port or 6379)}, database {database}"

    def at(self, address: Address) -> str:
        """Return the driver's URL of a server that holds caches, at this address."""
        query = urlencode([(name, value) for name, value in self._query if name not in _SENTINELS_OWN])
        return f"{self._scheme}://{self._user}{address}{self._path}" + (f"?{query}" if query else "")

    def of_sentinel(self, address: Address) -> str:
        """Return the driver's URL of a Sentinel."""
        own = dict(self._query)
        user = ":".join(quote(own.get(name, ""), safe="") for name in _SENTINELS_OWN)
        return replace(self, _user=f"{user}@" if user != ":" else "", _path="").at(address)

    def __str__(self) -> str:
        return f"{self.kind} {','.join(map(str, self.addresses))}".strip()

    __repr__ = __str__


def _check_server(transport: str, rest: str) -> None:
    """Refuse a URL of one server that the driver would read in another way than it is meant."""
    at = min((rest.find(sign) for sign in "/?" if sign in rest), default=len(rest))
    place, beyond = rest[:at], rest[at:]
    user = place.rpartition("@")[0]
    # The path of a socket may have an @, if no user stands before it.
    if "#" in rest or ("@" in beyond and not (transport == "unix" and not place)) or set(user) & set("[]"):
        raise errors.WrongSettings(
            "CDC_REDIS_URL can be read in two ways, since one of # / ? @ [ ] stands in user, password or options as it "
            "is; percent-encode these there (%23 %2F %3F %40 %5B %5D)."
        )
    database = unquote(beyond.partition("?")[0]).strip("/")
    if transport != "unix" and database and not database.isdecimal():
        raise errors.WrongSettings(
            "CDC_REDIS_URL names a database that is no number; write redis://user:password@host:port/db, the password "
            "percent-encoded."
        )


_UNREADABLE: dict[Kind, str] = {
    "sentinel": "CDC_REDIS_URL can't be read; write redis+sentinel://user:password@host:port,host:port/service/db, "
    "with # / ? @ [ ] and spaces in user, password and options percent-encoded.",
    "cluster": "CDC_REDIS_URL can't be read; write redis+cluster://user:password@host:port,host:port, with # / ? @ [ ] "
    "and spaces in user, password and options percent-encoded.",
}
