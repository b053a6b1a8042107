"""Tuning trials in pods; the study in the database is their result, so a lost pod is only tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dags.dag_support.stage_pods import PodCommandOperator
from dags.dag_support.trials import collect_words, share_words

if TYPE_CHECKING:
    from airflow.sdk import Context

_STEP = "trials"


class TrialsPodOperator(PodCommandOperator):
    """Runs one share in a pod.

    Args:
        share: `{"share", "of"}`.
    """

    template_fields: Sequence[str] = (*PodCommandOperator.template_fields, "share")

    def __init__(self, *, share: dict[str, int], **kwargs: Any) -> None:
        super().__init__(step=_STEP, **kwargs)
        self.share = share

    def perch_words(self, context: Context) -> list[str]:
        """The same command as in a process."""
        return share_words(self.share, context)


class CollectTrialsPodOperator(PodCommandOperator):
    """Collects the trials in a pod."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(step=_STEP, **kwargs)

    def perch_words(self, context: Context) -> list[str]:
        """The same command as in a process."""
        return collect_words(context)
