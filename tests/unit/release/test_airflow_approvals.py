"""Reading and giving answers over Airflow's API, as far as it can be tried without an Airflow.

`tests/integration/test_release_in_airflow.py` tries the same against a real one.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.release.airflow_approvals import AirflowApprovals
from pipelines.release.approvals import ApprovalRequest

EVIDENCE = "5d0f" * 16
ROLLOUT = "digits:2:9b1e00000000:3"
ASKED = "2026-11-21T09:00:00.123456Z"


def detail(number: int = 1, *, answered: bool = True, **changes: Any) -> dict[str, Any]:
    """What Airflow 3.3 gives for one request."""
    found = {
        "task_instance": {
            "dag_run_id": f"asset__{number}",
            "task_id": "request_approval",
            "map_index": -1,
            "state": "awaiting_input",
        },
        "subject": "Release digits v2?",
        "body": f"**digits v2**\n\nRollout `{ROLLOUT}` · evidence `{EVIDENCE}`\n\n---\n\n# Card",
        "assigned_users": [{"id": "anna", "name": "anna"}],
        "created_at": ASKED,
        "response_received": answered,
        "responded_by_user": {"id": "anna", "name": "anna"} if answered else None,
        "responded_at": "2026-11-21T09:12:00Z" if answered else None,
        "chosen_options": ["Approve"] if answered else None,
        "params_input": {"comment": "better on 8 and 9"} if answered else {},
    }
    task = {**found["task_instance"], **changes.pop("task_instance", {})}  # type: ignore[dict-item]
    return {**found, **changes, "task_instance": task}


class Airflow:
    """Answers as Airflow does, with pages of the size that was asked for."""

    def __init__(self, *details: dict[str, Any], status: int = 200) -> None:
        self.details, self.status, self.calls = details, status, []  # type: ignore[var-annotated]

    def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, json: Any = None
    ) -> tuple[int, Any]:
        self.calls.append((method, path, json))
        if self.status != 200:
            return self.status, {"detail": "so it is"}
        if method == "PATCH":
            return 200, {}
        params = params or {}
        found = [
            known
            for known in self.details
            if known["response_received"] == params["response_received"]
            and params.get("body_search", "").lower() in known["body"].lower()
        ]
        page = found[params["offset"] : params["offset"] + params["limit"]]
        return 200, {"hitl_details": page, "total_entries": len(found)}


@pytest.fixture
def request_() -> ApprovalRequest:
    return ApprovalRequest(ROLLOUT, "digits", "2", EVIDENCE, "somebody", datetime(2026, 11, 21, 9, tzinfo=UTC))


def test_responses__recorded_answer__says_who_when_what_and_on_which_evidence(request_: ApprovalRequest) -> None:
    (response,) = AirflowApprovals(Airflow(detail())).responses(request_)
    assert (response.responder, response.approves, response.comment) == ("anna", True, "better on 8 and 9")
    assert response.responded_at == datetime(2026, 11, 21, 9, 12, tzinfo=UTC)
    assert response.evidence_sha256 == EVIDENCE
    assert response.source == "airflow:model_release/asset__1/request_approval"


def test_responses__task_without_an_answer__are_none_whatever_its_colour(request_: ApprovalRequest) -> None:
    green = detail(answered=False, task_instance={"state": "success"})
    assert AirflowApprovals(Airflow(green)).responses(request_) == []


def test_responses__time_ran_out__names_nobody(request_: ApprovalRequest) -> None:
    (response,) = AirflowApprovals(
        Airflow(detail(responded_by_user=None, chosen_options=["Reject"], params_input={"comment": None}))
    ).responses(request_)
    assert (response.responder, response.approves, response.comment) == ("", False, "")


def test_responses__answer_to_another_rollout_task_or_page__do_not_count(request_: ApprovalRequest) -> None:
    other = detail(body=f"Rollout `{ROLLOUT}0` · evidence `{EVIDENCE}`")  # its search finds this one, too
    elsewhere = detail(task_instance={"task_id": "request_something"})
    unmarked = detail(body=f"about {ROLLOUT}")
    assert AirflowApprovals(Airflow(other, elsewhere, unmarked)).responses(request_) == []


def test_responses__many_pages__are_all_read(request_: ApprovalRequest) -> None:
    airflow = Airflow(*(detail(number) for number in range(230)))
    found = AirflowApprovals(airflow).responses(request_)
    assert len({response.source for response in found}) == 230


@pytest.mark.parametrize(("status", "error"), [(500, TryLater), (503, TryLater), (429, TryLater), (403, PerchError)])
def test_responses__airflow_refuses__is_no_answer(request_: ApprovalRequest, status: int, error: type) -> None:
    with pytest.raises(error, match=str(status)) as raised:
        AirflowApprovals(Airflow(status=status)).responses(request_)
    assert type(raised.value) is error


def test_responses__no_such_dag_yet__are_none(request_: ApprovalRequest) -> None:
    assert AirflowApprovals(Airflow(status=404)).responses(request_) == []


def test_open_asks__of_a_version__leave_out_other_versions_and_tasks_that_were_ended() -> None:
    asks = AirflowApprovals(
        Airflow(
            detail(1, answered=False),
            detail(3, answered=False, task_instance={"state": "success"}),  # marked green by hand
            detail(2, answered=False, body=f"Rollout `digits:21:9b1e00000000:4` · evidence `{EVIDENCE}`"),
        )
    ).open_asks("digits", "2")
    assert [ask.rollout_id for ask in asks] == [ROLLOUT]
    assert asks[0].assigned == ("anna",)
    assert asks[0].page == "/dags/model_release/runs/asset__1/tasks/request_approval/required_actions"


@pytest.mark.parametrize(
    ("status", "error", "said"), [(403, Refusal, "anna may answer"), (409, Refusal, "once"), (502, TryLater, "502")]
)
def test_answer__airflow_refuses__says_why_and_what_to_do(status: int, error: type, said: str) -> None:
    (ask,) = AirflowApprovals(Airflow(detail(answered=False))).open_asks()
    with pytest.raises(error, match=said):
        AirflowApprovals(Airflow(status=status)).answer(ask, approve=True, comment="")


def test_answer__of_a_mapped_task_whose_run_has_a_colon__goes_to_its_address() -> None:
    task = {"dag_run_id": "asset__2026-11-21T09:00:00+00:00", "map_index": 1, "task_id": "request_further_approvals"}
    airflow = Airflow(detail(answered=False, task_instance=task))
    (ask,) = AirflowApprovals(airflow).open_asks()
    AirflowApprovals(airflow).answer(ask, approve=False, comment="wrong on 7")
    assert airflow.calls[-1] == (
        "PATCH",
        "/dags/model_release/dagRuns/asset__2026-11-21T09%3A00%3A00%2B00%3A00/taskInstances/"
        "request_further_approvals/1/hitlDetails",
        {"chosen_options": ["Reject"], "params_input": {"comment": "wrong on 7"}},
    )


def test_leave_note__long_one__is_cut_to_what_airflow_takes() -> None:
    airflow = Airflow()
    AirflowApprovals(airflow).leave_note("asset__2026-11-21T09:00:00+00:00", "request_approval", -1, "x" * 3000)
    AirflowApprovals(airflow).leave_note("r", "request_further_approvals", 0, "again")
    path = "/dags/model_release/dagRuns/asset__2026-11-21T09%3A00%3A00%2B00%3A00/taskInstances/request_approval"
    assert airflow.calls[0] == ("PATCH", path, {"note": "x" * 1000})
    assert airflow.calls[1][1].endswith("/dagRuns/r/taskInstances/request_further_approvals/0")
    with pytest.raises(Refusal, match="request_approval of r"):
        AirflowApprovals(Airflow(status=404)).leave_note("r", "request_approval", -1, "x")
