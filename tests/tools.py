"""The programs that check what is in deploy/."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def missing(what: str) -> None:
    """Skip the test for want of something; in CI nothing is skipped."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def tool(name: str) -> str:
    """Find a program, first beside this Python (where the `dev` extra puts it), then on PATH."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        missing(f"{name} is not installed here")
    return str(found)
