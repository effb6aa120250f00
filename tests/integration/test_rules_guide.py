"""The examples of rules/README.md: each is loaded, its tests are run, and nothing of the format is left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from running import command

from cdc_invalidator import errors
from cdc_invalidator.commands import trial
from cdc_invalidator.rules.format import CacheEntry, ChangeEntry, DefaultsEntry, RuleEntry, RuleFile, TestEntry
from cdc_invalidator.rules.load import parse_rules

GUIDE = (Path(__file__).parents[2] / "rules" / "README.md").read_text()
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


class Example(NamedTuple):
    """A fenced block of YAML; ``mistakes``: what the guide says is wrong with it."""

    heading: str
    text: str
    mistakes: str | None


def _examples() -> list[Example]:
    found = []
    for block in _FENCED.finditer(GUIDE):
        heading = re.findall(r"^## (.+)$", GUIDE[: block.start()], re.MULTILINE)
        if block[1] == "yaml":
            found.append(Example(heading[-1], block[2], block[3]))
    return found


EXAMPLES = _examples()
GOOD = [example for example in EXAMPLES if example.mistakes is None]
WRONG = [example for example in EXAMPLES if example.mistakes is not None]


@pytest.mark.parametrize("example", GOOD, ids=[example.heading for example in GOOD])
def test_an_example_of_the_guide_is_a_file_whose_tests_pass(example: Example) -> None:
    found = parse_rules([("rules.yaml", example.text)], {})
    failed = [outcome for outcome in trial.run(found) if not outcome.passed]
    assert not failed, list(trial.Report().lines(failed))
    assert found.tests or example.heading == "A first rule"
    busted = {bust.cache.name for rule in found.rules for bust in rule.busts}
    assert busted == {name for name, cache in found.caches.items() if not cache.ttl_only}


def test_the_expressions_of_the_guide_give_the_same_on_a_real_postgresql(tmp_path: Path) -> None:
    (schema,) = re.findall(r"^```sql\n(CREATE TABLE .*?)^```\n", GUIDE, re.DOTALL | re.MULTILINE)
    (example,) = (each for each in GOOD if each.heading == "Values that SQL makes: via without a table")
    (tmp_path / "schema.sql").write_text(schema)
    (tmp_path / "rules.yaml").write_text(example.text)
    ended = command("test", "--live", str(tmp_path / "schema.sql"), rules=tmp_path / "rules.yaml")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("1 passed, 0 failed\n", "", 0)


@pytest.mark.parametrize("example", WRONG, ids=[example.heading for example in WRONG])
def test_an_example_of_mistakes_is_told_in_these_words(example: Example) -> None:
    with pytest.raises(errors.WrongRules) as wrong:
        parse_rules([("rules.yaml", example.text)], {})
    assert str(wrong.value) + "\n" == example.mistakes


def test_the_guide_has_examples_of_both_kinds() -> None:
    assert len(GOOD) >= 10
    assert len(WRONG) == 1


def test_every_field_of_the_format_is_explained() -> None:
    reference = GUIDE.partition("## All fields")[2]
    for model in (RuleFile, DefaultsEntry, CacheEntry, RuleEntry, TestEntry, ChangeEntry):
        for name in model.model_fields:
            assert f"`{name}`" in reference, f"{name} of {model.__name__}"


def test_the_contents_lead_to_the_headings() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^##+ (.+)$", GUIDE, re.MULTILINE)
    }
    linked = re.findall(r"\]\(#([^)]+)\)", GUIDE)
    assert set(linked) <= headings
    assert len(set(linked)) == len(headings)
    for target in re.findall(r"\]\(((?!#|https:)[^)]+)\)", GUIDE):
        assert (Path(__file__).parents[2] / "rules" / target.partition("#")[0]).exists(), target
