"""The database that is written and read: items on shelves, each item and each shelf with a counter of its versions.

The counters are a table of their own that nobody publishes. A writer locks those that its transaction is about, raises
them, and holds them until its commit; so each version has one commit, in this order, also of a row that comes and goes.
A load reads the counter in the same statement as the rows, hence in the same snapshot.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias

from consistency.history import Write, Writes
from running import execute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import psycopg

    Connection = psycopg.Connection[Any]

Value: TypeAlias = "list[int] | None"
"""Of what is cached: its version and a figure, or None."""

ITEMS: Final = 120
SHELVES: Final = 12
SUBJECTS: Final = ITEMS + SHELVES
BUMP_OVER: Final = 8

# With hash tags, as a cluster needs them; STALE stands for a `stale_for`, if there is one.
_RULES: Final = """
version: 1
caches:
  item: {key: "c:item:{{{id}}}", ttl: 1h, negative_ttl: 1hSTALE}
  shelf: {key: "c:shelf:{{{shelf}}}", ttl: 3sSTALE}
  page: {key: "c:page:{{{shelf}}}:v{version}", version: "c:page:{{{shelf}}}:ver", ttl: 1hSTALE}
  stock:
    key: "c:stock:{{{id}}}:v{version}"
    version: "c:stock:ver"
    bump_over: BUMP_OVER
    ttl: 1h
    negative_ttl: 1h
rules:
  - {name: item-changed, table: public.items, bust: [item, shelf, page, stock]}
"""
STALE_SECONDS: Final = 2

_SCHEMA: Final = (
    "CREATE TABLE items (id int PRIMARY KEY, shelf int NOT NULL, body int NOT NULL)",
    # A key over `shelf` needs the old row: an item that moves is missing on the shelf it came from.
    "ALTER TABLE items REPLICA IDENTITY FULL",
    "CREATE TABLE versions (subject int PRIMARY KEY, n bigint NOT NULL)",
    f"INSERT INTO versions SELECT n, 1 FROM generate_series(0, {SUBJECTS - 1}) n",
    f"INSERT INTO items SELECT n, n % {SHELVES}, 0 FROM generate_series(0, {ITEMS - 1}) n",
)

# In order, or two writers could wait for each other; shelves come after items.
_LOCK: Final = "SELECT FROM versions WHERE subject = ANY(%s) ORDER BY subject FOR UPDATE"
_RAISE: Final = "UPDATE versions SET n = n + 1 WHERE subject = ANY(%s) RETURNING subject, n"
_LSN: Final = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"


class Kind(NamedTuple):
    """A cache of the rules.

    ``parameter``: what its keys are over; ``first``: the subject that the parameter 0 is; ``size``: how many there
    are; ``select``: what is cached of some subjects: their versions, and a figure that is NULL where there is no row.
    """

    name: str
    parameter: str
    first: int
    size: int
    select: str

    def query(self, numbers: Sequence[int]) -> tuple[str, list[list[int]]]:
        """Give the statement that reads what is cached for these parameters, and its arguments."""
        return self.select, [[self.first + number for number in numbers]]

    def values(self, rows: Iterable[Sequence[Any]]) -> dict[int, Value]:
        """Give what that statement's rows say for each parameter: version and figure, or None."""
        return {row[0] - self.first: None if row[2] is None else [row[1], row[2]] for row in rows}

    def load(self, connection: Connection, numbers: Sequence[int]) -> dict[int, Value]:
        """Read what is cached for these parameters."""
        return self.values(connection.execute(*self.query(numbers)))


_ITEM: Final = "SELECT subject, n, (SELECT body FROM items WHERE id = subject) FROM versions WHERE subject = ANY(%s)"
_SHELF: Final = f"""
SELECT subject, n, (SELECT count(*) FROM items WHERE shelf = subject - {ITEMS}) FROM versions WHERE subject = ANY(%s)
"""

CACHES: Final = (
    Kind("item", "id", 0, ITEMS, _ITEM),
    Kind("shelf", "shelf", ITEMS, SHELVES, _SHELF),
    Kind("page", "shelf", ITEMS, SHELVES, _SHELF),
    Kind("stock", "id", 0, ITEMS, _ITEM),
)


def rules_file(folder: Path, *, stale: bool) -> Path:
    """Write the rules; ``stale``: what is busted may be served for `STALE_SECONDS` more."""
    path = folder / "rules.yaml"
    text = _RULES.replace("BUMP_OVER", str(BUMP_OVER))
    path.write_text(text.replace("STALE", f", stale_for: {STALE_SECONDS}s" if stale else ""))
    return path


def create(dsn: str) -> Writes:
    """Make the tables, and give the first version of everything."""
    execute(dsn, *_SCHEMA)
    writes = Writes()
    for subject in range(SUBJECTS):
        writes.add(Write(subject, 1, 0, 0, 0, gone=False))
    return writes


class Writer:
    """Changes items in one way or another, a transaction at a time, and records the versions that it made.

    Args:
        connection: in autocommit mode; nobody else uses it.
        seed: of its choices.
    """

    def __init__(self, connection: Connection, seed: int) -> None:
        self.connection = connection
        self._dice = random.Random(seed)
        self.writes = Writes()
        self.commits = 0
        self.lsn = 0

    def committed(self, writes: Iterable[Write]) -> None:
        self.commits += 1
        for write in writes:
            self.writes.add(write)
            self.lsn = write.lsn

    def write(self) -> tuple[int, int]:
        """Change something, and give one of its items, and the upper bound of the LSN of the last commit."""
        ways: Mapping[Callable[[], int], int] = {
            self.touch: 700,
            self._move: 150,
            self._come_or_go: 140,
            self._touch_many: 8,
            self._truncate: 2,
        }
        (way,) = self._dice.choices(list(ways), list(ways.values()))
        return way(), self.lsn

    def touch(self, item: int | None = None) -> int:
        """Update one item, if it is there."""
        item = self.choose() if item is None else item
        self._touch([item])
        return item

    def _touch_many(self) -> int:
        """Update so many that a cache with `bump_over` is bumped."""
        items = self._dice.sample(range(ITEMS), 2 * BUMP_OVER)
        self._touch(items)
        return items[0]

    def _touch(self, items: list[int]) -> None:
        with _Transaction(self) as transaction:
            there = transaction.lock(items)
            transaction.raise_versions(there, there.values())
            transaction.execute("UPDATE items SET body = body + 1 WHERE id = ANY(%s)", [list(there)])

    def _move(self) -> int:
        item, shelf = self.choose(), self._dice.randrange(SHELVES)
        with _Transaction(self) as transaction:
            there = transaction.lock([item])
            if there:
                transaction.raise_versions(there, {there[item], shelf})
                transaction.execute("UPDATE items SET shelf = %s WHERE id = %s", [shelf, item])
        return item

    def _come_or_go(self) -> int:
        item, shelf = self.choose(), self._dice.randrange(SHELVES)
        with _Transaction(self) as transaction:
            there = transaction.lock([item])
            if there:
                transaction.raise_versions(there, there.values(), gone=there)
                transaction.execute("DELETE FROM items WHERE id = %s", [item])
            else:
                transaction.raise_versions([item], [shelf])
                transaction.execute("INSERT INTO items VALUES (%s, %s, 0)", [item, shelf])
        return item

    def _truncate(self) -> int:
        """Empty the table, and fill it again in a transaction of its own."""
        with _Transaction(self) as transaction:
            transaction.lock(range(ITEMS))
            transaction.raise_versions(range(ITEMS), range(SHELVES), gone=range(ITEMS))
            transaction.execute("TRUNCATE items")
        with _Transaction(self) as transaction:
            there = transaction.lock(range(ITEMS))
            missing = [item for item in range(ITEMS) if item not in there]
            transaction.raise_versions(missing, {item % SHELVES for item in missing})
            transaction.execute("INSERT INTO items SELECT n, n %% %s, 0 FROM unnest(%s::int[]) n", [SHELVES, missing])
        return self.choose()

    def choose(self) -> int:
        """Give some item."""
        return self._dice.randrange(ITEMS)


class _Transaction:
    """One transaction, with the versions that it makes; what is not there is not changed, and gets no version."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.execute = writer.connection.execute
        self._raised: dict[int, int] = {}
        self._gone: set[int] = set()

    def __enter__(self) -> Self:
        self.execute("BEGIN")
        return self

    def lock(self, items: Iterable[int]) -> dict[int, int]:
        """Lock items, and give the shelves of those that are there."""
        numbers = list(items)
        self.execute(_LOCK, [numbers])
        return dict(self.execute("SELECT id, shelf FROM items WHERE id = ANY(%s)", [numbers]).fetchall())

    def raise_versions(self, items: Iterable[int], shelves: Iterable[int], gone: Iterable[int] = ()) -> None:
        """Raise the versions of locked items and of these shelves; of the items ``gone`` there will be no row."""
        numbers = [ITEMS + shelf for shelf in set(shelves)]
        self.execute(_LOCK, [numbers])
        self._raised = dict(self.execute(_RAISE, [[*items, *numbers]]).fetchall())
        self._gone = set(gone)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None or not self._raised:
            self.execute("ROLLBACK")
            return
        began = time.monotonic_ns()
        self.execute("COMMIT")
        ended = time.monotonic_ns()
        (row,) = self.execute(_LSN).fetchall()
        self._writer.committed(
            Write(subject, version, row[0], began, ended, gone=subject in self._gone)
            for subject, version in self._raised.items()
        )
