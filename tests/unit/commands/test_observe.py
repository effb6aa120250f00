"""The closing report of `observe` in words."""

from __future__ import annotations

from typing import Any

import pytest

from cdc_invalidator import errors
from cdc_invalidator.commands.observe import lines, report

QUIET = {"cache": "page", "rule": "page-changed", "changes": 2, "there": 1, "mended": 1, "absent": 1, "skipped": 1}
STALE = {
    "cache": "thing",
    "rule": "thing-changed",
    "changes": 2000,
    "there": 1500,
    "stale": 150,
    "mended": 1350,
    "stale_share": 0.1,
    "stale_median_s": 3.25,
    "stale_max_s": 4000.0,
}
SWEPT = {"cache": "page", "rule": "", "sweeps": 2}
WORST = {"rule": "thing-changed", "cache": "thing", "key_hashes": ["0123"], "xid": 7, "stale_s": 4000.0}


def status(*caches: dict[str, Any], **more: Any) -> dict[str, Any]:
    observed = {"observed_s": 3600.0, "caches": list(caches), "stale_now": 1, "worst": [], "error": None}
    return {"role": "leader", "slot": "s", "last_error": None, "observed": observed | more}


def test_it_tells_what_is_stale_and_which_rule_mends_it() -> None:
    assert "\n".join(lines(report(status(SWEPT, QUIET, STALE, worst=[WORST], error="denied")))) == (
        """\
observed for 60.0 min

cache page, rule page-changed:
  2 keys changed, 1 of them were there
  none was left stale: the application mended 1
  1 were not looked at

cache thing, rule thing-changed:
  2,000 keys changed, 1,500 of them were there
  150 were left stale (10.0% of those judged): median 3.2 s, longest 66.7 min
cache page would have been swept 2 times

stale for longest (1 are stale now):
  66.7 min  0123  cache thing, rule thing-changed, xid 7

with CDC_MODE=bust, these rules mend them:
  thing-changed (cache thing): 150

not all could be looked at: denied"""
    )


def test_it_tells_that_no_change_came() -> None:
    assert list(lines(report(status()))) == ["observed for 60.0 min", "no change has met a rule"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"last_error": "It is away."}, "It is away."),
        ({"role": "standby"}, "another daemon has the slot s, give CDC_SLOT another name."),
        ({}, "the time was over"),
    ],
)
def test_it_tells_why_nothing_was_observed(more: dict[str, Any], why: str) -> None:
    with pytest.raises(errors.InvalidatorError, match=f"^Nothing was observed: {why}"):
        report(status(observed_s=None) | more)
