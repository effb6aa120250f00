"""A client that shares nothing with the library: the contract's page, a socket, JSON for the values."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAGE = Path(__file__).parents[2] / "cdc_invalidator" / "reader" / "CONTRACT.md"
SCRIPTS = dict(re.findall(r"```lua\n-- (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


class Redis:
    def __init__(self) -> None:
        at = urlsplit(os.environ["CONFORMANCE_REDIS"])
        self.stream = socket.create_connection((at.hostname, at.port), timeout=5).makefile("rwb")

    def ask(self, *words: Any) -> Any:
        texts = [str(word).encode() for word in words]
        self.stream.write(b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%b\r\n" % (len(text), text) for text in texts))
        self.stream.flush()
        return self.read()

    def read(self) -> Any:
        line = self.stream.readline()
        if line[:1] in b"-":  # an error, or the end of the connection
            raise OSError(line)
        if line[:1] == b"$":
            return None if line[1:2] == b"-" else self.stream.read(int(line[1:]) + 2)[:-2]
        if line[:1] == b"*":
            return [self.read() for _ in range(int(line[1:]))]
        return int(line[1:])

    def run(self, script: str, keys: list[str], *arguments: Any) -> Any:
        return self.ask("EVAL", SCRIPTS[script], len(keys), *keys, *arguments)

    def prove(self, wanted: Any, script: str, keys: list[str], *arguments: Any) -> Any:
        if "at_least" not in wanted:
            return self.run(script, keys, *arguments)
        asked = (wanted["watermark"], "", wanted["cache"], wanted["at_least"], "", "", "")
        found = self.ask("EVAL", SCRIPTS["PROOF"] + SCRIPTS[script], len(keys), *keys, *arguments, *asked)
        if isinstance(found, list):
            raise OSError(found)  # nothing is proven, so load
        return found


def read(redis: Redis, wanted: Any) -> Any:
    key, token, deadline = wanted["key"], secrets.token_hex(8), time.monotonic() + 2
    if wanted["version"]:
        version = redis.prove(wanted, "VERSION", [wanted["version"]], wanted["version_ttl"])
        key = key.replace("{version}", version.decode())
    stored = redis.ask("GET", key) if "at_least" not in wanted else None
    while stored is None:
        taken = redis.prove(wanted, "TAKE", [f"{key}\0lock", key], token, 10_000, "")
        if isinstance(taken, bytes):
            stored = taken
        elif taken:
            return fill(redis, key, f"{token}:{taken}", wanted)
        elif time.monotonic() > deadline:
            return load()
        else:
            time.sleep(0.05)
    return json.loads(stored)


def fill(redis: Redis, key: str, lease: str, wanted: Any) -> Any:
    try:
        value = load()
    except LookupError:
        redis.run("RELEASE", [f"{key}\0lock"], lease)
        raise
    ttl = wanted["ttl"] if value is not None else wanted["negative_ttl"]
    try:
        if ttl:
            redis.run("FILL", [f"{key}\0lock", key], lease, json.dumps(value), ttl)
        else:
            redis.run("RELEASE", [f"{key}\0lock"], lease)
    except OSError:
        pass  # the value is right all the same
    return value


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def load() -> Any:
    say(load=True)
    heard = json.loads(sys.stdin.readline())
    if "failed" in heard:
        raise LookupError(heard["failed"])
    return heard["loaded"]


for line in sys.stdin:
    try:
        say(value=read(Redis(), json.loads(line)["get"]))
    except LookupError as failed:
        say(error=str(failed))
    except OSError:
        say(value=load())
