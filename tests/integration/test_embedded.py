"""The embedded servers, when the process that started them is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import eventually

START = """
import time
from cdc_invalidator.embedded import process, servers
with servers.{kind}() as server:
    print(process.scratch(), server.pid, flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("kind", ["Postgres", "Valkey"])
def test_with_a_process_that_is_killed_its_servers_end_and_their_folder_goes(kind: str) -> None:
    with subprocess.Popen([sys.executable, "-c", START.format(kind=kind)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder, pid = owner.stdout.readline().split()
        assert Path(folder).is_dir()
        owner.kill()
    eventually(lambda: not Path("/proc", pid).exists(), "the server has ended")
    eventually(lambda: not Path(folder).exists(), "the folder is removed")
