"""Tells people that a task has failed for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseNotifier

from pipelines.notices import send_notice
from pipelines.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk import Context


class FailureNotice(BaseNotifier):
    """One notice per task that failed after its last try: what, which run, why, and where the log is."""

    def notify(self, context: Context) -> None:
        """Send the notice."""
        task = context["ti"]
        address = get_settings().airflow_uri
        log = f"{address}/dags/{task.dag_id}/runs/{task.run_id}/tasks/{task.task_id}" if address else "in Airflow"
        send_notice(
            f"{task.dag_id}: {task.task_id} failed",
            f"run {task.run_id}, try {task.try_number}\n{context.get('exception') or 'it was killed'}\nlog: {log}",
        )
