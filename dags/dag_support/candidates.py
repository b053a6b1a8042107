"""The asset that joins training and release: a version that passed its gate and staging, and waits for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Asset

from dags.dag_support.project import PROJECT_DIR
from pipelines.params import load_params


def candidate_asset() -> Asset:
    """The asset `candidate/<model>`, by the model's name in `params.yaml`."""
    model = load_params(PROJECT_DIR / "params.yaml").model_name
    return Asset(name=f"candidate/{model}", uri=f"perch://candidate/{model}")


def describe_candidate(
    result: Mapping[str, Any], *, run_id: str, requested_by: str, limits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What travels with the asset's event.

    Args:
        result: of the stage `deploy_to_staging`.
        run_id: of the Perch run.
        requested_by: who asked for it.
        limits: of its release that differ from `params.yaml`, as dotted keys.
    """
    return {
        "model": result["model"],
        "version": result["version"],
        "digest": result["release_sha256"],
        "evidence_sha256": result["evidence_sha256"],
        "run_id": run_id,
        "requested_by": requested_by,
        "limits": dict(limits or {}),
    }
