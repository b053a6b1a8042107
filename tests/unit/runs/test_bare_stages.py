"""A bare stage leaves its result or its refusal as a file, and an exit code that says whether to try again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, Refusal
from pipelines.runs.stages import run_in_workspace
from pipelines.settings import Settings
from tests.conftest import MountSmallDisk

PROJECT = Path(__file__).parents[3]


def run_bare(folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PERCH_HOME": str(home), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "pipelines", "data_ingestion"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_params(folder: Path, **changes: str) -> None:
    text = (PROJECT / "params.yaml").read_text()
    for before, after in changes.items():
        assert f"  {before}: " in text
        text = "\n".join(
            f"  {before}: {after}" if line.startswith(f"  {before}: ") else line for line in text.splitlines()
        )
    (folder / "params.yaml").write_text(text)


def test_bare_stage__good_input__leaves_its_result(tmp_path: Path) -> None:
    write_params(tmp_path, as_of="2026-11-01")
    done = run_bare(tmp_path, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "data_ingestion.json").read_text())["metrics"]["data/images"] == 897
    assert not (tmp_path / "refusals").exists()


def test_bare_stage__bad_input__leaves_its_refusal_and_exits_65(tmp_path: Path) -> None:
    write_params(tmp_path, as_of="2025-01-01")
    done = run_bare(tmp_path, tmp_path / "home")
    assert done.returncode == EXIT_REFUSED
    record = json.loads((tmp_path / "refusals" / "data_ingestion.json").read_text())
    assert record["exit_code"] == EXIT_REFUSED
    assert record["limit"]
    assert record["way_out"] in done.stderr
    assert "Traceback" not in done.stderr


def test_bare_stage__bad_parameter__names_it_and_exits_65(tmp_path: Path) -> None:
    write_params(tmp_path, shard_images="1")
    done = run_bare(tmp_path, tmp_path / "home")
    assert done.returncode == EXIT_REFUSED
    assert "data_ingestion.shard_images: value 1" in done.stderr


def test_bare_stage__disk_full_in_its_middle__asks_to_try_later(
    mount_small_disk: MountSmallDisk, tmp_path: Path
) -> None:
    small_disk = mount_small_disk(512)
    write_params(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * 350_000)
    done = run_bare(small_disk, tmp_path / "home")
    assert done.returncode == EXIT_TRY_LATER, done.stderr
    assert f"the disk of {small_disk} is full" in done.stderr
    (small_disk / "ballast").unlink()
    again = run_bare(small_disk, tmp_path / "home")
    assert again.returncode == 0, again.stderr


def test_run_in_workspace__step_before_not_done__names_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "r1")
    workspace.root.mkdir()
    shutil.copy2(PROJECT / "dvc.yaml", workspace.root)
    write_json(workspace.result_file("data_ingestion"), {})
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home", _env_file=None)
    with pytest.raises(Refusal, match="data_preprocessing of run r1: needs what data_validation makes") as caught:
        run_in_workspace(settings, workspace, "data_preprocessing")
    assert "perch data_validation --run r1" in caught.value.way_out
