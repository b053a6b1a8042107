from pathlib import Path

from pipelines.params import load_params
from pipelines.services.programs import Ports, airflow_environment
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]


def test_airflow__task_whose_process_was_killed__is_tried_again_before_its_rollout_counts_as_abandoned(
    tmp_path: Path,
) -> None:
    environment = airflow_environment(Settings(home=tmp_path), Ports(mlflow=5001, airflow=8080))
    noticed_s = float(environment["AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT"]) + 10  # looked for every 10 s
    release = load_params(PROJECT / "params.yaml").model_release
    assert noticed_s + 30 < release.abandoned_after_s  # and the scheduler has to come back
