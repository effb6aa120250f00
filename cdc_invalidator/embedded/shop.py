"""A small shop on PostgreSQL and Redis, for the demo and the fault tests.

Its tables, what it caches, and the count of stale entries; `shoppers` write to it and read it.

    shop.create(dsn)
    with shoppers.Workload(dsn, url, seed=7):
        time.sleep(5)
    assert not shop.audit(dsn, url).stale
"""

# ruff: noqa: S608 - the parts of these statements are constants; values are bound

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ENVIRONMENT: Final = "prod"  # what the rule file takes for ${APP_ENV} when it is not set
USERS: Final = 240  # ids run from 1 to this; some are always missing
PRODUCTS: Final = 60

SCHEMA: Final = """
CREATE TABLE users (
    id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL, plan text NOT NULL,
    last_seen timestamptz NOT NULL DEFAULT now());
CREATE TABLE products (
    id bigint PRIMARY KEY, name text NOT NULL, price_cents integer NOT NULL);
CREATE TABLE orders (
    id bigserial PRIMARY KEY,
    user_id bigint NOT NULL REFERENCES users ON UPDATE CASCADE ON DELETE CASCADE,
    product_id bigint NOT NULL,
    quantity integer NOT NULL, status text NOT NULL);
CREATE INDEX ON orders (user_id);
CREATE TABLE reviews (
    id bigserial PRIMARY KEY, product_id bigint NOT NULL, stars integer NOT NULL, body text NOT NULL);
CREATE INDEX ON reviews (product_id);

-- Rules that look at columns outside of the primary key's old values need the whole old row in the stream.
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE orders REPLICA IDENTITY FULL;
"""

FILL_USERS: Final = f"""
INSERT INTO users (id, name, email, plan)
SELECT n, 'user ' || n, 'user' || n || '@shop.example', 'free' FROM generate_series(1, {USERS}) AS n WHERE n % 8 <> 0
ON CONFLICT DO NOTHING"""
FILL_PRODUCTS: Final = f"""
INSERT INTO products (id, name, price_cents)
SELECT n, 'product ' || n, 100 * n FROM generate_series(1, {PRODUCTS}) AS n WHERE n % 8 <> 0
ON CONFLICT DO NOTHING"""
FILL_ORDERS: Final = """
INSERT INTO orders (user_id, product_id, quantity, status)
SELECT users.id, 1 + users.id % 50, n, 'paid' FROM users, generate_series(1, 3) AS n"""
FILL_REVIEWS: Final = """
INSERT INTO reviews (product_id, stars, body)
SELECT products.id, n, 'review ' || n FROM products, generate_series(1, 3) AS n"""


def rules_file() -> Path:
    """Return the path of shop.yaml: inside the package when installed, in rules/ of a source checkout."""
    installed = Path(__file__).parent / "rules" / "shop.yaml"
    return installed if installed.exists() else Path(__file__).parents[2] / "rules" / "shop.yaml"


def create(dsn: str) -> None:
    """Create and fill the shop's tables in an empty database.

    Raises:
        psycopg.Error: The tables exist, or the server cannot be reached.
    """
    with psycopg.connect(dsn) as connection:
        connection.execute(SCHEMA)
        for statement in (FILL_USERS, FILL_PRODUCTS, FILL_ORDERS, FILL_REVIEWS):
            connection.execute(statement)


# What the shop caches


@dataclass(frozen=True, slots=True)
class Family:
    """One cache of shop.yaml, as the application's readers know it.

    ``select`` is a SQL expression of type text, the cached value of ``{id}``; NULL (no such row) is cached as
    ``null``. ``ttl`` and ``version_ttl`` are in seconds. ``ids``: parameters run from 1 to this; 0 for none.
    """

    name: str
    key: str
    select: str
    ttl: int
    ids: int = 0
    version: str | None = None
    version_ttl: int = 30 * 86_400
    ttl_only: bool = False

    def key_of(self, environment: str, number: int, version: str = "") -> str:
        """Return the Redis key of one entry."""
        return self.key.format(env=environment, id=number, version=version)

    def version_key(self, environment: str, number: int) -> str:
        """Return the Redis key of the version that stands for this entry."""
        assert self.version
        return self.version.format(env=environment, id=number)


FAMILIES: Final = (
    Family(
        "user",
        "shop:{env}:user:{id}",
        "SELECT json_build_array(id, name, email, plan)::text FROM users WHERE id = {id}",
        ttl=300,
        ids=USERS,
    ),
    Family(
        "user-orders",
        "shop:{env}:user:{id}:orders",
        "SELECT json_agg(json_build_array(id, product_id, quantity, status) ORDER BY id)::text"
        " FROM orders WHERE user_id = {id}",
        ttl=300,
        ids=USERS,
    ),
    Family(
        "product",
        "shop:{env}:product:{id}",
        "SELECT json_build_array(id, name, price_cents)::text FROM products WHERE id = {id}",
        ttl=3600,
        ids=PRODUCTS,
    ),
    Family(
        "product-reviews",
        "shop:{env}:product:{id}:reviews",
        "SELECT json_agg(json_build_array(id, stars, body) ORDER BY id)::text FROM reviews WHERE product_id = {id}",
        ttl=600,
        ids=PRODUCTS,
    ),
    Family(
        "dashboard",
        "shop:{env}:user:{id}:dash:v{version}",
        "SELECT json_build_array(name, plan, (SELECT json_object_agg(status, n ORDER BY status) FROM"
        " (SELECT status, count(*) AS n FROM orders WHERE user_id = {id} GROUP BY status) AS by_status))::text"
        " FROM users WHERE id = {id}",
        ttl=600,
        ids=USERS,
        version="shop:{env}:user:{id}:dash:ver",
    ),
    Family(
        "catalog",
        "shop:{env}:catalog:v{version}",
        "SELECT json_agg(json_build_array(id, name, price_cents) ORDER BY id)::text FROM products",
        ttl=600,
        version="shop:{env}:catalog:ver",
    ),
    Family(
        "counts",
        "shop:{env}:counts",
        "SELECT json_build_array((SELECT count(*) FROM users), (SELECT count(*) FROM orders))::text",
        ttl=60,
        ttl_only=True,
    ),
)


def _redis(url: str) -> redis.Redis:
    """Connect without the driver's retries: what is retried, and when, is the worker's business."""
    return redis.Redis.from_url(url, decode_responses=True, socket_timeout=5, retry=Retry(NoBackoff(), 0))


# What is stale


@dataclass(frozen=True, slots=True)
class StaleEntry:
    """An entry that readers would get from the cache, and that is not what the database says."""

    cache: str
    key: str
    cached: str
    actual: str


@dataclass(frozen=True, slots=True)
class Audit:
    """All reachable entries of the cache, compared with the database."""

    entries: int
    stale: list[StaleEntry]


def audit(dsn: str, url: str, *, environment: str = ENVIRONMENT) -> Audit:
    """Compare every entry that readers can reach with the database.

    With a version, that is the entry under the current version. Entries of caches that live by their TTL alone are
    left out. While writers write, an entry may look stale only because its row changed between the two reads.

    Raises:
        psycopg.Error, redis.RedisError: A server cannot be reached.
    """
    entries = 0
    stale: list[StaleEntry] = []
    with psycopg.connect(dsn, autocommit=True) as connection, _redis(url) as client:
        for family in FAMILIES:
            if family.ttl_only:
                continue
            cached = _cached(client, family, environment)
            entries += len(cached)
            for number, actual in _actual(connection, family, cached):
                key, value = cached[number]
                if value != actual:
                    stale.append(StaleEntry(family.name, key, value, actual))
    return Audit(entries, stale)


def _cached(client: redis.Redis, family: Family, environment: str) -> dict[int, tuple[str, str]]:
    """Give the key and the value of each reachable entry, by its parameter (0 for none)."""
    if not family.version:
        keys = _scan(client, family.key, environment)
    else:
        versions = _values(client, _scan(client, family.version, environment))
        keys = {number: family.key_of(environment, number, version) for number, (_, version) in versions.items()}
    return _values(client, keys)


def _scan(client: redis.Redis, template: str, environment: str) -> dict[int, str]:
    """Find the keys of a template; gives them by their parameter."""
    exact = re.compile(re.escape(template.format(env=environment, id="\0")).replace("\0", r"(\d+)"))
    keys = client.scan_iter(match=template.format(env=environment, id="*"), count=1000)
    matches = (match for match in map(exact.fullmatch, keys) if match)
    return {int(match[1]) if exact.groups else 0: match[0] for match in matches}


def _values(client: redis.Redis, keys: dict[int, str]) -> dict[int, tuple[str, str]]:
    if not keys:
        return {}
    values = client.mget(list(keys.values()))
    pairs = zip(keys.items(), values, strict=True)
    return {number: (key, str(value)) for (number, key), value in pairs if value is not None}


def _actual(
    connection: psycopg.Connection[tuple[object, ...]],
    family: Family,
    numbers: Iterable[int],
) -> Iterator[tuple[int, str]]:
    """Give what the database says now, by parameter, in one statement and so in one snapshot."""
    select = family.select.format(id="wanted.id")
    rows = connection.execute(
        f"SELECT wanted.id, coalesce(({select}), 'null') FROM unnest(%s::bigint[]) AS wanted (id)",
        [list(numbers)],
    )
    for number, value in rows:
        yield int(str(number)), str(value)
