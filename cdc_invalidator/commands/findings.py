"""Findings of `check`: their order, and how they are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cdc_invalidator.errors import Problem
from cdc_invalidator.rules.wording import Place

WIDTH = 100


# A longer place has a line of its own, so that the sentences stay readable.
_PLACE_WIDTH = 34


class Severity(StrEnum):
    """How bad a finding is. Errors make `check` fail."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying.

    ``code``: what pipelines know it by; ``place``: where in a rule file, or which server; ``sentence``: what is found,
    with the remedy at its end; ``sql``: the statements of the remedy, ``or_sql``: those of another one that does as
    well, as the sentence has them.
    """

    severity: Severity
    code: str
    place: Place | str
    sentence: str
    sql: tuple[str, ...] = ()
    or_sql: tuple[str, ...] = ()

    @classmethod
    def of(cls, problem: Problem) -> Finding:
        """Make one of a mistake that `run` refuses as well."""
        place = Place(problem.file, problem.line, problem.column)
        return cls(Severity.ERROR, problem.code, place, problem.sentence, problem.sql, problem.or_sql)

    def fields(self) -> dict[str, Any]:
        """Return plain values, for JSON; ``file``, ``line`` and ``column`` are ``None`` where the place is a server."""
        file, line, column = self.place if isinstance(self.place, Place) else (None, None, None)
        return {
            "severity": str(self.severity),
            "code": self.code,
            "place": str(self.place),
            "file": file,
            "line": line,
            "column": column,
            "sentence": self.sentence,
            "sql": list(self.sql),
            "or_sql": list(self.or_sql),
        }


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings sorted, the worst first, without duplicates."""
    worst = list(Severity)
    return sorted(
        dict.fromkeys(findings),
        key=lambda found: (
            worst.index(found.severity),
            isinstance(found.place, Place),
            found.place if isinstance(found.place, Place) else Place(found.place),
            found.code,
            found.sentence,
        ),
    )


def count(findings: Iterable[Finding], severity: Severity) -> int:
    """Return how many findings have a severity."""
    return sum(found.severity is severity for found in findings)


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the report as plain values, for JSON."""
    return {
        "findings": [found.fields() for found in findings],
        "errors": count(findings, Severity.ERROR),
        "warnings": count(findings, Severity.WARNING),
    }


def table(findings: Sequence[Finding], width: int = WIDTH) -> str:
    """Return the report as text: a line for each finding, then the counts."""
    if not findings:
        return "nothing found"
    at = min(_PLACE_WIDTH, max(len(str(found.place)) for found in findings))
    margin = max(map(len, Severity)) + 2 + at + 2
    lines = []
    for found in findings:
        place = str(found.place)
        head = f"{found.severity:<{max(map(len, Severity))}}  {place:<{at}}  "
        if len(place) > at:
            lines.append(head.rstrip())
            head = " " * margin
        lines += textwrap.wrap(
            found.sentence,
            width,
            initial_indent=head,
            subsequent_indent=" " * margin,
            break_long_words=False,
            break_on_hyphens=False,
        )
    counts = [
        f"{number} {severity}{'' if number == 1 else 's'}"
        for severity in Severity
        if (number := count(findings, severity))
    ]
    return "\n".join([*lines, "", ", ".join(counts)])
