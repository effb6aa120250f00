"""The names of the keys beside a key."""

from __future__ import annotations

import pytest

from cdc_invalidator.rules.suffixes import split_suffix


@pytest.mark.parametrize(
    ("key", "base", "suffix"),
    [
        (b"user:42", b"user:42", b""),
        (b"user:42:lock", b"user:42", b":lock"),
        (b"user:42:stale", b"user:42", b":stale"),
        (b"user:42:stale:lock", b"user:42:stale", b":lock"),
        (b"user:lock:42", b"user:lock:42", b""),
        (b":stale", b"", b":stale"),
    ],
)
def test_a_key_is_split_at_a_reserved_suffix(key: bytes, base: bytes, suffix: bytes) -> None:
    assert split_suffix(key) == (base, suffix)
