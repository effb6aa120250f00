"""Rule files: YAML to one checked set of caches and rules, or every mistake in them at once.

Text goes down in one straight line: YAML nodes, which know their places (`document`) → plain values → the models of the
file format (`rulefile`) → checks across entries and files → the runtime objects that the rest of the program uses.

The rule that holds here: whatever a file holds, the result is a ``RuleSet`` or ``errors.WrongRules``. A mistake in one
entry hides none in another, and what follows only from a mistake that is already told is not told again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cdc_invalidator.errors import Problem, WrongRules
from cdc_invalidator.rules.document import MAX_BYTES, Document, Place, read, too_large, unusable
from cdc_invalidator.rules.draft import _digest, _Draft
from cdc_invalidator.rules.format import check_format
from cdc_invalidator.rules.model import RuleSet

if TYPE_CHECKING:
    from pathlib import Path


# ── What the rest of the program uses ────────────────────────────────────────────────────────────────────────────────


def load_rules(path: Path, env: Mapping[str, str], *, conditions: bool = True) -> RuleSet:
    """Read a rule file, or all ``*.yaml`` and ``*.yml`` directly in a directory, hidden ones left out.

    Args:
        path: the file or directory.
        env: the environment of templates.
        conditions: False for who has no use for `when`, and perhaps no CEL: what it says is not looked at.

    Raises:
        WrongRules: all mistakes of all files; what cannot be read is one at line 1, column 1.
    """
    problems: list[Problem] = []
    return _parse(_sources(path, problems), env, problems, conditions=conditions)


def fingerprint(path: Path) -> str:
    """Tell, without reading them as YAML, whether these files are those of a rule set: by their names and texts.

    Raises:
        WrongRules: there is no file, or one can't be read.
    """
    problems: list[Problem] = []
    sources = _sources(path, problems)
    if problems:
        raise WrongRules(problems)
    return _digest(sources)


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
    """Make one rule set of pairs of file name and text.

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
    draft = _Draft(documents, env, every_file=not problems, conditions=conditions)
    problems += [problem for document in documents for problem in document.problems]
    if problems:
        # An alias brings the same mistake from the same place more than once.
        raise WrongRules(list(dict.fromkeys(problems)))
    return replace(draft.rule_set(), fingerprint=_digest(sources))


# ── Files to text ────────────────────────────────────────────────────────────────────────────────────────────────────


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # A ConfigMap's mount is links to files in `..data`, itself a link: hidden names are not looked into.
    found = sorted(
        file for file in path.iterdir() if file.suffix in {".yaml", ".yml"} and not file.name.startswith(".")
    )
    if not found:
        raise unusable(
            Place(str(path)), "no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
        )
    return found


def _text(file: Path) -> str:
    """The text of a file, of which no more is read than may be."""
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


# ── Checks across entries and files, and the runtime objects ─────────────────────────────────────────────────────────
