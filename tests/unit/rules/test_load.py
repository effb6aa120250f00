"""Files and directories of rules, and whatever they hold."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rule_texts import GOOD, NO_SUCH_FILE, parse

from cdc_invalidator.errors import WrongRules
from cdc_invalidator.rules import format as rulefile
from cdc_invalidator.rules.load import load_rules, parse_rules

if TYPE_CHECKING:
    from pathlib import Path

# ── Files and directories ────────────────────────────────────────────────────────────────────────────────────────────


def load_mistakes(path: Path) -> list[str]:
    with pytest.raises(WrongRules) as caught:
        load_rules(path, {})
    return str(caught.value).splitlines()


def test_a_file_is_loaded_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text(GOOD)
    rule_set = load_rules(tmp_path / "rules.txt", {})
    assert rule_set.rules[0].place.file == str(tmp_path / "rules.txt")
    assert rule_set == parse_rules([(str(tmp_path / "rules.txt"), GOOD)], {})


def test_a_directory_is_loaded_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    caches, rest = GOOD.split("rules:\n")
    (tmp_path / "b.yml").write_text(caches)
    (tmp_path / "a.yaml").write_text("version: 1\nrules:\n" + rest)
    for name in (".hidden.yaml", "..data.yaml", "notes.txt", "old.yaml.bak"):
        (tmp_path / name).write_text("not a rule file")
    (tmp_path / "deeper").mkdir()
    assert len(load_rules(tmp_path, {}).rules) == 2


def test_a_configmap_mount_is_loaded_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "..2024").mkdir()
    (tmp_path / "..2024" / "shop.yaml").write_text(GOOD)
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "shop.yaml").symlink_to("..data/shop.yaml")
    assert load_rules(tmp_path, {}).rules[0].place.file == str(tmp_path / "shop.yaml")


def test_a_path_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    assert load_mistakes(tmp_path / "none") == [f"{tmp_path}/none:1:1: {NO_SUCH_FILE}"]


def test_an_empty_directory_is_a_mistake(tmp_path: Path) -> None:
    assert load_mistakes(tmp_path) == [
        f"{tmp_path}:1:1: no rule file is in this directory; put a `*.yaml` there, or set CDC_RULES to another"
    ]


def test_files_that_cannot_be_read_are_told_beside_the_mistakes_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 2")
    (tmp_path / "b.yaml").symlink_to("nowhere")
    (tmp_path / "c.yaml").write_bytes(b"version: 1 # \xff")
    (tmp_path / "d.yaml").mkdir()
    os.mkfifo(tmp_path / "e.yaml")
    (tmp_path / "f.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    not_a_file = "this is not a regular file; remove it, or rename it to end in something else"
    assert [line.removeprefix(f"{tmp_path}/") for line in load_mistakes(tmp_path)] == [
        "a.yaml:1:10: the format `2` is not known; write `version: 1`, without quotes",
        f"b.yaml:1:1: {NO_SUCH_FILE}",
        "c.yaml:1:1: byte 13 is not UTF-8; save the file as UTF-8",
        f"d.yaml:1:1: {not_a_file}",
        f"e.yaml:1:1: {not_a_file}",
        "f.yaml:1:1: the file is larger than 1 MiB; split it",
    ]


# ── Whatever a file holds ────────────────────────────────────────────────────────────────────────────────────────────

SNIPPETS = [
    *"{}[]:,-&*!|>'\"%@`#? \n\t~<$.0",
    "&a",
    "*a",
    "<<: ",
    "---\n",
    "null",
    "true",
    "1",
    "- ",
    "\x00",
    "é",
    "\x85",
]
WORDS = [*GOOD.split(), "\n", "\n  ", "\n    ", "{id}", "[]", "{}", ""]


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SNIPPETS + WORDS)), max_size=6)
)
@example([(0, 0, "&a ")])
def test_a_damaged_file_is_wrong_rules_or_still_right(edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for at, length, inserted in edits:
        text = text[:at] + inserted + text[at + length :]
    assert_told(text)


@given(st.text(max_size=40))
def test_any_text_is_wrong_rules_or_right(text: str) -> None:
    assert_told(text)
    assert_told("version: 1\ncaches: {a: {key: " + text + "}}")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "on", "", "a:{id}", "5m", "x.y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "user", "key", "bust"]), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*rulefile.CacheEntry.model_fields, "x"]), VALUES),
    st.dictionaries(st.sampled_from([*rulefile.RuleEntry.model_fields, "when"]), VALUES),
    st.dictionaries(st.sampled_from([*rulefile.DefaultsEntry.model_fields, "x"]), VALUES),
)
def test_any_value_in_any_field_is_wrong_rules_or_right(
    cache: dict[str, object], rule: dict[str, object], defaults: dict[str, object]
) -> None:
    assert_told(json.dumps({"version": 1, "defaults": defaults, "caches": {"user": cache}, "rules": [rule]}))


def assert_told(text: str) -> None:
    """The text is right, or each of its mistakes stands on one line with a place and words of our own."""
    told = []
    try:
        parse(text)
    except WrongRules as wrong:
        told = [str(problem) for problem in wrong.problems] or [""]
    assert all("\n" not in line and re.match(r"a\.yaml:[1-9]\d*:[1-9]\d*: ", line) for line in told)
    assert not any("is wrong; look at the documentation" in line for line in told)
