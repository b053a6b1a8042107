"""The tasks around a rollout: begin it, ask people, move it.  The engine decides; the tasks only call it and wait."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import BaseOperator, BaseSensorOperator, Param, PokeReturnValue, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from dags.dag_support.perch_command import run_perch
from pipelines.errors import EXIT_OK, EXIT_TRY_LATER
from pipelines.notices import send_notice

if TYPE_CHECKING:
    from airflow.sdk import Context

    from pipelines.params import ModelReleaseParams

BEGIN = "begin_rollout"
# With an empty string as its default, Airflow would grey both buttons out.
COMMENT = {"comment": Param(None, type=["null", "string"], title="Comment", description="Needed to reject.")}
# Up to a hundred answers that do not count.  For `.partial`, too: of a mapped task, Airflow reads its tries there.
ASK_AGAIN = {"retries": 100, "retry_delay": timedelta(seconds=5), "retry_exponential_backoff": False}
# A call that was killed: the next goes on where it ended, and the rollout's own limits end what does not come on.
_CALL_AGAIN = {**ASK_AGAIN, "retries": 20}
_LONGEST_ROLLOUT = timedelta(days=30)  # a freeze may hold one up; its own limits end it long before


class BeginRolloutOperator(BaseOperator):
    """Begins the rollout of the candidate that the asset's event names, or of the version in the form.

    Returns what approvers are asked: `rollout_id`, `subject`, `body`, `deadline`, and of how many `approvals`.
    """

    ui_color = "#e8f1f8"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(task_id=BEGIN, **kwargs)
        self.hook: SubprocessHook | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Begin it, or find the one that is under way."""
        run, version = context["dag_run"], context["params"].get("version")
        candidate = {"version": version} if version else latest_candidate(context["triggering_asset_events"])
        # Without either, the engine takes the last version that passed in staging.
        words = [str(candidate["version"])] if candidate else []
        by = candidate.get("requested_by") or getattr(run, "triggering_user_name", None) or run.run_type
        self.hook = SubprocessHook()
        limits = json.dumps(candidate.get("limits") or {})
        outcome = run_perch(self.hook, "releases", "begin", *words, "--by", by, "--conf", limits, "--json")
        outcome.raise_for_exit("perch releases begin")
        return outcome.result

    def on_kill(self) -> None:
        """End the command."""
        if self.hook is not None:
            self.hook.send_sigterm()


@task(task_id="further_approvals")
def name_further_approvals(asked: dict[str, Any]) -> list[str]:
    """A headline for each person beyond the first that the policy wants."""
    return [f"{asked['subject']} ({number} of {asked['approvals']})" for number in range(2, asked["approvals"] + 1)]


def latest_candidate(events: Any) -> dict[str, Any]:
    """The extra of the newest event; several wait where a release took longer than a training."""
    extras = [event.extra for asset in events for event in events[asset] if event.extra]
    return max(extras, key=lambda extra: int(extra["version"]), default={})


class ReleaseApprovalOperator(ApprovalOperator):
    """Airflow's approval, whose time to answer ends when the policy says; then the answer is no.

    An answer that the promotion policy denies, such as that of who asked for the release, is told to people, and asked
    for again in the task's next try.
    """

    def __init__(self, **kwargs: Any) -> None:
        own = {
            "body": "{{ ti.xcom_pull(task_ids='" + BEGIN + "')['body'] }}",
            "defaults": self.REJECT,
            # A rejection must not skip what records it.
            "ignore_downstream_trigger_rules": False,
            "response_timeout": _LONGEST_ROLLOUT,
        }
        super().__init__(**{**kwargs, **ASK_AGAIN, **own})
        self.hook: SubprocessHook | None = None

    def execute(self, context: Context) -> Any:
        """Ask, until the deadline; in a later try only where no answer to this request counts yet."""
        task = context["ti"]
        asked = task.xcom_pull(task_ids=BEGIN)
        if task.try_number > 1 and (option := self._find_answer(asked, task)):
            answer = {"chosen_options": [option], "params_input": {}, "responded_by_user": None}
            return super().execute_complete(context, {**answer, "responded_at": datetime.now(UTC)})
        left = datetime.fromisoformat(asked["deadline"]) - datetime.now(UTC)
        self.response_timeout = max(left, timedelta(seconds=1))
        return super().execute(context)

    def _find_answer(self, asked: dict[str, Any], task: Any) -> str:
        """What was answered in the try before, as far as it counts; asking again would wipe it out.

        Where an answer comes within seconds of the question, Airflow's scheduler may take the end of the process that
        asked for that of the one that goes on with the answer, and tries the task again.
        """
        self.hook = SubprocessHook()
        weighed = run_perch(self.hook, "releases", "weigh", asked["rollout_id"], "--json")
        if weighed.exit_code != EXIT_OK:
            return ""
        if weighed.result["outcome"] == "rejected":
            return str(self.REJECT)
        mapped = f"/{task.map_index}" if task.map_index >= 0 else ""
        source = f"airflow:{task.dag_id}/{task.run_id}/{task.task_id}{mapped}"
        counted = source in {each["source"] for each in weighed.result["approvals"]}
        return str(self.APPROVE) if counted else ""

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Take the answer, unless the policy denies it.

        Raises:
            AirflowException: it does not count; the next try asks again.
            AirflowFailException: the page is out of date, and Airflow keeps the first that a task of a run has shown.
        """
        user = (event.get("responded_by_user") or {}).get("id", "")
        task = context["ti"]
        if user:  # without, the time ran out, and the answer stays no
            try:
                self._refuse_denied(task.xcom_pull(task_ids=BEGIN), user, event["responded_at"])
            except AirflowException as denial:
                # Airflow never changes the page of a task; a note beside it is what the next try can show.
                words = (
                    "approvals",
                    "note",
                    task.run_id,
                    task.task_id,
                    str(denial),
                    "--map-index",
                    str(task.map_index),
                )
                run_perch(self.hook, *words)
                raise
        return super().execute_complete(context, event)

    def _refuse_denied(self, asked: dict[str, Any], user: str, answered_at: datetime) -> None:
        self.hook = SubprocessHook()
        weighed = run_perch(self.hook, "releases", "weigh", asked["rollout_id"], "--json")
        if weighed.exit_code != EXIT_OK:
            return  # whoever takes the steps will ask again: an answer must not be lost because a database was away
        decision = weighed.result
        counted = {(each["by"], datetime.fromisoformat(each["at"])) for each in decision["approvals"]}
        if decision["outcome"] != "waiting" or (user, answered_at) in counted:
            return
        denial = next((each for each in reversed(decision["denials"]) if each["responder"] == user), None)
        if denial is None or denial["rule"] == "evidence":
            why = denial["reason"] if denial else "it is that of an earlier release"
            raise AirflowFailException(
                f"{user} answered a page that is out of date: {why}\n"
                "  what to do: trigger model_release with this version; the new run shows the page as it is now"
            )
        send_notice(f"{asked['subject']}: an answer does not count", f"{denial['reason']}\nIt is asked for again.")
        raise AirflowException(f"the answer does not count, it is asked for again; {denial['reason']}")

    def on_kill(self) -> None:
        """End the command."""
        if self.hook is not None:
            self.hook.send_sigterm()


class RolloutSensor(BaseSensorOperator):
    """Calls the engine until the rollout has ended, and holds no worker in between.

    Args:
        release: the section `model_release` of params.yaml; until the engine has said the rollout's own pace.
    """

    ui_color = "#e8f1f8"

    def __init__(self, *, release: ModelReleaseParams, **kwargs: Any) -> None:
        own = {"mode": "reschedule", "poke_interval": release.pause_s, "timeout": _LONGEST_ROLLOUT.total_seconds()}
        super().__init__(**{**kwargs, **_CALL_AGAIN, **own})
        self.hook: SubprocessHook | None = None

    def poke(self, context: Context) -> PokeReturnValue:
        """Have the engine look once.

        Raises:
            AirflowSkipException: the release was rejected; nothing went live.
            AirflowFailException: it was rolled back, or the answer does not count and nobody is asked any more.
        """
        rollout_id = context["ti"].xcom_pull(task_ids=BEGIN)["rollout_id"]
        self.hook = SubprocessHook()
        outcome = run_perch(self.hook, "releases", "advance", rollout_id, "--json")
        if outcome.exit_code == EXIT_TRY_LATER:
            return PokeReturnValue(is_done=False)
        outcome.raise_for_exit("perch releases advance")
        self.poke_interval = outcome.result["pause_s"]  # its own limits may be shorter than those of params.yaml
        return self.judge(outcome.result)

    def judge(self, state: dict[str, Any]) -> PokeReturnValue:
        """What the task makes of what the engine says."""
        name = f"{state['model']} v{state['version']}"
        if state["step"] == "promoted" and state["is_finished"]:
            send_notice(f"{name} is the champion", state["summary"])
            return PokeReturnValue(is_done=True, xcom_value=state)
        if state["step"] == "rolled_back":
            if state["was_released"]:
                raise AirflowFailException(f"{name} was rolled back: {state['reason']}")
            send_notice(f"{name} is not released", state["reason"])
            raise AirflowSkipException(f"{name} is not released: {state['reason']}")
        if state["needs_answer"]:
            # Every request was answered, or was marked green without an answer: waiting longer would help nobody.
            raise AirflowFailException(
                f"{name} is not approved; it waits for {state['waiting_for']}\n"
                "  what to do: clear request_approval, or trigger model_release with this version; it asks again"
            )
        return PokeReturnValue(is_done=False)

    def on_kill(self) -> None:
        """End the command; the engine goes on from there at the next call."""
        if self.hook is not None:
            self.hook.send_sigterm()
