"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "cdc_invalidator"
PGOUTPUT_MESSAGES: Final = ROOT / "tests" / "unit" / "postgres" / "pgoutput_messages.jsonl"
"""What real servers sent: see ``record_pgoutput.py`` beside it."""
