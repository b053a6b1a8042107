"""The files of a run: one folder per run, with the same layout on a laptop and in a pod.

This module only names paths; `pipelines.runs` creates workspaces, `docs/reference/workspace.md` describes each file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

COMMAND_LINE = "command line"  # who asked for a run, in its record, where a person did in a terminal


@dataclass(frozen=True)
class Workspace:
    """The folder of one run.  A stage reads and writes nothing outside it, apart from caches named in `Settings`."""

    root: Path

    @property
    def params_file(self) -> Path:
        """This run's own `params.yaml`, overrides included."""
        return self.root / "params.yaml"

    @property
    def run_file(self) -> Path:
        """Who started the run, on which code, with which overrides."""
        return self.root / "run.json"

    @property
    def expectations(self) -> Path:
        """Folder with one sub-folder of suites per data set."""
        return self.root / "expectations"

    @property
    def reference(self) -> Path:
        """What the run is compared with, as it stood when the run began."""
        return self.root / "reference"

    @property
    def raw(self) -> Path:
        """Shards of encoded images and `manifest.json`."""
        return self.root / "data" / "raw"

    @property
    def quarantine_file(self) -> Path:
        """What could not be read, and why."""
        return self.root / "data" / "quarantine.parquet"

    @property
    def validation(self) -> Path:
        """Results of the suites and their Data Docs."""
        return self.root / "data" / "validation"

    @property
    def splits(self) -> Path:
        """One uint8 array per split and `index.parquet`."""
        return self.root / "data" / "splits"

    @property
    def features(self) -> Path:
        """Normalisation constants, class weights and the feature table."""
        return self.root / "data" / "features"

    @property
    def model(self) -> Path:
        """The exported model and its training record."""
        return self.root / "model"

    @property
    def evaluation(self) -> Path:
        """Predictions, metrics, verdict and model card."""
        return self.root / "evaluation"

    @property
    def staging(self) -> Path:
        """What the release answered in staging, and what it was held against."""
        return self.root / "staging"

    @property
    def tuning(self) -> Path:
        """Folder with `trials.json`: trials that ran side by side before the training, which it takes as given."""
        return self.root / "tuning"

    @property
    def checkpoints(self) -> Path:
        """Where a killed training resumes from; outside DVC, which would delete it before a second try."""
        return self.root / "checkpoints"

    def result_file(self, stage: str) -> Path:
        """The JSON that a finished stage leaves for whoever reads results."""
        return self.root / "results" / f"{stage}.json"

    def refusal_file(self, stage: str) -> Path:
        """The JSON that a refused stage leaves; DVC does not track it."""
        return self.root / "refusals" / f"{stage}.json"
