"""Log sequence numbers and PostgreSQL's clock: how they are read and printed. Inside, an LSN is an int everywhere."""

from __future__ import annotations

import re

# PostgreSQL counts microseconds from 2000-01-01 00:00 UTC, Unix from 1970-01-01.
EPOCH_OFFSET_US = 946_684_800_000_000

NEVER = 2**64 - 1
"""An LSN that no WAL reaches."""

# int() alone would also take signs, blanks, underscores and 0x.
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse(text: str) -> int:
    """Read PostgreSQL's form of an LSN.

    Args:
        text: two hexadecimal numbers of at most 32 bits, as in ``16/B374D848``.

    Returns:
        The byte position in the WAL.

    Raises:
        ValueError: the text has another form.
    """
    found = _LSN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not an LSN; write it as in 16/B374D848.")
    return int(found[1], 16) << 32 | int(found[2], 16)


def text(lsn: int) -> str:
    """Give the LSN as PostgreSQL prints it: ``16/B374D848``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def unix_us(postgres_us: int) -> int:
    """Turn microseconds since 2000 (PostgreSQL) into microseconds since 1970 (Unix)."""
    return postgres_us + EPOCH_OFFSET_US
