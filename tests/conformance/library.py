"""The Python library as a client under test: what it reads it asks the runner for, by lines of JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import redis

from cdc_invalidator.reader import Caches


def hear() -> Any:
    return json.loads(sys.stdin.readline() or "null")


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def load(**_: Any) -> Any:
    say(load=True)
    heard = hear()
    if "failed" in heard:
        raise LookupError(heard["failed"])
    return heard["loaded"]


def main() -> None:
    client = redis.Redis.from_url(os.environ["CONFORMANCE_REDIS"], socket_timeout=5)
    caches = Caches.from_rules(os.environ["CONFORMANCE_RULES"], client)
    while request := hear():
        wanted = request["get"]
        try:
            asked = caches.at_least(int(wanted.get("at_least", 0)))
            value = asked[wanted["cache"]].get(wanted["params"], load=load)
        except LookupError as failed:
            say(error=str(failed))
        else:
            say(value=value)


if __name__ == "__main__":
    main()
