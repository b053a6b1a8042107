"""What the runbook of a first installation writes out: values that the charts take, and that do what it says."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest
import yaml

from tests.helm import rendering
from tests.helm.rendering import NAMESPACE, PROJECT, Document

RUNBOOK = (PROJECT / "docs/runbooks/first-install-on-kubernetes.md").read_text()
BLOCKS = [
    yaml.safe_load(textwrap.dedent(block)) for block in re.findall(r"^ *```yaml\n(.*?)^ *```$", RUNBOOK, re.M | re.S)
]
AIRFLOW = yaml.safe_load((PROJECT / "helm/airflow-values.yaml").read_text())


def _block(key: str) -> Any:
    """The block that has a key."""
    (found,) = (block for block in BLOCKS if isinstance(block, dict) and key in block)
    return found


@pytest.fixture(scope="module")
def on_kind() -> list[Document]:
    """The chart as the runbook installs it on kind."""
    key = {"serving": {"publicKeys": {"release.pub": "PEM"}}}
    values = rendering.merged(rendering.values_of("dev"), rendering.merged(_block("gateway"), key))
    rendering.chart().validate_schema(values)
    return rendering.render(values, name="perch")


def test_runbook__its_values_for_kind__make_a_gateway_that_the_route_attaches_to(on_kind: list[Document]) -> None:
    gateway = rendering.find(on_kind, "Gateway")
    (parent,) = rendering.find(on_kind, "HTTPRoute")["spec"]["parentRefs"]
    (listener,) = gateway["spec"]["listeners"]
    assert (parent["name"], parent["sectionName"]) == (gateway["metadata"]["name"], listener["name"])
    assert f"owning-gateway-name={gateway['metadata']['name']}\n" in RUNBOOK.replace(")", "\n")
    assert f"GatewayClass\n   metadata: {{name: {gateway['spec']['gatewayClassName']}}}" in RUNBOOK


def test_runbook__its_values_for_kind__let_airflow_run_steps_and_move_releases(on_kind: list[Document]) -> None:
    roles = {role["metadata"]["name"] for role in rendering.of_kind(on_kind, "RoleBinding")}
    assert roles == {"perch-engine", "perch-launcher"}
    settings = rendering.find(on_kind, "ConfigMap", "perch-settings")["data"]
    assert {"PERCH_S3_ENDPOINT_URL", "PERCH_PROMETHEUS_URL", "PERCH_RUNS_URL"} <= set(settings)
    assert rendering.of_kind(on_kind, "ServiceMonitor")


def test_runbook__its_installation__is_in_the_namespace_that_airflows_values_name() -> None:
    variables = {known["name"]: known["value"] for known in AIRFLOW["env"]}
    named = set(re.findall(r"helm install perch helm/perch --namespace (\S+)", RUNBOOK))
    assert named == {variables["PERCH_KUBERNETES_NAMESPACE"]} == {NAMESPACE}
    for name in [*variables["PERCH_POD_SECRETS"].split(), variables["PERCH_POD_SIGNING_SECRET"]]:
        assert f"| `{name}` |" in RUNBOOK


def test_runbook__airflows_logs_in_the_store__are_options_that_it_has() -> None:
    from airflow.configuration import conf

    values = _block("logs")
    for option in values["config"]["logging"]:
        assert option in conf.configuration_description["logging"]["options"]
    assert AIRFLOW["logs"]["persistence"]["enabled"]
    ((connection,),) = (block for block in BLOCKS if isinstance(block, list))
    assert connection["name"] == f"AIRFLOW_CONN_{values['config']['logging']['remote_log_conn_id'].upper()}"


def test_runbook__gkes_health_check__asks_a_service_of_the_chart_at_its_port() -> None:
    policy = next(block for block in BLOCKS if isinstance(block, dict) and block.get("kind") == "HealthCheckPolicy")
    found = rendering.render(rendering.values_of("default"), name="perch")
    service = rendering.find(found, "Service", policy["spec"]["targetRef"]["name"])
    check = policy["spec"]["default"]["config"]["httpHealthCheck"]
    assert check["port"] in {port["port"] for port in service["spec"]["ports"]}
    deployment = rendering.find(found, "Deployment", service["metadata"]["name"])
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert check["requestPath"] == container["readinessProbe"]["httpGet"]["path"]
