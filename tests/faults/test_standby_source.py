"""A stream from a standby: what readers of the primary see is asked of the primary."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from proxy import Proxy
from running import RunningDaemon, command, eventually, execute, wal_position, watermark
from standby import Standby
from writing import create, invisible_commits, rules_file

from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

    from cdc_invalidator.embedded.servers import Valkey

# Before 16, a standby can't decode.
VERSIONS = [version for version in sorted(postgres_bin_dirs()) if version >= 16]
SLOT = "on_a_standby"


@pytest.fixture(params=VERSIONS, ids=lambda version: f"PostgreSQL {version}")
def standby(request: pytest.FixtureRequest) -> Iterator[Standby]:
    with Postgres(bin_dir=postgres_bin_dirs()[request.param]) as primary:
        create(primary.dsn)
        execute(primary.dsn, f"CREATE PUBLICATION {SLOT} FOR TABLE things")
        with Standby(primary, slot="near") as standby:
            standby.catch_up()
            yield standby


def lead(daemon: RunningDaemon, primary: Postgres) -> None:
    """Wait until it is ready; a slot on a standby is made when the primary logs its running transactions."""

    def streams() -> bool:
        execute(primary.dsn, "SELECT pg_log_standby_snapshot()")
        return daemon.alive() and daemon.get("/readyz")[0] == 200

    eventually(streams, "the daemon streams from the standby")
    daemon.ready()


def test_a_commit_that_the_standby_shows_first_is_busted_again_once_readers_of_the_primary_see_it(
    standby: Standby, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    primary, client = standby.primary, redis_client
    with RunningDaemon(
        dsn=standby.dsn,
        redis_url=redis_url,
        rules=rules_file(tmp_path),
        slot=SLOT,
        postgres_readers=primary.dsn,
    ) as daemon:
        lead(daemon, primary)
        client.set("t:thing:1", "old")
        with invisible_commits(primary.dsn):
            writer = threading.Thread(target=execute, args=[primary.dsn, "INSERT INTO things VALUES (1, 'new')"])
            writer.start()
            eventually(lambda: not client.exists("t:thing:1"), "the bust comes at once")
            client.set("t:thing:1", "old again")
            position = wal_position(primary.dsn)
            assert writer.is_alive()
        writer.join()

        def passed() -> bool:
            # What follows moves the position of the standby's WAL.
            execute(primary.dsn, "SELECT pg_log_standby_snapshot()")
            return int(watermark(client, SLOT)[b"lsn"]) >= position

        eventually(passed, "the watermark passes the commit")
        assert not client.exists("t:thing:1")
        assert daemon.metric("cdc_invalidator_busted_again_total", reason="visible") >= 1
        eventually(lambda: b"as_of" in watermark(client, SLOT), "how fresh it is, the primary knows")
        assert not daemon.errors


def test_without_a_word_about_the_readers_a_standby_is_refused(
    standby: Standby, redis_url: str, tmp_path: Path
) -> None:
    given = {"postgres_dsn": standby.dsn, "redis_url": redis_url, "rules": rules_file(tmp_path), "slot": SLOT}
    given |= {"publication": SLOT}
    refused = command("run", **given, http_port=0)
    assert refused.returncode == 2
    assert "set CDC_POSTGRES_READERS to the connection string" in refused.stdout + refused.stderr
    checked = command("check", **given)
    assert checked.returncode == 1
    assert "set CDC_POSTGRES_READERS" in " ".join(checked.stdout.split())
    assert command("check", **given, postgres_readers=standby.primary.dsn).returncode == 0
    assert command("check", **given, postgres_readers=standby.dsn).returncode == 0


def test_readers_of_another_database_system_are_refused(standby: Standby, redis_url: str, tmp_path: Path) -> None:
    given = {"postgres_dsn": standby.dsn, "redis_url": redis_url, "rules": rules_file(tmp_path), "slot": SLOT}
    given |= {"publication": SLOT}
    with Postgres(own_identity=True) as stranger:
        checked = command("check", **given, postgres_readers=stranger.dsn)
    assert checked.returncode == 1
    assert "CDC_POSTGRES_READERS names a server with other data" in " ".join(checked.stdout.split())


@pytest.mark.parametrize("dsn", ["postgresql://app:topsecret@[db/shop", "topsecret"])
def test_a_text_that_can_t_be_read_is_refused_without_its_words(tmp_path: Path, dsn: str) -> None:
    given = {"postgres_dsn": "postgresql://db", "redis_url": "redis://cache", "rules": rules_file(tmp_path)}
    refused = command("run", **given, postgres_readers=dsn)
    assert refused.returncode == 2
    assert "CDC_POSTGRES_READERS can't be read" in refused.stdout + refused.stderr
    assert "secret" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("standby", VERSIONS[-1:], indirect=True)
def test_a_leader_on_a_standby_hands_over_as_on_the_primary(
    standby: Standby, valkey: Valkey, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    given = {"dsn": standby.dsn, "rules": rules_file(tmp_path), "slot": SLOT, "postgres_readers": standby.primary.dsn}
    with Proxy(valkey.port) as way:
        url = redis_url.replace(f":{valkey.port}", f":{way.port}")
        with RunningDaemon(redis_url=url, handover_seconds="3", **given) as first:  # type: ignore[arg-type]
            lead(first, standby.primary)
            with RunningDaemon(redis_url=redis_url, handover_seconds="3", **given) as second:  # type: ignore[arg-type]
                second.ready()
                way.refuse()
                eventually(lambda: second.status().get("role") == "leader", "the other one leads")
                redis_client.set("t:thing:1", "stale")
                execute(standby.primary.dsn, "INSERT INTO things VALUES (1, 'new')")
                eventually(lambda: not redis_client.exists("t:thing:1"), "the key is busted")
