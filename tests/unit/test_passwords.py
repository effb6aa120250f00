"""Passwords made of signs, put into addresses as they are: read as meant or refused, and no piece is anywhere else."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.asyncio.connection import parse_url

from cdc_invalidator import errors
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.standbys import name
from cdc_invalidator.redis.endpoint import Address
from cdc_invalidator.redis.source import EndpointSource

PIECES = ("Zq9xW7", "kTr4Yb", "Jm2vQd")
SIGNS = st.text("@/?#:[]%&=+;,'\"\\ $!|<>{}()*~^`.-_\t\n\x1b\x7f", max_size=4)
PASSWORDS = st.tuples(SIGNS, SIGNS, SIGNS, SIGNS).map(
    lambda signs: signs[0] + "".join(piece + some for piece, some in zip(PIECES, signs[1:], strict=True))
)


def beside_postgres(address: str) -> Iterable[Any]:
    """Return all but the password that is read of an address: it may be shown, sent to DNS, or be a label."""
    dsn = DsnSource.fixed(address).now()
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    parts.pop("password", None)
    shown = [*parts, *parts.values()]
    return [*shown, name(dsn)] if "://" in dsn else shown


def beside_redis(address: str) -> Iterable[Any]:
    """As `beside_postgres`, of Redis."""
    endpoint = EndpointSource.fixed(address).now()
    urls = [endpoint.url]
    if endpoint.kind != "server":
        where = Address("10.0.0.1", 7000)
        urls = [endpoint.at(where), endpoint.of_sentinel(where)]
    shown: list[Any] = [endpoint, *endpoint.addresses, endpoint.service]
    for url in urls:
        parts = parse_url(url)
        parts.pop("password", None)
        shown += [*parts, *parts.values()]
    return shown


FORMS: dict[str, Callable[[str], Iterable[Any]]] = {
    "postgresql://cdc:{}@db.example:5432/shop": beside_postgres,
    "postgresql://cdc:{}@db.example/shop?sslmode=require": beside_postgres,
    "postgresql://cdc:{}@a.example,b.example": beside_postgres,
    "postgresql://db.example/shop?user=cdc&password={}": beside_postgres,
    "host=db.example user=cdc password={} dbname=shop": beside_postgres,
    "host=db.example user=cdc password='{}' dbname=shop": beside_postgres,
    "redis://cdc:{}@cache.example:6379/0": beside_redis,
    "redis://:{}@cache.example": beside_redis,
    "rediss://cdc:{}@cache.example/0?ssl_ca_certs=/ca.pem": beside_redis,
    "unix://:{}@/run/valkey.sock": beside_redis,
    "redis+sentinel://cdc:{}@a.example,b.example:26380/service/0": beside_redis,
    "redis+sentinel://a.example/service?sentinel_username=cdc&sentinel_password={}": beside_redis,
    "redis+cluster://cdc:{}@a.example:7000,b.example": beside_redis,
}


@pytest.mark.parametrize("form", FORMS)
@given(PASSWORDS)
@example("Zq9xW7@kTr4Yb/Jm2vQd")
@example("Zq9xW7/kTr4Yb@Jm2vQd")
@example("12/Zq9xW7?kTr4Yb=1&Jm2vQd")
@example("Zq9xW7[kTr4Yb]Jm2vQd")
@example("Zq9xW7' kTr4Yb='Jm2vQd")
@example("Zq9xW7#kTr4Yb:Jm2vQd")
@example("12/Zq9xW7?user=kTr4YbJm2vQd")
@example("Zq9xW7?password=kTr4YbJm2vQd")
@example("Zq9xW7 host=kTr4Yb Jm2vQd")
@example("Zq9xW7 host=kTr4YbJm2vQd")
@example("12,Zq9xW7:34@kTr4Yb,Jm2vQd")
def test_no_piece_of_a_password_is_read_as_anything_else_or_shown(form: str, password: str) -> None:
    try:
        shown = FORMS[form](form.format(password))
    except errors.WrongSettings as wrong:
        shown = traceback.format_exception(wrong)
    texts = [str(part) for part in shown]
    assert [piece for piece in PIECES if any(piece in text for text in texts)] == []
