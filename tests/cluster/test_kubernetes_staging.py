"""`deploy_to_staging` on the cluster: a run's release is tried where it will serve, and nothing stays but evidence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.ledger import Ledger
from pipelines.release.artifact_store import open_store
from pipelines.release.targets import Slot
from pipelines.settings import Settings
from pipelines.stages import deploy_to_staging
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.integration.release_target_behaviour import flip_a_bit
from tests.integration.test_staging import packaged, report, write_predictions  # noqa: F401 - a fixture

pytestmark = [pytest.mark.cluster, pytest.mark.services]


@pytest.fixture(autouse=True)
def settings_of_a_step(rig: KubernetesRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step's pod is told; `registry_settings` reads it."""
    variables = {
        **rig.environment,
        "PERCH_RELEASES_URL": rig.settings.releases_url,
        "PERCH_S3_ENDPOINT_URL": rig.settings.s3_endpoint_url,
        "PERCH_PROMETHEUS_URL": rig.settings.prometheus_url,
        "PERCH_STAGING_API_KEY": rig.settings.staging_api_key,
        "PERCH_SIGNING_KEY": str(rig.settings.keys_dir / "release.pem"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def generation(rig: KubernetesRig) -> int:
    """How often the staging server was changed."""
    found = rig.cluster.read("deployment", "perch-serving-staging", f"--namespace={rig.settings.kubernetes_namespace}")
    return int(found["metadata"]["generation"])


def require_nothing_left(rig: KubernetesRig) -> None:
    assert Slot.STAGING not in rig.target.state().slots
    assert not rig.is_running("serving-staging")


def test_deploy_to_staging__release_as_evaluated__passes_in_the_clusters_slot_and_leaves_it_empty(
    rig: KubernetesRig,
    packaged: tuple[Settings, Workspace],  # noqa: F811 - the fixture
    registry_params: Params,
) -> None:
    settings, workspace = packaged
    before, production = generation(rig), rig.identities()
    result = deploy_to_staging.run(registry_params, workspace)
    assert result.summary == "12 of 12 smoke tests", report(workspace)
    assert generation(rig) == before + 2  # deployed there, and removed
    require_nothing_left(rig)
    assert rig.identities() == production
    assert not (settings.home / "serving").exists()  # no process of this machine served it
    ledger = Ledger(settings.ledger_url)
    assert [record.event for record in ledger.entries()][-1] == "staged"
    ledger.close()


def test_deploy_to_staging__answers_differ_from_the_offline_ones__is_removed_and_its_evidence_kept(
    rig: KubernetesRig,
    packaged: tuple[Settings, Workspace],  # noqa: F811 - the fixture
    registry_params: Params,
) -> None:
    settings, workspace = packaged
    table = pq.read_table(workspace.evaluation / "predictions.parquet")
    write_predictions(workspace, np.stack([table["p_1"], table["p_0"]], axis=1))
    with pytest.raises(Refusal) as refused:
        deploy_to_staging.run(registry_params, workspace)
    failed = {name for name, test in report(workspace).items() if not test["passed"]}
    assert failed == {"golden labels", "golden probabilities", "golden batch"}
    assert refused.value.reports == {"Smoke tests": deploy_to_staging.REPORT}
    require_nothing_left(rig)
    ledger = Ledger(settings.ledger_url)
    last = ledger.entries()[-1]
    ledger.close()
    assert (last.event, set(json.loads(last.evidence)["failed"])) == ("staging_failed", failed)


def test_deploy_to_staging__release_with_a_flipped_bit__is_not_served_and_says_why(
    rig: KubernetesRig,
    packaged: tuple[Settings, Workspace],  # noqa: F811 - the fixture
    registry_params: Params,
    tmp_path: Path,
) -> None:
    settings, workspace = packaged
    digest = json.loads(workspace.result_file("model_packaging").read_text())["release_sha256"]
    store, folder = open_store(settings), tmp_path / "release"
    folder.mkdir()
    for name in (f"{digest}.bento", f"{digest}.bento.sig"):
        assert store.get(name, folder / name)
    broken = flip_a_bit(folder / f"{digest}.bento", tmp_path / "broken")
    store.put(broken.name, broken)
    with pytest.raises(Refusal, match="was changed"):
        deploy_to_staging.run(registry_params, workspace)
    assert list(report(workspace)) == ["start"]
    require_nothing_left(rig)
