"""The slot's server: which are refused, and with what remedy."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest

from cdc_invalidator import errors
from cdc_invalidator.postgres.slot import Slot


def slot_on(version: int, wal_level: str, *, in_recovery: bool) -> Slot:
    row = SimpleNamespace(version=version, wal_level=wal_level, in_recovery=in_recovery)
    connection = AsyncMock(pgconn=Mock())
    connection.execute.return_value.fetchall.return_value = [row]
    return Slot(connection, "s")


@pytest.mark.parametrize(
    ("version", "wal_level", "in_recovery", "remedy"),
    [
        (140022, "logical", False, "run PostgreSQL 15 or later"),
        (180001, "replica", False, "set wal_level = logical"),
        (150010, "logical", True, "point CDC_POSTGRES_DSN to the primary"),
    ],
)
async def test_a_server_that_can_t_decode_is_refused_with_what_helps(
    version: int, wal_level: str, in_recovery: bool, remedy: str
) -> None:
    with pytest.raises(errors.ServerRefuses, match=remedy):
        await slot_on(version, wal_level, in_recovery=in_recovery).server()


@pytest.mark.parametrize(("version", "in_recovery"), [(150000, False), (160000, True)])
async def test_a_server_that_can_decode_is_taken(version: int, in_recovery: bool) -> None:
    server = await slot_on(version, "logical", in_recovery=in_recovery).server()
    assert (server.version, server.in_recovery) == (version, in_recovery)
