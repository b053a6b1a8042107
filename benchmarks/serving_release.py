"""Perch as a user would serve it: a registered version packaged into a release, started with `python -m serving`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_model import BenchModel
from pipelines.core.api_keys import ApiKeyFile, Scope, new_key, write_keys
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class ServedRelease:
    """A release and what its server is given.

    Attributes:
        folder: of this benchmark; the server's files lie below it.
        api_key: may do everything, at any rate.
        slow_key: may predict, and not often.
    """

    folder: Path
    api_key: str
    slow_key: str

    def command(self, port: int) -> list[str]:
        """Serve on a port of the loopback interface."""
        bentoml = str(Path(sys.executable).parent / "bentoml")
        return [
            bentoml,
            "serve",
            "serving.service:service",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--working-dir",
            str(self.folder / "source"),
        ]

    @property
    def predictions(self) -> Path:
        """Folder that keeps the predictions."""
        return self.folder / "predictions"

    def environment(self, port: int, *, workers: int, **settings: object) -> Mapping[str, str]:
        """Everything on: keys, limits, metrics, request log, predictions kept.

        Args:
            port: names the server's spool, so that two servers do not share one.
            workers: processes.
            settings: more fields of `ServingSettings`.
        """
        given = {
            "workers": workers,
            "api_keys_file": self.folder / "api-keys.json",
            "predictions_url": self.predictions,
            "spool_dir": self.folder / f"spool-{port}",
            **settings,
        }
        return {f"PERCH_SERVING_{name.upper()}": str(value) for name, value in given.items()}


def prepare_release(_settings: Settings, model: BenchModel, folder: Path) -> ServedRelease:
    """Package a registered version and make its keys."""
    source = folder / "source"
    for package in ("serving", "pipelines"):
        shutil.copytree(PROJECT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "release").mkdir()
    onnx = model.onnx
    shutil.copyfile(onnx, source / "release" / "model.onnx")
    import hashlib

    from pipelines.core.release_unit import ReleaseManifest

    digest = hashlib.sha256(onnx.read_bytes()).hexdigest()
    m = ReleaseManifest(
        model=model.name,
        version=str(model.version),
        labels=model.contract.labels,
        input=model.contract.input,
        metrics={},
        run_id="x",
        mlflow_run_id="x",
        git_sha="0" * 40,
        service_git_sha="0" * 40,
        data_sha256=digest,
        onnx_sha256=digest,
        registered_at="2026-11-21T00:00:00Z",
    )
    (source / "release" / "release.json").write_text(m.model_dump_json())
    key, record = new_key("benchmark", tuple(Scope), rate_per_s=1e6, burst=10_000_000)
    slow_key, slow = new_key("slow", (Scope.PREDICT,), rate_per_s=5.0, burst=5)
    write_keys(folder / "api-keys.json", ApiKeyFile(keys=(record, slow)))
    return ServedRelease(folder, key, slow_key)
