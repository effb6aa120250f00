"""Reads `--keys`: a key a line, as `redis-cli --scan` prints them. Pure.

Type and remaining seconds of the key follow after tabs, where they are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cdc_invalidator import errors
from cdc_invalidator.discovery.families import Sample
from cdc_invalidator.discovery.sampling import LONGEST_NAME


def read_keys(lines: Iterable[bytes], name: str, most: int) -> Iterator[Sample]:
    """Yield the keys of a file, at most ``most`` of them; 0 for all. Empty lines count for nothing.

    Args:
        lines: its lines.
        name: its name, for errors.
        most: how many keys.

    Raises:
        errors.WrongSettings: a line has more columns, or a time that is no number; the line is named, not shown.
    """
    count = 0
    for number, line in enumerate(lines, 1):
        key, *columns = line.rstrip(b"\r\n").split(b"\t")
        if not key or len(key) > LONGEST_NAME:
            continue
        kind = columns[0].decode("ascii", "replace") if columns else ""
        try:
            ttl = float(columns[1]) if columns[1:] and columns[1] else None
        except ValueError:
            ttl = float("nan")
        if len(columns) > 2 or ttl != ttl or not (kind.isidentifier() or not kind):  # noqa: PLR0124  not a number
            raise errors.WrongSettings(
                f"{name}:{number}: this is not a key, or a key, its type and its remaining seconds with tabs between "
                "them; write one key a line, as redis-cli --scan prints them."
            )
        yield Sample(key, kind, ttl if ttl is not None and ttl >= 0 else None)
        count += 1
        if count == most:
            return
