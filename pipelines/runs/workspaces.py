"""Opens the workspace of a run: its parameters, code, suites and reference, fixed for as long as it lives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, date, datetime
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import pipelines
from pipelines.core.results import write_json
from pipelines.core.stage_graph import STEPS_AFTER_DVC, read_stage_graph
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.modeling.preconditions import check_training_preconditions
from pipelines.object_storage.client import CONNECT_TIMEOUT_S
from pipelines.object_storage.settings import S3Settings, read_s3_settings
from pipelines.params import Params, check_params, override
from pipelines.settings import Settings

_RECORDED_PACKAGES = ("numpy", "pillow", "pyarrow", "torch", "pytorch-lightning", "onnx", "onnxruntime", "scikit-learn")
_SNAPSHOT_IGNORE = shutil.ignore_patterns("__pycache__", "*.pyc")


def workspace_of(settings: Settings, run_id: str) -> Workspace:
    """The workspace that belongs to a run id; it need not exist."""
    return Workspace(settings.runs_dir / _folder_name(run_id))


def find_workspace(settings: Settings, run_id: str) -> Workspace:
    """The existing workspace of a run.

    Raises:
        Refusal: there is none; the message names the runs there are.
    """
    workspace = workspace_of(settings, run_id)
    if not workspace.run_file.is_file():
        known = ", ".join(list_runs(settings)[-5:]) or "none"
        raise Refusal(f"run {run_id}", "not found", limit=f"runs here: {known}", way_out="`perch runs` lists all")
    return workspace


def list_runs(settings: Settings) -> list[str]:
    """Run ids on this machine, oldest first."""
    files = settings.runs_dir.glob("[!.]*/run.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [record["run_id"] for record in sorted(records, key=lambda record: record["created"])]


def open_workspace(
    settings: Settings, run_id: str, overrides: Mapping[str, Any], *, requested_by: str = "", as_of: date | None = None
) -> Workspace:
    """Return the run's workspace, and create it at the first call.

    Creation is atomic: a kill leaves either nothing (but a temporary folder) or the whole workspace.

    Args:
        settings: where runs live.
        run_id: any scheduler's name for the run.
        overrides: dotted parameter keys to values.
        requested_by: who asked for the run, for the record.
        as_of: the run's date, used when neither `params.yaml` nor the overrides name one; today when None.

    Raises:
        Refusal: a parameter is bad, training could not begin here, or the run exists with other overrides.
        TryLater: the hub that should have the network's checkpoint does not answer.
    """
    workspace = workspace_of(settings, run_id)
    # As JSON keeps them, from the start: YAML reads a date as a date, and the run's record is JSON.
    overrides = json.loads(json.dumps(dict(sorted(overrides.items())), default=str))
    if workspace.run_file.is_file():
        record = json.loads(workspace.run_file.read_text(encoding="utf-8"))
        if record["run_id"] != run_id:
            raise Refusal(
                f"run {run_id}",
                f"would share the folder {workspace.root.name} with run {record['run_id']}",
                limit="names that differ in letters, digits, dots, dashes or underscores",
                way_out="choose another name",
            )
        recorded = record["overrides"]
        if overrides and recorded != overrides:
            raise Refusal(
                f"run {run_id}",
                f"exists with overrides {recorded}, asked for {overrides}",
                limit="a run's parameters are fixed when it begins",
                way_out="start a new run",
            )
        return workspace

    params = resolve_params(settings, overrides, as_of=as_of)
    _refuse_unknown_steps(settings, params)
    check_training_preconditions(params.model_training)
    _refuse_full_disk(settings.home)
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".opening-", dir=settings.runs_dir) as temporary:
        draft = Workspace(Path(temporary) / "run")
        draft.root.mkdir()
        _fill(draft, settings, params)
        write_json(
            draft.run_file,
            {
                "run_id": run_id,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "requested_by": requested_by,
                "overrides": overrides,
                "python": sys.version.split()[0],
                "packages": recorded_packages(),
                **git_state(settings.project_dir),
            },
        )
        try:
            draft.root.rename(workspace.root)
        except OSError:
            if not workspace.run_file.is_file():
                raise
            # Somebody else opened the same run in the meantime; theirs is as good.
    return workspace


def resolve_params(settings: Settings, overrides: Mapping[str, Any], *, as_of: date | None = None) -> Params:
    """`params.yaml` of the project with overrides, and with the date that this run takes its data as of."""
    file = settings.project_dir / "params.yaml"
    if not file.is_file():
        raise Refusal(
            f"the parameter file {file}",
            "not found",
            way_out="start Perch in the folder of params.yaml, or set PERCH_PROJECT_DIR",
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Refusal(
            f"the parameter file {file}", f"is not YAML: {error}", way_out="mend the line it names, or the one above it"
        ) from None
    params = check_params(override(tree if isinstance(tree, dict) else {}, overrides), name=str(file), own=overrides)
    if params.data_ingestion.as_of is not None:
        return params
    date_ = as_of or datetime.now(UTC).date()
    return params.model_copy(update={"data_ingestion": params.data_ingestion.model_copy(update={"as_of": date_})})


def _refuse_unknown_steps(settings: Settings, params: Params) -> None:
    """Refuse a misspelt step among the pods', which would ask for what every pod does without a word."""
    graph = read_stage_graph(settings.project_dir / "dvc.yaml")
    known = [*(node.name for node in graph), *STEPS_AFTER_DVC, "trials"]
    for step in params.pods.steps:
        if step not in known:
            near = get_close_matches(step, known, n=1)
            raise Refusal(
                f"pods.steps.{step}",
                "there is no such step",
                limit=", ".join(known),
                way_out=f"write {near[0]}, or take it out of params.yaml" if near else "take it out of params.yaml",
            )


def recorded_packages() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: metadata.version(name) for name in _RECORDED_PACKAGES}


def git_state(project: Path) -> dict[str, Any]:
    """Git's commit of the project and whether the tree is clean; from the environment where there is no Git."""
    try:
        sha = _git(project, "rev-parse", "HEAD")
        return {"git_sha": sha, "git_clean": not _git(project, "status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.CalledProcessError):
        return {"git_sha": os.environ.get("PERCH_GIT_SHA", "unknown"), "git_clean": "PERCH_GIT_SHA" in os.environ}


def is_committed(folder: Path) -> bool:
    """Whether Git has every file of a folder as it is now, so that overwriting them loses nothing."""
    try:
        unsaved = _git(folder, "status", "--porcelain", "--ignored", "--", ".")
        return not unsaved and bool(_git(folder, "ls-files", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return False


def _fill(workspace: Workspace, settings: Settings, params: Params) -> None:
    from pipelines.registry.reference import fetch_reference

    write_params(workspace, params)
    shutil.copy2(settings.project_dir / "dvc.yaml", workspace.root / "dvc.yaml")
    code = Path(pipelines.__file__).parent
    shutil.copytree(code, workspace.root / "pipelines", ignore=_SNAPSHOT_IGNORE)
    shutil.copytree(settings.project_dir / "expectations", workspace.expectations)
    fetch_reference(settings, params, workspace.reference)
    write_json(workspace.tuning / "trials.json", {"trials": []})
    write_dvc_config(workspace, settings)


def write_params(workspace: Workspace, params: Params) -> None:
    """Write a run's own `params.yaml`, every key spelt out."""
    text = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    workspace.params_file.write_text(text, encoding="utf-8")


def write_dvc_config(workspace: Workspace, settings: Settings) -> None:
    """Make the workspace a DVC project of its own over the shared cache, as `dvc init --no-scm` would."""
    folder = workspace.root / ".dvc"
    folder.mkdir(exist_ok=True)
    remote = _dvc_remote(settings, folder) if settings.runs_url else ""
    (folder / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
        + ("    remote = shared\n" if remote else "")
        + f"[cache]\n    dir = {settings.dvc_cache_dir.resolve()}\n    type = reflink,hardlink,symlink,copy\n"
        + remote,
        encoding="utf-8",
    )
    (workspace.root / ".dvcignore").write_text("__pycache__/\n", encoding="utf-8")


def _dvc_remote(settings: Settings, folder: Path) -> str:
    """DVC's words for the bucket that runs go through; credentials are those that boto3 finds.

    How often DVC sends a request is not among them: `run_tool` says it in the environment.
    """
    store = read_s3_settings(settings.s3_endpoint_url)
    words = {
        "url": f"{settings.runs_url.rstrip('/')}/dvc",
        "endpointurl": store.endpoint,
        "region": store.region,
        "ssl_verify": str(store.ca_bundle.expanduser()) if store.ca_bundle else "",
        "connect_timeout": f"{max(1, round(min(CONNECT_TIMEOUT_S, store.timeout_s)))}",
        "read_timeout": f"{max(1, round(store.timeout_s))}",
        "configpath": _write_addressing(store, folder / "aws-config"),
        "verify": "true",  # otherwise DVC believes that what a remote gives is what it was asked for
    }
    return "['remote \"shared\"']\n" + "".join(f"    {key} = {value}\n" for key, value in words.items() if value)


def _write_addressing(store: S3Settings, file: Path) -> str:
    """A configuration of boto3 that says where a bucket's name stands, which DVC has no word for; its path.

    Empty where DVC does that anyway, or where boto3 has a configuration already, which this one would hide.
    """
    own = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    if store.addressing in ("auto", "path" if store.endpoint else "virtual") or own.is_file():
        return ""
    file.write_text(f"[default]\ns3 =\n    addressing_style = {store.addressing}\n", encoding="utf-8")
    return str(file.resolve())


def _folder_name(run_id: str) -> str:
    """A run id as a folder's name: Airflow's hold colons and plus signs, which shells and DVC make awkward."""
    if not re.search(r"\w", run_id) or len(run_id) > 200:
        raise Refusal("the run id", repr(run_id), limit="1 to 200 characters with a letter or digit", way_out="name it")
    return re.sub(r"[^A-Za-z0-9._-]", "-", run_id).lstrip(".-")


def _refuse_full_disk(home: Path, needed_bytes: int = 500_000_000) -> None:
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < needed_bytes:
        raise Refusal(
            f"the disk of {home}",
            f"{free / 1e6:.0f} MB free",
            limit=f"{needed_bytes / 1e6:.0f} MB to begin a run",
            way_out="free some space, or set PERCH_HOME to another disk; `perch runs prune` removes old workspaces",
        )


def _git(folder: Path, *arguments: str) -> str:
    completed = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return completed.stdout.strip()
