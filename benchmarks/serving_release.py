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

_ANY_RATE_PER_S, _ANY_BURST = 1e6, 10_000_000
_SLOW_RATE_PER_S, _SLOW_BURST = 2.0, 2


@dataclass(frozen=True)
class ServedRelease:
    """A release and what its server is given.

    Attributes:
        address: of the release in an artifact store.
        folder: the servers' files lie below it.
        api_key: may do everything, at any rate.
        slow_key: may predict twice a second.
    """

    address: str
    folder: Path
    api_key: str
    slow_key: str

    def command(self, port: int) -> list[str]:
        """Serve on a port of the loopback interface."""
        return [sys.executable, "-m", "serving", self.address, "--host", "127.0.0.1", "--port", str(port)]

    @property
    def predictions(self) -> Path:
        """Folder that keeps the predictions."""
        return self.folder / "predictions"

    def environment(self, port: int, *, workers: int, **settings: object) -> Mapping[str, str]:
        """Everything on: keys, limits, metrics, a log line for each request, predictions kept.

        Args:
            port: names the server's own folders, as if two servers were on two machines.
            workers: processes; 0 is one for each core.
            settings: more fields of `ServingSettings`.
        """
        given = {
            "workers": workers,
            "public_keys": self.folder / "home" / "keys",
            "cache_dir": self.folder / f"cache-{port}",  # empty: a cold start fetches, verifies and unpacks
            "api_keys_file": self.folder / "api-keys.json",
            "predictions_url": self.predictions,
            "spool_dir": self.folder / f"spool-{port}",
            **settings,
        }
        return {f"PERCH_SERVING_{name.upper()}": str(value) for name, value in given.items()}


def prepare_release(settings: Settings, model: BenchModel, folder: Path) -> ServedRelease:
    """Package a registered version in a home of the benchmark's own, and make two API keys.

    Args:
        settings: of the home that the version is registered in; it is only read.
        model: the version.
        folder: of the benchmark.
    """
    from pipelines.stages.model_packaging import package_version

    home = folder / "home"
    home.mkdir()
    if settings.home.joinpath("mlflow").is_dir():  # its files stay where they are: MLflow keeps absolute addresses
        shutil.copytree(settings.home / "mlflow", home / "mlflow", ignore=shutil.ignore_patterns("artifacts"))
    for file in settings.home.glob("ledger.db*"):
        shutil.copy(file, home)
    package = package_version(settings.model_copy(update={"home": home}), model.name, model.version, make_key=True)
    key, record = new_key("benchmark", tuple(Scope), rate_per_s=_ANY_RATE_PER_S, burst=_ANY_BURST)
    slow_key, slow = new_key("slow", (Scope.PREDICT,), rate_per_s=_SLOW_RATE_PER_S, burst=_SLOW_BURST)
    write_keys(folder / "api-keys.json", ApiKeyFile(keys=(record, slow)))
    return ServedRelease(package.address, folder, key, slow_key)
