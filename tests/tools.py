"""Programs that tests need beside the servers: those that check what is in deploy/, and PgBouncer."""

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
    found = find(name)
    if found is None:
        missing(f"{name} is not installed here")
    return str(found)


def find(name: str) -> str | None:
    """Find a program; None if it is not installed."""
    # A user's PATH may lack /usr/sbin.
    paths = (Path(sys.executable).parent, None, "/usr/sbin")
    return next(filter(None, (shutil.which(name, path=path) for path in paths)), None)
