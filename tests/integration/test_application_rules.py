"""The rule files of real applications, on real servers: after each write, no entry is stale, and others are there.

For each application, `applications/NAME.sql` has its tables, some rows, and a view that says what it caches of them:
``cached (key, value)``. `applications/NAME.writes.sql` has what it writes, a transaction a paragraph. Where the rules
bust entries that are still right, the paragraph says how many: ``-- in vain: 1``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psycopg
import pytest
from running import RunningDaemon, command, execute, settled

from cdc_invalidator.commands import trial
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import redis

RULES = Path(__file__).parents[2] / "rules" / "applications"
SCENES = Path(__file__).parent / "applications"
NAMES = ["mastodon", "mattermost", "outline", "saleor", "thingsboard", "zulip"]


class Write(NamedTuple):
    """One transaction of an application; ``in_vain``: how many right entries it busts."""

    title: str
    sql: str
    in_vain: int


def writes(name: str) -> Iterator[Write]:
    for paragraph in (SCENES / f"{name}.writes.sql").read_text().strip().split("\n\n"):
        title, *lines = paragraph.splitlines()
        in_vain = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("-- in vain: ")]
        yield Write(title.removeprefix("-- "), "\n".join(lines), sum(in_vain))


class Application:
    """The application's database and its entries in Redis, which it never deletes itself."""

    def __init__(self, dsn: str, client: redis.Redis) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        self._client = client
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def truth(self) -> dict[str, str]:
        """Return the value of each key that was seen ever; of some there is nothing now."""
        query = "SELECT key, coalesce(nullif(value, ''), 'nothing') FROM cached WHERE key IS NOT NULL"
        found: dict[str, str] = dict(self._connection.execute(query).fetchall())
        self._seen |= found.keys()
        return dict.fromkeys(self._seen, "nothing") | found

    def foresee(self, sql: str) -> None:
        """Look at the keys that a transaction will bring, so that readers may have cached that there is nothing."""
        with self._connection.transaction(force_rollback=True):
            self._connection.execute(sql.encode())
            self.truth()

    def store(self) -> dict[str, str]:
        """Let readers store all that is not there, and return all values."""
        values = self.truth()
        with self._client.pipeline(transaction=False) as pipe:
            for key, value in values.items():
                pipe.set(key, value, nx=True)
            pipe.execute()
        return values

    def write(self, sql: str) -> None:
        self._connection.execute(sql.encode())

    def left(self) -> dict[str, str]:
        """Return the entries that are there."""
        keys = sorted(self._seen)
        values: Sequence[Any] = self._client.mget(keys)
        return {key: value.decode() for key, value in zip(keys, values, strict=True) if value is not None}

    def stale(self) -> dict[str, str]:
        truth = self.truth()
        return {key: value for key, value in self.left().items() if value != truth[key]}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rules(name: str, tmp_path: Path) -> Path:
    """The rule file as it is, but for second busts: these come at once, so that nobody waits for them."""
    path = tmp_path / f"{name}.yaml"
    path.write_text((RULES / f"{name}.yaml").read_text().replace("again_after: 1s", "again_after: 1ms"))
    return path


@pytest.fixture
def daemon(
    name: str, rules: Path, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> RunningDaemon:
    """A daemon, not yet started, whose administrator has run the SQL that `check` gives."""
    with psycopg.connect(database) as connection:
        connection.execute((SCENES / f"{name}.sql").read_bytes())
    with Application(database, redis_client) as application:
        application.store()
    daemon = RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name, log_keys="raw")
    execute(database, *(statement for finding in findings(daemon) for statement in finding["sql"]))
    return daemon


def findings(daemon: RunningDaemon) -> list[dict[str, Any]]:
    """Return what `check` finds, but for notes."""
    settings = {
        "postgres_dsn": daemon.dsn,
        "redis_url": daemon.redis_url,
        "slot": daemon.slot,
        "publication": daemon.slot,
    }
    told = json.loads(command("check", "--format", "json", rules=daemon.rules, **settings).stdout)
    return [finding for finding in told["findings"] if finding["severity"] != "note"]


def test_every_rule_file_is_among_these() -> None:
    assert sorted(path.stem for path in RULES.glob("*.yaml")) == NAMES


def test_the_tests_of_a_rule_file_pass_and_change_each_table_of_its_rules(name: str) -> None:
    path = RULES / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=../schema.json\n")
    found = load_rules(path, {})
    assert {test.table for test in found.tests} == set(found.tables)
    assert [outcome for outcome in trial.run(found) if not outcome.passed] == []


def test_the_table_of_applications_counts_the_entries_and_lines_of_each_file(name: str) -> None:
    text = (RULES / f"{name}.yaml").read_text().partition("\ntests:\n")[0]
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    (row,) = re.findall(rf"^\| \[\w+\]\({name}\.yaml\) .*$", (RULES / "README.md").read_text(), re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4:6] == [
        str(sum(not cache.ttl_only for cache in load_rules(RULES / f"{name}.yaml", {}).caches.values())),
        str(len(lines)),
    ]


def test_after_each_write_no_entry_is_stale_and_those_that_are_right_are_there(
    name: str, daemon: RunningDaemon, redis_client: redis.Redis
) -> None:
    busted: set[str] = set()
    in_vain: dict[str, int] = {}
    with daemon, Application(daemon.dsn, redis_client) as application:
        daemon.ready()
        settled(daemon.dsn, redis_client, daemon.slot)
        for write in writes(name):
            application.foresee(write.sql)
            before = application.store()
            application.write(write.sql)
            settled(daemon.dsn, redis_client, daemon.slot)
            assert not application.stale(), write.title
            gone, after = before.keys() - application.left().keys(), application.truth()
            vain = [key for key in gone if before[key] == after[key]]
            if vain:
                in_vain[write.title] = len(vain)
            busted |= gone
        assert in_vain == {write.title: write.in_vain for write in writes(name) if write.in_vain}
        assert not daemon.errors
        assert not daemon.named("rule_broken")
        assert not daemon.named("query_failed")
        caches = load_rules(daemon.rules, {}).caches.values()
        matched = {cache.name for cache in caches if any(cache.key.like().fullmatch(key.encode()) for key in busted)}
        assert matched == {cache.name for cache in caches if not cache.ttl_only}, "each cache was busted"


def test_after_a_backlog_of_all_writes_no_entry_is_stale(
    name: str, daemon: RunningDaemon, redis_client: redis.Redis
) -> None:
    with Application(daemon.dsn, redis_client) as application:
        with daemon:
            daemon.ready()
            settled(daemon.dsn, redis_client, daemon.slot)
            daemon.terminate()
        for write in writes(name):
            application.store()
            application.write(write.sql)
        application.store()
        assert application.stale()
        with daemon:
            daemon.ready()
            settled(daemon.dsn, redis_client, daemon.slot)
            assert not application.stale()


def test_check_finds_nothing_that_its_own_sql_does_not_settle(daemon: RunningDaemon) -> None:
    assert findings(daemon) == []
