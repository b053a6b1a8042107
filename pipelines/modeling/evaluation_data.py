"""What a model is judged on: the test split, with what is known of every image in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipelines.core.contract import ModelContract
from pipelines.core.statistics import IntArray
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.modeling.inference import Images

_COLUMNS = ["key", "label", "group", "sha256", "width_px", "height_px", "mean", "used_split", "row", "label_index"]


@dataclass(frozen=True)
class EvaluationData:
    """The test split.

    Attributes:
        images: uint8 `(N, H, W, C)`, a read-only memory map.
        table: one row per image in the same order: `key`, `label`, `group`, `sha256`, `width_px`, `height_px`, `mean`.
        truth: int64 `(N,)`, indices into the labels.
        contract: the labels and the shape of an image.
    """

    images: Images
    table: pd.DataFrame
    truth: IntArray
    contract: ModelContract

    def __len__(self) -> int:
        return len(self.images)


def load_evaluation_data(workspace: Workspace) -> EvaluationData:
    """Open the test split.

    Raises:
        Refusal: it holds no image, or the array and the table of images disagree.
    """
    contract = ModelContract.model_validate_json((workspace.splits / "contract.json").read_text(encoding="utf-8"))
    images = np.load(workspace.splits / "test.npy", mmap_mode="r")
    table = pd.read_parquet(workspace.splits / "images.parquet", columns=_COLUMNS)
    table = table[table["used_split"] == "test"].sort_values("row").reset_index(drop=True)
    if len(images) == 0:
        raise Refusal(
            "the test split",
            "holds no image",
            limit="at least one",
            way_out="bring more images, or leave a larger share to the test split (data_preprocessing)",
        )
    if len(table) != len(images) or not np.array_equal(table["row"], np.arange(len(images))):
        raise Refusal(
            "data/splits/test.npy",
            f"holds {len(images)} images",
            limit=f"{len(table)} rows, those of data/splits/images.parquet",
            way_out="run data_preprocessing again",
        )
    return EvaluationData(images, table, table["label_index"].to_numpy(np.int64), contract)
