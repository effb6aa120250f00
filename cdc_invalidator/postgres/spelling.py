"""How PostgreSQL spells the values that keys are made of: dates, times, intervals, floats, bytes, money.

The rule that holds here: values are spelled as the database has it for everybody. A setting of our role, of the
connection string or of the environment changes no key. So the database's settings are looked up, and every connection
that prints values is opened with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import tuple_row

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import answered, connect_for_defaults, first_line, rows
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.quoting import identifier

SETTINGS = ("DateStyle", "IntervalStyle", "TimeZone", "bytea_output", "extra_float_digits", "lc_monetary")
# Where a value comes from that holds for our connection only, and what takes it away.
_OURS: Mapping[str, str] = {
    "user": "run ALTER ROLE {role} RESET {name};",
    "database user": "run ALTER ROLE {role} IN DATABASE {database} RESET {name};",
    "client": "take {name} out of the connection string and PGOPTIONS;",
}


class _Setting(NamedTuple):
    """One setting: what is configured for the database or for all, the server's where we see it, and its source."""

    name: str
    configured: str | None
    default: str | None
    source: str


class Spelling:
    """The settings of one database that values are spelled with.

    Args:
        connection: an ordinary one, without settings of its own.
        found: what the catalogs say.
        values: the settings, as SHOW writes them.
    """

    def __init__(
        self, connection: psycopg.AsyncConnection[Any], found: Sequence[_Setting], values: Mapping[str, str]
    ) -> None:
        self._connection = connection
        self._found = found
        self.values = values

    @classmethod
    async def read(cls, connection: psycopg.AsyncConnection[Any], dsn: DsnSource) -> Spelling:
        """Look up the database's settings.

        Args:
            connection: an ordinary one, without settings of its own.
            dsn: how it was opened.

        Raises:
            errors.ServerRefuses: our role has its own, and the server does not tell those of the others.
        """
        found = await _look(connection)
        hidden = [each for each in found if each.configured is None and each.default is None]
        defaults = await _defaults(connection, dsn, hidden) if hidden else {}
        given = {each.name: each.configured or each.default or defaults[each.name] for each in found}
        with answered(connection):
            async with connection.transaction(force_rollback=True):
                # Gives them as SHOW writes them.
                written = ", ".join(f"set_config('{name}', %({name})s, true)" for name in given)
                cursor = connection.cursor(row_factory=tuple_row)
                await cursor.execute(f"SELECT {written}".encode(), given)
                (values,) = await cursor.fetchall()
        return cls(connection, found, dict(zip(given, values, strict=True)))

    async def check(self) -> None:
        """Fail if the database's settings are others by now.

        Raises:
            errors.PostgresUnavailable: they are; what follows needs other connections, and a sweep.
        """
        if await _look(self._connection) != self._found:
            raise errors.PostgresUnavailable(
                "The database's settings for printing values were changed, so keys are spelled otherwise; the stream "
                "is started anew, and the caches are swept."
            )

    def mark(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Return digests of caches that change with the settings too."""
        settings = repr(sorted(self.values.items()))
        return {
            name: hashlib.sha256(f"{digest} {settings}".encode()).hexdigest()[:16] for name, digest in digests.items()
        }


async def _look(connection: psycopg.AsyncConnection[Any]) -> list[_Setting]:
    found = []
    for row in await rows(connection, _SETTINGS, {"names": list(SETTINGS)}):
        # One that was in force for the database when the connection was opened, and is no more, hides the server's.
        hidden = row.source in _OURS or (row.configured is None and row.source in {"database", "global"})
        found.append(_Setting(row.name, row.configured, None if hidden else row.setting, row.source))
    return found


async def _defaults(
    connection: psycopg.AsyncConnection[Any], dsn: DsnSource, hidden: Sequence[_Setting]
) -> Mapping[str, str]:
    """Return the server's own settings, which those of our role or connection hide."""
    try:
        async with await connect_for_defaults(dsn) as plain:
            found = {}
            with answered(plain):
                for name, *_ in hidden:
                    # The walsender knows no statements but its commands, and no arguments.
                    shown = (await plain.execute(f"SHOW {name}".encode())).pgresult
                    found[name] = ((shown and shown.get_value(0, 0)) or b"").decode()
            return found
    except (errors.InvalidatorError, psycopg.Error) as error:
        cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else first_line(error)
        role, database = identifier(connection.info.user), identifier(connection.info.dbname)
        remedies = [_OURS.get(each.source, "").format(role=role, database=database, name=each.name) for each in hidden]
        raise errors.ServerRefuses(
            f"Keys must be spelled with the {', '.join(each.name for each in hidden)} that the database has for all, "
            f"but CDC_POSTGRES_DSN has its own, and the server's can't be read ({cause}): {' '.join(remedies)}"
        ) from error


# What is set for the database comes before what is set for all (ALTER ROLE ALL).
_SETTINGS = """
SELECT s.name, s.setting, s.source, configured.value AS configured
FROM pg_settings s LEFT JOIN LATERAL (
  SELECT substr(entry, strpos(entry, '=') + 1) AS value
  FROM pg_db_role_setting d, unnest(d.setconfig) AS entry
  WHERE d.setrole = 0 AND d.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    AND lower(split_part(entry, '=', 1)) = lower(s.name)
  ORDER BY d.setdatabase DESC LIMIT 1
) AS configured ON true
WHERE lower(s.name) = ANY (SELECT lower(name) FROM unnest(%(names)s::text[]) AS wanted (name))
ORDER BY s.name
"""
