"""Measures what CDC_VERIFY_SAMPLE costs: the daemon's CPU a change with it and without it, in turns on one backlog.

cd tests; python -m bench.verifying --rounds 15
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from bench.backlogs import SmallTransactions
from bench.contenders import Contender, Daemon, Job
from bench.measure import median
from bench.workloads import rules_for

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARES = ("0", "0.01")


class Verifying(Daemon):
    """The daemon with one CDC_VERIFY_SAMPLE."""

    def __init__(self, rules: str, share: str) -> None:
        super().__init__(rules, f"CDC_VERIFY_SAMPLE={share}")
        self._share = share

    def environment(self, job: Job) -> dict[str, str]:
        return super().environment(job) | {"CDC_VERIFY_SAMPLE": self._share}


class Shares(SmallTransactions):
    """The backlog of workload A."""

    def contenders(self) -> list[Contender]:
        return [Verifying(rules_for(self.ruled), share) for share in SHARES]


def ratios(without: Sequence[float], sampled: Sequence[float]) -> list[float]:
    """Return the ratio of each round: what disturbed a round disturbed both."""
    return [more / less for less, more in zip(without, sampled, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.verifying", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--scale", type=float, default=3.0, metavar="X", help="times 100,000 changes (3)")
    given = parser.parse_args()
    workload = Shares(given.scale)
    workload.run(given.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    without, sampled = ([run.cpu for run in workload.results[f"CDC_VERIFY_SAMPLE={share}"]] for share in SHARES)
    each = sorted(ratios(without, sampled))
    print(f"{workload.changes:,} changes, {given.rounds} rounds")
    print(f"CPU a change, ratio of the medians: {median(sampled) / median(without):.3f}")
    print(f"ratio in each round: median {median(each):.3f}, from {each[0]:.3f} to {each[-1]:.3f}")
    print(f"ratio of the least: {min(sampled) / min(without):.3f}")


if __name__ == "__main__":
    main()
