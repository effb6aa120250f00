"""Where the messages of a byte stream from the walsender end. Pure."""

from __future__ import annotations

import struct

try:
    from cdc_invalidator.compiled import _scan
except ImportError:
    # No wheel for this platform, and no C compiler when it was installed.
    COMPILED = False
else:
    COMPILED = True

_LENGTH = struct.Struct(">I").unpack_from


def whole(data: bytes) -> int:
    """Return where the last whole CopyData message of the data ends; 0 if there is none."""
    if COMPILED:
        return _scan.whole(data)
    size, pos = len(data), 0
    while size - pos >= 5 and data[pos] == 0x64:  # d
        following: int = pos + 1 + _LENGTH(data, pos + 1)[0]
        if following > size or following < pos + 5:
            break
        pos = following
    return pos
