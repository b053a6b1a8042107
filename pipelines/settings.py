"""The environment, as one frozen model: where things lie on this machine, never what the pipeline computes.

Every field is an environment variable, `PERCH_` and the field's name in capitals; the defaults need no server.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipelines.environment import read_environment
from pipelines.errors import Refusal


def _is_project(folder: Path) -> bool:
    return (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file()


def _find_project() -> Path:
    """The nearest folder upwards that holds `dvc.yaml` and `params.yaml`, else the current one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _is_project(folder)), here)


# Stages run in their workspace's folder, so a relative path must be settled before it travels to them.
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Settings(BaseSettings):
    """Where Perch finds and keeps things."""

    model_config = SettingsConfigDict(env_prefix="PERCH_", frozen=True, extra="ignore", env_ignore_empty=True)

    project_dir: Folder = Field(default_factory=_find_project, description="Folder with params.yaml and dvc.yaml.")
    home: Folder = Field(
        default_factory=lambda data: data["project_dir"] / ".perch",
        description="Everything Perch writes on this machine.",
    )
    mlflow_uri: str = Field("", description="MLflow's tracking server; empty uses a SQLite file in the home.")
    database_url: str = Field(
        "", repr=False, description="SQLAlchemy URL of the ledger; empty uses a SQLite file in the home."
    )
    airflow_uri: str = Field("", description="Airflow's address, for links; empty leaves the links out.")
    airflow_user: str = Field(
        "", description="Airflow user who reads and gives answers; empty takes those of `passwords.json` in the home."
    )
    airflow_password: str = Field("", repr=False, description="Password of that user.")
    approvers: str = Field(
        "approver", description="Airflow users who may answer a request for approval, separated by spaces."
    )
    promotion_policy: Folder | None = Field(
        None, description="YAML file that says who may approve which model; by default anybody but who asked."
    )
    notice_urls: str = Field(
        "", repr=False, description="Apprise URLs that get notices, separated by spaces; empty logs them."
    )
    retry_delay_s: float = Field(
        15.0, gt=0, description="Seconds before a failed task's second try; doubled each time."
    )
    workers: int = Field(0, ge=0, description="Threads that decode images; 0 takes one per core.")
    s3_endpoint_url: str = Field("", description="Endpoint of an S3-compatible store; empty is AWS.")
    runs_url: str = Field(
        "",
        description="s3://bucket/prefix that runs go through, so that each step can run on another machine; empty "
        "keeps them in the home.",
    )
    tuning_url: str = Field(
        "",
        repr=False,
        description="SQLAlchemy URL of a database of its own for tuning trials that run side by side; empty: none do.",
    )
    runner: str = Field(
        "local", pattern="^(local|kubernetes)$", description="Where Airflow runs steps: in processes here, or in pods."
    )
    pipeline_image: str = Field("", description="Image of the steps' pods, by a tag or digest that does not move.")
    pod_config_maps: str = Field(
        "", description="ConfigMaps whose keys are variables of the steps' pods, separated by spaces."
    )
    pod_secrets: str = Field(
        "", description="Secrets whose keys are variables of the steps' pods, separated by spaces."
    )
    pod_signing_secret: str = Field(
        "", description="Secret with release.pem and release.pub, for the pods that sign and try releases."
    )
    pod_staging_secret: str = Field(
        "", description="Secret with PERCH_STAGING_API_KEY, for the pod that tries a release on a cluster."
    )
    pod_ca_config_map: str = Field(
        "", description="ConfigMap with ca.crt of the authorities that vouch for the store, for the steps' pods."
    )
    pod_pull_secrets: str = Field("", description="Secrets that the image is pulled with, separated by spaces.")
    pod_service_account: str = Field(
        "", description="Service account of the steps' pods, which get no token of it; empty is the namespace's own."
    )
    pod_name: str = Field("", description="Name of this pod, where a step runs in one; its outcome says by which.")
    releases_url: str = Field(
        "", description="Folder or s3://bucket/prefix that keeps releases; empty is a folder in the home."
    )
    predictions_url: str = Field(
        "", description="Folder or s3://bucket/prefix that keeps predictions; empty is a folder in the home."
    )
    signing_key: Folder | None = Field(
        None, description="Private key that signs releases; by default the one that `perch keys init` makes."
    )
    target: str = Field(
        "local", pattern="^(local|kubernetes)$", description="Where releases run: on this machine, or on a cluster."
    )
    kubernetes_namespace: str = Field(
        "", description="Namespace of the chart's installation; empty takes the pod's own, else the kubeconfig's."
    )
    kubernetes_release: str = Field("perch", description="Helm's name of that installation.")
    clients_url: str = Field(
        "", description="Where clients of the cluster send requests; empty takes the route's first host name."
    )
    staging_api_key: str = Field(
        "", repr=False, description="API key by which the cluster's services are asked smoke tests."
    )
    prober_api_key: str = Field(
        "", repr=False, description="API key of the prober on a cluster; empty: there is no prober."
    )
    prometheus_url: str = Field("", description="Prometheus that looks at the cluster's services; empty has no data.")

    def require_home(self) -> Path:
        """The home.

        Raises:
            Refusal: nobody named a home or a project, and none is found upwards: a new home would begin here.
        """
        if not self.model_fields_set & {"home", "project_dir"}:
            self.require_project()
        return self.home

    def require_project(self) -> Path:
        """The folder with `params.yaml` and `dvc.yaml`.

        Raises:
            Refusal: there are none.
        """
        if not _is_project(self.project_dir):
            raise Refusal(
                f"the parameter file {self.project_dir / 'params.yaml'}",
                "not found, or no dvc.yaml beside it",
                way_out="start Perch in the folder of params.yaml, or set PERCH_PROJECT_DIR",
            )
        return self.project_dir

    @property
    def runs_dir(self) -> Path:
        """One folder per run."""
        return self.require_home() / "runs"

    @property
    def dvc_cache_dir(self) -> Path:
        """The cache that all runs share."""
        return self.require_home() / "dvc-cache"

    @property
    def ingest_cache_dir(self) -> Path:
        """What earlier ingestions read, so that the next reads only what is new."""
        return self.home / "ingest-cache"

    @property
    def releases_dir(self) -> Path:
        """Where releases lie when no other place is named."""
        return self.require_home() / "releases"

    @property
    def keys_dir(self) -> Path:
        """Key pairs that sign releases."""
        return self.require_home() / "keys"

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI to use."""
        return self.mlflow_uri or f"sqlite:///{self.require_home() / 'mlflow' / 'mlflow.db'}"

    @property
    def ledger_url(self) -> str:
        """The SQLAlchemy URL to use."""
        return self.database_url or f"sqlite:///{self.require_home() / 'ledger.db'}"

    @property
    def decode_workers(self) -> int:
        """Threads to decode with."""
        return self.workers or len(os.sched_getaffinity(0))


@cache
def get_settings() -> Settings:
    """The settings of this process, read once, at the first call.

    Raises:
        Refusal: a variable holds what it cannot.
    """
    return read_environment(Settings)
