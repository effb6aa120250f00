"""A file of keys: a key a line, with its type and seconds where they are known."""

from __future__ import annotations

import pytest

from cdc_invalidator import errors
from cdc_invalidator.discovery.families import Sample
from cdc_invalidator.discovery.keyfile import read_keys


def test_a_line_is_a_key_and_what_follows_tabs_its_type_and_its_seconds() -> None:
    lines = [
        b"user:1\n",
        b"user 2\thash\r\n",
        b"user:3\tstring\t60\n",
        b"user:4\tset\t-1\n",
        b"\n",
        b"\xff\t\t1.5\n",
        b"x" * 600,
    ]
    assert list(read_keys(lines, "keys.txt", 0)) == [
        Sample(b"user:1"),
        Sample(b"user 2", "hash"),
        Sample(b"user:3", "string", 60.0),
        Sample(b"user:4", "set"),
        Sample(b"\xff", "", 1.5),
    ]


def test_no_more_are_read_than_wanted() -> None:
    assert len(list(read_keys([b"a\n", b"b\n", b"c"], "keys.txt", 2))) == 2


@pytest.mark.parametrize(
    "line", [b"secret\tstring\tsoon", b"secret\tstring\t1\tmore", b"secret\t1) x", b"secret\tstring\tnan"]
)
def test_a_wrong_line_is_named_and_not_shown(line: bytes) -> None:
    with pytest.raises(errors.WrongSettings) as wrong:
        list(read_keys([b"user:1\n", line], "keys.txt", 0))
    assert str(wrong.value).startswith("keys.txt:2: this is not a key")
    assert "secret" not in str(wrong.value)
