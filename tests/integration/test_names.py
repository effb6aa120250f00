"""The keys beside a key: no parameter can be the name of one, and readers of 0.1.0 are still fenced.

In 0.1.0 the lock of ``K`` was ``K:lock``, so that whoever asked for the page `home:lock` held the lease of `home`.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from clusters import Cluster
from readers import Reads, rules_file
from running import RunningDaemon, execute
from stage import Stage

from cdc_invalidator.reader.scripts import FILL, TAKE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  page: {key: "t:page:{slug}", ttl: 5m, negative_ttl: 1m, stale_for: 1m}
  plain: {key: "t:plain:{slug}", ttl: 5m}
  listed: {key: "t:listed:{version}:{slug}", version: "t:lists", ttl: 5m, stale_for: 1m}
rules:
  - {name: page-changed, table: public.pages, bust: [page, plain, listed]}
"""


class Pages(Stage):
    """Pages that anybody may ask for by any name, and some whose names a visitor has chosen."""

    def __init__(self, daemon: RunningDaemon, client: Any = None) -> None:
        super().__init__(daemon, client)
        self._connection = psycopg.connect(self.dsn, autocommit=True)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, dsn: str, redis_url: str, folder: Path, slot: str, client: Any, *, rules: str = RULES, **settings: str
    ) -> Iterator[Pages]:
        execute(
            dsn,
            "CREATE TABLE pages (slug text PRIMARY KEY, body text)",
            "INSERT INTO pages SELECT 'page-' || n, 'first' FROM generate_series(1, 50) AS n",
            "INSERT INTO pages VALUES ('home', 'first'), ('home:stale', 'of a visitor'), ('home:lock', 'of a visitor')",
        )
        with cls.playing(dsn, redis_url, rules_file(folder, rules), slot, client=client, **settings) as stage:
            # The first sweep is over.
            stage.settle()
            yield stage

    def end(self) -> None:
        self._connection.close()
        super().end()

    def body(self, slug: str) -> str | None:
        row = self._connection.execute("SELECT body FROM pages WHERE slug = %s", [slug]).fetchone()
        return None if row is None else str(row[0])

    def commit(self, sql: str) -> None:
        execute(self.dsn, sql)
        self.settle()


@pytest.fixture
def pages(database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path) -> Iterator[Pages]:
    with Pages.opened(database, redis_url, tmp_path, slot_name, redis_client) as stage:
        yield stage


@pytest.fixture(params=["sync", "async"])
def reads(request: pytest.FixtureRequest) -> Iterator[Reads]:
    with Reads(request.param) as reads:
        yield reads


@pytest.mark.parametrize("cache", ["page", "listed"])
def test_whoever_asks_for_a_page_that_is_called_a_lock_holds_no_lease_of_another(
    pages: Pages, reads: Reads, cache: str
) -> None:
    read = reads.caches(pages.rules, pages.redis_url, slot=pages.daemon.slot)[cache]
    for slug in ("home:lock", "home\0lock", "home\0stale", "home:stale"):
        # PostgreSQL takes no NUL.
        assert read.get(slug=slug, load=lambda slug: f"loaded {slug!r}") == f"loaded {slug!r}"
    assert not pages.client.keys("*\0*"), "no lease is left, and nothing that is stored is beside another"
    asked = []

    def load(slug: str) -> str | None:
        asked.append(slug)
        return pages.body(slug)

    assert [read.get(slug="home", load=load) for _ in range(3)] == ["first"] * 3
    assert asked == ["home"], "the first read stored it"


@pytest.mark.parametrize("cache", ["page", "listed"])
def test_whoever_waits_is_given_no_page_that_is_called_an_old_value(pages: Pages, reads: Reads, cache: str) -> None:
    caches = reads.caches(pages.rules, pages.redis_url, slot=pages.daemon.slot)
    read = caches[cache].using(wait=0.05)
    assert read.get(slug="home:stale", load=pages.body) == "of a visitor"
    elsewhere = reads.caches(pages.rules, pages.redis_url, slot=pages.daemon.slot)[cache]
    loading, go_on = threading.Event(), threading.Event()
    got = []

    def slow(slug: str) -> str | None:
        loading.set()
        assert go_on.wait(60)
        return "first"

    first = threading.Thread(target=lambda: got.append(elsewhere.get(slug="home", load=slow)))
    first.start()
    try:
        assert loading.wait(60)
        assert read.get(slug="home", load=pages.body) == "first"
    finally:
        go_on.set()
        first.join()
    assert got == ["first"]


# ── Readers of 0.1.0 ─────────────────────────────────────────────────────────────────────────────────────────────────


class OldReads:
    """Reads as readers of 0.1.0 do them: with the same scripts, under other names."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._leases: dict[str, bytes] = {}

    def take(self, key: str) -> None:
        number = self._client.eval(TAKE, 2, f"{key}:lock", key, "token", 60_000, "")
        assert number > 1
        self._leases[key] = b"token:%d" % number

    def fill(self) -> dict[str, int]:
        """Store what was loaded before the changes; the keys, and whether each was stored."""
        return {
            key: self._client.eval(FILL, 2, f"{key}:lock", key, lease, "first", 60_000)
            for key, lease in self._leases.items()
        }


ONE = "UPDATE pages SET body = 'second' WHERE slug = 'home'"
SOME = "UPDATE pages SET body = 'second' WHERE slug = 'home' OR slug LIKE 'page-%'"
ALL = "TRUNCATE pages"
# Here no page has the name of another one's lock, which its own bust would delete.
TAGGED = RULES.replace("{slug}", "{{{slug}}}")


def overtaken(stage: Pages, change: str) -> dict[str, int]:
    """Let readers of 0.1.0 take leases and load, then commit and bust, then let them store."""
    readers = OldReads(stage.client)
    for slug in ("home", *(f"page-{n}" for n in range(1, 51) if change != ONE)):
        readers.take(f"t:page:{{{slug}}}")
        readers.take(f"t:plain:{{{slug}}}")
    stage.commit(change)
    return readers.fill()


@pytest.mark.parametrize("change", [ONE, SOME, ALL], ids=["one row", "many rows", "a sweep"])
def test_a_fill_of_an_old_reader_that_a_bust_overtook_is_dropped(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path, change: str
) -> None:
    with Pages.opened(database, redis_url, tmp_path, slot_name, redis_client, rules=TAGGED) as stage:
        assert set(overtaken(stage, change).values()) == {0}
        assert not redis_client.keys("t:p*")


@pytest.mark.parametrize("change", [SOME, ALL], ids=["many rows", "a sweep"])
def test_in_a_cluster_too(database: str, slot_name: str, tmp_path: Path, change: str) -> None:
    with (
        Cluster(replicas=False) as cluster,
        contextlib.closing(cluster.client()) as client,
        Pages.opened(database, cluster.url, tmp_path, slot_name, client, rules=TAGGED) as stage,
    ):
        assert set(overtaken(stage, change).values()) == {0}


@pytest.mark.parametrize("change", [ONE, SOME, ALL], ids=["one row", "many rows", "a sweep"])
def test_an_old_reader_is_not_fenced_where_the_setting_says_that_there_are_none(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path, change: str
) -> None:
    with Pages.opened(database, redis_url, tmp_path, slot_name, redis_client, rules=TAGGED, old_locks="false") as stage:
        assert set(overtaken(stage, change).values()) == {1}, "else the other tests show nothing"
