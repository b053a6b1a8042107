"""The dashboard and the alert rules name only what the service shows, and lead to a page that says what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import OTHER_ROUTE, ROUTES, ServiceMetrics

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "helm/perch/files"
RULES = FOLDER / "serving-alerts.yaml"
DASHBOARD = FOLDER / "serving-dashboard.json"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
BOARD = json.loads(DASHBOARD.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

# What a cluster's kube-state-metrics shows of the chart's objects.
OF_KUBE_STATE_METRICS = {
    "kube_deployment_status_replicas_available": {"namespace": {"vision"}, "deployment": {"perch-watchdog"}}
}
# Labels that Prometheus adds when it scrapes.
OF_THE_TARGET = {"namespace", "instance", "job"}
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool"}

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def _shown() -> dict[str, dict[str, set[str]]]:
    """Every series that the service shows: its name, its labels, and their values."""
    metrics = ServiceMetrics("digits", "3", "ab" * 32, ["0"])
    metrics.observe_request("/v1/predict", 200, 0.004)
    metrics.observe_request("/v1/predict", 200, 0.004, is_probe=True)
    shown: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = shown.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return shown | OF_KUBE_STATE_METRICS


def _expressions() -> dict[str, str]:
    found = {
        rule.get("alert") or rule["record"]: " ".join(rule["expr"].split())
        for group in GROUPS
        for rule in group["rules"]
    }
    for panel in PANELS:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = re.sub(r"label_values\((.*), \w+\)", r"\1", variable["definition"])
    return found


EXPRESSIONS = _expressions()
each_expression = pytest.mark.parametrize("where", EXPRESSIONS)


def _selectors(expression: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each metric an expression names, with its matchers (label, operator, value)."""
    found = re.findall(r"\b([a-z_:][\w:]*)(?![\w:]|\s*\()(?:\{([^}]*)\})?", _without_grouping(expression))
    return [
        (name, re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers))
        for name, matchers in found
        if name not in WORDS
    ]


def _without_grouping(expression: str) -> str:
    """The expression without `by (…)` and its like, ranges and functions' numbers; what names are left are metrics."""
    expression = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expression)
    return re.sub(r"\[[^\]]*\]", " ", expression)


def _promtool() -> str:
    path = shutil.which("promtool")
    assert path, "promtool is missing: scripts/debian-packages.sh installs it (Debian's package prometheus)"
    return path


@each_expression
def test_expression__every_metric_and_label_it_names__is_shown(where: str) -> None:
    shown = _shown()
    selectors = _selectors(EXPRESSIONS[where])
    assert selectors
    for name, matchers in selectors:
        assert name in shown or name in RECORDED, name
        for label, _, _ in matchers:
            assert label in shown[name] or label in OF_THE_TARGET, f"{name}{{{label}}}"


@each_expression
def test_expression__every_value_it_asks_for__can_occur(where: str) -> None:
    """A rule about `code="5XX"` or a renamed problem type would never fire."""
    possible = {
        "route": {*ROUTES, OTHER_ROUTE},
        "code": {"200", "408", "429", "500", "503"},
        "type": _shown()["perch_problems_total"]["type"],
        "le": {value for labels in _shown().values() for value in labels.get("le", ())},
    }
    for name, matchers in _selectors(EXPRESSIONS[where]):
        for label, operator, value in matchers:
            if label not in possible:
                continue
            alternatives = value.split("|") if operator == "=~" else [value]
            for alternative in alternatives:
                assert any(re.fullmatch(alternative, known) for known in possible[label]), (
                    f'{name}{{{label}="{value}"}}'
                )


@each_expression
def test_expression__labels_it_groups_by__are_those_of_its_metrics(where: str) -> None:
    shown = _shown()
    grouped = re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", EXPRESSIONS[where])
    names = {label.strip() for group in grouped for label in group.split(",")} - {""}
    labels = {"label", "model"} | OF_THE_TARGET  # of what is recorded
    for name, _ in _selectors(EXPRESSIONS[where]):
        labels |= set(shown.get(name, ()))
    assert names <= labels


@each_alert
def test_alert__whoever_is_woken__is_told_what_where_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert re.search(r"\{\{ \$labels\.(model|namespace) \}\}", annotations["summary"])
    path, _, anchor = annotations["runbook_url"].partition("#")
    headings = re.findall(r"^### (\w+)$", (PROJECT / path).read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}


def test_runbook__its_alerts__are_those_of_the_rules_in_their_order() -> None:
    headings = re.findall(r"^### (Perch\w+)$", (PROJECT / "docs/runbooks/on-call.md").read_text(), re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]


def test_rules__each_alert__is_seen_to_fire_in_the_rules_tests() -> None:
    tested = {
        check["alertname"]
        for file in FOLDER.glob("*.test.yaml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for check in test.get("alert_rule_test", ())
        if check["exp_alerts"]
    }
    assert tested == {alert["alert"] for alert in ALERTS}


def test_rules__to_promtool__are_valid() -> None:
    done = subprocess.run([_promtool(), "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.test.yaml")))
def test_rules__their_own_tests__pass(name: str) -> None:
    done = subprocess.run([_promtool(), "test", "rules", FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_panel
def test_panel__its_reader__finds_a_title_a_sentence_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        for name, matchers in _selectors(target["expr"]):
            chosen = {label for label, _, value in matchers if value.startswith("$")}
            assert chosen == {"namespace", "model"}, f"{name} ignores what is chosen above the dashboard"


def test_dashboard__its_panels__do_not_overlap_and_have_numbers_of_their_own() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_dashboard__every_metric_of_the_service__is_on_it_or_in_an_alert() -> None:
    """What nobody looks at need not be measured."""
    used = {name for expression in EXPRESSIONS.values() for name, _ in _selectors(expression)}
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(ServiceMetrics("digits", "3", "", ["0"]).render().decode())
    }
    unused = {name for name in families if not any(one.startswith(name) for one in used)}
    assert unused == set()
