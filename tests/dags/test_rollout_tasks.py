"""What the tasks of a release make of what the engine says; the engine itself is tried elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from dags.dag_support import rollout_tasks
from dags.dag_support.candidates import describe_candidate
from dags.dag_support.default_args import default_args
from dags.dag_support.perch_command import CommandOutcome
from dags.dag_support.rollout_tasks import ReleaseApprovalOperator, RolloutSensor, latest_candidate
from pipelines.params import ModelReleaseParams
from pipelines.release.history import as_result
from pipelines.release.rollout_state import Passage, RolloutState
from pipelines.release.steps import PENDING, PROMOTED, ROLLED_BACK, Phase, Plan, Step
from pipelines.release.targets import ReleaseRef

CANARY = Step(Phase.CANARY, 10)


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []
    monkeypatch.setattr(rollout_tasks, "send_notice", lambda title, body: sent.append(f"{title}: {body}"))
    return sent


@pytest.fixture
def sensor() -> RolloutSensor:
    return RolloutSensor(task_id="roll_out", release=ModelReleaseParams())


def state(step: Step, *passed: Step, **changes: Any) -> dict[str, Any]:
    """What `perch releases advance --json` prints of a rollout in this step."""
    passages = tuple(Passage(each.name, number * 60.0) for number, each in enumerate((PENDING, *passed, step)))
    return as_result(
        RolloutState(
            rollout_id="digits:2:9b1e:1",
            release=ReleaseRef("digits", "2", "9b1e", "/releases/9b1e.bento"),
            champion=ReleaseRef("digits", "1", "77ab", "/releases/77ab.bento"),
            requested_by="somebody",
            requested_at=0.0,
            evidence_sha256="5d0f",
            step=step,
            passages=passages,
            **{"plan": Plan(ModelReleaseParams()), **changes},
        )
    )


def test_rollout__promoted_and_settled__ends_and_tells_the_team(sensor: RolloutSensor, notices: list[str]) -> None:
    outcome = sensor.judge(state(PROMOTED, CANARY))
    assert outcome.is_done
    assert len(notices) == 1
    assert notices[0].startswith("digits v2 is the champion: ")


def test_rollout__promoted_but_effects_not_all_there__goes_on(sensor: RolloutSensor, notices: list[str]) -> None:
    assert not sensor.judge(state(PROMOTED, CANARY, settled=False)).is_done
    assert notices == []


def test_rollout__in_a_step__goes_on(sensor: RolloutSensor) -> None:
    assert not sensor.judge(state(CANARY)).is_done


def test_rollout__with_limits_of_its_own__is_looked_at_at_their_pace(
    sensor: RolloutSensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = state(CANARY, plan=Plan(ModelReleaseParams(min_step_s=5, max_step_s=60)))
    monkeypatch.setattr(rollout_tasks, "run_perch", lambda *_: CommandOutcome(0, own))
    task = SimpleNamespace(xcom_pull=lambda task_ids: {"rollout_id": "digits:2:9b1e:1"})
    assert sensor.poke_interval == 10.0
    assert not sensor.poke({"ti": task}).is_done  # type: ignore[typeddict-item]
    assert sensor.poke_interval == 2.0


def test_rollout__its_call_killed_again_and_again__is_called_again_within_seconds(sensor: RolloutSensor) -> None:
    with DAG("d", schedule=None, default_args=default_args()):
        in_dag = RolloutSensor(task_id="roll_out", release=ModelReleaseParams())
    for each in (sensor, in_dag):
        assert (each.retries, each.retry_delay, each.retry_exponential_backoff) == (20, timedelta(seconds=5), False)


def test_rollout__taken_back_by_a_gate__fails_for_good_with_the_reason(sensor: RolloutSensor) -> None:
    with pytest.raises(AirflowFailException, match="digits v2 was rolled back: errors"):
        sensor.judge(state(ROLLED_BACK, CANARY, reason="errors 2 %"))


def test_rollout__rejected__is_skipped_and_tells_the_team(sensor: RolloutSensor, notices: list[str]) -> None:
    with pytest.raises(AirflowSkipException, match="not released: rejected by anna: wrong on 7"):
        sensor.judge(state(ROLLED_BACK, reason="rejected by anna: wrong on 7"))
    assert notices == ["digits v2 is not released: rejected by anna: wrong on 7"]


def test_rollout__pending_without_an_answer_that_counts__fails_and_says_how_to_ask_again(sensor: RolloutSensor) -> None:
    with pytest.raises(AirflowFailException, match=r"1 approval by bert(.|\n)*clear request_approval"):
        sensor.judge(state(PENDING, waiting_for="1 approval by bert", needs_answer=True))


def test_rollout__approved_in_a_freeze__waits(sensor: RolloutSensor) -> None:
    frozen = state(PENDING, waiting_for="approved, but the freeze 'year end' holds", needs_answer=False)
    assert not sensor.judge(frozen).is_done


def weighed(monkeypatch: pytest.MonkeyPatch, exit_code: int, **decision: Any) -> ReleaseApprovalOperator:
    """A task whose question to the engine is answered with this."""
    monkeypatch.setattr(rollout_tasks, "run_perch", lambda *_: CommandOutcome(exit_code, decision))
    return ReleaseApprovalOperator(task_id="request_approval", subject="digits v2")


ASKED = {"rollout_id": "r", "subject": "digits v2"}
ANSWERED_AT = datetime(2026, 11, 20, 9, 0, 0, 5, tzinfo=UTC)
SOURCE = "airflow:model_release/r/request_approval"
COUNTED = [{"by": "anna", "at": "2026-11-20T09:00:00.000005+00:00", "source": SOURCE}]
DENIED = {
    "outcome": "waiting",
    "approvals": [],
    "denials": [{"responder": "anna", "rule": "requester", "reason": "anna: asked for the release; bert may"}],
}


def test_approval__answer_denied_by_the_policy__is_told_and_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    operator = weighed(monkeypatch, 0, **DENIED)
    with pytest.raises(AirflowException, match="asked for again; anna: asked for the release; bert may"):
        operator._refuse_denied(ASKED, "anna", ANSWERED_AT)
    assert notices == [
        "digits v2: an answer does not count: anna: asked for the release; bert may\nIt is asked for again."
    ]
    assert operator.retries > 10


def test_approval__second_by_the_same_person__is_asked_of_another(
    monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    once = {"responder": "anna", "rule": "once", "reason": "anna: has approved already; bert may"}
    operator = weighed(monkeypatch, 0, outcome="waiting", approvals=COUNTED, denials=[once])
    operator._refuse_denied(ASKED, "anna", ANSWERED_AT)
    with pytest.raises(AirflowException, match="bert may"):
        operator._refuse_denied(ASKED, "anna", ANSWERED_AT + timedelta(seconds=9))
    assert len(notices) == 1


@pytest.mark.parametrize(
    "denials", [[], [{"responder": "anna", "rule": "evidence", "reason": "anna: approved evidence ab"}]]
)
def test_approval__of_a_page_that_is_out_of_date__fails_for_good_and_says_how_to_get_another(
    monkeypatch: pytest.MonkeyPatch, denials: list[dict[str, str]]
) -> None:
    operator = weighed(monkeypatch, 0, **{**DENIED, "denials": denials})
    with pytest.raises(AirflowFailException, match="trigger model_release with this version"):
        operator._refuse_denied(ASKED, "anna", ANSWERED_AT)


@pytest.mark.parametrize(
    ("exit_code", "changes"),
    [
        (0, {"approvals": COUNTED, "denials": []}),  # it counts, and another one is wanted
        (0, {"outcome": "approved", "approvals": COUNTED, "denials": []}),
        (0, {"outcome": "rejected", "denials": []}),
        (75, {}),  # the database is away: the answer stays recorded
    ],
)
def test_approval__answer_that_counts_or_cannot_be_weighed__stays(
    monkeypatch: pytest.MonkeyPatch, notices: list[str], exit_code: int, changes: dict[str, Any]
) -> None:
    operator = weighed(monkeypatch, exit_code, **(DENIED | changes))
    operator._refuse_denied(ASKED, "anna", ANSWERED_AT)
    assert notices == []


def test_approval__of_a_further_person__is_made_as_airflow_makes_it_and_asks_again_as_often() -> None:
    from dags.model_release import dag

    mapped = dag.get_task("request_further_approvals")
    made = mapped.unmap({"subject": "digits v2 (2 of 2)"})
    assert isinstance(made, ReleaseApprovalOperator)
    assert (mapped.retries, made.retries) == (100, 100)
    assert (made.defaults, made.retry_exponential_backoff) == (["Reject"], False)


@pytest.mark.parametrize(
    ("exit_code", "changes", "map_index", "option"),
    [
        (0, {"outcome": "approved", "approvals": COUNTED}, -1, "Approve"),
        (0, {"approvals": COUNTED}, -1, "Approve"),  # and another one is wanted
        (0, {"approvals": COUNTED}, 0, ""),  # that was the answer to another request
        (0, {"outcome": "rejected"}, -1, "Reject"),
        (0, {}, -1, ""),
        (75, {}, -1, ""),
    ],
)
def test_approval__tried_again__finds_the_answer_that_counts(
    monkeypatch: pytest.MonkeyPatch, exit_code: int, changes: dict[str, Any], map_index: int, option: str
) -> None:
    operator = weighed(monkeypatch, exit_code, **(DENIED | changes))
    task = SimpleNamespace(dag_id="model_release", run_id="r", task_id="request_approval", map_index=map_index)
    assert operator._find_answer(ASKED, task) == option


def test_latest_candidate__several_events__is_that_of_the_highest_version() -> None:
    result = {"model": "digits", "release_sha256": "9b1e", "evidence_sha256": "5d0f"}
    events = [
        SimpleNamespace(extra=describe_candidate({**result, "version": version}, run_id="r", requested_by="somebody"))
        for version in ("9", "10", "8")
    ]
    assert latest_candidate({"asset": [*events, SimpleNamespace(extra={})]})["version"] == "10"
    assert latest_candidate({}) == {}
