"""What the reader does with what the daemon says: other templates, older daemons, types, and caches switched off."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from readers import Loader, Reads, rules_file

from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader import Caches
from cdc_invalidator.reader.agreement import LOOK_SECONDS
from cdc_invalidator.rules.agreement import Agreement, templates_digest
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WATERMARK, SWITCH = "cdc:cdc_invalidator:watermark", "cdc:cdc_invalidator:off"
SETTINGS = {"DateStyle": "ISO, MDY", "TimeZone": "Etc/UTC", "bytea_output": "hex"}


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.fixture
def at_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each read look at what the daemon says."""
    monkeypatch.setattr("cdc_invalidator.reader.agreement.LOOK_SECONDS", 0.0)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return rules_file(tmp_path)


@pytest.fixture
def caches(reads: Reads, redis_url: str, rules: Path, registry: CollectorRegistry, at_each_read: None) -> Any:
    return reads.caches(rules, redis_url, registry=registry)


@pytest.fixture
def bypasses(registry: CollectorRegistry) -> Callable[[str, str], float]:
    def bypasses(reason: str, cache: str = "user") -> float:
        labels = {"cache": cache, "reason": reason}
        return registry.get_sample_value("cdc_invalidator_reader_bypasses_total", labels) or 0.0

    return bypasses


@pytest.fixture
def say(redis_client: redis.Redis, rules: Path) -> Callable[..., None]:
    """Write the watermark as a daemon with the same rules does, but for what is given."""
    templates = {name: templates_digest(cache) for name, cache in load_rules(rules, {}).caches.items()}

    def say(at: int = 1, types: dict[str, dict[str, str | None]] | None = None, **others: str | None) -> None:
        mine = templates | {name: digest for name, digest in others.items() if digest is not None}
        mine = {name: digest for name, digest in mine.items() if others.get(name, "") is not None}
        said = Agreement(mine, types or {}, SETTINGS)
        fields: dict[Any, Any] = {"lsn": 1, "at": at, "rules": "{}", "agreed": f"{at} {said.digest}"}
        redis_client.hset(WATERMARK, mapping=fields | dict(said.fields))

    return say


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# ── Templates ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_watermark_caches_are_read(caches: Any, redis_client: redis.Redis) -> None:
    load = Loader({7: "Ada"})
    assert [caches.user.get(id=7, load=load) for _ in range(2)] == ["Ada", "Ada"]
    assert load.asked == [7]
    assert redis_client.exists("t:user:{7}")


@pytest.mark.parametrize("theirs", ["another digest", None])
def test_a_cache_whose_keys_the_daemon_makes_otherwise_or_does_not_know_is_left_alone(
    theirs: str | None,
    caches: Any,
    redis_client: redis.Redis,
    say: Callable[..., None],
    bypasses: Callable[..., float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    say(user=theirs)
    redis_client.set("t:user:{7}", "whatever is there")
    load, other = Loader({7: "Ada"}), Loader({7: "Grace"})
    for _ in range(3):
        assert caches.user.get(id=7, load=load) == "Ada"
        assert caches.known.get(id=7, load=other) == "Grace"
    assert load.asked == [7, 7, 7]
    assert other.asked == [7], "other caches go on"
    assert bypasses("templates_differ") == 3
    (told,) = warnings(caplog)
    assert told.startswith("cache user is neither read nor filled: the daemon makes its keys in another way")
    assert "give both the same rule files, the same environment" in told

    asked: list[Any] = []

    def load_many(ids: list[int]) -> list[str]:
        asked.append(ids)
        return ["Ada"] * len(ids)

    assert caches.user.get_many([7, 8], load=load_many) == ["Ada", "Ada"]
    assert asked == [[7, 8]]
    assert caches.user.warm([7, 8], load=load) == 0
    with caches.user.writing(id=8) as write:
        assert not write.set("Ada")
    assert redis_client.keys("t:user:*") == [b"t:user:{7}"]

    say(2)
    assert caches.user.get(id=8, load=Loader({8: "Eve"})) == "Eve"
    assert redis_client.exists("t:user:{8}")


def test_a_cache_that_nothing_busts_needs_no_agreement(caches: Any, say: Callable[..., None]) -> None:
    say(rate=None)
    load = Loader({7: 1.25})
    assert [caches.rate.get(id=7, load=load) for _ in range(2)] == [1.25, 1.25]
    assert load.asked == [7]


def test_an_older_daemon_s_watermark_says_nothing_of_templates(
    caches: Any,
    redis_client: redis.Redis,
    say: Callable[..., None],
    bypasses: Callable[..., float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis_client.hset(WATERMARK, mapping={"lsn": 1, "at": 1, "rules": "{}"})
    load = Loader({7: "Ada"})
    caches.user.get(id=7, load=load)
    say()
    caches.user.get(id=7, load=load)
    caches.user.get(id=7, load=load)
    assert (load.asked, bypasses("old_daemon")) == ([7, 7], 1)
    # Rolled back: it writes its own fields again, and lets the others stand.
    redis_client.hset(WATERMARK, "at", 2)
    caches.user.get(id=7, load=load)
    assert (load.asked, bypasses("old_daemon")) == ([7, 7, 7], 2)
    assert all("roll the daemon before its readers" in told for told in warnings(caplog))


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_are_written_by_the_type_of_their_column(
    caches: Any,
    redis_client: redis.Redis,
    say: Callable[..., None],
    bypasses: Callable[..., float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    say(types={"user": {"id": "numeric(10,2)"}, "known": {"id": "bytea"}})
    load = Loader({7: "Ada", b"ab": "Grace", "7": "Eve"})
    caches.user.get(id=7, load=load)
    caches.known.get(id=b"ab", load=load)
    assert sorted(redis_client.keys("t:*")) == [b"t:known:{\\x6162}", b"t:user:{7.00}"]
    for _ in range(2):
        assert caches.user.get(id="7", load=load) == "Eve"
    assert (load.asked[-2:], bypasses("spelling")) == (["7", "7"], 2)
    (told,) = warnings(caplog)
    assert told.startswith("cache user: parameter id has no certain text, so that each read with it loads: its type is")

    # The column was altered: other keys.
    say(2, types={"user": {"id": "bigint"}})
    caches.user.get(id="7", load=load)
    assert redis_client.exists("t:user:{7}")
    # A daemon that does not know is not one that knows nothing against it.
    say(3, types={"user": {"id": None}})
    caches.user.get(id=7, load=load)
    assert bypasses("spelling") == 3


def test_types_that_are_known_hold_also_where_the_watermark_is_gone(
    caches: Any, redis_client: redis.Redis, say: Callable[..., None]
) -> None:
    say(types={"user": {"id": "numeric(10,2)"}})
    caches.user.get(id=7, load=Loader({7: "Ada"}))
    redis_client.flushall()
    caches.user.get(id=7, load=Loader({7: "Ada"}))
    assert redis_client.keys("t:*") == [b"t:user:{7.00}"]


def test_a_watermark_that_was_there_and_is_gone_keeps_the_last_answer(
    caches: Any, redis_client: redis.Redis, say: Callable[..., None], bypasses: Callable[..., float]
) -> None:
    say(user="another digest")
    load, other = Loader({7: "Ada"}), Loader({7: "Grace"})
    for _ in range(2):
        redis_client.set("t:user:{7}", "whatever no bust has found")
        assert caches.user.get(id=7, load=load) == "Ada"
        assert caches.known.get(id=7, load=other) == "Grace"
        redis_client.delete(WATERMARK)
    assert other.asked == [7], "other caches go on"
    assert bypasses("templates_differ") == 2


def test_a_key_that_is_deleted_is_written_by_the_type_of_its_column_though_nothing_was_read_before(
    caches: Any, redis_client: redis.Redis, say: Callable[..., None]
) -> None:
    say(types={"user": {"id": "numeric(10,2)"}})
    redis_client.set("t:user:{7.00}", "Ada")
    assert caches.user.invalidate(id=7)
    assert not redis_client.exists("t:user:{7.00}")


@pytest.mark.parametrize("name", ["user", "page", "far"])
@pytest.mark.parametrize("others", [{"templates": "another digest"}, {"types": "numeric(10,2)"}], ids=str)
def test_a_watermark_of_another_agreement_proves_nothing_of_keys_made_before(
    name: str,
    others: dict[str, str],
    reads: Reads,
    redis_url: str,
    redis_client: redis.Redis,
    rules: Path,
    say: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdc_invalidator.reader.agreement.LOOK_SECONDS", 60.0)
    claim = json.dumps({"user": "x", "page": "x", "far": "x"})
    say()
    redis_client.hset(WATERMARK, mapping={"lsn": 10, "rules": claim})
    caches = reads.caches(rules, redis_url)
    load = Loader({7: "Ada", 8: "Eve"})
    for _ in range(2):
        assert caches.at_least(10)[name].get(id=7, load=load) == "Ada"
        assert caches.at_least(10)[name].get_many([7, 8], load=load.many) == ["Ada", "Eve"]
    assert load.asked == [7, [8]], "it proves what it can"
    # Another daemon has taken over; a commit has been busted since, under the names that it makes.
    theirs = {name: others["templates"]} if "templates" in others else {}
    say(2, types={name: {"id": others["types"]}} if "types" in others else {}, **theirs)
    redis_client.hset(WATERMARK, mapping={"lsn": 11, "rules": claim})
    load.rows[7] = "Grace"
    assert caches.at_least(11)[name].get(id=7, load=load) == "Grace"
    assert caches.at_least(11)[name].get_many([7, 8], load=load.many) == ["Grace", "Eve"]


def test_a_key_that_was_made_before_the_look_of_another_read_is_not_proven_by_what_that_has_learnt(
    redis_url: str, redis_client: redis.Redis, rules: Path, say: Callable[..., None], at_each_read: None
) -> None:
    del at_each_read
    claim = json.dumps({"user": "x"})
    say()
    redis_client.hset(WATERMARK, mapping={"lsn": 10, "rules": claim})

    with redis.Redis.from_url(redis_url) as client:
        all_caches = Caches.from_rules(rules, client)

        def connection() -> None:
            """Asked once the key is made: meanwhile another thread reads."""
            say(2, types={"user": {"id": "numeric(10,2)"}})
            redis_client.hset(WATERMARK, mapping={"lsn": 11, "rules": claim})
            all_caches.known.get(id=7, load=Loader({7: "whoever"}), connection=lambda: None)

        all_caches.user.get(id=7, load=Loader({7: "Ada"}))
        assert redis_client.exists("t:user:{7}")
        load = Loader({7: "Grace"})
        assert all_caches.at_least(11).user.get(id=7, load=load, connection=connection) == "Grace"
        all_caches.close()


# ── The switch ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("field", ["user", "*"])
def test_a_cache_is_switched_off_and_on(
    field: str,
    caches: Any,
    redis_client: redis.Redis,
    bypasses: Callable[..., float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load = Loader({7: "Ada", 8: "Eve"})
    caches.user.get(id=7, load=load)
    redis_client.hset(SWITCH, field, 1)
    for number in (7, 8):
        assert caches.user.get(id=number, load=load) == load.rows[number]
        caches.rate.get(id=number, load=load)
    assert bypasses("off") == 2
    assert bypasses("off", "rate") == (2 if field == "*" else 0)
    assert f"cache user is neither read nor filled: it is switched off, by a field of {SWITCH}" in warnings(caplog)
    assert not redis_client.exists("t:user:{8}")
    # What is still there can be deleted all the same.
    assert caches.user.invalidate(id=7)
    assert not redis_client.exists("t:user:{7}")

    redis_client.hset(SWITCH, field, 0)
    caches.user.get(id=8, load=load)
    assert redis_client.exists("t:user:{8}")


# ── The look ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_looks_once_a_second_and_not_at_each_read(
    reads: Reads, redis_url: str, rules: Path, redis_client: redis.Redis, say: Callable[..., None]
) -> None:
    assert LOOK_SECONDS == 1.0
    say()
    caches = reads.caches(rules, redis_url)
    caches.user.get(id=7, load=Loader({7: "Ada"}))
    redis_client.config_resetstat()
    load = Loader({})
    for _ in range(50):
        caches.user.get(id=7, load=load)
    asked: Any = redis_client.info("commandstats")
    # Two commands in one go; a slow machine may take a second for all this.
    assert asked.get("cmdstat_hmget", {"calls": 0})["calls"] <= 2


def test_who_may_not_look_reads_nothing_and_is_told(
    reads: Reads, rules: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">secret-of-app", "~t:*", "+@all")
        caches = reads.caches(rules, valkey.url, client={"username": "app", "password": "secret-of-app"})
        load = Loader({7: "Ada"})
        for _ in range(2):
            assert caches.user.get(id=7, load=load) == "Ada"
        assert load.asked == [7, 7]
        assert any(f"grant it +hmget on that and on {SWITCH}" in told for told in warnings(caplog))
        client.execute_command("ACL", "SETUSER", "app", "~cdc:cdc_invalidator:*")
        for _ in range(2):
            caches.user.get(id=7, load=load)
        assert load.asked == [7, 7, 7]


def test_a_look_that_fails_keeps_the_last_answer(
    reads: Reads, rules: Path, at_each_read: None, registry: CollectorRegistry, bypasses: Callable[..., float]
) -> None:
    del at_each_read
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">secret-of-app", "~*", "+@all")
        user = {"username": "app", "password": "secret-of-app", "socket_timeout": 1, "socket_connect_timeout": 1}
        caches = reads.caches(rules, valkey.url, client=user, registry=registry)
        client.hset(SWITCH, "known", 1)
        load = Loader({7: "Ada"})
        for name in ("user", "known"):
            caches[name].get(id=7, load=load)
        client.execute_command("ACL", "SETUSER", "app", "resetkeys", "~t:*")
        for name in ("user", "known"):
            caches[name].get(id=7, load=load)
        assert load.asked == [7, 7, 7]
        assert (bypasses("off", "known"), bypasses("refused")) == (2, 0)


def test_a_process_that_starts_while_redis_is_away_reads_nothing_unknown(
    reads: Reads, rules: Path, registry: CollectorRegistry, bypasses: Callable[..., float]
) -> None:
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        client.hset(SWITCH, "user", 1)
        caches = reads.caches(
            rules, valkey.url, client={"socket_timeout": 0.2, "socket_connect_timeout": 0.2}, registry=registry
        )
        valkey.pause()
        load = Loader({7: "Ada"})
        try:
            assert caches.user.get(id=7, load=load) == "Ada"
        finally:
            valkey.resume()
        assert bypasses("redis_down") == 1
        assert caches.user.get(id=7, load=load) == "Ada"
        assert bypasses("off") == 1
