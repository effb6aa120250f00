"""The dashboard as a file: what Grafana would trip over, and that it is what generate.py makes. Never rendered here."""

from __future__ import annotations

import json
import re
import runpy
from itertools import combinations
from typing import Any

import pytest
from prometheus import MONITORING

DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
FILES: dict[str, Any] = runpy.run_path(str(MONITORING / "generate.py"))["FILES"]
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SHOWING = [panel for panel in PANELS if panel["type"] not in {"row", "text"}]


@pytest.mark.parametrize("name", FILES)
def test_what_is_derived_is_up_to_date(name: str) -> None:
    assert (MONITORING / name).read_text() == FILES[name](), "run python deploy/monitoring/generate.py"


def test_panels_have_ids_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["w"] > 0
        assert place["h"] > 0
        assert place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_rows_and_panels_are_in_reading_order() -> None:
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in PANELS]
    assert places == sorted(places)
    assert PANELS[0]["title"] == "Traffic shift or busting bug?"


def test_panels_have_titles_units_and_queries_of_their_own() -> None:
    titles = [panel["title"] for panel in SHOWING]
    assert len(set(titles)) == len(titles)
    for panel in SHOWING:
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in references


def test_no_data_source_is_named_by_its_id() -> None:
    sources = re.findall(r'"uid": "([^"]*)"', (MONITORING / "dashboard.json").read_text())
    assert set(sources) == {"${datasource}", "cdc-invalidator"}
    assert sources.count("cdc-invalidator") == 1
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in SHOWING for target in panel["targets"])


def test_each_variable_that_is_used_is_there_and_each_that_is_there_is_used() -> None:
    there = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps([PANELS, DASHBOARD["templating"]])))
    assert used == there
