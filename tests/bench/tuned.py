"""The tuned script: what a good engineer writes in an afternoon. No rules, events, metrics or safety.

The key is the first column of each change; one DEL of up to 1,000 keys; flushed as soon as nothing more is ready;
confirmed after Redis has answered.
"""

from __future__ import annotations

import os
import select

import psycopg2
import psycopg2.extras
import redis

KEYS_A_DEL = 1000
FEEDBACK_SECONDS = 1


def main() -> None:
    wanted = set(os.environ["BENCH_TABLES"].split(","))
    cache = redis.Redis.from_url(os.environ["BENCH_REDIS_URL"])
    connection = psycopg2.connect(
        os.environ["BENCH_DSN"], connection_factory=psycopg2.extras.LogicalReplicationConnection
    )
    cursor = connection.cursor()
    cursor.start_replication(
        slot_name=os.environ["BENCH_SLOT"],
        options={"proto_version": "1", "publication_names": os.environ["BENCH_PUBLICATION"]},
        status_interval=FEEDBACK_SECONDS,
        decode=False,
    )
    prefixes: dict[bytes, bytes] = {}
    keys: list[bytes] = []
    committed = 0

    def flush() -> None:
        if keys:
            cache.delete(*keys)
            keys.clear()
        if committed:
            cursor.send_feedback(flush_lsn=committed)  # type: ignore[no-untyped-call]  # sends once in status_interval

    while True:
        message = cursor.read_message()
        if message is None:
            flush()
            select.select([connection], [], [], FEEDBACK_SECONDS)
            continue
        payload = message.payload
        kind = payload[:1]
        if kind in b"IUD":
            # I, U or D, the table's number, N or K or O, the number of columns, then t, the length, the text.
            prefix = prefixes.get(payload[1:5])
            if prefix is not None:
                end = 13 + int.from_bytes(payload[9:13], "big")
                keys.append(prefix + payload[13:end])
                if len(keys) >= KEYS_A_DEL:
                    flush()
        elif kind == b"C":
            committed = message.data_start
        elif kind == b"R":
            table = payload[5:].split(b"\0")[1].decode()
            if table in wanted:
                prefixes[payload[1:5]] = f"bench:{table}:".encode()


if __name__ == "__main__":
    main()
