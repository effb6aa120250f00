"""CPU that a start costs: ``python -m bench.start`` in tests/, or with the folders of other checkouts to compare with.

User and system time of ``--help``, ``healthcheck`` and ``run`` until it is ready, the least and the median of several
starts; the checkouts take turns, so that a busy machine is equally unfair to all.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psycopg
from bench.measure import cpu_seconds

from cdc_invalidator.embedded.process import free_port
from cdc_invalidator.embedded.servers import Postgres, Valkey

STARTS = 9
RULES = """version: 1
caches:
  user: {key: "shop:user:{id}", ttl: 5m}
rules:
  - {name: users, table: public.users, bust: [user]}
"""


def ended(env: dict[str, str], *words: str) -> float:
    """Return the CPU seconds of a command that ends by itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    silent = subprocess.DEVNULL
    subprocess.run(
        [sys.executable, "-m", "cdc_invalidator", *words], env=env, stdout=silent, stderr=silent, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ready(env: dict[str, str]) -> float:
    """Return the CPU seconds of ``run`` until /readyz is 200."""
    silent = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-m", "cdc_invalidator", "run"], env=env, stdout=silent) as process:
        try:
            until = time.monotonic() + 30
            while not _answers(f"http://127.0.0.1:{env['CDC_HTTP_PORT']}/readyz"):
                assert time.monotonic() < until, "it is not ready"
                time.sleep(0.01)
            return cpu_seconds(process.pid)
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    trees = sys.argv[1:] or [str(Path(__file__).parents[2])]
    with tempfile.TemporaryDirectory() as folder, Postgres() as postgres, Valkey() as valkey:
        rules = Path(folder, "rules.yaml")
        rules.write_text(RULES)
        dsn = postgres.create_database("start")
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE TABLE users (id int PRIMARY KEY)")
        shared = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
            "CDC_POSTGRES_DSN": dsn,
            "CDC_REDIS_URL": valkey.url_for(1),
            "CDC_RULES": str(rules),
            "CDC_HTTP_PORT": str(free_port()),
            "CDC_LOG_LEVEL": "error",
        }
        figures: dict[tuple[str, str], list[float]] = {}
        for _ in range(STARTS):
            for tree in trees:
                env = shared | {"PYTHONPATH": tree}
                figures.setdefault(("--help", tree), []).append(ended(env, "--help"))
                figures.setdefault(("healthcheck", tree), []).append(ended(env, "healthcheck"))
                figures.setdefault(("run", tree), []).append(ready(env))
    for (command, tree), seconds in sorted(figures.items()):
        print(f"{command:12} least {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s  {tree}")


if __name__ == "__main__":
    main()
