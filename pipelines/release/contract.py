"""Reads what a model takes and gives from the ONNX file itself."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.core.contract import CONTRACT_KEY, ModelContract
from pipelines.errors import Refusal


def read_contract(model: Path) -> ModelContract:
    """The contract in an ONNX file.

    Raises:
        Refusal: it carries none, or is no ONNX file.
    """
    import onnx

    try:
        entries = onnx.load(model, load_external_data=False).metadata_props
        return ModelContract.model_validate_json(next(entry.value for entry in entries if entry.key == CONTRACT_KEY))
    except (StopIteration, ValidationError, ValueError) as error:
        raise Refusal(
            f"the model {model.name}",
            "carries no contract of what it takes and gives",
            limit=f"`{CONTRACT_KEY}` among the file's metadata",
            way_out="only models that Perch trained are packaged",
        ) from error
