"""The JSON Schema (2020-12) of rule files, for editors: made of the models of `format`, its only source."""

from __future__ import annotations

from typing import Any

from cdc_invalidator.rules.format import RuleFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TITLE = "Rule file of cdc-invalidator"

_NULL = {"type": "null"}


def schema() -> dict[str, Any]:
    """Return the schema; an editor shows its descriptions beside the fields."""
    made = RuleFile.model_json_schema()
    definitions = {name: _model(model) for name, model in made.pop("$defs").items()}
    return {"$schema": DIALECT, **_model(made), "title": TITLE, "$defs": definitions}


def _model(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "properties": {name: _field(field) for name, field in model["properties"].items()}}


def _field(field: dict[str, Any]) -> dict[str, Any]:
    """Say what the file format says: a field may be absent and not null, and names that don't fit are mistakes."""
    field = {name: value for name, value in field.items() if name != "title"}
    if _NULL in field.get("anyOf", ()):
        (given,) = (option for option in field.pop("anyOf") if option != _NULL)
        field.pop("default", None)
        field |= given
    if "patternProperties" in field:
        field["additionalProperties"] = False
    return field
