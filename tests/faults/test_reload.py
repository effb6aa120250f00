"""Rules that change while the daemon runs: good ones come into force at once, wrong ones never, and no bust is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from prometheus_client import CollectorRegistry
from running import SECONDS, RunningDaemon, eventually, execute, settled, wal_position, watermark
from stage import Stage
from writing import Writer, assert_all_is_well, create

from cdc_invalidator import reload
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.model import RuleSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCHEMA = (
    "CREATE TABLE others (id int PRIMARY KEY, team int, body text)",
    "CREATE TABLE late (id int PRIMARY KEY, team int, body text)",
    "CREATE TABLE keyless (id int, body text)",
    "INSERT INTO others SELECT n, n, 'old' FROM generate_series(1, 99) n",
    "INSERT INTO late SELECT n, n, 'old' FROM generate_series(1, 99) n",
)
RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  other: {key: "t:other:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: other-changed, table: public.others, bust: [other]}
"""
# The same two, `other` busted otherwise, one more cache, and one more table.
MORE = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  other: {key: "t:other:{id}", ttl: 5m}
  late: {key: "t:late:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: other-changed, table: public.others, on: [update, delete], bust: [other]}
  - {name: late-changed, table: public.late, bust: [late]}
"""
WRONG = RULES.replace("bust: [other]", "bust: [othr]")
RELOADS = "cdc_invalidator_reloads_total"


class ReloadStage(Stage):
    """An application with a cache, its daemon, and its rule file."""

    def begin(self) -> None:
        self.daemon.ready()
        self.assert_in_force("thing", "other")

    def change(self, table: str, number: int) -> str:
        """Cache a row, change it, and wait until all is busted; give its key."""
        key = f"t:{table.removesuffix('s')}:{number}"
        self.cache(key)
        execute(self.dsn, f"UPDATE {table} SET body = body || '!' WHERE id = {number}")
        self.settle()
        return key

    def digest(self) -> str:
        return str(self.daemon.status()["rules"]["digest"])

    def last_reload(self) -> dict[str, Any]:
        found: dict[str, Any] | None = self.daemon.status()["rules"]["last_reload"]
        return found or {}

    def reloads(self, result: str) -> float:
        return self.daemon.metric(RELOADS, result=result)

    def in_force(self, times: int) -> None:
        """Wait until other rules have come into force so many times."""
        eventually(lambda: self.reloads("ok") == times, "the rules are in force")

    def assert_in_force(self, *caches: str) -> None:
        """Wait until the watermark speaks for just these caches."""
        eventually(lambda: set(_caches_of(self.client, self.daemon.slot)) == set(caches), f"{caches} are what is kept")


def _caches_of(client: redis.Redis, slot: str) -> list[str]:
    return list(json.loads(watermark(client, slot).get(b"rules", b"{}")))


@contextmanager
def staged(dsn: str, redis_url: str, rules: Path, slot: str, **settings: str) -> Iterator[ReloadStage]:
    create(dsn)
    execute(dsn, *SCHEMA)
    with ReloadStage.playing(dsn, redis_url, rules, slot, **settings) as stage:
        yield stage


@pytest.fixture
def stage(database: str, redis_url: str, tmp_path: Path, slot_name: str) -> Iterator[ReloadStage]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with staged(database, redis_url, rules, slot_name) as stage:
        yield stage


# Other rules.


def test_a_rule_file_that_changes_is_in_force_at_once_and_only_new_and_changed_caches_are_swept(
    stage: ReloadStage,
) -> None:
    before = stage.digest()
    stage.cache("t:thing:98", "t:other:98", "t:late:98")
    stage.rules.write_text(MORE)
    event = stage.daemon.seen("reloaded")
    assert (event["added"], event["changed"], event["removed"]) == (["late"], ["other"], [])
    stage.assert_in_force("thing", "other", "late")
    assert stage.cached("t:thing:98", "t:other:98", "t:late:98") == ["t:thing:98"]
    assert {
        cache for event in stage.daemon.named("gap") if event["reason"] != "new_slot" for cache in event["caches"]
    } == {
        "late",
        "other",
    }
    # The table that no rule had named is published, and its changes bust.
    assert not stage.cached(stage.change("late", 1), stage.change("others", 1))
    assert stage.digest() == event["rules"] != before
    assert stage.last_reload()["result"] == "ok"
    assert stage.last_reload()["error"] is None
    assert stage.reloads("ok") == 1
    assert stage.daemon.metric("cdc_invalidator_reload_successful") == 1
    assert stage.daemon.metric("cdc_invalidator_rule_set_info", digest=event["rules"]) == 1
    assert stage.daemon.metric("cdc_invalidator_rule_set_info") == 1


def test_a_cache_that_is_gone_needs_nothing_and_is_swept_when_it_comes_back(stage: ReloadStage) -> None:
    stage.rules.write_text(
        RULES.replace('  other: {key: "t:other:{id}", ttl: 5m}\n', "").replace(
            "  - {name: other-changed, table: public.others, bust: [other]}\n", ""
        )
    )
    assert stage.daemon.seen("reloaded")["removed"] == ["other"]
    stage.assert_in_force("thing")
    assert stage.cached(stage.change("others", 1)) == ["t:other:1"], "nobody busts it any more"
    assert not stage.daemon.named("gap", reason="rules_changed")
    stage.rules.write_text(RULES)
    stage.assert_in_force("thing", "other")
    assert not stage.cached("t:other:1")


def test_sighup_reads_the_rules_and_says_so_when_they_are_the_same(stage: ReloadStage) -> None:
    stage.daemon.send(signal.SIGHUP)
    stage.daemon.seen("reload_unchanged")
    assert stage.last_reload()["result"] == "unchanged"
    assert stage.reloads("unchanged") == 1
    # Whoever writes and sends the signal need not wait for the watch.
    stage.rules.write_text(MORE)
    stage.daemon.send(signal.SIGHUP)
    stage.daemon.seen("reloaded")
    stage.assert_in_force("thing", "other", "late")
    assert stage.reloads("ok") == 1


def test_a_file_that_is_touched_changes_nothing(stage: ReloadStage) -> None:
    stage.cache("t:thing:98")
    before = stage.daemon.metric("cdc_invalidator_postgres_connects_total")
    stage.rules.touch()
    stage.rules.write_text(RULES)
    stage.daemon.send(signal.SIGHUP)
    eventually(lambda: stage.reloads("unchanged") == 1, "the files are read")
    assert not stage.daemon.named("reloaded")
    assert stage.daemon.metric("cdc_invalidator_postgres_connects_total") == before
    assert stage.cached("t:thing:98")


def test_a_comment_or_a_time_takes_hold_without_a_sweep(stage: ReloadStage) -> None:
    stage.cache("t:thing:98", "t:other:98")
    stage.rules.write_text(RULES.replace("ttl: 5m", "ttl: 6m") + "# nothing else\n")
    event = stage.daemon.seen("reloaded")
    assert (event["added"], event["changed"], event["removed"]) == ([], [], [])
    assert not stage.cached(stage.change("others", 1))
    assert stage.cached("t:thing:98", "t:other:98") == ["t:thing:98", "t:other:98"]
    assert not stage.daemon.named("gap", reason="rules_changed")


def test_rules_that_change_while_the_daemon_is_starting_are_not_missed(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    create(database)
    execute(database, *SCHEMA)
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
        daemon.seen("started")
        rules.write_text(MORE)
        daemon.seen("reloaded")
        daemon.ready()
        stage = ReloadStage(daemon)
        stage.assert_in_force("thing", "other", "late")
        stage.client.close()


# A ConfigMap's volume.


def _mount(folder: Path, name: str, text: str) -> None:
    """What the kubelet does: a new directory, and one rename that makes `..data` lead there."""
    (folder / name).mkdir()
    (folder / name / "rules.yaml").write_text(text)
    swap = folder / "..data_tmp"
    swap.symlink_to(name)
    swap.rename(folder / "..data")


@pytest.mark.parametrize("named", ["the directory", "the file"])
def test_a_configmap_whose_link_is_swapped_is_read_each_time(
    database: str, redis_url: str, tmp_path: Path, slot_name: str, named: str
) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    _mount(folder, "..2026_a", RULES)
    (folder / "rules.yaml").symlink_to("..data/rules.yaml")
    rules = folder if named == "the directory" else folder / "rules.yaml"
    with staged(database, redis_url, rules, slot_name) as stage:
        _mount(folder, "..2026_b", MORE)
        stage.assert_in_force("thing", "other", "late")
        _mount(folder, "..2026_c", RULES)
        stage.assert_in_force("thing", "other")
        _mount(folder, "..2026_d", MORE)
        stage.assert_in_force("thing", "other", "late")
        assert stage.reloads("ok") == 3
        # The same text again, as the kubelet mounts it for a change of another key.
        _mount(folder, "..2026_e", MORE)
        stage.daemon.send(signal.SIGHUP)
        eventually(lambda: stage.reloads("unchanged") == 1, "the files are read")
        assert stage.reloads("ok") == 3


def test_a_file_that_is_added_to_the_directory_or_taken_out_counts(
    database: str, redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "one.yaml").write_text(RULES)
    with staged(database, redis_url, folder, slot_name) as stage:
        (folder / "two.yaml").write_text(
            'version: 1\ncaches: {late: {key: "t:late:{id}", ttl: 5m}}\n'
            "rules: [{name: late-changed, table: public.late, bust: [late]}]\n"
        )
        stage.assert_in_force("thing", "other", "late")
        assert not stage.cached(stage.change("late", 1))
        (folder / "two.yaml").unlink()
        stage.assert_in_force("thing", "other")


# Rules that are not good.


def test_a_mistake_keeps_the_old_rules_and_is_told_until_it_is_put_right(stage: ReloadStage) -> None:
    before = stage.digest()
    stage.rules.write_text(WRONG)
    event = stage.daemon.seen("reload_failed", level="error")
    assert "there is no cache `othr`; did you mean `other`?" in event["error"]
    assert "rules.yaml:8:" in event["error"]
    assert stage.last_reload()["result"] == "failed"
    assert "othr" in stage.last_reload()["error"]
    assert stage.reloads("failed") == 1
    assert stage.daemon.metric("cdc_invalidator_reload_successful") == 0
    assert stage.digest() == before
    # Busting goes on, and the daemon is ready.
    assert not stage.cached(stage.change("others", 1))
    assert stage.daemon.get("/readyz")[0] == 200
    stage.daemon.send(signal.SIGHUP)
    eventually(lambda: stage.reloads("failed") == 2, "it is told again")
    stage.rules.write_text(RULES)
    eventually(lambda: stage.last_reload()["result"] == "unchanged", "the files hold what is in force")
    assert stage.daemon.metric("cdc_invalidator_reload_successful") == 1
    assert not stage.daemon.named("reloaded")


def test_a_file_that_is_gone_keeps_the_old_rules(stage: ReloadStage) -> None:
    stage.rules.unlink()
    assert "rules.yaml" in stage.daemon.seen("reload_failed")["error"]
    assert not stage.cached(stage.change("others", 1))
    stage.rules.write_text(MORE)
    stage.assert_in_force("thing", "other", "late")


UNKEEPABLE = {
    "an identity that lacks a key's column": (
        '  team: {key: "t:team:{team}", ttl: 5m}\n',
        "  - {name: team-changed, table: public.others, bust: [team]}\n",
        "needs team of the old row",
        "ALTER TABLE others REPLICA IDENTITY FULL",
    ),
    "a table without an identity": (
        '  keyless: {key: "t:keyless:{id}", ttl: 5m}\n',
        "  - {name: keyless-changed, table: public.keyless, bust: [keyless]}\n",
        "public.keyless has no usable replica identity",
        "ALTER TABLE keyless REPLICA IDENTITY FULL",
    ),
}


@pytest.mark.parametrize(("cache", "rule", "sentence", "remedy"), UNKEEPABLE.values(), ids=UNKEEPABLE.keys())
def test_rules_that_the_database_can_not_keep_are_refused_and_taken_once_it_can(
    stage: ReloadStage, cache: str, rule: str, sentence: str, remedy: str
) -> None:
    before = stage.digest()
    new = RULES.replace("rules:\n", f"{cache}rules:\n{rule}")
    stage.rules.write_text(new)
    assert sentence in stage.daemon.seen("reload_failed")["error"]
    assert not stage.cached(stage.change("others", 1))
    assert stage.digest() == before
    # The application's writes have not suffered from it.
    execute(stage.dsn, "INSERT INTO keyless VALUES (1, 'x')", "UPDATE keyless SET body = 'y'")
    execute(stage.dsn, remedy)
    stage.daemon.send(signal.SIGHUP)
    stage.daemon.seen("reloaded")
    eventually(lambda: len(_caches_of(stage.client, stage.daemon.slot)) == 3, "the new cache is kept")
    assert stage.daemon.alive()


def test_a_table_that_the_role_may_not_publish_keeps_the_old_rules_and_gives_the_sql(
    redis_url: str, tmp_path: Path, slot_name: str
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Postgres() as server:
        execute(
            server.dsn,
            "CREATE ROLE limited LOGIN REPLICATION PASSWORD 'secret'",
            "CREATE TABLE things (id int PRIMARY KEY, body text)",
            *SCHEMA,
            f"CREATE PUBLICATION {slot_name} FOR TABLE things, others",
            f"ALTER PUBLICATION {slot_name} OWNER TO limited",
        )
        dsn = psycopg.conninfo.make_conninfo(server.dsn, user="limited", password="secret")
        with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=rules, slot=slot_name) as daemon:
            stage = ReloadStage(daemon)
            stage.dsn = server.dsn
            stage.assert_in_force("thing", "other")
            rules.write_text(MORE)
            error = daemon.seen("reload_failed")["error"]
            assert f'ALTER PUBLICATION "{slot_name}" ADD TABLE ONLY "public"."late";' in error
            assert not stage.cached(stage.change("others", 1))
            execute(server.dsn, f"ALTER PUBLICATION {slot_name} ADD TABLE ONLY late")
            daemon.send(signal.SIGHUP)
            stage.assert_in_force("thing", "other", "late")
            assert not stage.cached(stage.change("late", 1))
            stage.client.close()


def test_new_rules_wait_for_a_database_that_is_away(redis_url: str, tmp_path: Path, slot_name: str) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Postgres() as server, staged(server.dsn, redis_url, rules, slot_name) as stage:
        server.stop()
        rules.write_text(MORE)
        error = stage.daemon.seen("reload_failed")["error"]
        assert "can't be held against the database, and the old ones stay" in error
        server.start()
        stage.daemon.seen("reloaded")
        stage.assert_in_force("thing", "other", "late")
        assert stage.reloads("failed") == 1
        assert not stage.cached(stage.change("late", 1))


# No bust is lost.


def test_no_bust_is_lost_while_rules_change_ten_times(stage: ReloadStage) -> None:
    with Writer(stage.dsn, stage.redis_url) as writer:
        for number in range(10):
            writer.goes_on()
            stage.rules.write_text((MORE, RULES)[number % 2] + f"# {number}\n")
            stage.daemon.send(signal.SIGHUP)
            stage.in_force(number + 1)
        writer.goes_on()
    assert_all_is_well(stage.dsn, stage.client, stage.daemon)
    assert not stage.daemon.named("session_lost")
    # Nothing swept them away: each was busted by its own change.
    assert not [event for event in stage.daemon.named("gap", reason="rules_changed") if "thing" in event["caches"]]


def test_no_bust_of_a_large_transaction_is_lost_when_rules_change_under_it(stage: ReloadStage) -> None:
    execute(stage.dsn, "INSERT INTO things SELECT n, 'old' FROM generate_series(1, 50000) n")
    settled(stage.dsn, stage.client, stage.daemon.slot)
    stage.client.mset({f"t:thing:{n}": "cached" for n in range(1, 50001)})
    writing = threading.Thread(target=execute, args=[stage.dsn, "UPDATE things SET body = 'new'"])
    writing.start()
    stage.rules.write_text(MORE)
    stage.daemon.send(signal.SIGHUP)
    writing.join()
    stage.daemon.seen("reloaded")
    stage.assert_in_force("thing", "other", "late")
    assert_all_is_well(stage.dsn, stage.client, stage.daemon)


def test_a_transaction_that_wrote_to_a_table_before_it_was_published_can_not_slip_through(stage: ReloadStage) -> None:
    """Its writes are never in the stream, so the table's caches are swept once more when it is over."""
    with psycopg.connect(stage.dsn) as connection:
        connection.execute("UPDATE late SET body = 'unseen' WHERE id = 1")
        stage.rules.write_text(MORE)
        stage.daemon.seen("reloaded")
        stage.daemon.seen("gap", reason="rules_changed", caches=["late", "other"])
        stage.daemon.seen("bust", action="sweep", cache="late")
        stage.cache("t:late:1")
        # Another reload, and so another session, does not forget it.
        stage.rules.write_text(MORE + "# again\n")
        eventually(lambda: stage.reloads("ok") == 2, "the rules are in force")
        stage.cache("t:late:1")
        connection.commit()
    stage.assert_in_force("thing", "other", "late")
    assert not stage.cached("t:late:1")


def test_rules_change_while_redis_is_away(database: str, tmp_path: Path, slot_name: str) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with Valkey() as valkey, staged(database, valkey.url, rules, slot_name) as stage:
        valkey.stop()
        execute(database, "UPDATE others SET body = 'new' WHERE id = 1")
        rules.write_text(MORE)
        stage.daemon.seen("reloaded")
        valkey.start()
        stage.assert_in_force("thing", "other", "late")
        assert not stage.cached(stage.change("late", 1), stage.change("others", 2))


# Several daemons.


def test_a_standby_reloads_as_well_and_takes_over_with_the_new_rules(stage: ReloadStage) -> None:
    with RunningDaemon(dsn=stage.dsn, redis_url=stage.redis_url, rules=stage.rules, slot=stage.daemon.slot) as standby:
        standby.ready()
        eventually(lambda: standby.status()["role"] == "standby", "the second one stands by")
        stage.rules.write_text(MORE)
        stage.daemon.seen("reloaded")
        standby.seen("reloaded")
        daemons = (stage.daemon, standby)
        stage.assert_in_force("thing", "other", "late")
        # Whoever leads now: the other takes over, with the same rules.
        leader = eventually(
            lambda: next((each for each in daemons if each.status().get("role") == "leader"), None), "one leads"
        )
        position = wal_position(stage.dsn)
        assert leader.terminate() == 0
        other = daemons[1 - daemons.index(leader)]
        eventually(lambda: other.status().get("role") == "leader", "the other takes over")
        eventually(lambda: int(watermark(stage.client, other.slot).get(b"lsn", 0)) >= position, "the watermark goes on")
        assert not stage.cached(stage.change("late", 1), stage.change("others", 1))
        # A standby that never led is not ended by rules that the database can't keep either.
        if other is standby:
            stage.rules.write_text(RULES.replace("public.others", "public.keyless"))
            standby.seen("reload_failed")
            assert standby.alive()


def test_a_standby_refuses_what_the_database_can_not_keep_and_stays(stage: ReloadStage, tmp_path: Path) -> None:
    own = tmp_path / "standby.yaml"
    own.write_text(RULES)
    with RunningDaemon(dsn=stage.dsn, redis_url=stage.redis_url, rules=own, slot=stage.daemon.slot) as standby:
        eventually(lambda: standby.status().get("role") == "standby", "the second one stands by")
        own.write_text(RULES.replace("public.others", "public.keyless"))
        assert "no usable replica identity" in standby.seen("reload_failed")["error"]
        assert standby.alive()
        assert standby.status()["role"] == "standby"


# What no watch tells.


async def test_what_no_watch_tells_is_found_by_looking(
    database: str, tmp_path: Path, slot_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that leads elsewhere, a directory that is put in another's place, a table that is put right."""
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.2)
    create(database)
    execute(database, *SCHEMA)
    folder, elsewhere = tmp_path / "rules", tmp_path / "elsewhere.yaml"
    folder.mkdir()
    elsewhere.write_text(RULES)
    (folder / "rules.yaml").symlink_to(elsewhere)
    switched: list[RuleSet] = []
    reloading = reload.Reload(
        folder,
        {},
        load_rules(folder, {}),
        dsn=DsnSource.fixed(database),
        publication=slot_name,
        event_stream="",
        metrics=Metrics(CollectorRegistry()),
        switch=switched.append,
    )
    task = asyncio.create_task(reloading.run())
    try:
        elsewhere.write_text(MORE)
        await _until(lambda: len(switched) == 1)
        folder.rename(tmp_path / "old")
        await _until(lambda: reloading.last is not None and reloading.last.result == "failed")
        folder.mkdir()
        (folder / "rules.yaml").write_text(RULES)
        await _until(lambda: len(switched) == 2)
        (folder / "rules.yaml").write_text(RULES.replace("public.others", "public.keyless"))
        await _until(lambda: reloading.last is not None and "keyless" in (reloading.last.error or ""))
        execute(database, "ALTER TABLE keyless REPLICA IDENTITY FULL")
        await _until(lambda: len(switched) == 3)
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)


def test_no_other_command_than_run_loads_the_watch() -> None:
    code = "import sys, cdc_invalidator.daemon; sys.exit('watchfiles' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
