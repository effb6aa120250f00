"""The reader's two shells are one text."""

from __future__ import annotations

import runpy

from paths import ROOT


def test_the_shell_that_waits_is_made_of_the_one_that_awaits() -> None:
    made = runpy.run_path(str(ROOT / ".build" / "unasync.py"))
    text = made["unasync"](made["SOURCE"].read_text())
    assert made["MADE"].read_text() == text, "run .venv/bin/python .build/unasync.py"
