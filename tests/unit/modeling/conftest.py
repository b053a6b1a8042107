"""A finished training's workspace, small and real: handwritten digits, PNG files in shards, a linear model as ONNX."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipelines.core.contract import CONTRACT_KEY, InputContract, ModelContract
from pipelines.core.image_decoding import read_model_input
from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.data.shards import METADATA_COLUMNS, Manifest, ShardWriter

SIDE_PX = 8


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 `(N, 8, 8)` and digits of a training and a test part, the latter shuffled."""
    bunch = load_digits()
    images = (bunch.images * 15.9).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], bunch.target[order]
    return images[:900], labels[:900], images[900:], labels[900:]


@cache
def linear_weights(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 `(64, classes)` and bias of a logistic regression on the first `classes` digits."""
    images, labels, _, _ = digits()
    known = labels < classes
    fitted = LogisticRegression(C=0.02, max_iter=400).fit(images[known].reshape(-1, 64) / 255.0 * 4, labels[known])
    if classes == 2:
        coefficients = np.concatenate([-fitted.coef_, fitted.coef_]) / 2
        return coefficients.T.astype(np.float32), np.concatenate([-fitted.intercept_, fitted.intercept_]).astype(
            "f4"
        ) / 2
    return fitted.coef_.T.astype(np.float32), fitted.intercept_.astype(np.float32)


def write_model(
    path: Path,
    labels: tuple[str, ...],
    *,
    skill: float = 1.0,
    seed: int = 0,
    side_px: int = SIDE_PX,
    temperature: float = 1.0,
) -> str:
    """Write a linear classifier of digits, less skilled by random weights, and return its SHA-256.

    `side_px` 16 makes a model that takes larger images and averages each square of four pixels.
    """
    weights, bias = linear_weights(len(labels))
    noise = np.random.default_rng(seed).normal(0, weights.std(), weights.shape).astype(np.float32)
    weights = (skill * weights + (1 - skill) * 2 * noise) * 4 / 255 / temperature
    contract = ModelContract(input=InputContract(size_px=side_px, channels=1, resize="squash"), labels=labels)
    pool = side_px // SIDE_PX
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[pool, pool], strides=[pool, pool]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", side_px, side_px, 1])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", len(labels)])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias / temperature, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {CONTRACT_KEY: contract.model_dump_json()})
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class EvaluationRun:
    """Makes the files that `model_evaluation` reads; every argument has a sound default."""

    workspace: Workspace
    labels: tuple[str, ...] = ("0", "1", "2")
    test_images: int = 120
    folders: tuple[str, ...] = ("monday", "tuesday")
    records: list[dict[str, object]] = field(default_factory=list)

    def write(self) -> "EvaluationRun":
        """Everything but a champion."""
        images, classes, test_images, test_classes = digits()
        known, test_known = classes < len(self.labels), test_classes < len(self.labels)
        train = list(zip(images[known][:40], classes[known][:40], ["train"] * 40, strict=True))
        test = list(zip(test_images[test_known], test_classes[test_known], strict=True))[: self.test_images]
        payloads = []
        for number, (pixels, digit, split) in enumerate([*train, *((*one, "test") for one in test)]):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            payloads.append(stream.getvalue())
            self.records.append(
                {
                    "key": f"{self.folders[number % len(self.folders)]}/{number:04d}.png",
                    "label": self.labels[int(digit)],
                    "given_split": "",
                    "group": "",
                    "arrived": None,
                    "sha256": hashlib.sha256(payloads[-1]).hexdigest(),
                    "format": "PNG",
                    "mode": "L",
                    "width_px": SIDE_PX,
                    "height_px": SIDE_PX,
                    "n_bytes": len(payloads[-1]),
                    "mean": float(pixels.mean()),
                    "std": float(pixels.std()),
                    "p01": 0.0,
                    "p99": 255.0,
                    "phash": number,
                    "used_split": split,
                    "row": number - 40 if split == "test" else number,
                    "left_out": "",
                    "label_index": int(digit),
                }
            )
        self._write_raw(payloads)
        self._write_splits(payloads)
        validation = [{"type": "t", "column": "mean", "success": True, "observed": "3", "limit": "4"}]
        write_json(
            self.workspace.validation / "validation.json",
            {"suites": [{"name": "images", "success": True, "expectations": validation}], "met": 1, "total": 1},
        )
        write_json(self.workspace.reference / "reference.json", {"kind": "none", "version": None, "onnx_sha256": None})
        self.write_model()
        return self

    def write_model(self, **changes: float) -> None:
        """The model under test."""
        sha256 = write_model(self.workspace.model / "model.onnx", self.labels, **changes)  # type: ignore[arg-type]
        write_json(
            self.workspace.model / "training.json",
            {
                "network": "linear",
                "parameters": 195,
                "onnx_sha256": sha256,
                "best_epoch": 1,
                "epochs_run": 1,
                "stopped_early": False,
                "parity_max_difference": 1e-7,
                "parity_images": 40,
            },
        )

    def write_champion(
        self, labels: tuple[str, ...] | None = None, trained_on: set[str] | None = None, **changes: float
    ) -> None:
        """A champion that was trained on the images with these SHA-256 besides the training split."""
        reference = self.workspace.reference
        sha256 = write_model(reference / "model.onnx", labels or self.labels, **changes)  # type: ignore[arg-type]
        write_json(
            reference / "reference.json", {"kind": "champion", "version": "3", "run_id": "r", "onnx_sha256": sha256}
        )
        table = pd.DataFrame(self.records)
        table.loc[table["sha256"].isin(trained_on or set()), "used_split"] = "train"
        table.to_parquet(reference / "images.parquet")
        (reference / "manifest.json").write_bytes((self.workspace.raw / "manifest.json").read_bytes())

    @property
    def test_sha256(self) -> list[str]:
        """Of the test split, in the order of its rows."""
        return [str(record["sha256"]) for record in self.records if record["used_split"] == "test"]

    def _write_raw(self, payloads: list[bytes]) -> None:
        raw = self.workspace.raw
        raw.mkdir(parents=True)
        order = sorted(range(len(payloads)), key=lambda index: str(self.records[index]["key"]))
        draft = raw / "draft"
        writer = ShardWriter(draft)
        for index in order:
            writer.add({name: self.records[index][name] for name in METADATA_COLUMNS}, payloads[index])
        entry = writer.close()
        draft.rename(raw / entry.name)
        counts = pd.Series([str(record["label"]) for record in self.records]).value_counts()
        Manifest(
            dataset="digits",
            source="digits",
            as_of="2026-11-01",
            labels={str(label): int(count) for label, count in counts.items()},
            rows=len(order),
            quarantined=0,
            shards=[entry],
            data_sha256="ab" * 32,
        ).write(raw)

    def _write_splits(self, payloads: list[bytes]) -> None:
        splits = self.workspace.splits
        splits.mkdir(parents=True)
        pd.DataFrame(self.records).drop(columns="arrived").to_parquet(splits / "images.parquet")
        contract = ModelContract(input=InputContract(size_px=SIDE_PX, channels=1, resize="squash"), labels=self.labels)
        (splits / "contract.json").write_text(contract.model_dump_json())
        test = [
            read_model_input(payload, contract.input, max_pixels=10**6, max_bytes=10**6)
            for payload, record in zip(payloads, self.records, strict=True)
            if record["used_split"] == "test"
        ]
        np.save(splits / "test.npy", np.stack(test) if test else np.zeros((0, SIDE_PX, SIDE_PX, 1), np.uint8))


MakeEvaluationRun = Callable[..., EvaluationRun]


@pytest.fixture
def make_evaluation_run(tmp_path: Path) -> MakeEvaluationRun:
    """Makes a run's workspace up to the trained model; `write_champion` adds what it is compared with."""

    def make(**changes: object) -> EvaluationRun:
        return EvaluationRun(Workspace(tmp_path / "run"), **changes).write()  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def training_data():
    """The digits 0, 1 and 2 as 8 px images: 160 to train on, 60 to validate on; PyTorch keeps to one thread."""
    import torch

    from pipelines.modeling.training_data import LabelledImages, TrainingData

    torch.set_num_threads(1)
    images, labels, more_images, more_labels = digits()
    contract = ModelContract(input=InputContract(size_px=SIDE_PX, channels=1, resize="squash"), labels=("0", "1", "2"))
    train, val = labels < 3, more_labels < 3
    return TrainingData(
        LabelledImages(images[train][:160, ..., None], labels[train][:160]),
        LabelledImages(more_images[val][:60, ..., None], more_labels[val][:60]),
        contract,
        mean=(80.0,),
        std=(95.0,),
        class_weights=np.ones(3, dtype=np.float32),
    )


@pytest.fixture
def training_workspace(training_data, tmp_path: Path) -> Workspace:
    """What `model_training` reads, for `training_data`."""
    workspace = Workspace(tmp_path / "run")
    workspace.splits.mkdir(parents=True)
    tables = []
    for name in ("train", "val"):
        split = getattr(training_data, name)
        np.save(workspace.splits / f"{name}.npy", split.images)
        rows = {"used_split": name, "row": np.arange(len(split)), "label_index": split.labels}
        tables.append(pd.DataFrame(rows).sample(frac=1.0, random_state=0))
    pd.concat(tables).to_parquet(workspace.splits / "images.parquet")
    write_json(workspace.splits / "contract.json", training_data.contract.model_dump(mode="json"))
    statistics = {"mean": [80.0], "std": [95.0], "class_weights": {"0": 1.0, "1": 1.0, "2": 1.0}, "train_images": 160}
    write_json(workspace.features / "statistics.json", statistics)
    return workspace
