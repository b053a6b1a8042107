"""Start the release as it will be started in production, and ask it twelve smoke tests before a person is asked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.core.locking import hold
from pipelines.core.results import StageResult, read_json, write_json
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.core.image_limits import ImageLimits
    from pipelines.release.smoke_tests import Expected, GoldenImage
    from pipelines.release.staging import StagingPlace
    from pipelines.release.targets import ReleaseTarget

REPORT = "staging/smoke_tests.json"
_STAGING_LIMIT_S = 300.0  # for another run's release, which is asked less long


class DeployToStagingResult(StageResult):
    """Which release passed, and the hash of all that an approval of it rests on."""

    model: str = Field(description="Name of the registered model.")
    version: str = Field(description="In MLflow's registry.")
    release_sha256: str = Field(description="Of the release.")
    evidence_sha256: str = Field(description="Of what an approval rests on, unless the release is given other limits.")
    smoke_tests: int = Field(description="How many there were; all of them passed.")


def run(params: Params, workspace: Workspace) -> DeployToStagingResult:
    """Stage the version that the run was registered and packaged as; a second call asks again.

    Raises:
        Refusal: a smoke test failed; the message names each with its value and its limit, the report holds all.
        TryLater: the service was not ready in time, or MLflow, the ledger or the place to run did not answer.
    """
    from pipelines.core.image_limits import ImageLimits
    from pipelines.core.release_unit import release_name
    from pipelines.registry.staged_version import read_evidence, record_staging
    from pipelines.release.approvals import evidence_hash
    from pipelines.release.artifact_store import open_store
    from pipelines.release.probe_images import MOST_BYTES, keep_probe_images
    from pipelines.release.staging import stage_release
    from pipelines.release.steps import Plan
    from pipelines.release.targets import ReleaseRef
    from pipelines.settings import get_settings

    settings = get_settings()
    packaging = read_json(workspace.result_file("model_packaging"))
    version, digest = packaging["version"], packaging["release_sha256"]
    release = ReleaseRef(params.model_name, version, digest, open_store(settings).address(release_name(digest)))
    expected = _expect(params, workspace, version, digest)
    with _open_place(settings) as (place, open_key):
        report = stage_release(
            place, release, expected, open_key=open_key, ready_timeout_s=params.model_release.ready_timeout_s
        )
    write_json(workspace.root / REPORT, report.as_tree())
    probes_sha256 = ""
    if params.model_release.probe_requests_per_s > 0 and not report.failed:
        probes = choose_golden(
            workspace, len(expected.labels), params.deploy_to_staging.probe_images, ImageLimits(), MOST_BYTES
        )
        probes_sha256 = keep_probe_images(open_store(settings), digest, [image.data for image in probes])
    passed, count = len(report.tests) - len(report.failed), len(report.tests)
    record_staging(
        settings,
        params.model_name,
        version,
        digest,
        run_id=expected.manifest["run_id"],
        smoke_tests=count,
        golden_images=len(expected.golden),
        failed=[test.name for test in report.failed],
        candidate_alias=params.model_registration.candidate_alias,
        probes_sha256=probes_sha256,
    )
    if report.failed:
        raise Refusal(
            f"the release {digest[:12]} of {params.model_name} v{version}",
            f"{len(report.failed)} of {count} smoke tests failed:\n  "
            + "\n  ".join(test.as_line() for test in report.failed)
            + "\n ",
            limit="all pass before anybody is asked to approve",
            way_out=f"{REPORT} of the run has all of them; nothing was left running, and it is no candidate any more",
            reports={"Smoke tests": REPORT},
        )
    return DeployToStagingResult(
        summary=f"{passed} of {count} smoke tests",
        reports={"Smoke tests": REPORT},
        model=params.model_name,
        version=version,
        release_sha256=digest,
        evidence_sha256=evidence_hash(
            **read_evidence(settings, params.model_name, version, digest), plan_sha256=Plan(params.model_release).sha256
        ),
        smoke_tests=count,
    )


def _expect(params: Params, workspace: Workspace, version: str, digest: str) -> Expected:
    """What the run itself knows of its model, to be held against what the service says."""
    from pipelines.core.contract import ModelContract
    from pipelines.core.image_limits import ImageLimits
    from pipelines.release.smoke_tests import Expected

    contract = ModelContract.model_validate_json((workspace.splits / "contract.json").read_text(encoding="utf-8"))
    limits, staging = ImageLimits(), params.deploy_to_staging
    return Expected(
        manifest={
            "model": params.model_name,
            "version": version,
            "labels": list(contract.labels),
            "input": contract.input.model_dump(mode="json"),
            "run_id": read_json(workspace.run_file)["run_id"],
            "data_sha256": read_json(workspace.raw / "manifest.json")["data_sha256"],
            "onnx_sha256": read_json(workspace.model / "training.json")["onnx_sha256"],
        },
        labels=contract.labels,
        digest=digest,
        golden=choose_golden(workspace, len(contract.labels), staging.golden_images, limits),
        max_probability_difference=staging.max_probability_difference,
        latency_requests=staging.latency_requests,
        max_p95_ms=params.model_release.max_p95_ms,
        max_body_bytes=limits.max_body_bytes,
    )


def choose_golden(
    workspace: Workspace, n_labels: int, most: int, limits: ImageLimits, most_bytes: float = float("inf")
) -> list[GoldenImage]:
    """Images of the test split, evenly spread over it, with the probabilities that the evaluation kept.

    Args:
        workspace: of the run.
        n_labels: columns `p_0` and on.
        most: how many images.
        limits: of the service; larger images are left out, for it refuses them.
        most_bytes: of all images together.

    Raises:
        Refusal: the service would take none of the test images.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.data.shards import read_images
    from pipelines.release.smoke_tests import GoldenImage

    columns = ["key", *(f"p_{index}" for index in range(n_labels))]
    predictions = pq.read_table(workspace.evaluation / "predictions.parquet", columns=columns).to_pylist()
    images = pq.read_table(workspace.splits / "images.parquet", columns=["key", "n_bytes", "width_px", "height_px"])
    taken = {
        row["key"]: row["n_bytes"]
        for row in images.to_pylist()
        if row["n_bytes"] <= limits.max_body_bytes and row["width_px"] * row["height_px"] <= limits.max_pixels
    }
    rows = [row for row in predictions if row["key"] in taken]
    if not rows:
        raise Refusal(
            "the test split",
            f"has no image among {len(predictions)} that the service would take",
            limit=f"{limits.max_body_bytes:,} bytes and {limits.max_pixels:,} pixels",
            way_out="raise PERCH_SERVING_MAX_BODY_BYTES or PERCH_SERVING_MAX_PIXELS, here and where it is served",
        )
    count, every = min(most, len(rows)), rows
    while True:
        chosen = np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))
        rows = [every[index] for index in chosen]
        n_bytes = sum(taken[row["key"]] for row in rows)
        if n_bytes <= most_bytes or count == 1:
            break
        count = max(1, min(count - 1, int(count * most_bytes / n_bytes)))
    data = read_images(workspace.raw, [row["key"] for row in rows])
    return [GoldenImage(row["key"], data[row["key"]], tuple(row[name] for name in columns[1:])) for row in rows]


@contextmanager
def _open_place(settings: Settings) -> Iterator[tuple[StagingPlace, Callable[[], AbstractContextManager[str]]]]:
    """The target's staging slot, where a target is up, else a process of its own; and a key that it takes.

    One run at a time: the slot is one, and the tests of one release would see another's answers.
    """
    from pipelines.core.api_keys import DEFAULT_FILE_NAME
    from pipelines.release.chosen_target import open_target
    from pipelines.release.kubernetes_target import KubernetesTarget
    from pipelines.release.own_process import OwnProcess
    from pipelines.release.staging import SharedSlot, temporary_key

    if settings.target == "kubernetes":
        key = _require_key(settings)
        yield SharedSlot(KubernetesTarget(settings), _STAGING_LIMIT_S), lambda: nullcontext(key)
        return
    target = open_target(settings)
    given = os.environ.get("PERCH_SERVING_API_KEYS_FILE")
    keys_file = Path(given) if given else settings.home / DEFAULT_FILE_NAME
    with hold(settings.home / "release" / "staging.lock", wait_s=_STAGING_LIMIT_S):
        if _is_up(target):
            yield target, partial(temporary_key, keys_file)
            return
        with tempfile.TemporaryDirectory(prefix="perch-staging-") as temporary:
            folder = Path(temporary)
            environment = {
                "PERCH_SERVING_AUTHENTICATION": "required",
                "PERCH_SERVING_API_KEYS_FILE": str(folder / DEFAULT_FILE_NAME),
                "PERCH_SERVING_PUBLIC_KEYS": os.environ.get("PERCH_SERVING_PUBLIC_KEYS", str(settings.keys_dir)),
                "PERCH_SERVING_CACHE_DIR": str(settings.home / "serving" / "cache"),
                "PERCH_SERVING_S3_ENDPOINT_URL": settings.s3_endpoint_url,
            }
            yield OwnProcess(folder, environment), partial(temporary_key, folder / DEFAULT_FILE_NAME)


def _require_key(settings: Settings) -> str:
    """The key for services whose file of keys is a Secret, which nobody changes for the time of some tests."""
    if not settings.staging_api_key:
        raise Refusal(
            "PERCH_STAGING_API_KEY",
            "is empty",
            limit="a key that the services of the cluster take",
            way_out="`perch api-keys own` makes it; docs/reference/authentication.md says where it goes",
        )
    return settings.staging_api_key


def _is_up(target: ReleaseTarget) -> bool:
    from pipelines.errors import TryLater

    try:
        target.state()
    except TryLater:
        return False
    return True
