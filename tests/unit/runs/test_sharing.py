"""A run's workspace through a bucket of an S3-speaking server: what a machine brings, and what it leaves alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.cli.printing import print_error
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, Refusal, TryLater
from pipelines.runs.run_store import Lease, RunStore
from pipelines.runs.sharing import SharedRun, read_outcome
from pipelines.runs.stages import run_in_workspace
from pipelines.runs.workspaces import open_workspace, write_dvc_config
from pipelines.settings import Settings, get_settings

PROJECT = Path(__file__).parents[3]
Machine = Callable[[str], SharedRun]


@pytest.fixture
def settings_of(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str], Settings]:
    """Settings of a machine by its name; each has a disk of its own, and all of them the bucket."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    project = tmp_path / "project"
    project.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(PROJECT / name, project)
    shutil.copytree(PROJECT / "expectations", project / "expectations")

    def make(name: str) -> Settings:
        return Settings(
            project_dir=project,
            home=tmp_path / name,
            runs_url=f"s3://perch/sharing/{request.node.name}",
            s3_endpoint_url=endpoint,
        )

    return make


@pytest.fixture
def machine(settings_of: Callable[[str], Settings]) -> Machine:
    return lambda name: SharedRun(settings_of(name), "r")


@pytest.fixture
def opened(settings_of: Callable[[str], Settings], machine: Machine) -> SharedRun:
    """A run that the machine a has opened and shared."""
    open_workspace(settings_of("a"), "r", {})
    shared = machine("a")
    shared.share_opened()
    return shared


def test_fetch_for_reading__second_process_of_a_machine__leaves_what_the_first_reads(
    opened: SharedRun, machine: Machine
) -> None:
    first = machine("b")
    first.fetch_for_reading()
    at_work = first.workspace.root / "data" / "splits.npy"
    at_work.parent.mkdir()
    at_work.touch()
    machine("b").fetch_for_reading()
    assert at_work.is_file()
    (opened.workspace.root / "dvc.lock").write_text("stages: {}\n")
    opened.share("data_ingestion", outputs=False)
    machine("b").fetch_for_reading()
    assert (first.workspace.root / "dvc.lock").is_file()
    assert not at_work.exists()


def test_fetch_for_reading__a_step_was_here_meanwhile__trusts_nothing_of_it(
    opened: SharedRun, machine: Machine
) -> None:
    reader = machine("b")
    reader.fetch_for_reading()
    machine("b").fetch()
    left = reader.workspace.root / "half-written"
    left.touch()  # by a step that was killed
    reader.fetch_for_reading()
    assert not left.exists()


def test_share__stages_of_ones_own__hands_on_what_dvc_does_not_keep(opened: SharedRun, machine: Machine) -> None:
    root = opened.workspace.root
    tree = yaml.safe_load((root / "dvc.yaml").read_text())
    tree["stages"]["told"] = {"cmd": "true", "metrics": [{"results/told.json": {"cache": False}}]}
    tree["stages"]["drawn"] = {"cmd": "true", "outs": [{"plot.svg": {"cache": False}}, {"large": {"persist": True}}]}
    (root / "dvc.yaml").write_text(yaml.safe_dump(tree))
    for name in ("plot.svg", "large"):
        (root / name).touch()
    opened.share("drawn", outputs=False)
    there = machine("b")
    there.fetch()
    assert (there.workspace.root / "plot.svg").is_file()
    assert not (there.workspace.root / "large").exists()


def test_fetch__run_of_that_name_opened_here_and_never_begun__gives_way_to_the_shared_one(
    opened: SharedRun, machine: Machine, settings_of: Callable[[str], Settings]
) -> None:
    own = open_workspace(settings_of("b"), "r", {"seed": 11})
    other = own.run_file.read_bytes()
    machine("b").fetch()
    assert own.run_file.read_bytes() == opened.workspace.run_file.read_bytes() != other


def test_fetch__run_of_that_name_with_a_step_done_here__is_refused_and_kept(
    opened: SharedRun, machine: Machine, settings_of: Callable[[str], Settings]
) -> None:
    own = open_workspace(settings_of("b"), "r", {"seed": 11})
    (own.root / "dvc.lock").write_text("stages: {}\n")
    other = own.run_file.read_bytes()
    with pytest.raises(Refusal, match="is another one in"):
        machine("b").fetch()
    assert own.run_file.read_bytes() == other


def test_fetch__broken_off_among_the_checkpoints__leaves_none_and_the_next_brings_all(
    opened: SharedRun, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.workspace.checkpoints.mkdir()
    for name in ("study.json", "trial-1.ckpt"):
        (opened.workspace.checkpoints / name).write_text(name)
    with opened.checkpoints_shared():
        pass
    download = RunStore.download

    def fail_at_the_second(self: RunStore, name: str, file: Path) -> None:
        if name.endswith(".ckpt"):
            raise TryLater("gone")
        download(self, name, file)

    other = machine("b")
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "download", fail_at_the_second)
        with pytest.raises(TryLater, match="gone"):
            other.fetch()
    assert not other.workspace.checkpoints.exists()
    other.fetch()
    assert {file.name for file in other.workspace.checkpoints.iterdir()} == {"study.json", "trial-1.ckpt"}


def test_upload__file_replaced_between_two_parts__is_the_one_that_it_began_with(
    opened: SharedRun, tmp_path: Path
) -> None:
    store, file = opened._store, tmp_path / "epoch.ckpt"
    first, second = (bytes([value]) * (20 * 2**20) for value in (1, 2))  # three parts
    file.write_bytes(first)

    def replace(**_: Any) -> None:
        newer = file.with_suffix(".partial")
        newer.write_bytes(second)
        newer.replace(file)

    store._client.meta.events.register("before-call.s3.CreateMultipartUpload", replace)
    store.upload("checkpoints/epoch.ckpt", file)
    store.download("checkpoints/epoch.ckpt", tmp_path / "copy.ckpt")
    assert file.read_bytes() == second
    assert (tmp_path / "copy.ckpt").read_bytes() == first


def test_outcome__of_a_refusal__is_one_for_who_asks_later(
    opened: SharedRun, settings_of: Callable[[str], Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    opened.share_outcome("data_validation", None, Refusal("the suite images", "failed", limit="all met"))
    with pytest.raises(TryLater, match="data_ingestion of run r has not ended"):
        read_outcome(settings_of("b"), "r", "data_ingestion")
    with pytest.raises(Refusal, match="run week-9: not found below PERCH_RUNS_URL"):
        read_outcome(settings_of("b"), "week-9", "data_ingestion")
    error = read_outcome(settings_of("b"), "r", "data_validation").error
    assert error is not None
    assert error.exit_code == EXIT_REFUSED
    print_error(error)
    assert capsys.readouterr().err == "data_validation refused: the suite images: failed (limit: all met)\n"


def test_outcome__as_json__tells_a_step_that_has_not_ended_from_a_bucket_that_is_away(
    opened: SharedRun, settings_of: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of("b")
    for name in ("project_dir", "home", "runs_url", "s3_endpoint_url"):
        monkeypatch.setenv(f"PERCH_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")

    def ask() -> Any:
        get_settings.cache_clear()
        return CliRunner().invoke(app, ["runs", "outcome", "r", "data_ingestion", "--json"])

    try:
        said = ask()
        assert said.exit_code == EXIT_TRY_LATER
        assert "data_ingestion of run r has not ended" in said.output
        assert said.output.splitlines()[-1] == '{"by": ""}'
        monkeypatch.setenv("PERCH_S3_ENDPOINT_URL", "http://127.0.0.1:9")
        said = ask()
        assert isinstance(said.exception, TryLater)
        assert "{" not in said.output
    finally:
        get_settings.cache_clear()


def test_lease__taken_over_while_its_holder_was_held_up__lets_that_change_nothing(
    opened: SharedRun, machine: Machine
) -> None:
    other = machine("b")
    opened.workspace.checkpoints.mkdir()
    (opened.workspace.checkpoints / "epoch-3.ckpt").touch()
    with opened.lease("model_training"):
        Lease(opened._store, "pod b", lease_s=0)._take(wait_s=0)  # the first one's has ended
        other._store.replace("checkpoints/epoch-5.ckpt", b"")
        other.share_outcome("model_training", {"summary": "done by b", "links": {}}, None)
        for attempt in (
            lambda: opened._share_checkpoints({}),
            lambda: opened.share_outcome("model_training", None, TryLater("broken off")),
            lambda: opened.share("model_training", outputs=False),
        ):
            with pytest.raises(TryLater, match="pod b has taken the run over"):
                attempt()
        shutil.rmtree(opened.workspace.checkpoints)
        with pytest.raises(TryLater, match="taken the run over"):  # and nor does it remove what is not its own
            opened._share_checkpoints({})
    assert other._store.names("checkpoints/") == ["checkpoints/epoch-5.ckpt"]
    assert other.outcome("model_training")["result"]["summary"] == "done by b"  # type: ignore[index]
    assert other._store.read("progress.tar") is None


def test_lease__ended_and_taken_by_nobody__is_still_its_holders(opened: SharedRun) -> None:
    lease = Lease(opened._store, "pod a", lease_s=0)
    lease._take(wait_s=0)
    lease.require()


def test_run_in_workspace__remote_away_when_dvc_wants_the_inputs__may_be_tried_later(
    opened: SharedRun, settings_of: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")  # seconds pass between two
    away = settings_of("a").model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    write_dvc_config(opened.workspace, away)
    with pytest.raises(TryLater, match="before the stage began") as caught:
        run_in_workspace(away, opened.workspace, "data_ingestion")
    assert "PERCH_RUNS_URL" in str(caught.value)
    write_dvc_config(opened.workspace, settings_of("a"))
    assert run_in_workspace(settings_of("a"), opened.workspace, "data_ingestion")["summary"]
