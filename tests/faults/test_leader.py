"""Several daemons for one slot: PostgreSQL decides who leads, the others stand by and take over."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from proxy import Proxy
from psycopg.conninfo import make_conninfo
from running import RunningDaemon, eventually, execute, settled
from writing import Writer, assert_all_is_well, assert_nothing_confirmed_too_early, create, left, rules_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres


@pytest.fixture
def make(database: str, redis_url: str, tmp_path: Path, slot_name: str) -> Iterator[Callable[..., RunningDaemon]]:
    """Make daemons for one slot; whatever is left of them in the end is killed."""
    create(database)
    rules = rules_file(tmp_path)
    with ExitStack() as stack:

        def make(dsn: str = database) -> RunningDaemon:
            return stack.enter_context(RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name))

        yield make


def leaders(*daemons: RunningDaemon) -> list[RunningDaemon]:
    return [daemon for daemon in daemons if daemon.status().get("role") == "leader"]


def sessions(dsn: str) -> dict[str, int]:
    """Count the daemons' sessions by their kind."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return dict(
            connection.execute(
                "SELECT backend_type, count(*)::int FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'cdc-invalidator%' GROUP BY 1"
            ).fetchall()
        )


def slots(dsn: str, name: str) -> list[bool]:
    """Whether the slot is in use; nothing if there is none."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        return [active for (active,) in connection.execute(query, [name])]


def takes_over(daemon: RunningDaemon) -> None:
    eventually(lambda: daemon.alive() and leaders(daemon), "a standby leads")


def test_one_of_several_daemons_streams_and_the_others_are_ready_and_cheap(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    daemons = [make(), make(), make()]
    for daemon in daemons:
        daemon.ready()
    eventually(lambda: len(leaders(*daemons)) == 1, "one leads")
    eventually(lambda: sorted(str(d.status()["role"]) for d in daemons) == ["leader", "standby", "standby"], "roles")
    with Writer(database, redis_url) as writer:
        writer.goes_on()
        # One for the catalogs each; the leader's stream and its look at snapshots.
        wanted = {"walsender": 1, "client backend": 4}
        eventually(lambda: sessions(database) == wanted, "no more sessions than needed")
    assert all(daemon.get("/readyz")[0] == 200 for daemon in daemons)
    assert [d.metric("cdc_invalidator_leader") for d in daemons].count(1) == 1
    assert_all_is_well(database, redis_client, *daemons)


def test_two_daemons_that_start_at_once_with_nothing_set_up_make_one_slot(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis
) -> None:
    with Writer(database, redis_url) as writer:
        first, second = make(), make()
        first.ready()
        second.ready()
        eventually(lambda: len(leaders(first, second)) == 1, "one of them leads")
        writer.goes_on()
    assert_all_is_well(database, redis_client, first, second)
    # Who has made the slot need not be the first to stream from it. The other one finds no watermark.
    (gap,) = first.named("gap") + second.named("gap")
    assert gap["reason"] in {"new_slot", "no_watermark"}
    (leader,) = leaders(first, second)
    assert leader.named("gap") == [gap]


@pytest.mark.parametrize("ran_before", [False, True], ids=["no watermark", "a watermark"])
def test_a_slot_that_another_daemon_has_made_is_a_gap_for_the_one_that_streams_from_it(
    make: Callable[..., RunningDaemon],
    database: str,
    redis_client: redis.Redis,
    slot_name: str,
    ran_before: bool,
) -> None:
    if ran_before:
        former = make().ready()
        settled(database, redis_client, slot_name)
        assert former.terminate() == 0
        execute(database, f"SELECT pg_drop_replication_slot('{slot_name}')")
    redis_client.set("t:thing:1", "cached")
    execute(database, "INSERT INTO things VALUES (1, 'nobody hears of it')")
    with psycopg.connect(database) as older:
        older.execute("SELECT pg_current_xact_id()")
        maker = make()
        eventually(lambda: slots(database, slot_name) == [True], "it makes the slot, and waits for the transaction")
        maker.send(signal.SIGSTOP)
    eventually(lambda: slots(database, slot_name) == [False], "the slot is made")
    second = make().ready()
    takes_over(second)
    gap = second.seen("gap")
    assert gap["reason"] == ("missed_changes" if ran_before else "no_watermark")
    maker.send(signal.SIGCONT)
    maker.ready()
    assert leaders(maker, second) == [second]
    assert_all_is_well(database, redis_client, maker, second)
    assert second.named("gap") == [gap]
    assert not maker.named("gap")


def test_a_killed_leader_is_replaced_within_seconds(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    first = make().ready()
    settled(database, redis_client, slot_name)
    second = make().ready()
    with Writer(database, redis_url) as writer:
        writer.goes_on()
        began = time.monotonic()
        first.kill()
        takes_over(second)
        seconds = time.monotonic() - began
        writer.goes_on()
    print(f"taken over after {seconds:.2f} s")
    assert seconds < 10
    assert_all_is_well(database, redis_client, second)
    assert not second.named("gap")


def test_a_leader_that_is_told_to_stop_hands_over_at_once(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    first = make().ready()
    settled(database, redis_client, slot_name)
    second = make().ready()
    with Writer(database, redis_url) as writer:
        writer.goes_on()
        began = time.monotonic()
        first.send(signal.SIGTERM)
        takes_over(second)
        seconds = time.monotonic() - began
        writer.goes_on()
        assert first.wait() == 0
    print(f"taken over after {seconds:.2f} s")
    assert seconds < 5
    assert_all_is_well(database, redis_client, first, second)
    assert not second.named("gap")


def test_a_frozen_leader_is_replaced_and_stands_by_when_it_wakes_up(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    shorten_patience(database)
    first = make().ready()
    settled(database, redis_client, slot_name)
    second = make().ready()
    with Writer(database, redis_url) as writer:
        writer.goes_on()
        first.send(signal.SIGSTOP)
        takes_over(second)
        writer.goes_on()
        settled(database, redis_client, slot_name)
        first.send(signal.SIGCONT)
        eventually(lambda: first.alive() and first.status().get("role") == "standby", "the old leader stands by")
        writer.goes_on()
        assert leaders(first, second) == [second]
        # What it knew as the leader it shows no more; at the slot it looks as the leader does.
        assert first.metric("cdc_invalidator_watermark_lsn") == 0 < second.metric("cdc_invalidator_watermark_lsn")
        assert "\ncdc_invalidator_redis_keyspace_hits_total{" not in first.get("/metrics")[1]
        assert "\ncdc_invalidator_redis_keyspace_hits_total{" in second.get("/metrics")[1]
        assert all(daemon.metric("cdc_invalidator_slot_active") == 1 for daemon in (first, second))
    assert_all_is_well(database, redis_client, first, second)
    assert first.get("/readyz")[0] == 200
    assert not second.named("gap")


def test_a_leader_that_is_cut_off_is_replaced_and_stands_by_once_it_is_back(
    make: Callable[..., RunningDaemon],
    postgres: Postgres,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> None:
    shorten_patience(database)
    with Proxy(postgres.port) as proxy:
        first = make(make_conninfo(database, port=proxy.port)).ready()
        settled(database, redis_client, slot_name)
        second = make().ready()
        with Writer(database, redis_url) as writer:
            writer.goes_on()
            proxy.stall()
            takes_over(second)
            writer.goes_on()
            settled(database, redis_client, slot_name)
            proxy.mend()
            eventually(lambda: first.alive() and first.status().get("role") == "standby", "the old leader stands by")
            writer.goes_on()
            assert leaders(first, second) == [second]
        assert_all_is_well(database, redis_client, first, second)
        assert not second.named("gap")


def shorten_patience(dsn: str) -> None:
    """Let PostgreSQL end a session that is silent for 3 s."""
    name = dsn.rpartition("/")[2]
    execute(dsn, f"ALTER DATABASE {name} SET wal_sender_timeout = '3s'")


def test_a_rolling_update_of_three_sidecars_under_load_loses_nothing(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    daemons = [make().ready()]
    settled(database, redis_client, slot_name)
    daemons += [make().ready(), make().ready()]
    with Writer(database, redis_url, rows=3) as writer:
        for daemon in daemons:
            writer.goes_on()
            assert daemon.terminate() == 0
            assert_nothing_confirmed_too_early(database, redis_client, slot_name)
            daemon.start().ready()
            eventually(lambda: len(leaders(*daemons)) == 1, "one leads")
        writer.goes_on()
    assert_all_is_well(database, redis_client, *daemons)
    assert writer.committed > 40
    assert left(redis_client) == set()
    # Nobody had to sweep: what is left was busted key by key.
    assert [len(daemon.named("gap")) for daemon in daemons] == [1, 0, 0]


def test_a_rollout_of_leader_and_standby_under_load_loses_nothing_and_hands_over_at_sigterm(
    make: Callable[..., RunningDaemon], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    """As a Deployment does it: a new one is ready, by standing by, before an old one is told to stop."""
    leader = make().ready()
    settled(database, redis_client, slot_name)
    old, new = [leader, make().ready()], []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(database, redis_url, first=n * 10_000_000, pause=0.002)) for n in range(3)
        ]
        for stopped in old:
            new.append(make().ready())
            for writer in writers:
                writer.goes_on()
            led = leaders(stopped)
            began = time.time()
            stopped.send(signal.SIGTERM)
            others = [daemon for daemon in (*old, *new) if daemon is not stopped]
            first = eventually(partial(busts_since, others, began), "a bust by one of the others")
            print(
                f"{'leader' if led else 'standby'} told to stop: the next bust by another after {first - began:.2f} s"
            )
            assert stopped.wait() == 0
            assert_nothing_confirmed_too_early(database, redis_client, slot_name)
        for writer in writers:
            writer.goes_on()
    assert_all_is_well(database, redis_client, *new)
    assert len(leaders(*new)) == 1
    assert not [event for daemon in new for event in daemon.named("gap")]


def busts_since(daemons: list[RunningDaemon], began: float) -> float | None:
    """When the first bust of these daemons was, since then."""
    times = [datetime.fromisoformat(bust["ts"]).timestamp() for daemon in daemons for bust in daemon.named("bust")]
    return min((at for at in times if at >= began), default=None)
