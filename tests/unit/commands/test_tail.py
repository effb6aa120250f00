"""`tail` without a Redis: which events it shows, since when, and that they do nothing to a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from cdc_invalidator import errors
from cdc_invalidator.commands import event_stream
from cdc_invalidator.commands.event_stream import EVER
from cdc_invalidator.commands.tail import Wanted, _printable, read_since

BUST = {"event": "bust", "cache": "user", "rule": "changed"}
SWEEP = {"event": "bust", "cache": "user", "rule": None}
GAP = {"event": "gap", "caches": ["dash", "user"]}


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        (Wanted(), [BUST, SWEEP, GAP]),
        (Wanted(cache="user"), [BUST, SWEEP, GAP]),
        (Wanted(cache="dash"), [GAP]),
        (Wanted(rule="changed"), [BUST]),
        (Wanted("user", "changed"), [BUST]),
        (Wanted("dash", "changed"), []),
    ],
)
def test_events_of_a_cache_or_a_rule_are_shown_and_a_gap_is_of_all_its_caches(
    wanted: Wanted, shown: list[dict[str, Any]]
) -> None:
    assert [event for event in (BUST, SWEEP, GAP) if event in wanted] == shown


def test_since_is_a_duration_or_all() -> None:
    assert read_since(None) == 0
    assert read_since("90s") == 90_000
    assert read_since("all") == EVER
    with pytest.raises(errors.WrongSettings, match=r"^--since: `soon` is not a duration; write .* or all\.$"):
        read_since("soon")


def test_a_text_that_would_move_the_cursor_is_shown_with_escapes() -> None:
    shown = _printable({"table": "public.\x1b[2Jusers", "keys": 1, "cache": "ä user", "\x1b]": [b"\x1b"]})
    assert shown == {"table": repr("public.\x1b[2Jusers"), "keys": 1, "cache": "ä user", r"\x1b]": [b"\x1b"]}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nothing",
        "[]",
        '{"level": "info"}',
        '{"event": 5}',
        '{"event": "gap", "caches": 5}',
        '{"event": "gap", "caches": [5]}',
        '{"event": "bust", "cache": ["user"]}',
        '{"event": "bust", "level": 5}',
        '{"event": "bust", "key_hashes": null}',
    ],
)
def test_what_others_have_written_is_passed_over(line: str) -> None:
    ours = b'{"event": "bust", "cache": "user", "rule": null, "key_hashes": ["x"]}'
    found = [(b"1-0", [b"event", line.encode()]), (b"2-0", [b"else", ours]), (b"3-0", [b"event", ours])]
    assert [entry.id for entry in event_stream._entries(found)] == ["3-0"]
