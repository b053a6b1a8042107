"""Batch prediction of a run's test images says what that run's evaluation said: not a bit of difference."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import predict_source
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.image_limits import ImageLimits
from pipelines.data.shards import read_images
from pipelines.params import Params
from pipelines.settings import Settings
from pipelines.stages import model_evaluation


def test_batch_prediction__of_a_runs_test_images__equals_its_evaluation(
    make_evaluation_run: Any, tmp_path: Path
) -> None:
    run = make_evaluation_run()
    model_evaluation.run(Params(dataset="digits", model_name="digits-classification"), run.workspace)
    expected = pq.read_table(run.workspace.evaluation / "predictions.parquet")
    folder = tmp_path / "again"
    for key, image in read_images(run.workspace.raw, expected["key"].to_pylist()).items():
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    out, model = tmp_path / "predictions.parquet", run.workspace.model / "model.onnx"
    predict_source(
        open_location(str(folder), Settings(home=tmp_path), path_column="path", out=out),
        model,
        ModelIdentity("digits-classification", "1", hashlib.sha256(model.read_bytes()).hexdigest()),
        out,
        limits=ImageLimits(),
        threads=2,
        name="the test images",
    )
    actual, expected = pq.read_table(out).sort_by("key"), expected.sort_by("key")
    assert actual["sha256"].to_pylist() == expected["sha256"].to_pylist()
    for index, label in enumerate(run.labels):
        np.testing.assert_array_equal(actual[f"p_{label}"], expected[f"p_{index}"])
