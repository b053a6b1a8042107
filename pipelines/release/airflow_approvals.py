"""Answers that people gave in Airflow: read from its API, where they are recorded, and given through it.

The DAG `model_release` asks by Airflow's human-in-the-loop operator.  What counts here is the recorded answer (who,
when, which option) to a text that names the rollout and the hash of its evidence: a task that was marked green has no
answer, and an answer to another text answers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote

from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.release.approval_page import read_marks
from pipelines.release.approvals import ApprovalRequest, Response

DAG_ID = "model_release"
TASK_IDS = ("request_approval", "request_further_approvals")
APPROVE, REJECT = "Approve", "Reject"  # ApprovalOperator's options
COMMENT = "comment"
_PAGE = 100
_LONGEST_NOTE = 1000
_ENDED = {"success", "failed", "skipped", "upstream_failed", "removed"}


class AirflowApi(Protocol):
    """Airflow's REST API as one user."""

    def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, json: Any = None
    ) -> tuple[int, Any]:
        """Ask for a path below `/api/v2`.

        Returns:
            HTTP status, and the JSON of the body.

        Raises:
            TryLater: Airflow does not answer.
        """


@dataclass(frozen=True)
class Ask:
    """A request for an approval as Airflow holds it.

    Attributes:
        run_id: of the run of `model_release`.
        task_id: of the task.
        map_index: of the task; -1 where it is not mapped.
        subject: its headline.
        rollout_id: named in its text; empty where it names none.
        evidence_sha256: named in its text.
        state: of the task, in Airflow's words.
        assigned: ids of the users who may answer; empty: everybody with access.
        asked_at: when, with a zone.
        answered_by: who answered; empty where nobody did, or its time ran out.
        answered_at: None where nobody did.
        option: that was chosen; empty without an answer.
        comment: empty where there is none.
    """

    run_id: str
    task_id: str
    map_index: int
    subject: str
    rollout_id: str
    evidence_sha256: str
    state: str
    assigned: tuple[str, ...]
    asked_at: datetime
    answered_by: str
    answered_at: datetime | None
    option: str
    comment: str

    @property
    def path(self) -> str:
        """Of its API, below `/api/v2`."""
        run, task = quote(self.run_id, safe=""), quote(self.task_id, safe="")
        return f"/dags/{DAG_ID}/dagRuns/{run}/taskInstances/{task}/{self.map_index}/hitlDetails"

    @property
    def source(self) -> str:
        """Where its answer is recorded, for the ledger."""
        mapped = f"/{self.map_index}" if self.map_index >= 0 else ""
        return f"airflow:{DAG_ID}/{self.run_id}/{self.task_id}{mapped}"

    @property
    def page(self) -> str:
        """Of its page, below Airflow's address."""
        mapped = f"/mapped/{self.map_index}" if self.map_index >= 0 else ""
        return f"/dags/{DAG_ID}/runs/{quote(self.run_id, safe='')}/tasks/{self.task_id}{mapped}/required_actions"


class AirflowApprovals:
    """An `ApprovalSource` over Airflow's API.

    Args:
        api: as a user who may see the runs of `model_release`.
    """

    def __init__(self, api: AirflowApi) -> None:
        self._api = api

    def responses(self, request: ApprovalRequest) -> Sequence[Response]:
        """The recorded answers to a request; one that Airflow gave itself, when the time ran out, names nobody."""
        return [
            Response(
                responder=ask.answered_by,
                responded_at=ask.answered_at,
                approves=ask.option == APPROVE,
                evidence_sha256=ask.evidence_sha256,
                comment=ask.comment,
                source=ask.source,
            )
            for ask in self._asks(request.rollout_id, {"response_received": True})
            if ask.rollout_id == request.rollout_id and ask.answered_at is not None and ask.option
        ]

    def open_asks(self, model: str = "", version: str = "") -> list[Ask]:
        """What nobody has answered yet and still waits, oldest first; a task that was ended by hand does not.

        Args:
            model: of this model only.
            version: and of this version only.
        """
        wanted = "".join(f"{part}:" for part in (model, version) if part)
        found = self._asks(wanted, {"response_received": False})
        waiting = [ask for ask in found if ask.rollout_id.startswith(wanted) and ask.state not in _ENDED]
        return sorted(waiting, key=lambda ask: ask.asked_at)

    def answer(self, ask: Ask, *, approve: bool, comment: str) -> None:
        """Answer as the user of the API.

        Raises:
            Refusal: the user may not, or somebody was quicker, or the request is gone.
            TryLater: Airflow does not answer.
        """
        body = {"chosen_options": [APPROVE if approve else REJECT], "params_input": {COMMENT: comment or None}}
        status, found = self._api.call("PATCH", ask.path, json=body)
        if status == HTTPStatus.OK:
            return
        thing = f"the answer to {ask.subject!r}"
        if status == HTTPStatus.FORBIDDEN:
            may = ", ".join(ask.assigned) or "nobody"
            raise Refusal(thing, _detail(found), limit=f"{may} may answer", way_out="answer with --as and one of these")
        if status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
            raise Refusal(
                thing, _detail(found), limit="one answer, once", way_out="`perch approvals` lists what is open"
            )
        raise _unexpected(status, found)

    def leave_note(self, run_id: str, task_id: str, map_index: int, text: str) -> None:
        """Write a note beside a request; unlike its page, Airflow lets it change, and keeps it in the next try.

        Args:
            run_id: of the run of `model_release`.
            task_id: of the task.
            map_index: of the task; -1 where it is not mapped.
            text: replaces the note before it; Airflow takes 1,000 characters.

        Raises:
            Refusal: there is no such task.
            TryLater: Airflow does not answer.
        """
        path = f"/dags/{DAG_ID}/dagRuns/{quote(run_id, safe='')}/taskInstances/{quote(task_id, safe='')}"
        mapped = f"/{map_index}" if map_index >= 0 else ""
        status, found = self._api.call("PATCH", path + mapped, json={"note": text[:_LONGEST_NOTE]})
        if status == HTTPStatus.NOT_FOUND:
            raise Refusal(f"the task {task_id} of {run_id}", _detail(found), way_out="`perch approvals` lists them")
        if status != HTTPStatus.OK:
            raise _unexpected(status, found)

    def _asks(self, mark: str, filters: Mapping[str, Any]) -> Iterator[Ask]:
        offset = 0
        while True:
            params = {"limit": _PAGE, "offset": offset, "order_by": "created_at", **filters}
            if mark:
                params["body_search"] = mark  # only narrows: what it finds is read and compared
            status, found = self._api.call("GET", f"/dags/{DAG_ID}/dagRuns/~/hitlDetails", params=params)
            if status == HTTPStatus.NOT_FOUND:  # no such DAG yet
                return
            if status != HTTPStatus.OK:
                raise _unexpected(status, found)
            page = found["hitl_details"]
            yield from (_read(detail) for detail in page if detail["task_instance"]["task_id"] in TASK_IDS)
            offset += len(page)
            if not page or offset >= found["total_entries"]:
                return


def _read(detail: Mapping[str, Any]) -> Ask:
    task, user = detail["task_instance"], detail.get("responded_by_user") or {}
    rollout_id, evidence_sha256 = read_marks(detail.get("body") or "")
    answered_at = detail.get("responded_at")
    return Ask(
        run_id=task["dag_run_id"],
        task_id=task["task_id"],
        map_index=task["map_index"],
        subject=detail["subject"],
        rollout_id=rollout_id,
        evidence_sha256=evidence_sha256,
        state=str(task.get("state") or ""),
        assigned=tuple(assigned["id"] for assigned in detail.get("assigned_users") or []),
        asked_at=datetime.fromisoformat(detail["created_at"]),
        answered_by=str(user.get("id") or ""),
        answered_at=datetime.fromisoformat(answered_at) if answered_at else None,
        option=next(iter(detail.get("chosen_options") or []), ""),
        comment=str((detail.get("params_input") or {}).get(COMMENT) or ""),
    )


def _detail(found: Any) -> str:
    return str(found.get("detail", found) if isinstance(found, Mapping) else found)


def _unexpected(status: int, found: Any) -> PerchError:
    text = f"Airflow answers {status}: {_detail(found)[:300]}"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
        return TryLater(f"{text}\n  what to do: `perch status`; try again")
    return PerchError(text)
