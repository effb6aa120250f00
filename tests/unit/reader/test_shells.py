"""The reader's two shells are one text."""

from __future__ import annotations

import runpy

from paths import ROOT


def test_the_shell_that_waits_is_made_of_the_one_that_awaits() -> None:
    script = runpy.run_path(str(ROOT / ".build" / "unasync.py"))
    for source, made in script["PAIRS"].items():
        text = script["unasync"](source.read_text(), made)
        assert made.read_text() == text, "run .venv/bin/python .build/unasync.py"


def test_each_change_between_them_is_needed() -> None:
    """Else a line that it was for stands there unchanged, perhaps in other words."""
    script = runpy.run_path(str(ROOT / ".build" / "unasync.py"))
    assert script["unused"]() == []
