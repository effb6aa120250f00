"""The benchmark runs: sizes that say nothing about speed, on real servers, with every key counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import identity

from cdc_invalidator.embedded.servers import Postgres

TESTS = Path(__file__).parents[1]

# Each workload with those who must be in its table.
READERS = ["raw reader, 1 ms nap", "raw reader, 0.2 ms nap", "pg_recvlogical"]
BUSTERS = ["tuned script", "tutorial's way", "cdc-invalidator"]
CONTENDERS = {
    "A": READERS + BUSTERS,
    "B": READERS + BUSTERS,
    "C": READERS + BUSTERS,
    "D": BUSTERS,
    "E": ["tuned script", "cdc-invalidator"],
    "F": ["tuned script", "cdc-invalidator"],
    "G": ["10 rules", "1,000 rules on 500 tables"],
}


def bench(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(running: subprocess.Popen[str], code: int) -> tuple[str, str]:
    with running:
        out, err = running.communicate(timeout=200)
    assert running.returncode == code, err
    return out, err


def test_every_workload_gives_figures_of_every_contender_and_leaves_no_key() -> None:
    # It fails by itself when a contender leaves a key, deletes another, or does not end.
    shortest = ["--rounds", "1", "--scale", "0.002", "--only"]
    # Side by side: it is quicker, and nobody looks at the speed.
    halves = [bench(*shortest, *"ABC"), bench(*shortest, *"DEFG")]
    reports = [said(half, 0)[0] for half in halves]
    found: dict[str, list[str]] = {}
    for report in reports:
        _, *sections = re.split(r"^\*\*(?=[A-Z]\. )", report, flags=re.MULTILINE)
        found |= {
            section[0]: re.findall(r"^\| ([^|]*[^| -]) \| .*[0-9]", section, re.MULTILINE) for section in sections
        }
    assert {name: sorted(rows) for name, rows in found.items()} == {
        name: sorted(rows) for name, rows in CONTENDERS.items()
    }


def test_what_a_contender_left_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import backlogs, contenders, keyspace, runs

    class Forgetful(contenders.Tuned):
        """It knows of no table, and so deletes nothing."""

        def environment(self, job: contenders.Job) -> dict[str, str]:
            return super().environment(job) | {"BENCH_TABLES": ""}

    monkeypatch.setattr(runs, "SECONDS", 1.0)
    monkeypatch.setattr(backlogs.SmallTransactions, "contenders", lambda _: [Forgetful()])
    with pytest.raises(keyspace.Left):
        backlogs.SmallTransactions(0.0).run(1, print)


def test_an_unknown_workload_is_refused_with_those_that_there_are() -> None:
    assert "there is no workload Z; there are A B C D E F G" in said(bench("--only", "Z"), 2)[1]


def test_the_price_of_an_identity_is_measured_and_an_index_is_the_light_way() -> None:
    with Postgres() as server:
        costs = {(cost.table, cost.change, cost.identity): cost.size for cost in identity.measure(server, rows=50)}
    for table in identity.TABLES:
        for change in identity.CHANGES:
            default, index, full = (costs[table, change, each] for each in identity.IDENTITIES)
            assert default < full
            assert index < 2.5 * default
            assert table == "narrow" or full > 10 * index
