"""What every task has in common: tries with growing pauses between them, and a notice when the last has failed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from dags.dag_support.notifiers import FailureNotice
from pipelines.settings import get_settings


def default_args() -> dict[str, Any]:
    """Arguments for a DAG's `default_args`."""
    return {
        "owner": "perch",
        "retries": 3,
        "retry_delay": timedelta(seconds=get_settings().retry_delay_s),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=10),
        "on_failure_callback": FailureNotice(),
    }
