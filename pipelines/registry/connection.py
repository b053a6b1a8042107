"""The way to MLflow: quiet, patient while it is away, the same over a server and straight on its database.

A server hands artifacts through itself (`mlflow-artifacts:/…`); without one they are files in the home.  Both look at
the same folder, so that a run recorded through the server of `perch up` is readable after `perch down`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit

from pipelines.core.patience import be_patient
from pipelines.errors import PerchError
from pipelines.registry.mlflow_database import ensure_database
from pipelines.registry.mlflow_import import import_mlflow
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

T = TypeVar("T")

_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Mlflow:
    """A client, and where its artifacts are."""

    client: MlflowClient
    settings: Settings

    def artifacts(self, mlflow_run_id: str) -> ArtifactRepository:
        """The artifacts of a run, to be written and read."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri = self.client.get_run(mlflow_run_id).info.artifact_uri
        return get_artifact_repository(self._reachable(uri), tracking_uri=self.settings.tracking_uri)

    @property
    def artifact_location(self) -> str | None:
        """Where a new experiment keeps its artifacts; None leaves it to the server."""
        if is_server(self.settings):
            return None
        return (self.settings.home.resolve() / "mlflow" / "artifacts").as_uri()

    def _reachable(self, artifact_uri: str) -> str:
        """Without a server nobody resolves `mlflow-artifacts:`; its files lie in the folder the server had."""
        parts = urlsplit(artifact_uri)
        if parts.scheme != "mlflow-artifacts" or is_server(self.settings):
            return artifact_uri
        return f"{self.artifact_location}/{parts.path.lstrip('/')}"


def is_server(settings: Settings) -> bool:
    """Whether MLflow is a server, with a web page, rather than a database we open ourselves."""
    return settings.tracking_uri.startswith(("http://", "https://"))


def with_mlflow(settings: Settings, operation: Callable[[Mlflow], T]) -> T:
    """Call an idempotent operation with a connection; begin it again while MLflow is away.

    Raises:
        TryLater: MLflow was away for too long; the message names its address.
        PerchError: MLflow is there and refused.
    """
    import_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = settings.tracking_uri
    name = f"MLflow at {_without_password(uri)}"
    if uri.startswith(_SQLITE):
        ensure_database(Path(uri.removeprefix(_SQLITE)))

    def attempt() -> T:
        return operation(Mlflow(MlflowClient(tracking_uri=uri, registry_uri=uri), settings))

    try:
        return be_patient(attempt, transient=lambda error: _is_away(error, server=is_server(settings)), name=name)
    except MlflowException as error:
        raise PerchError(
            f"{name} refused: {error}\n  what to do: see its log; `perch status` says where it is"
        ) from error


def page_url(settings: Settings, *parts: str) -> str | None:
    """Address of a page of MLflow's web interface, e.g. `("runs", run_id)`; None where there is no server."""
    if not is_server(settings):
        return None
    path = "/".join(quote(part, safe="/") for part in parts)
    return f"{_without_password(settings.tracking_uri).rstrip('/')}/#/{path}"


def _is_away(error: Exception, *, server: bool) -> bool:
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return bool(error.response.status_code >= 500)
    if isinstance(error, MlflowException):
        # A connection that fails is an internal error to the client, too.
        return bool(error.get_http_status_code() >= 500 if server else error.error_code == "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, requests.RequestException | OperationalError)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]).geturl() if "@" in parts.netloc else uri
