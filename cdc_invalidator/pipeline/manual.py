"""Manual busts: reads what somebody wrote with pg_logical_emit_message. Pure.

The rule that holds here: a manual bust that can't be read busts nothing; the error says what to write instead.
"""

from __future__ import annotations

import json

from cdc_invalidator import errors
from cdc_invalidator.pipeline.batch import Target
from cdc_invalidator.rules.model import RuleSet

# Prefix of manual-bust messages; all others are ignored.
MESSAGE_PREFIX = "cdc_invalidator"


class ManualBusts:
    """The caches that a manual bust may name.

    Args:
        rules: the rule set.
    """

    def __init__(self, rules: RuleSet) -> None:
        self._targets = {name: Target("", cache, "") for name, cache in rules.caches.items()}

    def read(self, content: bytes) -> tuple[Target, bytes | None]:
        """Read the content of a message.

        Args:
            content: JSON, ``{"cache": "user", "params": {"id": 42}}``; without ``params``, the whole cache is meant.

        Returns:
            The target, and its key; ``None`` for all keys.

        Raises:
            errors.WrongMessage: it can't be read, or no cache of the rules fits it.
        """
        try:
            bust = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise errors.WrongMessage('A manual bust is not JSON; write {"cache": "user", "params": {…}}.') from error
        if not isinstance(bust, dict) or not isinstance(bust.get("cache"), str) or bust.keys() - {"cache", "params"}:
            raise errors.WrongMessage("A manual bust must be an object with `cache`, and `params` if not all is meant.")
        target = self._targets.get(bust["cache"])
        if target is None:
            raise errors.WrongMessage(f"A manual bust names cache {bust['cache']!r}, which the rules do not have.")
        if target.cache.ttl_only:
            raise errors.WrongMessage(
                f"A manual bust names cache {target.cache.name}, which is `ttl_only`, so that nothing busts it; delete "
                "its keys with redis-cli, or remove `ttl_only`."
            )
        if "params" not in bust:
            return target, None
        return target, _key(target, bust["params"])


def _key(target: Target, params: object) -> bytes:
    wanted = target.template.params
    name = target.cache.name
    if not isinstance(params, dict) or set(params) != set(wanted):
        raise errors.WrongMessage(
            f"A manual bust of {name} must give just its parameters: {', '.join(wanted) or 'none'}."
        )
    values = {}
    for parameter, value in params.items():
        if isinstance(value, bool):
            values[parameter] = "t" if value else "f"
        elif isinstance(value, (str, int)):
            values[parameter] = str(value)
        else:
            # A float has no text form that is sure to be PostgreSQL's.
            raise errors.WrongMessage(
                f"A manual bust of {name} gives {parameter} as neither text nor integer; quote it."
            )
    if any("\0" in value for value in values.values()):
        raise errors.WrongMessage(f"A manual bust of {name} gives a value with NUL, which no key of it has.")
    try:
        key = target.template.render(values)
    except UnicodeEncodeError as error:
        raise errors.WrongMessage(
            f"A manual bust of {name} gives a value that is no text; write it in UTF-8."
        ) from error
    assert key is not None
    return key
