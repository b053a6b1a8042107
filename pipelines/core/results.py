"""What a stage says when it is done: a small JSON, the same for a terminal, Airflow and MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class StageResult(BaseModel):
    """Base of every `XResult`.  It holds no times and no paths of the machine: equal inputs give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    summary: str = Field(description="One line for a person, e.g. `897 images, 0 quarantined`.")
    metrics: dict[str, float] = Field(default_factory=dict, description="`split/name` to value, logged to MLflow.")
    reports: dict[str, str] = Field(
        default_factory=dict, description="Title to a file or folder in the workspace, kept with the MLflow run."
    )


def write_json(path: Path, tree: Any) -> None:
    """Write JSON with sorted keys, atomically: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        OSError: it is not there.
        ValueError: it is no JSON.
    """
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree
