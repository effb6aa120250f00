"""A client as it is often written, and wrong: whoever has the lock loads and stores, without looking at it again."""

from __future__ import annotations

import json
import os
import sys

import redis


def main() -> None:
    client = redis.Redis.from_url(os.environ["CONFORMANCE_REDIS"])
    for line in sys.stdin:
        wanted = json.loads(line)["get"]
        key = wanted["key"]
        stored = client.get(key)
        if stored is None and client.set(f"{key}\0lock", "1", nx=True, px=10_000):
            print(json.dumps({"load": True}), flush=True)
            stored = json.dumps(json.loads(sys.stdin.readline())["loaded"])
            client.set(key, stored, px=wanted["ttl"])
            client.delete(f"{key}\0lock")
        print(json.dumps({"value": json.loads(stored)}), flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
