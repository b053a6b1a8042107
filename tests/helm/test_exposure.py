"""The way in: route, gateway and certificate; and what Prometheus and Grafana are given."""

from __future__ import annotations

import json

import pytest
import yaml

from pipelines.release.kubernetes_route import RouteRecord, is_taken, read_record, route_document, route_name
from pipelines.release.local_plan import Plan
from tests.helm import rendering
from tests.helm.rendering import CHART, ENVIRONMENTS, RELEASE, SERVERS, Document

each_environment = pytest.mark.parametrize("environment", [*ENVIRONMENTS, "everything"])


def route(environment: str) -> Document:
    return rendering.find(rendering.documents(environment), "HTTPRoute", f"{RELEASE}-serving")


@each_environment
def test_route__as_installed__is_one_that_the_engine_takes_over(environment: str) -> None:
    document = route(environment)
    assert document["metadata"]["name"] == route_name(RELEASE)
    assert read_record(document).plan == Plan()
    # Word for word what the engine would write: its first look finds no rule edited.
    given_back = {"namespace": rendering.NAMESPACE, "resourceVersion": "1", **document["metadata"]}
    own = route_document(RELEASE, RouteRecord(), {**document, "metadata": given_back}, ())
    assert document["spec"]["rules"] == own["spec"]["rules"]
    assert not is_taken(document, 1)


@each_environment
def test_route__before_any_release__leads_to_a_service_that_never_has_pods(environment: str) -> None:
    """A gateway answers 503 for it, as the service's contract has it; a rule without a backend would be a 500."""
    found = rendering.documents(environment)
    (backend,) = route(environment)["spec"]["rules"][0]["backendRefs"]
    service = rendering.find(found, "Service", backend["name"])
    assert "selector" not in service["spec"]
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    assert not rendering.of_kind(found, "Endpoints", "EndpointSlice")


@each_environment
def test_route__is_made_once__and_never_taken_back(environment: str) -> None:
    """A hook is no part of the release's manifest: upgrades, rollbacks and removals leave it.

    An upgrade makes it after an installation that failed; that none is made beside a release, tests/cluster has.
    """
    annotations = route(environment)["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "post-install,post-upgrade"
    assert annotations["helm.sh/resource-policy"] == "keep"
    # Where each sync renders it without looking what is there, nothing makes it but a person.
    assert annotations["argocd.argoproj.io/hook"] == "Skip"


def test_route__not_wanted__is_not_made() -> None:
    found = rendering.render(rendering.values_of("default", route={"create": False}))
    assert not rendering.of_kind(found, "HTTPRoute")


@pytest.mark.parametrize("environment", ["staging", "production", "everything"])
def test_gateway__with_a_certificate__leads_clients_to_https_alone(environment: str) -> None:
    found = rendering.documents(environment)
    gateway, certificate = rendering.find(found, "Gateway"), rendering.find(found, "Certificate")
    listeners = {known["name"]: known for known in gateway["spec"]["listeners"]}
    assert {name: (known["protocol"], known["port"]) for name, known in listeners.items()} == {
        "http": ("HTTP", 80),
        "https": ("HTTPS", 443),
    }
    (secret,) = listeners["https"]["tls"]["certificateRefs"]
    assert secret["name"] == certificate["spec"]["secretName"]
    assert all(known["allowedRoutes"]["namespaces"]["from"] == "Same" for known in listeners.values())
    assert certificate["spec"]["dnsNames"] == route(environment)["spec"]["hostnames"]

    (parent,) = route(environment)["spec"]["parentRefs"]
    assert (parent["name"], parent["sectionName"]) == (gateway["metadata"]["name"], "https")
    redirect = rendering.find(found, "HTTPRoute", f"{RELEASE}-to-https")
    (parent,) = redirect["spec"]["parentRefs"]
    assert (parent["name"], parent["sectionName"]) == (gateway["metadata"]["name"], "http")
    assert redirect["spec"]["rules"][0]["filters"][0]["requestRedirect"] == {"scheme": "https", "statusCode": 301}


def test_gateway__without_a_certificate__speaks_http() -> None:
    found = rendering.render(rendering.values_of("default", gateway={"create": True, "className": "eg"}))
    (listener,) = rendering.find(found, "Gateway")["spec"]["listeners"]
    (parent,) = rendering.find(found, "HTTPRoute")["spec"]["parentRefs"]
    assert listener["name"] == parent["sectionName"] == "http"


def test_gateway__of_somebody_else__is_what_the_route_attaches_to() -> None:
    parents = [{"name": "shared", "namespace": "edge", "sectionName": "https"}]
    found = rendering.render(rendering.values_of("default", route={"parentRefs": parents}))
    assert rendering.find(found, "HTTPRoute")["spec"]["parentRefs"] == parents
    assert not rendering.of_kind(found, "Gateway")


def test_service_monitor__asks_every_pod_of_the_service__often_enough() -> None:
    found = rendering.documents("production")
    spec = rendering.find(found, "ServiceMonitor")["spec"]
    assert spec["namespaceSelector"] == {"matchNames": [rendering.NAMESPACE]}
    chosen = {
        service["metadata"]["name"]
        for service in rendering.of_kind(found, "Service")
        if spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    }
    assert chosen == {f"{RELEASE}-serving-{server}" for server in SERVERS}
    (endpoint,) = spec["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert float(endpoint["interval"].removesuffix("s")) < 30
    assert spec["podTargetLabels"] == ["perch/server"]


def test_prometheus_rule__its_groups__are_the_reviewed_ones() -> None:
    file = yaml.safe_load((CHART / "files/serving-alerts.yaml").read_text())
    assert rendering.find(rendering.documents("production"), "PrometheusRule")["spec"] == file


def test_prometheus_rule__with_an_address__leads_to_the_runbook_there() -> None:
    address = "https://git.example.org/perch/blob/main/"
    values = rendering.values_of("production", monitoring={"prometheusRule": {"runbooksUrl": address}})
    groups = rendering.find(rendering.render(values), "PrometheusRule")["spec"]["groups"]
    urls = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(urls) > 10
    assert all(url.startswith(f"{address}docs/runbooks/on-call.md#") for url in urls)


def test_dashboard__in_its_config_map__is_the_reviewed_one() -> None:
    known = rendering.find(rendering.documents("production"), "ConfigMap", f"{RELEASE}-dashboards")
    assert known["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(known["data"]["serving-dashboard.json"]) == json.loads(
        (CHART / "files/serving-dashboard.json").read_text()
    )
