"""Commits one update after the other at a steady rate, and prints when each commit returned."""

from __future__ import annotations

import json
import os
import time

import psycopg


def main() -> None:
    rows, pause = int(os.environ["BENCH_ROWS"]), 1 / float(os.environ["BENCH_RATE"])
    returned = []
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        start = time.monotonic()
        for number in range(1, rows + 1):
            time.sleep(max(0.0, start + number * pause - time.monotonic()))
            connection.execute("UPDATE items SET price = price + 1 WHERE id = %s", [number])
            returned.append(time.monotonic())
    print(json.dumps(returned))


if __name__ == "__main__":
    main()
