"""What a model takes and gives: written into the ONNX file itself, read by evaluation and by the service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

CONTRACT_KEY = "perch.contract"  # in the ONNX file's metadata_props
INPUT_NAME = "images"
LOGITS_NAME = "logits"
PROBABILITIES_NAME = "probabilities"


class InputContract(BaseModel):
    """How an image must be shaped before the model sees it: uint8, `(N, size_px, size_px, channels)`, 0-255."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: int
    channels: Literal[1, 3]
    resize: Literal["squash", "pad", "crop"]


class ModelContract(BaseModel):
    """The whole promise of an exported model.

    Input `images`: uint8 `(N, H, W, C)`.  Outputs `logits` and `probabilities`: float32 `(N, len(labels))`, in the
    order of `labels`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    input: InputContract
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
