"""A packaged release in staging: started as in production, asked the smoke tests, and gone again."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.core.api_keys import read_keys
from pipelines.core.contract import InputContract, ModelContract
from pipelines.core.workspace import Workspace
from pipelines.data.png import encode_png
from pipelines.data.shards import METADATA_SCHEMA, Manifest, ShardWriter
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.ledger import Ledger
from pipelines.registry.registration import register
from pipelines.registry.staged_version import staged_probes
from pipelines.release.artifact_store import open_store
from pipelines.release.own_process import OwnProcess
from pipelines.release.probe_images import fetch_probe_images
from pipelines.release.staging import temporary_key
from pipelines.release.targets import ReleaseRef, Slot
from pipelines.services.rollouts import _require_probe_images
from pipelines.settings import Settings
from pipelines.stages import deploy_to_staging
from pipelines.stages.model_packaging import package_version
from tests.integration.registered_aliases import read_aliases

pytestmark = pytest.mark.services

IMAGES = 12
LABELS = ("circle", "square")
PASSED_WHATEVER_THE_MODEL_SAYS = {
    "contract",
    "empty body",
    "truncated image",
    "not an image",
    "too large",
    "no key",
    "release served",
    "counters",
}


def add_images(workspace: Workspace) -> None:
    """Give a run of `make_run` test images, and what its model really answers to them."""
    from pipelines.modeling.inference import OnnxPredictor

    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (IMAGES, 8, 8, 1), dtype=np.uint8)
    writer = ShardWriter(workspace.raw / "draft.parquet")
    rows: list[dict[str, Any]] = []
    for number, pixels in enumerate(images):
        data = encode_png(pixels[..., 0])
        row: dict[str, Any] = dict.fromkeys(METADATA_SCHEMA.names)
        row |= {"key": f"{number:02d}.png", "label": LABELS[number % 2], "width_px": 8, "height_px": 8}
        row |= {"n_bytes": len(data), "sha256": f"{number:064x}"}
        writer.add(row, data)
        rows.append(row)
    shard = writer.close()
    (workspace.raw / "draft.parquet").rename(workspace.raw / shard.name)
    data_sha256 = json.loads((workspace.raw / "manifest.json").read_text())["data_sha256"]
    manifest = Manifest(
        dataset="shapes",
        source="here",
        as_of=None,
        labels=dict.fromkeys(LABELS, IMAGES // 2),
        rows=IMAGES,
        quarantined=0,
        shards=[shard],
        data_sha256=data_sha256,
    )
    manifest.write(workspace.raw)
    pq.write_table(pa.Table.from_pylist(rows, METADATA_SCHEMA), workspace.splits / "images.parquet")
    contract = ModelContract(input=InputContract(size_px=8, channels=1, resize="squash"), labels=LABELS)
    (workspace.splits / "contract.json").write_text(contract.model_dump_json())
    write_predictions(workspace, OnnxPredictor(workspace.model / "model.onnx").predict(images))


def write_predictions(workspace: Workspace, probabilities: Any) -> None:
    columns = {"key": [f"{number:02d}.png" for number in range(IMAGES)]}
    columns |= {f"p_{label}": np.asarray(probabilities)[:, label].astype(np.float32) for label in range(len(LABELS))}
    pq.write_table(pa.table(columns), workspace.evaluation / "predictions.parquet")


@pytest.fixture
def packaged(
    registry_settings: Settings, registry_params: Params, make_run: Callable[..., Workspace]
) -> tuple[Settings, Workspace]:
    """A run whose version is registered and packaged."""
    workspace = make_run()
    add_images(workspace)
    register(registry_settings, registry_params, workspace)
    package = package_version(registry_settings, registry_params.model_name, 1, make_key=True)
    result = {"version": "1", "release_sha256": package.digest}
    workspace.result_file("model_packaging").write_text(json.dumps(result))
    return registry_settings, workspace


def report(workspace: Workspace) -> dict[str, dict[str, Any]]:
    tree = json.loads((workspace.root / deploy_to_staging.REPORT).read_text())
    return {test["name"]: test for test in tree["smoke_tests"]}


def services_of(settings: Settings) -> list[int]:
    """What still runs of a release whose unpacked files lie in this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(settings.home) in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_deploy_to_staging__release_as_evaluated__passes_and_leaves_nothing_but_evidence(
    packaged: tuple[Settings, Workspace], registry_params: Params
) -> None:
    settings, workspace = packaged
    result = deploy_to_staging.run(registry_params, workspace)
    assert result.summary == "12 of 12 smoke tests", report(workspace)
    ledger = Ledger(settings.ledger_url)
    staged = [record for record in ledger.entries() if record.event == "staged"]
    ledger.close()
    assert [json.loads(record.evidence) for record in staged] == [
        {"run_id": "run-1", "release_sha256": result.release_sha256, "smoke_tests": 12, "golden_images": IMAGES}
    ]
    assert not list(settings.releases_dir.glob("*.probes.zip")), "images were kept for a prober that there is not"
    assert not services_of(settings)

    # The card is changed in MLflow: the same step, done again, speaks of other evidence.
    (card,) = settings.home.rglob("model_registration/evidence/model_card.html")
    card.write_text(card.read_text() + "<p>It is even better.</p>")
    again = deploy_to_staging.run(registry_params, workspace)
    assert again.release_sha256 == result.release_sha256
    assert again.evidence_sha256 != result.evidence_sha256


def test_deploy_to_staging__params_with_a_prober__keeps_test_images_for_it(
    packaged: tuple[Settings, Workspace], registry_params: Params
) -> None:
    settings, workspace = packaged
    release = registry_params.model_release.model_copy(update={"probe_requests_per_s": 20})
    staging = registry_params.deploy_to_staging.model_copy(update={"probe_images": 5})
    params = registry_params.model_copy(update={"model_release": release, "deploy_to_staging": staging})
    digest = deploy_to_staging.run(params, workspace).release_sha256
    archive_sha256 = staged_probes(settings, params.model_name, "1", digest)
    images = fetch_probe_images(open_store(settings), digest, archive_sha256)
    assert len(set(images)) == 5
    with Image.open(io.BytesIO(images[0])) as image:
        assert image.size == (8, 8)
    of_another = ReleaseRef(params.model_name, "1", "0a" * 32, "")
    _require_probe_images(settings, replace(of_another, digest=digest))
    with pytest.raises(Refusal, match="has no images to send"):
        _require_probe_images(settings, of_another)


def test_deploy_to_staging__served_answers_differ_from_the_offline_ones__names_each_test_that_failed(
    packaged: tuple[Settings, Workspace], registry_params: Params
) -> None:
    settings, workspace = packaged
    table = pq.read_table(workspace.evaluation / "predictions.parquet")
    write_predictions(workspace, np.stack([table["p_1"], table["p_0"]], axis=1))  # as if labels had been swapped
    slow = registry_params.model_copy(
        update={"model_release": registry_params.model_release.model_copy(update={"max_p95_ms": 0.01})}
    )
    with pytest.raises(Refusal) as refused:
        deploy_to_staging.run(slow, workspace)
    failed = {"golden labels", "golden probabilities", "golden batch", "latency"}
    assert {name for name, test in report(workspace).items() if not test["passed"]} == failed
    assert set(report(workspace)) - failed == PASSED_WHATEVER_THE_MODEL_SAYS
    said = str(refused.value)
    assert "4 of 12 smoke tests failed" in said
    assert "golden labels: 0 of 12 as offline (limit: 12 of 12)" in said
    assert "latency: p95 " in said
    assert refused.value.reports == {"Smoke tests": deploy_to_staging.REPORT}
    ledger = Ledger(settings.ledger_url)
    (turned_away,) = [record for record in ledger.entries() if record.event.startswith("stag")]
    ledger.close()
    assert (turned_away.event, set(json.loads(turned_away.evidence)["failed"])) == ("staging_failed", failed)
    assert read_aliases(settings, registry_params.model_name) == {}
    assert not services_of(settings)


def test_deploy_to_staging__release_with_a_flipped_byte__does_not_start_and_says_why(
    packaged: tuple[Settings, Workspace], registry_params: Params
) -> None:
    settings, workspace = packaged
    (file,) = settings.releases_dir.glob("*.bento")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(data))
    with pytest.raises(Refusal, match="was changed") as refused:
        deploy_to_staging.run(registry_params, workspace)
    assert "1 of 1 smoke tests failed" in str(refused.value)
    assert list(report(workspace)) == ["start"]
    assert not services_of(settings)


def test_own_process__service_killed_and_removed__has_no_counters_and_leaves_nothing(
    packaged: tuple[Settings, Workspace], tmp_path: Path
) -> None:
    settings, workspace = packaged
    digest = json.loads(workspace.result_file("model_packaging").read_text())["release_sha256"]
    keys = tmp_path / "api-keys.json"
    environment = {
        "PERCH_SERVING_API_KEYS_FILE": str(keys),
        "PERCH_SERVING_PUBLIC_KEYS": str(settings.keys_dir),
        "PERCH_SERVING_CACHE_DIR": str(settings.home / "cache"),
    }
    place = OwnProcess(tmp_path / "own", environment)
    release = ReleaseRef("shapes-classification", "1", digest, str(settings.releases_dir / f"{digest}.bento"))
    with temporary_key(keys):
        place.deploy(Slot.STAGING, release)
        place.wait_ready(Slot.STAGING, 60)
        assert place.observe(Slot.STAGING) is not None
        for pid in services_of(settings):
            psutil.Process(pid).kill()
        assert place.observe(Slot.STAGING) is None
        place.remove(Slot.STAGING)
    assert not services_of(settings)
    assert read_keys(keys).keys == ()
