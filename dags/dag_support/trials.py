"""Tuning trials as mapped tasks before the stage that takes them as given: planned, run side by side, collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, TriggerRule

from dags.dag_support.stage_command import stage_timeout
from dags.dag_support.stage_tasks import CommandOperator
from pipelines.core.stage_graph import StageNode
from pipelines.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk import Context

_INPUT = "tuning"  # a stage that reads it takes trials as given


def add_trials(stages: Sequence[StageNode], tasks: Mapping[str, BaseOperator]) -> None:
    """Before a stage that takes trials as given, run them side by side, where a database is named for them.

    Args:
        stages: of the graph.
        tasks: by stage; the edges between them are there already.
    """
    if not get_settings().tuning_url:
        return
    for stage in stages:
        if _INPUT not in stage.inputs:
            continue
        plan = PlanTrialsOperator(task_id="plan_trials", doc_md="Say in how many shares the trials are done.")
        share, collect = _operators()
        # Of a mapped task, Airflow reads its limit there, and not where it is made.
        limits = {"execution_timeout": stage_timeout("trials")}
        run = share.partial(task_id="trials", doc_md="Run one share of the trials.", **limits).expand(share=plan.output)
        collected = collect(task_id="collect_trials", doc_md="Write what the trials found into the run.")
        for upstream in stage.upstream:
            tasks[upstream] >> plan
        run >> collected >> tasks[stage.name]
        tasks[stage.name].trigger_rule = TriggerRule.NONE_FAILED  # no shares are no reason to stop


def _operators() -> tuple[type[BaseOperator], type[BaseOperator]]:
    """Those of the runner that `PERCH_RUNNER` names: for a share, and to collect."""
    if get_settings().runner == "kubernetes":
        from dags.dag_support.trial_pods import CollectTrialsPodOperator, TrialsPodOperator

        return TrialsPodOperator, CollectTrialsPodOperator
    return TrialsOperator, CollectTrialsOperator


class PlanTrialsOperator(CommandOperator):
    """Returns one entry per share; the plan needs no more than the run's parameters."""

    def perch_words(self, context: Context) -> list[str]:
        """Ask for the plan."""
        return ["trials", "plan", "--run", context["dag_run"].run_id]

    def execute(self, context: Context) -> list[dict[str, int]]:
        """Ask for it."""
        shares: list[dict[str, int]] = super().execute(context)["shares"]
        return shares


class TrialsOperator(CommandOperator):
    """Runs one share in a process.

    Args:
        share: `{"share", "of"}`.
    """

    template_fields = ("share",)

    def __init__(self, *, share: dict[str, int], **kwargs: Any) -> None:
        kwargs.setdefault("execution_timeout", stage_timeout("trials"))
        super().__init__(**kwargs)
        self.share = share

    def perch_words(self, context: Context) -> list[str]:
        """The same command as in a pod."""
        return share_words(self.share, context)


class CollectTrialsOperator(CommandOperator):
    """Collects the trials in a process."""

    def perch_words(self, context: Context) -> list[str]:
        """The same command as in a pod."""
        return collect_words(context)


def share_words(share: Mapping[str, int], context: Context) -> list[str]:
    """The command's words after `perch`."""
    run_id = context["dag_run"].run_id
    return ["trials", "run", "--run", run_id, "--share", str(share["share"]), "--of", str(share["of"])]


def collect_words(context: Context) -> list[str]:
    """The command's words after `perch`."""
    return ["trials", "collect", "--run", context["dag_run"].run_id]
