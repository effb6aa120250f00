"""The two ways to read the stream, by the socket and by libpq where TLS encrypts it: both bring and report the same."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from psycopg.conninfo import make_conninfo
from running import RunningDaemon, confirmed, execute, settled, wal_position

from cdc_invalidator import errors
from cdc_invalidator.embedded.process import HOST, give_to_nobody, scratch
from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.replication import COPY, Keepalive, Replication

if TYPE_CHECKING:
    import redis

RULES = """
version: 1
caches:
  page: {key: "page:{id}"}
rules:
  - {name: page-changed, table: public.pages, bust: [page]}
"""
WAYS = {"tcp": "_Socket", "unix": "_Socket", "tls": "_Libpq"}
LARGE = 20_000_000
Connect = Callable[[str], str]


def speaks_tls(bin_dir: Path) -> bool:
    return b"libssl" in (bin_dir / "postgres").read_bytes()


@pytest.fixture(scope="module")
def tls_server() -> Iterator[Postgres]:
    """The newest PostgreSQL here that is built with TLS; it asks nobody to use it."""
    able = [folder for _, folder in sorted(postgres_bin_dirs().items()) if speaks_tls(folder)]
    if not able:
        pytest.skip("no PostgreSQL here is built with TLS")
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    certificate = trustme.CA().issue_cert(HOST)
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    (folder / "key.pem").chmod(0o600)
    give_to_nobody(folder)
    settings = {"ssl": "on", "ssl_cert_file": str(folder / "cert.pem"), "ssl_key_file": str(folder / "key.pem")}
    with Postgres(bin_dir=able[-1], settings=settings) as server:
        yield server


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dsn(tls_server: Postgres, slot_name: str, way: str) -> Iterator[str]:
    """A database of its own, reached in one of the ways."""
    if not tls_server.running:
        tls_server.start()
    plain = tls_server.create_database(slot_name)
    host = str(tls_server.folder) if way == "unix" else HOST
    yield make_conninfo(plain, host=host, sslmode="require" if way == "tls" else "disable")
    if not tls_server.running:
        tls_server.start()
    tls_server.drop_database(slot_name)


@pytest.fixture
def stream_dsn(dsn: str, slot_name: str) -> str:
    """The same with a table, and a slot and a publication of it."""
    execute(
        dsn,
        "CREATE TABLE pages (id int PRIMARY KEY, text text)",
        f"CREATE PUBLICATION {slot_name} FOR TABLE pages",
        f"SELECT pg_create_logical_replication_slot('{slot_name}', 'pgoutput')",
    )
    return dsn


@contextlib.asynccontextmanager
async def streaming(dsn: str, slot_name: str, way: str) -> AsyncIterator[Replication]:
    replication = await Replication.open(DsnSource.fixed(dsn))
    try:
        await replication.identify()
        await replication.start(slot_name, slot_name)
        assert type(replication._transport).__name__ == WAYS[way]
        yield replication
    finally:
        replication.close()


async def frames(replication: Replication) -> AsyncIterator[bytes]:
    """What CopyData messages carry; keepalives are answered as they ask for."""
    while True:
        data = await replication.read()
        pos = 0
        while pos < len(data):
            end = pos + 1 + struct.unpack_from(">I", data, pos + 1)[0]
            frame, pos = data[pos + COPY : end], end
            if frame[:1] == b"k":
                keepalive = Keepalive.read(frame)
                replication.status(keepalive.end, keepalive.end)
            yield frame
        assert pos == len(data)


async def until_it_fails(replication: Replication) -> None:
    async for _ in frames(replication):
        pass


async def a_row_of(replication: Replication, length: int) -> None:
    """Read until a row has come that is at least so large."""
    async for frame in frames(replication):
        if len(frame) > length:
            return


def test_busts_arrive_and_a_large_row_holds_up_nothing(
    dsn: str, way: str, slot_name: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    execute(dsn, "CREATE TABLE pages (id int PRIMARY KEY, text text)")
    keys = [f"page:{at}" for at in range(1, 203)]
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=tmp_path / "rules.yaml", slot=slot_name) as daemon:
        daemon.ready()
        settled(dsn, redis_client, slot_name)
        redis_client.mset(dict.fromkeys(keys, "old"))

        execute(dsn, f"INSERT INTO pages VALUES (1, repeat('x', {LARGE})), (2, NULL)")
        execute(dsn, *(f"INSERT INTO pages VALUES ({at}, 'x')" for at in range(3, 203)))

        settled(dsn, redis_client, slot_name)
        assert redis_client.exists(*keys) == 0
        assert daemon.terminate() == 0
    # The last word of the daemon was taken in.
    assert confirmed(dsn, slot_name) >= wal_position(dsn) - 10_000


async def test_a_large_row_comes_whole(stream_dsn: str, slot_name: str, way: str) -> None:
    async with streaming(stream_dsn, slot_name, way) as replication:
        execute(stream_dsn, f"INSERT INTO pages VALUES (1, repeat('x', {LARGE}))")

        await asyncio.wait_for(a_row_of(replication, LARGE), 60)


async def test_what_is_confirmed_last_is_taken_in(stream_dsn: str, slot_name: str, way: str) -> None:
    position = wal_position(stream_dsn)
    async with streaming(stream_dsn, slot_name, way) as replication:
        replication.status(position, position)
        await asyncio.wait_for(replication.finish(), 60)

        assert confirmed(stream_dsn, slot_name) == position


async def test_a_walsender_that_is_terminated_says_so(stream_dsn: str, slot_name: str, way: str) -> None:
    async with streaming(stream_dsn, slot_name, way) as replication:
        execute(stream_dsn, f"SELECT pg_terminate_backend({replication.backend_pid})")

        with pytest.raises(
            errors.PostgresUnavailable, match=r"\(terminating connection due to administrator command\)"
        ):
            await asyncio.wait_for(until_it_fails(replication), 60)


async def test_a_server_that_shuts_down_ends_the_stream(
    tls_server: Postgres, stream_dsn: str, slot_name: str, way: str
) -> None:
    async with streaming(stream_dsn, slot_name, way) as replication:
        stopping = asyncio.create_task(asyncio.to_thread(tls_server.stop))

        with pytest.raises(errors.PostgresUnavailable, match="ended the replication stream"):
            await asyncio.wait_for(until_it_fails(replication), 60)
    await stopping


async def test_a_server_that_crashes_is_not_available(
    tls_server: Postgres, stream_dsn: str, slot_name: str, way: str
) -> None:
    async with streaming(stream_dsn, slot_name, way) as replication:
        tls_server.stop("immediate")

        with pytest.raises(errors.PostgresUnavailable):
            await asyncio.wait_for(until_it_fails(replication), 60)


async def test_a_slot_that_somebody_uses_is_in_use(stream_dsn: str, slot_name: str, way: str) -> None:
    async with streaming(stream_dsn, slot_name, way):
        with pytest.raises(errors.SlotInUse):
            async with streaming(stream_dsn, slot_name, way):
                pass


async def test_a_slot_that_is_not_there_is_told_with_its_name(dsn: str, slot_name: str, way: str) -> None:
    with pytest.raises(errors.PostgresUnavailable, match=rf'\(replication slot "{slot_name}" does not exist\)'):
        async with streaming(dsn, slot_name, way):
            pass


async def test_a_publication_that_was_dropped_gives_up_the_position(stream_dsn: str, slot_name: str, way: str) -> None:
    async with streaming(stream_dsn, slot_name, way) as replication:
        execute(stream_dsn, f"DROP PUBLICATION {slot_name}", "INSERT INTO pages VALUES (1, 'x')")

        with pytest.raises(errors.PositionGivenUp):
            await asyncio.wait_for(until_it_fails(replication), 60)


@pytest.mark.parametrize("sslmode", ["disable", "require"])
def test_a_database_without_an_encoding_gives_keys_of_its_bytes(
    tls_server: Postgres,
    sslmode: str,
    slot_name: str,
    redis_url: str,
    redis_client: redis.Redis,
    tmp_path: Path,
) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    name = f"{slot_name}_ascii"
    execute(tls_server.dsn, f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    dsn = make_conninfo(tls_server.dsn_for(name), sslmode=sslmode)
    execute(dsn, "CREATE TABLE pages (id text PRIMARY KEY, text text)")
    rows = [rb"E'\351'", rb"E'\303\251'"]
    keys = [b"page:\xe9", b"page:\xc3\xa9"]
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=tmp_path / "rules.yaml", slot=slot_name) as daemon:
        daemon.ready()
        settled(dsn, redis_client, slot_name)
        redis_client.mset(dict.fromkeys(keys, "old"))

        for row in rows:
            execute(dsn, b"INSERT INTO pages VALUES (" + row + b", 'x')")
        settled(dsn, redis_client, slot_name)
        assert redis_client.exists(*keys) == 0
        redis_client.mset(dict.fromkeys(keys, "old"))
        execute(dsn, "UPDATE pages SET text = 'y'")

        settled(dsn, redis_client, slot_name)
        assert redis_client.exists(*keys) == 0
    tls_server.drop_database(name)
