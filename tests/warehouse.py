"""The shop's warehouse: tables of another kind than the shop's, beside them, for faults that alter tables.

`stock` has generated columns, one of them a key, and an enum; `moves` is partitioned by the day. Entries hold whole
rows, so that a column that nobody asks for shows as well. Writers name only columns that no fault takes away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from running import execute

from cdc_invalidator.embedded.shop import PRODUCTS, CachedQuery

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from cdc_invalidator.embedded.shoppers import Change

ITEMS: Final = 120
COLD_ITEMS: Final = 60
"""The first of them are read and never written, so that nothing but a sweep makes up for a fault that was missed."""

ZONES: Final = 8
DAYS: Final = 40
WRITTEN_DAYS: Final = 20
"""Writers put rows only into the partitions of the first days; the others come and go."""

RULES: Final = """
version: 1
caches:
  item: {key: "stock:item:{id}", ttl: 1h, negative_ttl: 1m}
  zone: {key: "stock:zone:{zone}", ttl: 1h}
  stock-page: {key: "stock:page:{id}:v{version}", version: "stock:pages:ver", bump_over: 20, ttl: 1h}
  move: {key: "stock:move:{id}", ttl: 1h, negative_ttl: 1m}
  day: {key: "stock:day:{day}:v{version}", version: "stock:day:{day}:ver", ttl: 1h}
rules:
  - {name: stock-changed, table: public.stock, bust: [item, zone, stock-page]}
  - {name: moved, table: public.moves, bust: [move, day]}
"""

SCHEMA: Final = (
    "CREATE TYPE grade AS ENUM ('good', 'worn', 'odd')",
    f"""CREATE TABLE stock (
        id int PRIMARY KEY, product_id int NOT NULL, quantity int NOT NULL, grade grade NOT NULL DEFAULT 'good',
        zone int GENERATED ALWAYS AS (product_id % {ZONES}) STORED,
        worth int GENERATED ALWAYS AS (quantity * 100) STORED)""",
    # Generated columns belong to this identity, so that the publication must carry them.
    "ALTER TABLE stock REPLICA IDENTITY FULL",
    """CREATE TABLE moves (id int NOT NULL, day int NOT NULL, quantity int NOT NULL, PRIMARY KEY (id, day))
       PARTITION BY RANGE (day)""",
    *(f"CREATE TABLE moves_{n} PARTITION OF moves FOR VALUES FROM ({10 * n - 10}) TO ({10 * n})" for n in range(1, 4)),
    f"INSERT INTO stock SELECT n, n % {PRODUCTS}, n FROM generate_series(1, {ITEMS}) n",
    f"INSERT INTO moves SELECT n, day, n FROM generate_series(1, {ITEMS}) n, generate_series(0, 29, 5) day",
)

QUERIES: Final = (
    CachedQuery("item", "SELECT to_jsonb(stock) FROM stock WHERE id = {id}", param="id", ids=ITEMS),
    CachedQuery(
        "zone",
        f"SELECT coalesce(jsonb_agg(to_jsonb(stock) ORDER BY id), '[]') FROM stock"
        f" WHERE mod(product_id, {ZONES}) = {{id}}",
        param="zone",
        ids=ZONES - 1,
    ),
    CachedQuery("stock-page", "SELECT to_jsonb(stock) FROM stock WHERE id = {id}", param="id", ids=ITEMS),
    CachedQuery(
        "move", "SELECT jsonb_agg(to_jsonb(moves) ORDER BY day) FROM moves WHERE id = {id}", param="id", ids=ITEMS
    ),
    CachedQuery(
        "day",
        "SELECT jsonb_build_array(count(*), sum(quantity)) FROM moves WHERE day = {id}",
        param="day",
        ids=DAYS - 1,
    ),
)


def rules_file(folder: Path) -> Path:
    """Write the rules beside those that are in the folder."""
    path = folder / "warehouse.yaml"
    path.write_text(RULES)
    return path


def create(dsn: str) -> None:
    """Make and fill the tables."""
    execute(dsn, *SCHEMA)


def _statement(weight: int, text: str) -> tuple[int, Change]:
    """Return a change: one statement, with numbers of one's choice."""

    def change(connection: object, dice: random.Random) -> None:
        values = {
            "item": dice.randint(COLD_ITEMS + 1, ITEMS),
            "product": dice.randint(1, PRODUCTS),
            "day": dice.randrange(WRITTEN_DAYS),
            "grade": dice.choice(["good", "worn"]),
        }
        connection.execute(text, values)  # type: ignore[attr-defined]

    return weight, change


CHANGES: Final = (
    _statement(20, "UPDATE stock SET quantity = quantity + 1 WHERE id = %(item)s"),
    _statement(8, "UPDATE stock SET product_id = %(product)s WHERE id = %(item)s"),
    _statement(8, "UPDATE stock SET grade = %(grade)s WHERE id = %(item)s"),
    _statement(1, "UPDATE stock SET quantity = quantity + 1 WHERE id BETWEEN %(item)s AND %(item)s + 40"),
    _statement(4, "DELETE FROM stock WHERE id = %(item)s"),
    _statement(
        6,
        "INSERT INTO stock (id, product_id, quantity) VALUES (%(item)s, %(product)s, 1)"
        " ON CONFLICT (id) DO UPDATE SET quantity = stock.quantity + 10",
    ),
    _statement(
        12,
        "INSERT INTO moves (id, day, quantity) VALUES (%(item)s, %(day)s, 1)"
        " ON CONFLICT (id, day) DO UPDATE SET quantity = moves.quantity + 1",
    ),
    _statement(8, "UPDATE moves SET quantity = quantity + 1 WHERE id = %(item)s"),
    _statement(4, "DELETE FROM moves WHERE id = %(item)s AND day < 5"),
    # To the other of these two partitions.
    _statement(
        6,
        f"UPDATE moves SET day = {WRITTEN_DAYS - 1} - day WHERE id = %(item)s AND day = %(day)s AND NOT EXISTS"
        f" (SELECT FROM moves other WHERE other.id = moves.id AND other.day = {WRITTEN_DAYS - 1} - moves.day)",
    ),
)
