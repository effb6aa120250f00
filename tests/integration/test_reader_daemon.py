"""The reader and the daemon together: PostgreSQL, Valkey, and a process that busts."""

from __future__ import annotations

import asyncio
import decimal
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, rules_file
from running import RunningDaemon, eventually, execute, settled, watermark
from stage import Stage

from cdc_invalidator.reader.commit import acommit_lsn, commit_lsn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m, negative_ttl: 1m}
  team: {key: "t:team:{team_id}", ttl: 5m}
  page: {key: "t:page:{id}:v{version}", version: "t:page:{id}:ver", ttl: 5m}
  old-user: {key: "t:old-user:{id}", ttl: 5m, stale_for: 1m}
  old-page: {key: "t:old-page:{id}:v{version}", version: "t:old-page:{id}:ver", ttl: 5m, stale_for: 1m}
  brief: {key: "t:brief:{id}", ttl: 5m, stale_for: 300ms}
  rate: {key: "t:rate:{id}", ttl: 5m, ttl_only: true}
rules:
  - name: user-changed
    table: public.users
    bust: [user, page, old-user, old-page, brief, team]
"""


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture
def waiting() -> Iterator[Reads]:
    """One shell, where the other would only take the same time again."""
    with Reads("sync") as reads:
        yield reads


class ReadStage(Stage):
    """A table of users, the daemon on it, and reads of both shells."""

    def __init__(self, daemon: RunningDaemon, client: Any = None) -> None:
        super().__init__(daemon, client)
        self.registry = CollectorRegistry()
        self._connection = psycopg.connect(self.dsn, autocommit=True)

    def end(self) -> None:
        self._connection.close()
        super().end()

    def caches(self, reads: Reads, **settings: Any) -> Any:
        return reads.caches(self.rules, self.redis_url, slot=self.daemon.slot, registry=self.registry, **settings)

    def name(self, id: int) -> str | None:  # noqa: A002  the parameter's name
        row = self._connection.execute("SELECT name FROM users WHERE id = %s", [id]).fetchone()
        return None if row is None else str(row[0])

    def members(self, team_id: int) -> list[str]:
        rows = self._connection.execute("SELECT name FROM users WHERE team_id = %s ORDER BY id", [team_id]).fetchall()
        return [name for (name,) in rows]

    def write(self, sql: str) -> int:
        """Commit, and give the commit's LSN."""
        with psycopg.connect(self.dsn) as connection:
            connection.execute(sql.encode())
            connection.commit()
            return commit_lsn(connection)

    def bypasses(self, reason: str, cache: str = "user") -> float:
        name = "cdc_invalidator_reader_bypasses_total"
        return self.registry.get_sample_value(name, {"cache": cache, "reason": reason}) or 0.0


@pytest.fixture
def stage(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> Iterator[ReadStage]:
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text, team_id int)",
        "ALTER TABLE users REPLICA IDENTITY FULL",
        "INSERT INTO users VALUES (1, 'Ada', 7), (2, 'Barbara', 9)",
    )
    rules = rules_file(tmp_path, RULES)
    with ReadStage.playing(database, redis_url, rules, slot_name, client=redis_client) as stage:
        yield stage


def test_whatever_is_written_shows(stage: ReadStage, reads: Reads) -> None:
    caches = stage.caches(reads)

    def shown() -> list[Any]:
        return [
            *(caches.user.get(id=number, load=stage.name) for number in (1, 2, 3)),
            *caches.page.get_many([1, 2], load=lambda ids: [stage.name(each) for each in ids]),
            *(caches.team.get(team_id=number, load=stage.members) for number in (7, 9)),
        ]

    assert shown() == ["Ada", "Barbara", None, "Ada", "Barbara", ["Ada"], ["Barbara"]]
    stage.write("UPDATE users SET name = 'Grace', team_id = 9 WHERE id = 1")
    stage.settle()
    assert shown() == ["Grace", "Barbara", None, "Grace", "Barbara", [], ["Grace", "Barbara"]]
    stage.write("INSERT INTO users VALUES (3, 'Edsger', 7)")
    stage.write("DELETE FROM users WHERE id = 2")
    stage.settle()
    assert shown() == ["Grace", None, "Edsger", "Grace", None, ["Edsger"], ["Grace"]]
    stage.write("TRUNCATE users")
    stage.settle()
    assert shown() == [None, None, None, None, None, [], []]


def test_a_parameter_in_another_spelling_leaves_nothing_that_no_bust_finds(stage: ReadStage, reads: Reads) -> None:
    user = stage.caches(reads).user
    spelled: tuple[Any, ...] = (1, "1", "01", " 1", "+1", decimal.Decimal("1.0"))
    assert [user.get(id=each, load=stage.name) for each in spelled] == ["Ada"] * len(spelled)
    assert stage.client.keys("t:user:*") == [b"t:user:1"]
    stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    assert [user.get(id=each, load=stage.name) for each in spelled] == ["Grace"] * len(spelled)


def test_a_read_that_asks_for_an_lsn_is_not_served_under_the_name_of_a_column_s_former_type(
    stage: ReadStage, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reader does not look again.
    monkeypatch.setattr("cdc_invalidator.reader.agreement.LOOK_SECONDS", 60.0)
    stage.write("ALTER TABLE users ALTER COLUMN id TYPE numeric(10,2)")
    stage.write("UPDATE users SET name = 'Eve' WHERE id = 1")
    stage.settle()
    caches = stage.caches(reads)
    assert caches.user.get(id=1, load=stage.name) == "Eve"
    assert stage.client.keys("t:user:*") == [b"t:user:1.00"]
    stage.write("ALTER TABLE users ALTER COLUMN id TYPE numeric(10,3)")
    lsn = stage.write("UPDATE users SET name = 'Ada' WHERE id = 1")
    stage.settle()
    # What was there has been swept; it stores again what no bust will name.
    assert caches.at_least(lsn).user.get(id=1, load=stage.name) == "Ada"
    assert caches.user.get(id=1, load=stage.name) == "Ada"
    lsn = stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    assert caches.at_least(lsn).user.get(id=1, load=stage.name) == "Grace"
    assert stage.bypasses("templates_differ") == 2


def test_a_program_with_other_rules_than_the_daemon_keeps_nothing(
    stage: ReadStage, waiting: Reads, tmp_path: Path
) -> None:
    newer = tmp_path / "newer.yaml"
    newer.write_text(RULES.replace("t:user:", "t:person:"))
    caches = waiting.caches(newer, stage.redis_url, slot=stage.daemon.slot, registry=stage.registry)
    for name in ("Ada", "Grace"):
        lsn = stage.write(f"UPDATE users SET name = '{name}' WHERE id = 1")
        stage.settle()
        assert caches.user.get(id=1, load=stage.name) == name
        assert caches.at_least(lsn).user.get(id=1, load=stage.name) == name
        assert caches.user.get_many([1], load=lambda ids: [stage.name(each) for each in ids]) == [name]
    assert stage.client.keys("t:person:*") == []
    assert stage.bypasses("templates_differ") == 6
    # Its other caches are the daemon's.
    caches.page.get(id=1, load=stage.name)
    assert stage.client.exists("t:page:1:ver")


def test_a_load_that_a_commit_overtakes_is_not_kept(stage: ReadStage, waiting: Reads) -> None:
    caches = stage.caches(waiting)

    def slow(id: int) -> str | None:  # noqa: A002
        name = stage.name(id)
        stage.write("UPDATE users SET name = name || '!'")
        stage.settle()
        return name

    for name in ("user", "page", "old-user", "old-page"):
        before = stage.name(1)
        assert caches[name].get(id=1, load=slow) == before
        assert caches[name].get(id=1, load=stage.name) == stage.name(1)


@pytest.mark.parametrize("name", ["old-user", "old-page"])
def test_after_a_bust_one_reader_loads_and_the_others_are_shown_the_old_value(
    name: str, stage: ReadStage, reads: Reads
) -> None:
    users = stage.caches(reads)[name].using(wait=60.0)
    assert users.get(id=1, load=stage.name) == "Ada"
    stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    loading, go_on = threading.Event(), threading.Event()

    def slow(id: int) -> str | None:  # noqa: A002
        loading.set()
        assert go_on.wait(60)
        return stage.name(id)

    got: list[Any] = []
    first = threading.Thread(target=lambda: got.append(users.get(id=1, load=slow)))
    first.start()
    assert loading.wait(60)
    load = Loader({1: "not asked"})
    assert [users.get(id=1, load=load) for _ in range(3)] == ["Ada"] * 3
    assert users.get_many([1], load=load.many) == ["Ada"]
    # Who asks for what was committed is not shown what is older.
    unstale = users.using(wait=0.01, max_staleness=30.0)
    assert unstale.get(id=1, load=stage.name) == "Grace"
    go_on.set()
    first.join()
    assert got == ["Grace"]
    assert users.get(id=1, load=load) == "Grace"
    assert load.asked == []
    stale = stage.registry.get_sample_value("cdc_invalidator_reader_stale_hits_total", {"cache": name})
    assert stale == 4


def test_the_old_value_is_shown_no_longer_than_stale_for(stage: ReadStage, waiting: Reads) -> None:
    users = stage.caches(waiting).brief.using(wait=0.01)
    assert users.get(id=1, load=stage.name) == "Ada"
    stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    stage.client.set("t:brief:1\0lock", "somebody else, for ever")
    eventually(lambda: users.get(id=1, load=stage.name) == "Grace", "its time is up")
    assert stage.client.exists("t:brief:1\0stale", "t:brief:1") == 0


def test_a_sweep_leaves_no_old_value_of_its_own(stage: ReadStage, waiting: Reads) -> None:
    users = stage.caches(waiting)["old-user"]
    assert users.get(id=1, load=stage.name) == "Ada"
    stage.write("TRUNCATE users")
    stage.settle()
    assert not stage.client.keys("t:old-user:*")


def test_a_writer_reads_its_own_write(stage: ReadStage, reads: Reads) -> None:
    caches = stage.caches(reads)
    names = ("user", "page", "old-user")
    for round_ in range(20):
        for name in names:
            caches[name].get(id=1, load=stage.name)
        mine = f"Grace {round_}"
        lsn = stage.write(f"UPDATE users SET name = '{mine}' WHERE id = 1")
        view = caches.at_least(lsn)
        assert [view[name].get(id=1, load=stage.name) for name in names] == [mine] * 3
        assert view.user.get_many([1, 2], load=lambda ids: [stage.name(each) for each in ids]) == [mine, "Barbara"]
        stage.settle()
        before = stage.bypasses("behind")
        assert [view[name].get(id=1, load=stage.name) for name in names] == [mine] * 3
        assert stage.bypasses("behind") == before, "the watermark has passed it"
        load = Loader({1: "not asked"})
        assert view.user.get(id=1, load=load) == mine
        assert load.asked == []


def test_what_the_watermark_does_not_speak_for_is_loaded(stage: ReadStage, waiting: Reads) -> None:
    caches = stage.caches(waiting)
    lsn = stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    assert caches.at_least(lsn).rate.get(id=1, load=stage.name) == "Grace"
    assert stage.bypasses("ttl_only", "rate") == 1
    far = caches.at_least(2**60).user
    assert far.get(id=1, load=stage.name) == "Grace"
    assert stage.bypasses("behind") == 1
    other = waiting.caches(stage.rules, stage.redis_url, slot="nobody's")
    assert other.at_least(lsn).user.get(id=1, load=stage.name) == "Grace"
    stage.daemon.terminate()
    stage.client.hset(f"cdc:{stage.daemon.slot}:watermark", "rules", '{"another": "x"}')
    assert caches.at_least(lsn).user.get(id=1, load=stage.name) == "Grace"
    assert stage.bypasses("not_covered") == 1
    broken: Any
    for broken in ({"rules": "{"}, {"lsn": "x"}):
        stage.client.hset(f"cdc:{stage.daemon.slot}:watermark", mapping=broken)
        assert caches.at_least(lsn).user.get(id=1, load=stage.name) == "Grace"
    assert [stage.bypasses(reason) for reason in ("not_covered", "no_watermark")] == [2, 1]


def test_a_watermark_with_a_name_of_its_own_is_found_by_it(stage: ReadStage, reads: Reads) -> None:
    lsn = stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    stage.settle()
    caches = reads.caches(stage.rules, stage.redis_url, slot="nobody's", watermark=stage.slot)
    assert caches.user.get(id=1, load=stage.name) == "Grace"
    load = Loader({1: "not asked"})
    assert caches.at_least(lsn).user.get(id=1, load=load) == "Grace"
    assert load.asked == []


def test_a_feed_that_is_dead_is_noticed(stage: ReadStage, waiting: Reads) -> None:
    caches = stage.caches(waiting)
    careful = caches.user.using(max_staleness=6.0)
    load = Loader({1: "loaded"})
    assert caches.user.get(id=1, load=stage.name) == "Ada"

    def fresh() -> bool:
        asked = len(load.asked)
        careful.get(id=1, load=load)
        return len(load.asked) == asked

    eventually(fresh, "the watermark is young, and the value comes from the cache")
    stage.daemon.terminate()
    load.asked.clear()
    eventually(lambda: careful.get(id=1, load=load) == "loaded", "the watermark is old")
    assert stage.bypasses("old") >= 1
    assert caches.user.get(id=1, load=load) == "Ada", "who does not ask for it is served from the cache"
    assert caches.user.get(id=1, load=load, max_staleness=0.5) == "loaded"
    assert caches.user.get(id=1, load=load, max_staleness=3600.0) == "Ada"


def test_a_feed_that_lives_and_does_not_come_on_is_noticed(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path, waiting: Reads
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY)", "CREATE TABLE others (id int PRIMARY KEY)")
    # Until what is held back is busted, the watermark stays where it is, and is written all the same.
    text = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  other: {key: "t:other:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
  - {name: other-changed, table: public.others, debounce: 1m, bust: [other]}
"""
    rules = rules_file(tmp_path, text)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        users = waiting.caches(rules, redis_url, slot=slot_name).user
        load = Loader({1: "loaded"})
        users.get(id=1, load=Loader({1: "cached"}))
        eventually(lambda: users.get(id=1, load=load, max_staleness=6.0) == "cached", "the feed is well")
        execute(database, "INSERT INTO others VALUES (1)", "DELETE FROM others")
        eventually(lambda: users.get(id=1, load=load, max_staleness=6.0) == "loaded", "it stands still")
        mark = watermark(redis_client, slot_name)
        assert int(mark[b"at"]) - int(mark[b"as_of"]) > 5000
        assert users.get(id=1, load=load) == "cached"


def test_a_cache_that_nothing_busts_is_as_old_as_its_entry(stage: ReadStage, waiting: Reads) -> None:
    rate = stage.caches(waiting).rate
    load = Loader({1: "first"})
    assert rate.get(id=1, load=load, max_staleness=3600.0) == "first"
    load.rows[1] = "second"
    assert rate.get(id=1, load=load, max_staleness=3600.0) == "first"
    time.sleep(0.02)
    assert rate.get(id=1, load=load, max_staleness=0.01) == "second"
    assert rate.get(id=1, load=load) == "second"
    assert load.asked == [1, 1]


# ── The LSN of a commit ──────────────────────────────────────────────────────────────────────────────────────────────


def end_of(dsn: str, *, after: Callable[[], int]) -> tuple[int, int, int]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        before = commit_lsn(connection)
        given = after()
        return before, given, commit_lsn(connection)


def sqlalchemy_url(dsn: str) -> sqlalchemy.URL:
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    return sqlalchemy.URL.create(
        "postgresql+psycopg",
        username=str(parts["user"]),
        password=str(parts.get("password") or ""),
        host=str(parts["host"]),
        port=int(str(parts["port"])),
        database=str(parts["dbname"]),
    )


def test_the_lsn_of_a_commit_by_psycopg(database: str) -> None:
    execute(database, "CREATE TABLE things (id int)")

    def write() -> int:
        with psycopg.connect(database) as connection:
            connection.execute("INSERT INTO things VALUES (1)")
            with pytest.raises(ValueError, match="commit it first"):
                commit_lsn(connection)
            connection.commit()
            lsn = commit_lsn(connection)
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            return lsn

    async def awrite() -> int:
        async with await psycopg.AsyncConnection.connect(database) as connection:
            await connection.execute("INSERT INTO things VALUES (1)")
            with pytest.raises(ValueError, match="commit it first"):
                await acommit_lsn(connection)
            await connection.commit()
            return await acommit_lsn(connection)

    for each in (write, lambda: asyncio.run(awrite())):
        before, given, after = end_of(database, after=each)
        assert before < given <= after


def test_the_lsn_of_a_commit_by_sqlalchemy(database: str) -> None:
    execute(database, "CREATE TABLE things (id int)")
    insert = sqlalchemy.text("INSERT INTO things VALUES (1)")
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))

    def by_session() -> int:
        with sqlalchemy.orm.Session(engine) as session:
            session.execute(insert)
            session.commit()
            return commit_lsn(session)

    def by_connection() -> int:
        with engine.connect() as connection:
            connection.execute(insert)
            connection.commit()
            return commit_lsn(connection)

    def by_engine() -> int:
        with engine.begin() as connection:
            connection.execute(insert)
        return commit_lsn(engine)

    async def awaited(by: str) -> int:
        made = sqlalchemy.ext.asyncio.create_async_engine(sqlalchemy_url(database))
        try:
            if by == "session":
                async with sqlalchemy.ext.asyncio.AsyncSession(made) as session:
                    await session.execute(insert)
                    await session.commit()
                    return await acommit_lsn(session)
            async with made.connect() as connection:
                await connection.execute(insert)
                await connection.commit()
                return await acommit_lsn(made if by == "engine" else connection)
        finally:
            await made.dispose()

    awaiting = [lambda by=by: asyncio.run(awaited(by)) for by in ("session", "engine", "connection")]
    for each in (by_session, by_connection, by_engine, *awaiting):
        before, given, after = end_of(database, after=each)
        assert before < given <= after
    engine.dispose()


def test_the_watermark_reaches_the_lsn_of_a_commit(stage: ReadStage) -> None:
    lsn = stage.write("UPDATE users SET name = 'Grace' WHERE id = 1")
    eventually(
        lambda: int(watermark(stage.client, stage.daemon.slot)[b"lsn"]) >= lsn, "it is passed on an idle database"
    )
