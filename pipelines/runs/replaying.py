"""Does a past run again, from what it recorded, and compares what came out."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pipelines.core.stage_graph import read_stage_graph
from pipelines.core.tar_archives import extract
from pipelines.core.workspace import COMMAND_LINE, Workspace
from pipelines.errors import PerchError, Refusal
from pipelines.runs.stages import read_result, run_in_workspace, run_lock
from pipelines.runs.workspaces import recorded_packages, workspace_of, write_dvc_config
from pipelines.settings import Settings

_SNAPSHOT = ("pipelines", "expectations", "dvc.yaml")


@dataclass(frozen=True)
class Comparison:
    """A run and its replay, side by side: `(what, before, now)` in the order in which one follows from the other."""

    rows: list[tuple[str, str, str]]
    packages_changed: list[str]

    @property
    def identical(self) -> bool:
        """Whether everything compared came out the same."""
        return all(before == now for _, before, now in self.rows)

    def render(self) -> Table:
        """The comparison for a terminal; the title says the outcome."""
        first = next((what for what, before, now in self.rows if before != now), None)
        title = "data, weights and metrics are identical" if first is None else f"{first} is the first that differs"
        if self.packages_changed:
            title += f"; packages since changed: {', '.join(self.packages_changed)}"
        table = Table("", "recorded", "replayed", "", box=None, title=title, title_justify="left")
        for what, before, now in self.rows:
            table.add_row(what, _short(before), _short(now), "[green]same" if before == now else "[red]differs")
        return table


@dataclass(frozen=True)
class Recording:
    """What a run left for its replay, in a folder laid out like a workspace, wherever it was found."""

    workspace: Workspace
    git_sha: str
    packages: dict[str, str]


def replay_run(settings: Settings, run_id: str, *, from_cache: bool, report: Callable[[str], None]) -> Comparison:
    """Run every stage of a past run again in a workspace of its own and compare.

    The recording is the run's workspace, or, where that was pruned, its MLflow run with the code from Git.

    Args:
        settings: where runs live.
        run_id: the run to do again.
        from_cache: let DVC's run cache answer for stages with known inputs, instead of computing again.
        report: takes one line per stage.

    Raises:
        Refusal: there is no such run, or its code is no longer in Git.
        PerchError: a stage failed.
    """
    with tempfile.TemporaryDirectory(prefix="perch-replay-") as temporary:
        recording = _find_recording(settings, run_id, Path(temporary))
        replay = workspace_of(settings, f"replay__{run_id}")
        shutil.rmtree(replay.root, ignore_errors=True)
        replay.root.mkdir(parents=True)
        for name in (*_SNAPSHOT, "params.yaml", "reference"):
            _copy(recording.workspace.root / name, replay.root / name)
        if recording.workspace.tuning.is_dir():  # runs of earlier versions have none
            _copy(recording.workspace.tuning, replay.tuning)
        write_dvc_config(replay, settings)
        stages = [node.name for node in read_stage_graph(replay.root / "dvc.yaml")]
        for stage in stages:
            with run_lock(replay):
                run_in_workspace(settings, replay, stage, use_run_cache=from_cache)
            report(f"  {stage:<20}  {read_result(replay, stage)['summary']}")
        comparison = _compare(recording, replay)
        shutil.rmtree(replay.root)
        return comparison


def _compare(recording: Recording, replay: Workspace) -> Comparison:
    before, now = recording.workspace, replay
    rows: list[tuple[str, str, str]] = []
    locks = [lock_outs(workspace) for workspace in (before, now)]
    for what, path in (("data", "data/raw"), ("splits", "data/splits"), ("features", "data/features")):
        rows.append((f"{what} ({path})", locks[0].get(path, "none"), locks[1].get(path, "none")))
    training = [read_result(workspace, "model_training") for workspace in (before, now)]
    rows.append(("weights", training[0]["weights_sha256"], training[1]["weights_sha256"]))
    rows.append(("ONNX file", training[0]["onnx_sha256"], training[1]["onnx_sha256"]))
    metrics = [read_result(workspace, "model_evaluation")["metrics"] for workspace in (before, now)]
    rows += [
        (name, str(metrics[0].get(name)), str(metrics[1].get(name)))
        for name in sorted(metrics[0].keys() | metrics[1].keys())
    ]
    installed = recorded_packages()
    changed = [
        f"{name} {version} → {installed.get(name)}"
        for name, version in recording.packages.items()
        if installed.get(name) != version
    ]
    return Comparison(rows, changed)


def _find_recording(settings: Settings, run_id: str, into: Path) -> Recording:
    workspace = workspace_of(settings, run_id)
    if not workspace.run_file.is_file():
        from pipelines.registry.recordings import download_recording

        workspace = Workspace(into)
        download_recording(settings, run_id, into)
        run = json.loads(workspace.run_file.read_text(encoding="utf-8"))
        _checkout(settings.project_dir, run["git_sha"], into)  # the stage graph of its commit, too
    run = json.loads(workspace.run_file.read_text(encoding="utf-8"))
    missing = [stage for stage in ("model_training", "model_evaluation") if not workspace.result_file(stage).is_file()]
    if missing:
        raise Refusal(
            f"run {run_id}",
            f"never finished {missing[0]}",
            limit="a replay compares finished runs",
            way_out=f"{_how_to_finish(run)}, or choose another from `perch runs`",
        )
    return Recording(workspace, run["git_sha"], run["packages"])


def _how_to_finish(run: Mapping[str, Any]) -> str:
    """A run goes on where it was started from."""
    if run.get("requested_by") == COMMAND_LINE:
        return f"go on with it by `perch run --run {run['run_id']}`"
    return "clear its failed task in Airflow"


def _checkout(project: Path, sha: str, into: Path) -> None:
    """Put the code, suites and stage graph of a commit into a folder."""
    archive = subprocess.run(
        ["git", "-C", str(project), "archive", "--format=tar", sha, "--", *_SNAPSHOT], capture_output=True, check=False
    )
    if archive.returncode:
        raise Refusal(
            f"the code of commit {sha}",
            archive.stderr.decode(errors="replace").strip(),
            limit="the commit must be in this clone",
            way_out="fetch it, or replay on the machine that still has the run's workspace",
        )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        extract(tar, into)


def lock_outs(workspace: Workspace) -> dict[str, str]:
    """Path to digest of every output in a workspace's `dvc.lock`."""
    lock = yaml.safe_load((workspace.root / "dvc.lock").read_text(encoding="utf-8"))
    return {out["path"]: out.get("md5", "") for stage in lock["stages"].values() for out in stage.get("outs", [])}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    elif source.is_file():
        shutil.copy2(source, target)
    else:
        raise PerchError(f"{source} is missing from the recording; it cannot be replayed")


def _short(text: str) -> str:
    return text[:16] + "…" if len(text) > 24 else text
