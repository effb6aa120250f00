"""The consistency check's table: whole in every row, and in its page where the markers are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from consistency import report, trial

README = Path(report.__file__).with_name("README.md")


def outcomes() -> list[trial.Outcome]:
    sound = trial.Outcome(trial.CONTRACT, Counter(item=1200, page=34), Counter(item=1000), entries=7, faults=["cut"])
    sound.asking, sound.aged = 50, 20
    broken = trial.Outcome(trial.NO_LEASE, Counter(item=5), Counter(item=4), Counter(item=3), Counter(item=2))
    return [sound, broken]


def test_each_mode_has_a_row_and_each_cache_of_the_contract() -> None:
    _, _, head, rule, *rows, _, sums = report.markdown(outcomes(), "servers").splitlines()
    assert "0 of 1,234 reads were stale, under 1 faults" in sums
    assert "0 of 50 reads with an LSN and 0 of 20 with an age" in sums
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert [row.split("|")[1].strip() for row in rows] == [trial.CONTRACT.name, "… item", "… page", trial.NO_LEASE.name]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == [
        "1,234", "1,000", "234", "0", "0", "1", "**0**", "**0** of 50", "**0** of 20", "**0** of 7"
    ]  # fmt: skip
    assert "**3**" in rows[3]


def test_of_a_redis_that_fails_over_only_what_is_promised_counts() -> None:
    after = trial.Outcome(trial.LOST, stale=Counter(item=5))
    assert after.as_promised
    assert not trial.Outcome(trial.CONTRACT, stale=Counter(item=5)).as_promised
    for wrong in (
        trial.Outcome(trial.LOST, older=1),
        trial.Outcome(trial.LOST, too_old=1),
        trial.Outcome(trial.LOST, left=Counter(item=1)),
    ):
        assert not wrong.as_promised
    assert trial.Outcome(trial.NO_LEASE, stale=Counter(item=5)).as_promised
    assert not trial.Outcome(trial.NO_LEASE).as_promised


def test_the_table_goes_between_the_markers_of_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    report.into_readme("here\n", readme)
    assert "<!-- consistency -->\nhere\n<!-- /consistency -->" in readme.read_text()


def test_without_markers_it_says_so(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(LookupError, match="consistency"):
        report.into_readme("here\n", readme)
