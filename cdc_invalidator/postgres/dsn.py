"""Connection strings of PostgreSQL: where the one of now is read, and what is wrong with one, without its values.

libpq's own words are not shown: they may repeat a part of the password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Self

import psycopg

from cdc_invalidator import errors

_FORM = "postgresql://user:password@host:port/database"
# Of other drivers, frameworks and poolers. Only what is here is sure not to be a part of a password.
_FOREIGN = frozenset(
    (
        *("schema", "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "statement_cache_size"),
        *("sslaccept", "sslidentity"),  # to here of Prisma, from here of JDBC
        *("currentSchema", "ApplicationName", "prepareThreshold", "loginTimeout", "connectTimeout", "socketTimeout"),
        *("tcpKeepAlive", "stringtype", "reWriteBatchedInserts", "targetServerType", "sslfactory", "preferQueryMode"),
        *("loggerLevel", "defaultRowFetchSize"),  # from here of SQLAlchemy, asyncpg and Django
        *("prepared_statement_cache_size", "prepared_statement_name_func", "server_settings", "command_timeout"),
        *("async_fallback", "timeout", "conn_max_age", "conn_health_checks", "disable_server_side_cursors", "charset"),
        # Rails, Doctrine, node-postgres, pgx, Ecto, Supabase.
        *("pool", "pool_size", "max_overflow", "prepared_statements", "advisory_locks", "statement_timeout"),
        *("lock_timeout", "search_path", "schema_search_path", "serverVersion", "uselibpqcompat", "max_connections"),
        *("pool_max_conns", "pool_min_conns", "pool_max_conn_lifetime", "default_query_exec_mode", "encoding"),
        *("timezone", "TimeZone", "supa"),
    )
)
_INSTEAD = {
    "schema": "rule files name tables with their schema",
    "currentSchema": "rule files name tables with their schema",
    "search_path": "rule files name tables with their schema",
    "schema_search_path": "rule files name tables with their schema",
    "pgbouncer": "the address must be PostgreSQL's own, not the pooler's",
    "supa": "the address must be PostgreSQL's own, not the pooler's",
    "sslaccept": "write sslmode=verify-full with sslrootcert, or sslmode=require",
    "sslfactory": "write sslmode=verify-full with sslrootcert, or sslmode=require",
}
# What a scheme can be called and be no part of a password.
_OTHER_SCHEME = re.compile(
    r"(?:jdbc:|r2dbc:)?(?:postgres(?:ql)?|postgis|pgsql|psql|pg|psycopg[23]?|asyncpg|cockroachdb|redshift|timescaledb|"
    r"timescale|ecto|mysql|mariadb|sqlite|mssql|sqlserver|oracle|mongodb|rediss?|https?)(?:\+[a-z0-9_]+)?",
    re.IGNORECASE,
)
_SCHEMES = ("postgresql://", "postgres://")
# libpq looks at these when it connects, and would fail again and again.
_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_VALUES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "ssl_min_protocol_version": _VERSIONS,
    "ssl_max_protocol_version": _VERSIONS,
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
}
_PAIR = re.compile(
    r"""(?x) \s* (\w+) \s* = \s*
    ( ' (?: [^'\\] | \\. )* ' (?= \s | $ )      # quoted to the end of the value
    | (?! ') (?: [^\s\\] | \\. )*             # or as it is, but for quotes at its beginning
    ) \s*""",
    re.DOTALL,
)


class DsnSource:
    """Gives the connection string of now to each connection that is opened.

    Args:
        read: returns it.
        setting: where it is from.

    Raises:
        errors.WrongSettings: as `check_dsn`.
    """

    def __init__(self, read: Callable[[], str], setting: str = "CDC_POSTGRES_DSN") -> None:
        self._read = read
        self.setting = setting
        dsn = read()
        check_dsn(dsn, setting)
        # Where it led when it was last read, for people.
        self.place = place(dsn)

    @classmethod
    def fixed(cls, dsn: str, setting: str = "CDC_POSTGRES_DSN") -> Self:
        """Return one that always gives the same."""
        return cls(lambda: dsn, setting)

    def now(self) -> str:
        """Return the connection string.

        Raises:
            errors.PostgresUnavailable: it was right at the start, and is not any more.
        """
        try:
            dsn = self._read()
            check_dsn(dsn, self.setting)
        except errors.WrongSettings as error:
            raise errors.PostgresUnavailable(str(error)) from None
        self.place = place(dsn)
        return dsn


def check_dsn(dsn: str, setting: str = "CDC_POSTGRES_DSN") -> None:
    """Refuse a text that can't be a connection string, or that another driver's is.

    Raises:
        errors.WrongSettings: it names the parameter, or says what to write.
    """
    unreadable = f"{setting} can't be read; write {_FORM}, the password percent-encoded."
    scheme, separator, rest = dsn.strip().partition("://")
    uri = dsn.startswith(_SCHEMES)
    if separator and not uri and _OTHER_SCHEME.fullmatch(scheme):
        raise errors.WrongSettings(f"{setting} begins with {scheme}://, which is another driver's; write {_FORM}.")
    if uri:
        if any(sign < " " for sign in dsn):
            raise errors.WrongSettings(f"{setting} has a line break or another control character in it; remove that.")
        _check_parameters(rest, setting)
    elif re.match(r"\s*\w+\s*=", dsn):
        _check_pairs(dsn, setting)
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except (psycopg.ProgrammingError, UnicodeDecodeError):
        given = {}
    if not given:
        raise errors.WrongSettings(unreadable)
    ports = str(given.get("port") or "").split(",")
    if not all(port.isdecimal() and 0 < int(port) < 65536 for port in ports if port):
        raise errors.WrongSettings(
            f"{setting} has a port that is no number from 1 to 65535; write {_FORM}, the password percent-encoded."
        )
    hosts = str(given.get("hostaddr") or given.get("host") or "").split(",")
    if len(ports) not in {1, len(hosts)}:
        raise errors.WrongSettings(f"{setting} has another number of ports than of hosts; give each host its port.")
    if "replication" in given:
        raise errors.WrongSettings(
            f"{setting} has the parameter replication, which the daemon sets itself; leave it out."
        )
    for name, values in _VALUES.items():
        if given.get(name) and given[name] not in values:
            raise errors.WrongSettings(
                f"{setting} has a value of {name} that PostgreSQL does not know; write one of {', '.join(values)}."
            )


def _check_pairs(dsn: str, setting: str) -> None:
    """Refuse pairs of which libpq takes the last, or that end elsewhere than they seem to."""
    at, names = 0, []
    while at < len(dsn) and (pair := _PAIR.match(dsn, at)):
        names.append(pair[1])
        at = pair.end()
    if at == len(dsn) and len(set(names)) == len(names):
        return
    raise errors.WrongSettings(
        f"{setting} can't be read in one way only; give each name once, and write a password with other signs than "
        r"letters and digits as password='…', with \' and \\ for ' and \ in it."
    )


def place(dsn: str) -> str:
    """Return where a connection string leads, for people: host, port and database, and nothing else of it."""
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return ""
    hosts = str(given.get("host") or given.get("hostaddr") or "localhost").split(",")
    ports = str(given.get("port") or "5432").split(",")
    places = [f"{host}:{ports[at if at < len(ports) else -1] or 5432}" for at, host in enumerate(hosts)]
    return f"{', '.join(places)}, database {given.get('dbname') or given.get('user') or ''}"


def _check_parameters(rest: str, setting: str) -> None:
    """Look at what libpq takes for hosts, database and parameters; ``rest`` is what follows the scheme."""
    user, at, after = rest.partition("@")
    if at and ("@" in after or "/" in user or "?" in user):
        raise _ambiguous(setting)
    _, _, query = (after if at else rest).partition("?")
    if not query:
        return
    names = [pair.partition("=")[0] for pair in query.split("&")]
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()} | {"ssl"}
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    foreign = [name for name in unknown if name in _FOREIGN]
    if foreign == unknown:
        raise errors.WrongSettings(_sentence(setting, dict.fromkeys(foreign)))
    # Behind a raw & of a password, its end would be a name.
    if not {"password", "sslpassword"} & set(names) and all(re.fullmatch(r"\w+", name) for name in unknown):
        raise errors.WrongSettings(_sentence(setting, dict.fromkeys(unknown)))
    raise errors.WrongSettings(
        f"{setting} has parameters behind the ? that PostgreSQL does not know"
        + (f" ({', '.join(dict.fromkeys(foreign))} among them)" if foreign else "")
        + "; leave them out, and percent-encode what is part of a password."
    )


def _sentence(setting: str, names: Iterable[str]) -> str:
    names = list(names)
    said = f"the parameter {names[0]}" if len(names) == 1 else f"the parameters {', '.join(names[:-1])} and {names[-1]}"
    hints = dict.fromkeys(_INSTEAD[name] for name in names if name in _INSTEAD)
    it = "it" if len(names) == 1 else "them"
    return (
        f"{setting} has {said}, which other drivers know and PostgreSQL does not; leave {it} out"
        + (f" ({'; '.join(hints)})" if hints else "")
        + "."
    )


def _ambiguous(setting: str) -> errors.WrongSettings:
    return errors.WrongSettings(
        f"{setting} can be read in two ways, since one of @ / ? stands in user, password or a parameter as it is; "
        "percent-encode these there (%40 %2F %3F)."
    )
