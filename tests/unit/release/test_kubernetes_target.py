"""The part of the cluster's target that needs no cluster; `tests/cluster` has the rest."""

from __future__ import annotations

import pytest

from pipelines.errors import TryLater
from pipelines.release.kubernetes_target import service_url


def test_service_url__ports_as_the_chart_names_them__is_that_for_requests() -> None:
    ports = [{"name": "metrics", "port": 9464}, {"name": "http", "port": 3000}]
    service = {"metadata": {"name": "perch-serving-a"}, "spec": {"clusterIP": "10.0.0.7", "ports": ports}}
    assert service_url(service) == "http://10.0.0.7:3000"
    service["spec"]["clusterIP"] = "fd00::7"
    assert service_url(service) == "http://[fd00::7]:3000"
    service["spec"]["ports"] = ports[:1]
    with pytest.raises(TryLater, match="perch-serving-a has no port named http"):
        service_url(service)
