"""Reads through the library while writers write and faults befall the rest, and counts what the promises forbid."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import redis
from consistency import report, trial

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from consistency.trial import Outcome

README = Path(__file__).with_name("README.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m consistency", description=__doc__)
    parser.add_argument("--reads", type=int, default=1_000_000, metavar="N", help="under the contract (1000000)")
    parser.add_argument(
        "--other-reads", type=int, default=100_000, metavar="N", help="in each of the other modes (100000)"
    )
    parser.add_argument(
        "--faults", type=int, default=0, metavar="N", help="at least, in each mode that has any, however few reads (0)"
    )
    parser.add_argument("--only", choices=trial.MODES, nargs="+", default=list(trial.MODES), help="these modes (all)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the faults (1)")
    parser.add_argument("--readme", action="store_true", help="put the table into tests/consistency/README.md as well")
    return parser.parse_args()


def main() -> int:
    given = _arguments()
    done = []
    with Postgres() as postgres:
        for mode in (trial.MODES[name] for name in given.only):
            goal = given.reads if mode is trial.CONTRACT else given.other_reads
            with tempfile.TemporaryDirectory() as folder:
                outcome = trial.run(mode, goal, postgres, Path(folder), seed=given.seed, faults=given.faults)
            done.append(outcome)
            _tell(outcome)
        with psycopg.connect(postgres.dsn) as connection:
            version = connection.info.parameter_status("server_version")
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        servers = f"PostgreSQL {version}, Valkey {client.info()['valkey_version']}"
    text = report.markdown(done, servers)
    print(text, end="")
    if given.readme:
        report.into_readme(text, README)
    return 0 if _as_promised(done) else 1


def _as_promised(done: list[Outcome]) -> bool:
    """Whether nothing is stale under the contract, and the check has seen what is when something is left out."""
    return all(outcome.as_promised for outcome in done)


def _tell(outcome: Outcome) -> None:
    faults = ", ".join(f"{count} {fault}" for fault, count in Counter(outcome.faults).most_common())
    print(
        f"{outcome.mode.name}: {outcome.reads.total():,} reads in {outcome.seconds:.0f} s,"
        f" {outcome.stale.total():,} stale, {outcome.older:,} of {outcome.asking:,} older than their LSN,"
        f" {outcome.too_old:,} of {outcome.aged:,} too old; {outcome.left.total():,} entries left;"
        f" faults: {faults or 'none'}",
        file=sys.stderr,
        flush=True,
    )
    if outcome.mode.sound:
        for example in outcome.examples[:20]:
            print(f"  {example}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
