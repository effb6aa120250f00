"""What the metrics tell of the servers' own figures: the daemon's share is not taken for the application's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import redis
from running import RunningDaemon, eventually, execute, settled
from servers import redis_binaries

from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  page: {key: "t:page:{id}:v{version}", version: "t:page:{id}:ver", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user, page]}
"""
READS = 2000


# The same, and another table.
MORE_RULES = RULES + "  - {name: team-changed, table: public.teams, bust: [user]}\n"


class Daemon(RunningDaemon):
    """Looks at the servers often."""

    deadlines: ClassVar[Mapping[str, float]] = {"redis.info.INFO_SECONDS": 0.1, "watch.WATCH_SECONDS": 0.1}

    def reads_of_others(self) -> tuple[float, float]:
        """Give the hits and misses that are not the daemon's own."""
        hits, misses = (
            self.metric(f"cdc_invalidator_redis_keyspace_{kind}_total")
            - self.metric(f"cdc_invalidator_redis_own_{kind}_total")
            for kind in ("hits", "misses")
        )
        return hits, misses


@pytest.mark.parametrize("binary", sorted(redis_binaries()))
def test_reads_that_all_hit_show_as_hits_whatever_is_busted(
    database: str, slot_name: str, tmp_path: Path, binary: str
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        "INSERT INTO users SELECT n, '' FROM generate_series(1, 500) n",
    )
    with (
        Valkey(binary=redis_binaries()[binary]) as server,
        redis.Redis.from_url(server.url) as client,
        Daemon(dsn=database, redis_url=server.url, rules=rules, slot=slot_name, verify_sample="1") as daemon,
    ):
        daemon.ready()
        client.set("hot", "x")
        # Some versions are there, and some keys, which are looked at as samples.
        client.mset({f"t:page:{number}:ver": number for number in range(1, 251)})
        client.mset({f"t:user:{number}": "x" for number in range(1, 251)})
        settled(database, client, slot_name)
        known = eventually(daemon.reads_of_others, "INFO is read")
        for _ in range(4):
            execute(database, "UPDATE users SET name = name || '.'")
            for _ in range(READS // 4):
                client.get("hot")
        settled(database, client, slot_name)
        assert daemon.metric("cdc_invalidator_busted_keys_total", cache="page") == 2000
        hits, misses = known
        eventually(lambda: daemon.metric("cdc_invalidator_redis_own_misses_total") >= 1000, "INFO is read again")
        # `settled` reads the watermark, as a reader would.
        eventually(
            lambda: daemon.reads_of_others()[0] - hits >= READS and daemon.reads_of_others()[1] - misses <= 5,
            f"{READS} hits beside a few looks at the watermark; it is {daemon.reads_of_others()}, was {known}",
        )


def test_a_new_session_looks_like_no_burst_of_writes(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        "CREATE TABLE teams (id int PRIMARY KEY)",
        "INSERT INTO users VALUES (1, '')",
    )
    with Daemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:

        def looked() -> float:
            looks = daemon.metric("cdc_invalidator_watches_total") + 2
            eventually(lambda: daemon.metric("cdc_invalidator_watches_total") >= looks, "it has looked twice")
            return daemon.metric("cdc_invalidator_database_rows_written_total")

        daemon.ready()
        before = looked()
        # One transaction each, which the walsender decodes.
        execute(database, *["UPDATE users SET name = name || '.'"] * 500)
        settled(database, redis_client, slot_name)
        eventually(lambda: looked() >= before + 500, "the writes are counted")
        known = looked()
        rules.write_text(MORE_RULES)
        eventually(lambda: daemon.metric("cdc_invalidator_postgres_connects_total") == 2, "it streams anew")
        settled(database, redis_client, slot_name)
        # Some rows of catalogs are written for the publication.
        assert known <= looked() < known + 100
