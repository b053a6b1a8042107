"""Tuning trials of a run in several processes: planned, run in shares, and collected into the run's `tuning/`."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from typing import Any

from pipelines.core.locking import hold
from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, PerchError, Refusal
from pipelines.params import load_params
from pipelines.runs.stages import run_lock, run_tool
from pipelines.runs.workspaces import find_workspace
from pipelines.settings import Settings

_LOCK_WAIT_S = 45.0
_INPUTS = ("data/splits", "data/features")


def plan_shares(settings: Settings, run_id: str) -> list[dict[str, int]]:
    """The shares that a run's trials are done in; none where the run does not tune, or in its training alone.

    Raises:
        Refusal: there is no such run.
        TryLater: the bucket does not answer.
    """
    params = load_params(_workspace(settings, run_id).params_file).model_training
    if not settings.tuning_url or params.parallel_trials == 1:
        return []
    of = min(params.parallel_trials, params.trials)
    return [{"share": share, "of": of} for share in range(of)]


def run_share(settings: Settings, run_id: str, share: int, of: int) -> None:
    """Run one share of a run's trials in a process of its own, with the run's own copy of the code.

    Raises:
        TryLater: the share is at work elsewhere on this machine, or the database or the bucket does not answer.
        PerchError: its process failed; its own log says why.
    """
    import subprocess

    _require_database(settings)
    workspace = _workspace(settings, run_id, inputs=True)
    words = ["trials", "run", "--share", str(share), "--of", str(of)]
    with hold(workspace.root / f".trials-{share}.lock", wait_s=_LOCK_WAIT_S):
        try:
            run_tool([sys.executable, "-m", "pipelines", *words], workspace, settings)
        except subprocess.CalledProcessError as error:
            ending = PerchError(
                f"share {share} of the trials of {run_id} ended with exit code {error.returncode}; its log is above"
            )
            if error.returncode in (EXIT_REFUSED, EXIT_TRY_LATER):
                ending.exit_code = error.returncode  # whoever schedules it must know which
            raise ending from None


def run_share_here(settings: Settings, workspace: Workspace, share: int, of: int) -> int:
    """Run one share of the trials of the workspace at hand, in this process; how many trials it has.

    Raises:
        Refusal: there is no such share, or no database is named.
        TryLater: the database does not answer.
    """
    from pipelines.modeling.shared_tuning import run_share as run_trials
    from pipelines.modeling.training_data import load_training_data

    _require_database(settings)
    if not 0 <= share < of:
        raise Refusal("--share", share, limit=f"0 to {of - 1}", way_out="`perch trials plan` lists the shares")
    params = load_params(workspace.params_file)
    return run_trials(
        load_training_data(workspace),
        params.model_training,
        seed=params.seed,
        url=settings.tuning_url,
        name=study_name(workspace),
        share=share,
        of=of,
    )


def collect(settings: Settings, run_id: str) -> int:
    """Write what a run's trials found into its `tuning/`, which training reads; how many there are.

    Raises:
        Refusal: no database is named.
        TryLater: the database or the bucket does not answer, or the run is at work.
    """
    from pipelines.modeling.shared_tuning import collect_trials

    _require_database(settings)

    def write(workspace: Workspace) -> int:
        with run_lock(workspace):
            trials = collect_trials(settings.tuning_url, study_name(workspace))
            write_json(workspace.tuning / "trials.json", {"trials": [asdict(trial) for trial in trials]})
        return len(trials)

    if not settings.runs_url:
        return write(find_workspace(settings, run_id))
    from pipelines.runs.sharing import SharedRun

    shared = SharedRun(settings, run_id)
    with shared.lease("collecting trials"):
        shared.fetch()
        count = write(find_workspace(settings, run_id))
        shared.share("collecting trials", outputs=False)
    return count


def study_name(workspace: Workspace) -> str:
    """A study belongs to a run, whose data and code are fixed, and to the parameters of its trials."""
    params = load_params(workspace.params_file)
    settings = params.model_training.model_dump_json(exclude={"parallel_trials"})  # however many share it
    digest = hashlib.sha256(f"{params.seed} {settings}".encode()).hexdigest()
    record: dict[str, Any] = json.loads(workspace.run_file.read_text(encoding="utf-8"))
    return f"{record['run_id']} {digest[:16]}"


def _workspace(settings: Settings, run_id: str, *, inputs: bool = False) -> Workspace:
    """The run's workspace on this machine, fetched where runs go through a bucket."""
    if not settings.runs_url:
        return find_workspace(settings, run_id)
    from pipelines.runs.sharing import SharedRun

    SharedRun(settings, run_id).fetch_for_reading(*(_INPUTS if inputs else ()))
    return find_workspace(settings, run_id)


def _require_database(settings: Settings) -> None:
    if not settings.tuning_url:
        raise Refusal(
            "PERCH_TUNING_URL",
            "is empty",
            limit="a database that several processes can write to",
            way_out="set it, e.g. to postgresql+psycopg://…/tuning; without it, training runs its trials itself",
        )
