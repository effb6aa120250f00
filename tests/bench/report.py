"""Figures as markdown: medians over the rounds, ratios first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import measure
from bench.contenders import RawReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.runs import Figures
    from bench.workloads import Backlog


def markdown(done: Sequence[Backlog]) -> str:
    return "\n\n".join(backlog(workload) for workload in done)


def backlog(workload: Backlog) -> str:
    limit = workload.results[RawReader.name]
    rows = [_backlog_row(name, figures, limit) for name, figures in workload.results.items()]
    head = ("", "of the limit", "changes/s", "CPU, µs a change", "walsender's", "Valkey's", "memory, MB")
    return f"**{workload.name}: {workload.title.format(changes=workload.changes)}**\n\n{table(head, rows)}"


def _backlog_row(name: str, figures: Sequence[Figures], limit: Sequence[Figures]) -> list[str]:
    # Of each round the ratio, of these the median: what disturbed a round disturbed both.
    ratio = measure.median([mine.rate / its.rate for mine, its in zip(figures, limit, strict=True)])
    return [
        name,
        f"{ratio:.2f}",
        f"{measure.median([run.rate for run in figures]):,.0f}",
        f"{measure.median([run.cpu for run in figures]):.1f}",
        f"{measure.median([run.walsender_cpu for run in figures]):.1f}",
        f"{measure.median([run.valkey_cpu for run in figures]):.1f}",
        f"{measure.median([run.memory_mb for run in figures]):.0f}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
