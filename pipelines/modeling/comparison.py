"""The model beside its reference, the champion: both on the same images, which neither was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from pipelines.core.contract import InputContract
from pipelines.core.file_hash import hash_file
from pipelines.core.image_decoding import DecodingError, read_model_input
from pipelines.core.statistics import BoolArray, FloatArray, IntArray
from pipelines.errors import Refusal
from pipelines.modeling.evaluation_data import EvaluationData
from pipelines.modeling.inference import Images, OnnxPredictor, ShowProgress

ReadImages = Callable[[Collection[str]], Mapping[str, bytes]]
"""The encoded bytes of the images with these keys."""

_TRAINED_ON = ("train", "val")
_DECODED_AT_ONCE = 1024


@dataclass(frozen=True)
class Comparison:
    """What the reference says of the images that a fair comparison can use.

    Attributes:
        kind: whether it is the champion, or the latest candidate before any champion; or that there is nobody.
        version: of the registered model, `None` where there is nobody.
        same_file: whether the reference is the very file under test.
        seen: test images left out because the reference was trained on them.
        unknown: test images left out because only one of the two models knows their class.
        labels: the classes that both know.
        rows: int64 `(M,)`, the test images that are left, in order.
        probabilities: float64 `(M, K)` by the reference, in the order of this model's labels; 0 for classes that it
            does not know.
        reference_only: classes that this model has lost.
        model_only: classes that the reference does not know.
    """

    kind: Literal["champion", "candidate", "none"]
    version: str | None
    same_file: bool
    seen: int
    unknown: int
    labels: tuple[str, ...]
    rows: IntArray
    probabilities: FloatArray
    reference_only: tuple[str, ...] = ()
    model_only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As a person says it: `champion v3`."""
        return f"{self.kind} v{self.version}" if self.version else "no champion yet"


def compare(
    data: EvaluationData,
    model_file: Path,
    reference: Path,
    read_images: ReadImages,
    show_progress: ShowProgress,
) -> Comparison:
    """Ask the reference about the test images.

    An image is left out where the reference's run had its bytes, by SHA-256, in training or validation, or where the
    reference does not know its class.  Where the reference takes images of another shape, they are made anew from the
    original bytes.

    Args:
        data: the test split.
        model_file: the model under test.
        reference: the workspace's folder of that name.
        read_images: reads original bytes by key.
        show_progress: of the reference's answers.

    Raises:
        Refusal: the reference is incomplete, or not the file that was registered.
    """
    description = json.loads((reference / "reference.json").read_text(encoding="utf-8"))
    if description["kind"] == "none":
        nobody = np.zeros(0, dtype=np.int64)
        return Comparison("none", None, False, 0, 0, (), nobody, np.zeros((0, len(data.contract.labels))))
    predictor = OnnxPredictor(reference / "model.onnx")
    sha256 = hash_file(reference / "model.onnx")
    if description["onnx_sha256"] not in (None, sha256):
        raise Refusal(
            f"the reference model {description['kind']} v{description['version']}",
            f"has SHA-256 {sha256[:16]}…",
            limit=f"{description['onnx_sha256'][:16]}… was registered",
            way_out="the file in reference/ was changed; open a new run",
        )
    labels = data.contract.labels
    theirs = predictor.contract.labels
    common = tuple(label for label in labels if label in theirs)
    seen = _trained_on(data.table, reference)
    known = data.table["label"].isin(common).to_numpy()
    rows = np.flatnonzero(~seen & known)
    probabilities = np.zeros((len(rows), len(labels)))
    if len(rows):
        with show_progress(f"asking {description['kind']} v{description['version']} about", len(rows)) as progress:
            predictor.observe = progress.advance
            found = predictor.predict_batches(_shaped_images(data, rows, predictor.contract.input, read_images))
        for label in common:
            probabilities[:, labels.index(label)] = found[:, theirs.index(label)]
    return Comparison(
        kind=description["kind"],
        version=description["version"],
        same_file=sha256 == hash_file(model_file),
        seen=int(seen.sum()),
        unknown=int((~seen & ~known).sum()),
        labels=common,
        rows=rows,
        probabilities=probabilities,
        reference_only=tuple(label for label in theirs if label not in labels),
        model_only=tuple(label for label in labels if label not in theirs),
    )


def _trained_on(table: pd.DataFrame, reference: Path) -> BoolArray:
    """Which images the reference's run used in training or validation: bool `(N,)`."""
    theirs = pd.read_parquet(reference / "images.parquet", columns=["sha256", "used_split"])
    used = theirs.loc[theirs["used_split"].isin(_TRAINED_ON), "sha256"]
    return table["sha256"].isin(used).to_numpy(dtype=np.bool_)


def _shaped_images(
    data: EvaluationData, rows: IntArray, contract: InputContract, read_images: ReadImages
) -> Iterator[Images]:
    """The images in the shape that a contract asks for, some at a time."""
    for start in range(0, len(rows), _DECODED_AT_ONCE):
        piece = rows[start : start + _DECODED_AT_ONCE]
        if contract == data.contract.input:
            yield np.asarray(data.images[piece])
        else:
            keys = data.table["key"].iloc[piece].tolist()
            originals = read_images(keys)
            yield np.stack([_shape(key, originals, contract) for key in keys])


def _shape(key: str, originals: Mapping[str, bytes], contract: InputContract) -> Images:
    if key not in originals:
        raise Refusal(
            f"the image {key}", "is in the test split but not in data/raw", way_out="run data_preprocessing again"
        )
    data = originals[key]
    try:
        # Ingestion has held every image against the limits of size already.
        return read_model_input(data, contract, max_pixels=2**62, max_bytes=len(data))
    except DecodingError as error:
        raise Refusal(f"the image {key}", f"cannot be read any more: {error}", way_out="ingest again") from error
