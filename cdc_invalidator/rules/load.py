"""Rule files to one `RuleSet`, or to every mistake in them at once.

Text goes in one straight line: YAML nodes, which know their places, and plain values (`document`) → entries of the file
format (`format`) → checks across entries and files (`draft`) → the objects that the rest of the program uses (`model`).

The rule that holds here: whatever a file holds, the result is a ``RuleSet`` or ``errors.WrongRules``. A mistake in one
entry hides none in another, and what only follows from a reported mistake is not reported again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cdc_invalidator.errors import Problem, WrongRules
from cdc_invalidator.rules.document import MAX_BYTES, Document, read, too_large, unusable
from cdc_invalidator.rules.draft import Draft, short_digest
from cdc_invalidator.rules.format import check_format
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.wording import Place

if TYPE_CHECKING:
    from pathlib import Path


def load_rules(path: Path, env: Mapping[str, str], *, conditions: bool = True) -> RuleSet:
    """Read a rule file, or all ``*.yaml`` and ``*.yml`` directly in a directory, hidden ones left out.

    Args:
        path: the file or directory.
        env: the environment of templates.
        conditions: False to leave `when` unchecked, for programs without the CEL library.

    Raises:
        WrongRules: all mistakes of all files; what cannot be read is one at line 1, column 1.
    """
    problems: list[Problem] = []
    return _parse(_sources(path, problems), env, problems, conditions=conditions)


def fingerprint(path: Path) -> str:
    """Return what `RuleSet.fingerprint` is for these files, without reading them as YAML.

    Raises:
        WrongRules: there is no file, or one can't be read.
    """
    problems: list[Problem] = []
    sources = _sources(path, problems)
    if problems:
        raise WrongRules(problems)
    return short_digest(sources)


def _sources(path: Path, problems: list[Problem]) -> list[tuple[str, str]]:
    sources: list[tuple[str, str]] = []
    try:
        for file in _files(path):
            try:
                sources.append((str(file), _text(file)))
            except WrongRules as wrong:
                problems += wrong.problems
    except OSError as error:
        raise unusable(
            Place(str(path)), f"this cannot be read ({error.strerror}); check CDC_RULES and its permissions"
        ) from error
    return sources


def parse_rules(sources: Sequence[tuple[str, str]], env: Mapping[str, str]) -> RuleSet:
    """Make one rule set of files, each given as name and text.

    Raises:
        WrongRules: all mistakes of all files.
    """
    return _parse(sources, env, [])


def _parse(
    sources: Sequence[tuple[str, str]], env: Mapping[str, str], problems: list[Problem], *, conditions: bool = True
) -> RuleSet:
    documents: list[Document] = []
    for name, text in sources:
        try:
            documents.append(read(name, text))
        except WrongRules as wrong:
            problems += wrong.problems
    for document in documents:
        check_format(document)
    draft = Draft(documents, env, every_file=not problems, conditions=conditions)
    problems += [problem for document in documents for problem in document.problems]
    if problems:
        # Through a YAML alias, a mistake is found more than once at the same place.
        raise WrongRules(list(dict.fromkeys(problems)))
    return replace(draft.rule_set(), fingerprint=short_digest(sources))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # A ConfigMap is mounted as links to files in the hidden `..data`, so hidden names are skipped.
    found = sorted(
        file for file in path.iterdir() if file.suffix in {".yaml", ".yml"} and not file.name.startswith(".")
    )
    if not found:
        raise unusable(
            Place(str(path)), "no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
        )
    return found


def _text(file: Path) -> str:
    """Return the text of a file; no more is read than a rule file may have."""
    try:
        if file.exists() and not file.is_file():
            raise unusable(
                Place(str(file)), "this is not a regular file; remove it, or rename it to end in something else"
            )
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise unusable(
            Place(str(file)), f"this file cannot be read ({reason}); check CDC_RULES and its permissions"
        ) from error
    if len(data) > MAX_BYTES:
        raise too_large(str(file))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise unusable(Place(str(file)), f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
