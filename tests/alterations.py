"""What an administrator does to the tables of shop and warehouse, and to the publication, while the application writes.

Every statement of the application stays valid all the time. What a rule reads may be away for a moment.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import psycopg
import warehouse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Longer than the daemon takes to look at the catalogs again.
LONG_SECONDS = 4.0

_RETYPED = (
    "ALTER TABLE products ALTER price_cents TYPE integer USING price_cents + 1",
    "ALTER TABLE orders ALTER quantity TYPE integer USING quantity + 1",
    "ALTER TABLE users ALTER plan TYPE text USING reverse(plan)",
    "ALTER TABLE reviews ALTER stars TYPE bigint USING 6 - stars",
    "ALTER TABLE stock ALTER grade TYPE grade USING CASE grade WHEN 'good' THEN 'worn' ELSE 'good' END::grade",
    "ALTER TABLE moves ALTER quantity TYPE integer USING quantity + 1",
)
_TABLES = ("users", "orders", "products", "reviews", "stock", "moves")
_DETACH = "ALTER TABLE moves DETACH PARTITION moves_3"
_ATTACH = "ALTER TABLE moves ATTACH PARTITION moves_3 FOR VALUES FROM (20) TO (30)"
_MOVE = "UPDATE moves_3 SET quantity = quantity + 1"


class Alterations:
    """Faults, each of which leaves tables and publication as the rules need them.

    Args:
        dsn: the database.
        publication: the daemon's.
        dice: for all choices.
        streaming: waits until the daemon streams, so that it does not start while something is away that a rule needs.
    """

    def __init__(self, dsn: str, publication: str, dice: random.Random, streaming: Callable[[], object]) -> None:
        self._dsn = dsn
        self._publication = publication
        self._dice = dice
        self._streaming = streaming
        self._number = 0

    @property
    def faults(self) -> list[Callable[[], None]]:
        return [
            self.change_a_type,
            self.change_an_expression,
            self.rename_a_label,
            self.add_rename_and_drop_a_column,
            self.rename_a_rules_column_and_back,
            self.make_a_partition_unlogged,
            self.make_a_listed_table_unlogged,
            self.detach_and_attach,
            self.attach_write_and_drop,
            self.narrow_the_publication,
            self.rename_the_publication,
            self.unpublish_a_table,
        ]

    def change_a_type(self) -> None:
        self._run(self._dice.choice(_RETYPED))

    def change_an_expression(self) -> None:
        """From PostgreSQL 17 on; before, the column is made anew."""
        expression = f"(quantity * {self._next()})"
        if self._major() >= 17:
            self._run(f"ALTER TABLE stock ALTER worth SET EXPRESSION AS {expression}")
        else:
            self._run(
                "ALTER TABLE stock DROP COLUMN worth;"
                f"ALTER TABLE stock ADD COLUMN worth int GENERATED ALWAYS AS {expression} STORED"
            )

    def rename_a_label(self) -> None:
        """Of the one label that no writer uses."""
        ((label,),) = self._run(
            "SELECT enumlabel FROM pg_enum WHERE enumtypid = 'grade'::regtype AND enumlabel LIKE 'odd%'"
        )
        self._run(f"UPDATE stock SET grade = '{label}' WHERE id % 7 = 0")
        self._pause()
        self._run(f"ALTER TYPE grade RENAME VALUE '{label}' TO 'odd_{self._next()}'")

    def add_rename_and_drop_a_column(self) -> None:
        table, number = self._dice.choice(["stock", "moves"]), self._next()
        for statement in (
            f"ALTER TABLE {table} ADD COLUMN note_{number} int NOT NULL DEFAULT {number}",
            f"ALTER TABLE {table} RENAME note_{number} TO remark_{number}",
            f"ALTER TABLE {table} DROP COLUMN remark_{number}",
        ):
            self._run(statement)
            self._pause()

    def rename_a_rules_column_and_back(self) -> None:
        self._streaming()
        self._run("ALTER TABLE stock RENAME zone TO area")
        self._pause()
        self._run("ALTER TABLE stock RENAME area TO zone")

    def make_a_partition_unlogged(self) -> None:
        self._streaming()
        for statement in ("ALTER TABLE moves_3 SET UNLOGGED", _MOVE, "ALTER TABLE moves_3 SET LOGGED"):
            self._run(statement)
            self._pause()

    def make_a_listed_table_unlogged(self) -> None:
        self._streaming()
        self._run(f"{self._unpublish('stock')}; ALTER TABLE stock SET UNLOGGED")
        self._run("UPDATE stock SET quantity = quantity + 1")
        self._pause()
        self._run("ALTER TABLE stock SET LOGGED")

    def detach_and_attach(self) -> None:
        statements = [_DETACH, _MOVE, _ATTACH]
        for statement in self._dice.choice([statements, ["; ".join(statements)]]):
            self._run(statement)
            self._pause()

    def attach_write_and_drop(self) -> None:
        """Rows come with a partition, and go with it."""
        end = self._dice.choice(
            ["DROP TABLE moves_4", "ALTER TABLE moves DETACH PARTITION moves_4; DROP TABLE moves_4"]
        )
        for statement in (
            "CREATE TABLE moves_4 PARTITION OF moves FOR VALUES FROM (30) TO (40)",
            f"INSERT INTO moves SELECT n, 35, n FROM generate_series(1, {warehouse.ITEMS}) n",
            end,
        ):
            self._run(statement)
            self._pause()

    def narrow_the_publication(self) -> None:
        with self._publication_may_lack():
            self._run(f"ALTER PUBLICATION {self._publication} SET (publish = '{self._dice.choice(['insert', ''])}')")
        self._pause()
        if self._dice.random() < 0.5:
            with self._publication_may_lack():
                self._run(f"ALTER PUBLICATION {self._publication} SET (publish = 'insert, update, delete, truncate')")

    def rename_the_publication(self) -> None:
        away = f"{self._publication}_away"
        with self._publication_may_lack():
            self._run(f"ALTER PUBLICATION {self._publication} RENAME TO {away}")
            self._pause()
            try:
                self._run(f"ALTER PUBLICATION {away} RENAME TO {self._publication}")
            except psycopg.errors.DuplicateObject:
                # The daemon has made another.
                self._run(f"DROP PUBLICATION {away}")

    def unpublish_a_table(self) -> None:
        table = self._dice.choice(_TABLES)
        self._run(self._unpublish(table))
        self._pause()
        if self._dice.random() < 0.5:
            with self._publication_may_lack(), contextlib.suppress(psycopg.errors.DuplicateObject):
                self._run(f"ALTER PUBLICATION {self._publication} ADD TABLE {table}")

    def _unpublish(self, table: str) -> str:
        """Return a statement that takes a table out of the publication if it is in there."""
        return (
            f"DO $$ BEGIN IF EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
            f" WHERE p.pubname = '{self._publication}' AND r.prrelid = '{table}'::regclass)"
            f" THEN ALTER PUBLICATION {self._publication} DROP TABLE {table}; END IF; END $$"
        )

    @contextlib.contextmanager
    def _publication_may_lack(self) -> Iterator[None]:
        """Somebody has dropped it, and the daemon has not made another yet."""
        with contextlib.suppress(psycopg.errors.UndefinedObject):
            yield

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _pause(self) -> None:
        time.sleep(LONG_SECONDS if self._dice.random() < 0.1 else self._dice.random() / 2)

    def _major(self) -> int:
        ((number,),) = self._run("SELECT current_setting('server_version_num')::int / 10000")
        return int(number)

    def _run(self, text: str) -> Sequence[tuple[Any, ...]]:
        """Run a statement, or several as one transaction; again after a deadlock with a writer."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while True:
                try:
                    cursor = connection.execute(text.encode())
                except psycopg.errors.DeadlockDetected:
                    continue
                return cursor.fetchall() if cursor.description else []
