"""What runs there are on this machine, and what differed between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from rich.table import Table

from pipelines.core.workspace import Workspace
from pipelines.runs.locking import hold
from pipelines.runs.pipeline import pipeline_steps
from pipelines.runs.workspaces import find_workspace, list_runs
from pipelines.settings import Settings


@dataclass(frozen=True)
class RunRecord:
    """One run as its workspace tells it.

    Attributes:
        params: the flat parameters, dotted key to value.
        summaries: stage to the line it ended with.
        accuracy: test accuracy with its interval, or None before evaluation.
    """

    run_id: str
    created: str
    git_sha: str
    params: dict[str, Any]
    summaries: dict[str, str]
    accuracy: tuple[float, float, float] | None


def read_run(workspace: Workspace) -> RunRecord:
    """Read a run's record from its workspace."""
    run = json.loads(workspace.run_file.read_text(encoding="utf-8"))
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((workspace.root / "results").glob("*.json"))
    }
    metrics = results.get("model_evaluation", {}).get("metrics")
    names = ("test/accuracy", "test/accuracy_low", "test/accuracy_high")
    return RunRecord(
        run_id=run["run_id"],
        created=run["created"],
        git_sha=run["git_sha"],
        params=flatten(yaml.safe_load(workspace.params_file.read_text(encoding="utf-8"))),
        summaries={stage: result["summary"] for stage, result in results.items()},
        accuracy=(metrics[names[0]], metrics[names[1]], metrics[names[2]]) if metrics else None,
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def runs_table(settings: Settings) -> Table:
    """Runs, oldest first, each with what changed since the one before it."""
    table = Table(
        "run", "created (UTC)", "code", "test accuracy", "last step", "changed since the run before", box=None
    )
    steps = pipeline_steps(settings)
    before: RunRecord | None = None
    for run_id in list_runs(settings):
        record = read_run(find_workspace(settings, run_id))
        accuracy = "{:.3f} \\[{:.3f}, {:.3f}]".format(*record.accuracy) if record.accuracy else ""
        last = max((step for step in steps if step in record.summaries), key=steps.index, default="opened")
        table.add_row(
            record.run_id,
            record.created[:16].replace("T", " "),
            record.git_sha[:7],
            accuracy,
            last,
            _changes(before, record),
        )
        before = record
    return table


def prune_workspaces(settings: Settings, keep: int) -> list[str]:
    """Remove all but the newest `keep` workspaces; one that is at work is left alone.

    Raises:
        TryLater: a process is at work in one of them.
    """
    removed = list_runs(settings)[: -keep or None]
    for run_id in removed:
        workspace = find_workspace(settings, run_id)
        with hold(workspace.root / ".run.lock", wait_s=0):
            shutil.rmtree(workspace.root)
    return removed


def _changes(before: RunRecord | None, record: RunRecord) -> str:
    if before is None:
        return ""
    keys = sorted(before.params.keys() | record.params.keys())
    changes = [
        f"{key} {before.params.get(key)} → {record.params.get(key)}"
        for key in keys
        if before.params.get(key) != record.params.get(key)
    ]
    if before.git_sha != record.git_sha:
        changes.append("code")
    return ", ".join(changes) or "nothing"
