"""Makes the reader's shell that waits of the one that awaits: reader/sync.py of reader/aio.py.

Run it after a change of `aio`: ``.venv/bin/python .build/unasync.py``. A test holds the files against each other.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
READER = ROOT / "cdc_invalidator" / "reader"
SOURCE, MADE = READER / "aio.py", READER / "sync.py"

# In this order; the first are of code, the others of what is said about it.
CHANGES = (
    (r"await _awaited\((load\([^()]*\))\)", r"\1"),
    (r"\n\n\nasync def _awaited\(.*?(?=\n\n\n)", ""),
    (r"await _happened\((effect\.event), (effect\.seconds)\)", r"\1.wait(\2)"),
    (r"\n\n\nasync def _happened\(.*?(?=\n\n\n)", ""),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"\basyncio\.Event", "threading.Event"),
    (r"\basyncio\.Semaphore", "threading.Semaphore"),
    (r"^import asyncio$", "import threading"),
    (r"\bredis\.asyncio\b", "redis"),
    (r"\baown_view\b", "own_view"),
    (r"Awaitable\[(T \| None|Many\[T\])\] \| ", ""),
    (r"Awaitable\[(Sequence\[Any\])\]", r"\1"),
    (r"\basync (?=def |with |for )", ""),
    (r"\bawait ", ""),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsync(?=Iterator|Caches?\b|Write\b|Follower\b|Keeper\b|Memory\b)", ""),
    (r"(the shell that )awaits\.", r"\1waits.\n\nMade of aio.py by .build/unasync.py; change that.\n"),
    (r"\n    They may be coroutine functions\.", ""),
    (r"a coroutine function", "a function"),
    (r"It belongs to the event loop that its client belongs to\.", "It may be shared by threads, as the client may."),
)


def unasync(text: str) -> str:
    """Give the text of a module without its awaiting."""
    for pattern, replacement in CHANGES:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
        if not count:
            raise ValueError(f"nothing in {SOURCE.name} is like {pattern!r}; change the list of changes with it")
    text = _ruff(text, "check", "--select=I,F401", "--fix", "--quiet")
    return _ruff(text, "format")


def _ruff(text: str, *words: str) -> str:
    command = [Path(sysconfig.get_path("scripts"), "ruff"), *words, f"--stdin-filename={MADE}", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603  ruff
    return done.stdout


if __name__ == "__main__":
    MADE.write_text(unasync(SOURCE.read_text()))
