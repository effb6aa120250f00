"""The report: what was measured where, ratios first, then all figures; as markdown, also into README.md here."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
from typing import TYPE_CHECKING

from bench.contenders import PgRecvlogical

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.workloads import Workload

_MARKED = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def markdown(done: Sequence[Workload], rounds: int) -> str:
    """Put the tables of all workloads that have run into one text."""
    return "\n\n".join([_where(done, rounds), _ratios(done), *map(_figures, done)]) + "\n"


def _where(done: Sequence[Workload], rounds: int) -> str:
    today = dt.datetime.now(dt.UTC).strftime("%d %b %Y").lstrip("0")
    without = "" if PgRecvlogical.found() else " No package here has pg_recvlogical: it is left out."
    return (
        f"{today}: {done[0].servers}, Python {platform.python_version()}, {platform.system()} {platform.release()},"
        f" {os.cpu_count()} cores for servers and contender together; medians of {rounds}"
        f" interleaved round{'s' if rounds > 1 else ''}.{without}"
    )


def _ratios(done: Sequence[Workload]) -> str:
    rows = [[workload.name, *row] for workload in done for row in workload.summary()]
    return _table(("", "cdc-invalidator", "ratio"), rows, names=2)


def _figures(workload: Workload) -> str:
    head, rows = workload.table()
    return f"**{workload.name}. {workload.title}**\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    rule = ["---"] * names + ["--:"] * (len(head) - names)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def into_readme(text: str, readme: Path) -> None:
    """Replace what stands between the markers.

    Raises:
        LookupError: there are none.
    """
    before = readme.read_text()
    after, count = _MARKED.subn(lambda _: text, before)
    if not count:
        raise LookupError(f"{readme} has no <!-- bench --> and <!-- /bench -->")
    readme.write_text(after)
