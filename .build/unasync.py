"""Makes the reader's shell that waits of the one that awaits: sync.py of aio.py, and sync_servers.py of aio_servers.py.

Run it after a change of these: ``.venv/bin/python .build/unasync.py``. A test holds the files against each other.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
READER = ROOT / "cdc_invalidator" / "reader"
PAIRS = {READER / "aio.py": READER / "sync.py", READER / "aio_servers.py": READER / "sync_servers.py"}

# In this order; the first are of code, the others of what is said about it.
CHANGES = (
    (r"\baio_servers\b", "sync_servers"),
    (r"await _turn\((turns), (CONNECTION_SECONDS)\)", r"\1.acquire(timeout=\2)"),
    (r"\n\n\nasync def _turn\(.*?(?=\n\n\n|\n\Z)", ""),
    (r"async with asyncio\.timeout\(self[^()]*\):", "with nullcontext():"),
    (r"^from contextlib import suppress$", "from contextlib import nullcontext, suppress"),
    (r" {8}self\._loops: .*?\n", ""),
    (r"self\._here: [^\n]*\n", "self._way = self._new_way()\n"),
    (r" {8}loop, way = self\._here\n.*?(?=\n\n    def _new_way)", "        return self._way"),
    (r"\n\n    def _enter\(.*?(?=\n\n    def one)", ""),
    (r"commands, of the running event loop\.", "commands."),
    (r" of the running event loop; (a later|they are)", r"; \1"),
    (r"they are closed with it in any case", "a later read opens others"),
    (r"\n\n\nasync def _until_the_end\(.*?(?=\n\n\n)", ""),
    (r"Flights\(asyncio\.Event, asyncio\.get_running_loop\)", "Flights(threading.Event, os.getpid)"),
    (r"\baclose\b", "close"),
    (r"\bawaits=True\b", "awaits=False"),
    (r"\bvalkey\.asyncio\b", "valkey"),
    (r", in each event loop that reads\.", "."),
    (r"\bdisconnect\(nowait=True\)", "disconnect()"),
    (r" {8}if connection\.is_connected:\n[^\n]*abort\(\)[^\n]*\n", ""),
    (
        r"All of it belongs to one event loop\.",
        "All of it may be shared by threads.\n\nMade of aio_servers.py by .build/unasync.py; change that.",
    ),
    (r"await _awaited\((chosen\([^()]*\))\)", r"handle.at_hand(\1)"),
    (r"\n\n\nasync def _awaited\(.*?(?=\n\n\n)", ""),
    (r"await _happened\((effect\.event), (effect\.seconds)\)", r"\1.wait(\2)"),
    (r"\n\n\nasync def _happened\(.*?(?=\n\n\n)", ""),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"\basyncio\.Semaphore", "threading.Semaphore"),
    (r"^import asyncio$", "import threading"),
    (r"\bredis\.asyncio\b", "redis"),
    (r"\baown_view\b", "own_view"),
    (r"Awaitable\[(T \| None|Many\[T\])\] \| ", ""),
    (r"Awaitable\[(Sequence\[Any\])\]", r"\1"),
    (r"\basync (?=def |with |for )", ""),
    (r"\bawait ", ""),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsync(?=Iterator|Caches?\b|Write\b|Follower\b|Keeper\b|Memory\b|Crew\b|Decorator\b)", ""),
    (r"(the shell that )awaits\.", r"\1waits.\n\nMade of aio.py by .build/unasync.py; change that.\n"),
    (r"\n    They may be coroutine functions\.", ""),
    (r"a coroutine function", "a function"),
    (r"It may be shared by event loops: each has [^\n]*", "It may be shared by threads."),
)


def unasync(text: str, made: Path) -> str:
    """Give the text of a module without its awaiting."""
    for pattern, replacement in CHANGES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
    text = _ruff(text, made, "check", "--select=I,F401", "--fix", "--quiet")
    return _ruff(text, made, "format")


def unused() -> list[str]:
    """Give the patterns that nothing is like any more."""
    texts = [source.read_text() for source in PAIRS]
    return [
        pattern
        for pattern, _ in CHANGES
        if not any(re.search(pattern, text, flags=re.MULTILINE | re.DOTALL) for text in texts)
    ]


def _ruff(text: str, made: Path, *words: str) -> str:
    command = [Path(sysconfig.get_path("scripts"), "ruff"), *words, f"--stdin-filename={made}", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603  ruff
    return done.stdout


if __name__ == "__main__":
    for source, made in PAIRS.items():
        made.write_text(unasync(source.read_text(), made))
