"""The proxy of the fault tests knows where a command or a reply ends."""

from __future__ import annotations

import pytest
from resp import _end, _words

FRAMES = [
    b"+OK\r\n",
    b"-READONLY no\r\n",
    b":-12\r\n",
    b"$-1\r\n",
    b"$0\r\n\r\n",
    b"$10\r\n*2\r\n$1\r\n\r\n\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"*3\r\n:1\r\n*2\r\n$1\r\na\r\n*1\r\n*0\r\n$-1\r\n",
    b"%1\r\n+a\r\n*1\r\n_\r\n",
    b">2\r\n+invalidate\r\n~1\r\n$1\r\na\r\n",
    b"|1\r\n+ttl\r\n:1\r\n=7\r\ntxt:abc\r\n",
]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_ends_where_it_ends_whatever_follows_it(frame: bytes) -> None:
    for before, after in ((b"", b""), (b"+x\r\n", b"*1\r\n"), (b"", frame)):
        assert _end(before + frame + after, len(before)) == len(before + frame)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_cut_anywhere_is_not_complete(frame: bytes) -> None:
    assert [_end(frame[:size], 0) for size in range(len(frame))] == [0] * len(frame)


def test_a_command_is_an_array_of_words_or_a_line() -> None:
    assert _words(b"*3\r\n$3\r\nSET\r\n$0\r\n\r\n$4\r\n\r\n$1\r\n") == [b"SET", b"", b"\r\n$1"]
    assert _words(b"PING a\r\n") == [b"PING", b"a"]
