"""What orchestration costs: the same stages as plain Python calls, by `dvc repro`, and as a DAG in Airflow.

    python benchmarks/orchestration.py [--rounds 1] [--epochs 5]

Each way starts from nothing (no caches of an earlier one) on digits as of one date.  Also: `dvc repro` with nothing
changed.  Prints seconds and ratios to the plain calls; services' start-up is not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.core.stage_graph import read_stage_graph
from pipelines.core.workspace import Workspace
from pipelines.runs.workspaces import open_workspace
from pipelines.services.airflow_client import AirflowClient
from pipelines.services.programs import Ports
from pipelines.services.secrets import ensure_passwords
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[1]
STAGES = [node.name for node in read_stage_graph(PROJECT / "dvc.yaml")]
DAG = "ml_training_pipeline"
AS_OF = "2026-11-08"

# One process, one import of everything: what the stages themselves take.
PLAIN = """
import sys
from pathlib import Path
from pipelines.core.workspace import Workspace
from pipelines.runs.stages import run_bare
for stage in sys.argv[1:]:
    run_bare(stage, Workspace(Path.cwd()))
"""


def main() -> None:
    """Measure the three ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as temporary:
        for number in range(arguments.rounds):
            for name, measure in (("plain Python calls", plain), ("dvc repro", dvc_repro), ("DAG in Airflow", dag_run)):
                console.print(f"round {number + 1}: {name}")
                home = Path(temporary) / f"{number}-{name.replace(' ', '-')}"
                for label, took in measure(Settings(project_dir=PROJECT, home=home), arguments.epochs).items():
                    seconds.setdefault(label, []).append(took)
                shutil.rmtree(home, ignore_errors=True)
    baseline = statistics.median(seconds["plain Python calls"])
    table = Table("way", "seconds (median)", "ratio to plain calls", box=None)
    for label, values in seconds.items():
        median = statistics.median(values)
        table.add_row(label, f"{median:.1f}", f"{median / baseline:.2f}")
    Console().print(table)


def plain(settings: Settings, epochs: int) -> dict[str, float]:
    """All stages in one process."""
    workspace = _open(settings, epochs)
    command = [sys.executable, "-c", PLAIN, *STAGES]
    return {"plain Python calls": _timed(lambda: _run(command, workspace, settings))}


def dvc_repro(settings: Settings, epochs: int) -> dict[str, float]:
    """`dvc repro`, twice: the second has nothing to do but ingestion, which always looks at its source."""
    workspace = _open(settings, epochs)
    command = [str(Path(sys.executable).parent / "dvc"), "repro", "--quiet"]
    return {
        "dvc repro": _timed(lambda: _run(command, workspace, settings)),
        "dvc repro, nothing changed": _timed(lambda: _run(command, workspace, settings)),
    }


def dag_run(settings: Settings, epochs: int) -> dict[str, float]:
    """The DAG up to the last stage of `dvc.yaml`, from the trigger to the end of that task."""
    stack = Stack(settings)
    ports = stack.up(lambda _: None, Ports(any_free_port(), any_free_port(), any_free_port()))
    try:
        client = AirflowClient(ports.airflow_uri, "admin", ensure_passwords(settings)["admin"])
        client.wait_for_dag(DAG)

        def run() -> None:
            client.trigger(DAG, "bench", {"as_of": AS_OF, "epochs": epochs})
            while True:
                task = client.tasks(DAG, "bench").get(STAGES[-1])
                if task is not None and task.state in {"success", "failed", "upstream_failed"}:
                    break
                time.sleep(0.2)
            if task.state != "success":
                raise SystemExit(f"the DAG run failed:\n{stack.log_tail('airflow-scheduler')}")

        return {"DAG in Airflow": _timed(run)}
    finally:
        stack.down()


def _open(settings: Settings, epochs: int) -> Workspace:
    return open_workspace(settings, "bench", {"data_ingestion.as_of": AS_OF, "model_training.epochs": epochs})


def _run(command: list[str], workspace: Workspace, settings: Settings) -> None:
    environment = {
        **os.environ,
        "PERCH_HOME": str(settings.home),
        "PERCH_PROJECT_DIR": str(settings.project_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SHELL": "/bin/sh",
    }
    subprocess.run(command, cwd=workspace.root, env=environment, check=True, stdout=subprocess.DEVNULL)


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
