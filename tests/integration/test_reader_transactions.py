"""Reads inside transactions: what only the transaction sees comes from no cache and into none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg2
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from prometheus_client import CollectorRegistry
from psycopg.rows import class_row
from readers import Reads, rules_file
from running import execute
from sqlalchemy.orm import Mapped, mapped_column

from cdc_invalidator.reader.transactions import own_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
READ = "SELECT name FROM users WHERE id = 1"
WRITE = "UPDATE users SET name = 'written' WHERE id = 1"
REPEATABLE = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"


class Base(sqlalchemy.orm.DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Session:
    """A connection of some driver: ``of`` is what a program hands over, ``run`` runs a statement on it."""

    def __init__(self, of: Any, run: Callable[[str], Any], rollback: Callable[[], Any]) -> None:
        self.of = of
        self.run = run
        self.rollback = rollback

    def load(self, id: int) -> Any:  # noqa: A002  the parameter's name
        assert id == 1
        return self.run(READ)

    def many(self, ids: list[int]) -> list[Any]:
        return [self.load(each) for each in ids]


def _value(found: Any) -> Any:
    return None if found is None else found[0]


@contextlib.contextmanager
def opened(kind: str, dsn: str, reads: Reads) -> Iterator[Session]:
    """A session that loads on the thread or loop that the shell under test uses."""
    url = sqlalchemy.engine.make_url(dsn.replace("postgresql://", "postgresql+psycopg://"))
    with contextlib.ExitStack() as stack:
        if kind in {"psycopg", "psycopg2"}:
            connect: Any = psycopg.connect if kind == "psycopg" else psycopg2.connect
            connection = stack.enter_context(contextlib.closing(connect(dsn)))

            def run(sql: str) -> Any:
                with connection.cursor() as cursor:
                    cursor.execute(sql)
                    return _value(cursor.fetchone()) if cursor.description else None

            yield Session(connection, run, connection.rollback)
        elif kind in {"sqlalchemy-connection", "sqlalchemy-session"}:
            engine = sqlalchemy.create_engine(url)
            stack.callback(engine.dispose)
            made: Any = engine.connect() if kind == "sqlalchemy-connection" else sqlalchemy.orm.Session(engine)
            found: Any = stack.enter_context(made)

            def run_sqlalchemy(sql: str) -> Any:
                result = found.execute(sqlalchemy.text(sql))
                return result.scalar() if result.returns_rows else None

            yield Session(found, run_sqlalchemy, found.rollback)
        elif kind == "psycopg-async":
            held = reads.wait(_in_a_coroutine(psycopg.AsyncConnection.connect, dsn))
            stack.callback(lambda: reads.wait(held.close()))

            async def fetched(sql: str) -> Any:
                cursor = await held.execute(sql)
                return _value(await cursor.fetchone()) if cursor.description else None

            yield Session(held, lambda sql: reads.wait(fetched(sql)), lambda: reads.wait(held.rollback()))
        else:
            async_engine = sqlalchemy.ext.asyncio.create_async_engine(url)
            stack.callback(lambda: reads.wait(async_engine.dispose()))
            if kind == "sqlalchemy-async-session":
                of: Any = sqlalchemy.ext.asyncio.AsyncSession(async_engine)
            else:
                of = async_engine.connect()
                reads.wait(of.start())
            stack.callback(lambda: reads.wait(of.close()))

            async def result_of(sql: str) -> Any:
                result = await of.execute(sqlalchemy.text(sql))
                return result.scalar() if result.returns_rows else None

            yield Session(of, lambda sql: reads.wait(result_of(sql)), lambda: reads.wait(of.rollback()))


async def _in_a_coroutine(function: Callable[..., Any], *args: Any) -> Any:
    return await function(*args)


WAITING = ("psycopg", "psycopg2", "sqlalchemy-connection", "sqlalchemy-session")
AWAITING = ("psycopg-async", "sqlalchemy-async-connection", "sqlalchemy-async-session")


class Scene:
    def __init__(self, reads: Reads, session: Session, caches: Any, registry: CollectorRegistry, dsn: str) -> None:
        self.reads = reads
        self.session = session
        self.caches = caches
        self._registry = registry
        self.dsn = dsn

    def read(self, **options: Any) -> Any:
        return self.caches.user.get(id=1, load=self.session.load, connection=self.session.of, **options)

    @property
    def beside(self) -> float:
        name = "cdc_invalidator_reader_bypasses_total"
        return self._registry.get_sample_value(name, {"cache": "user", "reason": "transaction"}) or 0.0


@pytest.fixture(params=[*WAITING, *AWAITING])
def scene(request: pytest.FixtureRequest, database: str, redis_url: str, tmp_path: Path) -> Iterator[Scene]:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    registry = CollectorRegistry()
    with (
        Reads("async" if request.param in AWAITING else "sync") as reads,
        opened(request.param, database, reads) as session,
    ):
        caches = reads.caches(rules_file(tmp_path, RULES), redis_url, registry=registry)
        yield Scene(reads, session, caches, registry, database)


def test_what_is_rolled_back_is_in_no_cache_and_one_reads_ones_own_writes(scene: Scene, redis_client: Any) -> None:
    session = scene.session
    session.run(WRITE)
    assert scene.read() == "written"
    assert scene.caches.user.get_many([1], load=session.many, connection=session.of) == ["written"]
    assert scene.caches.user.warm([1], load=session.load, connection=session.of) == 0
    assert not redis_client.keys("*")
    session.rollback()
    assert scene.read() == scene.read() == "Ada"
    assert scene.beside == 3
    session.rollback()
    session.run(WRITE)
    assert scene.read() == "written", "the entry is there, and lacks what this transaction has written"
    session.rollback()
    assert scene.read() == "Ada"


def test_an_old_snapshot_fills_nothing(scene: Scene, redis_client: Any) -> None:
    session = scene.session
    session.run(REPEATABLE)
    session.run(READ)
    execute(scene.dsn, "UPDATE users SET name = 'Grace' WHERE id = 1")
    assert scene.read() == "Ada", "it is so in this snapshot"
    assert not redis_client.keys("*")
    session.rollback()
    assert scene.read() == "Grace"


def test_a_transaction_that_only_reads_uses_the_cache(scene: Scene, redis_client: Any) -> None:
    session = scene.session
    session.run(READ)
    assert scene.read() == scene.read() == "Ada"
    assert redis_client.exists("t:user:1")
    assert scene.beside == 0


def test_a_write_in_a_savepoint_counts(scene: Scene, redis_client: Any) -> None:
    for statement in ("SAVEPOINT a", WRITE, "RELEASE a"):
        scene.session.run(statement)
    assert scene.read() == "written"
    assert not redis_client.keys("*")


def test_outside_a_transaction_nothing_is_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.session.rollback()
    monkeypatch.setattr("cdc_invalidator.reader.transactions.SQL", "this is no SQL")
    assert scene.read() == "Ada"
    assert scene.beside == 0


@pytest.mark.parametrize("kind", [kind for kind in (*WAITING, *AWAITING) if "sqlalchemy" in kind])
def test_what_has_begun_but_run_nothing_is_not_asked(
    kind: str, database: str, redis_url: str, redis_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    reads_kind = "async" if kind in AWAITING else "sync"
    with Reads(reads_kind) as reads, opened(kind, database, reads) as session:
        caches = reads.caches(rules_file(tmp_path, RULES), redis_url)
        assert caches.user.get(id=1, load=session.load, connection=session.of) == "Ada"
        session.rollback()
        reads.wait(_begun(session.of))
        monkeypatch.setattr("cdc_invalidator.reader.transactions.SQL", "this is no SQL")
        assert caches.user.get(id=1, load=_never, connection=session.of) == "Ada"
        if "session" in kind:
            engine = session.of.get_bind()
            assert engine.pool.checkedout() == 0
        monkeypatch.undo()
        session.run(WRITE)
        assert caches.user.get(id=1, load=session.load, connection=session.of) == "written"


def _begun(of: Any) -> Any:
    begun = of.begin()
    return begun.start() if hasattr(begun, "start") else None


def _never(**_: Any) -> Any:
    pytest.fail("loaded")


@pytest.mark.parametrize("begun", ["in the program", "by the session"])
def test_a_session_within_a_transaction_of_its_connection_has_its_view(begun: str, database: str) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    engine = sqlalchemy.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection, sqlalchemy.orm.Session(connection) as session:
        assert not own_view(session)
        connection.exec_driver_sql("INSERT INTO users VALUES (1, 'Ada')")
        if begun == "by the session":
            session.begin()
        assert own_view(session)
    engine.dispose()


def test_what_is_not_committed_is_not_written_through(scene: Scene, redis_client: Any) -> None:
    session, user = scene.session, scene.caches.user
    with user.writing(id=1, connection=session.of) as write:
        session.run(WRITE)
        assert write.set("written") is False
        assert not redis_client.keys("*"), "the lease was given back"
        assert write.set("written") is False
    assert scene.beside == 1
    with user.writing(id=1, connection=session.of) as write:
        assert not redis_client.keys("*"), "it was entered in a transaction that has written"
        assert write.set("written") is False
    assert scene.beside == 2
    session.rollback()
    with user.writing(id=1, connection=session.of) as write:
        assert redis_client.keys("*")
        session.run(WRITE)
        session.run("COMMIT")
        session.rollback()
        assert write.set("written") is True
    assert user.get(id=1, load=_never) == "written"


def test_what_is_invalidated_before_the_commit_is_told(
    scene: Scene, redis_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session, user = scene.session, scene.caches.user
    assert scene.read() == "Ada"
    session.rollback()
    session.run(WRITE)
    assert user.invalidate(id=1, connection=session.of) is False
    assert not redis_client.keys("*")
    assert scene.beside == 1
    assert "`invalidate` was called inside a transaction that has written; do it after the commit" in caplog.text
    session.rollback()
    assert user.invalidate(id=1, connection=session.of) is True


def test_objects_that_a_session_keeps_after_its_commit_hinder_no_write_through(
    database: str, redis_url: str, tmp_path: Path
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    engine = sqlalchemy.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with Reads("sync") as reads, sqlalchemy.orm.Session(engine, expire_on_commit=False) as session:
        user = reads.caches(rules_file(tmp_path, RULES), redis_url, connection=lambda: session).user
        with user.writing(id=1) as write:
            found = session.get(User, 1)
            assert found is not None
            found.name = "Grace"
            assert write.set("not flushed") is False
        with user.writing(id=1) as write:
            assert write.set("not flushed") is False
        session.commit()
        with user.writing(id=1) as write:
            assert write.set("Grace") is True
        assert user.invalidate(id=1) is True
    engine.dispose()


def test_a_failed_transaction_says_so_itself(scene: Scene, redis_client: Any) -> None:
    with pytest.raises(Exception, match="does not exist"):
        scene.session.run("SELECT * FROM nothing")
    with pytest.raises(Exception, match="current transaction is aborted"):
        scene.read()
    assert not redis_client.keys("*")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_connection_of_a_decorated_function_is_asked(
    kind: str, database: str, redis_url: str, redis_client: Any, tmp_path: Path
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    with Reads(kind) as reads, opened("psycopg", database, reads) as session:
        caches = reads.caches(rules_file(tmp_path, RULES), redis_url)

        @caches._of.user.cached(ignore=["log", "connection"])  # type: ignore[untyped-decorator]
        def name(log: Any, connection: Any, id: int) -> Any:  # noqa: A002
            assert (log, connection) == (None, session.of)
            return session.load(id)

        session.run(WRITE)
        assert reads.wait(name(None, session.of, 1)) == "written"
        assert not redis_client.keys("*")
        assert reads.wait(name.invalidate(None, session.of, 1)) is False
        assert reads.wait(name.invalidate(id=1)) is True, "nobody knows of a connection"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_connection_of_all_reads_is_named_once(
    kind: str, database: str, redis_url: str, redis_client: Any, tmp_path: Path
) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    with Reads(kind) as reads, opened("sqlalchemy-session", database, reads) as session:
        caches = reads.caches(rules_file(tmp_path, RULES), redis_url, connection=lambda: session.of)
        session.run(WRITE)
        assert caches.user.get(id=1, load=session.load) == "written"
        assert not redis_client.keys("*")
        session.rollback()
        assert caches.user.get(id=1, load=session.load) == "Ada"
        assert redis_client.keys("*")


def test_a_session_that_holds_objects_may_answer_from_memory(database: str) -> None:
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (1, 'Ada')")
    engine = sqlalchemy.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with sqlalchemy.orm.Session(engine) as session:
        user = session.get(User, 1)
        assert user is not None
        execute(database, "UPDATE users SET name = 'Grace'")
        again = session.get(User, 1)
        assert again is user
        assert again.name == "Ada"
        assert own_view(session)
        session.commit()
        assert not own_view(session), "it loads them again"
        user.name = "not flushed yet"
        assert own_view(session)
        session.rollback()
        session.add(User(id=2, name="not flushed yet"))
        assert own_view(session)
        session.rollback()
    engine.dispose()


def test_a_connection_that_makes_objects_of_its_rows_can_be_asked(database: str) -> None:
    with psycopg.connect(database, row_factory=class_row(User)) as connection:
        connection.execute("SELECT 1")
        assert not own_view(connection)
        connection.execute("CREATE TABLE written (id int)")
        assert own_view(connection)


def test_what_can_not_be_asked_is_refused(redis_url: str, tmp_path: Path, database: str) -> None:
    engine = sqlalchemy.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with Reads("sync") as reads:
        for wrong, sentence in (
            (engine, "a Engine can't be asked whether its transaction has written"),
            (sqlalchemy.orm.sessionmaker(engine), "a sessionmaker makes a new session each time"),
        ):
            with pytest.raises(TypeError, match=sentence):
                reads.caches(rules_file(tmp_path, RULES), redis_url, connection=wrong)
            caches = reads.caches(rules_file(tmp_path, RULES), redis_url)
            with pytest.raises(TypeError, match=sentence):
                caches.user.get(id=1, load=lambda id: id, connection=wrong)  # noqa: A006
    engine.dispose()
