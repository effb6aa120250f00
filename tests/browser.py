"""A real browser without a screen: what it makes of a page, as text of its DOM and as a picture."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

SECONDS = 120


@functools.cache
def chromium() -> str:
    """Return the browser's command; skip where there is none, and fail in CI."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    reason = "there is no chromium on PATH (Debian's package chromium)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(
    url: str,
    *flags: str,
    milliseconds: int = 1000,
    quiet: bool = True,
) -> str:
    with TemporaryDirectory(prefix="chromium-") as profile:
        # Virtual time: the page's own timers run as fast as its fetches allow.
        patience = [f"--virtual-time-budget={milliseconds}"]
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"]
        words = [*command, "--hide-scrollbars", f"--user-data-dir={profile}", *patience, *flags, url]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)
        # What the page's policy forbids, or its script trips over, is told here.
        told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not (quiet and told), told
        return done.stdout


def dom(url: str, *, milliseconds: int = 1000, quiet: bool = True) -> str:
    """Return the page as HTML, after its scripts have run for so long; ``quiet``: its console must stay empty."""
    flags = ["--dump-dom", "--enable-logging=stderr"]
    return _run(url, *flags, milliseconds=milliseconds, quiet=quiet)


def picture(url: str, path: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Write a screenshot as PNG."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={width},{height}"
    _run(url, f"--screenshot={path}", size, scheme)
    assert path.read_bytes().startswith(b"\x89PNG")
