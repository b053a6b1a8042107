"""Imports MLflow with its patience and its chatter set to ours."""

from __future__ import annotations

import importlib
import logging
import os

# The patience is ours (`be_patient`); the client's own would be four minutes of silence.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Through the server, whatever it offers: else it sends us to its store, which not everybody reaches who reaches it,
    # nor trusts the certificate of.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def import_mlflow() -> None:
    """Set what MLflow reads from the environment before its import, and silence what it says about its own affairs."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    importlib.import_module("mlflow")  # which sets up its loggers, so that ours is the last word
    for logger in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(logger).setLevel(logging.ERROR)
