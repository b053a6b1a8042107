"""The few calls to Airflow's REST API that a person at a terminal needs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx

from pipelines.errors import PerchError, TryLater


@dataclass(frozen=True)
class TaskState:
    """A task of a DAG run as Airflow sees it.

    Attributes:
        state: Airflow's word (running, success, up_for_retry, …), or an empty string before it is scheduled.
        try_number: 1 for the first try.
        duration_s: seconds of the last try, so far or in all; None before it starts.
    """

    task_id: str
    state: str
    try_number: int
    duration_s: float | None


class AirflowClient:
    """Talks to one Airflow as one user; the token is renewed when it runs out."""

    def __init__(self, base_url: str, username: str, password: str) -> None:
        self._credentials = {"username": username, "password": password}
        self._client = httpx.Client(base_url=base_url, timeout=60)

    def wait_for_dag(self, dag_id: str, limit_s: float = 90.0) -> None:
        """Wait until the DAG processor has read the DAG.

        Raises:
            PerchError: the DAG's file does not import; the message is Airflow's.
            TryLater: the DAG did not appear in time.
        """
        deadline = time.monotonic() + limit_s
        while self._request("GET", f"/dags/{dag_id}").status_code != 200:
            errors = self._json("GET", "/importErrors")["import_errors"]
            if errors:
                raise PerchError(f"Airflow cannot import {errors[0]['filename']}:\n{errors[0]['stack_trace']}")
            if time.monotonic() > deadline:
                raise TryLater(f"Airflow has not read the DAG {dag_id} in {limit_s:.0f} s; `perch status` shows why")
            time.sleep(0.5)

    def dag_run_state(self, dag_id: str, run_id: str) -> str | None:
        """State of a DAG run (queued, running, success, failed), or None where there is no such run."""
        response = self._request("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}")
        return None if response.status_code == 404 else str(self._checked(response)["state"])

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Any]) -> None:
        """Start a DAG run with values for its form; one of that id which is there already stays as it is."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf}
        response = self._request("POST", f"/dags/{dag_id}/dagRuns", json=body)
        if response.status_code != httpx.codes.CONFLICT:
            self._checked(response)

    def clear(self, dag_id: str, run_id: str, task_ids: list[str]) -> None:
        """Have tasks of a DAG run run again."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": task_ids, "only_failed": False}
        self._json("POST", f"/dags/{dag_id}/clearTaskInstances", json=body)

    def tasks(self, dag_id: str, run_id: str) -> dict[str, TaskState]:
        """Every task of a DAG run, by task id."""
        found = self._json("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances")["task_instances"]
        return {
            task["task_id"]: TaskState(task["task_id"], task["state"] or "", task["try_number"], _duration_s(task))
            for task in found
        }

    def result(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any] | None:
        """What a finished task returned."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        response = self._request("GET", path, params={"deserialize": "true"})
        value = None if response.status_code == 404 else self._checked(response)["value"]
        return value if isinstance(value, dict) else None

    def links(self, dag_id: str, run_id: str, task_id: str) -> dict[str, str]:
        """The buttons of a task's page: title to address."""
        found = self._json("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/links")
        return {title: address for title, address in found["extra_links"].items() if address}

    def log_tail(self, dag_id: str, run_id: str, task: TaskState, lines: int = 12) -> list[str]:
        """The last lines of a task's log."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task.task_id}/logs/{max(task.try_number, 1)}"
        content = self._json("GET", path, params={"full_content": "true"}, headers={"Accept": "application/json"})
        events = [entry.get("event", "") if isinstance(entry, dict) else str(entry) for entry in content["content"]]
        return [event for event in events if event][-lines:]

    def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, json: Any = None
    ) -> tuple[int, Any]:
        """Ask for any path below `/api/v2`.

        Returns:
            HTTP status, and the JSON of the body; its text where it is none.

        Raises:
            TryLater: Airflow does not answer.
        """
        response = self._request(method, path, params=params, json=json)
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, response.text

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._client.request(method, f"/api/v2{path}", **kwargs)
            if response.status_code == 401:
                token = self._checked(self._client.post("/auth/token", json=self._credentials))["access_token"]
                self._client.headers["Authorization"] = f"Bearer {token}"
                response = self._client.request(method, f"/api/v2{path}", **kwargs)
        except httpx.TransportError as error:
            raise TryLater(f"Airflow at {self._client.base_url}: {error}\n  what to do: `perch status`") from error
        return response

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._checked(self._request(method, path, **kwargs))

    @staticmethod
    def _checked(response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            raise PerchError(
                f"Airflow answered {response.status_code} to {response.request.url}: {response.text[:500]}"
            )
        body: dict[str, Any] = response.json()
        return body


def _duration_s(task: dict[str, Any]) -> float | None:
    if task["start_date"] is None:
        return None
    start = datetime.fromisoformat(task["start_date"])
    end = datetime.fromisoformat(task["end_date"]) if task["end_date"] else datetime.now(start.tzinfo)
    return (end - start).total_seconds()
