"""Every kind of Redis that CDC_REDIS_URL can name: versions, TLS, sockets, and a user with least rights."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import reading
import redis
import writing
from clusters import Cluster
from running import RunningDaemon, eventually, execute, settled, watermark
from sentinels import Sentinels
from servers import redis_binaries
from tls import TLSFront

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parents[2] / "deploy" / "README.md"


@pytest.fixture(params=sorted(redis_binaries()))
def binary(request: pytest.FixtureRequest) -> Path:
    """Valkey everywhere; Redis of several versions where it is installed."""
    return redis_binaries()[request.param]


def busts_everything(dsn: str, url: str, client: Any, folder: Path, slot: str, **environment: str) -> None:
    """Run a daemon through deletes, bumps, sweeps and a manual bust."""
    reading.create(dsn)
    rules = reading.rules_file(folder)
    with RunningDaemon(dsn=dsn, redis_url=url, rules=rules, slot=slot, **environment) as daemon:
        daemon.ready()
        settled(dsn, client, slot)
        for change in ("UPDATE counters SET n = n + 1 WHERE id <= 50", "TRUNCATE counters"):
            for number in range(1, 51):
                client.set(f"t:{{{number}}}:count", 0)
                client.set(f"t:{{{number}}}:count\0lock", "token")
                client.set(f"t:{{{number}}}:count:lock", "token of a reader of 0.1.0")
                client.set(f"t:{{{number}}}:ver", 1)
            execute(dsn, change)
            settled(dsn, client, slot)
            for number in range(1, 51):
                assert not client.exists(f"t:{{{number}}}:count")
                assert not client.exists(f"t:{{{number}}}:count\0lock")
                assert not client.exists(f"t:{{{number}}}:count:lock")
                assert int(client.get(f"t:{{{number}}}:ver")) > 10**15
        eventually(lambda: daemon.metric("cdc_invalidator_redis_used_memory_bytes") > 0, "INFO is read")
        assert daemon.terminate() == 0
        assert not daemon.errors
        assert not daemon.named("redis_unavailable")


def test_one_server(database: str, binary: Path, tmp_path: Path, slot_name: str) -> None:
    with Valkey(binary=binary) as server, redis.Redis.from_url(server.url) as client:
        busts_everything(database, server.url, client, tmp_path, slot_name)


def test_a_numbered_database_with_a_password(database: str, binary: Path, tmp_path: Path, slot_name: str) -> None:
    with Valkey(binary=binary, settings={"requirepass": "p@ss:w/rd"}) as server:
        url = f"redis://:p%40ss%3Aw%2Frd@127.0.0.1:{server.port}/3"
        with redis.Redis.from_url(url) as client:
            busts_everything(database, url, client, tmp_path, slot_name)


def test_sentinel(database: str, binary: Path, tmp_path: Path, slot_name: str) -> None:
    with Sentinels(binary) as sentinels, redis.Redis.from_url(sentinels.master.url) as client:
        busts_everything(database, sentinels.url, client, tmp_path, slot_name)


def test_cluster(database: str, binary: Path, tmp_path: Path, slot_name: str) -> None:
    with Cluster(binary, replicas=False) as cluster, contextlib.closing(cluster.client()) as client:
        busts_everything(database, cluster.url, client, tmp_path, slot_name)


def test_a_unix_socket(database: str, tmp_path: Path, slot_name: str) -> None:
    settings = {"unixsocket": "valkey.sock"}
    with Valkey(settings=settings) as server, redis.Redis.from_url(server.url) as client:
        busts_everything(database, f"unix://{server.folder}/valkey.sock?db=0", client, tmp_path, slot_name)


@pytest.fixture
def front(valkey: Valkey) -> Iterator[TLSFront]:
    with TLSFront(valkey.port) as front:
        yield front


def test_tls(database: str, front: TLSFront, valkey: Valkey, tmp_path: Path, slot_name: str) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushdb()
        url = f"{front.url}?ssl_ca_certs={front.ca_file}"
        busts_everything(database, url, client, tmp_path, slot_name)


@pytest.mark.parametrize("names", [("elsewhere.test",), None], ids=["for another host", "by a stranger"])
def test_a_certificate_that_does_not_prove_the_server_is_refused(
    database: str, valkey: Valkey, tmp_path: Path, slot_name: str, names: tuple[str, ...] | None
) -> None:
    writing.create(database)
    with TLSFront(valkey.port, names=names or ("127.0.0.1",)) as front:
        url = f"{front.url}?ssl_ca_certs={front.ca_file}" if names else front.url
        rules = writing.rules_file(tmp_path)
        with RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name) as daemon:
            event = daemon.seen("slot_waits_for_redis")
            assert "certificate" in event["error"].lower()


@pytest.mark.parametrize("form", ["rediss://{}/0", "rediss+sentinel://{}/cache", "rediss+cluster://{}"])
@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ("", "doesn't match|mismatch"),
        ("&ssl_check_hostname=no", None),
        ("&ssl_cert_reqs=none", None),
        ("&ssl_cert_reqs=none&ssl_check_hostname=yes", None),
    ],
)
async def test_the_host_that_a_certificate_names_is_checked_with_any_driver_unless_that_is_turned_off(
    valkey: Valkey, form: str, options: str, refused: str | None
) -> None:
    with TLSFront(valkey.port, names=("elsewhere.test",)) as front:
        url = form.format(f"127.0.0.1:{front.port}") + f"?ssl_ca_certs={front.ca_file}{options}"
        server = cache_server(EndpointSource.fixed(url), "slot")
        try:
            await server.connect()
            failure = ""
        except errors.RedisUnavailable as error:
            failure = str(error)
        finally:
            await server.close()
    # Behind the front is one plain server, which is neither a Sentinel nor a node of a cluster.
    assert ("certificate" in failure) == (refused is not None)
    assert re.search(refused or "^$|No Sentinel|cluster", failure)


# A user with the rights that deploy/README.md lists, and nothing else.


def acl_line(name: str) -> list[str]:
    """Read an ACL line of deploy/README.md: the words after ACL SETUSER."""
    found = re.search(rf"^ACL SETUSER {name} (.+)$", README.read_text(), re.MULTILINE)
    assert found, f"deploy/README.md has no ACL line for {name}"
    return found[1].split()


def grant(node: Any, name: str, slot: str, *more: str) -> None:
    words = [word.replace("cdc:cdc_invalidator:", f"cdc:{slot}:").replace("~shop:*", "~t:*") for word in acl_line(name)]
    node.execute_command("ACL", "SETUSER", name, *words, *more)


def test_a_user_with_the_documented_rights_runs_one_server(
    database: str, binary: Path, tmp_path: Path, slot_name: str
) -> None:
    with Valkey(binary=binary) as server, redis.Redis.from_url(server.url) as client:
        grant(client, "cdc", slot_name)
        url = server.url.replace("redis://", "redis://cdc:secret@")
        busts_everything(database, url, client, tmp_path, slot_name)
        assert watermark(client, slot_name)


def test_a_user_with_the_documented_rights_runs_sentinel(
    database: str, binary: Path, tmp_path: Path, slot_name: str
) -> None:
    with Sentinels(binary) as sentinels, redis.Redis.from_url(sentinels.master.url) as client:
        grant(client, "cdc", slot_name)
        for sentinel in sentinels.sentinels:
            with redis.Redis.from_url(f"redis://127.0.0.1:{sentinel.port}") as node:
                grant(node, "cdc-sentinel", slot_name)
        url = (
            sentinels.url.replace("://", "://cdc:secret@") + "?sentinel_username=cdc-sentinel&sentinel_password=secret"
        )
        busts_everything(database, url, client, tmp_path, slot_name)


def test_a_user_with_the_documented_rights_runs_a_cluster(
    database: str, binary: Path, tmp_path: Path, slot_name: str
) -> None:
    with Cluster(binary, replicas=False) as cluster, contextlib.closing(cluster.client()) as client:
        for node in cluster.nodes:
            with redis.Redis.from_url(node.url) as connection:
                grant(connection, "cdc", slot_name)
        url = cluster.url.replace("://", "://cdc:secret@")
        busts_everything(database, url, client, tmp_path, slot_name)


@pytest.mark.parametrize("right", ["+unlink", "+scan", "+hset", "+time", "+script|load", "+hgetall"])
def test_a_right_that_is_missing_is_told_to_the_operator(
    database: str, binary: Path, tmp_path: Path, slot_name: str, right: str
) -> None:
    """Each right of the data path is needed: without it the daemon says so, and goes on once it is granted."""
    reading.create(database)
    with Valkey(binary=binary) as server, redis.Redis.from_url(server.url) as client:
        assert right in acl_line("cdc")
        # Redis 6.2 takes no single subcommand back.
        grant(client, "cdc", slot_name, right.replace("+", "-").partition("|")[0])
        url = server.url.replace("redis://", "redis://cdc:secret@")
        rules = reading.rules_file(tmp_path)
        with RunningDaemon(dsn=database, redis_url=url, rules=rules, slot=slot_name) as daemon:
            client.set("t:{1}:count", 0)
            client.set("t:{1}:ver", 1)
            if right not in {"+script|load", "+hgetall"}:
                eventually(lambda: daemon.status().get("role") == "leader", "it leads")
                execute(database, "UPDATE counters SET n = 1 WHERE id = 1")
            told = eventually(
                lambda: (
                    daemon.named("redis_unavailable", level="error")
                    or daemon.named("slot_waits_for_redis")
                    or daemon.named("caches_denied", level="error")
                ),
                "the operator is told",
            )
            assert "grant the ACL user" in told[0]["error"]
            eventually(lambda: daemon.get("/readyz")[0] == 503, "it is not ready")
            grant(client, "cdc", slot_name)
            daemon.ready()
            settled(database, client, slot_name)
            assert not client.exists("t:{1}:count")
