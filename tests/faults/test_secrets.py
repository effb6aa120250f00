"""Passwords are rotated while the daemon runs: each connection that is opened has the secret of then."""

from __future__ import annotations

import contextlib
import itertools
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis
import writing
from clusters import Cluster
from psycopg import sql
from running import RunningDaemon, command, eventually, execute, settled
from sentinels import Sentinels
from writing import Writer, assert_all_is_well

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# With signs that a URL must not have as they are.
OLD, NEW = "old@/p:ss", "new?#p%ss"
QUOTED = {OLD: "old%40%2Fp%3Ass", NEW: "new%3F%23p%25ss"}


class Volume:
    """A Secret as the kubelet mounts it: all files change at once, when the link `..data` is put in another's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._now: dict[str, str] = {}
        folder.mkdir()

    def put(self, **files: str) -> None:
        self._now |= files
        version = self.folder / f"..{next(self._numbers)}"
        version.mkdir()
        for name, text in self._now.items():
            (version / name).write_text(f"{text}\n")
        link = self.folder / "..next"
        link.symlink_to(version.name)
        link.rename(self.folder / "..data")
        for name in files:
            with contextlib.suppress(FileExistsError):
                (self.folder / name).symlink_to(f"..data/{name}")


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "secrets")


@pytest.fixture
def role(database: str, slot_name: str) -> Iterator[str]:
    """A role of the daemon's own, with the password `OLD`."""
    writing.create(database)
    name = f"cdc_{slot_name}"
    execute(database, f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{OLD}'")
    yield name
    execute(database, f"REASSIGN OWNED BY {name} TO CURRENT_USER", f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def as_role(database: str, role: str, password: str) -> str:
    return f"postgresql://{role}:{QUOTED[password]}@{database.partition('@')[2]}"


def rotate(database: str, role: str) -> None:
    """Give the role the password `NEW`, and end its sessions."""
    execute(
        database,
        f"ALTER ROLE {role} PASSWORD '{NEW}'",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'",
    )


def grant(server: Any, password: str) -> None:
    """Let `cdc` do everything with this password only, and end its connections."""
    server("ACL", "SETUSER", "cdc", "on", "resetpass", f">{password}", "~*", "&*", "+@all")
    with contextlib.suppress(redis.ResponseError):
        server("CLIENT", "KILL", "USER", "cdc")


@pytest.fixture
def started(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, volume: Volume
) -> Iterator[Callable[..., RunningDaemon]]:
    """Starts a daemon that has its addresses from `volume` only."""
    with contextlib.ExitStack() as stack:

        def start(url: str = redis_url, **settings: str) -> RunningDaemon:
            rules = writing.rules_file(tmp_path)
            volume.put(cdc_redis_url=url)
            daemon = RunningDaemon(
                dsn=database,
                redis_url=url,
                rules=rules,
                slot=slot_name,
                secrets_dir=str(volume.folder),
                http_host="127.0.0.1",
                **settings,
            )
            for name in ("CDC_POSTGRES_DSN", "CDC_REDIS_URL"):
                del daemon._env[name]
            return stack.enter_context(daemon)

        yield start


@contextlib.contextmanager
def redis_of(kind: str) -> Iterator[tuple[str, list[Any], Any]]:
    """A Redis of a kind: its URL for `cdc`, what asks each of its servers, and a client of an application."""
    with contextlib.ExitStack() as stack:
        if kind == "cluster":
            cluster = stack.enter_context(Cluster(replicas=False))
            client = stack.enter_context(contextlib.closing(cluster.client()))
            yield cluster.url.replace("://", "://{}@"), [node.ask for node in cluster.nodes], client
        elif kind == "sentinel":
            sentinels = stack.enter_context(Sentinels())
            client = stack.enter_context(redis.Redis.from_url(sentinels.master.url))
            its = [stack.enter_context(redis.Redis.from_url(each.url)) for each in sentinels.sentinels]
            url = sentinels.url.replace("://", "://{}@") + "?sentinel_username=cdc&sentinel_password={}"
            yield url, [each.execute_command for each in (client, *its)], client
        else:
            server = stack.enter_context(Valkey())
            client = stack.enter_context(redis.Redis.from_url(server.url))
            yield server.url.replace("://", "://{}@"), [client.execute_command], client


def url_for(form: str, password: str) -> str:
    return form.format(f"cdc:{QUOTED[password]}", QUOTED[password])


@pytest.mark.parametrize("kind", ["server", "sentinel", "cluster"])
def test_all_passwords_are_rotated_without_a_restart_a_lost_bust_or_an_error(
    kind: str, database: str, role: str, volume: Volume, started: Callable[..., RunningDaemon]
) -> None:
    with redis_of(kind) as (form, servers, client):
        for server in servers:
            grant(server, OLD)
        # A primary counts as a standby that is promoted.
        addresses = ("cdc_postgres_dsn", "cdc_postgres_readers", "cdc_postgres_standbys")
        volume.put(**dict.fromkeys(addresses, as_role(database, role, OLD)))
        daemon = started(url_for(form, OLD)).ready()
        settled(database, client, daemon.slot)
        eventually(lambda: daemon.metric("cdc_invalidator_standby_awaited") == 1, "the standby is awaited")
        with _busy(database, client) as goes_on:
            goes_on()
            volume.put(cdc_redis_url=url_for(form, NEW), **dict.fromkeys(addresses, as_role(database, role, NEW)))
            connected = len(daemon.named("redis_connected"))
            for server in servers:
                grant(server, NEW)
            eventually(lambda: len(daemon.named("redis_connected")) > connected, "Redis is connected again")
            goes_on()
            rotate(database, role)
            eventually(lambda: len(daemon.named("streaming")) > 1, "the stream goes on")
            goes_on()
        assert_all_is_well(database, client, daemon)
        daemon.ready()
        assert daemon.status()["last_error"] is None
        assert not daemon.named("gap", reason="lost_writes")
        assert [event for event in daemon.events if event["level"] == "error"] == []
        eventually(lambda: daemon.metric("cdc_invalidator_standby_awaited") == 1, "the standby is awaited")


@contextlib.contextmanager
def _busy(database: str, client: Any) -> Iterator[Callable[[], None]]:
    """Cache rows and change them; what is given waits until some more are changed."""
    if isinstance(client, redis.Redis):
        with Writer(database, _url_of(client)) as writer:
            yield writer.goes_on
        return
    ids = itertools.count()

    def change() -> None:
        for number in itertools.islice(ids, 20):
            client.set(f"t:thing:{number}", "cached")
            execute(database, f"INSERT INTO things VALUES ({number}, 'new')")

    yield change


def _url_of(client: redis.Redis) -> str:
    where = client.connection_pool.connection_kwargs
    return f"redis://{where['host']}:{where['port']}"


def test_a_refused_password_of_postgres_is_told_once_and_tried_until_the_secret_is_right(
    database: str, role: str, redis_client: redis.Redis, volume: Volume, started: Callable[..., RunningDaemon]
) -> None:
    volume.put(cdc_postgres_dsn=as_role(database, role, OLD))
    daemon = started().ready()
    settled(database, redis_client, daemon.slot)
    standing_by = started().ready()
    rotate(database, role)
    error = daemon.seen("login_refused")
    standing_by.seen("login_refused")
    assert "password authentication failed" in error["error"]
    assert error["error"].endswith("put the right user and password into CDC_POSTGRES_DSN.")
    tried = daemon.metric("cdc_invalidator_postgres_errors_total")
    eventually(lambda: daemon.metric("cdc_invalidator_postgres_errors_total") >= tried + 3, "it is tried again")
    assert len(daemon.named("login_refused")) == 1
    assert daemon.status()["last_error"] == error["error"]
    assert daemon.get("/readyz")[0] == 503
    assert daemon.get("/livez")[0] == 200
    volume.put(cdc_postgres_dsn=as_role(database, role, NEW))
    daemon.ready()
    standing_by.ready()
    execute(database, "INSERT INTO things VALUES (1, 'new')")
    assert_all_is_well(database, redis_client, daemon, standing_by)
    assert daemon.status()["last_error"] is None
    assert standing_by.status()["last_error"] is None


def test_a_refused_password_of_redis_is_told_once_and_tried_until_the_secret_is_right(
    database: str, role: str, volume: Volume, started: Callable[..., RunningDaemon]
) -> None:
    volume.put(cdc_postgres_dsn=as_role(database, role, OLD))
    with redis_of("server") as (form, [server], client):
        grant(server, OLD)
        daemon = started(url_for(form, OLD)).ready()
        settled(database, client, daemon.slot)
        grant(server, NEW)
        error = daemon.seen("redis_unavailable", code="WRONGPASS")
        name, labels = "cdc_invalidator_redis_errors_total", {"error": "WRONGPASS"}
        eventually(lambda: daemon.metric(name, **labels) >= 4, "it is tried again")
        assert daemon.named("redis_unavailable", code="WRONGPASS") == [error]
        assert error["level"] == "error"
        assert daemon.status()["last_error"] == error["error"]
        client.set("t:thing:1", "cached")
        execute(database, "INSERT INTO things VALUES (1, 'new')")
        volume.put(cdc_redis_url=url_for(form, NEW))
        assert_all_is_well(database, client, daemon)
        assert daemon.status()["last_error"] is None


def test_a_secret_that_cannot_be_used_any_more_is_told_and_ends_nothing(
    database: str, role: str, redis_client: redis.Redis, volume: Volume, started: Callable[..., RunningDaemon]
) -> None:
    good = as_role(database, role, OLD)
    volume.put(cdc_postgres_dsn=good)
    daemon = started().ready()
    for text, told in (
        ("", "is empty in"),
        (good.replace(QUOTED[OLD], OLD), "can be read in two ways"),
        (good + "&sslmode=on" if "?" in good else good + "?sslmode=on", "a value of sslmode that"),
    ):
        volume.put(cdc_postgres_dsn=text)
        execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'")
        eventually(partial(_says, daemon, told), told)
        volume.put(cdc_postgres_dsn=good)
        daemon.ready()
    assert_all_is_well(database, redis_client, daemon)
    assert not any(OLD in str(event) or OLD.partition("@")[0] in str(event) for event in daemon.events)


def _says(daemon: RunningDaemon, told: str) -> bool:
    return told in (daemon.status().get("last_error") or "")


def test_a_password_file_of_libpq_is_read_at_each_connection(
    database: str,
    role: str,
    redis_client: redis.Redis,
    volume: Volume,
    started: Callable[..., RunningDaemon],
    tmp_path: Path,
) -> None:
    passfile = tmp_path / "pgpass"

    def write(password: str) -> None:
        fresh = tmp_path / "fresh"
        escaped = password.replace("\\", "\\\\").replace(":", "\\:")
        fresh.write_text(f"*:*:*:{role}:{escaped}\n")
        fresh.chmod(0o600)
        os.replace(fresh, passfile)  # noqa: PTH105  as agents do it

    write(OLD)
    place = database.partition("@")[2]
    volume.put(cdc_postgres_dsn=f"postgresql://{role}@{place}{'&' if '?' in place else '?'}passfile={passfile}")
    daemon = started().ready()
    write(NEW)
    rotate(database, role)
    eventually(lambda: len(daemon.named("streaming")) > 1, "the stream goes on")
    execute(database, "INSERT INTO things VALUES (1, 'new')")
    assert_all_is_well(database, redis_client, daemon)
    assert not daemon.named("login_refused")


def test_a_password_that_never_worked_ends_the_daemon_with_3(
    database: str, role: str, volume: Volume, started: Callable[..., RunningDaemon]
) -> None:
    volume.put(cdc_postgres_dsn=as_role(database, role, NEW))
    daemon = started()
    assert daemon.wait() == 3
    assert daemon.errors[-1].endswith("put the right user and password into CDC_POSTGRES_DSN.")


PIECES = ("Zq9xW7", "kTr4Yb", "Jm2vQd")


@pytest.mark.parametrize(
    "password", ["Zq9xW7@/kTr4Yb?#Jm2vQd", "Zq9xW7[: %kTr4Yb]&=Jm2vQd", "Zq9xW7\"\\kTr4Yb'`$Jm2vQd"]
)
def test_no_output_shows_a_piece_of_a_password(
    password: str, database: str, role: str, volume: Volume, started: Callable[..., RunningDaemon], tmp_path: Path
) -> None:
    place = database.partition("@")[2]
    encoded = f"postgresql://{role}:{quote(password, safe='')}@{place}"
    raw = f"postgresql://{role}:{password}@{place}"
    said: list[str] = []

    def run(*words: str, **given: str) -> int:
        ended = command(*words, rules=str(tmp_path / "rules.yaml"), **given)
        said.extend((ended.stdout, ended.stderr))
        return ended.returncode

    with redis_of("server") as (form, [server], client):
        execute(database, sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), password).as_string(None))
        grant(server, password)
        url = form.format(f"cdc:{quote(password, safe='')}")
        names = ("cdc_postgres_dsn", "cdc_postgres_readers", "cdc_postgres_standbys")
        volume.put(**dict.fromkeys(names, encoded))
        daemon = started(url, event_stream="cdc:events").ready()
        settled(database, client, daemon.slot)
        servers = {"postgres_dsn": encoded, "redis_url": url, "slot": daemon.slot, "publication": daemon.slot}
        assert run("check", **servers) == 0
        said += [daemon.get(path)[1] for path in ("/status", "/metrics", "/readyz")]
        # The servers refuse the password, and say so in their own words.
        grant(server, "another")
        rotate(database, role)
        daemon.seen("login_refused")
        said += [daemon.get(path)[1] for path in ("/status", "/metrics", "/readyz")]
        assert run("check", **servers) == 1
        assert run("run", **servers) == 3
        # As it is, in each address.
        assert run("run", **{**servers, "postgres_dsn": raw}) in {2, 3}
        for name in ("postgres_readers", "postgres_standbys"):
            assert run("run", **servers, **{name: raw}) in {2, 3}
        for address in (form.format(f"cdc:{password}"), f"redis+sentinel://cdc:{password}@127.0.0.1/s"):
            assert run("check", **{**servers, "redis_url": address}) in {1, 2}
        said += [str(event) for event in daemon.events] + daemon.errors
        said += [str(entry) for entry in client.xrange("cdc:events")]
    assert [text for text in said if any(piece in text for piece in PIECES)] == []
