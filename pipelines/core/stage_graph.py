"""Reads the stage graph from `dvc.yaml`, for whoever schedules it: Airflow, the command line, a test."""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import yaml

from pipelines.errors import Refusal

# They change the registry or tell people, so DVC, which would skip them, has no say.
STEPS_AFTER_DVC = ("model_registration", "model_packaging", "deploy_to_staging", "notify_team")


@dataclass(frozen=True)
class StageNode:
    """One stage of `dvc.yaml`.

    Attributes:
        name: the stage's name, and its task id, its section in `params.yaml`, its module and its subcommand.
        description: its `desc`.
        upstream: the stages whose outputs it reads.
        inputs: what it reads that no stage makes.
    """

    name: str
    description: str
    upstream: tuple[str, ...]
    inputs: tuple[str, ...] = ()


def read_stage_graph(file: Path) -> list[StageNode]:
    """The stages of a `dvc.yaml` in an order in which they can run; the file's order where the graph leaves a choice.

    Raises:
        Refusal: there is no such file.
        graphlib.CycleError: the stages wait for each other.
    """
    if not file.is_file():
        raise Refusal(
            f"the stage graph {file}",
            "not found",
            way_out="start Perch in the folder of dvc.yaml and params.yaml, or set PERCH_PROJECT_DIR",
        )
    stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    producers = {
        next(iter(out)) if isinstance(out, dict) else out: name
        for name, stage in stages.items()
        for out in stage.get("outs", [])
    }
    upstream = {
        name: tuple(dict.fromkeys(producers[dep] for dep in stage.get("deps", []) if dep in producers))
        for name, stage in stages.items()
    }
    inputs = {
        name: tuple(dep for dep in stage.get("deps", []) if dep not in producers) for name, stage in stages.items()
    }
    return [
        StageNode(name, stages[name].get("desc", ""), upstream[name], inputs[name])
        for name in TopologicalSorter(upstream).static_order()
    ]
