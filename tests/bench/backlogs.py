"""Workloads that have been written before a contender starts: how fast is it when it is behind?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from bench import runs, source
from bench.contenders import Contender, Daemon, PgRecvlogical, RawReader, Tuned, Tutorial
from bench.measure import median
from bench.workloads import Table, Workload, rounds_of, rules_for


class Backlog(Workload):
    """``tables``: all that are written to and published; ``ruled``: those of them whose keys are in the cache."""

    full_size: int
    tables: Sequence[str] = ("items",)
    ruled: Sequence[str] = ("items",)

    def __init__(self, scale: float) -> None:
        self.changes = max(1000, int(self.full_size * scale))
        self.results: dict[str, list[runs.Figures]] = defaultdict(list)

    def contenders(self) -> list[Contender]:
        readers = [*RawReader.both(), *PgRecvlogical.found()]
        return [*readers, Tuned(), Tutorial(), Daemon(rules_for(self.ruled))]

    def run(self, rounds: int, tell: Callable[[str], None]) -> None:
        contenders = self.contenders()
        stale, kept = self.stale(), self.kept()
        with runs.place(self.tables) as where:
            self.keep_versions(where)
            self.fill(where.pg)
            for contender in contenders:
                if isinstance(contender, Daemon):
                    contender.prime(where.pg, where.keys, where.folder)
            where.pg.catch_up()
            where.pg.lead()
            where.pg.execute(self.writing())
            where.pg.close_backlog()
            for contender in rounds_of(contenders, rounds):
                work = runs.Work(tables=self.ruled, stale=stale, kept=kept, changes=self.changes)
                figures = runs.drain(where, contender, work)
                self.results[contender.name].append(figures)
                tell(f"{self.name} {contender.name}: {figures.rate:,.0f} changes/s, {figures.cpu:.1f} µs a change")

    def fill(self, pg: source.Source) -> None:
        """Insert the rows that are there before the backlog."""
        for table in self.tables:
            pg.fill(table, f"SELECT i FROM generate_series(1, {self.changes}) AS i")

    def writing(self) -> str:
        """Give the SQL that writes the backlog: one transaction that updates all rows."""
        return "UPDATE items SET price = price + 1, changed_at = now()"

    def stale(self) -> list[str]:
        """Give the keys that the backlog makes stale, in its order."""
        return [f"bench:items:{number}" for number in range(1, self.changes + 1)]

    def kept(self) -> list[str]:
        """Give keys that nobody may delete."""
        return []

    def _limit(self) -> list[float]:
        """Give the rate of the faster raw reader in each round: nobody can be faster than the server."""
        both = [self.results[reader.name] for reader in RawReader.both()]
        return [max(run.rate for run in round_) for round_ in zip(*both, strict=True)]

    def _ratio(self, name: str, rates: Sequence[float]) -> str:
        # Of each round the ratio, of these the median: what disturbed a round disturbed both.
        figures = self.results[name]
        return f"{median([run.rate / rate for run, rate in zip(figures, rates, strict=True)]):.2f}"

    def summary(self) -> list[list[str]]:
        tuned = [run.rate for run in self.results[Tuned.name]]
        return [
            ["changes/s, of the limit", self._ratio(Daemon.name, self._limit())],
            ["changes/s, of the tuned script", self._ratio(Daemon.name, tuned)],
        ]

    def table(self) -> Table:
        head = ("", "of the limit", "changes/s", *_COSTS)
        rows = [
            [name, self._ratio(name, self._limit()), f"{median([run.rate for run in figures]):,.0f}", *_costs(figures)]
            for name, figures in self.results.items()
        ]
        return Table(head, rows)


_COSTS = ("CPU, µs a change", "walsender's", "Valkey's", "peak memory, MB")


def _costs(figures: Sequence[runs.Figures]) -> list[str]:
    return [
        f"{median([run.cpu for run in figures]):.1f}",
        _known([run.walsender_cpu for run in figures], ".1f"),
        f"{median([run.valkey_cpu for run in figures]):.1f}",
        _known([run.peak_mb for run in figures], ".0f"),
    ]


def _known(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(median(known), form) if known else ""


class SmallTransactions(Backlog):
    """Of twenty changes one deletes, one inserts, the others update; each makes a key of its own stale."""

    name = "A"
    full_size = 100_000

    @property
    def title(self) -> str:
        return f"Backlog of {self.changes:,} one-row transactions"

    @property
    def written(self) -> Sequence[str]:
        return self.tables

    def table_of(self, number: int) -> str:
        """Give the table of a change; as the SQL in ``fill`` and ``writing`` has it."""
        return self.written[number // 7 % len(self.written)]

    def fill(self, pg: source.Source) -> None:
        for place, table in enumerate(self.written):
            mine = f"i / 7 % {len(self.written)} = {place}"
            pg.fill(table, f"SELECT i FROM generate_series(1, {self.changes}) AS i WHERE {mine}")

    def writing(self) -> str:
        return f"""
        DO $do$
        DECLARE
          tables text[] := '{{{",".join(self.written)}}}';
          t text;
        BEGIN
          FOR i IN 1..{self.changes} LOOP
            t := tables[i / 7 % {len(self.written)} + 1];
            IF i % 20 = 0 THEN
              EXECUTE 'DELETE FROM ' || t || ' WHERE id = $1' USING i;
            ELSIF i % 20 = 10 THEN
              EXECUTE 'INSERT INTO ' || t || $insert$ SELECT {source.row("$1")}$insert$ USING i + {self.changes};
            ELSE
              EXECUTE 'UPDATE ' || t || ' SET price = price + 1, changed_at = now() WHERE id = $1' USING i;
            END IF;
            COMMIT;
          END LOOP;
        END $do$"""

    def stale(self) -> list[str]:
        return [
            key
            for number in range(1, self.changes + 1)
            for key in self.keys_of(self.table_of(number), number + self.changes if number % 20 == 10 else number)
        ]

    def keys_of(self, table: str, row: int) -> list[str]:
        return [f"bench:{table}:{row}"] if table in self.ruled else []


class LargeTransaction(Backlog):
    name = "B"
    full_size = 300_000

    @property
    def title(self) -> str:
        return f"Backlog of one transaction of {self.changes:,} rows"


class FewRuled(SmallTransactions):
    name = "C"
    tables = tuple(f"items_{number}" for number in range(10))
    ruled = tables[:2]

    @property
    def title(self) -> str:
        return f"Backlog of {self.changes:,} one-row transactions on ten published tables, two of them with rules"

    def kept(self) -> list[str]:
        return [f"bench:{table}:{number}" for table in self.tables[2:] for number in range(1, 101)]


class ManyRules(SmallTransactions):
    """Two rules for each table; the changes are on tables that both rule sets name."""

    name = "G"
    full_size = 50_000
    tables = tuple(f"items_{number}" for number in range(500))
    ruled = written = tables[:5]
    few, many = "10 rules", "1,000 rules on 500 tables"

    @property
    def title(self) -> str:
        return f"{self.many} against {self.few}: backlog of {self.changes:,} one-row transactions on five of the tables"

    def contenders(self) -> list[Contender]:
        return [
            Daemon(rules_for(self.ruled, twice=True), self.few),
            Daemon(rules_for(self.tables, twice=True), self.many),
        ]

    def keys_of(self, table: str, row: int) -> list[str]:
        return [f"bench:{table}:{row}", f"bench:{table}_more:{row}"]

    def _times(self) -> str:
        few, many = self.results[self.few], self.results[self.many]
        pairs = zip(many, few, strict=True)
        return f"{median([run.cpu / its.cpu if its.cpu else 1.0 for run, its in pairs]):.2f}"

    def summary(self) -> list[list[str]]:
        return [["the daemon's CPU a change, times that of few rules", self._times()]]

    def table(self) -> Table:
        head = ("", "CPU, times", "changes/s", *_COSTS)
        ratios = {self.few: "1.00", self.many: self._times()}
        rows = [
            [name, ratios[name], f"{median([run.rate for run in figures]):,.0f}", *_costs(figures)]
            for name, figures in self.results.items()
        ]
        return Table(head, rows)


class HugeTransaction(Backlog):
    """For the daemon's memory. So many keys are not held: their caches are swept, so few of them need to be there."""

    name = "H"
    full_size = 5_000_000
    every = 500

    @property
    def title(self) -> str:
        return f"One transaction of {self.changes:,} rows"

    def contenders(self) -> list[Contender]:
        return [Daemon(rules_for(self.ruled), may_sweep=True)]

    def stale(self) -> list[str]:
        return [f"bench:items:{number}" for number in range(self.every, self.changes + 1, self.every)]

    def summary(self) -> list[list[str]]:
        return [["the daemon's peak memory, MB", _costs(self.results[Daemon.name])[-1]]]

    def table(self) -> Table:
        figures = self.results[Daemon.name]
        return Table(
            ("", "changes/s", *_COSTS),
            [[Daemon.name, f"{median([run.rate for run in figures]):,.0f}", *_costs(figures)]],
        )
