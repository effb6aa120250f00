"""The first sentence of the page, fault by fault."""

from __future__ import annotations

from typing import Any

import pytest

from cdc_invalidator.web.page import NOTHING
from cdc_invalidator.web.verdict import Verdict, judge, seconds, size

NOW = 1_800_000_000.0
HEALTHY: dict[str, Any] = {
    "role": "leader",
    "mode": "bust",
    "last_error": None,
    "last_error_since": None,
    "backlog_keys": 0,
    "lag_bytes": 0,
    "rules": {"last_reload": None},
}
UNPUBLISHED = {"table": "public.users", "why": "does not exist", "caches": ["user", "page"]}


def said(as_of: float | None = NOW - 1.24, hangs: str | None = None, old: bool = False, **changed: Any) -> Verdict:
    status = HEALTHY | {name: value for name, value in changed.items() if name in HEALTHY}
    view = (
        NOTHING | {"unpublished_since": None} | {name: value for name, value in changed.items() if name not in HEALTHY}
    )
    return judge(status, view, hangs=hangs, old=old, as_of=as_of, now=NOW)


@pytest.mark.parametrize(
    ("level", "start", "changed"),
    [
        ("ok", "Caches are at most 1.2 s old.", {}),
        ("wrong", "It hangs.", {"hangs": "It hangs.", "last_error": "Another"}),
        ("wrong", "Redis is away; start it.", {"last_error": "Redis is away; start it.", "role": "standby"}),
        ("wrong", "Caches may be 42 s old: the daemon is 7 keys and 2.0 MB of WAL behind.",
         {"as_of": NOW - 42, "backlog_keys": 7, "lag_bytes": 2e6}),
        ("wrong", "Changes of public.users are not seen, so that old values stay in page, user.",
         {"unpublished": [UNPUBLISHED]}),
        ("wrong", "The rule files can't be used",
         {"rules": {"last_reload": {"result": "failed", "at": "2026-11-27T20:00:00Z", "error": "r:1:1: x"}}}),
        ("ok", "Caches are at most", {"rules": {"last_reload": {"result": "ok", "at": "", "error": None}}}),
        ("busy", "Caches are at most 1.2 s old, except user: changes may have been missed (new_slot)",
         {"swept": {"user": "new_slot"}}),
        ("busy", "The daemon has not answered for a second", {"old": True}),
        ("busy", "The daemon connects", {"role": "connecting"}),
        ("busy", "Busts have begun.", {"as_of": None}),
        ("ok", "This daemon stands by", {"role": "standby", "as_of": None}),
        ("ok", "This daemon only observes", {"mode": "observe", "as_of": None}),
    ],
)  # fmt: skip
def test_each_state_has_its_sentence(level: str, start: str, changed: dict[str, Any]) -> None:
    verdict = said(**changed)
    assert (verdict.level, verdict.text[: len(start)]) == (level, start)


def test_what_is_wrong_has_its_time_and_what_follows_from_it() -> None:
    since = "2026-11-27T20:00:00.000Z"
    verdict = said(as_of=NOW - 300, last_error="Redis is away; start it.", last_error_since=since)
    assert verdict.since == since
    assert verdict.to_do == "Until that is over, caches get older: they may be 5 min old."
    assert said(unpublished=[UNPUBLISHED], unpublished_since=since).since == since
    assert said(old=True, last_error="It is away").text == "It is away"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.04, "0.0 s"), (1.24, "1.2 s"), (42.4, "42 s"), (300, "5 min"), (7300, "2.0 h")],
)
def test_durations_are_for_people(number: float, text: str) -> None:
    assert seconds(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 bytes"), (1500, "1.5 kB"), (2e6, "2.0 MB"), (5e12, "5000.0 GB")])
def test_sizes_are_for_people(number: float, text: str) -> None:
    assert size(number) == text
