"""The closing report of `observe` in words."""

from __future__ import annotations

from typing import Any

import pytest

from cdc_invalidator import errors
from cdc_invalidator.commands.observe import lines, report

QUIET = {"cache": "page", "rule": "page-changed", "changes": 4, "there": 3, "mended": 1, "absent": 1, "skipped": 1}
LARGE = {"cache": "list", "rule": "list-changed", "changes": 1, "there": 1, "too_large": 1}
NEVER = {"cache": "list", "rule": "row-changed", "changes": 9, "there": 0, "absent": 9}
STALE = {
    "cache": "thing",
    "rule": "thing-changed",
    "changes": 2000,
    "absent": 500,
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
    found = status(SWEPT, QUIET, LARGE, NEVER, STALE, worst=[WORST], error="denied")
    assert "\n".join(lines(report(found))) == (
        """\
observed for 60.0 min; nothing was deleted

cache page, rule page-changed: 4 changes
  1 came when nothing was cached
  1 found an entry, and the application deleted or changed it
  1 not judged: too many at once, or from a time without a connection
  1 not judged: the time was over before
  -> the application does it by itself: the rule guards against what somebody will forget

cache list, rule list-changed: 1 change
  1 not judged: the entry takes more than 256 KiB

cache list, rule row-changed: 9 changes
  9 came when nothing was cached
  -> nobody caches these, or the application deletes them at once, or spells the key otherwise:
     compare with explain KEY for a key of your Redis

cache thing, rule thing-changed: 2,000 changes
  500 came when nothing was cached
  1,350 found an entry, and the application deleted or changed it
  150 left an entry stale: 10.0% of those judged
    for 3.2 s (median), 66.7 min at most
  -> some code path forgets these keys: the rule mends them

cache page: 2 sweeps would have deleted all its entries
  -> TRUNCATE sweeps, and changes that can't name their keys: see what check says of its rules

stale for longest (1 still are)
  66.7 min  0123  cache thing, rule thing-changed, xid 7
  -> events named stale have the time of each: look there in your application's logs; CDC_LOG_KEYS=raw shows the keys

not all could be looked at: denied

next
  cdc-invalidator run: these rules mend what is left stale
    thing-changed (cache thing): 150
  cdc-invalidator teardown: if you go no further; else the slot retains WAL"""
    )


def test_a_rule_whose_keys_nobody_deletes_is_told_apart_from_one_that_some_forget() -> None:
    never = STALE | {"absent": 0, "there": 2000, "stale": 1900, "mended": 100, "stale_share": 0.95}
    assert "  -> the application does not delete these keys: the rule mends them" in lines(report(status(never)))


def test_it_says_what_to_do_where_nothing_is_stale() -> None:
    assert list(lines(report(status(NEVER))))[-3:] == [
        "next",
        "  cdc-invalidator observe: for longer, with all usual jobs; so far nothing is left stale",
        "  cdc-invalidator teardown: if you go no further; else the slot retains WAL",
    ]


def test_it_tells_that_no_change_came() -> None:
    assert list(lines(report(status())))[:2] == [
        "observed for 60.0 min; nothing was deleted",
        "  -> no change has met a rule: nobody wrote, or the rules name other tables (see explain --table)",
    ]


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
