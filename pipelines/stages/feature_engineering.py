"""Compute normalisation constants and class weights from the training split, and features of every image."""

from __future__ import annotations

from pipelines.core.contract import ModelContract
from pipelines.core.image_features import FEATURES
from pipelines.core.results import StageResult, write_json
from pipelines.core.workspace import Workspace
from pipelines.data.feature_table import write_features
from pipelines.params import Params


class FeatureEngineeringResult(StageResult):
    """How many features each image has."""


def run(params: Params, workspace: Workspace) -> FeatureEngineeringResult:
    """Write `data/features/`.

    Raises:
        Refusal: the training images cannot be normalised.
    """
    contract = ModelContract.model_validate_json((workspace.splits / "contract.json").read_bytes())
    statistics = write_features(
        workspace.splits, contract.labels, workspace.features, params.feature_engineering.max_class_weight
    )
    write_json(workspace.features / "statistics.json", statistics.model_dump())
    channels = "rgb" if len(statistics.mean) > 1 else ["grey"]
    moments = {
        f"train/{name}_{channel}": value
        for name, values in (("mean", statistics.mean), ("std", statistics.std))
        for channel, value in zip(channels, values, strict=True)
    }
    return FeatureEngineeringResult(
        summary=f"{len(FEATURES)} features",
        metrics={"data/features": float(len(FEATURES)), **moments},
    )
