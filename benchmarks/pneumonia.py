"""Trains on PneumoniaMNIST with its own splits, several seeds, and reports the test split beside the published table.

Run with `python benchmarks/pneumonia.py`.  The data is read, split, measured, trained on and exported by the stages of
the pipeline; `pneumonia.yaml` beside this file is all that differs from `params.yaml`.  It was chosen on the training
and validation splits; nothing was chosen on the test split.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import t as student

from pipelines.core.metrics import roc_auc, roc_auc_interval
from pipelines.core.statistics import wilson_interval
from pipelines.core.workspace import Workspace
from pipelines.params import Params, check_params, override

HERE = Path(__file__).parent
FILE = "pneumoniamnist.npz"
# Images by split and class in the published file: 0 is normal, 1 pneumonia.
COUNTS = {
    ("train", "0"): 1214,
    ("train", "1"): 3494,
    ("val", "0"): 135,
    ("val", "1"): 389,
    ("test", "0"): 234,
    ("test", "1"): 390,
}
CONFIDENCE = 0.95
# Yang et al., Scientific Data 2023 (arXiv 2110.14795): AUC and accuracy on the same test split.
PUBLISHED = {
    "ResNet-18, 28 px": (0.944, 0.854),
    "ResNet-50, 28 px": (0.948, 0.854),
    "ResNet-50, 224 px": (0.962, 0.884),
    "auto-sklearn": (0.942, 0.855),
    "AutoKeras": (0.947, 0.878),
    "Google AutoML Vision": (0.991, 0.946),
}


def find_data() -> Path | None:
    folders = [os.environ.get("PERCH_TEST_DATA", ""), str(HERE.parent.parent / "shared" / "data")]
    return next((file for folder in folders if folder and (file := Path(folder) / FILE).is_file()), None)


def load(source: Path, seed: int) -> Params:
    tree = yaml.safe_load((HERE.parent / "params.yaml").read_text(encoding="utf-8"))
    changes = yaml.safe_load((HERE / "pneumonia.yaml").read_text(encoding="utf-8"))
    return check_params(override(tree, {**changes, "data_ingestion.source": str(source), "seed": seed}))


def prepare(source: Path, workspace: Workspace) -> None:
    """The stages before training, once for all seeds: the splits are given, so that no seed takes part in them."""
    from pipelines.stages import data_ingestion, data_preprocessing, feature_engineering

    for stage in (data_ingestion, data_preprocessing, feature_engineering):
        print(f"  {stage.__name__.rsplit('.', 1)[-1]:<20}  {stage.run(load(source, 0), workspace).summary}", flush=True)
        if stage is data_ingestion:
            rows = pd.concat(
                pd.read_parquet(file, columns=["given_split", "label"]) for file in workspace.raw.glob("*.parquet")
            )
            if (found := rows.value_counts().to_dict()) != COUNTS:
                raise RuntimeError(f"{source} is not the published data set: {found}, and not {COUNTS}")


def train_and_test(source: Path, prepared: Path, root: Path, seed: int) -> dict[str, Any]:
    """The training stage with one seed, and its exported model on the test split."""
    import torch

    from pipelines.modeling.inference import OnnxPredictor
    from pipelines.stages import model_training

    torch.set_num_threads(1)  # the other cores have other seeds
    root.mkdir()
    (root / "data").symlink_to(prepared / "data")
    workspace, began = Workspace(root), time.monotonic()
    result = model_training.run(load(source, seed), workspace)
    table = pd.read_parquet(workspace.splits / "images.parquet", columns=["used_split", "row", "label_index"])
    truth = table[table["used_split"] == "test"].sort_values("row")["label_index"].to_numpy()
    probabilities = OnnxPredictor(workspace.model / "model.onnx").predict(
        np.load(workspace.splits / "test.npy", mmap_mode="r")
    )
    right, pneumonia = probabilities.argmax(axis=1) == truth, truth == 1
    area, area_interval = (
        roc_auc(probabilities[:, 1], pneumonia),
        roc_auc_interval(probabilities[:, 1], pneumonia, CONFIDENCE),
    )
    accuracy = wilson_interval(int(right.sum()), len(right), CONFIDENCE)
    if accuracy is None or area is None or area_interval is None:
        raise RuntimeError("the test split lacks a class")
    return {
        "seed": seed,
        "training": result.summary,
        "seconds": time.monotonic() - began,
        "images": len(right),
        "accuracy": accuracy.value,
        "accuracy_interval": [accuracy.low, accuracy.high],
        "auc": area,
        "auc_interval": [area_interval.low, area_interval.high],
        "recall_normal": float(right[~pneumonia].mean()),
        "recall_pneumonia": float(right[pneumonia].mean()),
    }


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds, with Student's interval of what another seed would change."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def report(runs: list[dict[str, Any]]) -> None:
    print(f"\n  test split, {runs[0]['images']} images; in brackets the {CONFIDENCE:.0%} interval of the sample")
    print("  seed  accuracy              AUC                   recall: normal  pneumonia  training")
    for run in runs:
        accuracy, area = (_bracketed(run[name], *run[f"{name}_interval"]) for name in ("accuracy", "auc"))
        recalls = f"        {run['recall_normal']:.3f}   {run['recall_pneumonia']:.3f}"
        print(f"  {run['seed']:>4}  {accuracy}  {area}  {recalls}      {run['training']}")
    print(f"\n  {'':<28}  AUC                   accuracy")
    area, accuracy = (_bracketed(*mean_interval([run[name] for run in runs])) for name in ("auc", "accuracy"))
    print(f"  {f'Perch, mean of {len(runs)} seeds':<28}  {area}  {accuracy}  in brackets: over seeds")
    for name, (published_area, published_accuracy) in PUBLISHED.items():
        print(f"  {name:<28}  {published_area:.3f}                 {published_accuracy:.3f}")


def _bracketed(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    source = find_data()
    if source is None:
        print(f"skipped: no {FILE} in $PERCH_TEST_DATA or ../shared/data")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="perch-pneumonia-") as name:
        root = Path(name)
        os.environ["PERCH_HOME"] = str(root / "home")
        prepared = root / "prepared"
        prepare(source, Workspace(prepared))
        # New processes, not forks: PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            futures = [
                pool.submit(train_and_test, source, prepared, root / f"seed-{seed}", seed)
                for seed in range(options.seeds)
            ]
            for future in as_completed(futures):
                run = future.result()
                print(f"  seed {run['seed']}  {run['training']}  {run['seconds']:.0f} s", flush=True)
        runs = [future.result() for future in futures]
    report(runs)
    print(f"\n  {time.monotonic() - began:.0f} s")
    if options.json:
        print(json.dumps(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
