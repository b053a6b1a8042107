"""What runs there are on this machine, and what differed between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from pipelines.core.locking import hold
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, Refusal
from pipelines.params import flatten
from pipelines.runs.pipeline import pipeline_steps
from pipelines.runs.workspaces import find_workspace, list_runs
from pipelines.settings import Settings


@dataclass(frozen=True)
class RunRecord:
    """One run as its workspace tells it.

    Attributes:
        params: the flat parameters, dotted key to value.
        status: how far it came, in words: `registered as v3`, `data_validation refused`, `data_ingestion done`.
        accuracy: test accuracy with its interval, or None before evaluation.
    """

    run_id: str
    created: str
    git_sha: str
    params: dict[str, Any]
    status: str
    accuracy: tuple[float, float, float] | None

    @property
    def subject(self) -> str:
        """What the run is about: only runs of one data set and one model can be compared."""
        return f"{self.params['dataset']} · {self.params['model_name']}"


def read_run(workspace: Workspace, steps: Sequence[str]) -> RunRecord:
    """Read a run's record from its workspace.

    Args:
        workspace: of the run.
        steps: every step of a run, in order.
    """
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
        status=_status(workspace, steps, results),
        accuracy=(metrics[names[0]], metrics[names[1]], metrics[names[2]]) if metrics else None,
    )


def runs_list(settings: Settings) -> RenderableType:
    """Runs by data set and model, oldest first, each with what changed since the one before it.

    A list and not a table: run ids, changed keys and their values are long, and a terminal may be 80 columns wide.
    """
    steps = pipeline_steps(settings)
    subjects: dict[str, list[RunRecord]] = {}
    for run_id in list_runs(settings):
        record = read_run(find_workspace(settings, run_id), steps)
        subjects.setdefault(record.subject, []).append(record)
    lines: list[RenderableType] = []
    for subject, records in sorted(subjects.items(), key=lambda item: item[1][-1].created):
        lines += [*([Text()] if lines else []), Text(subject, "bold")]
        for before, record in zip([None, *records], records, strict=False):
            lines += _describe(before, record)
    return Group(*lines or [Text("no runs here; `perch run` makes one")])


def find_ingested(settings: Settings, run_id: str | None) -> Workspace:
    """The workspace of a run, or of the newest one, that has read its source, were it only to refuse it.

    Raises:
        Refusal: there is no such run, or it has not read its source.
    """
    names = [run_id] if run_id is not None else list(reversed(list_runs(settings)))
    for workspace in (find_workspace(settings, name) for name in names):
        if workspace.quarantine_file.is_file():
            return workspace
    raise Refusal(
        f"run {run_id}" if run_id is not None else f"the runs in {settings.runs_dir}",
        "has not ingested, so that nothing was put aside",
        limit="a run that has read its source",
        way_out="`perch data_ingestion --run ID` reads it",
    )


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


def _status(workspace: Workspace, steps: Sequence[str], results: Mapping[str, Any]) -> str:
    """A refusal stands until its step is tried again, so it says more than what was done before it."""
    for step in reversed(steps):
        if workspace.refusal_file(step).is_file():
            refusal = json.loads(workspace.refusal_file(step).read_text(encoding="utf-8"))
            return f"{step} {'refused' if refusal['exit_code'] == EXIT_REFUSED else 'failed, and may work later'}"
    if "model_registration" in results:
        return f"registered as v{results['model_registration']['version']}"
    done = [step for step in steps if step in results]
    return f"{done[-1]} done" if done else "opened, no step done"


def _describe(before: RunRecord | None, record: RunRecord) -> list[RenderableType]:
    created = record.created[:16].replace("T", " ")
    outcome = Text(record.status, "red" if record.status.endswith("refused") else "")
    if record.accuracy:
        outcome.append(" · test accuracy {:.3f} [{:.3f}, {:.3f}]".format(*record.accuracy), "default")
    changes = "" if before is None else f"changed since {before.run_id}: {_changes(before, record)}"
    return [
        Padding(Text(f"{record.run_id}  {created} UTC  code {record.git_sha[:7]}"), (0, 0, 0, 2), expand=False),
        Padding(outcome, (0, 0, 0, 6), expand=False),
        *([Padding(Text(changes, "dim"), (0, 0, 0, 6), expand=False)] if changes else []),
    ]


def _changes(before: RunRecord, record: RunRecord) -> str:
    keys = sorted(before.params.keys() | record.params.keys())
    changes = [
        f"{key} {before.params.get(key)} → {record.params.get(key)}"
        for key in keys
        if before.params.get(key) != record.params.get(key)
    ]
    if before.git_sha != record.git_sha:
        changes.append("code")
    return ", ".join(changes) or "nothing"
