"""The table of all modes, as markdown, also into README.md here."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
from typing import TYPE_CHECKING

from consistency import trial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from consistency.trial import Outcome

_MARKED = re.compile(r"(?<=<!-- consistency -->\n).*?(?=<!-- /consistency -->)", re.DOTALL)
_HEAD = (
    "mode",
    "reads checked",
    "from the cache",
    "loaded",
    "fills dropped",
    "commits",
    "faults",
    "stale reads",
    "with an LSN: older",
    "with an age: older",
    "stale entries left",
)


def markdown(done: Sequence[Outcome], servers: str) -> str:
    """Put all that was counted into one text."""
    today = dt.datetime.now(dt.UTC).strftime("%d %b %Y").lstrip("0")
    where = (
        f"{today}: {servers}, Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores for servers and application together."
    )
    rule = ["---"] + ["--:"] * (len(_HEAD) - 1)
    rows = [row for outcome in done for row in _rows(outcome)]
    table = (f"| {' | '.join(line)} |" for line in (_HEAD, rule, *rows))
    return "\n".join([where, "", *table, "", _sums([each for each in done if each.mode.sound])]) + "\n"


def _sums(sound: Sequence[Outcome]) -> str:
    """Add up what is promised."""
    still = [each for each in sound if not each.mode.fails_over]
    return (
        f"Together: where nothing fails over, {sum(each.stale.total() for each in still):,} of"
        f" {sum(each.reads.total() for each in still):,} reads were stale, under"
        f" {sum(len(each.faults) for each in still):,} faults. Failovers among them, under"
        f" {sum(len(each.faults) for each in sound):,} faults, {sum(each.older for each in sound):,} of"
        f" {sum(each.asking for each in sound):,} reads with an LSN and {sum(each.too_old for each in sound):,} of"
        f" {sum(each.aged for each in sound):,} with an age were older."
    )


def _rows(outcome: Outcome) -> list[list[str]]:
    """Give the sum of a mode, and of the contract each cache."""
    whole = [
        outcome.mode.name,
        f"{outcome.reads.total():,}",
        f"{outcome.cached.total():,}",
        f"{outcome.reads.total() - outcome.cached.total():,}",
        f"{outcome.dropped:,}",
        f"{outcome.commits:,}",
        f"{len(outcome.faults):,}",
        f"{outcome.stale.total():,}" if outcome.mode.fails_over else f"**{outcome.stale.total():,}**",
        f"**{outcome.older:,}** of {outcome.asking:,}",
        f"**{outcome.too_old:,}** of {outcome.aged:,}",
        f"**{outcome.left.total():,}** of {outcome.entries:,}",
    ]
    if outcome.mode != trial.CONTRACT:
        return [whole]
    parts = [
        [
            f"… {cache}",
            f"{outcome.reads[cache]:,}",
            f"{outcome.cached[cache]:,}",
            f"{outcome.reads[cache] - outcome.cached[cache]:,}",
            "",
            "",
            "",
            f"{outcome.stale[cache]:,}",
            "",
            "",
            f"{outcome.left[cache]:,}",
        ]
        for cache in sorted(outcome.reads)
    ]
    return [whole, *parts]


def into_readme(text: str, readme: Path) -> None:
    """Replace what stands between the markers.

    Raises:
        LookupError: there are none.
    """
    after, count = _MARKED.subn(lambda _: text, readme.read_text())
    if not count:
        raise LookupError(f"{readme} has no <!-- consistency --> and <!-- /consistency -->")
    readme.write_text(after)
