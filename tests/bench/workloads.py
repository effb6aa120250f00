"""What every workload has: a size, contenders that run in rounds, and figures that become one table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.contenders import Contender
    from bench.runs import Place


class Table(NamedTuple):
    """A table of the report: its header, and its rows as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Workload(ABC):
    """One thing to measure, on servers of its own.

    Args:
        scale: a factor for all sizes.
    """

    name: ClassVar[str]
    servers = ""

    @property
    @abstractmethod
    def title(self) -> str:
        """Say what is measured, and at which size."""

    @abstractmethod
    def run(self, rounds: int, tell: Callable[[str], None]) -> None:
        """Let all contenders run, and keep their figures."""

    @abstractmethod
    def summary(self) -> Sequence[Sequence[str]]:
        """Give what matters as rows of a sentence and a ratio."""

    @abstractmethod
    def table(self) -> Table:
        """Give all figures, as medians over the rounds."""

    def keep_versions(self, where: Place) -> None:
        self.servers = f"PostgreSQL {where.pg.version}, Valkey {where.keys.version}"


def rules_for(tables: Sequence[str], *, twice: bool = False) -> str:
    """A rule file that busts one key for each change of these tables, or two by two rules."""
    caches, rules = "", ""
    for table in tables:
        for more in ("", "_more") if twice else ("",):
            caches += f'  {table}{more}: {{key: "bench:{table}{more}:{{id}}", ttl: 5m}}\n'
            rules += f"  - {{name: {table}{more}-changed, table: public.{table}, bust: [{table}{more}]}}\n"
    return f"version: 1\ncaches:\n{caches}rules:\n{rules}"


def rounds_of(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Each contender once a round, in rotating order: what grows or fades in time hits all of them."""
    for number in range(rounds):
        turn = number % len(contenders)
        yield from (*contenders[turn:], *contenders[:turn])
