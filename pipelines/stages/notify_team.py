"""Tell the team which version waits for an approval, how good it is, where its model card is, and where to answer."""

from __future__ import annotations

import json

from pipelines.core.results import StageResult
from pipelines.core.workspace import Workspace
from pipelines.notices import send_notice
from pipelines.params import Params


class NotifyTeamResult(StageResult):
    """Whether the notice reached everybody it was meant for."""

    delivered: bool


def run(params: Params, workspace: Workspace) -> NotifyTeamResult:
    """Send the notice; one that does not arrive is reported but fails nothing."""
    from pipelines.registry.tracking import artifact_url, find_run
    from pipelines.settings import get_settings

    settings = get_settings()
    registration = json.loads(workspace.result_file("model_registration").read_text(encoding="utf-8"))
    evaluation = json.loads(workspace.result_file("model_evaluation").read_text(encoding="utf-8"))
    card = artifact_url(settings, find_run(settings, params, workspace), "model_evaluation/model_card.html")
    lines = [
        registration["summary"],
        evaluation["summary"],
        *_list_numbers(workspace),
        f"model card: {card or workspace.evaluation / 'model_card.html'}",
    ]
    if settings.airflow_uri:
        lines.append(f"approve or reject: {settings.airflow_uri}/required_actions?response_received=false")
    delivered = send_notice(f"{params.model_name}: version {registration['version']} is a candidate", "\n".join(lines))
    return NotifyTeamResult(summary=_summarise(delivered, logged=not settings.notice_urls), delivered=delivered)


def _list_numbers(workspace: Workspace) -> list[str]:
    """Three numbers against the champion, where there is one."""
    from pipelines.release.approval_page import compare_numbers

    metrics = json.loads((workspace.evaluation / "metrics.json").read_text(encoding="utf-8"))
    if metrics["reference"]["kind"] != "champion":
        return []
    return [f"{word} {mine}, champion {theirs}: {change}" for word, mine, theirs, change in compare_numbers(metrics)]


def _summarise(delivered: bool, *, logged: bool) -> str:
    if logged:
        return "logged, for PERCH_NOTICE_URLS is empty"
    return "sent" if delivered else "not delivered to all"
