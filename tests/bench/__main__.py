"""Measures the daemon beside what else could do its job, on servers of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import report
from bench.backlogs import FewRuled, HugeTransaction, LargeTransaction, ManyRules, SmallTransactions
from bench.live import Idle, LastKey, Latency

README = Path(__file__).with_name("README.md")
USUAL = (SmallTransactions, LargeTransaction, FewRuled, Latency, LastKey, Idle, ManyRules)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each contender runs (3)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="a factor for all sizes (1)")
    parser.add_argument("--only", nargs="+", metavar="LETTER", help="these workloads: " + _names())
    parser.add_argument(
        "--huge", action="store_true", help="also H: a transaction of 5,000,000 rows, some 5 GB of disk"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, not to the terminal")
    parser.add_argument("--readme", action="store_true", help="put the report into tests/bench/README.md as well")
    given = parser.parse_args()
    if unknown := set(given.only or ()) - {kind.name for kind in USUAL}:
        parser.error(f"there is no workload {', '.join(sorted(unknown))}; there are {_names()}")
    return given


def _names() -> str:
    return " ".join(kind.name for kind in USUAL)


def main() -> None:
    given = _arguments()
    chosen = [kind for kind in USUAL if not given.only or kind.name in given.only]
    workloads = [kind(given.scale) for kind in [*chosen, *([HugeTransaction] if given.huge else [])]]
    for workload in workloads:
        workload.run(given.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    text = report.markdown(workloads, given.rounds)
    if given.output:
        given.output.write_text(text)
    else:
        print(text, end="")
    if given.readme:
        report.into_readme(text, README)


if __name__ == "__main__":
    main()
