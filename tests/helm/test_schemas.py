"""What the chart renders is what Kubernetes takes, and what its values promise."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from helm_python import HelmRenderError, HelmValuesError
from helm_python import lint as helm_lint

from pipelines import __version__
from tests.helm import rendering
from tests.helm.rendering import CHART, ENVIRONMENTS, KUBERNETES, NAMESPACE, RELEASE

each_environment = pytest.mark.parametrize("environment", [*ENVIRONMENTS, "everything"])

# No schema of these comes with Kubernetes: they are checked by path, in test_exposure.py.
CUSTOM = {
    "gateway.networking.k8s.io/v1/Gateway",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "cert-manager.io/v1/Certificate",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "external-secrets.io/v1/ExternalSecret",
}


@pytest.mark.parametrize("version", KUBERNETES)
@each_environment
def test_manifests__by_the_schemas_of_kubernetes__are_valid(environment: str, version: str) -> None:
    wrong = []
    for document in rendering.documents(environment):
        kind = f"{document['apiVersion']}/{document['kind']}"
        schema = rendering.schema_of(version, document["kind"], document["apiVersion"])
        assert (schema is None) == (kind in CUSTOM), kind
        errors = schema.iter_errors(document) if schema else ()
        name = document["metadata"]["name"]
        wrong += [f"{kind} {name}: {error.json_path}: {error.message[:200]}" for error in errors]
    assert not wrong


def test_schemas__a_misspelt_field__is_found() -> None:
    """Strict schemas: an unknown field is what an API server would drop without a word."""
    deployment = rendering.find(rendering.documents("dev"), "Deployment", f"{RELEASE}-serving-a")
    schema = rendering.schema_of("1.33", "Deployment", "apps/v1")
    assert schema is not None
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert [error.json_path for error in schema.iter_errors(deployment)] == ["$.spec.template.spec.containers[0]"]


@each_environment
def test_chart__by_helms_lint__is_clean(environment: str) -> None:
    values = rendering.everything() if environment == "everything" else rendering.values_of(environment)
    report = helm_lint(CHART, values, strict=True)
    assert [known for known in report["messages"] if known["severity"] > 1] == []
    assert report["errors"] in (None, [])


def test_chart__by_a_bare_helm_lint__is_clean() -> None:
    """`helm lint helm/perch` knows no tag, and only warns of values that are missing."""
    assert helm_lint(CHART)["errors"] in (None, [])


@each_environment
def test_objects__of_one_installation__have_names_of_their_own_and_its_labels(environment: str) -> None:
    found = rendering.documents(environment)
    names = [(known["kind"], known["metadata"]["name"]) for known in found]
    assert len(names) == len(set(names))
    for known in found:
        labels = known["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/part-of"] == "perch"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/component"]
        assert known["metadata"].get("namespace", NAMESPACE) == NAMESPACE


def test_chart__its_version_of_the_code__is_the_codes() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"images": {"tag": "latest"}}, "tag"),
        ({"autoscalling": {}}, "autoscalling"),
        ({"serving": {"replica": 3}}, "replica"),
        ({"serving": {"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}}, "environment"),
        ({"serving": {"publicKeys": {"key.pem": "x"}}}, "publicKeys"),
        ({"serving": {"podAnnotations": {"perch/release-url": "s3://x"}}}, "perch/release-url"),
        ({"serving": {"resources": {"limits": None}}}, "limits"),
        ({"autoscaling": {"cpuPercent": 170}}, "cpuPercent"),
        ({"monitoring": {"serviceMonitor": {"interval": "60s"}}}, "interval"),
        ({"networkPolicy": {"gateway": {"peers": []}}}, "peers"),
        ({"mlflow": {"database": {"existingSecret": ""}}}, "existingSecret"),
    ],
    ids=lambda known: next(iter(known)) if isinstance(known, dict) else known,
)
def test_values__wrong__are_refused_by_name(wrong: dict[str, Any], says: str) -> None:
    values = rendering.merged(rendering.values_of("default"), wrong)
    with pytest.raises(HelmValuesError, match=re.escape(says)):
        rendering.chart().validate_schema(values)


def test_values__without_a_tag__are_refused_with_what_to_do() -> None:
    with pytest.raises(HelmRenderError, match=r"images.tag names the images.*make images"):
        rendering.render({})


def test_values__without_a_trusted_key__are_refused() -> None:
    with pytest.raises(HelmRenderError, match=r"serving.publicKeys"):
        rendering.render({"images": {"tag": "v1"}})
