"""The tutorial's way: for each change one DEL, one round trip, one confirmation."""

from __future__ import annotations

import os
from typing import Any

import psycopg2
import psycopg2.extras
import redis


class Consumer:
    def __init__(self) -> None:
        self.cache = redis.Redis.from_url(os.environ["BENCH_REDIS_URL"])
        self.wanted = set(os.environ["BENCH_TABLES"].split(","))
        self.tables: dict[int, str] = {}

    def __call__(self, message: Any) -> None:
        payload = message.payload
        kind, table = payload[:1], int.from_bytes(payload[1:5], "big")
        if kind == b"R":
            self.tables[table] = payload[5:].split(b"\0")[1].decode()
        elif kind in b"IUD" and self.tables[table] in self.wanted:
            length = int.from_bytes(payload[9:13], "big")
            self.cache.delete(f"bench:{self.tables[table]}:{payload[13 : 13 + length].decode()}")
        message.cursor.send_feedback(flush_lsn=message.data_start)


def main() -> None:
    connection = psycopg2.connect(
        os.environ["BENCH_DSN"], connection_factory=psycopg2.extras.LogicalReplicationConnection
    )
    cursor = connection.cursor()
    cursor.start_replication(
        slot_name=os.environ["BENCH_SLOT"],
        options={"proto_version": "1", "publication_names": os.environ["BENCH_PUBLICATION"]},
        decode=False,
    )
    cursor.consume_stream(Consumer())


if __name__ == "__main__":
    main()
