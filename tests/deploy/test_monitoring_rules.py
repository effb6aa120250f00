"""The alert rules, by themselves: what promtool says, and that rules, runbook and the operator's form are in step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import MONITORING, promtool

README = Path(__file__).parents[2] / "deploy" / "README.md"
GROUPS = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
ALERTS: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
BY = {"cluster", "namespace", "job", "slot"}


def test_promtool_has_nothing_against_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


@pytest.mark.parametrize("alert", [alert["alert"] for alert in ALERTS])
def test_each_alert_has_unit_tests_and_a_runbook(alert: str) -> None:
    assert re.search(rf"\b{alert}\b", (MONITORING / "rules_test.yml").read_text())
    section = README.read_text().partition(f"\n### {alert}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    assert len(section.split()) > 30, f"deploy/README.md has no section on {alert}, or hardly one"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_whoever_is_woken_needs(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"deploy/README.md#{rule['alert'].lower()}"
    # A label that an expression does not keep is shown as nothing.
    kept = [set(by.split(", ")) for by in re.findall(r"by \(([\w, ]+)\)", rule["expr"])]
    assert set(re.findall(r"\$labels\.(\w+)", f"{notes}")) <= set.intersection(*kept or [BY])


def test_nothing_is_brought_together_without_regard_to_whose_it_is() -> None:
    for by in re.findall(r"by \(([\w, ]+)\)", (MONITORING / "rules.yml").read_text()):
        assert set(by.split(", ")) >= BY


def test_the_operator_s_form_has_the_same_rules() -> None:
    resource = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    assert resource["kind"] == "PrometheusRule"
    assert resource["spec"] == {"groups": GROUPS}
