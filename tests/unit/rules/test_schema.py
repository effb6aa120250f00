"""The JSON Schema of rule files: valid, and of one mind with the loader."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml
from example import DESIGN
from paths import ROOT

from cdc_invalidator.rules.format import RuleFile
from cdc_invalidator.rules.schema import schema

SHOP = ROOT / "rules" / "shop.yaml"
VALIDATOR = jsonschema.Draft202012Validator(schema())


def plain(text: str) -> Any:
    """A file's values; PyYAML's own loader takes ``on`` for true."""
    return json.loads(json.dumps(yaml.safe_load(text.replace(" on:", ' "on":'))))


def test_the_schema_is_valid_and_can_be_printed() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "$id" not in schema()
    assert json.loads(json.dumps(schema())) == schema()


def test_the_file_that_rule_files_point_to_is_in_step() -> None:
    """After a change of the format: ``cdc-invalidator schema > rules/schema.json``."""
    assert json.loads((SHOP.parent / "schema.json").read_text()) == schema()


@pytest.mark.parametrize("text", [SHOP.read_text(), DESIGN, "version: 1"])
def test_it_accepts_files_that_are_right(text: str) -> None:
    VALIDATOR.validate(plain(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 2"),
        ("version: 1", "versions: 1"),
        ("caches:", "cashes:"),
        ("user: {key:", "user: {kee:"),
        ("user: {key:", "us er: {key:"),
        ("user: {key:", "user: {ttl: 5, key:"),
        ("user: {key:", "user: {ttl: null, key:"),
        ("user: {key:", "user: {bump_over: 0, key:"),
        ("    columns:", "    colums:"),
        ("columns: [name, email, plan]", "columns: []"),
        ("columns: [name, email, plan]", "old_row: maybe"),
        ("      - user\n", "      - {user: {}, dashboard: {}}\n"),
        ("change: {table", "change: {tabel: x, table"),
        ("op: update", "op: upsert"),
        ("{id: 42, name: Ada}", "{id: [42]}"),
        ("busts:", "bust:"),
    ],
)
def test_it_refuses_what_the_loader_refuses(old: str, new: str) -> None:
    assert old in DESIGN
    assert not VALIDATOR.is_valid(plain(DESIGN.replace(old, new, 1)))


def test_each_field_of_the_models_is_in_it_with_words_for_an_editor() -> None:
    made = schema()
    models = [made, *made["$defs"].values()]
    assert {model["title"] for model in models} == {
        *("Rule file of cdc-invalidator", "DefaultsEntry", "CacheEntry", "RuleEntry", "TestEntry", "ChangeEntry")
    }
    assert set(made["properties"]) == set(RuleFile.model_fields)
    assert all(model["additionalProperties"] is False and model["description"] for model in models)
    assert all(field["description"] for model in models for field in model["properties"].values())
