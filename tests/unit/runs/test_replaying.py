"""A run that never finished cannot be replayed; what to do depends on where it was started."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core.results import write_json
from pipelines.errors import Refusal
from pipelines.runs.replaying import replay_run
from pipelines.runs.workspaces import workspace_of
from pipelines.settings import Settings


@pytest.mark.parametrize(
    ("requested_by", "way_out"),
    [("command line", "perch run --run r1"), ("scheduled", "in Airflow"), ("a user of Airflow", "in Airflow")],
)
def test_replay_run__run_that_never_finished__says_how_to_finish_it(
    tmp_path: Path, requested_by: str, way_out: str
) -> None:
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home", _env_file=None)
    run_file = workspace_of(settings, "r1").run_file
    write_json(run_file, {"run_id": "r1", "created": "", "requested_by": requested_by, "git_sha": "", "packages": {}})
    with pytest.raises(Refusal, match="never finished model_training") as caught:
        replay_run(settings, "r1", from_cache=False, report=print)
    assert way_out in caught.value.way_out
