from pathlib import Path

from pipelines.params import load_params
from pipelines.services.programs import Ports, airflow_environment
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]


def test_airflow__task_whose_process_was_killed__is_tried_again_before_its_rollout_counts_as_abandoned(
    tmp_path: Path,
) -> None:
    environment = airflow_environment(Settings(home=tmp_path), Ports(mlflow=5001, airflow=8080))
    heartbeat_s, dead_s, every_s = (
        float(environment[f"AIRFLOW__SCHEDULER__{name}"])
        for name in (
            "TASK_INSTANCE_HEARTBEAT_TIMEOUT",
            "SCHEDULER_HEALTH_CHECK_THRESHOLD",
            "ORPHANED_TASKS_CHECK_INTERVAL",
        )
    )
    release = load_params(PROJECT / "params.yaml").model_release
    assert heartbeat_s + 10 + 30 < release.abandoned_after_s  # looked for every 10 s
    assert dead_s + every_s + 30 < release.abandoned_after_s  # killed with its scheduler, which has to come back
