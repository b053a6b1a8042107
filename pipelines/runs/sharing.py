"""A run whose steps are done on any machine: its workspace goes through an S3 bucket, its data through DVC's remote.

Below `PERCH_RUNS_URL`: `dvc/` is the remote that all runs share, and of each run, `runs/<folder>/` holds
`opened.tar` (what opening the run fixed: put once), `progress.tar` (`dvc.lock`, results and all else that steps left
outside DVC: replaced whole, by who knows the one it replaces), `outcomes/<step>.json`, `checkpoints/` and `lease.json`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.core.locking import hold
from pipelines.core.tar_archives import extract
from pipelines.errors import EXIT_OK, PerchError, Refusal, TryLater
from pipelines.runs.run_store import Conflict, Lease, RunStore, Stored, keep_in_step
from pipelines.runs.stages import dvc_command, run_lock, run_tool
from pipelines.runs.workspaces import workspace_of, write_dvc_config
from pipelines.settings import Settings

_OPENED = "opened.tar"
_PROGRESS = "progress.tar"
_FIXED = ("run.json", "params.yaml", "dvc.yaml", "pipelines", "expectations", "reference")
_AT_FIRST = ("tuning",)  # written anew where trials ran side by side
_BROUGHT = ".brought"  # in a workspace that only readers use: what of the bucket it is
_LEASE_WAIT_S = 45.0  # longer than a lease that nobody renews any more
_FETCH_LIMIT_S = 1800.0  # for another process of this machine that fetches the same
_CHECKPOINT_PAUSE_S = 30.0
# What the steps after DVC read of what the stages made; a step that is not named gets everything.
_READS = {"model_packaging": (), "notify_team": ("evaluation",)}


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        by: the pod that did it; empty outside of pods.
        result: of a step that is done, with its `links`.
        error: of one that is not.
    """

    by: str
    result: Mapping[str, Any]
    error: PerchError | None


class NotEnded(TryLater):
    """The bucket answers, and knows no outcome of that step."""


class SharedRun:
    """One run on this machine, and its folder in the bucket.

    Args:
        settings: name the bucket.
        run_id: of the run.
    """

    def __init__(self, settings: Settings, run_id: str) -> None:
        self._settings = settings
        self.workspace = workspace_of(settings, run_id)
        self._store = RunStore(settings, self.workspace.root.name)
        self._progress_tag: str | None = None
        self._is_opened = False
        self._lease: Lease | None = None

    @contextmanager
    def lease(self, what: str) -> Iterator[None]:
        """Keep every other machine off the run for the block.

        Raises:
            TryLater: another one is at work.
        """
        holder = f"{self._settings.pod_name or socket.gethostname()}, process {os.getpid()}, on {what}"
        self._lease = Lease(self._store, holder)
        with self._lease.held(wait_s=_LEASE_WAIT_S):
            yield

    def _require_lease(self) -> None:
        """Before what no condition guards: a node that was cut off may come back after another has gone on.

        Raises:
            TryLater: another machine has the run.
        """
        if self._lease is not None:
            self._lease.require()

    def fetch(self) -> None:
        """Make the workspace on this machine what the bucket says; what a killed step left here is not looked at.

        Large outputs stay where they are until a step needs them.  A run that the bucket does not know is left alone.

        Raises:
            Refusal: this machine has another run of that name.
        """
        opened, progress = self._store.read(_OPENED), self._store.read(_PROGRESS)
        if opened is not None:
            self._bring(opened, progress)

    def fetch_for_reading(self, *paths: str) -> None:
        """As `fetch`, with outputs of stages, for several processes of this machine that only read them.

        What one of them has brought stays as it is for the next, which would else take it from under the first.

        Args:
            paths: of the outputs.

        Raises:
            Refusal: this machine has another run of that name.
            TryLater: a step of the run is at work on this machine, or the bucket does not answer.
        """
        root = self.workspace.root
        with hold(root.with_name(f".fetching-{root.name}"), wait_s=_FETCH_LIMIT_S):
            opened, progress = self._store.read(_OPENED), self._store.read(_PROGRESS)
            if opened is None:
                return
            brought, state = root / _BROUGHT, f"{opened.tag} {progress.tag if progress else ''}"
            if not brought.is_file() or brought.read_text(encoding="utf-8") != state:
                with run_lock(self.workspace):
                    self._bring(opened, progress)
                brought.write_text(state, encoding="utf-8")
            if paths:
                self._dvc("pull", *paths)

    def _bring(self, opened: Stored, progress: Stored | None) -> None:
        self._is_opened = True
        self._progress_tag = progress.tag if progress else None
        self._clear(opened.content)
        for archive in (opened, progress):
            if archive is not None:
                with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
                    extract(tar, self.workspace.root)
        write_dvc_config(self.workspace, self._settings)
        self._fetch_checkpoints()

    def share_opened(self) -> None:
        """Put what opening the run fixed, if it was opened here.

        Raises:
            TryLater: it was opened elsewhere in the meantime.
        """
        if self._is_opened:
            return
        self._store.refuse_without_conditions()
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name in (*_FIXED, *_AT_FIRST):
                tar.add(self.workspace.root / name, name)
        if (self.workspace.root / "dvc.lock").is_file():  # begun before it was shared
            write_dvc_config(self.workspace, self._settings)
            self._dvc("push", "--run-cache")
        try:
            self._store.put(_OPENED, content.getvalue(), replaces=None)
        except Conflict:
            raise TryLater(f"{self.workspace.root.name} was opened by another machine at the same moment") from None
        self._is_opened = True

    @contextmanager
    def checkpoints_shared(self) -> Iterator[None]:
        """Copy the checkpoints to the bucket as they come, so that another machine can go on from them."""
        over, sent = threading.Event(), dict[Path, tuple[int, int]]()
        thread = keep_in_step(lambda: self._share_checkpoints(sent), over, _CHECKPOINT_PAUSE_S)
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._share_checkpoints(sent)

    def fetch_inputs(self, stage: str) -> None:
        """Get the outputs of earlier stages that a step after them reads.

        Raises:
            TryLater: they could not be fetched.
        """
        lock = self.workspace.root / "dvc.lock"
        if not lock.is_file():
            return
        made = {
            out["path"]
            for entry in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values()
            for out in entry.get("outs", [])
            if not out["path"].startswith("results/")
        }
        if wanted := sorted(made & set(_READS.get(stage, tuple(made)))):
            self._dvc("pull", *wanted)

    def share(self, stage: str, *, outputs: bool) -> None:
        """Put what a step left: its outputs, then `dvc.lock` with all small files, which make them known.

        Args:
            stage: whose outputs.
            outputs: whether DVC has outputs of it; a step that failed has none.

        Raises:
            TryLater: the bucket does not answer, or another machine has worked on the run since `fetch`.
        """
        if outputs:
            self._dvc("push", "--run-cache", stage)
        self._require_lease()
        try:
            self._progress_tag = self._store.put(_PROGRESS, self._pack_progress(), replaces=self._progress_tag)
        except Conflict:
            raise TryLater(
                f"{stage} of run {self.workspace.root.name}: another machine has worked on the run meanwhile, and what "
                "was done here is dropped\n  what to do: try again; what that one did is kept"
            ) from None

    def share_outcome(self, stage: str, result: Mapping[str, Any] | None, error: PerchError | None) -> None:
        """Put how a step ended, for whoever started it.

        Raises:
            TryLater: another machine has taken the run over, or the bucket does not answer.
        """
        self._require_lease()
        outcome = {
            "by": self._settings.pod_name,
            "exit_code": error.exit_code if error else EXIT_OK,
            "message": str(error) if error else "",
            "links": dict(error.links) if error else {},
            "result": result,
        }
        self._store.replace(f"outcomes/{stage}.json", json.dumps(outcome, sort_keys=True).encode())

    def forget_outcome(self, stage: str) -> None:
        """A step that begins anew has no outcome, until it has one of its own."""
        self._store.remove(f"outcomes/{stage}.json")

    def outcome(self, stage: str) -> dict[str, Any] | None:
        """How a step ended; None where it never did, or is at work."""
        found = self._store.read(f"outcomes/{stage}.json")
        if found is None:
            return None
        outcome: dict[str, Any] = json.loads(found.content)
        return outcome

    def require_opened(self) -> None:
        """Refuse a run that nobody has shared.

        Raises:
            Refusal: the bucket does not know it.
        """
        if self._store.age_s(_OPENED) == float("inf"):
            raise Refusal(
                f"run {self.workspace.root.name}",
                "not found below PERCH_RUNS_URL",
                limit=self._settings.runs_url,
                way_out="name a run that has begun; Airflow's are called as its DAG runs",
            )

    def _clear(self, opened: bytes) -> None:
        """Remove the workspace here, but for what the machine keeps for itself."""
        root = self.workspace.root
        (root / _BROUGHT).unlink(missing_ok=True)
        # Another run of that name, of which no step was done, was opened here and killed before it was shared.
        if self.workspace.run_file.is_file() and (root / "dvc.lock").is_file():
            with tarfile.open(fileobj=io.BytesIO(opened)) as tar:
                record = tar.extractfile("run.json")
                if record is not None and record.read() != self.workspace.run_file.read_bytes():
                    raise Refusal(
                        f"run {root.name}",
                        f"is another one in {root} than below PERCH_RUNS_URL",
                        limit="one run of a name",
                        way_out="choose another name, or remove that folder",
                    )
        root.mkdir(parents=True, exist_ok=True)
        for path in root.iterdir():
            if path.name in {".dvc", ".dvcignore"} or not (path.name == "checkpoints" or path.name.startswith(".")):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _pack_progress(self) -> bytes:
        """What steps left in the workspace, but for what DVC keeps and what is this machine's own."""
        root = self.workspace.root
        stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
        left_out = {*_FIXED, "checkpoints", *(out for stage in stages for out in _find_kept_by_dvc(stage))}

        def goes_along(path: Path) -> bool:
            return path.as_posix() not in left_out and not path.name.startswith(".")  # locks and drafts stay here

        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for folder, folders, files in os.walk(root):
                here = Path(folder).relative_to(root)
                folders[:] = sorted(name for name in folders if goes_along(here / name))
                for name in sorted(files):
                    if goes_along(here / name):
                        tar.add(root / here / name, (here / name).as_posix())
        return content.getvalue()

    def _fetch_checkpoints(self) -> None:
        """Those of another machine; where this one has its own, they are as good."""
        folder = self.workspace.checkpoints
        names = [] if folder.is_dir() else self._store.names("checkpoints/")
        if not names:
            return
        draft = folder.with_name(f".{folder.name}")  # whole or not at all: the next fetch takes what is there
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name in names:
            self._store.download(name, draft / Path(name).name)
        draft.rename(folder)

    def _share_checkpoints(self, sent: dict[Path, tuple[int, int]]) -> None:
        folder = self.workspace.checkpoints
        files = [file for file in folder.glob("*") if file.suffix != ".partial"] if folder.is_dir() else []
        for file in files:
            try:
                state = file.stat()
                if sent.get(file) != (state.st_mtime_ns, state.st_size):
                    self._require_lease()
                    self._store.upload(f"checkpoints/{file.name}", file)
                    sent[file] = (state.st_mtime_ns, state.st_size)
            except FileNotFoundError:
                continue  # the stage has ended and taken it away
        here = {f"checkpoints/{file.name}" for file in files}
        for name in set(self._store.names("checkpoints/")) - here:
            self._require_lease()
            self._store.remove(name)

    def _dvc(self, *words: str) -> None:
        try:
            run_tool(dvc_command(*words, "--quiet"), self.workspace, self._settings)
        except subprocess.CalledProcessError as error:
            raise TryLater(
                f"`dvc {' '.join(words)}` ended with exit code {error.returncode}; the log above says why\n"
                "  what to do: look whether the object store answers, then try again; nothing is lost"
            ) from None


def _find_kept_by_dvc(stage: Mapping[str, Any]) -> Iterator[str]:
    """A stage's outputs that DVC puts into its cache and its remote; one may stand alone or with options."""
    for out in stage.get("outs", ()):
        ((path, options),) = out.items() if isinstance(out, dict) else [(out, {})]
        if options.get("cache", True):
            yield path


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end this process in order: as the first process of a container, it would otherwise not hear it."""

    def end(_signum: int, _frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def read_outcome(settings: Settings, run_id: str, stage: str) -> Outcome:
    """How a step of a shared run ended.

    Raises:
        Refusal: the bucket knows no such run.
        NotEnded: it has not.
        TryLater: the bucket does not answer.
    """
    shared = SharedRun(settings, run_id)
    found = shared.outcome(stage)
    if found is None:
        shared.require_opened()
        raise NotEnded(f"{stage} of run {run_id} has not ended\n  what to do: wait for it, or look at its pod's log")
    code, message = found["exit_code"], found["message"]
    if code == EXIT_OK:
        return Outcome(found["by"], found["result"], None)
    error = PerchError(message)
    error.exit_code, error.links, error.stage = code, found["links"], stage
    return Outcome(found["by"], {}, error)
