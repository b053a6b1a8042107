"""The chart rendered by Helm's own library, as documents, and Kubernetes' own schemas for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

PROJECT = Path(__file__).parents[2]
CHART = PROJECT / "helm/perch"
RELEASE, NAMESPACE, TAG = "shop", "vision", "v0.1.0-3e9d1c2"
SERVERS = ("a", "b", "staging")
ENVIRONMENTS = ("default", "dev", "staging", "production")
KUBERNETES = ("1.31", "1.33", "1.35", "1.37")

Document = dict[str, Any]


def values_of(environment: str, **further: Any) -> dict[str, Any]:
    """An environment's values with what every installation must say."""
    file = CHART / ("values.yaml" if environment == "default" else f"values-{environment}.yaml")
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"
    return merged(merged(values, {"images": {"tag": TAG}, "serving": {"publicKeys": {"2026-a.pub": pem}}}), further)


def everything() -> dict[str, Any]:
    """Production with all that can be switched on besides."""
    return values_of(
        "production",
        images={"registry": "registry.example/perch/", "pullSecrets": ["registry"]},
        serving={
            "jwt": {
                "issuer": "https://issuer.example.org",
                "audience": "perch",
                "jwks": "https://issuer.example.org/keys",
            },
            "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.tracing:4318"},
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "pool", "operator": "Exists"}],
            "priorityClassName": "serving",
            "podAnnotations": {"example.org/team": "vision"},
        },
        objectStore={"endpointUrl": "https://store.example.org", "region": "eu-1", "caConfigMap": "store-ca"},
        networkPolicy={"traces": {"ports": [4318]}},
        monitoring={"dashboards": {"annotations": {"grafana_folder": "Perch"}}},
        gateway={"annotations": {"example.org/internal": "true"}},
        serviceAccounts={"serving": {"annotations": {"example.org/role": "reader"}}},
    )


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges values: maps key by key, everything else replaced."""
    result = dict(one)
    for key, value in other.items():
        result[key] = (
            merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
        )
    return result


@cache
def chart() -> Chart:
    """The chart, loaded once."""
    return Chart.load(CHART)


def render(values: dict[str, Any], *, name: str = RELEASE, **options: Any) -> list[Document]:
    """Every document of the chart under some values."""
    manifests = chart().render(values, name=name, namespace=NAMESPACE, **options)
    return [
        document
        for path, text in sorted(manifests.items())
        if not path.endswith(".txt")
        for document in yaml.safe_load_all(text)
        if document
    ]


@cache
def _rendered(environment: str) -> str:
    return json.dumps(render(everything() if environment == "everything" else values_of(environment)))


def documents(environment: str) -> list[Document]:
    """Those of an environment; a copy, rendered once."""
    found: list[Document] = json.loads(_rendered(environment))
    return found


def find(found: list[Document], kind: str, name: str = "") -> Document:
    """The only document of a kind, or of a kind and name."""
    (document,) = (known for known in found if known["kind"] == kind and name in ("", known["metadata"]["name"]))
    return document


def of_kind(found: list[Document], *kinds: str) -> list[Document]:
    """Documents of some kinds."""
    return [known for known in found if known["kind"] in kinds]


def workloads(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and pod template of whatever makes pods."""
    for document in of_kind(found, "Deployment", "Job", "StatefulSet", "DaemonSet", "CronJob"):
        yield document["metadata"]["name"], document["spec"]["template"]


def containers(template: Document) -> list[Document]:
    """All containers of a pod template."""
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def environment_of(container: Document) -> dict[str, Any]:
    """Variables of a container: a value, or where it comes from."""
    names = [known["name"] for known in container.get("env", ())]
    assert len(names) == len(set(names)), f"twice among {names}"
    return {known["name"]: known.get("value", known.get("valueFrom")) for known in container.get("env", ())}


@cache
def _registry(version: str) -> tuple[Any, Registry[Any]]:
    (folder,) = (
        known
        for known in resources.files("kubernetes_validate").joinpath("kubernetes-json-schema").iterdir()
        if known.name == f"v{version}.0-local-strict"
    )
    definitions = json.loads(folder.joinpath("_definitions.json").read_text())
    return folder, Resource.from_contents(definitions) @ Registry()


@cache
def schema_of(version: str, kind: str, api_version: str) -> Draft202012Validator | None:
    """Kubernetes' strict schema of a kind; None where it is a custom one."""
    folder, registry = _registry(version)
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], number) if part)
    file = folder.joinpath(f"{name}.json")
    if not file.is_file():
        return None
    schema = json.loads(file.read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ registry)
