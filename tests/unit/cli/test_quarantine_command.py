"""`perch quarantine` shows what a run put aside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.data.ingest_cache import QUARANTINE_SCHEMA
from pipelines.errors import Refusal
from pipelines.settings import Settings, get_settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(tmp_path))
    monkeypatch.setenv("PERCH_HOME", str(tmp_path / ".perch"))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def make(settings: Settings, run_id: str, minute: int, *, files: int | None) -> Workspace:
    workspace = Workspace(settings.runs_dir / run_id)
    write_json(workspace.run_file, {"run_id": run_id, "created": f"2026-11-01T02:{minute:02}:00+00:00"})
    if files is not None:
        workspace.quarantine_file.parent.mkdir(parents=True)
        rows = [
            {"key": f"a/{n}.png", "label": "a", "reason": "corrupt" if n else "empty", "detail": "is [broken]"}
            for n in range(files)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), workspace.quarantine_file)
    return workspace


def test_quarantine__no_run_named__shows_the_newest_that_has_ingested(settings: Settings) -> None:
    make(settings, "old", 1, files=0)
    workspace = make(settings, "new", 2, files=3)
    make(settings, "newest", 3, files=None)
    result = CliRunner().invoke(app, ["quarantine", "--limit", "2"])
    assert result.output.splitlines() == [
        f"run new quarantined 2 corrupt, 1 empty · {workspace.quarantine_file}",
        "  a/0.png  empty: is [broken]",
        "  a/1.png  corrupt: is [broken]",
        "  and 1 more; --limit 0 lists all",
    ]
    assert "a/2.png" in CliRunner().invoke(app, ["quarantine", "--limit", "0"]).output
    assert "run old quarantined nothing" in CliRunner().invoke(app, ["quarantine", "old"]).output


@pytest.mark.parametrize("arguments", [[], ["r1"]])
def test_quarantine__nothing_ingested__says_how_to(settings: Settings, arguments: list[str]) -> None:
    make(settings, "r1", 1, files=None)
    error = CliRunner().invoke(app, ["quarantine", *arguments]).exception
    assert isinstance(error, Refusal)
    assert "perch data_ingestion --run" in error.way_out
