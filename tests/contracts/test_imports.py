"""Who may import whom, what a light start may load, and that the one environment's heavy packages import together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
HEAVY = {
    *("airflow", "boto3", "great_expectations", "lightning", "mlflow", "pandas", "pyarrow", "pytorch_lightning"),
    *("scipy", "sklearn", "sqlalchemy", "torch", "transformers"),
}


def _python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the project and has an empty home."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, "HOME": str(tmp_path), "AIRFLOW_HOME": str(tmp_path / "airflow"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _loaded(code: str, tmp_path: Path) -> set[str]:
    """Top-level packages in memory after running code."""
    report = "import sys; print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    done = _python(f"{code}\n{report}", tmp_path)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded: ")[2].split())


def test_import_rules__as_written_in_pyproject__are_kept() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_import_rules__a_core_that_imports_a_stage__is_found(tmp_path: Path) -> None:
    """The rules are in force: a copy of the project with one forbidden import is refused."""
    for package in ("pipelines", "dags", "serving"):
        for file in (PROJECT / package).rglob("*.py"):
            copy = tmp_path / file.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    (tmp_path / "pipelines/core/forbidden.py").write_text("import pipelines.stages\n")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "pipelines.core.forbidden -> pipelines.stages" in done.stdout


def test_command_line__its_help__loads_nothing_heavy(tmp_path: Path) -> None:
    show_help = "import sys; sys.argv[1:] = ['--help']\ntry: import pipelines.__main__\nexcept SystemExit: pass"
    assert not _loaded(show_help, tmp_path) & {*HEAVY, "dvc", "numpy"}


def test_contracts__imported_by_a_dag_file__load_nothing_heavy(tmp_path: Path) -> None:
    names = ("params", "settings", "errors", "core.stage_graph", "core.workspace", "core.results")
    assert not _loaded("import " + ", ".join(f"pipelines.{name}" for name in names), tmp_path) & HEAVY


def test_dag_files__when_parsed__load_nothing_heavy_but_airflow(tmp_path: Path) -> None:
    names = sorted(file.stem for file in (PROJECT / "dags").glob("[!_]*.py"))
    assert len(names) >= 4
    code = "import " + ", ".join(f"dags.{name}" for name in names)
    assert not _loaded(code, tmp_path) & (HEAVY - {"airflow", "sqlalchemy"})


def test_launcher__until_it_has_verified_a_release__loads_nothing_that_the_release_uses(tmp_path: Path) -> None:
    """It starts in a tenth of a second, and cannot hand the release a module of its own."""
    server = {"bentoml", "_bentoml_sdk", "onnxruntime", "numpy", "starlette", "PIL", "boto3", "model_signing"}
    assert not _loaded("import serving.__main__", tmp_path) & (HEAVY | server)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import airflow.sdk, airflow.providers.standard, airflow.providers.cncf.kubernetes",
        "import mlflow, mlflow.onnx, mlflow.sklearn",
        "import dvc.repo, dvc_s3",
        "import great_expectations",
        "import pytorch_lightning, torch, onnxscript, onnx, onnxruntime",
        "import evidently, pandas; assert pandas.__version__ < '3', pandas.__version__; from evidently import Report",
        "import bentoml",
        "import boto3; boto3.client('s3', region_name='eu-central-1')",
        "import optuna, sklearn.metrics, scipy.stats, matplotlib.pyplot",
        "import transformers; transformers.EfficientNetForImageClassification",
    ],
    ids=lambda code: code.split()[1].strip(",;"),
)
def test_environment__each_heavy_package__imports(code: str, tmp_path: Path) -> None:
    done = _python(code, tmp_path, GX_ANALYTICS_ENABLED="False", BENTOML_DO_NOT_TRACK="True", MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr[-2000:]
