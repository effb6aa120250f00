"""`check`: looks for mistakes in the rule files (`check_rules`), on the database and on Redis (`check_postgres`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cdc_invalidator import errors
from cdc_invalidator.commands import check_rules
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, in_order
from cdc_invalidator.pipeline import eventstream
from cdc_invalidator.redis.endpoint import Endpoint
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.model import RuleSet

if TYPE_CHECKING:
    from cdc_invalidator.commands.check_postgres import ServerSettings


def check_files(path: Path, environment: Mapping[str, str], redis: Endpoint | None, event_stream: str) -> list[Finding]:
    """Check the rule files alone.

    Args:
        path: the rule file or directory.
        environment: what the rule files may refer to.
        redis: says which kind of Redis there is; it is not asked.
        event_stream: the key of the event stream; empty for none.
    """
    rules, findings = _load(path, environment, event_stream)
    if rules is not None:
        cluster = redis is not None and redis.kind == "cluster"
        findings += check_rules.offline(rules, Columns(), cluster=cluster)
    return in_order(findings)


async def check_servers(path: Path, environment: Mapping[str, str], servers: ServerSettings) -> list[Finding]:
    """Check the rule files, and the servers for them.

    Raises:
        errors.WrongSettings: a setting can't be used.
    """
    # Not for the files alone: it loads the drivers.
    from cdc_invalidator.commands import check_postgres  # noqa: PLC0415

    rules, findings = _load(path, environment, servers.event_stream)
    eventstream.check_key(servers.event_stream, servers.watermark)
    return in_order(findings + await check_postgres.inspect(servers, rules))


def _load(path: Path, environment: Mapping[str, str], event_stream: str) -> tuple[RuleSet | None, list[Finding]]:
    """Return the rules, ``None`` if they can't be loaded, and what is wrong with them."""
    try:
        rules = load_rules(path, environment)
    except errors.WrongRules as wrong:
        return None, [Finding.of(problem) for problem in wrong.problems]
    return rules, [Finding.of(problem) for problem in eventstream.clashes(event_stream, rules)]
