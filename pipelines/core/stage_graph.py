"""Reads the stage graph from `dvc.yaml`, for whoever schedules it: Airflow, the command line, a test."""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import yaml


@dataclass(frozen=True)
class StageNode:
    """One stage of `dvc.yaml`.

    Attributes:
        name: the stage's name, and its task id, its section in `params.yaml`, its module and its subcommand.
        description: its `desc`.
        upstream: the stages whose outputs it reads.
    """

    name: str
    description: str
    upstream: tuple[str, ...]


def read_stage_graph(file: Path) -> list[StageNode]:
    """The stages of a `dvc.yaml` in an order in which they can run; the file's order where the graph leaves a choice.

    Raises:
        graphlib.CycleError: the stages wait for each other.
    """
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
    return [
        StageNode(name, stages[name].get("desc", ""), upstream[name])
        for name in TopologicalSorter(upstream).static_order()
    ]
