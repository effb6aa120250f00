"""What is measured: each workload writes its own WAL, lets the contenders run in rounds, and keeps their figures."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from bench import runs
from bench.contenders import Contender, Daemon, RawReader, Tuned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def rules_for(tables: Sequence[str]) -> str:
    """A rule file that busts one key for each change of these tables."""
    caches = "".join(f'  {table}: {{key: "bench:{table}:{{id}}", ttl: 5m}}\n' for table in tables)
    rules = "".join(f"  - {{name: {table}-changed, table: public.{table}, bust: [{table}]}}\n" for table in tables)
    return f"version: 1\ncaches:\n{caches}rules:\n{rules}"


def rounds_of(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Each contender once a round, in rotating order: what grows or fades in time hits all of them."""
    for number in range(rounds):
        turn = number % len(contenders)
        yield from (*contenders[turn:], *contenders[:turn])


class Backlog:
    """All changes have been written before a contender starts: how fast is it when it is behind?

    Args:
        changes: how many.
        tables: all that are written to, in turn; the first ``ruled`` of them have keys in the cache.
    """

    name: str
    title: str

    def __init__(self, scale: float) -> None:
        self.changes = max(200, int(self.full_size * scale))
        self.results: dict[str, list[runs.Figures]] = defaultdict(list)

    full_size = 100_000
    tables: Sequence[str] = ("items",)
    ruled: Sequence[str] = ("items",)

    def run(self, rounds: int, tell: Callable[[str], None]) -> None:
        daemon = Daemon(rules_for(self.ruled))
        contenders = [RawReader(), Tuned(), daemon]
        with runs.place(self.tables) as where:
            for table in self.tables:
                where.pg.fill(table, self.rows_of(table))
            daemon.prime(where.pg, where.keys, where.folder)
            where.pg.lead()
            where.pg.execute(self.writing())
            where.pg.close_backlog()
            for contender in rounds_of(contenders, rounds):
                figures = runs.drain(where, contender, self.ruled, self.stale(), self.changes)
                self.results[contender.name].append(figures)
                tell(f"{self.name} {contender.name}: {figures.rate:,.0f} changes/s, {figures.cpu:.1f} µs a change")
            where.pg.close()

    def rows_of(self, table: str) -> str:
        """A query of the ids that the table has before."""
        return f"SELECT i FROM generate_series(1, {self.changes}) AS i"

    def writing(self) -> str:
        """The SQL that writes the backlog."""
        raise NotImplementedError

    def stale(self) -> list[str]:
        """The keys that it makes stale, in its order."""
        raise NotImplementedError


class SmallTransactions(Backlog):
    name = "A"
    title = "backlog of {changes:,} one-row transactions"

    def rows_of(self, table: str) -> str:
        place = self.tables.index(table)
        return f"{super().rows_of(table)} WHERE i / 7 % {len(self.tables)} = {place}"

    def writing(self) -> str:
        # Of twenty changes one deletes, one inserts, the others update.
        insert = f"INSERT INTO %1$I SELECT {runs.source.row('i')} FROM (SELECT %2$s + {self.changes} AS i) AS one"
        return f"""
        DO $do$
        DECLARE t text; tables text[] := '{{{",".join(self.tables)}}}';
        BEGIN
          FOR i IN 1..{self.changes} LOOP
            t := tables[i / 7 % {len(self.tables)} + 1];
            IF i % 20 = 0 THEN
              EXECUTE format('DELETE FROM %I WHERE id = $1', t) USING i;
            ELSIF i % 20 = 10 THEN
              EXECUTE format($insert${insert.replace('% 50', '%% 50').replace('% 1000', '%% 1000').replace('% 2 =', '%% 2 =')}$insert$, t, i);
            ELSE
              EXECUTE format('UPDATE %I SET price = price + 1, changed_at = now() WHERE id = $1', t) USING i;
            END IF;
            COMMIT;
          END LOOP;
        END $do$"""

    def stale(self) -> list[str]:
        keys = []
        for number in range(1, self.changes + 1):
            table = self.tables[number // 7 % len(self.tables)]
            if table in self.ruled:
                keys.append(f"bench:{table}:{number + self.changes if number % 20 == 10 else number}")
        return keys


class LargeTransaction(Backlog):
    name = "B"
    title = "backlog of one transaction of {changes:,} rows"
    full_size = 300_000

    def writing(self) -> str:
        return "UPDATE items SET price = price + 1, changed_at = now()"

    def stale(self) -> list[str]:
        return [f"bench:items:{number}" for number in range(1, self.changes + 1)]


ALL = (SmallTransactions, LargeTransaction)
