"""What runs beside the pipeline on one machine: MLflow, Airflow's parts, Envoy and the prediction services."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import EXIT_REFUSED
from pipelines.release.local_layout import ENVOY, LocalLayout
from pipelines.release.local_plan import PROCESSES
from pipelines.services.prediction_service import serving_environment
from pipelines.services.secrets import ROLES, ensure_airflow_keys, passwords_file
from pipelines.settings import Settings

HOST = "127.0.0.1"
# In the environment of all that `perch up` starts.  PERCH_HOME would not do: people export it, to all that they run.
SERVICES_OF = "PERCH_SERVICES_OF"


@dataclass(frozen=True)
class Program:
    """A process to keep alive.

    Attributes:
        name: its name for the supervisor and for people.
        command: program and arguments.
        environment: what it needs beyond the common environment.
        health_url: address that answers 200 when it is ready; empty when running is enough.
        supervision: options for the supervisor that differ from every other program's.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    health_url: str = ""
    supervision: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ports:
    """The TCP ports on the loopback interface."""

    mlflow: int
    airflow: int
    serving: int = 3000

    @property
    def mlflow_uri(self) -> str:
        """MLflow's address."""
        return f"http://{HOST}:{self.mlflow}"

    @property
    def airflow_uri(self) -> str:
        """Airflow's address."""
        return f"http://{HOST}:{self.airflow}"

    @property
    def serving_uri(self) -> str:
        """The address of predictions, which is Envoy's."""
        return f"http://{HOST}:{self.serving}"


def tool(name: str) -> str:
    """A command of this environment, whether or not the environment is activated."""
    return str(Path(sys.executable).parent / name)


def common_environment(settings: Settings, ports: Ports) -> dict[str, str]:
    """Variables that every program gets."""
    return {
        **home_environment(settings),
        "PERCH_MLFLOW_URI": ports.mlflow_uri,
        "PERCH_AIRFLOW_URI": ports.airflow_uri,
        "GIT_PYTHON_REFRESH": "quiet",
    }


def home_environment(settings: Settings) -> dict[str, str]:
    """Whose a program is; by `SERVICES_OF` `perch down` knows what belongs to it."""
    return {
        SERVICES_OF: str(settings.home),
        "PERCH_HOME": str(settings.home),
        "PERCH_PROJECT_DIR": str(settings.project_dir),
        "PYTHONUNBUFFERED": "1",
    }


def airflow_environment(settings: Settings, ports: Ports) -> dict[str, str]:
    """Airflow's configuration: LocalExecutor over SQLite, log-ins from a file, quick to notice and to schedule."""
    home = settings.home / "airflow"
    return {
        **common_environment(settings, ports),
        **ensure_airflow_keys(settings),
        "AIRFLOW_HOME": str(home),
        # DAG files are imported as the package `dags`; the pipelines' own processes do not see this variable.
        "PYTHONPATH": str(settings.project_dir),
        "AIRFLOW__CORE__DAGS_FOLDER": str(settings.project_dir / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:{role}" for user, role in ROLES.items()),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords_file(settings)),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{ports.airflow_uri}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(ports.airflow),
        "AIRFLOW__API__BASE_URL": ports.airflow_uri,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__EXPOSE_CONFIG": "False",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "15",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
        # A task whose process was killed is tried again after this; a rollout must go on before it counts as abandoned.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        # A scheduler looks for lost heartbeats among its own tasks alone; those of one that was killed it finds at this
        # pace, once that one was silent for 30 s.  By default it looks every five minutes.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "30",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "20",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def mlflow_program(settings: Settings, ports: Ports) -> Program:
    """The tracking server and registry, over SQLite and a folder, without its job runner (0.6 GB)."""
    folder = settings.home / "mlflow"
    return Program(
        name="mlflow",
        command=(
            *(tool("mlflow"), "server", "--host", HOST, "--port", str(ports.mlflow), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ),
        environment={
            **common_environment(settings, ports),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        health_url=f"{ports.mlflow_uri}/health",
    )


def airflow_programs(settings: Settings, ports: Ports) -> list[Program]:
    """Airflow's four processes; the first, the API server, must answer before the others start."""
    environment = airflow_environment(settings, ports)
    airflow = tool("airflow")
    return [
        Program("airflow-api", (airflow, "api-server"), environment, f"{ports.airflow_uri}/execution/health"),
        Program("airflow-scheduler", (airflow, "scheduler"), environment),
        Program("airflow-triggerer", (airflow, "triggerer"), environment),
        Program("airflow-dag-processor", (airflow, "dag-processor"), environment),
    ]


def watchdog_program(settings: Settings, ports: Ports) -> Program:
    """The watchdog over releases; it needs neither Airflow nor MLflow to take traffic away."""
    command = (sys.executable, "-m", "pipelines", "watchdog")
    return Program("watchdog", command, common_environment(settings, ports))


def envoy_program(settings: Settings, ports: Ports) -> Program:
    """Envoy, which takes the clients' requests and divides them among the slots."""
    layout = LocalLayout(settings.home)
    return Program(
        name=ENVOY,
        # Restarts by handing over sockets would share memory between the Envoys of a machine.
        command=(tool("envoy"), "--config-path", str(layout.bootstrap_file), "--disable-hot-restart"),
        environment=common_environment(settings, ports),
    )


def slot_programs(settings: Settings, common: dict[str, str]) -> list[Program]:
    """The services of the slots; what each of them serves, the local target says.

    Args:
        settings: of this machine.
        common: variables that every program gets.
    """
    environment = {**common, **serving_environment(settings)}
    # A release that was refused would be refused again.  Whatever else ends is started again: it waits by itself, so
    # that the supervisor need not give up.
    supervision = {"autorestart": "unexpected", "exitcodes": str(EXIT_REFUSED), "startsecs": "0"}
    return [
        Program(
            process,
            (sys.executable, "-m", "pipelines.release.slot_process", process),
            environment,
            supervision=supervision,
        )
        for process in PROCESSES
    ]
