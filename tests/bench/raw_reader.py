"""The limit: empty the walsender's socket, nap briefly, do nothing with what came.

libpq only connects and starts the stream; from then on the bare socket is read. The end is a logical message whose
text is looked for in the last bytes of each read.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

import psycopg
from psycopg import pq

NAP_SECONDS = float(os.environ["BENCH_NAP_MS"]) / 1000
BUFFER = bytearray(8 << 20)
# The end of the stream is the message and what the walsender says after it: a keepalive or two.
TAIL = 1024


def start(connection: psycopg.Connection) -> socket.socket:
    slot, publication = os.environ["BENCH_SLOT"], os.environ["BENCH_PUBLICATION"]
    options = f"proto_version '2', streaming 'on', messages 'true', publication_names '{publication}'"
    connection.pgconn.send_query(f'START_REPLICATION SLOT "{slot}" LOGICAL 0/0 ({options})'.encode())
    connection.pgconn.nonblocking = 0
    connection.pgconn.flush()
    result = connection.pgconn.get_result()
    if result is None or result.status != pq.ExecStatus.COPY_BOTH:
        sys.exit(connection.pgconn.get_error_message())
    stream = socket.socket(fileno=os.dup(connection.pgconn.socket))
    stream.setblocking(True)
    return stream


def main() -> None:
    marker = os.environ["BENCH_MARKER"].encode()
    connection = psycopg.Connection.connect(os.environ["BENCH_DSN"], autocommit=True, replication="database")
    stream = start(connection)
    tail = b""
    while True:
        size = stream.recv_into(BUFFER)
        if not size:
            sys.exit("the server ended the stream")
        tail = (tail + bytes(BUFFER[max(0, size - TAIL) : size]))[-TAIL:]
        if marker in tail:
            break
        time.sleep(NAP_SECONDS)
    print(json.dumps({"done": time.monotonic()}), flush=True)
    sys.stdin.read()  # stays until its CPU time has been read


if __name__ == "__main__":
    main()
