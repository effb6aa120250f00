"""The `tests:` of rule files: compares what a change should bust with what it busts. Pure.

The busts come from `simulate`, or from a daemon on real servers (`rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cdc_invalidator.commands.simulate import Change, Unanswered, Verdict, simulate
from cdc_invalidator.rules.model import RuleSet, Test


@dataclass(frozen=True, slots=True)
class TestResult:
    """The result of a test; it failed if a bust is missing or unexpected, or because of ``faults``.

    ``remarks`` help to see why it failed.
    """

    test: Test
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the busts are those that the test names, and are all known."""
        return not (self.missing or self.unexpected or self.faults)


def run(rules: RuleSet) -> Iterator[TestResult]:
    """Run all tests of a rule set, in their order."""
    for test in rules.tests:
        change = Change(test.table, test.op, test.old, test.new, test.types)
        verdicts = simulate(rules, change, test.via)
        busts = [str(bust) for verdict in verdicts for bust in verdict.busts]
        faults = [_fault(lack) for verdict in verdicts for lack in verdict.unanswered]
        faults += [_unasked(test, cache) for cache in test.via if not _asks(rules, test, cache)]
        yield compare(test, busts, faults, [remark for verdict in verdicts for remark in _remarks(verdict)])


def compare(test: Test, busts: Iterable[str], faults: Iterable[str] = (), remarks: Iterable[str] = ()) -> TestResult:
    """Compare busts, as a test writes them, with those that the test names."""
    found = dict.fromkeys(busts)
    wanted = dict.fromkeys(test.busts)
    missing = tuple(bust for bust in wanted if bust not in found)
    unexpected = tuple(bust for bust in found if bust not in wanted)
    return TestResult(test, missing, unexpected, tuple(dict.fromkeys(faults)), tuple(remarks))


@dataclass(slots=True)
class Report:
    """Counts results and renders them."""

    passed: int = 0
    failed: int = 0

    def lines(self, results: Iterable[TestResult]) -> Iterator[str]:
        """Yield a line for each failure as it comes, and then the totals."""
        for result in results:
            self.passed += result.passed
            self.failed += not result.passed
            if not result.passed:
                yield from _failure(result)
        yield f"{self.passed} passed, {self.failed} failed"


def _failure(result: TestResult) -> Iterator[str]:
    place = result.test.place
    yield f"{place.file}:{place.line}: {result.test.name}"
    yield from (f"  ! {fault}" for fault in result.faults)
    yield from (f"  - {bust}" for bust in result.missing)
    yield from (f"  + {bust}" for bust in result.unexpected)
    yield from (f"    {remark}" for remark in result.remarks)


def _remarks(verdict: Verdict) -> Iterator[str]:
    name = verdict.rule.name
    yield from (f"rule {name} does not fire: {reason}" for reason in verdict.why_not)
    yield from (f"rule {name}: {note}" for note in verdict.notes)


def _fault(lack: Unanswered) -> str:
    if lack.lacks:
        return f"a row of `via` for cache {lack.cache} lacks {', '.join(lack.lacks)}; add it"
    return f"cache {lack.cache} is busted by a query whose rows the test does not give; add them under `via`"


def _asks(rules: RuleSet, test: Test, cache: str) -> bool:
    busts = [bust for rule in rules.rules if rule.table == test.table for bust in rule.busts]
    return any(bust.query is not None and bust.cache.name == cache for bust in busts)


def _unasked(test: Test, cache: str) -> str:
    return f"no rule of {test.table} has a query for cache {cache}; remove it from `via`"
