"""What a test reads of a daemon's output: whole lines, and a half only of one that was killed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from running import RunningDaemon, eventually

if TYPE_CHECKING:
    from pathlib import Path

WRITES = """
import sys, time
print('{"event": "started"}\\n{"event": "bu', end='', flush=True)
%s
"""


def daemon_that(ends: str, rules: Path) -> RunningDaemon:
    daemon = RunningDaemon(dsn="", redis_url="", rules=rules, slot="")
    daemon.command = [sys.executable, "-c", WRITES % ends]
    return daemon


def test_a_killed_daemon_may_leave_half_a_line(tmp_path: Path) -> None:
    with daemon_that("time.sleep(60)", tmp_path) as daemon:
        daemon.seen("started")
    assert daemon.events == [{"event": "started"}]


def test_any_other_end_with_half_a_line_is_a_failure(tmp_path: Path) -> None:
    with daemon_that("sys.exit(0)", tmp_path) as daemon:
        eventually(lambda: daemon.process.poll() is not None, "it ends")
        with pytest.raises(AssertionError, match='"bu'):
            daemon.wait()
