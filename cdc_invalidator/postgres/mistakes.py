"""Finds the rules that a database can't keep, and says what helps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from cdc_invalidator.errors import Problem
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.survey import NOT_TABLES, Leaf, Survey
from cdc_invalidator.rules.condition import asked_columns, condition_of
from cdc_invalidator.rules.model import Rule, RuleSet
from cdc_invalidator.rules.table import Table

# Tables that a sentence names.
NAMED = 5


def mistakes(survey: Survey, rules: RuleSet) -> list[Problem]:
    """Return a problem, with place and remedy, for each rule that this database can't keep."""
    problems: list[Problem] = []
    if survey.exists and not survey.all_ops and survey.bystanders and rules.rules:
        # We would publish all operations, but must not.
        names = ", ".join(str(leaf.table) for leaf in survey.bystanders[:NAMED])
        more = f" and {len(survey.bystanders) - NAMED} more" if len(survey.bystanders) > NAMED else ""
        sentence = (
            f"the publication {survey.publication} covers all tables or a schema, but not all operations; with these, "
            "the application would fail to change rows of tables without replica identity "
            f"({names}{more}); set CDC_PUBLICATION to a name of its own, and the daemon makes a publication of the "
            "rules' tables."
        )
        problems.append(Problem(*rules.rules[0].place, sentence, "operation_not_published"))
    for table, state in survey.tables.items():
        if state is not None:
            of_table = [rule for rule in rules.rules if rule.table == table]
            if state.refused:
                place = of_table[0].place
                sentence = f"{table} can't be published: {state.refused}."
                problems.append(Problem(*place, sentence, "not_publishable"))
            problems += _mistakes(survey.publication, table, state.leaves, of_table)
    return problems


def _mistakes(publication: str, table: Table, leaves: Iterable[Leaf], rules: Sequence[Rule]) -> list[Problem]:
    problems: list[Problem] = []

    def add(rule: Rule, code: str, sentence: str, sql: Sequence[str] = (), or_sql: Sequence[str] = ()) -> None:
        problems.append(Problem(*rule.place, sentence, code, tuple(sql), tuple(or_sql)))

    for leaf in leaves:
        if leaf.kind in NOT_TABLES:
            add(
                rules[0],
                "not_publishable",
                f"{table} is {NOT_TABLES[leaf.kind]}, whose changes PostgreSQL does not publish; name a table.",
            )
            continue
        if leaf.harmful:
            why = "its replica identity contains a virtual generated column; " if leaf.full == "virtual" else ""
            text, *sql = remedies.usable_identity(leaf, publication)
            add(
                rules[0],
                "no_replica_identity",
                f"{leaf.table} has no usable replica identity, and publishing it would make the application's "
                f"UPDATE and DELETE fail; {why}{text}.",
                *sql,
            )
            continue
        if leaf.limited:
            add(
                rules[0],
                "limited_publication",
                f"the publication has a row filter or a column list on {leaf.table}, which hides changes from the "
                "rules; take the table out of the publication, and it is added without them.",
            )
        for rule in rules:
            for column in sorted((rule.key_columns | set(rule.columns)) - (leaf.columns - leaf.generated)):
                add(rule, *_no_column(rule, leaf, column))
            problems += _not_of_conditions(rule, leaf)
            unknown = unknown_old(rule, leaf)
            if unknown and rule.old_row == "require":
                text, *sql = remedies.carrying(leaf, publication, *read_of_old(rules, leaf))
                add(
                    rule,
                    "old_row_unknown",
                    f"rule {rule.name} needs {', '.join(unknown)} of the old row, which the replica identity of "
                    f"{leaf.table} does not carry, so that the entry under a former value would stay; "
                    f"{text}, or set old_row to sweep or ignore.",
                    *sql,
                )
    return problems


def _no_column(rule: Rule, leaf: Leaf, column: str) -> tuple[str, str]:
    """Return the code and the sentence for a column that the stream does not carry."""
    if column in leaf.generated:
        return "generated_column", (
            f"rule {rule.name} reads column {column} of {leaf.table}, a generated column, "
            "which PostgreSQL does not publish; use the columns that it is generated from."
        )
    near = get_close_matches(column, leaf.columns, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(leaf.columns))}."
    return "unknown_column", f"rule {rule.name} reads column {column}, which {leaf.table} does not have; {hint}"


def _not_of_conditions(rule: Rule, leaf: Leaf) -> list[Problem]:
    """Return the problems of the rule's conditions: columns that the stream lacks, values that CEL can't compare."""
    problems = []
    for field, source, place in rule.conditions:
        condition = condition_of(source, field)
        lacking = condition.columns - (leaf.columns - leaf.generated) - rule.key_columns - set(rule.columns)
        found = [_no_column(rule, leaf, column) for column in sorted(lacking)]
        found += [
            ("not_comparable", f"rule {rule.name} on {leaf.table}: {misuse}.")
            for misuse in condition.misuses(leaf.types)
        ]
        problems += [Problem(place.file, place.line, place.column, sentence, code) for code, sentence in found]
    return problems


def read_of_old(rules: Sequence[Rule], leaf: Leaf) -> tuple[frozenset[str], frozenset[str]]:
    """Return the columns that rules on a table read of old rows and that these lack: all, and those for keys only."""
    needed = frozenset(name for rule in rules if rule.old_row != "ignore" for name in unknown_old(rule, leaf))
    return needed.union(*(compared_old(rule, leaf) for rule in rules)), needed


def compared_old(rule: Rule, leaf: Leaf) -> frozenset[str]:
    """Return the columns that a rule compares with the old row, and that an UPDATE or DELETE does not carry."""
    ops = rule.on & {"update", "delete"}
    compared = set(rule.columns) if "update" in ops else set()
    if ops:
        compared |= asked_columns(rule) - (rule.immutable if ops == {"update"} else frozenset())
    if rule.when is not None and ops:
        reads = condition_of(rule.when).reads["old"]
        compared |= leaf.columns if reads.whole else reads.columns
    return (leaf.columns & compared) - leaf.carried


def unknown_old(rule: Rule, leaf: Leaf) -> list[str]:
    """Return the key columns whose old values an UPDATE or DELETE of this table does not carry."""
    unknown: set[str] = set()
    if "delete" in rule.on:
        unknown |= rule.key_columns - leaf.carried
    if "update" in rule.on:
        unknown |= rule.key_columns - leaf.carried - rule.immutable
    return sorted(unknown & leaf.columns)
