"""Tell the team which version was registered, how good it is, and where its model card is."""

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
        f"model card: {card or workspace.evaluation / 'model_card.html'}",
    ]
    delivered = send_notice(f"{params.model_name}: version {registration['version']} is a candidate", "\n".join(lines))
    return NotifyTeamResult(summary=_summarise(delivered, logged=not settings.notice_urls), delivered=delivered)


def _summarise(delivered: bool, *, logged: bool) -> str:
    if logged:
        return "logged, for PERCH_NOTICE_URLS is empty"
    return "sent" if delivered else "not delivered to all"
