"""The edge to Redis, on a real Valkey: every reply is looked at, and what memory and permissions do."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import redis

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.pipeline.sweep import Sweep
from cdc_invalidator.reader.scripts import VERSION
from cdc_invalidator.redis.scripts import BUMP, BUMP_DELETED, BUMP_MISSING
from cdc_invalidator.redis.server import KEYS_A_COMMAND, CacheServer
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.redis.topology import cache_server
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.agreement import Agreement
from cdc_invalidator.rules.load import parse_rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MARK = Watermark(lsn=2**62, at=1, system_id="7", timeline=3, rules={"user": "abc"})


def cache_at(url: str, timeout: float = 5.0) -> CacheServer:
    return cache_server(EndpointSource.fixed(url), "slot", timeout=timeout)


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[CacheServer]:
    opened = cache_at(redis_url)
    await opened.connect()
    yield opened
    await opened.close()


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A Valkey of the test's own, whose settings it may change."""
    with Valkey() as valkey:
        yield valkey


async def test_groups_are_counted_one_by_one_over_several_commands(
    server: CacheServer, redis_client: redis.Redis
) -> None:
    keys = [f"k{n}".encode() for n in range(2 * KEYS_A_COMMAND + 10)]
    for key in keys[::2]:
        redis_client.set(key, 1)
        redis_client.set(key + b"\0lock", 1)
        redis_client.set(key + b":lock", 1)
    outcome = await server.bust([keys[:3], keys[3 : KEYS_A_COMMAND + 5], [], keys[KEYS_A_COMMAND + 5 :]], {})
    assert outcome.existed == [2, KEYS_A_COMMAND // 2 + 1, 0, KEYS_A_COMMAND // 2 + 2]
    assert redis_client.dbsize() == 0


async def test_the_same_key_in_two_groups_is_counted_once(server: CacheServer, redis_client: redis.Redis) -> None:
    redis_client.set("k", 1)
    outcome = await server.bust([[b"k"], [b"k"]], {})
    assert outcome.existed == [1, 0]


async def test_a_grace_leaves_the_old_value_for_a_while_and_no_longer(
    server: CacheServer, redis_client: redis.Redis
) -> None:
    keys = [f"k{n}".encode() for n in range(KEYS_A_COMMAND + 10)]
    for key in (*keys[:-1], b"plain"):
        redis_client.set(key, b"old", ex=1000)
        redis_client.set(key + b"\0lock", 1)
        redis_client.set(key + b":lock", 1)
    outcome = await server.bust([[b"plain"], keys], {}, dict.fromkeys(keys, 60_000))
    assert outcome.existed == [1, KEYS_A_COMMAND + 9]
    assert redis_client.dbsize() == KEYS_A_COMMAND + 9
    assert redis_client.get("k7\0stale") == b"old"
    left = redis_client.pttl("k7\0stale")
    await server.bust([[b"k7"]], {}, {b"k7": 60_000})
    assert 0 < redis_client.pttl("k7\0stale") <= left, "another bust gives no more time to what is old already"
    redis_client.set("k7", b"newer")
    await server.bust([[b"k7"]], {}, {b"k7": 60_000})
    assert redis_client.get("k7\0stale") == b"newer"


async def test_a_grace_of_a_version_leaves_the_one_before(server: CacheServer, redis_client: redis.Redis) -> None:
    redis_client.set("v", 5)
    redis_client.set("w", 5)
    await server.bust([], {b"v": 60_000, b"w": 60_000, b"missing": 60_000}, {b"v": 30_000, b"missing": 30_000})
    assert redis_client.get("v\0stale") == b"5"
    assert 0 < redis_client.pttl("v\0stale") <= 30_000
    assert redis_client.exists("w\0stale", "missing\0stale") == 0


async def test_a_sweep_of_versions_does_not_keep_those_that_bumps_have_left(
    server: CacheServer, redis_client: redis.Redis
) -> None:
    text = 'version: 1\ncaches: {page: {key: "page:{id}:v{version}", version: "ver:{id}", ttl: 5m, stale_for: 30s}}'
    sweep = Sweep(parse_rules([("rules.yaml", text)], {}).caches["page"])
    redis_client.set("ver:1", 5)
    redis_client.set("ver:2", 5)
    await server.bust([], {b"ver:1": 60_000}, {b"ver:1": 30_000})
    assert redis_client.get("ver:1\0stale") == b"5"
    while not await sweep.step(server, 1000):
        pass
    assert int(redis_client.get("ver:1") or 0) > 5 < int(redis_client.get("ver:2") or 0)
    assert redis_client.dbsize() == 2, "else it would live as long as a counter, and be one of the values shown"
    assert (sweep.asked["page"].keys, sweep.asked["page"].existed) == (2, 2)


@pytest.mark.parametrize("missing", ["pexpire", "rename"])
async def test_without_the_right_to_move_a_value_it_is_deleted(missing: str, own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        granted = ["+@all", f"-{missing}"]
        client.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", *granted)
        client.set("k", b"old")
        server = cache_at(own_valkey.url.replace("redis://", "redis://app:secret@"))
        await server.connect()
        try:
            assert (await server.bust([[b"k"]], {}, {b"k": 60_000})).existed == [1]
        finally:
            await server.close()
        assert client.dbsize() == 0


async def test_bumps_never_repeat(server: CacheServer, redis_client: redis.Redis) -> None:
    future = int(time.time() * 1e6) + 10**12
    redis_client.set("small", 1)
    redis_client.set("large", future)
    redis_client.set("text", "not a number")
    redis_client.lpush("list", 1)
    counters = dict.fromkeys((b"small", b"large", b"text", b"list", b"missing"), 60000)
    outcome = await server.bust([], counters)
    assert outcome.versions[b"small"] > 10**15
    assert outcome.versions[b"large"] > future
    assert outcome.versions[b"text"] == BUMP_DELETED
    assert outcome.versions[b"list"] == BUMP_DELETED
    assert outcome.versions[b"missing"] == BUMP_MISSING
    assert redis_client.get("small") == str(outcome.versions[b"small"]).encode()
    assert redis_client.get("large") == str(outcome.versions[b"large"]).encode()
    assert not redis_client.exists("text", "list", "missing")
    again = await server.bust([], counters)
    assert again.versions[b"small"] > outcome.versions[b"small"]
    assert again.versions[b"large"] > outcome.versions[b"large"]


@pytest.mark.parametrize(
    "version",
    ["1790000000000000000", "9007199254740993", "9007199254740991", "inf", "1e300", "-1", "0x10", " 1", "1.5"],
)
async def test_a_version_that_lua_can_not_count_on_is_replaced(
    server: CacheServer, redis_client: redis.Redis, version: str
) -> None:
    redis_client.set("odd", version)
    outcome = await server.bust([], {b"odd": 60_000})
    first = outcome.versions[b"odd"]
    assert 10**15 < first < 2**53
    assert redis_client.get("odd") == str(first).encode()
    again = await server.bust([], {b"odd": 60_000})
    assert again.versions[b"odd"] > first


# Redis's clock, in microseconds, is the key `now`.
CLOCK = (
    "(function() local now = tonumber(redis.call('GET', 'now')) "
    "return {string.format('%.0f', math.floor(now / 1000000)), string.format('%.0f', now % 1000000)} end)()"
)


def test_versions_never_repeat_when_the_clock_goes_back_and_the_counter_is_gone(redis_client: redis.Redis) -> None:
    bump, create = (redis_client.register_script(text.replace("redis.call('TIME')", CLOCK)) for text in (BUMP, VERSION))
    now, made, dice = 1_790_000_000_000_000, [], random.Random(1)
    for _ in range(3):
        for _ in range(2_000):
            now += dice.randrange(500, 1500)
            redis_client.set("now", now)
            if not redis_client.exists("ver"):
                made.append(int(create(keys=["ver"], args=[60_000])))
            made.append(bump(keys=["ver"], args=[60_000, 0, "\0stale"])[0])
        now -= 2_000_000
        redis_client.delete("ver")
    assert len(set(made)) == len(made) == 6_003
    assert max(made) < 2**53


async def test_with_full_memory_deletes_work_bumps_delete_and_the_watermark_stalls(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        server = cache_at(own_valkey.url)
        await server.connect()
        client.set("version", 5)
        client.set("key", "cached")
        client.set("key\0lock", "token")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        outcome = await server.bust([[b"key"]], {b"version": 60_000})
        assert outcome.existed == [1]
        assert outcome.versions == {b"version": BUMP_DELETED}
        assert not await server.write_watermark(MARK)
        client.config_set("maxmemory", 0)
        assert await server.write_watermark(MARK)
        assert await server.read_watermarks() == [MARK]
        assert client.dbsize() == 1
        await server.close()


async def test_with_full_memory_readers_are_told_no_more_what_is_not_so_any_more(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        server = cache_at(own_valkey.url)
        await server.connect()
        before, after = Agreement({"user": "a"}), Agreement({"user": "b"})
        assert await server.write_watermark(replace(MARK, agreement=before))
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        assert not await server.write_watermark(replace(MARK, at=2, agreement=before))
        assert client.hget(server.watermark_key, "agreed") == f"1 {before.digest}".encode()
        assert not await server.write_watermark(replace(MARK, at=2, agreement=after))
        assert not client.hexists(server.watermark_key, "agreed")
        client.config_set("maxmemory", 0)
        assert await server.write_watermark(replace(MARK, at=2, agreement=after))
        assert client.hget(server.watermark_key, "agreed") == f"2 {after.digest}".encode()
        await server.close()


async def test_a_refused_command_in_a_pipeline_is_a_failure_not_a_bust(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        server = cache_at(own_valkey.url)
        await server.connect()
        client.set("key", "cached")
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(errors.RedisUnavailable, match="READONLY"):
            await server.bust([[b"key"]], {})
        with pytest.raises(errors.RedisUnavailable):
            await server.bust([], {b"key": 1})
        client.execute_command("REPLICAOF", "NO", "ONE")
        assert (await server.bust([[b"key"]], {})).existed == [1]
        await server.close()


async def test_scripts_that_the_server_forgot_are_a_failure_and_loaded_by_the_next_connection(
    own_valkey: Valkey,
) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        server = cache_at(own_valkey.url)
        await server.connect()
        client.script_flush()
        with pytest.raises(errors.RedisUnavailable):
            await server.bust([[b"key"], [b"other"]], {})
        await server.close()
        second = cache_at(own_valkey.url)
        await second.connect()
        assert (await second.bust([[b"key"], [b"other"]], {})).existed == [0, 0]
        await second.close()


async def test_a_missing_permission_says_what_to_grant_and_shows_no_key(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+@all", "-unlink")
        url = own_valkey.url.replace("redis://", "redis://weak:pw@")
        server = cache_at(url)
        await server.connect()
        with pytest.raises(errors.RedisUnavailable) as caught:
            await server.unlink([b"secret:42"])
        assert "grant the ACL user of CDC_REDIS_URL" in str(caught.value)
        assert caught.value.report
        assert "secret:42" not in str(caught.value)
        assert "pw" not in str(caught.value).split()
        denied = (await server.bust([[b"secret:42"]], {})).denied
        assert "grant the ACL user of CDC_REDIS_URL" in str(denied[0])
        await server.close()


async def test_what_a_right_is_missing_for_is_told_and_all_else_is_busted(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        administrator: Any = client
        administrator.execute_command("ACL", "SETUSER", "half", "on", ">pw", "~ours:*", "~cdc:slot:*", "+@all")
        url = own_valkey.url.replace("redis://", "redis://half:pw@")
        server = cache_at(url)
        await server.connect()
        ours = [b"ours:%d" % number for number in range(3000)]
        client.mset(dict.fromkeys([*ours, b"theirs:1", b"theirs:version", b"ours:version"], 1))
        deletes = [ours[:1], [b"theirs:1"], [*ours[3:1500], b"theirs:2"], ours[1500:], [ours[1], ours[2]]]
        graces = {ours[1]: 5000, ours[2]: 5000}
        reply = await server.bust(deletes, {b"ours:version": 9000, b"theirs:version": 9000}, graces)
        assert reply.denied.keys() == {1, 2, b"theirs:version"}
        assert reply.existed[0] == 1
        assert reply.existed[3] == 1500
        assert reply.versions.keys() == {b"ours:version"}
        assert all(error.code == "NOPERM" for error in reply.denied.values())
        assert client.exists("theirs:1", "theirs:version") == 2
        assert not client.exists(*ours[:3], *ours[1500:])
        (found, denied) = await server.versions([b"ours:version", b"theirs:version"])
        assert found == str(reply.versions[b"ours:version"]).encode()
        assert isinstance(denied, errors.RedisUnavailable)
        await server.close()


async def test_a_server_that_accepts_and_never_answers_is_given_up(own_valkey: Valkey) -> None:
    server = cache_at(own_valkey.url, timeout=0.5)
    await server.connect()
    own_valkey.pause()
    try:
        with pytest.raises(errors.RedisUnavailable):
            await server.bust([[b"key"]], {})
    finally:
        own_valkey.resume()
    await server.close()


async def test_the_watermark_reads_back_and_a_foreign_hash_does_not(
    server: CacheServer, redis_client: redis.Redis
) -> None:
    assert await server.read_watermarks() == [None]
    assert await server.write_watermark(MARK)
    assert await server.read_watermarks() == [MARK]
    fields: Any = redis_client.hgetall("cdc:slot:watermark")
    assert fields[b"lsn"] == str(2**62).encode()
    redis_client.hdel("cdc:slot:watermark", "timeline")
    assert await server.read_watermarks() == [None]


async def test_what_readers_are_told_is_written_once_and_anew_when_it_changes(
    server: CacheServer, redis_client: redis.Redis
) -> None:
    told = Agreement({"user": "7"}, {"user": {"id": "bigint"}}, {"DateStyle": "ISO, MDY"})
    assert await server.write_watermark(replace(MARK, agreement=told))
    found: Any = redis_client.hgetall("cdc:slot:watermark")
    assert (found[b"templates"], found[b"types"]) == (b'{"user":"7"}', b'{"user":{"id":"bigint"}}')
    assert found[b"settings"] == b'{"DateStyle":"ISO, MDY"}'

    redis_client.hset("cdc:slot:watermark", "types", "as it was")
    assert await server.write_watermark(replace(MARK, agreement=told))
    assert redis_client.hget("cdc:slot:watermark", "types") == b"as it was"

    assert await server.write_watermark(replace(MARK, agreement=replace(told, types={})))
    assert redis_client.hget("cdc:slot:watermark", "types") == b"{}"

    # Who connects does not know who has written there.
    redis_client.hset("cdc:slot:watermark", "types", "of another daemon")
    assert await server.read_watermarks() == [MARK]
    assert await server.write_watermark(replace(MARK, agreement=told))
    assert redis_client.hget("cdc:slot:watermark", "types") == b'{"user":{"id":"bigint"}}'


@pytest.mark.parametrize(
    "url",
    ["http://localhost", "localhost:6379", "redis+sentinel://a:1,b:2", "redis+cluster://a:x", "redis://h/0?nonsense=1"],
)
def test_a_url_that_can_not_be_used_is_refused(url: str) -> None:
    with pytest.raises(errors.WrongSettings, match="CDC_REDIS_URL"):
        cache_at(url)


async def test_a_probe_leaves_nothing_and_fails_where_a_bust_would(own_valkey: Valkey) -> None:
    server = cache_at(own_valkey.url)
    await server.connect()
    with redis.Redis.from_url(own_valkey.url) as client:
        await server.probe()
        assert client.dbsize() == 0
        client.config_set("min-replicas-to-write", 1)
        with pytest.raises(errors.RedisUnavailable, match="NOREPLICAS"):
            await server.probe()
        # Who only observes writes nothing.
        server.scripts.read_only = True
        await server.probe()
        server.scripts.read_only = False
        client.config_set("min-replicas-to-write", 0)
        client.set("cdc:slot:watermark", "something else")
        with pytest.raises(errors.RedisUnavailable, match="WRONGTYPE"):
            await server.probe()
    await server.close()
