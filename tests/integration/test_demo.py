"""`cdc-invalidator demo`: what it prints is what a newcomer sees first."""

from __future__ import annotations

import re
import signal
import subprocess
import sys


def test_the_demo_observes_stale_entries_without_busts_and_counts_none_with_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cdc_invalidator", "demo", "--seconds", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"stale entries in the cache\W+(\d+) of (\d+)\W+(\d+) of (\d+)", done.stdout)
    assert found, done.stdout
    # By rule and cache: the changes, how many of them met an entry, and how many left it stale.
    observed = re.findall(r"^ *([\w-]+) +([\w-]+) +(\d+) +(\d+) +(\d+) *$", done.stdout, re.MULTILINE)
    assert observed, done.stdout
    assert all(int(changes) >= int(met) >= int(stale) > 0 for _, _, changes, met, stale in observed)
    without, entries, with_daemon, others = map(int, found.groups())
    assert 0 < without <= entries
    assert with_daemon == 0
    assert others > 0
    assert done.stderr == ""


def test_the_demo_ends_on_ctrl_c_and_says_so() -> None:
    command = [sys.executable, "-u", "-m", "cdc_invalidator", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout
        assert demo.stdout.readline().startswith("Starting")
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert said.endswith("Stopped.\n")
