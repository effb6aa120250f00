"""Measures the daemon beside what else could do its job, on servers of its own: see --help."""

from __future__ import annotations

import argparse
import sys

from bench import report, workloads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="a factor for all sizes (1)")
    parser.add_argument("--only", nargs="+", choices=[kind.name for kind in workloads.ALL], help="these workloads")
    given = parser.parse_args()
    chosen = [kind(given.scale) for kind in workloads.ALL if not given.only or kind.name in given.only]
    for workload in chosen:
        workload.run(given.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    print(report.markdown(chosen))


if __name__ == "__main__":
    main()
