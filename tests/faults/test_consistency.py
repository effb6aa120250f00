"""Reads through the library while writers write: none is stale under the contract, and those of a broken one are seen.

`python -m consistency` runs the same for a million reads; see tests/consistency/README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from consistency import trial
from consistency.shelves import CACHES

if TYPE_CHECKING:
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres

READS = 5000


def test_under_the_contract_no_read_is_older_than_its_watermark_whatever_befalls(
    postgres: Postgres, tmp_path: Path
) -> None:
    outcome = trial.run(trial.CONTRACT, READS, postgres, tmp_path)
    print(outcome)
    assert outcome.examples == []
    assert outcome.left.total() == 0
    # It has had something to get wrong.
    assert outcome.reads.total() >= READS
    assert all(outcome.cached[kind.name] for kind in CACHES)
    assert outcome.entries
    assert outcome.commits
    assert outcome.dropped


@pytest.mark.parametrize("name", ["standby", "lost", "cluster"])
def test_a_read_that_asks_for_a_freshness_has_it_where_a_standby_lags_and_masters_are_lost(
    name: str, postgres: Postgres, tmp_path: Path
) -> None:
    outcome = trial.run(trial.MODES[name], READS // 2, postgres, tmp_path, faults=4)
    print(outcome)
    assert outcome.as_promised, outcome.examples
    assert {"lag", "lost_master", "planned_failover"} & set(outcome.faults)
    assert outcome.asking
    assert outcome.aged
    assert outcome.entries


def test_without_the_lease_stale_reads_are_seen(postgres: Postgres, tmp_path: Path) -> None:
    outcome = trial.run(trial.NO_LEASE, READS, postgres, tmp_path)
    print(outcome)
    assert outcome.stale["item"] > 0


def test_without_the_daemon_stale_reads_and_entries_are_seen(postgres: Postgres, tmp_path: Path) -> None:
    outcome = trial.run(trial.NO_DAEMON, READS, postgres, tmp_path)
    print(outcome)
    assert outcome.stale.total() > 0
    assert outcome.left.total() > 0
