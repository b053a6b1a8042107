"""A stage as an Airflow task: the `perch` command in a process of its own, its log live, its result as XCom."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperator, BaseOperatorLink

from dags.dag_support.perch_command import CommandOutcome, run_perch
from dags.dag_support.stage_command import announce_outlets, stage_links, stage_timeout, stage_words
from pipelines.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk import Context


def stage_task(*, stage: str, run_prefix: str = "", **kwargs: Any) -> BaseOperator:
    """The task of a stage, in the runner that `PERCH_RUNNER` names.

    Args:
        stage: the stage's name; the task id.
        run_prefix: set where another DAG's runs could have the same run id.
        kwargs: of any operator.
    """
    kwargs.setdefault("execution_timeout", stage_timeout(stage))
    if get_settings().runner == "kubernetes":
        # Kubernetes' client takes most of a second to import, again and again, where nobody needs it.
        from dags.dag_support.stage_pods import StagePodOperator

        return StagePodOperator(stage=stage, run_prefix=run_prefix, **kwargs)
    return StageOperator(stage=stage, run_prefix=run_prefix, **kwargs)


class CommandOperator(BaseOperator):
    """Runs a `perch` command in a process of its own and returns its JSON.

    Args:
        words: after `perch`, without `--json`.
    """

    def __init__(self, *, words: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs.setdefault("execution_timeout", timedelta(minutes=15))
        super().__init__(**kwargs)
        self.words = tuple(words)
        self.hook: SubprocessHook | None = None

    def perch_words(self, context: Context) -> list[str]:  # noqa: ARG002 - for those whose words depend on the run
        """The command's words after `perch`, without `--json`."""
        return list(self.words)

    def run_command(self, words: Sequence[str]) -> CommandOutcome:
        """Run `perch` with some words, so that `on_kill` ends it."""
        self.hook = SubprocessHook()
        return run_perch(self.hook, *words)

    def execute(self, context: Context) -> Any:
        """Run it."""
        words = self.perch_words(context)
        outcome = self.run_command([*words, "--json"])
        outcome.raise_for_exit(f"perch {' '.join(words)}")
        return outcome.result

    def on_kill(self) -> None:
        """End the process group: a stage's own process is a grandchild."""
        if self.hook is not None:
            self.hook.send_sigterm()


class StageOperator(CommandOperator):
    """Runs `perch <stage> --run <run id>` and returns the stage's result.

    A refusal (exit code 65) fails the task at once: trying again would be refused again.  Any other failure is tried
    again, and because every stage is idempotent, a try that follows a kill ends as if there had been none.

    Args:
        stage: the stage's name; the task id.
        run_prefix: set where another DAG's runs could have the same run id.
    """

    ui_color = "#e8f1f8"

    def __init__(self, *, stage: str, run_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(task_id=stage, **kwargs)
        self.stage = stage
        self.run_prefix = run_prefix
        self.links: dict[str, str] = {}

    @property
    def operator_extra_links(self) -> list[BaseOperatorLink]:
        """The MLflow run, and the stage's report where it has one."""
        return stage_links(self.stage)

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage and return `{"summary", "metrics", …}`."""
        run_id = self.run_prefix + context["dag_run"].run_id
        outcome = self.run_command(stage_words(self.stage, run_id, context))
        result = outcome.result
        self.links = result.pop("links", {})
        outcome.raise_for_exit(self.stage)
        announce_outlets(self, context, result, run_id)
        return result
