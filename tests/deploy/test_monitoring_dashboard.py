"""The dashboard as a file: what Grafana would trip over, and that it is what generate.py makes. Never rendered here."""

from __future__ import annotations

import json
import re
import runpy
from itertools import combinations
from typing import Any

import pytest
import yaml
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


def test_it_begins_with_whether_it_is_well_and_ends_with_text() -> None:
    rows = [at for at, panel in enumerate(PANELS) if panel["type"] == "row"]
    assert PANELS[0]["title"] == "Is it well?"
    assert [panel["type"] for panel in PANELS[1 : rows[1]]] == ["stat"] * (rows[1] - 2) + ["table"]
    assert [panel["type"] for panel in PANELS].index("text") == len(PANELS) - 1


ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


@pytest.mark.parametrize(
    ("title", "alert", "limit"),
    [
        ("Caches are at most so old", "CdcInvalidatorWatermarkOld", 60),
        ("Caches with an open gap", "CdcInvalidatorGapOpen", 1),
        ("Caches that Redis denies", "CdcInvalidatorCacheDenied", 1),
        ("Commit to bust, p99 now", "CdcInvalidatorSlowBusts", 5),
        ("No bust got through for", "CdcInvalidatorBlocked", 15),
        ("Watermark age", "CdcInvalidatorWatermarkOld", 60),
        ("Traffic shift or busting bug?", "CdcInvalidatorHitRateFellWithBusts", 2),
    ],
)
def test_a_figure_gets_its_colour_where_its_alert_begins(title: str, alert: str, limit: float) -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == title)
    color = {"critical": "red", "warning": "orange"}[ALERTS[alert]["labels"]["severity"]]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"] == [
        {"color": "green", "value": None},
        {"color": color, "value": limit},
    ]
    # As the rule has it; what counts things is above 0 from 1 on.
    assert re.search(rf"(> {'0' if alert == 'CdcInvalidatorGapOpen' else limit}|== {limit})\b", ALERTS[alert]["expr"])


def test_the_table_of_alerts_says_of_each_what_is_wrong_and_what_to_do() -> None:
    (panel,) = (panel for panel in PANELS if panel["title"].startswith("What is wrong"))
    for column in ("what", "do"):
        (told,) = (
            {name: option["text"] for name, option in each["value"][0]["options"].items()}
            for override in panel["fieldConfig"]["overrides"]
            if override["matcher"]["options"] == column
            for each in override["properties"]
            if each["id"] == "mappings"
        )
        assert told.keys() == ALERTS.keys()
        for name, text in told.items():
            assert 20 < len(text) < 300, name
            assert re.fullmatch(r"[A-Z][^{}`\[\]]*[.)]", text), (name, text)


def test_panels_have_titles_units_and_queries_of_their_own() -> None:
    titles = [panel["title"] for panel in SHOWING]
    assert len(set(titles)) == len(titles)
    for panel in SHOWING:
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["id"] == "byFrameRefID":
                assert override["matcher"]["options"] in references


def test_no_data_source_is_named_by_its_id() -> None:
    sources = re.findall(r'"uid": "([^"]*)"', (MONITORING / "dashboard.json").read_text())
    assert set(sources) == {"${datasource}", "cdc-invalidator"}
    assert sources.count("cdc-invalidator") == 1
    drawn = [target for panel in SHOWING for target in panel["targets"]] + DASHBOARD["annotations"]["list"]
    assert all(each["datasource"]["uid"] == "${datasource}" for each in drawn)


def test_each_variable_that_is_used_is_there_and_each_that_is_there_is_used() -> None:
    there = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps([PANELS, DASHBOARD["templating"]])))
    assert used == there
