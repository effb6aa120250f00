"""What types the parameters of keys have: those of the columns that rules take them from, or of `via` queries' answers.

A type is told as `format_type` prints it: the one under domains, with its modifier. Three have a word of their own,
since it matters how their values are compared: ``enum``, ``citext``, and text whose collation takes different texts for
equal, such as ``text, nondeterministic``. Types that print all values alike are told as one, see `_alike`.

The rule that holds here: where rules disagree, or nobody knows, no type is told; a reader then has no key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.postgres.connection import answered, rows
from cdc_invalidator.postgres.queries import TOLD, columns
from cdc_invalidator.rules.model import Query, RuleSet

Types = dict[str, dict[str, str | None]]
"""By cache and parameter, the type; ``None``: it is not known. A parameter that no bust names is left out."""

# A query whose table somebody has locked is asked another time.
_LIMITS = "SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '2s'"


async def parameter_types(connection: psycopg.AsyncConnection[Any], rules: RuleSet) -> Types:
    """Return the types of the parameters that busts name, as rows of the rules' tables give them.

    Args:
        connection: an ordinary one, in autocommit mode.
        rules: the rule set.

    Raises:
        errors.Retryable: the database can't be asked.
    """
    found = await columns(connection, rules.tables)
    types: Types = {name: {} for name in rules.caches}
    for rule in rules.rules:
        of_table = {column.name: column for column in found.get(rule.table, ())}
        for bust in rule.busts:
            if bust.sweep:
                continue
            given = {name: of_table[column].told for name, column in bust.mapped.items() if column in of_table}
            if bust.query is not None:
                written = {name: column.type for name, column in of_table.items()}
                given |= await _answered(connection, bust.query, written)
            of_cache = types[bust.cache.name]
            for parameter in bust.cache.bust_template.params:
                told = given.get(parameter)
                of_cache[parameter] = _both(of_cache[parameter], told) if parameter in of_cache else told
    return types


async def _answered(
    connection: psycopg.AsyncConnection[Any], query: Query, written: Mapping[str, str]
) -> dict[str, str]:
    """Return the types of what a query answers; none where it can't be planned now."""
    sql = "".join(
        part if isinstance(part, str) else f"(NULL::{written.get(part.name, 'text')})" for part in query.parts
    )
    try:
        with answered(connection):
            async with connection.transaction(force_rollback=True):
                await connection.execute("SET TRANSACTION READ ONLY")
                await connection.execute(_LIMITS)
                # What is pasted is the rule file's own SQL, which the daemon asks for busts too.
                nothing = f"SELECT * FROM (\n{sql}\n) AS found LIMIT 0"  # noqa: S608
                cursor = await connection.execute(nothing.encode())
    except errors.InvalidatorError:
        if connection.broken:
            raise
        # That is told where the query is asked for busts.
        return {}
    result = cursor.pgresult
    assert result is not None
    names = [column.name for column in cursor.description or ()]
    given = {
        "oids": [result.ftype(at) for at in range(len(names))],
        "modifiers": [result.fmod(at) for at in range(len(names))],
    }
    told = [row.told for row in await rows(connection, _TOLD, given)]
    return dict(zip(names, told, strict=True))


def _both(one: str | None, other: str | None) -> str | None:
    """Return the type of values that are of either; ``None`` if they are not printed alike."""
    if one is None or other is None or one == other:
        return one if one == other else None
    return _alike(one) if _alike(one) == _alike(other) else None


def _alike(told: str) -> str:
    """Return the name under which types go that print a value alike."""
    if told in {"smallint", "integer", "bigint"}:
        return "bigint"
    return "text" if re.fullmatch(r"text|enum|character varying(\(\d+\))?", told) else told


# An answer does not tell its collation.
_TOLD = f"""
SELECT {
    TOLD.format(
        nondeterministic="base.typcollation <> 0 AND EXISTS (SELECT FROM pg_collation WHERE NOT collisdeterministic)",
        modifier="wanted.modifier",
    )
} AS told
FROM unnest(%(oids)s::oid[], %(modifiers)s::int[]) WITH ORDINALITY AS wanted (oid, modifier, n)
JOIN pg_type base ON base.oid = wanted.oid
ORDER BY n
"""  # noqa: S608  what is pasted is this module's own
