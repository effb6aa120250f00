"""A small shop on PostgreSQL and Redis, for the demo and the fault tests: its tables, what it caches, what is stale.

`shoppers` write to it and read from it.

    shop.create(dsn)
    with shoppers.Workload(dsn, url, seed=7):
        time.sleep(5)
    assert not shop.audit(dsn, url).stale
"""

# ruff: noqa: S608 - the parts of these statements are constants; values are bound

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cdc_invalidator.reader.envelope import Envelope
from cdc_invalidator.reader.keys import NUL, Keys
from cdc_invalidator.reader.options import Options
from cdc_invalidator.reader.serializers import JSON
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cdc_invalidator.rules.model import Cache

ENVIRONMENT: Final = "prod"  # the default of ${APP_ENV} in the rule file
USERS: Final = 240  # the highest id; the lowest is 1, and some are always missing
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
CREATE INDEX ON orders (product_id);
CREATE TABLE reviews (
    id bigserial PRIMARY KEY, product_id bigint NOT NULL, stars integer NOT NULL, body text NOT NULL);
CREATE INDEX ON reviews (product_id);

-- Rules that need old values of columns outside the primary key need the whole old row in the stream.
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
class CachedQuery:
    """A cache of shop.yaml, and the query whose result it holds.

    ``select`` is a query of one json value, with ``{id}`` for the parameter; NULL means that there is no such row.
    ``param`` is the parameter's name in the rule file, ``ids`` its highest value (the lowest is 1); a cache without a
    parameter has neither.
    """

    cache: str
    select: str
    param: str | None = None
    ids: int = 0

    def params(self, number: int) -> dict[str, int]:
        """Return the parameters of one entry, as readers pass them."""
        return {self.param: number} if self.param else {}

    def numbers(self) -> Sequence[int]:
        """Return all values of the parameter; just 0 if there is none."""
        return range(1, self.ids + 1) if self.param else (0,)


QUERIES: Final = (
    CachedQuery(
        "user",
        "SELECT json_build_array(id, name, email, plan) FROM users WHERE id = {id}",
        param="id",
        ids=USERS,
    ),
    CachedQuery(
        "user-orders",
        "SELECT coalesce(json_agg(json_build_array(id, product_id, quantity, status) ORDER BY id), '[]')"
        " FROM orders WHERE user_id = {id}",
        param="user_id",
        ids=USERS,
    ),
    CachedQuery(
        "product",
        "SELECT json_build_array(id, name, price_cents) FROM products WHERE id = {id}",
        param="id",
        ids=PRODUCTS,
    ),
    CachedQuery(
        "product-reviews",
        "SELECT coalesce(json_agg(json_build_array(id, stars, body) ORDER BY id), '[]')"
        " FROM reviews WHERE product_id = {id}",
        param="product_id",
        ids=PRODUCTS,
    ),
    CachedQuery(
        "dashboard",
        "SELECT json_build_array(name, plan, (SELECT json_object_agg(status, n ORDER BY status) FROM"
        " (SELECT status, count(*) AS n FROM orders WHERE user_id = {id} GROUP BY status) AS by_status))"
        " FROM users WHERE id = {id}",
        param="id",
        ids=USERS,
    ),
    CachedQuery(
        "catalog",
        "SELECT coalesce(json_agg(json_build_array(id, name, price_cents) ORDER BY id), '[]') FROM products",
    ),
    CachedQuery(
        "order-history",
        "SELECT coalesce(json_agg(json_build_array(orders.id, quantity, products.name) ORDER BY orders.id), '[]')"
        " FROM orders LEFT JOIN products ON products.id = product_id WHERE user_id = {id}",
        param="user_id",
        ids=USERS,
    ),
    CachedQuery(
        "product-stats",
        "SELECT json_build_array(name, (SELECT sum(quantity) FROM orders WHERE product_id = {id}),"
        " (SELECT json_build_array(count(*), sum(stars)) FROM reviews WHERE product_id = {id}))"
        " FROM products WHERE id = {id}",
        param="product_id",
        ids=PRODUCTS,
    ),
    CachedQuery(
        "product-page",
        "SELECT json_build_object('id', id, 'name', name, 'price_cents', price_cents) FROM products WHERE id = {id}",
        param="id",
        ids=PRODUCTS,
    ),
    CachedQuery(
        "counts",
        "SELECT json_build_array((SELECT count(*) FROM users), (SELECT count(*) FROM orders))",
    ),
)


# What is stale


@dataclass(frozen=True, slots=True)
class StaleEntry:
    """An entry that readers can get from the cache, and that differs from the database.

    ``cached`` and ``actual`` are JSON values; None means that there is no such row.
    """

    cache: str
    key: str
    cached: Any
    actual: Any


@dataclass(frozen=True, slots=True)
class Audit:
    """The number of entries that readers can reach, and the stale ones among them."""

    entries: int
    stale: list[StaleEntry]


class Auditor:
    """Compares the cache with the database.

    Args:
        dsn: The shop's database.
        url: Its Redis.
        environment: The ``${APP_ENV}`` of the keys.
        rules: The rule file or directory; by default, the shop's.
        queries: What it caches.
    """

    def __init__(
        self,
        dsn: str,
        url: str,
        *,
        environment: str = ENVIRONMENT,
        rules: Path | None = None,
        queries: Sequence[CachedQuery] = QUERIES,
    ) -> None:
        self._dsn = dsn
        self._url = url
        caches = load_rules(rules or rules_file(), {"APP_ENV": environment}, conditions=False).caches
        self._entries = [
            _Entries.of(query, caches[query.cache]) for query in queries if not caches[query.cache].ttl_only
        ]

    def audit(self) -> Audit:
        """Compare every entry that readers can reach with the database.

        In a cache with a version, these are the entries under the current version. Caches that are ``ttl_only`` are not
        compared. While writers write, an entry may look stale because its row changed between the two reads.

        Raises:
            psycopg.Error, redis.RedisError: A server cannot be reached.
        """
        entries = 0
        stale: list[StaleEntry] = []
        with psycopg.connect(self._dsn, autocommit=True) as connection, connect_redis(self._url) as client:
            for each in self._entries:
                cached = each.cached(client)
                entries += len(cached)
                for number, actual in _actual(connection, each.query, cached):
                    key, value = cached[number]
                    if value != actual:
                        stale.append(StaleEntry(each.query.cache, key, value, actual))
        return Audit(entries, stale)


def audit(dsn: str, url: str, *, rules: Path | None = None, queries: Sequence[CachedQuery] = QUERIES) -> Audit:
    """Compare the cache with the database once; see `Auditor`."""
    return Auditor(dsn, url, rules=rules, queries=queries).audit()


@dataclass(frozen=True, slots=True)
class _Entries:
    """The keys of all entries that one cache can have, by parameter (0 for none).

    In a cache with a version, ``keys`` have NUL in the version's place; other caches have no ``version_keys``.
    """

    query: CachedQuery
    keys: dict[int, bytes]
    version_keys: dict[int, bytes]

    @classmethod
    def of(cls, query: CachedQuery, cache: Cache) -> Self:
        keys = Keys(cache)
        both = {number: keys.of(query.params(number)) for number in query.numbers()}
        versions = {number: version for number, (_, version) in both.items() if version}
        return cls(query, {number: key for number, (key, _) in both.items()}, versions)

    def cached(self, client: redis.Redis) -> dict[int, tuple[str, Any]]:
        """Return key and value of each entry that readers can reach now, by parameter."""
        keys = self.keys
        if self.version_keys:
            versions = _present(client, self.version_keys)
            keys = {number: self.keys[number].replace(NUL, version) for number, version in versions.items()}
        values: dict[int, tuple[str, Any]] = {}
        for number, entry in _present(client, keys).items():
            payload = _ENVELOPE.payload(entry)
            if payload is not None:
                values[number] = keys[number].decode(), JSON.loads(payload) if payload else None
        return values


_ENVELOPE: Final = Envelope(Options[Any]().schema)


def _present(client: redis.Redis, keys: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return the values of those keys that exist, by parameter."""
    values: list[Any] = client.mget(list(keys.values())) if keys else []
    return {number: value for number, value in zip(keys, values, strict=True) if value is not None}


def _actual(
    connection: psycopg.Connection[tuple[Any, ...]],
    query: CachedQuery,
    numbers: Iterable[int],
) -> Iterator[tuple[int, Any]]:
    """Return (parameter, value) from the database, all from one snapshot."""
    select = query.select.format(id="wanted.id")
    rows = connection.execute(
        f"SELECT wanted.id, ({select}) FROM unnest(%s::bigint[]) AS wanted (id)",
        [list(numbers)],
    )
    yield from rows


def connect_redis(url: str) -> redis.Redis:
    """Connect without the driver's own retries."""
    return redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0))
