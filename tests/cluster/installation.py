"""The chart `helm/perch` as it is installed for these tests: values of a small cluster, no MLflow, no watchdog."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[2]
CHART = PROJECT / "helm/perch"
RELEASE = "perch"
API_KEYS, OBJECT_STORE, OWN_KEYS = "perch-api-keys", "perch-object-store", "perch-own-keys"


def chart_objects(namespace: str, image: str, *, public_key: str, **further: Any) -> list[dict[str, Any]]:
    """Every object of the chart.

    Args:
        namespace: to install into.
        image: of the service, with its tag.
        public_key: PEM of the key whose releases are trusted.
        further: sections of the values.
    """
    from helm_python import Chart

    from tests.helm.rendering import merged

    repository, _, tag = image.rpartition(":")
    values: dict[str, Any] = {}
    for file in ("values.yaml", "values-dev.yaml"):
        values = merged(values, yaml.safe_load((CHART / file).read_text()))
    own = {
        "images": {"tag": tag, "serving": {"repository": repository}, "pullPolicy": "Never"},
        "serving": {"publicKeys": {"release.pub": public_key}},
        "route": {"parentRefs": [{"name": "clients"}]},
        "mlflow": {"enabled": False},
        "watchdog": {"enabled": False},
    }
    manifests = Chart.load(CHART).render(merged(merged(values, own), further), name=RELEASE, namespace=namespace)
    found = [
        document
        for path, text in sorted(manifests.items())
        if not path.endswith(".txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    for document in found:
        document["metadata"].setdefault("namespace", namespace)
    return found


def secret(namespace: str, name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """A Secret with some files."""
    data = {key: base64.b64encode(content).decode() for key, content in files.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": data}
