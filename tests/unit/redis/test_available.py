"""How servers say that they do not have a command."""

from __future__ import annotations

import pytest
from redis import exceptions

from cdc_invalidator.redis.available import unknown


@pytest.mark.parametrize(
    "text",
    [
        "unknown command 'EVALSHA', with args beginning with: ",
        "unknown command `EVALSHA`, with args beginning with: ",
        "unknown redis command 'EVALSHA'",
        "unsupported command 'EVALSHA'",
        "Command is not available: 'EVALSHA'. See the documentation",
        "command 'evalsha' not support for normal user",
        "command 'EVALSHA' is not supported in this mode",
        "handle request, command 'EVALSHA' is not allowed",
    ],
)
def test_a_command_that_is_not_there_is_known_by_its_error(text: str) -> None:
    assert unknown(exceptions.ResponseError(text))


@pytest.mark.parametrize(
    "answer",
    [
        exceptions.ResponseError("wrong number of arguments for 'evalsha' command"),
        exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        exceptions.NoPermissionError("this user has no permissions to run the 'evalsha' command"),
        exceptions.ReadOnlyError("You can't write against a read only replica."),
        b"unknown command",
    ],
)
def test_any_other_reply_does_not_say_so(answer: object) -> None:
    assert not unknown(answer)
