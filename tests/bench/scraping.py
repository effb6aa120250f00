"""What scrapes do to busts: their lag while eight clients ask for metrics of 1,000 rules and while none does, in turns.

cd tests; python -m bench.scraping --rounds 5

The clients are one process, so on two cores they, the servers and the daemon are in each other's way as well. The third
row tells how much of it that is: as many clients ask for /livez, and no metrics are made for them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psycopg
from bench.measure import quantile

from cdc_invalidator.embedded.daemon import DaemonProcess
from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

RULES = 1000
TABLES = 100
CLIENTS = 8
COMMITS_A_SECOND = 50
_CLIENTS = """
import socket, sys, threading
def ask():
    while True:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), 60) as client:
            client.sendall(b"GET " + sys.argv[3].encode() + b" HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            while client.recv(1 << 20):
                pass
for _ in range(int(sys.argv[4])):
    threading.Thread(target=ask).start()
"""


def rules_of(count: int) -> str:
    caches = "".join(f'  c{number}: {{key: "bench:c{number}:{{id}}", ttl: 5m}}\n' for number in range(count))
    rules = "".join(
        f"  - {{name: r{number}, table: public.t{number % TABLES}, bust: [c{number}]}}\n" for number in range(count)
    )
    return f"version: 1\ncaches:\n{caches}rules:\n{rules}"


@contextmanager
def clients(port: int, path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    words = [sys.executable, "-c", _CLIENTS, HOST, str(port), path, str(CLIENTS)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        try:
            # Until they are at work.
            time.sleep(1)
            yield
        finally:
            process.kill()


def write(connection: psycopg.Connection, seconds: float) -> None:
    """Commit at an even pace."""
    began = time.monotonic()
    for number in range(int(seconds * COMMITS_A_SECOND)):
        time.sleep(max(0.0, began + number / COMMITS_A_SECOND - time.monotonic()))
        connection.execute("UPDATE t0 SET price = price + 1 WHERE id = 1")


def scrape_seconds(port: int) -> tuple[float, int, int]:
    """Return the seconds of one scrape, its bytes and its series."""
    began = time.monotonic()
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=60) as answer:
        body = answer.read()
    seconds = time.monotonic() - began
    return seconds, len(body), sum(1 for line in body.splitlines() if not line.startswith(b"#"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scraping", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S", help="of each turn (6)")
    parser.add_argument("--rules", type=int, default=RULES, metavar="N")
    given = parser.parse_args()
    lags: dict[str, list[float]] = defaultdict(list)
    with Postgres() as postgres, Valkey() as valkey, TemporaryDirectory() as folder:
        dsn = postgres.create_database("bench")
        rules = Path(folder) / "rules.yaml"
        rules.write_text(rules_of(given.rules))
        with psycopg.connect(dsn, autocommit=True) as connection:
            for number in range(TABLES):
                connection.execute(f"CREATE TABLE t{number} (id int PRIMARY KEY, price int NOT NULL)")
            with DaemonProcess(dsn, valkey.url, rules, {}) as daemon:
                daemon.wait_until_ready()
                # Each rule has busted once, so that each series is there.
                for number in range(TABLES):
                    connection.execute(f"INSERT INTO t{number} VALUES (1, 0)")
                daemon.settle()
                time.sleep(2)
                scrapes = [scrape_seconds(daemon.port) for _ in range(5)]
                series, size = scrapes[-1][2], scrapes[-1][1] >> 10
                print(
                    f"{given.rules} rules, {series:,} series, {size:,} KiB; seconds of a scrape: "
                    + " ".join(f"{seconds:.3f}" for seconds, _, _ in scrapes)
                )
                turns = {"no client": None, f"{CLIENTS} for /livez": "/livez", f"{CLIENTS} for /metrics": "/metrics"}
                for turn in range(given.rounds):
                    for name, path in turns.items():
                        daemon.events.clear()
                        with clients(daemon.port, path):
                            write(connection, given.seconds)
                        daemon.settle()
                        found = [
                            each["lag_ms"]
                            for each in daemon.events
                            if each["event"] == "bust" and each["op"] == "update"
                        ]
                        lags[name] += found
                        print(f"{turn + 1} {name}: p50 {quantile(found, 0.5):.2f} ms, p99 {quantile(found, 0.99):.2f}")
    print("| | p50, ms | p95 | p99 | max |\n| --- | --: | --: | --: | --: |")
    for name, found in lags.items():
        print(f"| {name} | " + " | ".join(f"{quantile(found, share):.2f}" for share in (0.5, 0.95, 0.99, 1)) + " |")


if __name__ == "__main__":
    main()
