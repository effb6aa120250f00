"""The names of the keys beside a key."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from cdc_invalidator.rules.suffixes import BESIDE, BESIDE_AND_OLD, Beside, split_suffix


@pytest.mark.parametrize(
    ("key", "base", "suffix"),
    [
        (b"user:42", b"user:42", b""),
        (b"user:42\0lock", b"user:42", b"\0lock"),
        (b"user:42\0stale", b"user:42", b"\0stale"),
        (b"user:42\0stale\0lock", b"user:42\0stale", b"\0lock"),
        (b"user:lock:42", b"user:lock:42", b""),
        (b"\0stale", b"", b"\0stale"),
        (b"page:home:lock", b"page:home:lock", b""),
        (b"page:home:stale", b"page:home:stale", b""),
    ],
)
def test_a_key_is_split_at_what_only_the_name_of_a_key_beside_it_has(key: bytes, base: bytes, suffix: bytes) -> None:
    assert split_suffix(key) == (base, suffix)


@pytest.mark.parametrize(
    ("beside", "key", "locks"),
    [
        (BESIDE, b"page:home", [b"page:home\0lock"]),
        (BESIDE_AND_OLD, b"page:home", [b"page:home\0lock", b"page:home:lock"]),
        (BESIDE_AND_OLD, b"page:home:lock", [b"page:home:lock\0lock", b"page:home:lock:lock"]),
    ],
)
def test_each_lock_of_a_key_is_found_and_read_back(beside: Beside, key: bytes, locks: list[bytes]) -> None:
    assert beside.locks_of([key]) == locks
    assert [beside.locked(lock) for lock in locks] == [key] * len(locks)
    assert all(fnmatchcase(lock.decode(), f"page:*{beside.locks_glob.decode()}") for lock in locks)
