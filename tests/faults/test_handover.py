"""A leader whose busts don't get through leaves the slot to a daemon whose busts would, and to no other."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
import redis
from proxy import Proxy
from running import RunningDaemon, eventually, execute, settled
from writing import Writer, assert_all_is_well, create, invisible_commits, rules_file

from cdc_invalidator.embedded.servers import Postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Valkey

# The least that CDC_HANDOVER_SECONDS may be.
PATIENCE = 3.0
# What is stale after a one-sided cut, with CDC_HANDOVER_SECONDS as it is; here it is shorter.
MOST_STALE = 15.0


class Half(NamedTuple):
    """A daemon, and its way to Redis."""

    daemon: RunningDaemon
    way: Proxy

    @property
    def role(self) -> str:
        return str(self.daemon.status().get("role"))


@pytest.fixture
def make(
    database: str, redis_url: str, valkey: Valkey, tmp_path: Path, slot_name: str
) -> Iterator[Callable[..., Half]]:
    """Make daemons for one slot, each with a way of its own to Redis."""
    create(database)
    rules = rules_file(tmp_path)
    with ExitStack() as stack:

        def make(way: type[Proxy] = Proxy, dsn: str = database, **settings: str) -> Half:
            proxy = stack.enter_context(way(valkey.port))
            url = redis_url.replace(f":{valkey.port}", f":{proxy.port}")
            settings = {"handover_seconds": str(PATIENCE)} | settings
            daemon = RunningDaemon(dsn=dsn, redis_url=url, rules=rules, slot=slot_name, **settings)
            return Half(stack.enter_context(daemon), proxy)

        yield make


@pytest.fixture
def both(
    make: Callable[..., Half], database: str, redis_client: redis.Redis, slot_name: str
) -> Iterator[tuple[Half, Half]]:
    """The leader, and the one that stands by."""
    leader = make()
    leader.daemon.ready()
    settled(database, redis_client, slot_name)
    standby = make()
    standby.daemon.ready()
    yield leader, standby
    for half in (leader, standby):
        for event in [event for event in half.daemon.events if event["event"] != "bust"][-12:]:
            print("   ", event)


def leads(half: Half) -> None:
    eventually(lambda: half.daemon.alive() and half.role == "leader", "it leads")


def offers(dsn: str) -> int:
    """How many daemons say that they could lead."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name LIKE 'cdc-invalidator could bust %'"
        ).fetchone()
    assert row is not None
    return int(row[0])


def unready(half: Half) -> None:
    eventually(lambda: half.daemon.get("/readyz")[0] == 503, "it is not ready")


def handovers(*halves: Half) -> int:
    return sum(len(half.daemon.named("handed_over")) for half in halves)


def stale_for(dsn: str, client: redis.Redis, number: int) -> float:
    """Change a row that is cached, and return for how many seconds its key stays."""
    client.set(f"t:thing:{number}", "stale")
    execute(dsn, f"INSERT INTO things VALUES ({number}, 'new') ON CONFLICT (id) DO UPDATE SET body = 'newer'")
    began = time.monotonic()
    eventually(lambda: not client.exists(f"t:thing:{number}"), "the key is busted")
    return time.monotonic() - began


def cut(way: Proxy) -> None:
    way.refuse()


def swallow(way: Proxy) -> None:
    way.go_deaf()


def hold(way: Proxy) -> None:
    way.stall()


@pytest.mark.parametrize("fault", [cut, swallow, hold])
def test_a_leader_that_redis_does_not_hear_leaves_the_slot_to_the_one_that_it_hears(
    fault: Callable[[Proxy], None],
    both: tuple[Half, Half],
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
) -> None:
    leader, standby = both
    with Writer(database, redis_url, first=1000) as writer:
        writer.goes_on()
        eventually(lambda: offers(database) == 1, "the other one says that it could lead")
        began = datetime.now(UTC)
        fault(leader.way)
        seconds = stale_for(database, redis_client, 1)
        leads(standby)
        assert leader.role == "standby"
        code, why = leader.daemon.get("/readyz")
        status = leader.daemon.status()
        assert code == 503
        assert status["last_error"] in why
        assert "CDC_REDIS_URL" in why
        since = datetime.fromisoformat(status["last_error_since"])
        assert -2 < (since - began).total_seconds() < 2
        assert leader.daemon.metric("cdc_invalidator_handovers_total") == 1
        assert leader.daemon.metric("cdc_invalidator_can_lead") == 0
        writer.goes_on()
        leader.way.mend()
        # What was on its way comes late now, and does no harm.
        eventually(lambda: leader.daemon.get("/readyz")[0] == 200, "it could lead again")
        assert leader.daemon.status()["last_error"] is None
        writer.goes_on()
    print(f"stale for {seconds:.1f} s")
    assert seconds < MOST_STALE
    assert (leader.role, standby.role) == ("standby", "leader")
    assert_all_is_well(database, redis_client, leader.daemon, standby.daemon)
    assert not standby.daemon.named("gap")
    assert handovers(leader, standby) == 1


def test_while_redis_is_away_for_all_nobody_leaves_the_slot_and_both_say_what_is_wrong(
    both: tuple[Half, Half], database: str, redis_url: str, redis_client: redis.Redis
) -> None:
    leader, standby = both
    with Writer(database, redis_url) as writer:
        writer.goes_on()
        eventually(lambda: offers(database) == 1, "the other one says that it could lead")
        for half in both:
            half.way.refuse()
        eventually(lambda: offers(database) == 0, "it says so no more")
        eventually(lambda: leader.daemon.metric("cdc_invalidator_blocked_seconds") > 2 * PATIENCE, "it is blocked")
        for half in both:
            unready(half)
            assert half.daemon.get("/livez")[0] == 200
            assert "CDC_REDIS_URL" in half.daemon.status()["last_error"]
        assert leader.role == "leader"
        for half in both:
            half.way.mend()
        for half in both:
            half.daemon.ready()
        writer.goes_on()
    assert_all_is_well(database, redis_client, leader.daemon, standby.daemon)
    assert (leader.role, standby.role) == ("leader", "standby")
    assert handovers(*both) == 0
    assert not [gap for half in both for gap in half.daemon.named("gap")[1:]]


class OnlyProbes(Proxy):
    """Lets through what a daemon that stands by asks, and breaks off where the watermark is written."""

    breaking = False

    def pieces(self, data: bytes) -> Iterator[bytes]:
        if self.breaking and b"system_id" in data:
            self.cut()
            return
        yield data


def test_where_redis_answers_both_and_takes_the_busts_of_none_the_slot_does_not_go_to_and_fro(
    make: Callable[..., Half], database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    first = make(OnlyProbes)
    first.daemon.ready()
    settled(database, redis_client, slot_name)
    second = make(OnlyProbes)
    second.daemon.ready()
    eventually(lambda: offers(database) == 1, "the other one says that it could lead")
    first.way.breaking = second.way.breaking = True  # type: ignore[attr-defined]
    leads(second)
    # The first one has worked before, and so says soon that it could lead. The second has not, and does so later.
    leads(first)
    eventually(lambda: first.daemon.metric("cdc_invalidator_blocked_seconds") > PATIENCE + 2, "it gets on no better")
    assert handovers(first, second) <= 2
    first.way.breaking = second.way.breaking = False  # type: ignore[attr-defined]
    execute(database, "INSERT INTO things VALUES (1, 'new')")
    assert_all_is_well(database, redis_client, first.daemon, second.daemon)


def test_a_wait_for_readers_who_see_nothing_yet_is_no_reason_to_leave_the_slot(
    make: Callable[..., Half], tmp_path: Path, redis_client: redis.Redis, slot_name: str
) -> None:
    with Postgres() as server:
        create(server.dsn)
        leader = make(dsn=server.dsn)
        leader.daemon.ready()
        settled(server.dsn, redis_client, slot_name)
        standby = make(dsn=server.dsn)
        standby.daemon.ready()
        with invisible_commits(server.dsn):
            writing = threading.Thread(target=execute, args=[server.dsn, "INSERT INTO things VALUES (1, 'new')"])
            writing.start()
            began = leader.daemon.seen("bust")
            eventually(lambda: seconds_since(began) > PATIENCE + 1.5, "the watermark waits for long")
            assert leader.daemon.get("/readyz")[0] == standby.daemon.get("/readyz")[0] == 200
            assert leader.daemon.metric("cdc_invalidator_blocked_seconds") == 0
        writing.join()
        settled(server.dsn, redis_client, slot_name)
        assert leader.role == "leader"
        for half in (leader, standby):
            half.daemon.kill()
    assert handovers(leader, standby) == 0


def seconds_since(event: dict[str, Any]) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(event["ts"])).total_seconds()


def test_the_slot_is_left_to_nobody_who_is_frozen(both: tuple[Half, Half], database: str) -> None:
    leader, standby = both
    eventually(lambda: offers(database) == 1, "the other one says that it could lead")
    standby.daemon.send(signal.SIGSTOP)
    leader.way.refuse()
    eventually(lambda: leader.daemon.metric("cdc_invalidator_blocked_seconds") > PATIENCE + 1.5, "it is blocked")
    assert offers(database) == 1
    assert leader.role == "leader"
    standby.daemon.send(signal.SIGCONT)
    leads(standby)


def test_a_free_slot_is_left_to_the_one_that_redis_hears(
    both: tuple[Half, Half], make: Callable[..., Half], database: str, redis_client: redis.Redis
) -> None:
    leader, unheard = both
    heard = make()
    heard.daemon.ready()
    unheard.way.refuse()
    unready(unheard)
    leader.daemon.kill()
    leads(heard)
    assert unheard.role == "standby"
    # And to nobody, where there is none.
    heard.daemon.kill()
    leads(unheard)
    unheard.way.mend()
    assert_all_is_well(database, redis_client, unheard.daemon)


def test_alone_a_leader_keeps_the_slot_and_says_what_is_wrong(make: Callable[..., Half], database: str) -> None:
    alone = make()
    alone.daemon.ready()
    # As a daemon of an older version stands by: it says nothing of itself.
    with psycopg.connect(database, application_name="cdc-invalidator catalogs", autocommit=True):
        alone.way.refuse()
        unready(alone)
        eventually(lambda: alone.daemon.metric("cdc_invalidator_blocked_seconds") > PATIENCE + 1, "it is blocked")
        assert alone.role == "leader"
        alone.way.mend()
        alone.daemon.ready()
    assert alone.daemon.status()["last_error"] is None
    eventually(lambda: alone.daemon.metric("cdc_invalidator_blocked_seconds") == 0, "the metric says so")


def test_a_slot_with_too_much_wal_is_left_to_the_other_one_rather_than_dropped(
    make: Callable[..., Half], database: str, redis_client: redis.Redis, slot_name: str
) -> None:
    limit = {"max_retained_wal": str(1 << 20)}
    leader = make(**limit)
    leader.daemon.ready()
    settled(database, redis_client, slot_name)
    standby = make(**limit)
    standby.daemon.ready()
    eventually(lambda: offers(database) == 1, "the other one says that it could lead")
    leader.way.refuse()
    redis_client.set("t:thing:1", "stale")
    execute(database, "INSERT INTO things SELECT n, repeat('x', 1000) FROM generate_series(1, 5000) n")
    leads(standby)
    eventually(lambda: not redis_client.exists("t:thing:1"), "the key is busted")
    settled(database, redis_client, slot_name)
    assert not standby.daemon.named("gap")
    assert not [gap for gap in leader.daemon.named("gap") if gap["reason"] == "position_given_up"]


@contextmanager
def cut_in_turn(halves: tuple[Half, Half]) -> Iterator[Callable[[], Half]]:
    """Cut the way of whoever leads, and mend the other's."""

    def turn() -> Half:
        leader = next(half for half in halves if half.role == "leader")
        leader.way.refuse()
        return leader

    yield turn
    for half in halves:
        half.way.mend()


@pytest.mark.timeout(240)
def test_whoever_leads_is_cut_off_again_and_again_and_no_bust_is_lost(
    both: tuple[Half, Half], database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    stale: list[float] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(database, redis_url, first=n * 10_000_000)) for n in range(1, 4)]
        with cut_in_turn(both) as turn:
            for number in range(3):
                eventually(lambda: offers(database) == 1, "the other one says that it could lead")
                lost = turn()
                stale.append(stale_for(database, redis_client, number))
                lost.way.mend()
                for writer in writers:
                    writer.goes_on()
    print("stale for", ", ".join(f"{seconds:.1f}" for seconds in stale), "s")
    assert max(stale) < MOST_STALE
    assert_all_is_well(database, redis_client, *(half.daemon for half in both))
    assert handovers(*both) == 3
    # Nobody had to sweep: what was stale was busted key by key.
    assert [len(half.daemon.named("gap")) for half in both] == [1, 0]
    assert json.loads(redis_client.hget(f"cdc:{slot_name}:watermark", "rules"))  # type: ignore[arg-type]
